"""The runs of a call; what is checked of options, inputs and folders before they begin."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dnkd_ext.train import tasks
from dnkd_ext.train.checkpoint import load_checkpoint, shard_folders
from dnkd_ext.train.config import FREE, RunOptions, TrainConfig, flatten, replace, unused
from dnkd_ext.train.engine import check_identity
from dnkd_ext.train.files import (
    CLASS_MEANS,
    CONFIG,
    OWN_FILES,
    RESULT,
    check_place,
    checked_config,
)
from dnkd_ext.train.networks import PRETRAINED, find_weights
from dnkd_ext.train.shared import Shared
from dnkd_ext.train.summary import is_result
from dnkd_ext.train.teacher import identity
from dnkd_ext.train.teacher_outputs import check_outputs, outputs_notes
from dnkd_ext.train.world import World

__all__ = [
    "Found",
    "Job",
    "check_inputs",
    "check_overwritten",
    "check_teacher_outputs",
    "checked_job",
    "look",
    "plan_jobs",
    "present_files",
    "resolve",
]


@dataclass(frozen=True)
class Job:
    """A run: its configuration, its folder, and the accuracy or AP that was published.

    ``recorded``: options as the run's files are to have them, where those that it runs with are
    the call's, not the run's.
    """

    config: TrainConfig
    out: Path
    published: float | None = None
    recorded: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as the run's files have it."""
        return {**flatten(self.config), **self.recorded}


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


class Found(NamedTuple):
    """What a job's folder holds: the identity of a checkpoint, and the result of a finished run."""

    identity: dict[str, str] | None = None
    result: dict[str, Any] | None = None


def checked_job(job: Job, world: World) -> Job:
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


def check_inputs(job: Job, state: Found, shared: Shared, world: World) -> None:
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


def check_teacher_outputs(
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


def check_overwritten(jobs: list[Job]) -> None:
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


def present_files(out: Path) -> list[str]:
    """What shows that a folder holds a run: a log or a checkpoint; what failed before is none."""
    present = [name for name in OWN_FILES if (out / name).exists()]
    present += [path.name for path in shard_folders(out)]
    return [] if set(present) <= {CONFIG, CLASS_MEANS} else present


def look(job: Job, resume: bool, overwrite: bool) -> Found:
    """What is there already; an error where the folder must not be touched."""
    out = job.out
    present = present_files(out)
    if not (resume and RESULT in present):  # of a finished run nothing is written
        check_place("--out", out, out)
    if not (overwrite or present) and (out / CONFIG).exists():
        try:  # what a run that failed left, or another program's
            checked_config(out / CONFIG)
        except ValueError as error:
            raise FileExistsError(
                f"{error}; it would be replaced: choose another --out, or pass --overwrite"
            ) from error
    if overwrite or not present:
        return Found()
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
    return Found(None if checkpoint is None else checkpoint["identity"], result)
