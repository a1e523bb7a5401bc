"""Everything that needs a GPU, in stages that can be interrupted, with its results in one folder.

build compiles for the GPU that is there, tests runs what needs one, and beside it sanitize runs
compute-sanitizer over every kernel variant; bench measures the ladder of peers, e2e whole training
steps and the parts of training, kernels reads what the compiler made of them, and host-tests runs
the other tests: what a GPU alone can tell comes first, should the time not suffice for all. Every
stage consists of items and keeps which of them passed: started again it goes on where it stopped,
unless the sources or the GPU changed. A stage stops at its limit in time; what it did by then is
kept.
Needs no network; uses the Python it runs in.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.peers import unavailable
from benchmarks.sources import library_obstacle

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "tests", "sanitize", "bench", "e2e", "kernels", "host-tests")
# They run at the same time: the host binds both, and nothing in them is timed.
TOGETHER = ("tests", "sanitize")
# Seconds; below the ten minutes after which many machines end a job.
LIMIT = 540
# At most this many files: state, summary, and these logs and results.
LOGS = {
    "build": "tools.log", "kernels": "tools.log", "sanitize": "tools.log", "tests": "tests.log",
    "host-tests": "tests.log", "bench": "bench.log", "e2e": "bench.log",
}  # fmt: skip
STATE, SUMMARY = "state.json", "summary.txt"
LADDER, STEPS, TRAINING = "losses.csv", "steps.csv", "training.csv"
# Of the parts of training: in place of running the teacher.
LOOKED_UP = ("--cuda-graph", "--teacher-outputs", "--preset", "cifar100/resnet56-resnet20/kd++")
# In one process each: it takes as long to import torch under the sanitizer as to run a loss. But
# racecheck takes longest by far, and all dtypes of the logits' losses more than the limit.
OF_ROWS, OF_LOGITS = ("nd_loss", "diagnostics", "scale"), ("ce_kd_loss", "ce_dkd_loss", "dist_loss")
DTYPES = ("float16", "bfloat16", "float32", "float64")
SANITIZED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    *(("memcheck", losses, ()) for losses in (OF_ROWS, OF_LOGITS)),
    ("racecheck", OF_ROWS, ()),
    *(("racecheck", (loss,), (dtype,)) for loss in OF_LOGITS for dtype in DTYPES),
    *(("initcheck", losses, ()) for losses in (OF_ROWS, OF_LOGITS)),
    # Of barriers, which these alone have in loops that blocks leave at different times.
    *(("synccheck", (loss,), ("float32",)) for loss in OF_LOGITS),
)
# compile-max and ours in a compiled step take minutes to compile and answer no target:
# `python -m benchmarks run --device cuda` has them.
BENCHED = ("ours", "noise", "module", "loop", "eager", "compile", "liger", "copy")
# About how long each peer is timed per case: a GPU's times vary little, and there are many cases.
SECONDS = 0.4
# The longest file's tests, in parts that are kept apart.
PARTS = {
    "test_operators.py": (
        "nd_loss or dist_loss", "dkd_loss", "not (nd_loss or dist_loss or dkd_loss)",
    ),
}  # fmt: skip
# What pytest exits with where none of a file's tests was asked for.
NO_TESTS = 5
# How long an interrupted command has to write what it measured.
GRACE = 10.0

PASSED, FAILED, UNFINISHED = "PASS", "FAIL", "UNFINISHED"


@dataclass(frozen=True)
class Item:
    """A command of a stage that is run again as a whole, or goes on by itself.

    Attributes:
        name: in the state and the log.
        command: what runs.
        environment: beside that of all commands.
        resumes: whether the command keeps its own results and goes on from them.
        good: the exit statuses of one that passed.
    """

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    resumes: bool = False
    good: tuple[int, ...] = (0,)


def needs_a_gpu(source: str) -> bool:
    """Whether a file has tests for a GPU: by the mark, or by the parameter that tests/ runs on all
    devices."""
    of_all = re.search(r"^def test_\w+\([^)]*\bdevice\b", source, re.MULTILINE)
    return "pytest.mark.cuda" in source or of_all is not None


def items(stage: str, out: Path, *, force: bool = False) -> list[Item]:
    """What a stage runs; with ``force`` nothing that was measured before is taken for done."""
    python = sys.executable
    if stage == "build":
        return [Item("build", (python, "setup.py", "build_ext", "--inplace"))]
    if stage == "kernels":
        return [Item("kernels", (python, "-m", "benchmarks.kernels_report"))]
    if stage in ("tests", "host-tests"):
        which = "cuda" if stage == "tests" else "not cuda"
        pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which)
        texts = {path: path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
        # The longest first: those that compile take minutes whatever their size.
        files = sorted(
            texts, key=lambda path: ("fullgraph" in texts[path], len(texts[path])), reverse=True
        )
        files.sort(key=lambda path: path.name not in PARTS)
        if stage == "tests":  # the others need not be imported to know
            files = [path for path in files if needs_a_gpu(texts[path])]
        check = Item("self-check", (python, "-m", "dnkd_ext", "info", "--check"))
        return [
            *([check] if stage == "tests" else []),
            *(
                # Where a file's tests for a GPU are not even found, something is missing.
                Item(
                    path.name + (f", {part}" if part else ""),
                    (*pytest, f"tests/{path.name}", *(("-k", part) if part else ())),
                    good=(0,) if stage == "tests" else (0, NO_TESTS),
                )
                for path in files
                for part in (PARTS.get(path.name, ("",)) if stage == "tests" else ("",))
            ),
        ]
    if stage == "sanitize":
        homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
        beside_nvcc = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
        tool = (
            shutil.which("compute-sanitizer")
            or shutil.which("compute-sanitizer", path=beside_nvcc)
            or "compute-sanitizer"
        )
        return [
            Item(
                " ".join((check, *losses, *dtypes)),
                (
                    tool, "--tool", check, "--error-exitcode", "9", python, "-m",
                    "benchmarks.sanitize", *(word for loss in losses for word in ("--loss", loss)),
                    *(word for dtype in dtypes for word in ("--dtype", dtype)),
                ),
                # Blocks of the caching allocator would hide accesses beyond a tensor.
                (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
            )
            for check, losses, dtypes in SANITIZED
        ]  # fmt: skip

    def measure(name: str, command: str, file: str, *options: str) -> Item:
        again = () if force else ("--resume",)
        start = (python, "-m", "benchmarks", command, "--device", "cuda", *again, *options)
        return Item(name, (*start, "--out", str(out / file)), resumes=True)

    if stage == "bench":
        there = [peer for peer in BENCHED if unavailable(peer, "cuda") is None]
        return [
            measure("run", "run", LADDER, "--peers", ",".join(there), "--seconds", str(SECONDS))
        ]
    return [
        measure("e2e", "e2e", STEPS),
        measure("training recorded", "training", TRAINING, "--cuda-graph"),
        measure("training looked up", "training", TRAINING, *LOOKED_UP),
        measure("detection", "e2e", STEPS, "--shape", "detection"),
        measure("training", "training", TRAINING),
    ]


class State:
    """Which items passed or failed, of which sources on which GPU; on disk after every item."""

    def __init__(self, path: Path, key: dict[str, str]) -> None:
        self.path, self.key = path, key
        self.lock = threading.RLock()  # of the stages, which several threads read and change
        self.stages: dict[str, dict[str, Any]] = {}
        self.held: tuple[int, ...] = ()  # what tells others that the folder is in use
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(known, dict) and isinstance(known.get("stages"), dict):
            # What was done with other sources or on another GPU is done again.
            self.stages = {
                name: stage
                for name, stage in known["stages"].items()
                if isinstance(stage, dict) and stage.get("key") == key
            }

    def of(self, stage: str) -> dict[str, Any]:
        """The record of a stage: ``items`` (name to PASS or FAIL) and ``seconds``."""
        with self.lock:
            return self.stages.setdefault(stage, {"key": self.key, "items": {}, "seconds": 0.0})

    def forget(self, stage: str) -> None:
        """Begin a stage anew."""
        self.stages.pop(stage, None)

    def save(self) -> None:
        """Replace the file at once, so that an interruption leaves the old or the new one."""
        with self.lock:
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps({"stages": self.stages}, indent=1) + "\n")
            beside.replace(self.path)


def status(record: dict[str, Any], planned: Sequence[Item]) -> str:
    """PASS, FAIL, or UNFINISHED where items are left."""
    results = [record["items"].get(item.name) for item in planned]
    if None in results:
        return UNFINISHED
    return PASSED if all(result == PASSED for result in results) else FAILED


def run_stage(
    stage: str,
    planned: Sequence[Item],
    out: Path,
    state: State,
    limit: float,
    jobs: int = 1,
    cancelled: threading.Event | None = None,
    is_whole: bool = True,
) -> str:
    """Run the items that have not passed, the new ones first, until the limit.

    With ``jobs`` more than 1 as many run at a time, and each enters the log when it has ended.
    ``cancelled`` ends what runs, from another thread. An item that has the limit for itself and
    needs more has failed, unless the limit is what is left of the time (not ``is_whole``).
    """
    cancelled = cancelled or threading.Event()
    record = state.of(stage)
    start = time.monotonic()
    left = [item for item in planned if record["items"].get(item.name) != PASSED]
    left.sort(key=lambda item: item.name in record["items"])  # those that failed come last
    lock = state.lock

    def work(item: Item, log: IO[str], own: IO[str]) -> None:
        begin = time.monotonic()
        remaining = start + limit - begin
        if remaining <= 0 or cancelled.is_set():
            return
        print(f"{stage}: {item.name}", file=sys.stderr, flush=True)
        code = _run(item, own, remaining, cancelled, jobs, state.held)
        had_it_all = left == [item] or (item is left[0] and jobs == 1)
        with lock:
            if own is not log:
                own.seek(0)
                shutil.copyfileobj(own, log)
            record["seconds"] += time.monotonic() - begin
            if code is not None:
                record["items"][item.name] = PASSED if code in item.good else FAILED
            elif had_it_all and is_whole and not item.resumes and not cancelled.is_set():
                # It had all the time there is: it would never finish.
                record["items"][item.name] = FAILED
                log.write(f"{item.name} alone needs more than the limit of {limit:.0f} s\n")
            log.flush()
            state.save()

    def work_apart(item: Item, log: IO[str]) -> None:
        with tempfile.TemporaryFile("w+", errors="replace") as own:
            work(item, log, own)

    with (out / LOGS[stage]).open("a") as log:
        if jobs == 1:
            for item in left:
                work(item, log, log)
                if item.name not in record["items"]:
                    break  # the time is over
            return status(record, planned)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in [pool.submit(work_apart, item, log) for item in left]:
                    done.result()
            except BaseException:
                cancelled.set()
                raise
    return status(record, planned)


def _run(
    item: Item,
    log: IO[str],
    remaining: float,
    cancelled: threading.Event,
    jobs: int,
    held: tuple[int, ...] = (),
) -> int | None:
    """The exit status; None where it was stopped because the time was over."""
    log.write(f"\n== {item.name}\n$ {' '.join(item.command)}\n")
    log.flush()
    environment = {
        # Where several run at a time, threads that wait for each other would take all processors.
        **({"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"} if jobs > 1 else {}),
        **os.environ, "PYTHONUNBUFFERED": "1", "DNKD_CUDA": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "DNKD_REQUIRE_EXT": "1" if item.name not in ("build", "kernels") else "0",
        **dict(item.environment),
    }  # fmt: skip
    try:
        process = subprocess.Popen(
            item.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=held,
        )  # fmt: skip
    except OSError as error:
        log.write(f"cannot be started: {error}\n")
        return 127
    grace = min(GRACE, remaining / 4)
    end = time.monotonic() + remaining - grace
    try:
        while time.monotonic() < end and not cancelled.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=min(0.5, max(0.01, end - time.monotonic())))
                log.write(f"exit status {code}\n")
                return code
        log.write("stopped: the stage's time was over\n")
        return None
    finally:
        _stop(process, grace)


def _stop(process: subprocess.Popen, grace: float) -> None:
    """End a command and what it started: first as Ctrl-C does, then at once."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind


