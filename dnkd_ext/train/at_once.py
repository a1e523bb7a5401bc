"""Several runs at once on one device, each in a process of its own.

``python -m dnkd_ext.train.at_once JOB`` is such a process: JOB is JSON of the run's configuration,
its folder, its published accuracy and the options that its files are to have otherwise.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from dnkd_ext.progress import Progress
from dnkd_ext.train.config import TrainConfig, flatten, replace
from dnkd_ext.train.data.workers import worker_death
from dnkd_ext.train.files import LOG
from dnkd_ext.train.plan import Job
from dnkd_ext.train.signals import Interrupted, Signals
from dnkd_ext.train.world import join_world

__all__ = ["train_at_once"]

# Seconds between two looks at the logs.
LOOK_EVERY = 1.0


def train_at_once(
    jobs: Sequence[Job], number: int, hand_over: Callable[[Path], None] = lambda _: None
) -> list[str]:
    """Train jobs by so many processes at a time; what they say goes where this one's does.

    SIGINT and SIGTERM are handed on, once: every run writes a checkpoint and ends. So it does where
    this process is killed.

    Args:
        jobs: with configurations that fit this device, in folders that hold no other runs.
        number: how many at a time.
        hand_over: called with a job's folder before a process begins to write to it.

    Returns:
        The runs that failed, with their folders and exit statuses; the others go on.

    Raises:
        Interrupted: all runs have ended.
    """
    # They share the CPU's cores.
    threads = max(1, torch.get_num_threads() // number)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    waiting, failed = list(jobs), []
    running: dict[subprocess.Popen[bytes], Job] = {}
    told = False
    epochs = {job.out: _epochs(job.out)[0] for job in jobs}
    total = sum(job.config.optim.epochs for job in jobs)
    shown = any(job.config.run.progress for job in jobs)
    looked = time.monotonic()
    try:
        with (
            Signals() as signals,
            Progress(
                total, "train", unit="epoch", initial=sum(epochs.values()), enabled=shown
            ) as bar,
        ):
            while running or (waiting and not signals.received):
                while waiting and len(running) < number and not signals.received:
                    job = waiting.pop(0)
                    hand_over(job.out)
                    # In a session of its own: a terminal's interrupt reaches this process alone.
                    process = subprocess.Popen(
                        [sys.executable, "-m", "dnkd_ext.train.at_once", _told(job)],
                        env=environment,
                        # Nothing is written: the pipe ends when this process does.
                        stdin=subprocess.PIPE,
                        start_new_session=True,
                    )
                    running[process] = job
                if signals.received and not told:
                    told = True
                    for process in running:
                        process.send_signal(signal.SIGTERM)
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    _close(process)
                    if process.returncode:
                        failed.append(f"{job.out} (exit status {process.returncode})")
                if shown and time.monotonic() - looked > LOOK_EVERY:
                    looked = time.monotonic()
                    _show(bar, jobs, running.values(), epochs)
                time.sleep(0.1)
            _show(bar, jobs, (), epochs)
    finally:
        for process in running:
            process.kill()
            process.wait()
            _close(process)
    if signals.received:
        name = signal.Signals(signals.received).name
        raise Interrupted(f"stopped by {name}; --resume goes on with all runs", signals.received)
    return failed


def _epochs(out: Path) -> tuple[int, float]:
    """How many epochs the log of a run has, and the last one's images per second."""
    try:
        with (out / LOG).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return len(rows), float(rows[-1]["images_per_second"])
    except (OSError, IndexError, KeyError, TypeError, ValueError, csv.Error):
        return 0, 0.0  # none yet, or half of a row


def _show(
    bar: Progress, jobs: Sequence[Job], running: Collection[Job], epochs: dict[Path, int]
) -> None:
    """Bring the bar to what the logs of the runs have."""
    speeds, moved = {}, False
    for job in jobs:
        done, speeds[job.out] = _epochs(job.out)
        if done > epochs[job.out]:
            bar.advance(done - epochs[job.out])
            epochs[job.out], moved = done, True
    if running and moved:
        speed = sum(speeds[job.out] for job in running)
        bar.say(f"runs at once: {len(running)}, {speed:.0f} img/s")


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _end_with_parent() -> None:
    """SIGTERM when standard input ends; otherwise --resume would give a folder two writers."""

    def wait() -> None:
        # Not sys.stdin, whose lock a daemon thread would still hold when the interpreter ends.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _told(job: Job) -> str:
    config = flatten(job.config)
    given = {
        "config": {**config, "progress": False},
        "out": os.fspath(job.out),
        "published": job.published,
        "recorded": {"progress": config["progress"], **job.recorded},
    }
    return json.dumps(given)


def main(told: str) -> int:
    """One of the processes; what is wrong is a line on standard error, as in dnkd train."""
    from dnkd_ext.train.jobs import run_jobs  # which imports this module

    _end_with_parent()
    given = json.loads(told)
    config = replace(TrainConfig(), given.pop("config"))
    job = Job(config, Path(given.pop("out")), **given)
    try:
        with join_world(job.config.run.device) as world:
            run_jobs([job], job.out, world, resume=True)
    except Interrupted as stopped:
        print(f"{job.out}: {stopped}", flush=True)
        return 128 + stopped.signal
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"{job.out}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        died = worker_death(error)
        if died is None:
            raise
        print(f"{job.out}: error: {died}; --resume goes on", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
