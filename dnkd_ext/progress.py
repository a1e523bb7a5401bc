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
