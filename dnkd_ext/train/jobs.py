"""The command train: runs, one after another or at once. Checks come before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import signal
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dnkd_ext
from dnkd_ext._files import TEMPORARY
from dnkd_ext.train import tasks
from dnkd_ext.train.at_once import train_at_once
from dnkd_ext.train.checkpoint import load_checkpoint, remove_unnamed, shard_folders
from dnkd_ext.train.config import FREE, RunOptions, TrainConfig, flatten, replace, unused
from dnkd_ext.train.engine import check_identity, train
from dnkd_ext.train.files import (
    CLASS_MEANS,
    CONFIG,
    CURVES,
    OWN_FILES,
    RESULT,
    SUMMARY,
    TENSORBOARD,
    WANDB,
    check_place,
    checked_config,
    remove_temporaries,
    write_csv,
    write_json,
)
from dnkd_ext.train.gather import remove_parts
from dnkd_ext.train.locks import OwnFolders
from dnkd_ext.train.networks import PRETRAINED, find_weights
from dnkd_ext.train.plots import plot_curves
from dnkd_ext.train.shared import Shared
from dnkd_ext.train.signals import Interrupted
from dnkd_ext.train.summary import (
    all_results,
    format_summary,
    is_result,
    result_line,
    summary,
)
from dnkd_ext.train.teacher import identity
from dnkd_ext.train.teacher_outputs import check_outputs, check_room, outputs_notes
from dnkd_ext.train.world import World

__all__ = ["Job", "plan_jobs", "prepare_device", "resolve", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """A run: its configuration, its folder, and the accuracy or AP that was published.

    ``borrows``: the file of decoded images in the configuration is that of the call, not the run's.
    """

    config: TrainConfig
    out: Path
    published: float | None = None
    borrows: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as the run's files have it."""
        flat = flatten(self.config)
        return {**flat, "cache": None} if self.borrows else flat


def resolve(options: RunOptions, world: World, task: str = "cifar") -> RunOptions:
    """The options with what the automatic ones come to on this device, for this task.

    Raises:
        ValueError: an option that this device or number of processes does not allow.
    """
    on_gpu = world.device.type == "cuda"
    # There an epoch is over in seconds.
    is_short = on_gpu and task == "cifar"
    eval_batch = options.eval_batch_size
    if eval_batch is None:
        eval_batch = 2000 if is_short else 500
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(False) else "float32"
    if options.cuda_graph and not on_gpu:
        raise ValueError("--cuda-graph needs a GPU, and the device is the CPU")
    if options.cuda_graph and world.size > 1:
        raise ValueError(f"--cuda-graph is for one process, got {world.size}")
    if options.cuda_graph and os.environ.get("DNKD_CHECK_TARGET", "0") not in {"", "0"}:
        raise ValueError(
            "--cuda-graph cannot record the check of targets, for which a step would wait: unset "
            "DNKD_CHECK_TARGET, or leave out --cuda-graph"
        )
    return dataclasses.replace(
        options,
        device=world.device.type,
        precision=precision,
        eval_batch_size=-(-eval_batch // world.size) * world.size,
        checkpoint_every=options.checkpoint_every or (10 if is_short else 1),
        channels_last=options.channels_last,
    )


def plan_jobs(
    configs: list[tuple[TrainConfig, float | None]], seeds: list[int], out: Path
) -> list[Job]:
    """A job for every configuration and seed; several get folders of their own below ``out``."""
    if len(configs) * len(seeds) == 1:
        config, published = configs[0]
        return [Job(replace(config, {"seed": seeds[0]}), out, published)]
    return [
        Job(
            replace(config, {"seed": seed}),
            out / (config.preset or "run") / f"seed-{seed}",
            published,
        )
        for config, published in configs
        for seed in seeds
    ]


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
        ready = [_checked(job, world) for job in jobs]
    states: list[_State] = []
    with OwnFolders() as own:
        with world.first_alone():
            if world.is_first:
                for job in ready:
                    if job.out.is_dir():
                        own.take(job.out)
                if overwrite:
                    _check_overwritten(ready)
                if all(job.out != out for job in ready) and _present(out):
                    raise FileExistsError(
                        f"--out {out} is the folder of a run, and cannot be that of several, in "
                        "whose table it would be, too; choose another"
                    )
                states = [_look(job, resume, overwrite) for job in ready]
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
            job = dataclasses.replace(job, config=config, borrows=True)
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
    states: list[_State],
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
            _check_inputs(job, state, shared, world)
            if state.result is None:
                _check_outputs(job, outputs, shared, world)
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


def _checked(job: Job, world: World) -> Job:
    """The job with its automatic options resolved; an error where options are wrong."""
    job.config.check(world.size)
    if importlib.util.find_spec("matplotlib") is None:  # not after the last epoch
        raise ModuleNotFoundError(
            "the plots of a run need the training extras; install them with pip install "
            "'dnkd_ext[train]'"
        )
    if job.config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "--tensorboard needs the training extras; install them with pip install "
            "'dnkd_ext[train]', or pass --no-tensorboard"
        )
    if job.config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError(
            "--wandb needs Weights & Biases; install it with pip install wandb"
        )
    model = job.config.model
    if model.teacher_weights not in (None, PRETRAINED):
        find_weights(model.teacher_weights)  # not after minutes of decoding
    if model.class_means is not None and not Path(model.class_means).is_file():
        raise FileNotFoundError(f"no class-means file at {model.class_means} (--class-means)")
    options = resolve(job.config.run, world, job.config.data.task)
    config = dataclasses.replace(job.config, run=options)
    return dataclasses.replace(job, config=config)


