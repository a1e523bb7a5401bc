"""Classifiers, ours and timm's: built, given weights, tried on the images they are for."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnkd_ext._modes import evaluating
from dnkd_ext.adapters import features
from dnkd_ext.review import stage_maps
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import Source
from dnkd_ext.train.files import BEST, CONFIG, RESULT
from dnkd_ext.train.models import create_model, load_weights, model_names
from dnkd_ext.train.models.weights import read_weights
from dnkd_ext.train.world import World

__all__ = [
    "PRETRAINED",
    "build_model",
    "build_student",
    "feature_width",
    "find_weights",
    "fit_image_size",
    "load_weights_for",
    "try_out",
    "weights_digest",
    "weights_file",
]

# What stands for timm's or torchvision's own weights in the place of a file.
PRETRAINED = "pretrained"


def build_model(
    name: str,
    num_classes: int,
    channels: int,
    *,
    pretrained: bool = False,
    drop_path: float = 0.0,
    zero_init_last: bool = True,
) -> nn.Module:
    """A model with fresh weights: one of ours by its name ``cifar_*``, or one of timm's.

    ``zero_init_last``: False for residual blocks that do not begin as identities.

    Raises:
        ValueError: no such model or tag, no published weights of it, or no stochastic depth in it.
        ModuleNotFoundError: the name is timm's, and timm is not installed.
    """
    if name in model_names() or name.startswith("cifar_"):
        if pretrained:
            raise ValueError(f"{name} has no weights to download; name a file of its weights")
        if drop_path:
            raise ValueError(f"--drop-path is for models that have it, {name} has not")
        return create_model(name, num_classes, channels)
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name!r} is none of {', '.join(model_names())}; for timm's models install timm"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"no model {name!r}, neither timm's nor one of {', '.join(model_names())}")
    plain, _, tag = name.partition(".")
    if tag and not timm.list_models(name, include_tags=True):
        known = [one.partition(".")[2] for one in timm.list_models(f"{plain}.*", include_tags=True)]
        raise ValueError(
            f"no weights {tag!r} of {plain}, as {name} asks for; timm has "
            f"{', '.join(known) or 'none'}"
        )
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if not pretrained:
        if not zero_init_last:
            try:
                return timm.create_model(name, zero_init_last=False, **options)
            except TypeError as error:
                if "zero_init_last" not in str(error) and "drop_path_rate" not in str(error):
                    raise
                # It has no such blocks, or no stochastic depth, which is told below.
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                raise
            raise ValueError(f"--drop-path is for models that have it, {name} has not") from error
    try:
        model = timm.create_model(name, pretrained=True)
        own = getattr(model, "num_classes", None)
        if own != num_classes:
            raise ValueError(f"the pretrained {name} has {own} classes, the data {num_classes}")
        return model
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the pretrained weights of {name} cannot be had ({str(error).splitlines()[0]}); "
            "without a network, name a file of them"
        ) from error


def build_student(config: TrainConfig, source: Source) -> nn.Module:
    """The model to train, with fresh weights.

    Raises:
        ValueError: no such model, or one that does not fit the images or options.
        ModuleNotFoundError: the name is timm's, and timm is not installed.
    """
    options = config.model
    student = build_model(
        options.student,
        len(source.classes),
        source.channels,
        drop_path=options.drop_path,
        zero_init_last=options.zero_init_last,
    )
    fit_image_size(student, source.image_size)
    return student


def weights_file(path: str, world: World) -> Path:
    """The file itself, or the best weights of a run's folder.

    The first process warns where the run has not ended.

    Raises:
        FileNotFoundError: neither is there.
    """
    found, folder = find_weights(path), Path(path)
    if world.is_first and (folder / CONFIG).is_file() and not (folder / RESULT).is_file():
        warnings.warn(
            f"the run in {path} has not ended: its best weights so far are taken", stacklevel=2
        )
    return found


def find_weights(path: str) -> Path:
    """:func:`weights_file` without the warning.

    Raises:
        FileNotFoundError: neither is there.
    """
    place = Path(path)
    if place.is_dir():
        place = place / BEST
        if not place.is_file():
            raise FileNotFoundError(f"{path} is a folder without {BEST}")
    if not place.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    return place


def weights_digest(path: Path) -> str:
    """By which weights are known again: of their names and values, in whatever file they are."""
    digest = hashlib.sha256()
    for name, value in sorted(read_weights(path).items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fit_image_size(model: nn.Module, size: int) -> None:
    """Prepare a transformer of timm's, made for images of one size, for those of another."""
    config = getattr(model, "pretrained_cfg", None) or {}
    own = config.get("input_size", (0, size, size))[1:]
    if config.get("fixed_input_size") and tuple(own) != (size, size):
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"{type(model).__name__} is for images of {own[0]} x {own[1]} pixels, got {size}"
            )
        model.set_input_size(img_size=(size, size))


def load_weights_for(model: nn.Module, path: Path, size: int) -> None:
    """Weights of the model as it is published, or as it was trained on images of this size.

    Raises:
        FileNotFoundError, ValueError: as of load_weights.
    """
    try:
        load_weights(model, path)
    except ValueError:
        before = {name: value.shape for name, value in model.state_dict().items()}
        fit_image_size(model, size)
        if {name: value.shape for name, value in model.state_dict().items()} == before:
            raise
        load_weights(model, path)
    else:
        fit_image_size(model, size)


def feature_width(model: nn.Module) -> int | None:
    """Of the features of timm's models and ours; None for those that do not tell."""
    return getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)


@torch.no_grad()
def try_out(model: nn.Module, option: str, config: TrainConfig, source: Source) -> None:
    """Run a model as training will, on two images of noise, in evaluation mode.

    Raises:
        ValueError: it cannot take images of this size, or gives no features or maps.
    """
    size = source.image_size
    # Of its own generator: what is drawn later does not depend on this.
    noise = torch.randn(2, source.channels, size, size, generator=torch.Generator().manual_seed(0))
    run = stage_maps if config.method.kind.compares_maps else features
    try:
        with evaluating(model):
            run(model, noise.to(next(model.parameters()).device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        known = " (--image-size)" if config.data.task == "imagenet" else ""
        raise ValueError(
            f"{option} cannot be run on images of {size} x {size} pixels{known}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
