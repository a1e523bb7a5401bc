"""Penultimate features of any classifier.

Source of the distillation token: "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877).
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dnkd_ext._export import constant_result, exportable

__all__ = [
    "DistilledFeatures",
    "distilled_features",
    "extract_features",
    "features",
    "find_classifier",
]


@exportable
class DistilledFeatures(NamedTuple):
    """What :func:`distilled_features` returns.

    Attributes:
        features: ``(N, D)``, the mean of what the two heads read.
        logits: ``(N, C)``, of the class token's head.
        distillation_logits: ``(N, C)``, of the distillation token's head; the same tensor as
            ``logits`` where the model has none.
    """

    features: Tensor
    logits: Tensor
    distillation_logits: Tensor


def find_classifier(model: nn.Module) -> nn.Module:
    """The last linear layer of a classifier, whose input are the model's features.

    timm's ``get_classifier()`` decides where there is one; otherwise the model's last
    ``nn.Linear``, of transformers' models the last outside of their body.

    Raises:
        ValueError: there is none; pass the layer by hand. Or there are two, of a class and a
            distillation token, which :func:`features` and :func:`distilled_features` both run.
    """
    return _candidates(model)[0]


def _candidates(model: nn.Module) -> list[nn.Module]:
    """The layer that is likely the last of a classifier, and the one that else may be."""
    if callable(getattr(model, "get_classifier", None)):
        return [_own_classifier(model)]
    modules = list(model.modules())
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    # A wrapper's is that of the model inside, unless a linear layer follows that model.
    for inner in modules[1:]:
        # Of the class, because a module looks for what it lacks for long.
        if callable(getattr(type(inner), "get_classifier", None)) and (
            not linear or any(part is linear[-1] for part in inner.modules())
        ):
            try:
                own = _own_classifier(inner)
            except ValueError:
                continue
            return [own, *(one for one in linear[-1:] if one is not own)]
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to take the features before; pass classifier="
        )
    # Some of transformers' models register their head before their body.
    inner = _unwrapped(model)
    prefix = getattr(inner, "base_model_prefix", None)
    body = getattr(inner, prefix, None) if isinstance(prefix, str) and prefix else None
    inside = {*body.modules()} if isinstance(body, nn.Module) else set()
    if linear[-1] in inside:
        outside = [module for module in linear if module not in inside]
        return [*outside[-1:], linear[-1]]
    return linear[-1:]


def _own_classifier(model: Any) -> nn.Module:
    """The layer, or the head of several, that timm's ``get_classifier()`` names."""
    classifier = model.get_classifier()
    if is_pair(classifier):
        raise ValueError(
            f"{type(model).__name__}.get_classifier() gives two heads, of the class and the "
            "distillation token; call dnkd_ext.features(model, images) for the mean of both, "
            "dnkd_ext.distilled_features(model, images) for each, or pass classifier="
        )
    if isinstance(classifier, tuple) and len(classifier) == 2 and classifier[1] is None:
        classifier = classifier[0]  # a model that could have had a distillation head
    # A whole head of timm's (Sequencer2D, SAM's), which pools before its layer.
    layer = getattr(classifier, "fc", None)
    if hasattr(classifier, "global_pool") and isinstance(layer, nn.Module):
        classifier = layer
    if isinstance(classifier, nn.Module) and not isinstance(classifier, nn.Identity):
        return classifier
    raise ValueError(
        f"{type(model).__name__}.get_classifier() gives {type(classifier).__name__}, which is "
        "no layer to take the features before; pass classifier="
    )


