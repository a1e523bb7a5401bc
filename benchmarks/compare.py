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
    """

    case: str
    peer: str
    before: float
    after: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """slower, faster, or same within the noise."""
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else "same"


def compare(before: dict, after: dict) -> list[Change]:
    """Every peer's time in cases (by case and allocator) that both have."""
    changes = []
    for key, first in before.items():
        second = after.get(key)
        for which, peer in first.rows:
            if second is None or (which, peer) not in second.rows or peer == "noise":
                continue
            old, new = first.us(peer, which), second.us(peer, which)
            if not old or not new:
                continue
            noise = math.hypot(first.noise([peer], which), second.noise([peer], which))
            changes.append(Change(_name(first, which), peer, old, new, max(LEAST_NOISE, noise)))
    return changes


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
                Change(_name(first, which), "ours/eager", old, new, max(least_noise, noise))
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
    order = {"slower": 0, "faster": 1, "same": 2}
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
