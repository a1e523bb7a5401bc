"""The command train: runs, one after another or at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dnkd_ext
from dnkd_ext._files import TEMPORARY
from dnkd_ext.train import tasks
from dnkd_ext.train.at_once import train_at_once
from dnkd_ext.train.checkpoint import remove_unnamed, shard_folders
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.engine import train
from dnkd_ext.train.files import (
    CLASS_MEANS,
    CONFIG,
    CURVES,
    OWN_FILES,
    RESULT,
    SUMMARY,
    TENSORBOARD,
    WANDB,
    remove_temporaries,
    write_csv,
    write_json,
)
from dnkd_ext.train.gather import remove_parts
from dnkd_ext.train.locks import OwnFolders
from dnkd_ext.train.plan import (
    Found,
    Job,
    check_inputs,
    check_overwritten,
    check_teacher_outputs,
    checked_job,
    look,
    present_files,
)
from dnkd_ext.train.plots import plot_curves
from dnkd_ext.train.shared import Shared
from dnkd_ext.train.signals import Interrupted
from dnkd_ext.train.summary import (
    all_results,
    format_summary,
    result_line,
    summary,
)
from dnkd_ext.train.teacher_outputs import check_room
from dnkd_ext.train.world import World

__all__ = ["prepare_device", "run_jobs"]


def run_jobs(
    jobs: list[Job],
    out: Path,
    world: World,
    *,
    resume: bool = False,
    overwrite: bool = False,
    at_once: int = 1,
) -> list[dict[str, Any]]:
    """Train one after another, or some at a time; data and teachers are read once.

    Args:
        jobs: the runs.
        out: the folder of all of them.
        world: the processes.
        resume: go on with what the folders hold.
        overwrite: replace it.
        at_once: how many at a time, each in a process of its own and with its share of the CPU's
            cores, which is the same when few are left: figures depend on the number of threads.

    Returns:
        What the ``result.json`` of every job holds.

    Raises:
        FileExistsError: a folder holds a run, and neither ``resume`` nor ``overwrite`` is given.
        BlockingIOError: another process of this machine writes to a folder. Of one that it has
            taken since, like FloatingPointError; as FileExistsError where it has left a run there.
        ValueError, FileNotFoundError: a wrong option or input; what can be told beforehand is told
            before the first job begins, and nothing is written then.
        FloatingPointError: runs failed, see :func:`dnkd_ext.train.engine.train`; preset, seed and
            folder are named. It is raised after the others have been trained.
        ChildProcessError: likewise, of runs at once.
        Interrupted: likewise, at once.
    """
    with world.together():
        if at_once < 1 or (at_once > 1 and world.size > 1):
            raise ValueError(
                "--at-once must be at least 1, and 1 for several processes of torchrun, got "
                f"{at_once}"
            )
        ready = [checked_job(job, world) for job in jobs]
    states: list[Found] = []
    with OwnFolders() as own:
        with world.first_alone():
            if world.is_first:
                for job in ready:
                    if job.out.is_dir():
                        own.take(job.out)
                if overwrite:
                    check_overwritten(ready)
                if all(job.out != out for job in ready) and present_files(out):
                    raise FileExistsError(
                        f"--out {out} is the folder of a run, and cannot be that of several, in "
                        "whose table it would be, too; choose another"
                    )
                states = [look(job, resume, overwrite) for job in ready]
        states = world.from_first(states)
        is_done = all(state.result is not None for state in states)
        at_once = 1 if is_done else min(at_once, len(states))
        options = (out, world, own, resume, overwrite, at_once)
        if at_once > 1:
            with _decoded_once(ready, out) as borrowing:
                return _run_ready(borrowing, states, *options)
        return _run_ready(ready, states, *options)


@contextlib.contextmanager
def _decoded_once(jobs: list[Job], out: Path) -> Iterator[list[Job]]:
    """The jobs with a file of decoded images, as long as the context lasts, if they have none."""
    cache = out / f".images.{uuid.uuid4().hex}{TEMPORARY}"
    borrowing = []
    for job in jobs:
        if job.config.data.task == "cifar" and job.config.data.cache is None:
            config = replace(job.config, {"cache": os.fspath(cache)})
            job = dataclasses.replace(job, config=config, recorded={"cache": None})
        borrowing.append(job)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Those of calls that were killed; the runs of another call would decode anew.
        for left in out.glob(f".*images.*{TEMPORARY}"):  # half written ones, too
            left.unlink(missing_ok=True)
        yield borrowing
    finally:
        cache.unlink(missing_ok=True)
        # Nothing stays of what was refused; a folder that holds something does.
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _run_ready(
    ready: list[Job],
    states: list[Found],
    out: Path,
    world: World,
    own: OwnFolders,
    resume: bool,
    overwrite: bool,
    at_once: int,
) -> list[dict[str, Any]]:
    """Train checked jobs, whose folders hold ``states``; see run_jobs."""
    shared = Shared(world)
    outputs: dict[Path, dict[str, str]] = {}
    for job, state in zip(ready, states, strict=True):
        with world.together():
            prepare_device(job.config, world)  # before anything runs on it
            check_inputs(job, state, shared, world)
            if state.result is None:
                check_teacher_outputs(job, outputs, shared, world)
    with world.together():
        check_room(outputs, world.device, at_once)
    if overwrite:
        with world.first_alone():
            if world.is_first:
                # All of them, results first, so that nothing old is taken for a part of the new.
                for job in ready:
                    _remove(job.out)
    done = {
        job.out: state.result
        for job, state in zip(ready, states, strict=True)
        if state.result is not None
    }
    if world.is_first:
        for folder, result in done.items():
            print(f"finished before: {result_line(result, folder)}", flush=True)
    todo = [job for job in ready if job.out not in done]
    failed: list[str] = []
    kind: type[Exception] | None = ChildProcessError if at_once > 1 else None
    if at_once > 1:
        failed = _run_at_once(todo, shared, own, resume, at_once)
    for job in todo:
        if at_once > 1:
            if (job.out / RESULT).exists():
                done[job.out] = json.loads((job.out / RESULT).read_text(encoding="utf-8"))
            continue
        try:
            done[job.out] = _run(job, shared, world, own, resume, is_last=job is todo[-1])
        except (FloatingPointError, BlockingIOError, FileExistsError) as error:
            # The first is the same on all processes; of the others the first process alone knows.
            if world.size > 1 and not isinstance(error, FloatingPointError):
                raise
            failed.append(f"{_name(job)}: {error}")
            kind = kind or type(error)
    with world.first_alone():
        if world.is_first and len(ready) > 1:
            rows = summary(all_results(out))
            write_csv(out / SUMMARY, rows)
            lines = [format_summary(rows)] if rows else []
            print("\n".join([*lines, *(f"failed: {one}" for one in failed)]), flush=True)
        if world.is_first and failed:
            many = f"{len(failed)} of {len(ready)} runs failed: " if len(ready) > 1 else ""
            raise (kind or FloatingPointError)(many + "; ".join(failed))
    return [done[job.out] for job in ready]


def _remove(out: Path) -> None:
    """A run's files, and no others."""
    for name in OWN_FILES:
        (out / name).unlink(missing_ok=True)
    remove_parts(out / CLASS_MEANS)
    for folder in (out / TENSORBOARD, out / WANDB, *shard_folders(out)):
        shutil.rmtree(folder, ignore_errors=True)


