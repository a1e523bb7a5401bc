"""Training commands in float64, so that two ways of computing stay together.

In float32 they do not: a rounding that turns one ReLU becomes a difference that BatchNorm over a
handful of images makes many times larger with every step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from dnkd_ext.train import sources


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Weights, images and everything that is computed of them."""
    before = torch.get_default_dtype(), sources.TrainBatches, sources.EvalBatches
    torch.set_default_dtype(torch.float64)
    for name in ("TrainBatches", "EvalBatches"):
        kind = getattr(sources, name)
        setattr(sources, name, functools.partial(kind, dtype=torch.float64))
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        sources.TrainBatches, sources.EvalBatches = before[1:]