def features(
    model: nn.Module,
    images: Tensor | Mapping[str, Tensor],
    *,
    classifier: str | nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a classifier once and return what its last layer read, and the logits.

    The last layer is the linear one, or what timm's ``get_classifier()`` names: of some models
    (CAFormer's) a head of several layers, which reads what ``pre_logits`` would give.

    Works for every model whose forward pass ends in that layer: timm's, torchvision's, one's own,
    those of transformers that return an object with ``logits``, in DistributedDataParallel or not.
    It is called as ``model(images)`` with a hook on the layer, so that wrappers and others' hooks
    keep working; a model that ``torch.compile`` has already compiled does not call it: compile the
    function around this one. There a bare model with timm's interface, whose
    ``forward_head`` has no more than the layer behind ``pre_logits``, is run by
    ``forward_features`` and ``forward_head(pre_logits=True)``, which traces without a break. With
    all others the hook breaks the graph (``fullgraph=True`` is refused), and what runs inside of
    ``forward`` is compiled by itself; of a bare ``nn.Sequential`` that is nothing.

    Of a model with a head for a class token and one for a distillation token (timm's
    ``deit_*_distilled_*``, ``levit_*``, ``efficientformer_*`` and others) it gives the mean of what
    the heads read and the mean of their logits, as the model itself does in evaluation;
    :func:`distilled_features` keeps the logits apart.

    Args:
        model: the classifier.
        images: its input; a mapping whose names are arguments of the model, such as a tokenizer's,
            is given as these.
        classifier: the last linear layer or its dotted name; where not given, the layer that
            timm's ``get_classifier()`` names, else the last linear one.

    Returns:
        ``(features, logits)``: ``(N, D)`` and ``(N, C)``, both part of the autograd graph.

    Raises:
        TypeError: ``model`` is no module, or ``classifier`` neither a name nor a module.
        ValueError: the layer cannot be found, or did not produce the model's output; the model was
            compiled by itself; or it keeps its features from having a gradient, by
            ``torch.utils.checkpoint`` with ``use_reentrant=True``.
    """
    check_model(model)
    if (
        classifier is None
        and torch.compiler.is_compiling()
        and isinstance(images, Tensor)
        and _is_split(model)
    ):
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        return pooled, model.get_classifier()(pooled)
    heads = _find_heads(model) if classifier is None else None
    if heads is None:
        return _listen(model, images, classifier)
    both, output = _run_heads(model, images, heads)
    if output is None:
        output = (both.logits + both.distillation_logits) / 2
    return both.features, output


# The name it had first.
extract_features = features


def distilled_features(model: nn.Module, images: Tensor) -> DistilledFeatures:
    """Run a student once: its features, and the logits of its class and its distillation token.

    DeiT's students learn from the target with one head and from the teacher with another, which is
    what ``distillation_logits`` of :class:`dnkd_ext.HardKDPlusPlus` takes. These are timm's models
    whose ``get_classifier()`` gives two heads (``deit_*_distilled_*``, ``levit_*``,
    ``efficientformer_*``, ``pit_*_distilled_*``, ``swiftformer_*``) or one layer that holds two
    (``repvit_*``), and all others with that interface. It makes no difference whether they train,
    what ``set_distilled_training`` said, or whether they are in DistributedDataParallel. A bare
    DeiT is run by its parts, which ``torch.compile`` traces without a break, all others with hooks
    on the heads, as :func:`features` tells. A model without a distillation head is run by
    :func:`features`.

    Source: "Training data-efficient image transformers & distillation through attention"
    (arXiv 2012.12877).

    Args:
        model: the student.
        images: its input.

    Returns:
        A named tuple ``(features, logits, distillation_logits)`` of ``(N, D)``, ``(N, C)`` and
        ``(N, C)``, all part of the autograd graph: the mean of what the two heads read, and the
        output of each. Without a distillation head the last two are one tensor.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: as of :func:`features`; no head can be found, or the model returned neither both
            heads' outputs nor their mean. Whether it is their mean is looked at on the CPU only,
            because it would wait for a GPU.

    Example:
        >>> student = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
        >>> own, logits, of_token = distilled_features(student, torch.randn(4, 3, 2, 2))
        >>> of_token is logits  # as there is no distillation token
        True
    """
    check_model(model)
    heads = _find_heads(model)
    if heads is None:
        own, logits = features(model, images)
        return DistilledFeatures(own, logits, logits)
    return _run_heads(model, images, heads)[0]


SPLIT = ("forward_features", "forward_head")


def _is_split(model: nn.Module) -> bool:
    """Whether calling the model is no more than timm's three parts one after another."""
    return _is_in_parts(model) and _ends_in_its_classifier(model)


def _is_in_parts(model: nn.Module) -> bool:
    """Whether calling the model is ``forward_head(forward_features(images))``.

    Not where something surrounds the call: hooks (FSDP's among them), a compiled or replaced
    forward, or one that does more.
    """
    kind = type(model)
    if not all(callable(getattr(kind, name, None)) for name in (*SPLIT, "get_classifier")):
        return False
    if model._forward_hooks or model._forward_pre_hooks or kind.__call__ is not nn.Module.__call__:
        return False
    if "forward" in vars(model) or "forward_head" in vars(model):
        return False
    if model._compiled_call_impl is not None:
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


def run_parts(
    model: Any, images: Tensor, run: Callable[[Tensor], Any], parts: Sequence[str]
) -> Any:
    """What ``run`` makes of the images by parts of a model, where calling it does no more.

    ``run`` gives a tuple whose last is the logits, and ``parts`` are the methods that it takes.
    Hooks on the model are run, but for torch's own (FSDP's, weight_norm's).

    Raises:
        ValueError: a call does more, which would be left out.
    """
    kind = type(model)
    owners = {name: _owner(kind, name) for name in ("forward", "forward_features", *parts)}
    replaced = [name for name in owners if name in vars(model) and not _is_of_fsdp(model, name)]
    if replaced:
        raise more_than_parts(model, parts, f"its {replaced[0]} was replaced")
    if kind.__call__ is not nn.Module.__call__:
        raise more_than_parts(model, parts, f"{kind.__name__} has a __call__ of its own")
    for name, owner in owners.items():
        if owner is not owners[parts[0]]:
            told = f"its {name} is not of the class that its {parts[0]} is of"
            raise more_than_parts(model, parts, told)
    for number, hook in [*model._forward_pre_hooks.items()]:
        if _is_torchs(hook):
            continue
        if number in model._forward_pre_hooks_with_kwargs:
            found = hook(model, (images,), {})
            found = found if found is None else found[0]
        else:
            found = hook(model, (images,))
        if found is not None and (found[0] if isinstance(found, tuple) else found) is not images:
            raise more_than_parts(model, parts, "a hook on it changes what it reads")
    result = run(images)
    for number, hook in [*model._forward_hooks.items()]:
        if _is_torchs(hook):
            continue
        names = ({},) if number in model._forward_hooks_with_kwargs else ()
        found = hook(model, (images,), *names, result[-1])
        if found is not None and found is not result[-1]:
            raise more_than_parts(model, parts, "a hook on it changes what it gives")
    return result


def more_than_parts(model: nn.Module, parts: Sequence[str], more: str) -> ValueError:
    """The error where a call of the model does ``more`` than the parts that are run."""
    return ValueError(
        f"the maps of {type(model).__name__} are taken by its {' and '.join(parts)} and not by a "
        f"call, but {more}: what that does would be left out. Do it outside of the model (images "
        "can be normalised before they are given), or take the maps with hooks"
    )


def _owner(kind: type, name: str) -> type | None:
    """The class that a class has a method of."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def _is_torchs(hook: Any) -> bool:
    """Whether a hook is one of torch's own, such as FSDP's and weight_norm's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _is_of_fsdp(model: nn.Module, name: str) -> bool:
    """Whether a method was replaced by ``register_fsdp_forward_method``, which calls it."""
    wrapper = getattr(vars(model)[name], "__func__", None)
    module = getattr(wrapper, "__globals__", {}).get("__name__", "")
    return module.startswith("torch.distributed.")


def is_observed(layer: nn.Module) -> bool:
    """Whether hooks, other than torch's own, may change what a layer reads."""
    return any(not _is_torchs(hook) for hook in layer._forward_pre_hooks.values())


def _ends_in_its_classifier(model: nn.Module) -> bool:
    """Whether the linear layer is all of ``forward_head`` behind ``pre_logits``.

    Of some of timm's models a normalisation, or a dropout, lies between.
    """
    classifier = model.get_classifier()
    return (
        isinstance(classifier, nn.Linear)
        and "forward_head" not in vars(model)
        and not is_observed(classifier)
        and _only_calls(model, "forward_head", classifier)
    )


def _only_calls(owner: nn.Module, method: str, classifier: nn.Module) -> bool:
    names = _named_behind_pre_logits(type(owner), method)
    if names is None:
        return False
    calls, is_inside = 0, False
    for name in names:
        part: Any = owner
        for attribute in name.split("."):
            part = getattr(part, attribute, None)
        if part is classifier or name == "get_classifier":
            calls += 1
        elif isinstance(part, (nn.Identity, nn.Flatten)):
            continue
        elif (
            method == "forward_head"
            and isinstance(part, nn.Module)
            and not part._forward_hooks
            and not part._forward_pre_hooks
            and type(part).__call__ is nn.Module.__call__
            and "forward" not in vars(part)
            and _only_calls(part, "forward", classifier)
        ):
            is_inside = True  # named in both branches, with and without pre_logits
        else:
            return False
    return calls == 1 if not is_inside else calls == 0


# Instructions that hand on, call, store or return what there is, and decide by it.
PLAIN = (
    "CACHE", "CALL", "COPY", "EXTENDED_ARG", "JUMP", "KW_NAMES", "LOAD_CONST", "LOAD_FAST",
    "LOAD_SMALL_INT", "NOP", "NOT_TAKEN", "POP_JUMP", "POP_TOP", "PRECALL", "PUSH_NULL", "RESUME",
    "RETURN", "STORE_FAST", "TO_BOOL",
)  # fmt: skip


@constant_result
def _named_behind_pre_logits(kind: type, method: str) -> tuple[str, ...] | None:
    """The attributes, dotted ones whole, that a method calls once it has looked at ``pre_logits``;
    all of its attributes where it does so last. None where it does more than call them, or might.
    """
    code = getattr(getattr(kind, method, None), "__code__", None)
    if code is None or "pre_logits" not in code.co_varnames[: code.co_argcount]:
        return None
    before: list[str] = []
    behind: list[str] = []
    # The names of what is handed on, before and behind: with another one it might be anything.
    handed: tuple[set[str], set[str]] = (set(), set())
    has_looked, is_plain, is_path = False, True, False
    for step in dis.get_instructions(code):
        of_names = step.opname.startswith(("LOAD_FAST", "STORE_FAST"))
        named = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        found = behind if has_looked else before
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if is_path:
                found[-1] += f".{step.argval}"
            else:
                found.append(step.argval)
            is_path = True
            continue
        if step.opname == "CACHE":
            continue
        is_path = False
        if of_names:
            if "LOAD_FAST" in step.opname and "pre_logits" in named:
                has_looked = True
            handed[has_looked].update({*named} - {code.co_varnames[0], "pre_logits"})
        elif step.opname == "LOAD_COMMON_CONSTANT" and not callable(step.argval):
            continue  # None, True, False; the others are functions and classes
        elif not step.opname.startswith(PLAIN):
            if has_looked:
                return None
            is_plain = False
    if len(handed[1] if behind else handed[0] | handed[1]) > 1 or not (behind or is_plain):
        return None
    return tuple(behind or before)


def run_head(model: nn.Module, last: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier of one of timm's models reads of the last map, and the logits.

    Raises:
        ValueError: the model has no single layer as a classifier, or that does not give the logits.
    """
    if torch.compiler.is_compiling() and _ends_in_its_classifier(model):
        pooled = model.forward_head(last, pre_logits=True)
        return pooled, model.get_classifier()(pooled)
    if getattr(model, "aux_head", None) is not None:
        raise ValueError(
            f"{type(model).__name__} adds the output of its aux_head to that of its classifier; "
            "make it without"
        )
    return _listen(model, last, None, model.forward_head)


def _listen(
    model: nn.Module,
    images: Tensor | Mapping[str, Tensor],
    classifier: str | nn.Module | None,
    run: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """The general way: a hook on the classifier, which must give the model's output.

    ``run``: what is called, if not the model.
    """
    is_given = classifier is not None
    if classifier is None:
        layers = _candidates(model)
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
    if classifier is not None:
        layers = [classifier]
    heard, output, require_untouched = _hear(run or model, images, layers)
    logits = _logits_of(output)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__}, expected a tensor of logits, or an "
            "object that has one as its attribute logits"
        )
    classifier, seen = next(
        (
            (layer, calls)
            for layer, calls in zip(layers, heard, strict=True)
            if len(calls) == 1 and _is_same(calls[0][1], logits)
        ),
        (layers[0], heard[0]),
    )
    if len(seen) != 1 or not _is_same(seen[0][1], logits):
        name = next(
            (f" {name}" for name, m in model.named_modules() if m is classifier and name), ""
        )
        shapes = ""
        remedy = f"pass {'another' if is_given else 'the last linear'} layer as classifier="
        if len(seen) == 1 and isinstance(seen[0][1], Tensor):
            made, returned = list(seen[0][1].shape), list(logits.shape)
            if made != returned:
                shapes = f" (it made {made}, the model returned {returned})"
            if made[-1:] == returned[-1:]:
                remedy += (
                    ", unless this one is the last: what a model makes of its output behind it, "
                    "features() does not see"
                )
        raise ValueError(
            f"{type(classifier).__name__}{name} ran {len(seen)} times and did not produce the "
            f"model's output{shapes}; {remedy} (where a part of the model is compiled by itself it "
            "does not call hooks: compile the function around features() instead)"
        )
    require_untouched(classifier)
    own = seen[0][0]
    if own.dim() == 4 and own.shape[2:] == (1, 1):
        own = own.flatten(1)  # what a convolution that classifies reads
    if own.dim() > logits.dim():
        raise ValueError(
            f"{type(classifier).__name__} reads maps of shape {list(own.shape)}, which it pools "
            "itself; pass the layer behind that as classifier="
        )
    return own, logits


def check_model(model: object, function: str = "features") -> None:
    """TypeError for what is no model, ValueError for one that torch.compile made by itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    inner: object = model
    while isinstance(inner, nn.Module) and not torch.compiler.is_compiling():
        # Where nothing was compiled the compiler has not been imported.
        compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
        if isinstance(inner, compiled) or getattr(inner, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{type(model).__name__} was compiled by itself, which "
                + (
                    "calls hooks by chance alone"
                    if function == "features"
                    else f"{function}() does not run"
                )
                + f": compile the function around {function}() instead"
            )
        inner = getattr(inner, "module", None)  # of a wrapper, as DistributedDataParallel


def _unwrapped(model: Any) -> Any:
    """The model inside of wrappers such as DistributedDataParallel."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def kind_of(model: Callable[..., object]) -> type:
    """Of the model inside of wrappers."""
    return type(_unwrapped(model))


@constant_result
def _takes_names(kind: type, names: tuple[str, ...]) -> bool:
    """Whether a model takes these as arguments; one that takes a mapping as such has others."""
    forward = getattr(kind, "forward", None)
    if forward is None:
        return False
    try:
        inspect.signature(forward).bind(None, **dict.fromkeys(names))
    except (TypeError, ValueError):
        return False
    return True


def _call(model: Callable[..., object], images: Tensor | Mapping[str, Tensor]) -> object:
    """Give a model its input; a mapping as arguments where it takes these."""
    if not isinstance(images, Mapping):
        return model(images)
    kind, names = kind_of(model), tuple(images)
    if _takes_names(kind, names):
        return model(**images)
    if torch.compiler.is_compiling():
        return model(images)
    try:
        return model(images)
    except (TypeError, AttributeError) as error:
        # One name too many or too few, and all are handed over as one argument.
        own = [*inspect.signature(kind.forward).parameters][1:] if hasattr(kind, "forward") else []
        if set(own).isdisjoint(names):
            raise
        raise TypeError(
            f"{kind.__name__}.forward takes {', '.join(own)}; images, a mapping of "
            f"{', '.join(map(str, names))}, which are not its arguments, was given to it as one"
        ) from error


def _logits_of(output: object) -> object:
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def _hear(
    model: Callable[..., object],
    images: Tensor | Mapping[str, Tensor],
    layers: Sequence[nn.Module],
) -> tuple[list[list[tuple[Tensor, Tensor]]], object, Callable[[nn.Module], None]]:
    """Call the model: input and output of every call of each layer, and the model's output.

    Also what raises ValueError where input or output of a layer were changed in place since.
    """
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    handles = []
    has_gradients = torch.is_grad_enabled()
    without: list[bool] = []
    versions: dict[nn.Module, list[tuple[Tensor, int, torch.Size, str]]] = {}
    # A model may run in several threads at once, of which each hears the others' calls.
    thread = None if torch.compiler.is_compiling() else threading.get_ident()

    # Bound so, and not by a default: torch 2.11's compiler loses what is appended to that.
    def listener(calls: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
        def remember(module: nn.Module, args: tuple, *rest: Any) -> None:
            if not torch.compiler.is_compiling() and thread not in (None, threading.get_ident()):
                return  # torch may leave out kwargs there: the hook is being removed meanwhile
            kwargs, output = rest
            given = args[0] if args else next(iter(kwargs.values()))
            calls.append((given, output))
            for one, what in ((given, "input"), (output, "output")):
                if (
                    not torch.compiler.is_compiling()
                    and isinstance(one, Tensor)
                    and not one.is_inference()
                    # Of a view another part may be written.
                    and not (what == "input" and one._is_view())
                ):
                    versions.setdefault(module, []).append((one, one._version, one.shape, what))
            if has_gradients and not torch.is_grad_enabled() and not given.requires_grad:
                without.append(True)

        return remember

    try:
        for layer, calls in zip(layers, seen, strict=True):
            handles.append(layer.register_forward_hook(listener(calls), with_kwargs=True))
        output = _call(model, images)
        logits = _logits_of(output)
        if without and isinstance(logits, Tensor) and logits.requires_grad:
            raise ValueError(
                "the classifier ran without gradients inside a model whose output has one, so that "
                "its input has none: use torch.utils.checkpoint with use_reentrant=False"
            )

        def untouched(layer: nn.Module) -> None:
            # One whose shape was changed was squeezed in place, which leaves the numbers.
            for one, version, shape, what in versions.get(layer, ()):
                if one._version != version and one.shape == shape:
                    raise ValueError(
                        f"the model changes the {what} of its last layer in place, so that "
                        + (
                            "it is no longer the features that the layer read"
                            if what == "input"
                            else "what it returns is not what that layer made of the features"
                        )
                    )

        return seen, output, untouched
    finally:
        for handle in handles:
            handle.remove()


# -- two heads ------------------------------------------------------------------------------------

Heads = tuple[nn.Module, nn.Module]


def is_pair(classifier: object) -> bool:
    """Whether these are the heads of a class and a distillation token, which give logits."""
    return (
        isinstance(classifier, tuple)
        and len(classifier) == 2
        and all(isinstance(head, nn.Module) for head in classifier)
        and not any(isinstance(head, (nn.Identity, nn.ModuleList)) for head in classifier)
    )


def _find_heads(model: nn.Module) -> Heads | None:
    """The heads of the class and the distillation token; None for all other models.

    A wrapper's are those of the model inside, unless a linear layer follows that model.
    """
    if callable(getattr(model, "get_classifier", None)):
        return _own_heads(model)
    modules = list(model.modules())
    for inner in modules[1:]:
        is_named = callable(getattr(type(inner), "get_classifier", None))
        heads = _own_heads(inner) if is_named else None
        if heads is not None:
            last = [module for module in modules if isinstance(module, nn.Linear)][-1:]
            inside = [module for head in heads for module in head.modules()]
            return heads if all(any(one is part for part in inside) for one in last) else None
    return None


def _own_heads(model: nn.Module) -> Heads | None:
    classifier = model.get_classifier()
    if isinstance(classifier, nn.Module):  # one that holds both, as RepViT's
        classifier = (getattr(classifier, "head", None), getattr(classifier, "head_dist", None))
    return classifier if is_pair(classifier) else None


# All that forward_head of a VisionTransformerDistilled names. One that names more does more.
TOKEN_HEAD = {
    *("head_drop", "head", "head_dist"),
    *("distilled_training", "training", "torch", "jit", "is_scripting"),
}


def _is_distilled_vit(model: nn.Module) -> bool:
    """Whether the first two tokens, after the dropout, are what timm's two heads read."""
    if not _is_in_parts(model):
        return False
    head = type(model).forward_head
    return head.__module__ == "timm.models.deit" and set(head.__code__.co_names) <= TOKEN_HEAD


def _run_heads(
    model: nn.Module, images: Tensor | Mapping[str, Tensor], heads: Heads
) -> tuple[DistilledFeatures, Tensor | None]:
    """Features and both logits; and the model's output, where it is the mean of the logits."""
    if _is_distilled_vit(model) and not any(map(is_observed, heads)):
        tokens = model.forward_features(images)
        inputs = model.head_drop(tokens[:, 0]), model.head_drop(tokens[:, 1])
        logits = heads[0](inputs[0]), heads[1](inputs[1])
        return DistilledFeatures(_mean(*inputs), *logits), None
    seen, output, require_untouched = _hear(model, images, heads)
    for head in heads:
        require_untouched(head)
    times = [len(calls) for calls in seen]
    if times == [1, 1]:
        inputs, logits = zip(*(calls[0] for calls in seen), strict=True)
        if isinstance(output, (tuple, list)) and len(output) == 2:
            if all(map(_is_same, logits, output)):
                # The model's own, to which a wrapper may have added something.
                return DistilledFeatures(_mean(*inputs), *output), None
        elif isinstance(output, Tensor) and _is_mean(output, *logits):
            return DistilledFeatures(_mean(*inputs), *logits), output
    raise ValueError(
        f"the heads of {type(model).__name__} for class and distillation token ran {times[0]} and "
        f"{times[1]} times and gave neither the model's output nor, as their mean, a tensor of it; "
        "pass the last linear layer as classifier= of dnkd_ext.features (a compiled model does not "
        "call hooks: compile the function around it instead)"
    )


def _mean(first: Tensor, second: Tensor) -> Tensor:
    return first if first is second else (first + second) / 2


def _is_mean(output: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether the output may be the mean of both, and is, where looking costs no waiting."""
    if not (
        output.shape == first.shape == second.shape
        and output.dtype == first.dtype
        and output.device == first.device
    ):
        return False
    if (
        output.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or isinstance(output, torch._subclasses.FakeTensor)
    ):
        return True
    with torch.no_grad():
        tolerance = 4 * torch.finfo(output.dtype).eps
        return torch.allclose(
            output, (first + second) / 2, rtol=tolerance, atol=tolerance, equal_nan=True
        )


# Of the graph: what wrappers do to an output without changing its numbers.
COPIES = {
    "AliasBackward0", "CloneBackward0", "ReshapeAliasBackward0", "SqueezeBackward1",
    "ToCopyBackward0", "UnsafeViewBackward0", "ViewBackward0", "_DDPSinkBackward",
}  # fmt: skip


def _is_same(output: Tensor, logits: Tensor) -> bool:
    """Whether the model returned this output; wrappers may hand on a view, a copy or a cast."""
    if output is logits:
        return True
    # A convolution that classifies gives a width and a height of 1, which the model leaves out.
    flat = output.flatten(1) if output.dim() == 4 and logits.dim() == 2 else output
    if flat.shape != logits.shape or output.device != logits.device:
        return False
    if output.dtype == logits.dtype and output.data_ptr() == logits.data_ptr():
        return True
    if output.grad_fn is not None and logits.grad_fn is not None:
        return _is_copy(logits.grad_fn, output.grad_fn)
    # Without a graph the numbers tell, in this rare case at the price of waiting for a GPU.
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or isinstance(output, torch._subclasses.FakeTensor)
        or output.is_meta
        or (output.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return logits.dtype == torch.float32 and output.dtype in (torch.float16, torch.bfloat16)
    given, own = logits.detach(), flat.detach().to(logits.dtype)
    return bool(((given == own) | (given.isnan() & own.isnan())).all())


def _is_copy(step: Any, of: Any, depth: int = 4) -> bool:
    """Whether a step of the graph hands on what another one gave."""
    if step is of:
        return True
    return (
        depth > 0
        and step is not None
        and type(step).__name__ in COPIES
        and any(_is_copy(before, of, depth - 1) for before, _ in step.next_functions)
    )
