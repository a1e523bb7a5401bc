"""Which process writes to a folder, or makes a file; among those of this machine."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from dnkd_ext.train.signals import Signals

__all__ = ["OwnFolders", "alone"]


_alive: weakref.WeakSet[OwnFolders] = weakref.WeakSet()


class OwnFolders(contextlib.AbstractContextManager["OwnFolders"]):
    """Folders that this process alone writes to, for as long as the context lasts or it lives.

    That is among the processes of this machine. Where the file system keeps no locks, they are
    taken without a look.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}
        _alive.add(self)

    def take(self, folder: Path) -> bool:
        """Keep others out of a folder that exists; whether it was not held already.

        Raises:
            BlockingIOError: another process has taken it, and is still running.
        """
        place = folder.resolve()
        if fcntl is None:
            return True
        if place in self._held:
            if os.path.samestat(os.fstat(self._held[place]), place.stat()):
                return False
            os.close(self._held.pop(place))  # it was removed, and is another now
        handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(
                f"another process writes to {folder}; wait until it ends, or choose another --out"
            ) from None
        except OSError:  # no locks here
            os.close(handle)
        else:
            self._held[place] = handle
        return True

    def release(self, folder: Path) -> None:
        """Let others write to a folder."""
        handle = self._held.pop(folder.resolve(), None)
        if handle is not None:
            os.close(handle)

    def release_all(self) -> None:
        """Let others write to all of them."""
        while self._held:
            os.close(self._held.popitem()[1])

    def __exit__(self, *exception: object) -> None:
        self.release_all()


def _release_all() -> None:
    for one in list(_alive):
        one.release_all()


# A forked process, which may outlive this one, shares the lock and would go on holding it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


@contextlib.contextmanager
def alone(path: Path, signals: Signals) -> Iterator[bool]:
    """Others that would make the same file wait until the context ends; this process for others.

    Whether there are locks at all.

    Raises:
        Interrupted: a signal came while it waited.
    """
    lock = path.with_name(f".{path.name}.lock")
    handle = _locked(lock, path, signals)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _locked(lock: Path, path: Path, signals: Signals) -> int | None:
    """The file's lock, which this process has then; None where there are none."""
    told = False
    while fcntl is not None:
        signals.stop(f"while another process made {path}")
        handle = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if not told:
                print(f"another process makes {path}; waiting", file=sys.stderr, flush=True)
                told = True
            _wait()
            continue
        except OSError:  # not on this file system
            os.close(handle)
            lock.unlink(missing_ok=True)
            return None
        # Who had it before has removed it at the end, and another may have it by the same name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        os.close(handle)
    return None


def _wait() -> None:
    time.sleep(0.2)
