"""One file per loss: its reference, fake kernels, functional and module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnkd_ext.losses.nd_loss import NDLoss, nd_loss, nd_loss_examples, nd_loss_reference

__all__ = ["LOSSES", "Loss", "NDLoss", "nd_loss"]


@dataclass(frozen=True)
class Loss:
    """A fused loss, its reference, and float64 arguments (the student first) to compare them on."""

    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    examples: Callable[[torch.Generator], Iterator[tuple[list[Any], dict[str, Any]]]]


# Every fused loss by the name of its operator.
LOSSES = {"nd_loss": Loss(nd_loss, nd_loss_reference, nd_loss_examples)}