def closing(out: Path, device: str) -> list[str]:
    """The targets and a line per kernel, from the results in the folder."""
    from benchmarks import report, results, steps, targets

    ladder, walked = out / LADDER, out / STEPS
    try:
        # What older sources or another torch gave says nothing about these.
        rows = results.of_now(results.read(ladder) if ladder.exists() else [])
        walked_rows = results.of_now(steps.read_steps(walked) if walked.exists() else [])
    except results.ResultsError as error:
        return [f"FAIL {error}"]
    found: results.Latest = {}
    for (hardware, kind, _), one in results.latest(results.measurements(rows)).items():
        if kind == "cuda" and hardware == device:
            found = one
    groups = steps.latest_steps(walked_rows)
    own = [row for group in groups if group[0]["hardware"] == device for row in group]
    lines = ["roofline: the bytes of the floor over the time of the kernels"]
    lines += [f"  {line}" for line in report.roofline(found)] or ["  not measured"]
    verdicts = targets.evaluate(found, "cuda") + targets.evaluate_steps(own)
    return [*lines, *targets.lines(verdicts)]


def summarise(out: Path, state: State, device: str, heading: str) -> tuple[list[str], bool]:
    """The lines of summary.txt, and whether every stage passed and no target failed."""
    lines, good = [heading], True
    for stage in STAGES:
        planned, record = items(stage, out), state.stages.get(stage)
        if record is None:
            lines.append(f"{'not run':10} {stage}")
            continue
        word = status(record, planned)
        good = good and word == PASSED
        done = sum(result == PASSED for result in record["items"].values())
        bad = [name for name, result in record["items"].items() if result == FAILED]
        text = f"{word:10} {stage}: {done} of {len(planned)} in {record['seconds']:.0f} s"
        if bad:
            text += f"; failed: {', '.join(bad)}"
        if word == UNFINISHED:
            text += f"; go on with: make gpu-check STAGE={stage}"
        lines.append(f"{text}; see {LOGS[stage]}")
    lines += closing(out, device)
    good = good and not any(line.startswith("FAIL ") for line in lines)
    if all(stage in state.stages for stage in ("bench", "e2e")):
        good = good and not any(line.startswith("not measured") for line in lines)
    return lines, good


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for logs and results")
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="only this stage (repeatable)"
    )
    parser.add_argument("--force", action="store_true", help="do again what has passed, too")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS",
        help="time for each stage (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--total", type=float, default=math.inf, metavar="SECONDS",
        help="time for all stages together (default: none)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(argv)


