"""Two sets of results against each other: ``compare`` for files, ``regression`` for the past."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.results import BOTH, FORWARD, Measurement

# Quantiles of one quiet run say nothing about what differs between runs.
LEAST_NOISE = 0.03
# What a machine's runs differ by is noise up to here; what is more must be looked into.
MOST_NOISE = 0.25


@dataclass(frozen=True)
class Change:
    """How a time, or a ratio of times, changed between two measurements of a case.

    Attributes:
        case: with the allocator and the pass.
        peer: whose time; for a regression ours relative to eager.
        before: the earlier value.
        after: the later one.
        noise: relative; what a change must exceed to be one.
        machine: how many times as long eager took later, where it was measured both times: that is
            the machine and the day, and is taken out of the ratio.
        apart: whether the two measurements lie apart, as those of a change must: between their
            quantiles nothing is in both.
        is_judged: False where the change is of the machine, torch or the kernels.
    """

    case: str
    peer: str
    before: float
    after: float
    noise: float
    machine: float = 1.0
    apart: bool = True
    is_judged: bool = True

    @property
    def ratio(self) -> float:
        return self.after / self.before / self.machine

    @property
    def verdict(self) -> str:
        """slower, faster, or same within the noise; - where it is not judged."""
        if not self.is_judged:
            return "-"
        if not self.apart:
            return "same"
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else "same"


def compare(before: dict, after: dict, least_noise: float = LEAST_NOISE) -> list[Change]:
    """Every peer's time in cases (by case and allocator) that both have.

    Judged relative to eager of the same run, where both have it; eager and the copy themselves are
    not judged then, and nothing is between machines, versions of torch or kernels.

    ``least_noise``: as for :func:`regressions`.
    """
    changes = []
    for key, first in before.items():
        second = after.get(key)
        for which, peer in first.rows:
            if second is None or (which, peer) not in second.rows or peer == "noise":
                continue
            old, new = first.us(peer, which), second.us(peer, which)
            if not old or not new:
                continue
            # What others take out of their ratios is shown, not judged.
            eager = [one.us("eager", which) for one in (first, second)]
            of_machine = all(eager) and peer in ("eager", "copy")
            is_relative = all(eager) and not of_machine
            machine = eager[1] / eager[0] if is_relative else 1.0
            peers = [peer, "eager"] if is_relative else [peer]
            noise = math.hypot(first.noise(peers, which), second.noise(peers, which))
            kernels = [one.common["kernels"] for one in (first, second)]
            alike = first.machine == second.machine and kernels[0] == kernels[1]
            changes.append(
                Change(
                    _name(first, which),
                    peer,
                    old,
                    new,
                    max(least_noise, noise),
                    machine,
                    _apart(first, second, peers, which),
                    is_judged=alike and not of_machine,
                )
            )
    return changes


def _apart(first: Measurement, second: Measurement, peers: list[str], which: str) -> bool:
    """Whether the times of a peer, or its ratios to a second one, lie apart by their quantiles.

    Half of a time with two modes may be either; the median then jumps, with nothing changed.
    """
    ranges = []
    for one in (first, second):
        low, high = one.value("low_us", peers[0], which), one.value("high_us", peers[0], which)
        if len(peers) > 1:
            least, most = (one.value(name, peers[1], which) for name in ("low_us", "high_us"))
            low, high = low and most and low / most, high and least and high / least
        if not low or not high:
            return True
        ranges.append((low, high))
    return ranges[0][1] < ranges[1][0] or ranges[1][1] < ranges[0][0]


def between_runs(recorded: Iterable[Measurement]) -> float:
    """How much ours relative to eager differs from run to run of a machine, whatever the code.

    One and a half times the median over all cases that were recorded more than once, which improved
    ones among them hardly move; at most a quarter. 0 where there are none.
    """
    last: dict[tuple[str, str, str], float] = {}
    steps = []
    for one in recorded:
        for which in (BOTH, FORWARD):
            key = one.case, one.allocator, which
            ratio = one.ratio("ours", to="eager", which=which)
            if not ratio:
                continue
            if key in last:
                steps.append(abs(math.log(ratio / last[key])))
            last[key] = ratio
    return min(MOST_NOISE, 1.5 * math.expm1(statistics.median(steps))) if steps else 0.0


def regressions(before: dict, after: dict, least_noise: float = LEAST_NOISE) -> list[Change]:
    """Ours relative to eager, which takes out how fast the machine was on the day.

    ``least_noise``: what a change must exceed however quiet both runs were in themselves.
    """
    changes = []
    for key, first in before.items():
        second = after.get(key)
        if second is None:
            continue
        for which in (BOTH, FORWARD):
            old, new = (one.ratio("ours", to="eager", which=which) for one in (first, second))
            if not old or not new:
                continue
            peers = ("ours", "eager")
            noise = math.hypot(first.noise(peers, which), second.noise(peers, which))
            changes.append(
                Change(
                    _name(first, which),
                    "ours/eager",
                    old,
                    new,
                    max(least_noise, noise),
                    apart=_apart(first, second, ["ours", "eager"], which),
                )
            )
    return changes


def confirmed_regressions(
    before: dict, measure: Callable[[set[str]], dict], least_noise: float
) -> list[Change]:
    """:func:`regressions`; what is slower is measured again, and is slower where it is so twice.

    ``measure``: measures cases by name.
    """
    changes: dict[str, Change] = {}
    names = {name for name, _ in before}
    for _ in range(2):
        after, again = measure(names), set()
        for key, one in before.items():
            for change in regressions({key: one}, after, least_noise):
                if change.verdict == "slower":
                    again.add(key[0])
                known = changes.get(change.case)
                changes[change.case] = min(known or change, change, key=lambda c: c.ratio)
        if not again:
            break
        names = again
    return list(changes.values())


def _name(one: Measurement, which: str) -> str:
    allocator = ", warm allocator" if one.allocator == "warm" and one.machine[1] == "cpu" else ""
    return one.case + allocator + (", forward" if which == FORWARD else "")


def table(changes: Iterable[Change], unit: str = "us") -> str:
    """A line per change, what got slower first."""
    order = {"slower": 0, "faster": 1, "same": 2, "-": 3}
    lines = [
        f"{'case':58}{'peer':>12}{'before, ' + unit:>18}{'after, ' + unit:>18}{'ratio':>8}"
        f"{'noise':>8}  verdict"
    ]
    for change in sorted(changes, key=lambda c: (order[c.verdict], -c.ratio)):
        lines.append(
            f"{change.case:58}{change.peer:>12}{_value(change.before):>18}"
            f"{_value(change.after):>18}{change.ratio:>8.2f}{100 * change.noise:>7.0f}%"
            f"  {change.verdict}"
        )
    return "\n".join(lines)


def _value(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:,.1f}"
