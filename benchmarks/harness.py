"""Timing of several peers in turn, against a copy of as many bytes."""

from __future__ import annotations

import contextlib
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# glibc's mallopt parameters
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and 20/80 quantiles over blocks of calls."""

    median: float
    low: float
    high: float
    blocks: int


@contextlib.contextmanager
def warm_allocator(enabled: bool = True) -> Iterator[bool]:
    """Keep freed CPU memory mapped, as a caching allocator does; yields whether that worked.

    glibc otherwise returns large buffers to the system, and every fresh gradient pays for page
    faults again.
    """
    if not enabled or platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 64 << 20)
    try:
        yield True
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 10)
        libc.mallopt(M_TOP_PAD, 128 << 10)
        libc.malloc_trim(0)


def synchronise(device: str) -> None:
    """Wait for the device's work."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(
    peers: dict[str, Callable[[], None]], device: str, *, seconds: float = 1.0, calls: int = 20
) -> dict[str, Timing]:
    """Time every peer in blocks of calls, the peers in turn, so that all see the same machine.

    Args:
        peers: what to time, by name.
        device: "cpu" or a CUDA device.
        seconds: about how long each peer is timed; at least seven blocks.
        calls: calls per block; fewer where one takes longer than ``seconds`` / 5 / calls.
    """
    blocks: dict[str, list[float]] = {name: [] for name in peers}
    plan: dict[str, tuple[int, int]] = {}

    def block(run: Callable[[], None], count: int) -> float:
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(count):
            run()
        synchronise(device)
        return (time.perf_counter() - begin) / count

    for name, run in peers.items():
        run()  # compiles, allocates
        single = min(block(run, 1) for _ in range(2))
        count = max(1, min(calls, int(seconds / 5 / single)))
        plan[name] = count, max(7, math.ceil(seconds / (count * single)))
    rounds = min(200, max(times for _, times in plan.values()))
    for turn in range(rounds):
        for name, run in peers.items():
            count, times = plan[name]
            # Slow peers take part in evenly spread rounds.
            if (turn * times) // rounds != ((turn - 1) * times) // rounds or turn == 0:
                run()
                blocks[name].append(block(run, count))
    result = {}
    for name, values in blocks.items():
        ordered = sorted(values)
        result[name] = Timing(
            statistics.median(values),
            ordered[int(0.2 * (len(ordered) - 1))],
            ordered[math.ceil(0.8 * (len(ordered) - 1))],
            len(values),
        )
    return result


def copy_of(byte_count: int, device: str) -> Callable[[], None]:
    """A copy that moves ``byte_count`` bytes in all: half read, half written."""
    elements = max(1, byte_count // 8)
    source = [torch.rand(elements, device=device) for _ in range(2)]
    result = [torch.empty(elements, device=device) for _ in range(2)]
    turn = 0

    def run() -> None:
        nonlocal turn
        turn ^= 1
        result[turn].copy_(source[turn])

    return run
