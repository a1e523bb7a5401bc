"""Networks that are trained here: one file per family."""

from dnkd_ext.train.models.cifar_resnet import (
    CifarResNet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from dnkd_ext.train.models.digits import SmallConvNet

__all__ = [
    "CifarResNet",
    "SmallConvNet",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
]