def prepare_device(config: TrainConfig, world: World) -> None:
    """Settings of PyTorch that belong to the options."""
    if world.device.type != "cuda":
        return
    run = config.run
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)
    if run.deterministic:
        # A launch for every fresh tensor of every step, against reading what was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False
    # A detector's batches have hundreds of shapes, each of which would be searched for anew.
    torch.backends.cudnn.benchmark = not (run.deterministic or tasks.is_detection(config))


def _take(job: Job, own: OwnFolders, resume: bool) -> dict[str, Any] | None:
    """Keep others out of a run's folder; the result, if another process has finished it meanwhile.

    Where the folder was not there when all were looked at, which may be days ago, it is looked at
    now.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    if not own.take(job.out):
        return None
    try:
        result = look(job, resume, overwrite=False).result
    except ValueError as error:  # a run of other options
        raise FileExistsError(str(error)) from error
    if result is not None:
        print(f"finished meanwhile: {result_line(result, job.out)}", flush=True)
    return result


def _run(
    job: Job, shared: Shared, world: World, own: OwnFolders, resume: bool, *, is_last: bool
) -> dict[str, Any]:
    """Train one job, and leave its files; the result.

    Raises:
        Interrupted: as asked for; at the end of the last epoch behind the result, only where the
            job is not the last one.
    """
    config, out = job.config, job.out
    result = None
    with world.first_alone():
        if world.is_first:
            result = _take(job, own, resume)
            if result is None:
                remove_temporaries(out)
                remove_unnamed(out)
    result = world.from_first(result)
    if result is not None:
        return result
    prepare_device(config, world)
    teacher = shared.complete_teacher(config, out)
    source = shared.source(config)
    task = tasks.task_class(config)(config, source, teacher, world)
    with world.first_alone():
        if world.is_first:
            # From here on the folder holds a run.
            write_json(out / CONFIG, job.settings)
            print(_heading(job, source, world), flush=True)
    log = train(
        task,
        config.optim,
        config.run,
        out,
        world,
        kd_warm_up=config.method.kd_warm_up,
        resume=resume,
        metadata=tasks.weights_notes(source, config),
        settings=job.settings,
    )
    last = log["rows"][-1]
    figure = task.metric.removeprefix("test_")
    result = {
        "preset": config.preset,
        "seed": config.run.seed,
        # By which the best weights are chosen, and of which best and last are.
        "metric": log["metric"],
        f"published_{figure}": job.published,
        f"best_{figure}": log["best"],
        "best_epoch": log["best_epoch"],
        f"last_{figure}": last[log["metric"]],
        "last": last,
        "training_seconds": log["seconds"],
        "train_images": source.train_images,
        # Those that the accuracies are of.
        "test_images": source.test_images - last.get("test_unreadable", 0),
        **{name: last[name] for name in ("train_unreadable", "test_unreadable") if name in last},
        "processes": world.size,
        "machine": machine(world),
        "config": job.settings,
        "versions": dnkd_ext.build_info(),
    }
    name = config.preset or config.model.student
    result |= task.finish(out, log["judged"], name)
    with world.first_alone():
        if world.is_first:
            plot_curves({name: log["rows"]}, out / CURVES)
            # Last, so that it stands for a complete folder.
            write_json(out / RESULT, result)
            print(result_line(result, out), flush=True)
    if log["stopped"] and not is_last:
        name = signal.Signals(log["stopped"]).name
        raise Interrupted(
            f"stopped by {name} at the end of a run; --resume goes on with the others",
            log["stopped"],
        )
    return result


def _run_at_once(
    jobs: list[Job], shared: Shared, own: OwnFolders, resume: bool, number: int
) -> list[str]:
    """Train jobs in processes of their own, for which the teacher's part is gathered here.

    Returns:
        Those that failed, and have told why.

    Raises:
        Interrupted: see :func:`dnkd_ext.train.at_once.train_at_once`.
    """
    todo, failed = [], []
    for job in jobs:
        if _take(job, own, resume) is None:
            prepare_device(job.config, shared.world)
            try:
                shared.complete_teacher(job.config, job.out)
                todo.append(job)
            except FloatingPointError as error:
                failed.append(f"{_name(job)}: {error}")
    shared.forget()
    return failed + train_at_once(todo, number, own.release)


def _name(job: Job) -> str:
    return f"{job.config.preset or 'run'}, seed {job.config.run.seed}, in {job.out}"


def _heading(job: Job, source: Any, world: World) -> str:
    config = job.config
    method = config.method
    words = [f"{config.preset or 'no preset'}, seed {config.run.seed}:"]
    words.append(f"{config.model.student}")
    if config.needs_teacher:
        words.append(f"from {config.model.teacher} by {method.method}, nd {method.nd_weight:g},")
    words.append(f"on {source.train_images} images of {source.name}, {config.optim.epochs} epochs;")
    words.append(f"{world.device.type}, {config.run.precision}")
    words[-1] += f", {world.size} processes" if world.size > 1 else ", 1 process"
    if config.run.fsdp:
        words.append("share the student" + " and the teacher" * config.run.fsdp_teacher)
    optim = config.optim
    plain, _, tag = config.model.student.partition(".")
    if tag:
        words.append(f"\nnote: a student begins with fresh weights, not with {plain}'s .{tag}")
    late = [step for step in optim.milestones if step >= optim.epochs]
    if optim.schedule == "multistep" and late:
        words.append(f"\nnote: the run ends before --milestones {' '.join(map(str, late))}")
    if config.needs_teacher and method.kd_warm_up >= optim.epochs:
        words.append(f"\nnote: the run ends before --kd-warm-up {method.kd_warm_up} does")
    return " ".join(words).replace(" \n", "\n")


def machine(world: World) -> dict[str, Any]:
    """What it ran on."""
    return {
        "device": (
            torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        ),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
