"""``python -m benchmarks run``: the ladder of a device, kept case by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dnkd_ext
from benchmarks import results, targets
from benchmarks.cases import ALL_DTYPES, DTYPES, Case, cases, select
from benchmarks.harness import can_keep_memory
from benchmarks.peers import PEERS, unavailable
from benchmarks.sources import library_obstacle
from dnkd_ext.progress import Progress

# What a quick run leaves out: sizes beyond the caches, and what has to be compiled.
QUICK_PEERS = ("ours", "noise", "eager")
QUICK_SECONDS = 0.25
SECONDS = 0.4

DTYPE_NAMES = {str(dtype)[6:]: dtype for dtype in ALL_DTYPES}


class NoDevice(RuntimeError):
    """The device asked for is not there."""


def require_library(device: str) -> None:
    """Say before anything is computed that ours would be other kernels than those here, or none.

    Raises:
        ResultsError: so it is.
    """
    info = dnkd_ext.build_info()
    is_there = device == "cuda" and torch.cuda.is_available()
    obstacle = library_obstacle(
        Path(dnkd_ext.__file__).parent,
        device,
        str(torch.__version__),
        torch.cuda.get_device_capability() if is_there else None,
    )
    obstacle = obstacle or info["load_error"]
    if obstacle is None and device == "cuda" and info["cuda"] is None:
        obstacle = "the compiled library has no CUDA kernels"
    if obstacle is not None:
        raise results.ResultsError(obstacle)


@dataclass
class Outcome:
    """What a run measured and what it refused."""

    rows: list[results.Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def require_device(device: str) -> None:
    """Say what is missing before anything is computed."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice("--device cuda needs a GPU: torch.cuda.is_available() is False")


def choose_dtypes(names: Sequence[str] | None) -> tuple[torch.dtype, ...]:
    """Dtypes by name; float32 and bfloat16 where none is named."""
    for name in names or ():
        if name not in DTYPE_NAMES:
            raise ValueError(f"no dtype {name!r}; there are {', '.join(DTYPE_NAMES)}")
    return tuple(dict.fromkeys(DTYPE_NAMES[name] for name in names)) if names else DTYPES


def choose_peers(names: Sequence[str] | None, device: str) -> set[str] | None:
    """Peers by name, with the reason where one cannot run; None for all."""
    for name in names or ():
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; there are {', '.join(PEERS)}")
        reason = unavailable(name, device)
        if reason is not None:
            raise ValueError(f"peer {name!r} cannot be measured here: {reason}")
    return {*names} if names else None


def plan(
    device: str,
    *,
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
) -> list[tuple[Case, bool]]:
    """Cases and whether the allocator is warm; the warm ones last, because they cannot be undone.

    mallopt's settings return to the defaults, but not to the thresholds that adapt themselves.
    """
    chosen = select(cases(device, choose_dtypes(dtypes)), patterns)
    if quick:  # of large cases alone, these
        chosen = [case for case in chosen if not case.large] or chosen
    if device == "cuda":  # first what the targets ask for, should the time not suffice
        everything = len(cases(device))
        asked = Counter(
            name
            for target in targets.targets(device)
            if len(target.asked) < everything
            for name, _ in target.asked
        )
        chosen.sort(key=lambda case: -asked[case.name])
    order = [(case, False) for case in chosen]
    if device == "cpu" and not quick and can_keep_memory():
        order += [(case, True) for case in chosen if case.large]
    return order


def remaining(
    order: list[tuple[Case, bool]], path: Path, device: str, only: Collection[str] | None
) -> list[tuple[Case, bool]]:
    """What a results file lacks of this version on this machine.

    Last come cases that it has without some of the peers asked for, be it that they were refused:
    so they are again, until they are right.
    """
    known = {
        (one.case, one.allocator): {peer for which, peer in one.rows if which == results.BOTH}
        for one in results.measurements(results.LOSSES.measured_here(path, device))
    }
    new, partly = [], []
    for case, warm in order:
        found = known.get((case.name, results.allocator_of(case.device, warm=warm)))
        if found is None:
            new.append((case, warm))
        elif not results.peers_of(case, warm=warm, only=only) <= found:
            partly.append((case, warm))
    # The warm allocator still comes last.
    return sorted(new + partly, key=lambda entry: entry[1])


def run(
    order: list[tuple[Case, bool]],
    *,
    out: Path | None = None,
    only: Collection[str] | None = None,
    seconds: float = 1.0,
    outcome: Outcome | None = None,
) -> Outcome:
    """Measure cases in order; every case is in ``out`` and ``outcome`` as soon as it is done."""
    outcome = Outcome() if outcome is None else outcome
    with Progress(len(order), "benchmarks", unit="case") as progress:
        for case, warm in order:
            progress.say(case.name + (", warm allocator" if warm else ""))
            rows, refused = results.measure_case(case, warm=warm, seconds=seconds, only=only)
            outcome.refused += refused.values()
            # Without ours the others say nothing, and the case counts as not measured.
            if "ours" not in refused:
                if out is not None:
                    results.append(rows, out)
                outcome.rows += rows
            progress.advance()
    return outcome
