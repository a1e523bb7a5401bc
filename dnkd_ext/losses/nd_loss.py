"""The feature-direction-and-norm (ND) loss.

Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
(arXiv 2305.17007).
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dnkd_ext import _extension
from dnkd_ext._checks import (
    accumulate_dtype,
    check_target,
    no_autocast,
    require_dense,
    require_finite,
    require_floating,
    require_integer,
    require_number,
    require_reduction,
    require_same_device,
    require_tensor,
    require_weight,
    rows_not_finite,
    shown,
)

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["NDLoss", "nd_loss", "nd_loss_reference"]


# -- functional -----------------------------------------------------------------------------------


def nd_loss(
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    *,
    teacher_features: Tensor | None = None,
    teacher_norms: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    eps: float = 1e-12,
) -> Tensor:
    r"""Align each student feature with its class's mean teacher feature and let its norm grow.

    For a student row :math:`f`, its class mean :math:`c` and the teacher's norm :math:`t`:

    .. math::
        e = c / \max(\lVert c \rVert, \epsilon), \qquad
        \ell = 1 - \frac{\langle f, e \rangle}{\max(\lVert f \rVert, t)}

    While :math:`\lVert f \rVert < t` the loss also pushes the norm up; from there on it is one
    minus the cosine. Without a teacher it is one minus the cosine everywhere (the paper's
    direction-only form). A zero class mean, or :math:`\max(\lVert f \rVert, t) \le \epsilon`,
    gives a loss of 1 and no gradient. A NaN in a row, or an infinite student row, class mean or
    teacher norm, makes that row's loss NaN; so does a norm whose square is infinite (of 1.8e19 and
    more in float32).

    The compiled kernels form loss and gradient in one pass; where they are not available, and under
    the transforms of ``torch.func``, :func:`dnkd_ext.reference.nd_loss` computes the same.

    Args:
        student_features: ``(..., D)``, float16, bfloat16, float32 or float64. Rows of stride-1
            features are read in place whatever the stride between rows.
        target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of a
            floating dtype (mixup, cutmix, label smoothing): the direction is then that of the
            probability-weighted sum of class means.
        class_means: ``(C, D)``, any of the four floating dtypes: the mean teacher feature of every
            class. It gets no gradient, and must not be made under ``torch.inference_mode`` where
            the student's features need one.
        teacher_features: ``(..., D')``, any of the four floating dtypes; only the norm of each row
            is used, and it gets no gradient. Not together with ``teacher_norms``.
        teacher_norms: ``(...)``, the norms themselves.
        ignore_index: rows with this class index count nowhere: no loss, no gradient, whatever they
            hold. Does not apply to probabilities.
        reduction: ``"mean"`` over the counted rows (0 where there are none), ``"sum"``, or
            ``"none"`` for a loss per row, of shape ``(...)``.
        loss_weight: a float, or a 0-dim tensor on the same device that needs no gradient;
            multiplies the result. Weighting inside keeps the backward pass free of a pass over the
            gradient, which ``weight * nd_loss(...)`` is not; a tensor can change between calls
            without recompiling or recapturing.
        eps: smallest norm that counts as one; at least 0.

    Returns:
        The loss: float32 for half-precision students, else of the student's dtype. The gradient has
        the student's dtype.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: a wrong shape, reduction or eps, or both teacher arguments.
        RuntimeError: arguments on different devices.
        IndexError: a class index outside ``[0, C)`` other than ``ignore_index``. On CUDA such a
            row's loss and gradient are NaN instead, unless the environment variable
            ``DNKD_CHECK_TARGET=1`` or ``torch.autograd.set_detect_anomaly`` asks for the error,
            which costs a synchronisation.

    Example:
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> loss = nd_loss(features, torch.arange(8), torch.randn(10, 64),
        ...                teacher_features=torch.randn(8, 64))
        >>> loss.backward()
    """
    weight, scale = (loss_weight, 1.0) if isinstance(loss_weight, Tensor) else (None, loss_weight)
    if not isinstance(student_features, Tensor) or not _extension.has_kernel_for(student_features):
        return nd_loss_reference(
            student_features,
            target,
            class_means,
            teacher_features=teacher_features,
            teacher_norms=teacher_norms,
            ignore_index=ignore_index,
            reduction=reduction,
            loss_weight=loss_weight,
            eps=eps,
        )
    if weight is None and type(scale) is not float:
        require_weight(scale, "loss_weight", student_features, "student_features")
    require_nd_tensors(target, class_means, teacher_features, teacher_norms)
    require_nd_options(ignore_index, reduction, eps)
    return _operator(
        student_features,
        target,
        class_means,
        teacher_features,
        teacher_norms,
        weight,
        scale,
        ignore_index,
        reduction,
        eps,
    )


def add_nd_loss(
    base: Tensor,
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    *,
    teacher_features: Tensor | None,
    teacher_norms: Tensor | None,
    ignore_index: int,
    loss_weight: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A loss and the ND loss in one: ``(base + nd_loss(...), nd)``.

    The ND loss is the mean over the rows; ``nd`` is the same without its weight, needs no gradient,
    and is 0 where the weight is. Its own kernel adds and divides wherever ``base`` is as its result
    would be; elsewhere PyTorch does, and where a graph is compiled, whose compiler fuses that.
    """
    if (
        not torch.compiler.is_compiling()
        and base.dim() == 0
        and base.dtype == accumulate_dtype(student_features.dtype)
        and base.device == student_features.device
        and _extension.has_kernel_for(student_features)
    ):
        require_nd_tensors(target, class_means, teacher_features, teacher_norms)
        is_tensor = isinstance(loss_weight, Tensor)
        return _added(
            base,
            student_features,
            target,
            class_means,
            teacher_features,
            teacher_norms,
            loss_weight if is_tensor else None,
            1.0 if is_tensor else loss_weight,
            ignore_index,
            eps,
        )
    weighted = nd_loss(
        student_features,
        target,
        class_means,
        teacher_features=teacher_features,
        teacher_norms=teacher_norms,
        ignore_index=ignore_index,
        loss_weight=loss_weight,
        eps=eps,
    )
    nd = weighted.detach()
    if isinstance(loss_weight, Tensor):
        # On the device, where alone the weight is known; NaN / 0 must not hide behind the 0.
        nd = torch.where((loss_weight == 0) & (nd == 0), 0, nd / loss_weight).to(weighted.dtype)
    elif loss_weight not in (0, 1):
        nd = nd / loss_weight
    return base + weighted, nd


# -- reference ------------------------------------------------------------------------------------


def require_nd_tensors(
    target: object, class_means: object, teacher_features: object, teacher_norms: object
) -> None:
    """TypeError by name for what is no tensor; the operators would tell it by their schema."""
    if not isinstance(target, Tensor):
        require_tensor(target, "target")
    if not isinstance(class_means, Tensor):
        require_tensor(class_means, "class_means")
    if teacher_features is not None:
        require_tensor(teacher_features, "teacher_features")
    if teacher_norms is not None:
        require_tensor(teacher_norms, "teacher_norms")


def require_nd_options(ignore_index: object, reduction: object, eps: object) -> None:
    """Options of Python's types, which alone the operators take; the usual ones need no look."""
    if type(ignore_index) is not int:
        require_integer(ignore_index, "ignore_index")
    if type(reduction) is not str:
        require_reduction(reduction)
    if type(eps) is not float:
        require_number(eps, "eps")


def check_nd_arguments(
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    teacher_features: Tensor | None,
    teacher_norms: Tensor | None,
    reduction: str,
    loss_weight: float | Tensor,
    eps: float,
) -> None:
    """The errors of :func:`dnkd_ext.nd_loss` for everything but targets out of range."""
    require_floating(student_features, "student_features")
    require_floating(class_means, "class_means")
    require_tensor(target, "target")
    if student_features.dim() < 1:
        raise ValueError("student_features must be (..., D), got a 0-dim tensor")
    if class_means.dim() != 2:
        raise ValueError(f"class_means must be (C, D), got shape {list(class_means.shape)}")
    if class_means.shape[0] == 0:
        raise ValueError("class_means must have at least one class")
    if class_means.shape[1] != student_features.shape[-1]:
        raise ValueError(
            f"class_means is {class_means.shape[1]} wide but student_features is "
            f"{student_features.shape[-1]} wide; project the student's features to the width of "
            "the class means"
        )
    require_same_device(class_means, "class_means", student_features, "student_features")
    require_same_device(target, "target", student_features, "student_features")
    rows, shape = student_features.shape[:-1], list(student_features.shape)
    if target.dtype.is_floating_point:
        require_floating(target, "target")
        if target.shape != (*rows, class_means.shape[0]):
            raise ValueError(
                f"target of class probabilities must be (..., C) with C = {class_means.shape[0]} "
                f"classes and the leading shape of student_features {shape}, "
                f"got shape {list(target.shape)}"
            )
    else:
        require_dense(target, "target")
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                "target must hold int64 or int32 class indices or floating class probabilities, "
                f"got {target.dtype}"
            )
        if target.shape != rows:
            raise ValueError(
                "target of class indices must have the leading shape of student_features "
                f"{shape}, got shape {list(target.shape)}; class probabilities are floating"
            )
    if teacher_features is not None and teacher_norms is not None:
        raise ValueError("teacher_features and teacher_norms were both given; pass one of them")
    if teacher_features is not None:
        require_floating(teacher_features, "teacher_features")
        require_same_device(
            teacher_features, "teacher_features", student_features, "student_features"
        )
        if teacher_features.dim() != len(shape) or teacher_features.shape[:-1] != rows:
            raise ValueError(
                f"teacher_features must have the leading shape of student_features {shape}, "
                f"got shape {list(teacher_features.shape)}"
            )
    if teacher_norms is not None:
        require_floating(teacher_norms, "teacher_norms")
        require_same_device(teacher_norms, "teacher_norms", student_features, "student_features")
        if teacher_norms.shape != rows:
            raise ValueError(
                f"teacher_norms must have the leading shape of student_features {shape}, "
                f"got shape {list(teacher_norms.shape)}"
            )
    require_weight(loss_weight, "loss_weight", student_features, "student_features")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if student_features.shape[-1] == 0:
        raise ValueError("student_features must have at least one feature")
    require_reduction(reduction)


