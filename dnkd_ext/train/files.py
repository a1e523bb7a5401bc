"""Files of a run: names, reading and writing."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from dnkd_ext._files import TEMPORARY, replacing
from dnkd_ext.train.config import TrainConfig, replace

__all__ = [
    "BEST",
    "CHECKPOINT",
    "CLASS_MEANS",
    "CONFIG",
    "CURVES",
    "DETECTIONS",
    "FEATURES",
    "LAST",
    "LOG",
    "OWN_FILES",
    "PREVIOUS",
    "RESULT",
    "SUMMARY",
    "TENSORBOARD",
    "WANDB",
    "check_place",
    "checked_config",
    "read_config",
    "remove_temporaries",
    "write_csv",
    "write_json",
    "write_tensors",
]

CONFIG = "config.json"
RESULT = "result.json"
LOG = "log.csv"
# Weights: of the best epoch, and of the last.
BEST = "best.safetensors"
LAST = "last.safetensors"
CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
CLASS_MEANS = "class_means.safetensors"
CURVES = "curves.png"
FEATURES = "features.png"
# What a detector's run found last.
DETECTIONS = "detections.json"
# What a run writes, apart from these folders and those of sharded checkpoints. In this order they
# are removed: first what makes the folder one of a finished run, or of a run at all.
OWN_FILES = (
    *(RESULT, CONFIG, LOG, BEST, LAST, CHECKPOINT, PREVIOUS),
    *(CLASS_MEANS, CURVES, FEATURES, DETECTIONS),
)
TENSORBOARD = "tensorboard"
WANDB = "wandb"
# Of several runs, in the folder above theirs.
SUMMARY = "summary.csv"


def check_place(option: str, path: Path, folder: Path) -> None:
    """An error where ``folder``, of what an option names, cannot be made or written to.

    Raises:
        NotADirectoryError: it, or what it is to be in, is a file.
        PermissionError: this user may not write there.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: {there} cannot be written to")


def remove_temporaries(folder: Path) -> None:
    """What a killed process left of files it was writing."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def read_config(path: Path) -> dict[str, Any]:
    """The options of a run as its config.json has them, whatever they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration of a run at {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
        if isinstance(config.get("config"), dict):
            raise ValueError(f"it is a run's result; name its {CONFIG}, or its folder")
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no configuration of a run: {error}") from error
    return config


def checked_config(path: Path) -> TrainConfig:
    """The configuration of a run, from its config.json; younger options have their defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds other options or values of other types.
    """
    settings = read_config(path)
    try:
        return replace(TrainConfig(), settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line per row, columns in the order in which they first appear; nothing for no rows."""
    if not rows:
        return
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Contiguous CPU tensors as safetensors."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
