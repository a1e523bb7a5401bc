"""What every network for 32 x 32 images offers: timm's interface, and the maps of its stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CifarModel", "Stages", "through_stage"]

# Mean and deviation of CIFAR-100's training pixels, as published recipes give them.
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class Stages(NamedTuple):
    """Maps of every stage (N, C_i, H_i, W_i), the pooled feature (N, D), logits (N, classes)."""

    maps: list[Tensor]
    pooled: Tensor
    logits: Tensor


class CifarModel(nn.Module):
    """Base of the networks; a subclass builds its layers and calls :meth:`_describe` last.

    Attributes:
        num_classes: width of the logits; 0 without a classifier.
        num_features: width of the feature that the classifier reads, also ``head_hidden_size``.
        feature_info: one dictionary per stage, in timm's form: ``num_chs`` (its channels),
            ``reduction`` (image size over map size) and ``module`` (its name).
        pretrained_cfg: input size, mean, std and the classifier's name, in timm's form.
    """

    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    pretrained_cfg: dict[str, Any]
    _classifier: str

    def _describe(
        self,
        classifier: str,
        num_features: int,
        num_classes: int,
        in_chans: int,
        stages: list[tuple[str, int, int]],
    ) -> None:
        """Set the public attributes; ``stages`` holds (module, channels, reduction)."""
        self._classifier = classifier
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": module}
            for module, channels, reduction in stages
        ]
        self.pretrained_cfg = self.default_cfg = {
            "num_classes": num_classes,
            "input_size": (in_chans, 32, 32),
            "mean": CIFAR100_MEAN,
            "std": CIFAR100_STD,
            "classifier": classifier,
        }

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        """Images to the maps that are pooled; (before, after) of the stages are appended."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the last maps (N, num_features, H', W')."""
        return self._body(images, None)

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """The last maps to logits, or with ``pre_logits`` to the feature (N, num_features)."""
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(maps, 1), 1)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_stages(self, images: Tensor, *, pre_activation: bool = True) -> Stages:
        """Run once and return the maps of all stages as well.

        Before their activation is how ReviewKD reads its teacher; the student is read after it.
        Where a stage ends without an activation, both are the same. The convolution before the
        first stage is left out.
        """
        taken: list[tuple[Tensor, Tensor]] = []
        maps = self._body(images, taken)
        pooled = self.forward_head(maps, pre_logits=True)
        logits = self.get_submodule(self._classifier)(pooled)
        return Stages(
            [before if pre_activation else after for before, after in taken], pooled, logits
        )

    def get_classifier(self) -> nn.Module:
        """The last linear layer; ``nn.Identity`` where there are no classes."""
        return self.get_submodule(self._classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh linear layer for ``num_classes`` classes, or none for 0, at the end.

        Raises:
            ValueError: a negative count, or a pooling other than the average.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        self.num_classes = num_classes
        self.set_submodule(self._classifier, self._new_classifier(num_classes))

    def _new_classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        old = next(self.parameters())
        layer = nn.Linear(self.num_features, num_classes, device=old.device, dtype=old.dtype)
        self._init_classifier(layer)
        return layer

    def _init_classifier(self, layer: nn.Linear) -> None:
        """A subclass with a habit of its own overrides this; else nn.Linear's."""

    def extra_repr(self) -> str:
        """Width of features and logits."""
        return f"num_features={self.num_features}, num_classes={self.num_classes}"


def through_stage(
    stage: nn.Sequential, maps: Tensor, stages: list[tuple[Tensor, Tensor]] | None
) -> Tensor:
    """Maps through a stage, whose last block gives its output before and after activation.

    Where nothing is to be kept the stage is called as a whole, so that hooks on it run; those on
    the blocks run in any case.
    """
    if stages is None:
        return stage(maps)
    *first, last = stage
    for block in first:
        maps = block(maps)
    stages.append(last(maps, both=True))
    return stages[-1][1]


def linear_or_identity(width: int, num_classes: int) -> nn.Module:
    """The classifier of a network that may have none."""
    return nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()


def init_convolutions(model: nn.Module) -> None:
    """He's initialisation by output channels; biases start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