def _hold(out: Path) -> int:
    """A descriptor that, open here or in a command that was started, keeps others out of a folder.

    (What keeps others from a training's folder is let go of by what it starts.) On file systems
    that know no locks it keeps nobody out.

    Raises:
        OSError: somebody has it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(
            f"{out} is in use by another gpu-check, or by a command that one left behind"
        ) from None
    except OSError:
        pass
    return descriptor


def gpu() -> tuple[str, str] | None:
    """Name and compute capability of the GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages: 0 all passed, 1 one failed or is unfinished, 2 no GPU."""
    arguments = _arguments(argv)
    begin = time.monotonic()
    out = arguments.out.resolve()
    if arguments.dry_run:
        for stage in arguments.stage or STAGES:
            for item in items(stage, out):
                print(f"{stage}: {' '.join(item.command)}")
        return 0
    present = gpu()
    if present is None:
        print("gpu-check needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = _hold(out)
    except OSError as error:
        print(f"gpu-check: error: {error}", file=sys.stderr)
        return 2
    try:
        return _check(arguments, out, *present, held, begin)
    finally:
        os.close(held)


def _check(
    arguments: argparse.Namespace,
    out: Path,
    device: str,
    capability: str,
    held: int,
    begin: float,
) -> int:
    """The exit status of the stages that were asked for."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    import torch

    from benchmarks.sources import commit, source_hash

    key = {"device": device, "sources": source_hash(), "torch": str(torch.__version__)}
    state = State(out / STATE, key)
    state.held = (held,)
    heading = (
        f"{device} ({capability}), torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"commit {commit()}"
    )
    asked = {*(arguments.stage or STAGES)}
    major, minor = map(int, capability.split("."))

    def missing() -> str | None:
        return library_obstacle(ROOT / "dnkd_ext", "cuda", str(torch.__version__), (major, minor))

    obstacle = missing()
    if obstacle is not None:
        asked.add("build")  # else the others would be of another library than their key says
    todo = []
    for stage in STAGES:
        if stage not in asked:
            continue
        if arguments.force or stage == "build":
            state.forget(stage)
        if stage == "build" and obstacle is None and not (arguments.force or arguments.stage):
            state.of(stage)["items"]["build"] = PASSED  # a library that came with the sources
        if status(state.of(stage), items(stage, out, force=arguments.force)) == PASSED:
            print(f"{stage} is done with these sources on this GPU (--force does it again)")
        else:
            todo.append(stage)
    cancelled = threading.Event()

    most = max(2, min(16, os.cpu_count() or 1))

    def work(stage: str, limit: float) -> str:
        is_whole = limit >= arguments.limit
        planned = items(stage, out, force=arguments.force)
        # What is measured has the machine to itself; tests have two thirds of it beside sanitizers.
        share = {"tests": 2 * most // 3, "sanitize": most // 3} if len(now) > 1 else {}
        several = stage.endswith("tests") or stage in TOGETHER
        jobs = max(1, share.get(stage, most)) if several else 1
        word = run_stage(stage, planned, out, state, limit, jobs, cancelled, is_whole)
        state.save()
        return word

    now: list[str] = []
    while todo:
        now = [stage for stage in todo if stage in TOGETHER]
        now = now if todo[0] in now else todo[:1]
        todo = [stage for stage in todo if stage not in now]
        limit = min(arguments.limit, begin + arguments.total - time.monotonic())
        if limit <= 0:
            break
        if len(now) == 1:
            words = [work(now[0], limit)]
        else:
            with ThreadPoolExecutor(len(now)) as pool:
                try:
                    words = list(pool.map(work, now, [limit] * len(now)))
                except BaseException:
                    cancelled.set()
                    raise
        for stage, word in zip(now, words, strict=True):
            print(f"{word} {stage}", flush=True)
            if word != PASSED:
                _print_tail(out / LOGS[stage])
        lines, _ = summarise(out, state, device, heading)
        (out / SUMMARY).write_text("\n".join(lines) + "\n")
        if "build" in now and (words != [PASSED] or (obstacle is not None and missing())):
            why = f": {missing()}" if words == [PASSED] else ""
            print(f"nothing else is run on a library that could not be built{why}", file=sys.stderr)
            break
    lines, good = summarise(out, state, device, heading)
    (out / SUMMARY).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if good else 1


def _print_tail(log: Path, count: int = 20) -> None:
    for line in log.read_text(errors="replace").splitlines()[-count:]:
        print(f"    {line}")


if __name__ == "__main__":
    # What is running is stopped with it, as by Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Started in the background it ignores SIGINT, and so would commands, which that is to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; what was done is kept", file=sys.stderr)
        sys.exit(130)
