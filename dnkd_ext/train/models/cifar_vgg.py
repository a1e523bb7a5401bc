"""VGG (arXiv 1409.1556) with BatchNorm and one linear layer, for 32 x 32 images.

Parameters have the names and shapes that mdistiller's checkpoints have, so that those load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnkd_ext.train.models.base import CifarModel, init_convolutions, linear_or_identity

__all__ = ["MODELS", "CifarVGG"]

WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(CifarModel):
    """Five groups of 3 x 3 convolutions, halved in size between the first four.

    Args:
        depth: convolutions of every group.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 8 (32 in CIFAR), to logits (N, num_classes).
        The features that ``classifier`` reads are (N, 512), and not negative.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        channels = in_chans
        for number, width in enumerate(WIDTHS):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                channels = width
            # The last activation is applied outside, where the map before it is still at hand.
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
        self.classifier = linear_or_identity(channels, num_classes)
        init_convolutions(self)
        sizes = (2, 4, 8, 8)
        names = [(f"block{i + 1}", WIDTHS[i + 1], size) for i, size in enumerate(sizes)]
        self._describe("classifier", channels, num_classes, in_chans, names)
        if isinstance(self.classifier, nn.Linear):
            self._init_classifier(self.classifier)

    def _init_classifier(self, layer: nn.Linear) -> None:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = images
        for number in range(len(WIDTHS)):
            if 0 < number < 4:
                maps = nn.functional.max_pool2d(maps, 2)
            before = self.get_submodule(f"block{number}")(maps)
            maps = torch.relu(before)
            if stages is not None and number > 0:
                stages.append((before, maps))
        return maps


def vgg8(num_classes: int = 100, in_chans: int = 3) -> CifarVGG:
    """One convolution in every group."""
    return CifarVGG(1, num_classes, in_chans)


def vgg13(num_classes: int = 100, in_chans: int = 3) -> CifarVGG:
    """Two convolutions in every group."""
    return CifarVGG(2, num_classes, in_chans)


MODELS = (vgg8, vgg13)
