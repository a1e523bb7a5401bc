"""Progress bars, where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], description: str, *, enabled: bool = True, total: int | None = None
) -> Iterable[T]:
    """Iterate with a progress bar on standard error; silently without one if tqdm is missing."""
    if not enabled:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(
        items, desc=description, total=total, dynamic_ncols=True, file=sys.stderr, leave=False
    )


class Progress:
    """A bar over a known number of steps, advanced by hand; with a line per stage without tqdm.

    Args:
        total: steps.
        description: what the bar is called.
        unit: what a step is.
        initial: steps that were done before.
        enabled: without, nothing is shown.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        unit: str = "it",
        initial: int = 0,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(
                total=total,
                desc=description,
                unit=unit,
                initial=initial,
                disable=not enabled,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def say(self, stage: str) -> None:
        """Show what is being done."""
        if not self._enabled:
            return
        if self._bar is None:
            print(stage, file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(stage)

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""
        if self._bar is not None:
            self._bar.update(steps)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
