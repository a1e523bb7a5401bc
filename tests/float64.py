"""Training commands in float64, so that two ways of computing stay together.

In float32 they do not: a rounding that turns one ReLU becomes a difference that BatchNorm over a
handful of images makes many times larger with every step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch

from dnkd_ext.train.data import loaders, sources


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Weights, images and everything that is computed of them."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, before)
        for place, name in (
            (sources, "TrainBatches"),
            (sources, "EvalBatches"),
            (loaders, "TrainLoader"),
            (loaders, "EvalLoader"),
        ):
            kind = getattr(place, name)
            wide = functools.partial(kind, dtype=torch.float64)
            stack.enter_context(mock.patch.object(place, name, wide))
        yield
