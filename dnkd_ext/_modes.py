"""Models in evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["evaluating"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; behind it every module is in the mode it was in.

    One that is in evaluation mode already, as a teacher, is left alone: some of timm's drop a cache
    when the mode is set, whose memory a recorded step may go on reading.
    """
    modes = {module: module.training for module in model.modules()}
    was_training = any(modes.values())
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()  # some of timm's drop what they have kept of the weights then alone
        for module, mode in modes.items():
            module.training = mode
