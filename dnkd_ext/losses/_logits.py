"""What the losses on logits share: one operator, its checks, its reference and its fake kernels.

``kd_loss``, ``ce_kd_loss`` (kd_loss.py), ``dkd_loss`` and ``ce_dkd_loss`` (dkd_loss.py) are four
settings of it: a cross entropy or none, beside a divergence that is decoupled or not.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dnkd_ext import _extension
from dnkd_ext._checks import (
    accumulate_dtype,
    check_target,
    no_autocast,
    product,
    require_dense,
    require_flag,
    require_floating,
    require_integer,
    require_number,
    require_reduction,
    require_same_device,
    require_tensor,
    require_weight,
)
from dnkd_ext._export import exportable

__all__ = ["Kind", "LogitTerms", "logit_loss", "logit_loss_reference"]

Kind = Literal["kd", "ce_kd", "dkd", "ce_dkd"]
# Added to a row's standard deviation by logit standardization, as in its authors' code.
STANDARD_EPS = 1e-7
# Values of a row that a float16 gradient, or one per row, is formed from in the backward pass.
COEFFICIENTS = 11


@exportable
class LogitTerms(NamedTuple):
    """A weighted loss and its terms.

    Attributes:
        loss: ``loss_weight * (ce_weight * ce + kd_weight * kd)``, differentiable.
        ce: the cross entropy without its weight, for logging; needs no gradient.
        kd: the distillation term without its weight, for logging; needs no gradient.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def logit_loss(
    kind: Kind,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> LogitTerms:
    """The fused loss, or the reference where no kernel takes these tensors."""
    if not isinstance(student_logits, Tensor) or not _extension.has_kernel_for(student_logits):
        return logit_loss_reference(
            kind,
            student_logits,
            teacher_logits,
            target,
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            alpha=alpha,
            beta=beta,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            loss_weight=loss_weight,
            logit_standardization=logit_standardization,
        )
    if not isinstance(teacher_logits, Tensor):
        require_tensor(teacher_logits, "teacher_logits")
    if kind != "kd" and not isinstance(target, Tensor):
        require_tensor(target, "target")
    # Floats, as they nearly always are, need no look; all else the operator would take as it can.
    for weight, name in (
        (ce_weight, "ce_weight"),
        (kd_weight, "kd_weight"),
        (loss_weight, "loss_weight"),
    ):
        if type(weight) is not float:
            require_weight(weight, name, student_logits, "student_logits")
    _require_options(
        temperature,
        alpha,
        beta,
        label_smoothing,
        ignore_index,
        reduction,
        logit_standardization,
    )
    ce_scale, ce_factor = product(ce_weight, loss_weight, of=student_logits)
    kd_scale, kd_factor = product(kd_weight, loss_weight, of=student_logits)
    return LogitTerms(
        *_operator(
            student_logits,
            teacher_logits,
            target,
            ce_scale,
            kd_scale,
            kind,
            temperature,
            ce_factor,
            kd_factor,
            alpha,
            beta,
            label_smoothing,
            ignore_index,
            reduction,
            logit_standardization,
        )
    )


def _require_options(
    temperature: object,
    alpha: object,
    beta: object,
    label_smoothing: object,
    ignore_index: object,
    reduction: object,
    logit_standardization: object,
) -> None:
    """Errors for options of other types, in the same words with and without the operator."""
    for value, name in (
        (temperature, "temperature"),
        (alpha, "alpha"),
        (beta, "beta"),
        (label_smoothing, "label_smoothing"),
    ):
        if type(value) is not float:
            require_number(value, name)
    if type(ignore_index) is not int:
        require_integer(ignore_index, "ignore_index")
    if type(reduction) is not str:
        require_reduction(reduction)
    if type(logit_standardization) is not bool:
        require_flag(logit_standardization, "logit_standardization")


def _check(
    kind: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    label_smoothing: float,
    reduction: str,
) -> None:
    require_floating(student_logits, "student_logits")
    require_floating(teacher_logits, "teacher_logits")
    if student_logits.dim() < 1:
        raise ValueError("student_logits must be (..., C), got a 0-dim tensor")
    classes, rows = student_logits.shape[-1], student_logits.shape[:-1]
    shape = list(student_logits.shape)
    wanted = 2 if "dkd" in kind else 1
    if classes < wanted:
        raise ValueError(
            f"student_logits must have at least {wanted} class{'es' if wanted > 1 else ''}, "
            f"got {classes}"
        )
    require_same_device(teacher_logits, "teacher_logits", student_logits, "student_logits")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits {shape}, "
            f"got shape {list(teacher_logits.shape)}"
        )
    if kind != "kd":
        require_tensor(target, "target")
        assert target is not None
        require_same_device(target, "target", student_logits, "student_logits")
        if target.dtype.is_floating_point:
            require_floating(target, "target")
            if target.shape != student_logits.shape:
                raise ValueError(
                    f"target of class probabilities must have the shape of student_logits {shape}, "
                    f"got shape {list(target.shape)}"
                )
        else:
            require_dense(target, "target")
            if target.dtype not in (torch.int64, torch.int32):
                raise TypeError(
                    "target must hold int64 or int32 class indices or floating class "
                    f"probabilities, got {target.dtype}"
                )
            if target.shape != rows:
                raise ValueError(
                    "target of class indices must have the leading shape of student_logits "
                    f"{shape}, got shape {list(target.shape)}; classes come last, and class "
                    "probabilities are floating"
                )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and greater than 0, got {temperature}")
    for value, name in ((alpha, "alpha"), (beta, "beta")):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    require_reduction(reduction)


