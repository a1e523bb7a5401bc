"""A detector's step: its own losses, and what it learns from a teacher's view of its proposals.

Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
(arXiv 2305.17007).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN

from dnkd_ext.train.config import METHODS, MethodOptions
from dnkd_ext.train.detection.heads import answers, watched

__all__ = ["IGNORED", "TERMS", "DetectorDistillation", "make_criterion"]

TERMS = ("loss", "ce", "box", "objectness", "rpn_box", "kd", "nd")
# torchvision's names of the detector's own losses, in the order of TERMS.
LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
# torchvision's label of proposals that overlap with an object neither enough nor little enough.
IGNORED = -1
# The feature pyramid's levels: four, and the coarsest halved once more.
LEVELS = 5
MAP_CHANNELS = 256


def make_criterion(options: MethodOptions, class_means: Tensor | None) -> nn.Module | None:
    """The criterion over proposals, without a cross entropy: that is the detector's own.

    None where nothing is learnt from a teacher.

    Args:
        options: ``method``, one that detection has, and its numbers.
        class_means: ``(C, D)``, the background's in row 0; None without the ND loss.
    """
    kind, given = options.kind, options.of_criterion()
    if not kind.in_detection:
        raise ValueError(f"--method {options.method} has no part in detection")
    if options.method == "ce" and not options.nd_weight:
        return None
    given |= {"ce_weight": 0.0, "ignore_index": IGNORED}
    if kind.compares_maps:
        given["mid_channels"] = options.mid_channels or MAP_CHANNELS
        channels = [MAP_CHANNELS] * LEVELS
        return kind.criterion(class_means, channels, channels, **given)
    return kind.criterion(class_means, **given)


class DetectorDistillation(nn.Module):
    """A student with all that is trained beside it, from images to the terms of the loss.

    The teacher sees the images as the student has resized and normalised them, and the proposals
    that the student has sampled: its own proposals have no part. Box features, class logits and
    maps of both go to the criterion, with the labels of the proposals as the target.

    Args:
        student: a detector with :class:`DistillingRoIHeads`.
        criterion: see :func:`make_criterion`.
        teacher: in evaluation mode, without gradients; no part of this module's state.
        method: as the configuration names it.
        hard_weight: of the detector's own losses.
        nd_ramp: let the ramp be that of the ND loss, too.

    Shape:
        images: a list of ``(3, H, W)`` in [0, 1]; targets: as torchvision's detectors take them;
        ramp: 0-dim. To the :data:`TERMS`, 0-dim each: ``loss = hard_weight * (ce + box +
        objectness + rpn_box) + kd_weight * ramp * kd + nd_weight * nd``, with ``nd_ramp`` the ramp
        before nd, too; kd is 0 where the method is "ce".
    """

    def __init__(
        self,
        student: FasterRCNN,
        criterion: nn.Module | None,
        teacher: FasterRCNN | None,
        method: str,
        hard_weight: float = 1.0,
        nd_ramp: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.method = method
        self.compares_maps = METHODS[method].compares_maps
        self.hard_weight = hard_weight
        self.nd_ramp = nd_ramp
        # In a tuple, so that neither state_dict nor train() nor DistributedDataParallel finds it.
        self._teacher = (teacher,)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], ramp: Tensor
    ) -> tuple[Tensor, ...]:
        """The terms of a batch."""
        (teacher,) = self._teacher
        if self.criterion is None or teacher is None:
            losses = self.student(images, targets)
            own = [losses[name] for name in LOSSES]
            none = torch.zeros_like(own[0]).detach()
            return self.hard_weight * sum(own), *own, none, none
        with watched(self.student) as seen:
            losses = self.student(images, targets)
        own = [losses[name] for name in LOSSES]
        needs_boxes = not self.compares_maps or self.criterion.nd_weight != 0
        with torch.no_grad():
            wanted = answers(
                teacher, seen.images, seen.proposals, seen.sizes, boxes=bool(needs_boxes)
            )
        if self.compares_maps:
            compared = (list(seen.maps.values()), list(wanted.maps.values()), seen.logits)
        else:
            compared = (seen.logits, wanted.logits)
        terms = self.criterion(
            *compared,
            seen.features,
            seen.labels,
            teacher_features=wanted.features if needs_boxes else None,
            kd_ramp=ramp,
            nd_ramp=ramp if self.nd_ramp else None,
        )
        # Without a distillation the criterion's own, to which the loss gives no weight, is no term.
        kd = torch.zeros_like(terms.kd) if self.method == "ce" else terms.kd
        return self.hard_weight * sum(own) + terms.loss, *own, kd, terms.nd