def _check_inputs(job: Job, state: _State, shared: Shared, world: World) -> None:
    """An error where data, teacher or class means do not fit a job or what its folder holds."""
    config = job.config
    source, teacher = shared.source(config), shared.teacher(config)
    tasks.task_class(config).check(config, source, teacher)
    if not tasks.is_detection(config):
        # What makes batches checks its options, and starts no workers before the first.
        source.train(config, world)
        source.test(config, world)
        follows = config.model.class_means_momentum is not None
        needs_means = config.method.nd_weight and not follows
        if teacher and needs_means and teacher.class_means is None:
            source.clean(config, world)
    if state.identity is not None:
        told = {"identity": state.identity}
        check_identity(job.out, told, identity(config, source, teacher))


def _check_outputs(
    job: Job, seen: dict[Path, dict[str, str]], shared: Shared, world: World
) -> None:
    """An error where the file of the teacher's outputs is, or will be, of something else.

    ``seen`` has what the runs before are to find in theirs.
    """
    config = job.config
    given, teacher = config.model.teacher_outputs, shared.teacher(config)
    if given is None or teacher is None:
        return
    notes = outputs_notes(config, shared.source(config), teacher.digest)
    path = Path(given)
    before = seen.setdefault(path, notes)
    if before != notes:
        name = next(name for name, value in notes.items() if before[name] != value)
        hint = "; in its path {teacher} stands for the teacher's name" if name == "teacher" else ""
        raise ValueError(
            f"--teacher-outputs {given} would be of runs that differ: {name} is {before[name]} and "
            f"{notes[name]}{hint}"
        )
    if path.name in OWN_FILES:
        raise ValueError(
            f"--teacher-outputs {given} is what a run calls a file of its own; choose another name"
        )
    if check_outputs(path, notes):
        return
    if world.size > 1:
        raise ValueError(
            f"--teacher-outputs {given} is not there, and is made by a run of one process, got "
            f"{world.size}"
        )
    check_place("--teacher-outputs", path, path.parent)


class _State(NamedTuple):
    """What a job's folder holds: the identity of a checkpoint, and the result of a finished run."""

    identity: dict[str, str] | None = None
    result: dict[str, Any] | None = None


def _remove(out: Path) -> None:
    """A run's files, and no others."""
    for name in OWN_FILES:
        (out / name).unlink(missing_ok=True)
    remove_parts(out / CLASS_MEANS)
    for folder in (out / TENSORBOARD, out / WANDB, *shard_folders(out)):
        shutil.rmtree(folder, ignore_errors=True)


def _check_overwritten(jobs: list[Job]) -> None:
    """ValueError where replacing the runs would remove a file that one of them is to read."""
    folders = {job.out.resolve(): job.out for job in jobs}
    for job in jobs:
        model, backbone = job.config.model, job.config.detection.backbone_weights
        read: dict[str, str | None] = {
            "teacher-weights": model.teacher_weights,
            "class-means": model.class_means,
            "backbone-weights": backbone,
        }
        for option, given in read.items():
            if given is None or (given == PRETRAINED and option != "class-means"):
                continue
            path = find_weights(given) if option == "teacher-weights" else Path(given)
            path = path.resolve()
            if path.name in OWN_FILES and path.parent in folders:
                raise ValueError(
                    f"--overwrite would remove --{option} {given}, which are in --out "
                    f"{folders[path.parent]}"
                )


def _present(out: Path) -> list[str]:
    """What shows that a folder holds a run: a log or a checkpoint; what failed before is none."""
    present = [name for name in OWN_FILES if (out / name).exists()]
    present += [path.name for path in shard_folders(out)]
    return [] if set(present) <= {CONFIG, CLASS_MEANS} else present


def _look(job: Job, resume: bool, overwrite: bool) -> _State:
    """What is there already; an error where the folder must not be touched."""
    out = job.out
    present = _present(out)
    if not (resume and RESULT in present):  # of a finished run nothing is written
        check_place("--out", out, out)
    if overwrite or not present:
        return _State()
    if not resume:
        raise FileExistsError(
            f"{out} already holds a run ({', '.join(present)}); go on with it by --resume, choose "
            "another --out, or replace it by --overwrite"
        )
    if not (out / CONFIG).exists():
        raise ValueError(f"{out} holds {', '.join(present)} but no {CONFIG}; nothing to resume")
    try:
        before = flatten(checked_config(out / CONFIG))
    except ValueError as error:
        raise ValueError(f"{error}; choose another --out, or pass --overwrite") from error
    try:
        result = None
        if (out / RESULT).exists():
            result = json.loads((out / RESULT).read_text(encoding="utf-8"))
        if result is not None and not is_result(result):
            raise ValueError("it is no result of a run")
    except ValueError as error:
        raise ValueError(f"{out} holds a damaged {RESULT}: {error}") from error
    now = flatten(job.config)
    free = FREE | unused(job.config).keys()
    differs = [
        f"{name} is {now.get(name)!r}, was {value!r}"
        for name, value in before.items()
        if name not in free and now.get(name) != value
    ]
    if differs:
        raise ValueError(
            f"{out} holds a run of another configuration: {'; '.join(differs)}. Resume it with the "
            "same options, or choose another --out"
        )
    checkpoint = load_checkpoint(out)
    is_within = checkpoint is not None and checkpoint["start"]
    streams = [max(1, options["workers"]) for options in (before, now)]
    if is_within and str(now["reader"]).startswith("wds") and streams[0] != streams[1]:
        warnings.warn(
            f"--workers is {now['workers']}, was {before['workers']}: shards are divided between "
            "workers, so that the rest of this epoch has other images than without the stop",
            stacklevel=2,
        )
    return _State(None if checkpoint is None else checkpoint["identity"], result)


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
        result = _look(job, resume, overwrite=False).result
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
