"""Every loss in differentiable PyTorch operations, with the signature of the fused one.

These run on every device, are differentiable to any order, and are what the fused kernels are
tested against.
"""

from dnkd_ext.diagnostics import feature_diagnostics_reference as feature_diagnostics
from dnkd_ext.losses.dist_loss import dist_loss_reference as dist_loss
from dnkd_ext.losses.dkd_loss import ce_dkd_loss_reference as ce_dkd_loss
from dnkd_ext.losses.dkd_loss import dkd_loss_reference as dkd_loss
from dnkd_ext.losses.kd_loss import ce_kd_loss_reference as ce_kd_loss
from dnkd_ext.losses.kd_loss import kd_loss_reference as kd_loss
from dnkd_ext.losses.nd_loss import nd_loss_reference as nd_loss

__all__ = [
    "ce_dkd_loss",
    "ce_kd_loss",
    "dist_loss",
    "dkd_loss",
    "feature_diagnostics",
    "kd_loss",
    "nd_loss",
]
