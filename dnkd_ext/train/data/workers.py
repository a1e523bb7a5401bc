"""Processes that read images for this one: their signals, and what is said of their death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

__all__ = [
    "WorkerDied",
    "as_it_is",
    "died_of",
    "worker_death",
    "worker_options",
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


def worker_options(workers: int) -> dict[str, Any]:
    """What a DataLoader has to know of its workers.

    They are forked, whatever Python's own way is (from 3.14 on, a server's processes): at once,
    without importing torch again, and sharing the list of all images with this process.
    """
    own = {"multiprocessing_context": "fork"} if workers > 0 else {}
    return {"num_workers": workers, "worker_init_fn": _leave_signals_to_the_main_process, **own}


def as_it_is(batch: Any) -> Any:
    """For a DataLoader whose data set makes whole batches."""
    return batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """For the workers of a DataLoader: SIGINT and SIGTERM, sent to all processes, are not theirs.

    The main process decides what they mean; workers that left would look like dead ones.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    threading.Thread(target=_end_when_told, args=(main_process.pid,), daemon=True).start()


def _end_when_told(main_process: int | None) -> None:
    """End at a SIGTERM of the main process's own, by which multiprocessing ends what is left."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