@torch.no_grad()
def reference_rows(
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    teacher_features: Tensor | None,
    teacher_norms: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a reference needs of every row besides the student's features.

    Returns:
        ``(counted, named, direction, teacher_norms)``: whether the row counts, whether its target
        names a class, the sum of class means it is to point at, ``(..., D)``, and the teacher's
        norm (0 without a teacher); the last two 0 in rows that do not count.
    """
    dtype = accumulate_dtype(student_features.dtype)
    with no_autocast(student_features):
        means = class_means.detach().to(dtype)
        rows = student_features.shape[:-1]
        counted = torch.ones(rows, dtype=torch.bool, device=student_features.device)
        named = counted
        if target.dtype.is_floating_point:
            direction = target.detach().to(dtype) @ means
        else:
            counted = target != ignore_index
            named = (target >= 0) & (target < means.shape[0])
            check_target(target, counted & ~named, means.shape[0], "rows of class_means")
            direction = means[torch.where(named, target, 0).long()]
        if teacher_features is not None:
            # Formed as the student's, so that equal features have equal norms.
            teacher = teacher_features.detach().to(dtype)
            teacher_norms = (teacher * teacher).sum(-1).sqrt()
        elif teacher_norms is not None:
            teacher_norms = teacher_norms.detach().to(dtype)
        else:
            teacher_norms = torch.zeros(rows, dtype=dtype, device=student_features.device)
        # Whatever an ignored row holds is replaced before anything is computed from it.
        direction = torch.where(counted[..., None], direction, 0)
        teacher_norms = torch.where(counted, teacher_norms, 0)
        return counted, named, direction, teacher_norms


def nd_loss_reference(
    student_features: Tensor,
    target: Tensor,
    class_means: Tensor,
    *,
    teacher_features: Tensor | None = None,
    teacher_norms: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    loss_weight: float | Tensor = 1.0,
    eps: float = 1e-12,
) -> Tensor:
    """:func:`dnkd_ext.nd_loss` in differentiable PyTorch operations, for every device.

    Arguments, result and errors are those of :func:`dnkd_ext.nd_loss`. It upcasts half-precision
    features, runs a dozen kernels, and is differentiable to any order.
    """
    require_nd_options(ignore_index, reduction, eps)
    check_nd_arguments(
        student_features,
        target,
        class_means,
        teacher_features,
        teacher_norms,
        reduction,
        loss_weight,
        eps,
    )
    dtype = accumulate_dtype(student_features.dtype)
    counted, named, direction, teacher_norms = reference_rows(
        student_features, target, class_means, teacher_features, teacher_norms, ignore_index
    )
    with torch.no_grad(), no_autocast(student_features):
        direction_square = (direction * direction).sum(-1)
        unit = direction / torch.where(
            direction_square == 0, 1, direction_square.sqrt().clamp_min(eps)
        ).unsqueeze(-1)
    with no_autocast(student_features):
        student = torch.where(counted[..., None], student_features.to(dtype), 0)
        square = (student * student).sum(-1)
        # The square root has no derivative at 0, and there none is wanted.
        student_norm = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
        # Not torch.maximum: it would halve the gradient where both are equal.
        norm = torch.where(student_norm >= teacher_norms, student_norm, teacher_norms)
        degenerate = (norm <= eps) | (direction_square == 0)
        dot = (student * unit).sum(-1)
        loss = 1 - torch.where(degenerate, 0, dot / torch.where(degenerate, 1, norm))
        sound = (
            square.isfinite() & direction_square.isfinite() & teacher_norms.isfinite() & named
            | ~counted
        )
        # A product, so that the gradient becomes NaN as well, through `square` also where the
        # branch above left none.
        loss = loss + torch.where(sound, 0, math.nan) * square
        loss = torch.where(counted, loss, 0) * loss_weight
        if reduction == "mean":
            loss = loss.sum() / counted.sum().clamp_min(1)
        elif reduction == "sum":
            loss = loss.sum()
        return loss.to(dtype)


# -- what torch has to know about the operators ---------------------------------------------------


def _reference_operator(
    student_features,
    target,
    class_means,
    teacher_features,
    teacher_norms,
    weight,
    loss_weight,
    ignore_index,
    reduction,
    eps,
):
    loss = nd_loss_reference(
        student_features,
        target,
        class_means,
        teacher_features=teacher_features,
        teacher_norms=teacher_norms,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_weight=loss_weight if weight is None else weight,
        eps=eps,
    )
    return loss if weight is None else loss * loss_weight


def _fake(
    student_features,
    target,
    class_means,
    teacher_features,
    teacher_norms,
    weight,
    loss_weight,
    ignore_index,
    reduction,
    eps,
):
    check_nd_arguments(
        student_features,
        target,
        class_means,
        teacher_features,
        teacher_norms,
        reduction,
        1.0 if weight is None else weight,
        eps,
    )
    shape = student_features.shape[:-1] if reduction == "none" else ()
    return student_features.new_empty(shape, dtype=accumulate_dtype(student_features.dtype))


def _fake_mixtures(target, class_means):
    return target.new_empty((target.shape[0], class_means.shape[1]))


def _require_base(base, student_features):
    """As the operator itself does."""
    dtype, device = accumulate_dtype(student_features.dtype), student_features.device
    if base.dim() != 0 or base.dtype != dtype or base.device != device:
        raise RuntimeError(f"base must be a 0-dim tensor of type {dtype} on {device}")


def _fake_added(base, *arguments):
    _require_base(base, arguments[0])
    *arguments, eps = arguments
    loss = _fake(*arguments, "mean", eps)
    return loss, torch.empty_like(loss)


def _fake_forward(
    student_features,
    target,
    directions,
    teacher_features,
    teacher_norms,
    weight,
    loss_weight,
    ignore_index,
    reduction,
    eps,
    needs_gradient,
):
    require_reduction(reduction)
    rows, columns = student_features.shape
    dtype = accumulate_dtype(student_features.dtype)
    loss = student_features.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    if not needs_gradient:
        return loss, student_features.new_empty((0,), dtype=dtype)
    if student_features.dtype == torch.float16 or reduction == "none":
        return loss, student_features.new_empty((rows, 2), dtype=dtype)
    return loss, student_features.new_empty((rows, columns))


def _fake_added_forward(base, *arguments):
    _require_base(base, arguments[0])
    *arguments, eps, needs_gradient = arguments
    loss, saved = _fake_forward(*arguments, "mean", eps, needs_gradient)
    return loss, torch.empty_like(loss), saved


def _fake_backward(upstream, student_features, target, directions, coefficients):
    return student_features.new_empty(student_features.shape)


if _extension.is_loaded():
    _operator = _extension.operator("nd_loss")
    _added = _extension.operator("_nd_loss_added")
    _library = torch.library.Library("dnkd_ext", "FRAGMENT")
    _library.impl("_nd_loss_reference", _reference_operator, "CompositeImplicitAutograd")
    torch.library.register_fake("dnkd_ext::nd_loss", _fake, lib=_library)
    torch.library.register_fake("dnkd_ext::_nd_loss_added", _fake_added, lib=_library)
    torch.library.register_fake("dnkd_ext::_nd_mixtures", _fake_mixtures, lib=_library)
    torch.library.register_fake("dnkd_ext::_nd_loss_forward", _fake_forward, lib=_library)
    torch.library.register_fake(
        "dnkd_ext::_nd_loss_added_forward", _fake_added_forward, lib=_library
    )
    torch.library.register_fake("dnkd_ext::_nd_loss_backward", _fake_backward, lib=_library)


def nd_loss_examples(generator: torch.Generator):
    """Arguments that reach every kernel: a warp and a block per row, with and without vectors.

    float64 tensors are to be brought to the dtype under test, float32 ones stay.
    """
    for width in (3, 64, 1100, 1104, 2304):
        student, teacher, means = (
            torch.randn(rows, width, generator=generator, dtype=torch.float64)
            for rows in (20, 20, 10)
        )
        target = torch.randint(10, (20,), generator=generator)
        # Clearly longer or shorter than the student, so that rounding does not decide which.
        teacher *= torch.where(torch.arange(20) % 2 == 0, 2.0, 0.5)[:, None] * (
            student.norm(dim=1, keepdim=True) / teacher.norm(dim=1, keepdim=True)
        )
        for table in (means, means.float()):
            yield [student, target, table], {"teacher_features": teacher}
            yield [student, target, table], {"teacher_features": teacher, "reduction": "none"}
        yield [student, target.int(), means], {"teacher_norms": teacher.norm(dim=1)}
        yield [student, target, means], {"ignore_index": 3, "reduction": "sum"}
        yield [student, torch.nn.functional.one_hot(target, 10) * 0.9 + 0.01, means], {}


# -- module ---------------------------------------------------------------------------------------


class NDLoss(nn.Module):
    """The ND loss of :func:`dnkd_ext.nd_loss` with its class means as a persistent buffer.

    Args:
        class_means: ``(C, D)`` tensor of a floating dtype, or a :class:`dnkd_ext.ClassMeans`, whose
            ``compute()`` is taken. Classes without a mean get no gradient from this loss; where the
            accumulator lists some as missing, a warning names them.
        ignore_index: see :func:`dnkd_ext.nd_loss`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        loss_weight: a float, or a 0-dim tensor, which becomes a buffer.
        eps: see :func:`dnkd_ext.nd_loss`.

    Shape:
        See :func:`dnkd_ext.nd_loss`: ``criterion(student_features, target, teacher_features=...)``.

    Example:
        >>> criterion = NDLoss(torch.randn(10, 64), loss_weight=2.0)
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> criterion(features, torch.arange(8), teacher_norms=torch.ones(8)).backward()
    """

    class_means: Tensor

    def __init__(
        self,
        class_means: Tensor | ClassMeans,
        *,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        loss_weight: float | Tensor = 1.0,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.register_buffer("class_means", class_means_table(class_means, stacklevel=3))
        require_nd_options(ignore_index, reduction, eps)
        require_reduction(reduction)
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.eps = eps
        require_weight(loss_weight, "loss_weight", loss_weight, "itself")
        if isinstance(loss_weight, Tensor):
            with torch.inference_mode(False):  # else it could never be filled anew
                self.register_buffer("loss_weight", loss_weight.detach().clone())
        else:
            require_finite(loss_weight, "loss_weight")
            self.loss_weight = float(loss_weight)

    def forward(
        self,
        student_features: Tensor,
        target: Tensor,
        *,
        teacher_features: Tensor | None = None,
        teacher_norms: Tensor | None = None,
    ) -> Tensor:
        """The loss of :func:`dnkd_ext.nd_loss` with this module's class means and options."""
        return nd_loss(
            student_features,
            target,
            self.class_means,
            teacher_features=teacher_features,
            teacher_norms=teacher_norms,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            loss_weight=self.loss_weight,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Sizes and options for ``print(module)``."""
        classes, features = self.class_means.shape
        return (
            f"num_classes={classes}, num_features={features}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, loss_weight={self.loss_weight}, eps={self.eps}"
        )


def _has_values(tensor: Tensor) -> bool:
    """Whether numbers can be looked at: not while a graph is traced, transformed or captured."""
    return not (
        tensor.is_meta
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def class_means_table(
    class_means: Tensor | ClassMeans, *, stacklevel: int, warns_of_missing: bool = True
) -> Tensor:
    """The ``(C, D)`` table of a module, its own copy; ``stacklevel`` is that of the warning."""
    from dnkd_ext.class_means import ClassMeans

    if isinstance(class_means, ClassMeans):
        missing = class_means.missing
        if missing and warns_of_missing:
            warnings.warn(
                f"class_means has no samples for {len(missing)} of {class_means.num_classes} "
                f"classes ({shown(missing)}); their rows are zero and samples of these classes get "
                "no gradient from the ND loss",
                UserWarning,
                stacklevel=stacklevel,
            )
        class_means = class_means.compute()
    require_floating(class_means, "class_means")
    if class_means.dim() != 2:
        raise ValueError(f"class_means must be (C, D), got shape {list(class_means.shape)}")
    if _has_values(class_means):
        wrong = rows_not_finite(class_means)
        if wrong:
            raise ValueError(f"class_means is not finite in the classes {shown(wrong)}")
    with torch.inference_mode(False):  # a buffer that training can save for backward
        # Contiguous, or every call would copy a transposed one whole.
        return class_means.detach().clone(memory_format=torch.contiguous_format)
