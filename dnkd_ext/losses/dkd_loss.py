"""Decoupled knowledge distillation (DKD), alone and joined to the cross entropy.

Source: "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dnkd_ext.losses._logits import LogitTerms, logit_loss, logit_loss_reference

__all__ = ["ce_dkd_loss", "ce_dkd_loss_reference", "dkd_loss", "dkd_loss_reference"]


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> Tensor:
    r"""KD split into what it says of the target class and of the others, weighted apart.

    .. math::
        \ell = T^2 (\alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD})

    per row, with TCKD the divergence of the student's from the teacher's binary distribution
    (target, all other classes), and NCKD that of the distributions over the other classes. Both are
    taken in log-sum-exp form with the target excluded exactly, so that they are finite for any
    finite logits; for two classes NCKD is 0.

    Args:
        student_logits: ``(..., C)`` with C of at least 2, float16, bfloat16, float32 or float64.
        teacher_logits: see :func:`dnkd_ext.kd_loss`.
        target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of a
            floating dtype (mixup, cutmix), of which the most probable class is the target.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, greater than 0.
        ignore_index: rows with this class index count nowhere: no loss, no gradient, whatever they
            hold. Does not apply to probabilities.
        reduction: ``"mean"`` over the counted rows (0 where there are none), ``"sum"``, or
            ``"none"`` for a loss per row, of shape ``(...)``.
        loss_weight: a float, or a 0-dim tensor on the same device that needs no gradient.
        logit_standardization: see :func:`dnkd_ext.kd_loss`.

    Returns:
        The loss: float32 for half-precision students, else of the student's dtype.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: a wrong shape, reduction, temperature or weight; fewer than two classes.
        RuntimeError: arguments on different devices.
        IndexError: a class index outside ``[0, C)`` other than ``ignore_index``; on CUDA see
            :func:`dnkd_ext.nd_loss`.

    Example:
        >>> student = torch.randn(8, 100, requires_grad=True)
        >>> dkd_loss(student, torch.randn(8, 100), torch.arange(8), beta=2.0).backward()
    """
    return logit_loss(
        "dkd",
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_weight=loss_weight,
        logit_standardization=logit_standardization,
    ).loss


def dkd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> Tensor:
    """:func:`dnkd_ext.dkd_loss` in differentiable PyTorch operations, for every device."""
    return logit_loss_reference(
        "dkd",
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_weight=loss_weight,
        logit_standardization=logit_standardization,
    ).loss


def ce_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> LogitTerms:
    """Cross entropy and DKD from one read of both logits and one write of the gradient.

    The sum of ``ce_weight * torch.nn.functional.cross_entropy(student_logits, target, ...)`` and
    ``kd_weight * dkd_loss(student_logits, teacher_logits, target, ...)``, times ``loss_weight``.
    Classes come last, whatever the shape; that function has them second in sequences and maps: of
    ``(N, C, H, W)`` give ``logits.movedim(1, -1)``, and class probabilities likewise.

    Args:
        student_logits: see :func:`dnkd_ext.dkd_loss`.
        teacher_logits: see :func:`dnkd_ext.dkd_loss`.
        target: see :func:`dnkd_ext.dkd_loss`; the cross entropy takes probabilities as they are.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: of DKD, greater than 0.
        ce_weight: a float, or a 0-dim tensor on the same device that needs no gradient.
        kd_weight: as ``ce_weight``.
        label_smoothing: of the cross entropy, between 0 and 1.
        ignore_index: rows with this class index count nowhere, in neither term.
        reduction: ``"mean"`` over the counted rows, ``"sum"``, or ``"none"`` for terms per row.
        loss_weight: as ``ce_weight``; multiplies the sum.
        logit_standardization: of DKD; the cross entropy takes the logits as they are.

    Returns:
        A named tuple ``(loss, ce, kd)``: the weighted sum, and the terms without their weights,
        which need no gradient. float32 for half-precision students, else the student's dtype.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`dnkd_ext.dkd_loss`.

    Example:
        >>> student = torch.randn(8, 100, requires_grad=True)
        >>> ce_dkd_loss(student, torch.randn(8, 100), torch.arange(8)).loss.backward()
    """
    return logit_loss(
        "ce_dkd",
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


def ce_dkd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> LogitTerms:
    """:func:`dnkd_ext.ce_dkd_loss` in differentiable PyTorch operations, for every device."""
    return logit_loss_reference(
        "ce_dkd",
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
