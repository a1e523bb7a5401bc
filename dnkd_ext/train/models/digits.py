"""A small convolutional network for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SmallConvNet"]


class SmallConvNet(nn.Module):
    """3 x 3 convolutions with BatchNorm in stages, halved in size between, pooled to a feature.

    Args:
        channels: of the image.
        widths: channels of every stage; the last is the width of the features.
        depth: convolutions per stage.
        num_classes: width of the logits.

    Shape:
        images (N, channels, H, W), H and W at least 4, to logits (N, num_classes); the features
        that ``classifier`` reads are (N, widths[-1]), and not negative.
    """

    def __init__(
        self, channels: int, widths: tuple[int, ...], depth: int, num_classes: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        return self.classifier(torch.flatten(self.pool(self.body(images)), 1))
