"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import struct
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TEMPORARY", "UNREADABLE", "replacing", "sync"]

TEMPORARY = ".unfinished"

# What torch.load and zipfile raise of a file that is damaged or something else.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written there replaces it at the end, synced.

    Raises:
        OSError: it cannot be written, where the disk is full or the like; ``path`` is named, and
            holds what it held before.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, "names no file", os.fspath(path))
    # Names of files have a longest length, which that of `path` may have.
    temporary = path.with_name(f".{path.name[:32]}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        temporary.touch()
        mode = (path if path.is_file() else temporary).stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors writes for the owner alone
            temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # of a folder that must not be read; it is written
            sync(path.parent)
    except OSError as error:
        # Whoever called does not know the temporary name.
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
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
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
