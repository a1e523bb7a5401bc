"""Networks that are trained here: one file per family.

Importing this adds the networks for 32 x 32 images to timm's registry, where timm is installed.
"""

from dnkd_ext.train.models.base import CifarModel, Stages
from dnkd_ext.train.models.cifar import create_model, model_names
from dnkd_ext.train.models.cifar_mobilenet import MobileNetV2, mobilenetv2
from dnkd_ext.train.models.cifar_resnet import (
    CifarBottleneckResNet,
    CifarResNet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
)
from dnkd_ext.train.models.cifar_shufflenet import (
    ShuffleNetV1,
    ShuffleNetV2,
    shufflenetv1,
    shufflenetv2,
)
from dnkd_ext.train.models.cifar_vgg import CifarVGG, vgg8, vgg13
from dnkd_ext.train.models.cifar_wrn import WideResNet, wrn_16_2, wrn_40_1, wrn_40_2
from dnkd_ext.train.models.digits import SmallConvNet
from dnkd_ext.train.models.weights import load_weights

__all__ = [
    "CifarBottleneckResNet",
    "CifarModel",
    "CifarResNet",
    "CifarVGG",
    "MobileNetV2",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SmallConvNet",
    "Stages",
    "WideResNet",
    "create_model",
    "load_weights",
    "mobilenetv2",
    "model_names",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenetv1",
    "shufflenetv2",
    "vgg8",
    "vgg13",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
