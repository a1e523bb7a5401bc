"""Penultimate features of any classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["extract_features", "features", "find_classifier"]


def find_classifier(model: nn.Module) -> nn.Module:
    """The last linear layer of a classifier, whose input are the model's features.

    timm's ``get_classifier()`` decides where there is one; otherwise the model's last
    ``nn.Linear``.

    Raises:
        ValueError: there is none; pass the layer by hand.
    """
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()
        if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.Identity):
            return classifier
        raise ValueError(
            f"{type(model).__name__}.get_classifier() gives {type(classifier).__name__}, which is "
            "no layer to take the features before; pass classifier="
        )
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to take the features before; pass classifier="
        )
    return linear[-1]


def features(
    model: nn.Module, images: Tensor, *, classifier: str | nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Run a classifier once and return what its last linear layer read, and the logits.

    Works for every model whose forward pass ends in that layer: timm's, torchvision's, one's own,
    in DistributedDataParallel or not. A bare model with timm's interface is run by its
    ``forward_features`` and ``forward_head(pre_logits=True)``, which ``torch.compile`` traces
    without a break. Any other is called as ``model(images)`` with a hook on the layer, so that
    wrappers and others' hooks keep working; a model that ``torch.compile`` has already compiled
    does not call it: compile the function around this one, or a model of the first kind.

    Args:
        model: the classifier.
        images: its input.
        classifier: the last linear layer or its dotted name; found by :func:`find_classifier`
            where not given.

    Returns:
        ``(features, logits)``: ``(N, D)`` and ``(N, C)``, both part of the autograd graph.

    Raises:
        TypeError: ``classifier`` is neither a name nor a module.
        ValueError: the layer cannot be found, or did not produce the model's output.
    """
    if classifier is None and _is_split(model):
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        return pooled, model.get_classifier()(pooled)
    return _listen(model, images, classifier)


# The name it had first.
extract_features = features


SPLIT = ("forward_features", "forward_head")


def _is_split(model: nn.Module) -> bool:
    """Whether calling the model is no more than timm's three parts one after another.

    Not where something surrounds the call: hooks (FSDP's among them), a compiled or replaced
    forward, or one that does more. And not for classifiers that are no linear layer, which may
    want another shape than the pooled features.
    """
    kind = type(model)
    if not all(callable(getattr(kind, name, None)) for name in (*SPLIT, "get_classifier")):
        return False
    if model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model):
        return False
    if model._compiled_call_impl is not None or not isinstance(model.get_classifier(), nn.Linear):
        return False
    if getattr(model, "aux_head", None) is not None:  # VOLO adds its output to the classifier's
        return False
    code = getattr(kind.forward, "__code__", None), getattr(kind.forward_head, "__code__", None)
    if None in code or "pre_logits" not in code[1].co_varnames:
        return False
    if not set(code[0].co_names) <= set(SPLIT):
        return False
    # A forward pass that a subclass wrote over inherited parts may scale the images or the like.
    for base in kind.__mro__:
        if any(name in vars(base) for name in SPLIT):
            return True
        if "forward" in vars(base):
            return False
    return False


def _listen(
    model: nn.Module, images: Tensor, classifier: str | nn.Module | None
) -> tuple[Tensor, Tensor]:
    """The general way: a hook on the classifier, which must give the model's output."""
    if classifier is None:
        classifier = find_classifier(model)
    elif isinstance(classifier, str):
        try:
            if not classifier:
                raise AttributeError("the name is empty")
            classifier = model.get_submodule(classifier)
        except AttributeError as error:
            raise ValueError(f"classifier {classifier!r} is not in the model: {error}") from error
    elif not isinstance(classifier, nn.Module):
        raise TypeError(
            f"classifier must be a name or an nn.Module, got {type(classifier).__name__}"
        )
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values())), output))

    handle = classifier.register_forward_hook(remember, with_kwargs=True)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"the model returned {type(logits).__name__}, expected a tensor of logits")
    if len(seen) != 1 or not _is_same(seen[0][1], logits):
        raise ValueError(
            f"{type(classifier).__name__} ran {len(seen)} times and did not produce the model's "
            "output; pass the last linear layer as classifier= (a compiled model does not call "
            "hooks: compile the function around features() instead)"
        )
    return seen[0][0], logits


def _is_same(output: Tensor, logits: Tensor) -> bool:
    """Whether the model returned this output; wrappers may hand on a view of it."""
    return output is logits or (
        output.shape == logits.shape
        and output.dtype == logits.dtype
        and output.device == logits.device
        and output.data_ptr() == logits.data_ptr()
    )
