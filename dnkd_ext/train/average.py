"""The exponential moving average of what is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dnkd_ext.train.sharding import local

__all__ = ["MovingAverage"]


class MovingAverage(nn.ModuleList):
    """Copies of modules, whose parameters and buffers follow theirs.

    An update is a few launches on the device, however many tensors there are, and reads nothing
    back, so that it may be recorded. torch.optim.swa_utils.AveragedModel counts its updates in a
    tensor on the CPU, which it copies to the device in every step.

    Args:
        modules: what is averaged; of sharded ones a process averages the parts it has.
        decay: share of the old average in every update.

    Attributes:
        begun: whether there was an update. The first one takes everything as it is.
    """

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        super().__init__(copy.deepcopy(module) for module in modules)
        self.decay = decay
        self.begun = False

    @torch.no_grad()
    def update(self, modules: Sequence[nn.Module]) -> None:
        """Move towards the modules as they are; integers (numbers of batches) become theirs."""
        averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        for own, other in zip(self, modules, strict=True):
            for of in ("parameters", "buffers"):
                pairs = zip(getattr(own, of)(), getattr(other, of)(), strict=True)
                for pair in pairs:
                    follows = self.begun and pair[0].is_floating_point()
                    for kept, tensor in zip(averaged if follows else copied, pair, strict=True):
                        kept.append(local(tensor))
        self.begun = True
        if averaged[0]:
            torch._foreach_lerp_(*averaged, 1 - self.decay)
        if copied[0]:
            torch._foreach_copy_(*copied)
