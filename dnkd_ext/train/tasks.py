"""What depends on the task, classification or detection: data, teachers and class means."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from dnkd_ext.class_means import ClassMeans
from dnkd_ext.train import gather
from dnkd_ext.train import teacher as teachers
from dnkd_ext.train.class_names import CLASSES, class_notes, other_classes
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.networks import PRETRAINED, weights_file
from dnkd_ext.train.teacher import Teacher
from dnkd_ext.train.world import World

__all__ = [
    "detection",
    "gather_class_means",
    "is_detection",
    "kept_means",
    "load_teacher",
    "open_data",
    "origin_notes",
    "task_class",
    "weights_notes",
]


def is_detection(config: TrainConfig) -> bool:
    """Whether the task is that of the detectors."""
    return config.data.task == "detection"


def detection() -> Any:
    """The module of the detectors, which needs torchvision.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from dnkd_ext.train.detection import task
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--task detection needs torchvision ({error}); install it with pip install "
            "'dnkd_ext[detect]'"
        ) from error
    return task


def task_class(config: TrainConfig) -> Any:
    """Of the task: Classification, or DetectionTask."""
    return detection().DetectionTask if is_detection(config) else Classification


def open_data(config: TrainConfig, world: World) -> Any:
    """The data set: a Source, or a DetectionSource."""
    if is_detection(config):
        shown = config.run.progress and world.is_first
        return detection().DetectionSource.open(config, progress=shown)
    return open_source(config, world, progress=config.run.progress)


def load_teacher(
    name: str, weights: str, source: Any, config: TrainConfig, world: World
) -> Teacher:
    """A trained model of the task in evaluation mode, without gradients.

    A warning tells where timm's own weights want images normalised otherwise.

    Raises:
        FileNotFoundError, ValueError: see :func:`dnkd_ext.train.teacher.load_teacher`; or weights
            of a run of ours on images that were normalised otherwise.
    """
    if is_detection(config):
        return detection().load_teacher(name, weights, source, config, world)
    if weights != PRETRAINED:
        weights = str(weights_file(weights, world))
    teachers.check_normalisation(weights, config)
    teacher = teachers.load_teacher(
        name,
        weights,
        source,
        world.device,
        channels_last=config.run.channels_last,
        any_classes=config.data.any_classes,
    )
    told = teachers.normalised_otherwise(name, weights, teacher.model, config)
    if told is not None and world.is_first:
        warnings.warn(told, stacklevel=3)
    return teacher


def gather_class_means(
    model: torch.nn.Module,
    source: Any,
    config: TrainConfig,
    world: World,
    notes: dict[str, str],
    *,
    path: Path,
    resume: bool,
) -> ClassMeans:
    """Class means of a teacher over the training images."""
    own = detection() if is_detection(config) else gather
    means = own.gather_class_means(
        model, source, config, world, metadata=notes, path=path, resume=resume
    )
    # No part of the notes by which a file is known again: older ones lack it.
    means.metadata |= class_notes(source.classes)
    return means


def kept_means(
    path: Path, notes: dict[str, str], source: Any, *, any_classes: bool = False
) -> ClassMeans | None:
    """Class means that were gathered before, if these are the ones, of the data's classes."""
    means = gather.kept_means(path, notes)
    if means is None or any_classes:
        return means
    differs = other_classes(means.metadata.get(CLASSES), source.classes)
    return means if differs is None else None


def weights_notes(source: Any, config: TrainConfig) -> dict[str, str]:
    """What a run's files of weights say about it."""
    notes = {"model": config.model.student, "dataset": source.name, **class_notes(source.classes)}
    # Those of detectors lie beside the run's configuration, which they are compared with.
    return notes if is_detection(config) else notes | teachers.normalisation_notes(config)


def origin_notes(name: str, teacher: Teacher, source: Any, config: TrainConfig) -> dict[str, str]:
    """What a file of class means says about its origin."""
    notes = teachers.means_notes(name, teacher.digest, source)
    if is_detection(config):
        return notes | detection().gathering_notes(config)
    return notes | gather.gathering_notes(config)
