"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TEMPORARY", "replacing", "sync"]

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
        if error.errno is not None and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        # torch.save says no more than at which byte it stopped.
        is_ours = type(error).__name__ == "SafetensorError" or "inline_container" in str(error)
        if not is_ours:
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
