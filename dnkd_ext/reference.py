"""Every loss in differentiable PyTorch operations, with the signature of the fused one.

These run on every device, are differentiable to any order, and are what the fused kernels are
tested against.
"""

from dnkd_ext.losses.nd_loss import nd_loss_reference as nd_loss

__all__ = ["nd_loss"]
