"""MobileNetV2 (arXiv 1801.04381) of half width for 32 x 32 images.

Parameters have the names and shapes that mdistiller's checkpoints have, so that those load.
"""

from __future__ import annotations

from torch import Tensor, nn

from dnkd_ext.train.models.base import CifarModel, init_convolutions

__all__ = ["MODELS", "MobileNetV2"]

# Expansion, channels at full width, blocks, stride of the first block.
LAYOUT = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# The groups of blocks after which ReviewKD reads, and the image size over the map's there.
STAGES = {1: 2, 2: 4, 4: 8, 6: 16}
FEATURES = 1280


def _convolution(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1):
    return [
        nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]


class _InvertedResidual(nn.Module):
    """Widened by a 1 x 1 convolution, 3 x 3 per channel, narrowed without an activation."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == width
        self.conv = nn.Sequential(
            *_convolution(channels, wide, 1),
            nn.ReLU(),
            *_convolution(wide, wide, 3, stride, groups=wide),
            nn.ReLU(),
            *_convolution(wide, width, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps to maps."""
        return maps + self.conv(maps) if self.residual else self.conv(maps)


class MobileNetV2(CifarModel):
    """Seven groups of inverted residuals between two convolutions.

    Args:
        width: factor on the channels of every group; the features stay 1280 wide.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 16 (32 in CIFAR), to logits (N, num_classes).
        The features that ``classifier`` reads are (N, 1280), and not negative.

    The stages end without an activation: their maps before and after it are the same.
    """

    def __init__(self, width: float, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*_convolution(in_chans, channels, 3, 2), nn.ReLU())
        self.blocks = nn.ModuleList()
        names = []
        for number, (expansion, full, count, stride) in enumerate(LAYOUT):
            group = []
            for position in range(count):
                narrow = int(full * width)
                group.append(
                    _InvertedResidual(channels, narrow, stride if position == 0 else 1, expansion)
                )
                channels = narrow
            self.blocks.append(nn.Sequential(*group))
            if number in STAGES:
                names.append((f"blocks.{number}", channels, STAGES[number]))
        self.conv2 = nn.Sequential(*_convolution(channels, FEATURES, 1), nn.ReLU())
        init_convolutions(self)
        self._describe("classifier.0", FEATURES, num_classes, in_chans, names)
        # Within a Sequential, as the checkpoints name it.
        self.classifier = nn.Sequential(self._new_classifier(num_classes))

    def _init_classifier(self, layer: nn.Linear) -> None:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = self.conv1(images)
        for number, group in enumerate(self.blocks):
            maps = group(maps)
            if stages is not None and number in STAGES:
                stages.append((maps, maps))
        return self.conv2(maps)


def mobilenetv2(num_classes: int = 100, in_chans: int = 3) -> MobileNetV2:
    """Half width, expansion 6: the student of the published CIFAR-100 tables."""
    return MobileNetV2(0.5, num_classes, in_chans)


MODELS = (mobilenetv2,)
