"""Checkpoints: written whole or not at all, the one before kept, nothing in them executed.

Of a run that is not sharded a checkpoint is one file. Of a sharded one it is a folder
``checkpoint-EPOCH-STEP-*``, to which every process writes its shards as safetensors, and the file,
written last, which names the folder and holds what is not sharded.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from dnkd_ext._files import TEMPORARY, UNREADABLE, replacing, sync
from dnkd_ext.train.files import CHECKPOINT, PREVIOUS
from dnkd_ext.train.sharding import check_shards
from dnkd_ext.train.world import World

__all__ = [
    "load_checkpoint",
    "load_whole",
    "remove_unnamed",
    "save_checkpoint",
    "shard_folders",
]

FORMAT = "dnkd_ext checkpoint 1"


def load_whole(path: Path) -> Any:
    """What torch.save wrote, on the CPU, and nothing but tensors and plain values.

    Its checksums are compared first, which torch.load does not.

    Raises:
        UNREADABLE: it is damaged or something else.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; what was the newest checkpoint becomes the previous one.

    At every moment there is a whole checkpoint by one of the two names.

    Args:
        folder: of the run.
        state: ``shards``, where there are, is what write_shards returned.
    """
    with replacing(folder / CHECKPOINT) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
        sync(temporary)
        if (folder / CHECKPOINT).exists():
            kept = temporary.with_suffix(f".kept{TEMPORARY}")
            try:
                os.link(folder / CHECKPOINT, kept)
            except OSError:  # a file system without links
                os.replace(folder / CHECKPOINT, kept)
            os.replace(kept, folder / PREVIOUS)
    remove_unnamed(folder)


def load_checkpoint(folder: Path, world: World | None = None) -> dict[str, Any] | None:
    """The newest whole checkpoint, on the CPU; None where there is none.

    A damaged one is left aside with a warning if the previous one is whole. Shards are looked for,
    and stay in their folder.

    Args:
        folder: of the run.
        world: all processes, who agree on what is whole, and of shards read a part each.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    damaged: list[str] = []
    for name in (CHECKPOINT, PREVIOUS):
        path = folder / name
        state, problem = None, ""
        if path.exists():
            try:
                state = _read(path, world)
            except UNREADABLE as error:
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                problem = f"{path} cannot be read: {first}"
        problems = [problem] if world is None else world.gather(problem)
        found = [state is not None] if world is None else world.gather(state is not None)
        if any(problems):
            damaged.append(next(filter(None, problems)))
        elif any(found):
            for told in damaged:
                warnings.warn(f"{told}; going on from {path}", UserWarning, stacklevel=2)
            return state
    if damaged:
        raise ValueError("; ".join(damaged))
    return None


def _read(path: Path, world: World | None) -> dict[str, Any]:
    state = load_whole(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"it is no {FORMAT!r}")
    shards = state.get("shards")
    if shards is not None:
        names = sorted(shards["files"])
        check_shards(path.parent, shards, names[world.rank :: world.size] if world else ())
    return state


def shard_folders(folder: Path) -> list[Path]:
    """The folders of shards that a run has, named by a checkpoint or not."""
    pattern = re.compile(r"checkpoint-\d+-\d+-[0-9a-f]{8}")
    return sorted(
        path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and pattern.fullmatch(path.name)
    )


def remove_unnamed(folder: Path) -> None:
    """Remove folders of shards that no checkpoint names.

    None while there is a checkpoint that cannot be read: it may name any.
    """
    found = shard_folders(folder)
    if not found:
        return
    named = set()
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if path.exists():
            try:
                # Mapped: of its tensors nothing is read.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                named.add((state.get("shards") or {}).get("folder"))
            except UNREADABLE:
                return
    for place in found:
        if place.name not in named:
            with contextlib.suppress(OSError):  # it is in nobody's way
                shutil.rmtree(place)
