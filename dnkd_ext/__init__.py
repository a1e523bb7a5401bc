"""Fused feature-direction-and-norm distillation losses for PyTorch, on CPU and CUDA."""

__version__ = "0.1.0"

from dnkd_ext._extension import build_info  # first: its warning points at the importer

# isort: split
from dnkd_ext import reference
from dnkd_ext.adapters import extract_features
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.losses import (
    NDLoss,
    ce_dkd_loss,
    ce_kd_loss,
    dist_loss,
    dkd_loss,
    hcl_loss,
    kd_loss,
    nd_loss,
)

__all__ = [
    "ClassMeans",
    "NDLoss",
    "__version__",
    "build_info",
    "ce_dkd_loss",
    "ce_kd_loss",
    "dist_loss",
    "dkd_loss",
    "extract_features",
    "hcl_loss",
    "kd_loss",
    "nd_loss",
    "reference",
]
