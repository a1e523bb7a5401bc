"""A step of a classifier, alone or learning from a teacher: from images to the loss's terms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnkd_ext.adapters import distilled_features, features
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.review import stage_maps
from dnkd_ext.train.config import METHODS, MethodOptions
from dnkd_ext.train.teacher_outputs import TeacherOutputs
from dnkd_ext.train.world import World

__all__ = ["STAGE_METHODS", "TERMS", "Distillation", "RunningMeans", "make_criterion"]

TERMS = ("loss", "ce", "kd", "nd", "top1")
# By which stage_maps runs a model, in place of its call.
STAGE_METHODS = ("forward_stages", "forward_intermediates")


class RunningMeans(nn.Module):
    """Class means that follow the teacher while it runs, as a part of a step.

    What they hold lies in buffers: checkpoints have it, and a step that is compiled or recorded
    changes it in place.

    Args:
        means: with a momentum, on the step's device.
        process_group: processes whose batches count as one.
    """

    def __init__(self, means: ClassMeans, process_group: Any = None) -> None:
        super().__init__()
        self.means = means
        self.process_group = process_group
        averages, counts = means.tensors()
        self.register_buffer("averages", averages)
        self.register_buffer("counts", counts)

    def forward(self, features: Tensor, target: Tensor, table: Tensor) -> None:
        """Move the means by a batch, and write them to ``table``.

        A mixed image counts for the class with the larger share.
        """
        if target.dim() == 2:
            target = target.argmax(1)
        self.means.update(features.detach(), target, process_group=self.process_group)
        table.copy_(self.means.compute())


class Distillation(nn.Module):
    """A student with all that is trained beside it, from images to the terms of the loss.

    Args:
        student: the classifier to train.
        criterion: one of dnkd_ext's, or None for cross entropy alone.
        teacher: in evaluation mode, without gradients; no part of this module's state.
        projector: of the student's features, where the class means are of another width.
        method: as the configuration names it.
        label_smoothing: of the cross entropy alone; a criterion has its own.
        nd_ramp: let the ramp be that of the ND loss, too.
        running: class means that are the criterion's in every step, with the step's images in them.
        ce_weight: of the cross entropy alone; a criterion has its own.
        outputs: the teacher's, which are looked up; it is not run then.

    Shape:
        images (N, channels, H, W), target (N,) int64 or (N, classes), with ``outputs`` the rows
        (N,) int64 of the images in them, and ramp, 0-dim, to (loss, ce, kd, nd, top1): 0-dim, top1
        in percent; kd is 0 where the method is "ce".
    """

    def __init__(
        self,
        student: nn.Module,
        criterion: nn.Module | None,
        teacher: nn.Module | None,
        projector: nn.Module | None,
        method: str,
        label_smoothing: float = 0.0,
        nd_ramp: bool = False,
        running: RunningMeans | None = None,
        ce_weight: float = 1.0,
        outputs: TeacherOutputs | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.ce_weight = ce_weight
        self.criterion = criterion
        self.projector = projector
        self.method = method
        self.compares_maps = METHODS[method].compares_maps
        self.label_smoothing = label_smoothing
        self.nd_ramp = nd_ramp
        self.running = running
        # In a tuple, so that neither state_dict nor train() nor DistributedDataParallel finds it.
        self._teacher = (teacher,)
        self._outputs = outputs

    def forward(self, images: Tensor, target: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """The terms of a batch."""
        rows, ramp = more if self._outputs is not None else (None, *more)
        (teacher,) = self._teacher
        if self.criterion is None or teacher is None:
            logits = self.student(images)
            ce = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
            loss = ce if self.ce_weight == 1 else self.ce_weight * ce
            none = torch.zeros_like(ce)
            return loss, ce.detach(), none, none, _top1(logits, target)
        given: dict[str, Any] = {"nd_ramp": ramp} if self.nd_ramp else {}
        teacher_features = None
        if self.compares_maps:
            with torch.no_grad():
                # timm's models give their maps after the activation only.
                wanted, teacher_features, _ = stage_maps(
                    teacher, images, pre_activation=hasattr(teacher, "forward_stages")
                )
            maps, student_features, logits = stage_maps(self.student, images)
            compared = (maps, wanted, logits)
        else:
            if self._outputs is not None:
                teacher_logits, given["teacher_norms"] = self._outputs.look_up(rows)
            else:
                with torch.no_grad():
                    teacher_features, teacher_logits = features(teacher, images)
            if self.method == "hard_kd":
                student_features, logits, distilled = distilled_features(self.student, images)
                given["distillation_logits"] = distilled
            else:
                student_features, logits = features(self.student, images)
            compared = (logits, teacher_logits)
        if self.running is not None:
            self.running(teacher_features, target, self.criterion.class_means)
        if self.projector is not None:
            student_features = self.projector(student_features)
        terms = self.criterion(
            *compared,
            student_features,
            target,
            teacher_features=teacher_features,
            kd_ramp=ramp,
            **given,
        )
        if self.method == "ce":
            # The criterion's own, to which the loss gives no weight, is no term of the method.
            terms = terms._replace(kd=torch.zeros_like(terms.kd))
        return *terms, _top1(logits, target)


def _top1(logits: Tensor, target: Tensor) -> Tensor:
    if target.dim() == 2:
        target = target.argmax(1)  # of mixed images the class with the larger share
    return 100 * (logits.argmax(1) == target).float().mean()


def make_criterion(
    options: MethodOptions,
    class_means: Tensor | None,
    student: nn.Module,
    teacher: nn.Module,
    world: World,
    label_smoothing: float,
) -> nn.Module:
    """The loss of a method, with the class means as its buffer."""
    kind, given = options.kind, options.of_criterion()
    given["label_smoothing"] = label_smoothing
    if options.method == "dist":
        given["tau"] = given.pop("temperature")
        given["process_group"] = torch.distributed.group.WORLD if world.size > 1 else None
    if kind.compares_maps:
        return kind.criterion.from_models(student, teacher, class_means, **given)
    return kind.criterion(class_means, **given)
