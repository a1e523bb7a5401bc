"""Class means of a teacher over a data set: by all processes, and gone on with after a stop."""

from __future__ import annotations

import dataclasses
import glob
import json
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext._checks import rows_not_finite
from dnkd_ext._files import UNREADABLE, replacing
from dnkd_ext.adapters import features
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.progress import Progress
from dnkd_ext.train.checkpoint import load_whole
from dnkd_ext.train.config import FREE, TrainConfig
from dnkd_ext.train.data.sources import Source
from dnkd_ext.train.signals import Interrupted, Signals
from dnkd_ext.train.task import autocast
from dnkd_ext.train.world import World

__all__ = [
    "find_parts",
    "gather_class_means",
    "gather_means",
    "gathering_notes",
    "kept_means",
    "remove_parts",
]

# Seconds between two looks at what would be lost.
KEEP_EVERY = 60.0
# Of what a pass keeps; another number where which batch has what has changed.
FORMAT = 2


def _part(path: Path, world: World) -> Path:
    return path.with_name(f"{path.name}.part-{world.rank}-of-{world.size}")


def find_parts(path: Path) -> list[Path]:
    """What an interrupted pass for this file left, of any number of processes."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*-of-*"))


def remove_parts(path: Path) -> None:
    """Remove what an interrupted pass left; for when the file itself is there."""
    for part in find_parts(path):
        part.unlink(missing_ok=True)


def kept_means(path: Path, notes: dict[str, str]) -> ClassMeans | None:
    """Class means that an earlier part of a run gathered, if these are the ones."""
    if not path.exists():
        return None
    try:
        means = ClassMeans.load(path)
    except ValueError:
        return None  # damaged; they are gathered again
    return means if notes.items() <= means.metadata.items() else None


def _origin(source: Any, config: TrainConfig, metadata: dict[str, str]) -> str:
    """What must be the same for a pass to be gone on with: it decides which batch has what."""
    options: dict[str, Any] = {}
    for group in (config.data, config.reader, config.detection):
        options |= dataclasses.asdict(group)
    # Shards are divided between workers, too.
    kept = {n: v for n, v in options.items() if n not in FREE or n == "workers"}
    sizes = [config.run.eval_batch_size, config.detection.detect_batch_size]
    # Which proposals are sampled depends on the seed.
    run = [*sizes, config.run.precision, config.run.seed]
    return json.dumps([FORMAT, source.fingerprint(), run, kept, metadata], sort_keys=True)


def gathering_notes(config: TrainConfig) -> dict[str, str]:
    """What a file of class means says about how the images were seen."""
    seen = {"precision": config.run.precision, **config.data.normalisation}
    if config.data.task == "imagenet":
        reader = config.reader
        seen |= {name: getattr(reader, name) for name in ("image_size", "crop_pct")}
        # What is random for training is bilinear here.
        seen["interpolation"] = reader.interpolation.replace("random", "bilinear")
    return {name: json.dumps(value) for name, value in seen.items()}


def _load(path: Path, origin: str) -> tuple[int, dict[str, Any]] | None:
    """The number of the next batch, and the state of the means before it."""
    if not path.exists():
        return None
    try:
        held = load_whole(path)
        if held["origin"] == origin:
            return int(held["next"]), held["means"]
        reason = "it is of another teacher, other data or other options"
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    warnings.warn(f"{path} is no use, class means begin anew: {reason}", stacklevel=3)
    return None


def gather_class_means(
    model: nn.Module,
    source: Source,
    config: TrainConfig,
    world: World,
    *,
    metadata: dict[str, str] | None = None,
    path: Path | None = None,
    resume: bool = False,
) -> ClassMeans:
    """Mean features of the training images as they are; the other arguments as of gather_means.

    Args:
        model: in evaluation mode, on the device of ``world``.
        source: of the images.
        config: how they are read.
        world: the processes.
        metadata: goes into the result.
        path: file that the result is for.
        resume: go on with what is kept there.
    """
    batches = source.clean(config, world)
    precision = autocast(config.run, world)

    def look(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        images, target, mask = batch
        with precision:
            found, _ = features(model, images)
        # What fills up a batch counts nowhere.
        return found, target.where(mask, -100)

    return gather_means(
        batches, look, source, config, world, metadata=metadata, path=path, resume=resume
    )


def gather_means(
    batches: Any,
    look: Callable[[Any], tuple[Tensor, Tensor]],
    source: Any,
    config: TrainConfig,
    world: World,
    *,
    metadata: dict[str, str] | None = None,
    path: Path | None = None,
    resume: bool = False,
    width: int = 0,
) -> ClassMeans:
    """Mean features over batches of which every process sees its part. Collective.

    Args:
        batches: has a length, and ``batches(start)``, those from number ``start`` on.
        look: at a batch; features ``(N, D)`` and classes ``(N,)``, -100 where nothing counts.
        source: of the images.
        config: how they are read.
        world: the processes.
        metadata: goes into the result.
        path: file that the result is for. Beside it each process keeps what it has gathered, every
            minute and when it is interrupted, by SIGINT or SIGTERM; see :func:`remove_parts`.
        resume: go on with what is kept there, where it is of the same teacher, data, batch size and
            number of processes; the result is the same as without a stop.
        width: D, where a process may have no batch.

    Returns:
        The means over all processes, the same on each.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
        FloatingPointError: features are not finite; on all processes.
    """
    metadata = metadata or {}
    origin = _origin(source, config, metadata)
    held = None
    if path is not None and resume:
        held = _load(_part(path, world), origin)
        ends = [part.name.rpartition("-of-")[2] for part in find_parts(path)]
        others = {int(end) for end in ends if end.isdecimal()} - {world.size}
        if held is None and others and world.is_first:
            warnings.warn(
                f"class means begin anew: those beside {path} are parts of {min(others)} "
                f"processes, and there {'is' if world.size == 1 else 'are'} {world.size}",
                stacklevel=2,
            )
    if config.run.fsdp_teacher and len(set(world.gather(held and held[0]))) > 1:
        # A sharded model runs on all processes at once or not at all.
        held = None
    start, state = held or (0, None)
    means: ClassMeans | None = None

    def keep(done: int) -> None:
        if path is None or means is None:
            return
        with replacing(_part(path, world)) as temporary:
            torch.save({"origin": origin, "next": done, "means": means.state_dict()}, temporary)

    shown = config.run.progress and world.is_first
    number, kept = start, time.monotonic()
    with (
        Signals() as signals,
        torch.no_grad(),  # a sharded model cannot run in inference mode
        Progress(len(batches), "class means", initial=start, enabled=shown) as bar,
    ):
        try:
            for batch in batches.batches(start):
                found, classes = look(batch)
                if means is None:
                    means = _begin(len(source.classes), found.shape[-1], world, state)
                means.update(found, classes)
                number += 1
                bar.advance()
                if time.monotonic() - kept > KEEP_EVERY:
                    keep(number)
                    kept = time.monotonic()
                stop = bool(signals.received)
                if config.run.fsdp_teacher:
                    stop = world.any(stop)
                if stop:
                    raise _interrupted(signals, path, world, together=config.run.fsdp_teacher)
        except (Interrupted, KeyboardInterrupt):
            keep(number)
            raise
    if means is None:  # all of it was done before, or there is nothing for this process
        width = state["num_features"] if state else width
        means = _begin(len(source.classes), width, world, state)
    keep(number)
    result = means.all_reduce()
    result.metadata = dict(metadata)
    wrong = rows_not_finite(result.compute())
    if wrong:
        if path is not None:  # it would only be gone on with
            _part(path, world).unlink(missing_ok=True)
        names = ", ".join(repr(source.classes[label]) for label in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FloatingPointError(
            f"the teacher's features are not finite, in the classes {names}{more}"
        )
    return result


def _interrupted(
    signals: Signals, path: Path | None, world: World, *, together: bool
) -> Interrupted:
    number = signals.received or signal.SIGTERM
    told = f"stopped by {signal.Signals(number).name} while class means were gathered"
    if path is not None:
        told += f"; what there is of them is kept beside {path}, --resume goes on from there"
    return Interrupted(told, number, together=together or world.size == 1)


def _begin(classes: int, width: int, world: World, state: dict[str, Any] | None) -> ClassMeans:
    means = ClassMeans(classes, width, device=world.device)
    if state is not None:
        means.load_state_dict(state)
    return means
