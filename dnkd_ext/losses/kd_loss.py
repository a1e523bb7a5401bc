"""Knowledge distillation (KD) by logits, alone and joined to the cross entropy.

Source: "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); the standardization of
logits is that of "Logit Standardization in Knowledge Distillation" (CVPR 2024, arXiv 2403.01427).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dnkd_ext.losses._logits import LogitTerms, logit_loss, logit_loss_reference

__all__ = ["ce_kd_loss", "ce_kd_loss_reference", "kd_loss", "kd_loss_reference"]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> Tensor:
    r"""The divergence of the student's softened class distribution from the teacher's.

    .. math::
        \ell = T^2 \, \mathrm{KL}\bigl(\mathrm{softmax}(z_t / T) \,\|\,
        \mathrm{softmax}(z_s / T)\bigr)

    per row, in log-sum-exp form; ``"mean"`` divides by the number of rows, as
    ``torch.nn.functional.kl_div(..., reduction="batchmean")`` does. The compiled kernels form loss
    and gradient from one read of both logits; where they are not available, and under the
    transforms of ``torch.func``, :func:`dnkd_ext.reference.kd_loss` computes the same.

    Args:
        student_logits: ``(..., C)``, float16, bfloat16, float32 or float64. Rows of stride-1
            logits are read in place whatever the stride between rows.
        teacher_logits: ``(..., C)``, any of the four dtypes; gets no gradient. Those of another
            dtype than the student's and than the loss's are converted once. Made under
            ``torch.inference_mode`` they must not change before the backward pass: that they did
            cannot be seen.
        temperature: T, greater than 0.
        reduction: ``"mean"`` over all rows (0 without rows), ``"sum"``, or ``"none"`` for a loss
            per row, of shape ``(...)``.
        loss_weight: a float, or a 0-dim tensor on the same device that needs no gradient;
            multiplies the result. Weighting inside keeps the backward pass free of a pass over the
            gradient.
        logit_standardization: subtract its mean from each row of both logits and divide by its
            standard deviation (plus 1e-7) before the temperature. Where the sum of a row's squares
            exceeds the loss's dtype (3.4e38 in float32) the row counts as constant, and its
            gradient is 0.

    Returns:
        The loss: float32 for half-precision students, else of the student's dtype. The gradient has
        the student's dtype.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: a wrong shape, reduction or temperature.
        RuntimeError: arguments on different devices.

    Example:
        >>> student = torch.randn(8, 100, requires_grad=True)
        >>> kd_loss(student, torch.randn(8, 100), temperature=4.0).backward()
    """
    return logit_loss(
        "kd",
        student_logits,
        teacher_logits,
        None,
        temperature=temperature,
        reduction=reduction,
        loss_weight=loss_weight,
        logit_standardization=logit_standardization,
    ).loss


def kd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> Tensor:
    """:func:`dnkd_ext.kd_loss` in differentiable PyTorch operations, for every device."""
    return logit_loss_reference(
        "kd",
        student_logits,
        teacher_logits,
        None,
        temperature=temperature,
        reduction=reduction,
        loss_weight=loss_weight,
        logit_standardization=logit_standardization,
    ).loss


def ce_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> LogitTerms:
    """Cross entropy and KD from one read of both logits and one write of the gradient.

    The sum of ``ce_weight * torch.nn.functional.cross_entropy(student_logits, target, ...)`` and
    ``kd_weight * kd_loss(student_logits, teacher_logits, ...)``, times ``loss_weight``.
    Classes come last, whatever the shape; that function has them second in sequences and maps: of
    ``(N, C, H, W)`` give ``logits.movedim(1, -1)``, and class probabilities likewise.

    Args:
        student_logits: ``(..., C)``, float16, bfloat16, float32 or float64.
        teacher_logits: see :func:`dnkd_ext.kd_loss`.
        target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of a
            floating dtype (mixup, cutmix), which need not sum to 1, and get no gradient.
        temperature: of KD, greater than 0.
        ce_weight: a float, or a 0-dim tensor on the same device that needs no gradient. A tensor
            can change between calls without recompiling or recapturing.
        kd_weight: as ``ce_weight``.
        label_smoothing: of the cross entropy, between 0 and 1.
        ignore_index: rows with this class index count nowhere in the cross entropy, whose mean is
            over the others (0 where there are none, PyTorch's is NaN); KD counts every row. Does
            not apply to probabilities.
        reduction: ``"mean"`` (of each term over the rows it counts), ``"sum"``, or ``"none"`` for
            terms per row, of shape ``(...)``.
        loss_weight: as ``ce_weight``; multiplies the sum.
        logit_standardization: of KD, see :func:`dnkd_ext.kd_loss`; the cross entropy takes the
            logits as they are.

    Returns:
        A named tuple ``(loss, ce, kd)``: the weighted sum, and the terms without their weights,
        which need no gradient. float32 for half-precision students, else the student's dtype.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: a wrong shape, reduction, temperature, smoothing or weight.
        RuntimeError: arguments on different devices.
        IndexError: a class index outside ``[0, C)`` other than ``ignore_index``. On CUDA such a
            row's loss and gradient are NaN instead, unless the environment variable
            ``DNKD_CHECK_TARGET=1`` or ``torch.autograd.set_detect_anomaly`` asks for the error.

    Example:
        >>> student = torch.randn(8, 100, requires_grad=True)
        >>> terms = ce_kd_loss(student, torch.randn(8, 100), torch.arange(8), kd_weight=0.5)
        >>> terms.loss.backward()
    """
    return logit_loss(
        "ce_kd",
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_weight=loss_weight,
        logit_standardization=logit_standardization,
    )


def ce_kd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    logit_standardization: bool = False,
) -> LogitTerms:
    """:func:`dnkd_ext.ce_kd_loss` in differentiable PyTorch operations, for every device."""
    return logit_loss_reference(
        "ce_kd",
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_weight=loss_weight,
        logit_standardization=logit_standardization,
    )


def logit_examples(generator: torch.Generator, *, with_target: bool, with_options: bool = False):
    """Arguments that reach every kernel: few and many classes, with and without vectors.

    float64 tensors are to be brought to the dtype under test.
    """
    for classes in (3, 100, 1000, 1001, 9000):
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        student, teacher = 3 * draw(12, classes), 3 * draw(12, classes)
        target = torch.randint(classes, (12,), generator=generator)
        labels = [target] if with_target else []
        for temperature in (1.0, 2.0, 4.0, 3.5):
            yield [student, teacher, *labels], {"temperature": temperature}
        yield [student, teacher, *labels], {"reduction": "none", "logit_standardization": True}
        if with_target:
            yield [student, teacher, target.int()], {"ignore_index": int(target[0])}
            yield [student, teacher, draw(12, classes).softmax(-1)], {"temperature": 2.0}
        if with_options:
            yield [student, teacher, *labels], {"label_smoothing": 0.1, "kd_weight": 0.5}
