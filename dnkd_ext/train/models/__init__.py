"""Networks that are trained here: one file per family.

Importing this adds the networks for 32 x 32 images to timm's registry, where timm is installed.
"""

from dnkd_ext.train.models.base import CifarModel, Stages
from dnkd_ext.train.models.cifar import create_model, model_names
from dnkd_ext.train.models.digits import SmallConvNet
from dnkd_ext.train.models.weights import load_weights

__all__ = [
    "CifarModel",
    "SmallConvNet",
    "Stages",
    "create_model",
    "load_weights",
    "model_names",
]
