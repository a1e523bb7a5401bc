"""One file per loss: its reference, fake kernels, functional and module."""

from dnkd_ext.losses.nd_loss import NDLoss, nd_loss

__all__ = ["NDLoss", "nd_loss"]
