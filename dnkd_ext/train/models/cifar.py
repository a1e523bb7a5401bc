"""The networks for 32 x 32 images by name, and in timm's registry."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from dnkd_ext.train.models import (
    cifar_mobilenet,
    cifar_resnet,
    cifar_shufflenet,
    cifar_vgg,
    cifar_wrn,
)
from dnkd_ext.train.models.base import CifarModel

__all__ = ["create_model", "model_names"]

FAMILIES = (cifar_resnet, cifar_wrn, cifar_mobilenet, cifar_shufflenet, cifar_vgg)
MODELS: dict[str, Callable[..., CifarModel]] = {
    f"cifar_{factory.__name__}": factory for family in FAMILIES for factory in family.MODELS
}


def model_names() -> list[str]:
    """The names that :func:`create_model` knows, all beginning with ``cifar_``."""
    return list(MODELS)


def create_model(name: str, num_classes: int = 100, in_chans: int = 3) -> CifarModel:
    """A network with fresh weights, by the name under which timm knows it, too.

    Args:
        name: one of :func:`model_names`, as ``cifar_resnet20``.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Raises:
        ValueError: a name that does not exist; the message lists those that do.
    """
    if name not in MODELS:
        bare = [known.removeprefix("cifar_") for known in MODELS]
        close = difflib.get_close_matches(name.removeprefix("cifar_"), bare, 1)
        hint = f"; did you mean 'cifar_{close[0]}'?" if close else "."
        raise ValueError(f"no model {name!r}{hint} There are: {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, in_chans=in_chans)


def _entry(name: str) -> Callable[..., CifarModel]:
    """The model as timm.create_model calls it."""

    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> CifarModel:
        if pretrained:
            raise ValueError(
                f"{name} has no weights to download, but pretrained=True was given; pass "
                "checkpoint_path= with a file"
            )
        return create_model(name, num_classes, in_chans)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = MODELS[name].__doc__
    return entry


def _register_with_timm() -> None:
    """Make ``timm.create_model("cifar_resnet20")`` work, where timm is installed."""
    try:
        from timm.models import register_model
    except ImportError:
        return
    for name in MODELS:
        # timm adds the name to __all__ and expects it here.
        globals()[name] = register_model(_entry(name))


_register_with_timm()
