"""A teacher and its class means: read, and checked to be of each other and of the data."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dnkd_ext.class_means import ClassMeans
from dnkd_ext.train.class_names import check_classes, classes_of_weights
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import Source
from dnkd_ext.train.models.weights import read_notes
from dnkd_ext.train.networks import (
    PRETRAINED,
    build_model,
    feature_width,
    find_weights,
    fit_image_size,
    load_weights_for,
    weights_digest,
)
from dnkd_ext.train.options import flag
from dnkd_ext.train.presets import load_preset
from dnkd_ext.train.teacher_outputs import TeacherOutputs

__all__ = [
    "Teacher",
    "cast_once",
    "check_normalisation",
    "identity",
    "load_teacher",
    "means_digest",
    "means_notes",
    "normalisation_notes",
    "normalised_otherwise",
    "read_class_means",
    "seen_otherwise",
    "without_means",
]


class Teacher(NamedTuple):
    """A trained model, the digest of its weights, and the mean of its features per class.

    ``means_origin`` tells where the means come from: the digest of a file, or gathered here.
    ``outputs`` are what steps look up in place of running the model.
    """

    model: nn.Module
    digest: str
    class_means: ClassMeans | None
    means_origin: str = "gathered"
    outputs: TeacherOutputs | None = None


def load_teacher(
    name: str,
    weights: str,
    source: Source,
    device: torch.device,
    *,
    channels_last: bool = False,
    any_classes: bool = False,
) -> Teacher:
    """A trained model in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: no weights.
        ValueError: no such model, weights of another one, or unless ``any_classes`` of other
            classes, where the file tells.
    """
    if weights == PRETRAINED:
        model = build_model(name, len(source.classes), source.channels, pretrained=True)
        fit_image_size(model, source.image_size)
        digest = PRETRAINED
    else:
        path = find_weights(weights)
        if not any_classes:
            check_classes(str(path), classes_of_weights(path), source.classes)
        model = build_model(name, len(source.classes), source.channels)
        load_weights_for(model, path, source.image_size)
        digest = weights_digest(path)
    model = model.eval().requires_grad_(False).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Teacher(model, digest, None)


def normalisation_notes(config: TrainConfig) -> dict[str, str]:
    """What a file of weights says of how the images were normalised that it was trained on."""
    return {key: json.dumps(list(value)) for key, value in config.data.normalisation.items()}


def check_normalisation(weights: str, config: TrainConfig) -> None:
    """Weights of a run of ours must be for images that are normalised as the configuration says.

    Raises:
        ValueError: they are for others.
    """
    if weights == PRETRAINED:
        return
    notes, given = read_notes(find_weights(weights)), normalisation_notes(config)
    differing = [key for key in given if notes.get(key, given[key]) != given[key]]
    if differing and "model" in notes:
        there, here = (
            " ".join(f"--{key} {_words(values[key])}" for key in differing)
            for values in (notes, given)
        )
        raise ValueError(
            f"{weights} was trained on images normalised by {there}, and this is with {here}"
        )


def normalised_otherwise(
    name: str, weights: str, model: nn.Module, config: TrainConfig
) -> str | None:
    """How images were normalised for timm's own weights, where that is not the configuration's.

    Weights are timm's own as ``pretrained``, or in a file, not of a run of ours, for a name with a
    tag. None, too, where a preset gives this teacher images normalised so: it means to.
    """
    own = getattr(model, "pretrained_cfg", None) or {}
    if weights != PRETRAINED and ("." not in name or "model" in read_notes(find_weights(weights))):
        return None
    given = config.data.normalisation
    before = {key: tuple(own.get(key) or given[key]) for key in given}
    if before == given:
        return None
    if config.preset:
        preset = load_preset(config.preset).settings
        if name.partition(".")[0] == preset.get("teacher") and all(
            tuple(preset.get(key) or ()) == given[key] for key in given
        ):
            return None
    there, here = (
        " ".join(f"--{key} {' '.join(map(str, values[key]))}" for key in given)
        for values in (before, given)
    )
    return f"the weights of {name} are for images normalised by {there}, and this is with {here}"


def cast_once(teacher: nn.Module) -> nn.Module:
    """A copy whose weights are what autocast would make of them in every step again.

    Normalisations keep theirs in float32, in which autocast uses them.
    """
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.to(torch.bfloat16)
    return teacher


def means_notes(name: str, digest: str, source: Source) -> dict[str, str]:
    """What a file of class means says about its origin, beside the classes."""
    return {
        "teacher": f"{name} {digest}",
        "dataset": f"{source.name}, {source.train_images} images",
    }


def read_class_means(path: str, name: str, teacher: Teacher, source: Source) -> ClassMeans:
    """Class means from a file, of as many classes as the data have and of the teacher.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of other classes or another teacher.
    """
    model = teacher.model
    means = (ClassMeans.from_json if path.endswith(".json") else ClassMeans.load)(path)
    if means.num_classes != len(source.classes):
        raise ValueError(
            f"--class-means {path} has {means.num_classes} classes, but the data have "
            f"{len(source.classes)}"
        )
    width = feature_width(model)
    if width is not None and means.num_features != width:
        raise ValueError(
            f"--class-means {path} is {means.num_features} wide, but the teacher's features are "
            f"{width}: it is of another teacher"
        )
    for key, wanted in means_notes(name, teacher.digest, source).items():
        found = means.metadata.get(key)
        # Files that were not written by dnkd class-means say something else, or nothing.
        is_own = found is not None and (" images" in found or len(found.split()) == 2)
        if is_own and found != wanted and key == "teacher":
            raise ValueError(f"--class-means {path} is of {found}, but the teacher is {wanted}")
        if is_own and found != wanted:
            warnings.warn(f"--class-means {path} is of {found}, not {wanted}", stacklevel=2)
    return means


def seen_otherwise(path: str, means: ClassMeans, notes: dict[str, str]) -> str | None:
    """What the file of class means says about how images were seen that is not as in the notes.

    Options are named; None where none differs. Precision is a matter of rounding, and who the
    teacher is and on what data was looked at before.
    """
    before = [
        (flag(key), _words(means.metadata[key]), _words(wanted))
        for key, wanted in notes.items()
        if key not in ("teacher", "dataset", "precision")
        and means.metadata.get(key, wanted) != wanted
    ]
    if not before:
        return None
    there = " ".join(f"{option} {found}" for option, found, _ in before)
    here = " ".join(f"{option} {wanted}" for option, _, wanted in before)
    return f"--class-means {path} were gathered with {there}, and this is with {here}"


def without_means(means: ClassMeans, classes: Sequence[str]) -> str | None:
    """Which classes have no mean, and what becomes of them; None where all have one."""
    missing = means.missing
    if not missing:
        return None
    names = ", ".join(repr(classes[label]) for label in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"{len(missing)} of {len(classes)} classes have no class mean ({names}{more}): the ND loss "
        "of their images is always 1, and has no gradient"
    )


def _words(noted: str) -> str:
    """A value as the command line has it, from its JSON."""
    try:
        value = json.loads(noted)
    except ValueError:
        return noted
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def means_digest(means: ClassMeans) -> str:
    """Of the table's values."""
    return hashlib.sha256(means.compute().numpy().tobytes()).hexdigest()[:16]


def identity(config: TrainConfig, source: Source, teacher: Teacher | None) -> dict[str, str]:
    """What a checkpoint must have been made with to be gone on from."""
    result = {"student": config.model.student, "data": source.fingerprint()}
    backbone = config.detection.backbone_weights
    if backbone is not None:
        result["backbone"] = backbone if backbone == PRETRAINED else weights_digest(Path(backbone))
    if teacher:
        result["teacher"] = f"{config.model.teacher} {teacher.digest}"
        if config.method.nd_weight:
            momentum = config.model.class_means_momentum
            origin = teacher.means_origin if momentum is None else f"running, momentum {momentum}"
            result["class_means"] = origin
    return result