# -- reference ------------------------------------------------------------------------------------


def _standardized(logits: Tensor) -> Tensor:
    """Each row minus its mean, over its standard deviation."""
    centred = logits - logits.mean(-1, keepdim=True)
    variance = (centred * centred).sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    # The square root has no derivative at 0, and there none is wanted.
    is_flat = variance == 0
    deviation = torch.where(is_flat, 0, torch.where(is_flat, 1, variance).sqrt())
    return centred / (deviation + STANDARD_EPS)


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) per row; where q is 0 it counts nothing."""
    q = log_q.exp()
    return torch.where(q == 0, 0, q * (log_q - log_p)).sum(-1)


def _nan_unless(is_named: Tensor, logits: Tensor) -> Tensor:
    """Per row 0, or where a label names no class NaN, and so the gradient."""
    # A product with the logits of the other rows would be NaN where one of them is infinite.
    unnamed = torch.where(is_named.unsqueeze(-1), 0, logits)
    return (unnamed * torch.where(is_named, 0, math.nan).unsqueeze(-1)).sum(-1)


def _decoupled(u: Tensor, v: Tensor, is_label: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha * TCKD + beta * NCKD per row, the label's logit excluded from the second exactly."""
    log_rest, is_named = [], is_label.any(-1)
    odds, alone = [], []  # log odds of the label against all other classes; whether it has none
    for logits in (u, v):
        others = logits.masked_fill(is_label, -math.inf)
        # Relative to the largest, of which a sum of large logits would keep few digits.
        largest = others.detach().amax(-1, keepdim=True)
        is_alone = largest == -math.inf  # the label is the only class that is possible
        shift = torch.where(is_alone, 0, largest)
        logits, others = logits - shift, others - shift
        # Of nothing but -inf logsumexp has no derivative.
        total = torch.where(is_alone, 0, others).logsumexp(-1, keepdim=True)
        total = torch.where(is_alone, -math.inf, total)
        log_rest.append(torch.where(is_alone, -math.inf, others - total))
        alone.append(is_alone.squeeze(-1))
        label = torch.where(is_label, logits, 0).sum(-1)
        odd = label - total.squeeze(-1)
        # An infinite logit at the label is in no sum that would show it.
        odds.append(odd + torch.where(label == math.inf, math.nan, 0))
    student, teacher = odds
    tckd = 0.0
    for sign in (1, -1):  # the label, and everything else
        q = torch.sigmoid(sign * teacher)
        log_ratio = F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student)
        tckd = tckd + torch.where(q == 0, 0, q * log_ratio)
    nckd = _divergence(log_rest[1], torch.where(is_label, 0, log_rest[0]))
    nckd = torch.where(alone[0] | alone[1], 0, nckd)  # nothing to compare
    return alpha * tckd + beta * nckd + _nan_unless(is_named, u)


