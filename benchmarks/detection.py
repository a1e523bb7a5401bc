"""A detector's training step: Faster R-CNN learning from another one's view of its proposals.

The student's own losses, and beside them nothing ("plain", which has no teacher), KD, or KD++ in
three forms, over the proposals that the student has sampled.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks import e2e, peers
from benchmarks.steps import image_width
from dnkd_ext import reference
from dnkd_ext.train.config import MethodOptions, TrainConfig, replace
from dnkd_ext.train.detection.distillation import LOSSES, make_criterion
from dnkd_ext.train.detection.heads import answers, watched
from dnkd_ext.train.detection.models import FEATURES, create_detector
from dnkd_ext.train.presets import load_preset

PRESET = "coco/r101-r18/kd++"
BOXES = 7  # of an image, as COCO has on average


def _config(shape: e2e.Shape) -> TrainConfig:
    """The preset's, for images that are neither enlarged nor made smaller."""
    height = shape.image
    return replace(
        TrainConfig(),
        load_preset(PRESET).settings
        | {
            "data": "synthetic",
            "min_size": [height],
            "max_size": image_width(shape.name, height),
        },
    )


def _models(config: TrainConfig, classes: int) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with random weights; the student's backbone frozen as the preset's."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "resnet18.pth"
        torch.save(torchvision.models.resnet18().state_dict(), weights)
        student = create_detector(
            config.model.student, classes, config, backbone_weights=str(weights)
        )
    assert config.model.teacher is not None
    return create_detector(config.model.teacher, classes, config), student


@torch.no_grad()
def _calibrate(model: nn.Module, images: list[Tensor]) -> None:
    """Give normalisations the statistics of the images, so that random weights stay finite."""
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum, norm.training = None, True
        norm.reset_running_stats()
    model.backbone(model.transform(images)[0].tensors)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False


def methods(means: Tensor, method: MethodOptions) -> dict[str, e2e.Criterion | None]:
    """What is added to the student's own losses, by name."""
    ours, weight = make_criterion(method, means).to(means.device), method.nd_weight

    def kd(logits, teacher_logits, features, teacher_features, means, target):
        soft = F.softmax(teacher_logits.float(), 1)
        return F.kl_div(F.log_softmax(logits.float(), 1), soft, reduction="batchmean")

    # In float32 with autocast, too: as ours and as published.
    def loop(logits, teacher_logits, features, teacher_features, means, target):
        return kd(logits, teacher_logits, features, teacher_features, means, target) + (
            weight * peers.nd_loop(features.float(), means, teacher_features.float(), target)
        )

    def eager(logits, teacher_logits, features, teacher_features, means, target):
        return kd(logits, teacher_logits, features, teacher_features, means, target) + (
            weight * peers.nd(features.float(), means, teacher_features.float(), target)
        )

    def fused(logits, teacher_logits, features, teacher_features, means, target):
        return ours(
            logits, teacher_logits, features, target, teacher_features=teacher_features
        ).loss

    return {"plain": None, "KD": kd, "KD++ loop": loop, "KD++ eager": eager, "KD++ ours": fused}


def references(method: MethodOptions) -> dict[str, e2e.Criterion]:
    """What the methods compute, in other code than theirs: by their name's first word."""

    def kd(logits, teacher_logits, features, teacher_features, means, target):
        return reference.kd_loss(logits, teacher_logits, temperature=1.0)

    def kd_with_nd(logits, teacher_logits, features, teacher_features, means, target):
        nd = reference.nd_loss(features, target, means, teacher_features=teacher_features)
        return reference.kd_loss(logits, teacher_logits, temperature=1.0) + method.nd_weight * nd

    return {"KD": kd, "KD++": kd_with_nd}


class DetectorTrainer(e2e.Trainer):
    """A teacher on a device, and one student with its optimiser per method."""

    def __init__(self, shape: e2e.Shape, device: str, names: Sequence[str] | None = None) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        height, width = shape.image, image_width(shape.name, shape.image)
        config = _config(shape)
        self.images = [torch.rand(3, height, width, device=device) for _ in range(shape.batch)]
        self.targets = []
        for _ in range(shape.batch):
            corner = torch.rand(BOXES, 2) * torch.tensor([width, height]) * 0.6
            extent = 8 + torch.rand(BOXES, 2) * height * 0.3
            labels = torch.randint(1, shape.classes, (BOXES,))
            boxes = torch.cat([corner, corner + extent], 1)
            self.targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
        layout = torch.channels_last if shape.channels_last else torch.contiguous_format
        teacher, student = _models(config, shape.classes)
        for model in (teacher, student):
            model.to(device, memory_format=layout)
            _calibrate(model, self.images[:2])
        self.teacher = teacher.eval().requires_grad_(False)
        # On the scale of features after a ReLU.
        self.means = torch.rand(shape.classes, FEATURES, device=device)
        self.criteria = methods(self.means, config.method)
        self.references = references(config.method)
        if names is not None:
            self.criteria = {name: self.criteria[name] for name in names}
        self.students, self.optimizers = {}, {}
        for name in self.criteria:
            own = copy.deepcopy(student).train()
            self.students[name] = own
            self.optimizers[name] = torch.optim.SGD(
                [p for p in own.parameters() if p.requires_grad],
                lr=1e-4, momentum=0.9, weight_decay=1e-4,
            )  # fmt: skip

    def forward(self, name: str) -> tuple[Tensor, ...]:
        """What a method's criterion gets in a step."""
        return self._forward(name)[1]

    def _forward(self, name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The student's own losses together, and what the criterion gets."""
        student = self.students[name]
        with self._autocast():
            if self.criteria[name] is None:
                losses = student(self.images, self.targets)
                return sum(losses[one] for one in LOSSES), ()
            with watched(student) as seen:
                losses = student(self.images, self.targets)
            with torch.no_grad():
                wanted = answers(self.teacher, seen.images, seen.proposals, seen.sizes)
        logits, features = (seen.logits, wanted.logits), (seen.features, wanted.features)
        return sum(losses[one] for one in LOSSES), (*logits, *features, self.means, seen.labels)

    def step(self, name: str) -> Tensor:
        """One training step; the loss."""
        loss, inputs = self._forward(name)
        criterion = self.criteria[name]
        if criterion is not None:
            loss = loss + criterion(*inputs)
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()
        return loss.detach()
