"""Timing of several peers in turn, and what else is counted: memory, launches, synchronisations."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import platform
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

# glibc's mallopt parameters
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

# Fewer blocks than this have no quantiles worth the name.
LEAST_BLOCKS = 7
# How many times its planned time a peer takes at most, where calls are slower than at first.
MOST_TIMES = 3
# With less of the cores, threads wait for one another, at every call by what the system's scheduler
# takes turns in: milliseconds.
LEAST_SHARE = 0.85


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and 20/80 quantiles over blocks of calls.

    ``host`` is the median time until a call returned, which on a GPU is not when its work is done.
    """

    median: float
    low: float
    high: float
    blocks: int
    host: float = math.nan


@dataclass(frozen=True)
class Probe:
    """What one call does, apart from taking time; None where it does not apply.

    Attributes:
        peak_bytes: the most memory held at once beyond what was there before.
        launches: kernels, copies and memsets put on the device.
        syncs: times the host waited for the device.
        kernels: seconds on the device per kernel.
        device: seconds on the device in all.
    """

    peak_bytes: int | None = None
    launches: int | None = None
    syncs: int | None = None
    kernels: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> float | None:
        return sum(self.kernels.values()) if self.kernels else None


def can_keep_memory() -> bool:
    """Whether the CPU's allocator is one that can be told to keep what is freed: glibc's."""
    return platform.libc_ver()[0] == "glibc"


@contextlib.contextmanager
def warm_allocator(enabled: bool = True) -> Iterator[bool]:
    """Keep freed CPU memory mapped, as a caching allocator does; yields whether that worked.

    glibc otherwise returns large buffers to the system, and every fresh gradient pays for page
    faults again.
    """
    if not enabled or not can_keep_memory():
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


def cpu_share(seconds: float = 0.3) -> float:
    """Which part of the time of the cores that PyTorch has threads for this process gets.

    Less than 1 where other programs compute, too, or it may not use as many cores.
    """
    values = torch.rand(1 << 20)
    values.exp_()  # the threads are started
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        values.cos_()
    used = time.process_time() - used
    return used / (time.perf_counter() - begin) / torch.get_num_threads()


def synchronise(device: str) -> None:
    """Wait for the device's work."""
    if device != "cpu":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Python's garbage collection waits, so that nobody's block pays for another peer's garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure(
    peers: dict[str, Callable[[], None]],
    device: str,
    *,
    seconds: float = 1.0,
    calls: int = 20,
) -> dict[str, Timing]:
    """Time every peer in blocks of calls, in rounds of all peers, so that all see one machine.

    Args:
        peers: what to time, by name.
        device: "cpu" or a CUDA device.
        seconds: about how long each peer is timed; at least seven blocks, and after these at most
            three times as long.
        calls: calls per block; fewer where one takes longer than ``seconds`` / 5 / calls.
    """
    blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    plan: dict[str, tuple[int, int]] = {}

    def block(run: Callable[[], None], count: int) -> tuple[float, float]:
        synchronise(device)
        with _without_collection():
            begin = time.perf_counter()
            for _ in range(count):
                run()
            returned = time.perf_counter()
            synchronise(device)
            return (time.perf_counter() - begin) / count, (returned - begin) / count

    for name, run in peers.items():
        run()  # compiles, allocates
        single = min(block(run, 1)[0] for _ in range(2))
        count = max(1, min(calls, int(seconds / 5 / single)))
        plan[name] = count, max(LEAST_BLOCKS, math.ceil(seconds / (count * single)))
    rounds = min(200, max((times for _, times in plan.values()), default=0))
    order, draw = list(peers.items()), random.Random(0)
    spent = dict.fromkeys(peers, 0.0)
    for turn in range(rounds):
        draw.shuffle(order)  # who follows whom makes some per cent
        for name, run in order:
            count, times = plan[name]
            if len(blocks[name]) >= LEAST_BLOCKS and spent[name] > MOST_TIMES * seconds:
                continue
            # Slow peers take part in evenly spread rounds.
            if (turn * times) // rounds != ((turn - 1) * times) // rounds or turn == 0:
                if count > 1:  # a call to get going, of peers that do not take long
                    run()
                blocks[name].append(block(run, count))
                spent[name] += count * blocks[name][-1][0]
    return {
        name: Timing(
            *median_and_quantiles(wall for wall, _ in values),
            len(values),
            statistics.median(host for _, host in values),
        )
        for name, values in blocks.items()
    }


def median_and_quantiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The median, and the 20 and 80 % quantiles."""
    ordered = sorted(values)
    low, high = 0.2 * (len(ordered) - 1), 0.8 * (len(ordered) - 1)
    return statistics.median(ordered), ordered[int(low)], ordered[math.ceil(high)]


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


# -- beside the time ------------------------------------------------------------------------------


def probe(run: Callable[[], None], device: str) -> Probe:
    """Count what one call allocates, launches and waits for; ``run`` was called before."""
    if device == "cpu":
        return Probe(peak_bytes=_cpu_peak(run))
    return Probe(_cuda_peak(run), *_cuda_activity(run))


def _cpu_peak(run: Callable[[], None]) -> int:
    """The running maximum of everything torch allocated and freed during a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return running_peak(changes)


def running_peak(changes: list[tuple[int, int]]) -> int:
    """The most that was held at once, from (time, bytes allocated or, negative, freed)."""
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def _cuda_peak(run: Callable[[], None]) -> int:
    """As asked for, without the rounding of the caching allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def _cuda_activity(run: Callable[[], None]) -> tuple[int, int, dict[str, float]]:
    """Launches, synchronisations and seconds per kernel of one call."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    warned = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
    torch.cuda.synchronize()
    mark = "benchmarked call"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()  # the profiler's own beginnings
        torch.cuda.synchronize()
        with record_function(mark):
            run()
            torch.cuda.synchronize()  # one wait that is not the call's
    launches, waits, kernels = activity(profiler.profiler.kineto_results.events(), mark)
    # The runtime calls also show what goes past PyTorch; its warnings what the profiler missed.
    return launches, max(warned, waits - 1), kernels


# Runtime calls in which the host waits for the device.
WAITS = (
    "cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy",
    "cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize",
)  # fmt: skip


def activity(events, mark: str) -> tuple[int, int, dict[str, float]]:
    """Of a profile's events those within the range called ``mark``: launches, waits, kernels."""
    ranges = [e for e in events if e.name() == mark and e.device_type().name == "CPU"]
    if len(ranges) != 1:
        raise RuntimeError(f"the profile has {len(ranges)} ranges called {mark!r}, expected one")
    begin = ranges[0].start_ns()
    end = begin + ranges[0].duration_ns()
    launches = waits = 0
    kernels: Counter[str] = Counter()
    for event in events:
        if not begin <= event.start_ns() <= end or event.name() == mark:
            continue
        if event.device_type().name == "CPU":
            waits += event.name() in WAITS
        elif not event.is_user_annotation():  # compiled code marks its regions on the device, too
            launches += 1
            kernels[kernel_name(event.name())] += event.duration_ns() / 1e9
    return launches, waits, dict(kernels)


def kernel_name(name: str) -> str:
    """A kernel's name without namespaces, return type, template and call arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head = name.split("<", 1)[0].split("(", 1)[0].rstrip()
    # What separates entries of the results file must not be part of a name.
    return head.rsplit("::", 1)[-1].replace(":", " ").replace(";", " ") or "kernel"


def capturable(run: Callable[[], None]) -> bool:
    """Whether a call can be captured in a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        # A failed capture leaves the stream usable once the error was read.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return False
    return True
