"""One file per loss: its reference, fake kernels, functional and module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.dist_loss import dist_loss, dist_loss_examples, dist_loss_reference
from dnkd_ext.losses.dkd_loss import (
    ce_dkd_loss,
    ce_dkd_loss_reference,
    dkd_loss,
    dkd_loss_reference,
)
from dnkd_ext.losses.hcl_loss import hcl_loss
from dnkd_ext.losses.kd_loss import (
    ce_kd_loss,
    ce_kd_loss_reference,
    kd_loss,
    kd_loss_reference,
    logit_examples,
)
from dnkd_ext.losses.nd_loss import NDLoss, nd_loss, nd_loss_examples, nd_loss_reference

__all__ = [
    "LOSSES",
    "LogitTerms",
    "Loss",
    "NDLoss",
    "ce_dkd_loss",
    "ce_kd_loss",
    "dist_loss",
    "dkd_loss",
    "hcl_loss",
    "kd_loss",
    "nd_loss",
]


@dataclass(frozen=True)
class Loss:
    """A fused loss, its reference, and float64 arguments (the student first) to compare them on.

    Both return the loss, or a named tuple that begins with it.
    """

    fused: Callable[..., Any]
    reference: Callable[..., Any]
    examples: Callable[[torch.Generator], Iterator[tuple[list[Any], dict[str, Any]]]]


# Every fused loss by the name of its function.
LOSSES = {
    "nd_loss": Loss(nd_loss, nd_loss_reference, nd_loss_examples),
    "kd_loss": Loss(kd_loss, kd_loss_reference, partial(logit_examples, with_target=False)),
    "ce_kd_loss": Loss(
        ce_kd_loss,
        ce_kd_loss_reference,
        partial(logit_examples, with_target=True, with_options=True),
    ),
    "dkd_loss": Loss(dkd_loss, dkd_loss_reference, partial(logit_examples, with_target=True)),
    "ce_dkd_loss": Loss(
        ce_dkd_loss,
        ce_dkd_loss_reference,
        partial(logit_examples, with_target=True, with_options=True),
    ),
    "dist_loss": Loss(dist_loss, dist_loss_reference, dist_loss_examples),
}
