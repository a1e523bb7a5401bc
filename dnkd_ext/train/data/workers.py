"""Processes that read images for this one: their signals, and what is said of their death."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

__all__ = [
    "WorkerDied",
    "as_it_is",
    "died_of",
    "leave_signals_to_the_main_process",
    "worker_death",
]


class WorkerDied(RuntimeError):
    """A process that reads images for this one ended; what it was about to do is lost."""


def worker_death(error: Exception, workers: int | None = None) -> WorkerDied | None:
    """The error that tells of a worker's death, or None where ``error`` is of something else.

    torch raises its own wherever the program is when a worker ends, out of a signal handler.
    """
    if isinstance(error, WorkerDied):
        return error
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in text:
        return None
    return died_of(text[text.index("DataLoader worker (pid") :].partition(". ")[0], workers)


def died_of(what: str, workers: int | None) -> WorkerDied:
    """The error that says what happened to a worker."""
    fewer = "fewer --workers" if workers is None else f"fewer than --workers {workers}"
    return WorkerDied(
        f"a worker process that reads images died: {what.rstrip('.')}; too little memory, or "
        f"shared memory (/dev/shm), is the usual reason: {fewer} need less"
    )


def as_it_is(batch: Any) -> Any:
    """For a DataLoader whose data set makes whole batches."""
    return batch


def leave_signals_to_the_main_process(worker: int) -> None:
    """For the workers of a DataLoader: SIGINT and SIGTERM, sent to all processes, are not theirs.

    The main process decides what they mean; workers that left would look like dead ones.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(main_process: int) -> None:
    """End at a SIGTERM of the main process's own, by which multiprocessing ends what is left."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
