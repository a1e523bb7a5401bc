"""The task of the classifiers, as the engine trains them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnkd_ext._modes import evaluating
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.diagnostics import feature_diagnostics
from dnkd_ext.projector import FeatureProjector
from dnkd_ext.review import stage_channels
from dnkd_ext.train.class_names import class_notes
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import Source
from dnkd_ext.train.distillation import (
    STAGE_METHODS,
    TERMS,
    Distillation,
    RunningMeans,
    make_criterion,
)
from dnkd_ext.train.evaluation import Evaluated, evaluate
from dnkd_ext.train.files import CLASS_MEANS, FEATURES
from dnkd_ext.train.networks import build_student, feature_width, try_out
from dnkd_ext.train.plots import plot_features
from dnkd_ext.train.recompute import checkpoint_activations
from dnkd_ext.train.task import Task, autocast
from dnkd_ext.train.teacher import Teacher, cast_once, identity, means_notes
from dnkd_ext.train.world import World

__all__ = ["Classification"]


def _running_means(
    config: TrainConfig, source: Source, teacher: Teacher, world: World
) -> RunningMeans:
    width = feature_width(teacher.model)
    if width is None:
        raise ValueError(
            f"--class-means-momentum is for teachers that tell the width of their features, "
            f"{config.model.teacher} does not"
        )
    means = ClassMeans(
        len(source.classes),
        width,
        momentum=config.model.class_means_momentum,
        device=world.device,
    )
    assert config.model.teacher is not None
    means.metadata = means_notes(config.model.teacher, teacher.digest, source)
    means.metadata |= class_notes(source.classes)
    return RunningMeans(means, torch.distributed.group.WORLD if world.size > 1 else None)


def _check_stages(student: nn.Module, teacher: nn.Module, config: TrainConfig) -> None:
    """ValueError for models whose stages ReviewKD cannot compare."""
    pair = f"--student {config.model.student}", f"--teacher {config.model.teacher}"
    widths = []
    for model, option in zip((student, teacher), pair, strict=True):
        try:
            widths.append(stage_channels(model))
        except ValueError as error:
            raise ValueError(
                f"--method reviewkd compares the maps of stages, which {option} does not tell; "
                "another model is needed"
            ) from error
    if len(widths[0]) != len(widths[1]):
        raise ValueError(
            "--method reviewkd is not there for models of different numbers of stages: with the "
            f"embedding, {pair[0]} has maps of {widths[0]} channels and {pair[1]} of {widths[1]}"
        )


class Classification(Task):
    """A student, its data and its teacher, as the engine trains them."""

    terms = TERMS
    methods = STAGE_METHODS
    metric = "test_top1"

    def __init__(
        self, config: TrainConfig, source: Source, teacher: Teacher | None, world: World
    ) -> None:
        self.world = world
        self.source = source
        run, device = config.run, world.device
        torch.manual_seed(run.seed)  # the same weights for every method, on every process
        student = build_student(config, source)
        if run.activation_checkpointing:
            checkpoint_activations(student, config.model.student)
        criterion = projector = guide = running = None
        mixes = config.data.task == "imagenet" and config.reader.mixes
        # Where images are mixed their targets are smoothed, which all terms of the loss read.
        smoothing = 0.0 if mixes else config.method.label_smoothing
        if config.needs_teacher:
            assert teacher is not None
            means = None if teacher.class_means is None else teacher.class_means.compute()
            if config.model.class_means_momentum is not None:
                running = _running_means(config, source, teacher, world)
                means = running.means.compute()
            if config.method.nd_weight:
                assert means is not None
                width = getattr(student, "head_hidden_size", None) or student.num_features
                if width != means.shape[1]:
                    projector = FeatureProjector(width, means.shape[1], config.model.dropout)
            criterion = make_criterion(
                config.method, means, student, teacher.model, world, smoothing
            )
            guide = teacher.model
            if run.precision == "bfloat16" and not run.fsdp_teacher and teacher.outputs is None:
                guide = cast_once(guide)
        method = config.method
        self.step = Distillation(
            student,
            criterion,
            guide,
            projector,
            method.method,
            smoothing,
            method.nd_ramp,
            running,
            method.ce_weight,
            None if teacher is None else teacher.outputs,
        ).to(device)
        if run.channels_last:
            self.step.to(memory_format=torch.channels_last)
        self.model = student
        self._train = source.train(config, world)
        self._test = source.test(config, world)
        self.steps_per_epoch = len(self._train)
        self.batch_size = config.optim.batch_size
        self.identity = identity(config, source, teacher)
        self._autocast = autocast(run, world)
        self._teacher = teacher
        self._teacher_norms: Tensor | None = None
        # Of the test images, in percent; None until feature_figures has looked at it.
        self.teacher_top1: float | None = None
        self._skips = config.data.task == "imagenet" and config.reader.on_error == "skip"
        self._counted = source.test_images

    @staticmethod
    def check(config: TrainConfig, source: Source, teacher: Teacher | None) -> None:
        """What would fail once training begins, told before.

        Raises:
            ValueError: no such student, stages that do not fit the teacher's, too large a batch.
            ModuleNotFoundError: the student is timm's, and timm is not installed.
        """
        if config.optim.batch_size > source.train_images:
            raise ValueError(
                f"--batch-size must be at most the {source.train_images} training images, got "
                f"{config.optim.batch_size}"
            )
        student = build_student(config, source)
        if config.run.activation_checkpointing:
            checkpoint_activations(student, config.model.student)
        if config.method.kind.compares_maps:
            assert teacher is not None
            _check_stages(student, teacher.model, config)
        try_out(student, f"--student {config.model.student}", config, source)
        if teacher is not None:
            try_out(teacher.model, f"--teacher {config.model.teacher}", config, source)

    @property
    def class_means(self) -> Tensor | None:
        """Those of the criterion, (classes, features)."""
        return None if self.step.criterion is None else self.step.criterion.class_means

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Cut, mirrored and normalised images, their classes and what else the source gives."""
        before = self.unreadable if start else 0
        for batch in self._train.epoch(epoch, start):
            self.unreadable = before + self._train.unreadable
            yield batch

    def counts(self) -> dict[str, int]:
        """Where unreadable images are skipped, how many were in the epoch and in the evaluation."""
        if not self._skips:
            return {}
        count = torch.tensor(self.unreadable, device=self.world.device)
        return {
            "train_unreadable": int(self.world.sum(count)),
            "test_unreadable": self.source.test_images - self._counted,
        }

    @property
    def evaluated(self) -> tuple[nn.Module, ...]:
        """The student, and its projector."""
        return self.model, *filter(None, [self.step.projector])

    def evaluate(self, model: nn.Module, projector: nn.Module | None = None) -> dict[str, float]:
        """Accuracies, and where there are class means the features' norms and directions."""
        classes = len(self.source.classes)
        keeps = self.class_means is not None
        result = evaluate(model, self._test, classes, self._autocast, self.world, keep=keeps)
        self._counted = result.count
        figures = {"test_top1": result.top1, "test_top5": result.top5}
        if self.class_means is None:
            return figures
        assert self._teacher is not None
        if self._teacher_norms is None:
            of_teacher = evaluate(
                self._teacher.model, self._test, classes, self._autocast, self.world, keep=True
            )
            self._teacher_norms = of_teacher.features.norm(dim=1)
        return {**figures, **self._diagnostics(result, projector)}

    @staticmethod
    @torch.no_grad()
    def _projected(student: Tensor, projector: nn.Module | None) -> Tensor:
        """The student's features as the loss sees them."""
        if projector is None:
            return student
        with evaluating(projector):
            dtype = next(projector.parameters()).dtype  # the evaluation gives float32
            return projector(student.to(dtype)).float()

    @torch.no_grad()
    def _diagnostics(self, result: Evaluated, projector: nn.Module | None) -> dict[str, float]:
        assert self._teacher_norms is not None
        student, means = self._projected(result.features, projector), self.class_means
        if student.shape[1] != means.shape[1]:
            return {}  # the widths differ, and nothing projects one to the other
        own = feature_diagnostics(student, result.target, means, teacher_norms=self._teacher_norms)
        counted = result.target != -100
        # Means over this process's images become sums, those of all processes means again.
        count = counted.sum()
        norms = self._teacher_norms[counted].sum()
        sums = torch.stack(
            [own.norm_ratio * norms, norms, own.cosine * count, own.reached * count, count]
        ).double()
        if not count:
            sums = torch.zeros_like(sums)
        student_norm, teacher_norm, cosine, reached, total = self.world.sum(sums).tolist()
        return {
            "norm_ratio": student_norm / teacher_norm,
            "cosine": cosine / total,
            "reached": reached / total,
        }

    def feature_figures(
        self, model: nn.Module, projector: nn.Module | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Norms, and cosines to the class means, of the test images' features, by model.

        Of the teacher, and of the student or its average. Empty without class means. Of the images
        of all processes, the same on all of them; a collective call.
        """
        means = self.class_means
        if means is None:
            return {}, {}
        assert self._teacher is not None
        norms, cosines = {}, {}
        for name, network in (("teacher", self._teacher.model), ("student", model)):
            classes = len(self.source.classes)
            result = evaluate(network, self._test, classes, self._autocast, self.world, keep=True)
            own = result.features
            if name == "teacher":
                self.teacher_top1 = result.top1
            else:
                own = self._projected(own, projector)
            kept = result.target != -100
            norms[name] = self._of_all(own[kept].norm(dim=1))
            if own.shape[1] == means.shape[1]:
                cosine = F.cosine_similarity(own[kept], means[result.target[kept]], dim=1)
                cosines[name] = self._of_all(cosine)
        return norms, cosines

    def finish(self, out: Path, judged: tuple[nn.Module, ...], title: str) -> dict[str, Any]:
        """Draw the features of the test images, and write class means that were followed."""
        norms, cosines = self.feature_figures(*judged)
        with self.world.first_alone():
            if self.world.is_first and norms:
                title = f"{title}: features of the test images"
                plot_features(norms, cosines, title, out / FEATURES)
            if self.world.is_first and self.step.running is not None:
                try:
                    self.step.running.means.save(out / CLASS_MEANS)
                except ValueError as error:  # not finite: the training is done all the same
                    warnings.warn(f"{CLASS_MEANS} is not written: {error}", stacklevel=1)
        return {} if self.teacher_top1 is None else {"teacher_top1": self.teacher_top1}

    def _of_all(self, values: Tensor) -> Any:
        """One value per image, of the images of all processes; a collective call."""
        return np.concatenate(self.world.gather(values.cpu().numpy()))
