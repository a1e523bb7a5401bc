"""Files of a run, which appear whole or not at all: names, and writing."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = [
    "CLASS_MEANS",
    "CONFIG",
    "CURVES",
    "DETECTIONS",
    "FEATURES",
    "RESULT",
    "TEMPORARY",
    "remove_temporaries",
    "replacing",
    "sync",
    "write_csv",
    "write_json",
    "write_tensors",
]

CONFIG = "config.json"
RESULT = "result.json"
CLASS_MEANS = "class_means.safetensors"
CURVES = "curves.png"
FEATURES = "features.png"
# What a detector's run found last.
DETECTIONS = "detections.json"
TEMPORARY = ".unfinished"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written there replaces it at the end, synced.

    Raises:
        OSError: it cannot be written, where the disk is full or the like; ``path`` is named, and
            holds what it held before.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors writes for the owner alone
            temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        from safetensors import SafetensorError

        # torch.save says no more than at which byte it stopped.
        if not isinstance(error, SafetensorError) and "inline_container" not in str(error):
            raise
        raise OSError(
            f"{path} cannot be written, where {shutil.disk_usage(path.parent).free >> 20} MiB are "
            f"free: {str(error).splitlines()[0]}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """What a killed process left of files it was writing."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


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
