"""Fused feature-direction-and-norm distillation losses for PyTorch, on CPU and CUDA."""

__version__ = "0.2.0.dev0"

from dnkd_ext._extension import build_info, empty_cache  # first: its warning points at the importer

# isort: split
from dnkd_ext import reference
from dnkd_ext.adapters import (
    DistilledFeatures,
    distilled_features,
    extract_features,
    features,
)
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.criteria import (
    CriterionTerms,
    DISTPlusPlus,
    DKDPlusPlus,
    HardKDPlusPlus,
    KDPlusPlus,
    ReviewKDPlusPlus,
)
from dnkd_ext.diagnostics import FeatureDiagnostics, feature_diagnostics
from dnkd_ext.losses import (
    LogitTerms,
    NDLoss,
    ce_dkd_loss,
    ce_kd_loss,
    dist_loss,
    dkd_loss,
    hcl_loss,
    kd_loss,
    nd_loss,
)
from dnkd_ext.projector import FeatureProjector
from dnkd_ext.review import StageMaps, stage_maps

__all__ = [
    "ClassMeans",
    "CriterionTerms",
    "DISTPlusPlus",
    "DKDPlusPlus",
    "DistilledFeatures",
    "FeatureDiagnostics",
    "FeatureProjector",
    "HardKDPlusPlus",
    "KDPlusPlus",
    "LogitTerms",
    "NDLoss",
    "ReviewKDPlusPlus",
    "StageMaps",
    "__version__",
    "build_info",
    "ce_dkd_loss",
    "ce_kd_loss",
    "dist_loss",
    "distilled_features",
    "dkd_loss",
    "empty_cache",
    "extract_features",
    "feature_diagnostics",
    "features",
    "hcl_loss",
    "kd_loss",
    "nd_loss",
    "reference",
    "stage_maps",
]
