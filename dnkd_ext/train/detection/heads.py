"""RoI heads that show what they sampled and computed, and a teacher's answers to the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.roi_heads import RoIHeads

__all__ = ["Answers", "DistillingRoIHeads", "Seen", "answers", "watched"]


@dataclass
class Seen:
    """What a detector in training mode saw and computed in one forward pass.

    Attributes:
        images: ``(N, 3, H, W)``, resized, normalised and padded, as the backbone reads them.
        sizes: height and width of every image in them.
        maps: the feature pyramid's, the finest first, ``(N, 256, H_i, W_i)`` each.
        proposals: sampled of every image, ``(R_n, 4)`` in pixels of ``images``.
        labels: of all sampled proposals ``(R,)`` int64; 0 is the background.
        features: the box head's ``(R, 1024)``.
        logits: of the classes ``(R, C)``.
    """

    images: Tensor = field(default_factory=lambda: torch.empty(0))
    sizes: list[tuple[int, int]] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    proposals: list[Tensor] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Answers:
    """What a detector makes of given proposals: ``maps``, ``features``, ``logits`` of Seen."""

    maps: dict[str, Tensor]
    features: Tensor
    logits: Tensor


class DistillingRoIHeads(RoIHeads):
    """torchvision's RoI heads, which put what they sample and compute into a :class:`Seen`.

    Nothing is computed otherwise, or more of it: proposals and labels are noted where they are
    sampled, features and logits by hooks on box head and box predictor.
    """

    seen: Seen | None = None

    @classmethod
    def put_into(cls, model: FasterRCNN) -> None:
        """Make the RoI heads of a detector such ones; its modules and weights stay."""
        if type(model.roi_heads) is not RoIHeads:
            raise TypeError(
                f"the detector's roi_heads must be torchvision's RoIHeads, got "
                f"{type(model.roi_heads).__name__}"
            )
        model.roi_heads.__class__ = cls

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """As torchvision's; what is sampled is noted."""
        sampled = super().select_training_samples(proposals, targets)
        if self.seen is not None:
            self.seen.proposals, self.seen.labels = sampled[0], torch.cat(sampled[2])
        return sampled

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's; maps, features and logits are noted."""
        seen = self.seen
        if seen is None:
            return super().forward(features, proposals, image_shapes, targets)
        seen.maps, seen.sizes = features, image_shapes

        def head(module: Any, inputs: Any, output: Tensor) -> None:
            seen.features = output

        def predictor(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            seen.logits = output[0]

        with ExitStack() as hooks:
            hooks.callback(self.box_head.register_forward_hook(head).remove)
            hooks.callback(self.box_predictor.register_forward_hook(predictor).remove)
            return super().forward(features, proposals, image_shapes, targets)


@contextmanager
def watched(model: FasterRCNN) -> Iterator[Seen]:
    """While it lasts, a forward pass of the detector fills the :class:`Seen` that it gives.

    Nothing stays on the model, whose copies and checkpoints are as before.

    Raises:
        TypeError: the detector's RoI heads are no :class:`DistillingRoIHeads`.
    """
    heads = model.roi_heads
    if not isinstance(heads, DistillingRoIHeads):
        raise TypeError(
            f"the detector's roi_heads must be DistillingRoIHeads, got {type(heads).__name__}"
        )
    seen = Seen()

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.images = inputs[0]

    hook = model.backbone.register_forward_pre_hook(note)
    heads.seen = seen
    try:
        yield seen
    finally:
        hook.remove()
        del heads.seen


def answers(
    model: FasterRCNN,
    images: Tensor,
    proposals: list[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    boxes: bool = True,
) -> Answers:
    """What a detector's backbone, box head and classifier make of others' proposals.

    Args:
        model: in evaluation mode; its own region proposals are left out.
        images: ``(N, 3, H, W)`` as in :class:`Seen`.
        proposals: of every image ``(R_n, 4)``.
        sizes: height and width of every image.
        boxes: False leaves features and logits empty, where only the maps are wanted.
    """
    maps = model.backbone(images)
    if not boxes:
        return Answers(maps, images.new_empty(0), images.new_empty(0))
    heads = model.roi_heads
    features = heads.box_head(heads.box_roi_pool(maps, proposals, list(sizes)))
    logits, _ = heads.box_predictor(features)
    return Answers(maps, features, logits)
