"""Checkpoints: written whole or not at all, the one before kept, nothing in them executed."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from dnkd_ext.train.files import TEMPORARY, replacing, sync

__all__ = ["NAME", "PREVIOUS", "load_checkpoint", "save_checkpoint"]

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
FORMAT = "dnkd_ext checkpoint 1"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; what was the newest checkpoint becomes the previous one.

    At every moment there is a whole checkpoint by one of the two names.
    """
    with replacing(folder / NAME) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
        sync(temporary)
        if (folder / NAME).exists():
            kept = temporary.with_suffix(f".kept{TEMPORARY}")
            try:
                os.link(folder / NAME, kept)
            except OSError:  # a file system without links
                os.replace(folder / NAME, kept)
            os.replace(kept, folder / PREVIOUS)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint, on the CPU; None where there is none.

    A damaged one is left aside with a warning if the previous one is whole.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    damaged: list[str] = []
    for name in (NAME, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                raise ValueError(f"it is no {FORMAT!r}")
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            damaged.append(f"{path} cannot be read: {first}")
            continue
        for problem in damaged:
            warnings.warn(f"{problem}; going on from {path}", UserWarning, stacklevel=2)
        return state
    if damaged:
        raise ValueError("; ".join(damaged))
    return None
