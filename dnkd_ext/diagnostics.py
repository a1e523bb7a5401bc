"""How far a student's features have come: their norms beside the teacher's, and their direction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dnkd_ext import _extension
from dnkd_ext._checks import accumulate_dtype, no_autocast
from dnkd_ext._export import exportable
from dnkd_ext.losses.nd_loss import (
    check_nd_arguments,
    reference_rows,
    require_nd_options,
    require_nd_tensors,
)

__all__ = ["FeatureDiagnostics", "feature_diagnostics", "feature_diagnostics_reference"]


@exportable
class FeatureDiagnostics(NamedTuple):
    """Three 0-dim tensors on the features' device, without a gradient.

    Attributes:
        norm_ratio: the mean norm of the student's features over the mean norm of the teacher's.
        cosine: the mean cosine between a student feature and the mean feature of its class.
        reached: the fraction of rows whose norm is at least the teacher's.
    """

    norm_ratio: Tensor
    cosine: Tensor
    reached: Tensor


def feature_diagnostics(
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    teacher_features: Tensor | None = None,
    *,
    teacher_norms: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
) -> FeatureDiagnostics:
    r"""What the ND loss is after, measured: norms that grow to the teacher's, and direction.

    Over the rows that are not ignored, for student rows :math:`f`, teacher rows :math:`t` and class
    means :math:`c`:

    .. math::
        \frac{\sum \lVert f \rVert}{\sum \lVert t \rVert}, \qquad
        \mathrm{mean}\, \frac{\langle f, c \rangle}{\lVert f \rVert \lVert c \rVert}, \qquad
        \mathrm{mean}\, [\lVert f \rVert \ge \lVert t \rVert]

    The compiled kernels read the features once and copy nothing to the host, so that it can be
    called in every step, in a CUDA graph and under ``torch.compile``; read the values
    (``.item()``) when they are wanted. Nothing of it is differentiable.

    A row whose class has no mean (zero), or of norm at most ``eps``, has a cosine of 0. A row for
    which :func:`dnkd_ext.nd_loss` is NaN makes all three NaN. Where no row counts all three are
    NaN, because there is nothing they could be the mean of; without a teacher ``norm_ratio`` and
    ``reached`` are.

    Args:
        student_features: ``(..., D)``, float16, bfloat16, float32 or float64.
        target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of a
            floating dtype: the direction is then the probability-weighted sum of class means.
        class_means: ``(C, D)``, any of the four floating dtypes.
        teacher_features: ``(..., D')``, any of the four floating dtypes; only their norms are used.
            Not together with ``teacher_norms``.
        teacher_norms: ``(...)``, the norms themselves.
        ignore_index: rows with this class index count nowhere. Does not apply to probabilities.
        eps: smallest norm that counts as one; at least 0.

    Returns:
        A named tuple ``(norm_ratio, cosine, reached)`` of 0-dim tensors: float32 for half-precision
        students, else of the student's dtype.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`dnkd_ext.nd_loss`.

    Example:
        >>> now = feature_diagnostics(torch.randn(8, 64), torch.arange(8), torch.randn(10, 64),
        ...                           torch.randn(8, 64))
        >>> print(f"norms {now.norm_ratio.item():.2f}, cosine {now.cosine.item():.2f}")
        norms ..., cosine ...
    """
    if (
        not isinstance(student_features, Tensor)
        or student_features.layout != torch.strided
        or not _extension.has_kernel_for(student_features)
    ):
        return feature_diagnostics_reference(
            student_features,
            target,
            class_means,
            teacher_features,
            teacher_norms=teacher_norms,
            ignore_index=ignore_index,
            eps=eps,
        )
    require_nd_tensors(target, class_means, teacher_features, teacher_norms)
    require_nd_options(ignore_index, "mean", eps)
    return FeatureDiagnostics(
        *_operator(
            student_features,
            target,
            class_means,
            teacher_features,
            teacher_norms,
            ignore_index,
            eps,
        ).unbind()
    )


@torch.no_grad()
def feature_diagnostics_reference(
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    teacher_features: Tensor | None = None,
    *,
    teacher_norms: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
) -> FeatureDiagnostics:
    """:func:`dnkd_ext.feature_diagnostics` in PyTorch operations, for every device."""
    require_nd_options(ignore_index, "mean", eps)
    check_nd_arguments(
        student_features, target, class_means, teacher_features, teacher_norms, "mean", 1.0, eps
    )
    has_teacher = teacher_features is not None or teacher_norms is not None
    dtype = accumulate_dtype(student_features.dtype)
    counted, named, direction, norms = reference_rows(
        student_features, target, class_means, teacher_features, teacher_norms, ignore_index
    )
    with no_autocast(student_features):
        student = torch.where(counted[..., None], student_features.detach().to(dtype), 0)
        square, direction_square = (student * student).sum(-1), (direction * direction).sum(-1)
        student_norms = square.sqrt()
        degenerate = (student_norms <= eps) | (direction_square == 0)
        lengths = torch.where(degenerate, 1, student_norms * direction_square.sqrt().clamp_min(eps))
        cosines = torch.where(degenerate, 0, (student * direction).sum(-1) / lengths)
        sound = square.isfinite() & direction_square.isfinite() & norms.isfinite() & named
        fault = torch.where(counted & ~sound, math.nan, 0).sum().to(dtype)
        count = counted.sum().to(dtype)
        nothing = torch.full_like(count, math.nan)
        reached = (counted & (student_norms >= norms)).sum()
        return FeatureDiagnostics(
            student_norms.sum() / norms.sum() + fault if has_teacher else nothing,
            cosines.sum() / count + fault,
            reached / count + fault if has_teacher else nothing,
        )


# -- what torch has to know about the operator ----------------------------------------------------


def _fake(
    student_features, target, class_means, teacher_features, teacher_norms, ignore_index, eps
):
    check_nd_arguments(
        student_features, target, class_means, teacher_features, teacher_norms, "mean", 1.0, eps
    )
    return student_features.new_empty((3,), dtype=accumulate_dtype(student_features.dtype))


if _extension.is_loaded():
    _operator = _extension.operator("feature_diagnostics")
    _library = torch.library.Library("dnkd_ext", "FRAGMENT")
    torch.library.register_fake("dnkd_ext::feature_diagnostics", _fake, lib=_library)