def logit_loss_reference(
    kind: Kind,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> LogitTerms:
    """The same in differentiable PyTorch operations, for every device."""
    _require_options(
        temperature, alpha, beta, label_smoothing, ignore_index, reduction, logit_standardization
    )
    _check(
        kind, student_logits, teacher_logits, target, temperature, alpha, beta, label_smoothing,
        reduction,
    )  # fmt: skip
    weights = {"ce_weight": ce_weight, "kd_weight": kd_weight, "loss_weight": loss_weight}
    for name, weight in weights.items():
        require_weight(weight, name, student_logits, "student_logits")
    dtype, classes = accumulate_dtype(student_logits.dtype), student_logits.shape[-1]
    rows = student_logits.shape[:-1]
    with no_autocast(student_logits):
        student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
        counted = torch.ones(rows, dtype=torch.bool, device=student.device)
        labels = None
        if target is not None and kind != "kd":
            if target.dtype.is_floating_point:
                labels = target.argmax(-1)
                target = target.detach().to(dtype)
            else:
                counted = target != ignore_index
                is_named = (target >= 0) & (target < classes)
                check_target(target, counted & ~is_named, classes, "classes")
                labels = torch.where(counted, target, 0).long()
        in_both = student
        if labels is not None:
            # Whatever an ignored row holds is replaced before anything is computed from it.
            in_both = torch.where(counted[..., None], student, 0)
        is_decoupled = kind in ("dkd", "ce_dkd")
        if is_decoupled:
            student, teacher = in_both, torch.where(counted[..., None], teacher, 0)
        u, v = student, teacher
        if logit_standardization:
            u, v = _standardized(u), _standardized(v)
        u, v = u / temperature, v / temperature
        if is_decoupled:
            assert labels is not None
            is_label = torch.arange(classes, device=u.device) == labels[..., None]
            kd = temperature**2 * _decoupled(u, v, is_label, alpha, beta)
            kd = torch.where(counted, kd, 0)
        else:
            kd = temperature**2 * _divergence(v.log_softmax(-1), u.log_softmax(-1))
        ce = torch.zeros_like(kd)
        if kind in ("ce_kd", "ce_dkd"):
            assert target is not None
            log_p = in_both.log_softmax(-1)
            if target.dtype.is_floating_point:
                smooth = (1 - label_smoothing) * target + label_smoothing / classes
                ce = -(smooth * log_p).sum(-1)
            else:
                is_label = torch.arange(classes, device=u.device) == labels[..., None]
                ce = -torch.where(is_label, log_p, 0).sum(-1) * (1 - label_smoothing)
                if label_smoothing:
                    ce = ce - label_smoothing * log_p.mean(-1)
                ce = ce + _nan_unless(is_label.any(-1), in_both)
                ce = torch.where(counted, ce, 0)
        if reduction != "none":
            ce, kd = ce.sum(), kd.sum()
        if reduction == "mean":
            ones = counted.sum().clamp_min(1)
            ce = ce / ones
            kd = kd / (ones if is_decoupled else max(rows.numel(), 1))
        loss = loss_weight * (ce_weight * ce + kd_weight * kd)
        return LogitTerms(loss.to(dtype), ce.detach().to(dtype), kd.detach().to(dtype))


# -- what torch has to know about the operators ---------------------------------------------------


def _reference_operator(
    student_logits,
    teacher_logits,
    target,
    ce_scale,
    kd_scale,
    kind,
    temperature,
    ce_weight,
    kd_weight,
    alpha,
    beta,
    label_smoothing,
    ignore_index,
    reduction,
    logit_standardization,
):
    return logit_loss_reference(
        kind,
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight if ce_scale is None else ce_weight * ce_scale,
        kd_weight=kd_weight if kd_scale is None else kd_weight * kd_scale,
        alpha=alpha,
        beta=beta,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_standardization=logit_standardization,
    ).loss


def _fake(
    student_logits,
    teacher_logits,
    target,
    ce_scale,
    kd_scale,
    kind,
    temperature,
    ce_weight,
    kd_weight,
    alpha,
    beta,
    label_smoothing,
    ignore_index,
    reduction,
    logit_standardization,
):
    _check(
        kind, student_logits, teacher_logits, target, temperature, alpha, beta, label_smoothing,
        reduction,
    )  # fmt: skip
    for weight, name in ((ce_scale, "ce_weight"), (kd_scale, "kd_weight")):
        if weight is not None:
            require_weight(weight, name, student_logits, "student_logits")
    shape = student_logits.shape[:-1] if reduction == "none" else ()
    dtype = accumulate_dtype(student_logits.dtype)
    return tuple(student_logits.new_empty(shape, dtype=dtype) for _ in range(3))


def _fake_forward(
    student_logits,
    teacher_logits,
    labels,
    probabilities,
    ce_scale,
    kd_scale,
    kind,
    temperature,
    ce_weight,
    kd_weight,
    alpha,
    beta,
    label_smoothing,
    ignore_index,
    reduction,
    logit_standardization,
    needs_gradient,
):
    require_reduction(reduction)
    rows, columns = student_logits.shape
    dtype = accumulate_dtype(student_logits.dtype)
    shape = (rows,) if reduction == "none" else ()
    terms = tuple(student_logits.new_empty(shape, dtype=dtype) for _ in range(3))
    if not needs_gradient:
        return *terms, student_logits.new_empty((0,), dtype=dtype)
    if student_logits.dtype == torch.float16 or reduction == "none":
        return *terms, student_logits.new_empty((rows, COEFFICIENTS), dtype=dtype)
    return *terms, student_logits.new_empty((rows, columns))


def _fake_backward(
    upstream,
    student_logits,
    teacher_logits,
    labels,
    probabilities,
    coefficients,
    kind,
    temperature,
    logit_standardization,
):
    return student_logits.new_empty(student_logits.shape)


if _extension.is_loaded():
    _operator = _extension.operator("logit_loss")
    _library = torch.library.Library("dnkd_ext", "FRAGMENT")
    _library.impl("_logit_loss_reference", _reference_operator, "CompositeImplicitAutograd")
    torch.library.register_fake("dnkd_ext::logit_loss", _fake, lib=_library)
    torch.library.register_fake("dnkd_ext::_logit_loss_forward", _fake_forward, lib=_library)
    torch.library.register_fake("dnkd_ext::_logit_loss_backward", _fake_backward, lib=_library)
