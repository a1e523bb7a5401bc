"""An option of a training run: its default, and what is known of it beside its type."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

__all__ = [
    "Range",
    "Traits",
    "above",
    "at_least",
    "between",
    "check_ranges",
    "converted",
    "flag",
    "in_words",
    "option",
    "traits_of",
]


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``; those that are open are not among them."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if not _is_finite(value):
            return False
        is_above = value > self.low if self.open_low else value >= self.low
        return is_above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.high == math.inf:
            return f"greater than {low}" if self.open_low else f"at least {low}"
        if self.open_low:
            both = f"between {low} and {high}, both excluded"
            return both if self.open_high else f"greater than {low} and at most {high}"
        return f"in [{low}, {high})" if self.open_high else f"between {low} and {high}"

    def check(self, name: str, value: float) -> None:
        """ValueError for a value of an option outside of it."""
        if value not in self:
            wanted = self if _is_finite(value) else "finite"
            raise ValueError(f"{flag(name)} must be {wanted}, got {value}")


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # integers of any length


def at_least(low: float) -> Range:
    """Numbers from ``low`` on."""
    return Range(low)


def above(low: float) -> Range:
    """Numbers greater than ``low``."""
    return Range(low, open_low=True)


def between(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Range:
    """Numbers from ``low`` to ``high``, with both unless they are left out."""
    return Range(low, high, open_low, open_high)


class Traits(NamedTuple):
    """What is known of an option beside its type and its default.

    Attributes:
        range: numbers that it may be; None is not looked at.
        tasks: those that have it; by default those of its group.
        free: it does not change what is computed, beyond rounding: a run may go on with another.
        strict: it is refused where the method has no use for it; others do no harm there. For
            options of methods.
    """

    range: Range | None = None
    tasks: tuple[str, ...] | None = None
    free: bool = False
    strict: bool = False


def option(default: Any, range: Range | None = None, **traits: Any) -> Any:
    """A field of a group of options, with its :class:`Traits`."""
    return dataclasses.field(default=default, metadata={"traits": Traits(range, **traits)})


def traits_of(group: type) -> dict[str, Traits]:
    """The traits of all options of a group by their name."""
    return {one.name: one.metadata.get("traits", Traits()) for one in dataclasses.fields(group)}


def check_ranges(group: Any) -> None:
    """ValueError for an option of a group whose value is not in its range."""
    for name, traits in traits_of(type(group)).items():
        value = getattr(group, name)
        if traits.range is not None and value is not None:
            traits.range.check(name, value)


def flag(name: str) -> str:
    """An option as the command line has it."""
    return f"--{name.replace('_', '-')}"


def _some(kind: Any) -> Any:
    """The type without None."""
    return get_args(kind)[0] if type(None) in get_args(kind) else kind


def converted(kind: Any, value: Any) -> Any:
    """The value as a field's type has it; None where it is of another."""
    kind = _some(kind)
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return value if value in arguments else None
    if get_origin(kind) is tuple:
        fits = isinstance(value, list | tuple) and (
            Ellipsis in arguments or len(value) == len(arguments)
        )
        items = tuple(converted(arguments[0], item) for item in value) if fits else (None,)
        return None if None in items else items
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    return value if type(value) is kind else None


def in_words(kind: Any) -> str:
    """What a field's type asks for, None apart."""
    kind = _some(kind)
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(arguments)}"
    if get_origin(kind) is tuple:
        count = "" if Ellipsis in arguments else "two "
        return f"a list of {count}{in_words(arguments[0]).split()[-1]}s"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
