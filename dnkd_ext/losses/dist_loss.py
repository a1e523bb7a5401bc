"""The DIST loss: the student's predictions correlated with the teacher's, by row and by column.

Source: "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnkd_ext import _extension
from dnkd_ext._checks import (
    accumulate_dtype,
    no_autocast,
    require_floating,
    require_number,
    require_same_device,
    require_tensor,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["dist_loss", "dist_loss_reference"]

# Added to the product of the norms, as in the authors' code.
EPS = 1e-8
# A sum of squared deviations below this part of the sum of squares is rounding: no deviation.
# csrc/ops/dist_loss_terms.inc has the same numbers.
ROUNDING = {torch.float32: 1e-12, torch.float64: 1e-14}

# Values per row that the kernels keep; csrc/ops/dist_loss.h has the same number.
ROW_VALUES = 8


# -- functional -----------------------------------------------------------------------------------


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Correlate the student's class probabilities with the teacher's, by sample and by class.

    With :math:`y = \mathrm{softmax}(z / \tau)` of the student and of the teacher, and
    :math:`\rho` Pearson's correlation (1e-8 is added to the product of the norms):

    .. math::
        \ell = \tau^2 \Bigl[ \beta \bigl(1 - \operatorname{mean}_i
        \rho(y^s_{i \cdot}, y^t_{i \cdot})\bigr) + \gamma \bigl(1 - \operatorname{mean}_k
        \rho(y^s_{\cdot k}, y^t_{\cdot k})\bigr) \Bigr]

    over the rows i (inter) and the classes k (intra). A row or column that does not vary beyond
    rounding has a correlation of 0: a batch of one row leaves only the inter part a gradient, and
    one class gives ``tau**2 * (beta + gamma)`` and no gradient. A NaN anywhere makes the loss NaN.

    The compiled kernels form no probabilities in memory: the forward pass keeps 8 numbers per row
    and 4 per class, from which the backward pass forms the gradient, the upstream gradient folded
    in. Where they are not available, and under the transforms of ``torch.func``,
    :func:`dnkd_ext.reference.dist_loss` computes the same.

    Args:
        student_logits: ``(..., C)``, float16, bfloat16, float32 or float64. Rows of stride-1
            logits are read in place whatever the stride between rows.
        teacher_logits: ``(..., C)``, any of the four dtypes; gets no gradient. Those of another
            dtype than the student's and than the loss's are converted once. They must not change
            before the backward pass.
        beta: weight of the inter part.
        gamma: weight of the intra part.
        tau: temperature, greater than 0.
        process_group: correlates the columns over the rows of all processes of this group
            (``torch.distributed.group.WORLD`` for all) by one all-reduce of the column moments, in
            float64; the inter part stays over this process's rows. The gradient of the intra part
            is multiplied by the number of processes, so that the mean over processes that
            ``DistributedDataParallel`` takes is the gradient of one process with the whole batch,
            where all have equally many rows. Every process of the group must call it. Second
            derivatives are refused. None correlates the local rows alone.

    Returns:
        The loss, 0-dim: float32 for half-precision students, else of the student's dtype; 0 without
        rows. The gradient has the student's dtype.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: a wrong shape, or a weight or temperature that is not finite or not positive.
        RuntimeError: arguments on different devices.

    Example:
        >>> student = torch.randn(8, 100, requires_grad=True)
        >>> dist_loss(student, torch.randn(8, 100), beta=2.0, gamma=2.0, tau=4.0).backward()
    """
    if not isinstance(student_logits, Tensor) or not _extension.has_kernel_for(student_logits):
        return dist_loss_reference(
            student_logits,
            teacher_logits,
            beta=beta,
            gamma=gamma,
            tau=tau,
            process_group=process_group,
        )
    require_tensor(teacher_logits, "teacher_logits")
    _require_numbers(beta, gamma, tau)
    rows, moments, processes = None, None, 1
    if process_group is not None:
        _check(student_logits, teacher_logits, beta, gamma, tau)
        processes = _size(process_group)
        rows, moments = _local_moments(student_logits, teacher_logits, tau)
        torch.distributed.all_reduce(moments, group=process_group)
    return _operator(student_logits, teacher_logits, rows, moments, beta, gamma, tau, processes)


def _require_numbers(beta: object, gamma: object, tau: object) -> None:
    for value, name in ((beta, "beta"), (gamma, "gamma"), (tau, "tau")):
        if type(value) is not float:
            require_number(value, name)


def _check(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float, tau: float
) -> None:
    require_floating(student_logits, "student_logits")
    require_floating(teacher_logits, "teacher_logits")
    if student_logits.dim() < 1:
        raise ValueError("student_logits must be (..., C), got a 0-dim tensor")
    if student_logits.shape[-1] < 1:
        raise ValueError("student_logits must have at least 1 class, got 0")
    require_same_device(teacher_logits, "teacher_logits", student_logits, "student_logits")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits {list(student_logits.shape)}, "
            f"got shape {list(teacher_logits.shape)}"
        )
    # Comparisons, which can be traced; a NaN fails them.
    _require_numbers(beta, gamma, tau)
    for value, name in ((beta, "beta"), (gamma, "gamma")):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be finite and greater than 0, got {tau}")


def require_process_group(process_group: object) -> None:
    """TypeError unless the value is a group of torch.distributed."""
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, "
            f"got {type(process_group).__name__}"
        )


def _size(process_group: ProcessGroup) -> int:
    require_process_group(process_group)
    return torch.distributed.get_world_size(process_group)


@torch.no_grad()
def _local_moments(
    student_logits: Tensor, teacher_logits: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """What `_dist_loss_moments` returns for logits of any layout and dtype."""
    with no_autocast(student_logits):
        student, teacher = student_logits.detach(), teacher_logits.detach()
        wide = accumulate_dtype(student.dtype)
        if teacher.dtype not in (student.dtype, wide):
            teacher = teacher.to(wide)
        student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher))
        student, teacher = (
            logits if logits.stride(1) == 1 else logits.contiguous()
            for logits in (student, teacher)
        )
        return torch.ops.dnkd_ext._dist_loss_moments.default(student, teacher, tau)


# -- reference ------------------------------------------------------------------------------------


def _rounding(dtype: torch.dtype, rows: int) -> float:
    """That part of a column of so many rows; of float64 it grows with their number."""
    return ROUNDING[dtype] * (max(rows / 64, 1) if dtype == torch.float64 else 1)


def _root(square: Tensor) -> Tensor:
    # The square root has no derivative at 0, and there none is wanted.
    is_zero = square == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, square).sqrt())


def _pearson(product: Tensor, student_square: Tensor, teacher_square: Tensor) -> Tensor:
    return product / (_root(student_square) * _root(teacher_square) + EPS)


def _zero(value: Tensor, where: Tensor) -> Tensor:
    """0 where asked for, with the derivative that the value has."""
    return torch.where(where, value - value.detach(), value)


def _correlation(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension."""
    rounding = _rounding(student.dtype, student.shape[0]) if dim == 0 else ROUNDING[student.dtype]

    def centred(y: Tensor) -> tuple[Tensor, Tensor]:
        deviation = y - y.mean(dim, keepdim=True)
        squares = (deviation * deviation).sum(dim, keepdim=True)
        return deviation, squares <= rounding * (y * y).sum(dim, keepdim=True)

    a, is_flat = centred(student)
    a = _zero(a, is_flat)
    b, is_flat = centred(teacher)
    b = torch.where(is_flat, 0, b)
    return _pearson((a * b).sum(dim), (a * a).sum(dim), (b * b).sum(dim))


class _OnceDifferentiable(torch.autograd.Function):
    """Passes a value on, and refuses its second derivative."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def _global_correlation(student: Tensor, teacher: Tensor, process_group: ProcessGroup) -> Tensor:
    """That of the columns over the rows of all processes; its derivative by the local rows."""
    # The other processes' sums enter as constants, which is right for the first derivative alone.
    s, t = _OnceDifferentiable.apply(student.double()), teacher.double()
    local = torch.stack([x.sum(0) for x in (s, t, s * s, t * t, s * t)])
    reduced = torch.cat([local.detach().flatten(), local.new_tensor([float(s.shape[0])])])
    torch.distributed.all_reduce(reduced, group=process_group)
    rows = reduced[-1].clamp_min(1)
    rounding = ROUNDING[student.dtype]
    if student.dtype == torch.float64:
        rounding = rounding * (rows / 64).clamp_min(1)
    sum_s, sum_t, square_s, square_t, product = local + (
        reduced[:-1].view_as(local) - local.detach()
    )
    deviation_s, deviation_t = square_s - sum_s * sum_s / rows, square_t - sum_t * sum_t / rows
    flat_s, flat_t = deviation_s <= rounding * square_s, deviation_t <= rounding * square_t
    product = _zero(product - sum_s * sum_t / rows, flat_s)
    return _pearson(
        torch.where(flat_t, 0, product),
        _zero(deviation_s, flat_s),
        torch.where(flat_t, 0, deviation_t),
    )


def dist_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """:func:`dnkd_ext.dist_loss` in differentiable PyTorch operations, for every device.

    Arguments, result and errors are those of :func:`dnkd_ext.dist_loss`. It upcasts half-precision
    logits and is differentiable to any order; with ``process_group`` once, and a second derivative
    is a RuntimeError.
    """
    _check(student_logits, teacher_logits, beta, gamma, tau)
    processes = 1 if process_group is None else _size(process_group)
    dtype = accumulate_dtype(student_logits.dtype)
    with no_autocast(student_logits):
        student, teacher = (
            (logits.reshape(-1, logits.shape[-1]).to(dtype) / tau).softmax(-1)
            for logits in (student_logits, teacher_logits.detach())
        )
        has_rows = student.shape[0] > 0
        nothing = None if has_rows else student.sum()  # 0, and so its gradient
        inter = 1 - _correlation(student, teacher, 1).mean() if has_rows else nothing
        if process_group is not None:
            intra = 1 - _global_correlation(student, teacher, process_group).mean()
            # Multiplies the gradient alone.
            intra = processes * intra - (processes - 1) * intra.detach()
        else:
            intra = 1 - _correlation(student, teacher, 0).mean() if has_rows else nothing
        return (tau**2 * (beta * inter + gamma * intra)).to(dtype)


# -- what torch has to know about the operators ---------------------------------------------------


def _reference_operator(student_logits, teacher_logits, beta, gamma, tau):
    return dist_loss_reference(student_logits, teacher_logits, beta=beta, gamma=gamma, tau=tau)


def _fake(student_logits, teacher_logits, rows, moments, beta, gamma, tau, processes):
    _check(student_logits, teacher_logits, beta, gamma, tau)
    return student_logits.new_empty((), dtype=accumulate_dtype(student_logits.dtype))


def _fake_forward(student_logits, teacher_logits, beta, gamma, tau, needs_gradient):
    rows, moments = _fake_moments(student_logits, teacher_logits, tau)
    loss, columns = _fake_finish(rows, moments, beta, gamma, tau, 1, needs_gradient)
    return loss, rows, columns


def _fake_moments(student_logits, teacher_logits, tau):
    rows, columns = student_logits.shape
    dtype = accumulate_dtype(student_logits.dtype)
    return (
        student_logits.new_empty((rows, ROW_VALUES), dtype=dtype),
        student_logits.new_empty((5 * columns + 1,), dtype=torch.float64),
    )


def _fake_finish(rows, moments, beta, gamma, tau, processes, needs_gradient):
    columns = (moments.shape[0] - 1) // 5
    shape = (4, columns) if needs_gradient else (0,)
    return rows.new_empty(()), rows.new_empty(shape)


def _fake_backward(upstream, student_logits, teacher_logits, rows, columns, beta, tau):
    return student_logits.new_empty(student_logits.shape)


if _extension.is_loaded():
    _operator = _extension.operator("dist_loss")
    _library = torch.library.Library("dnkd_ext", "FRAGMENT")
    _library.impl("_dist_loss_reference", _reference_operator, "CompositeImplicitAutograd")
    torch.library.register_fake("dnkd_ext::dist_loss", _fake, lib=_library)
    torch.library.register_fake("dnkd_ext::_dist_loss_forward", _fake_forward, lib=_library)
    torch.library.register_fake("dnkd_ext::_dist_loss_moments", _fake_moments, lib=_library)
    torch.library.register_fake("dnkd_ext::_dist_loss_finish", _fake_finish, lib=_library)
    torch.library.register_fake("dnkd_ext::_dist_loss_backward", _fake_backward, lib=_library)


def dist_loss_examples(generator: torch.Generator):
    """Arguments that reach every kernel: few and many classes, with and without vectors.

    float64 tensors are to be brought to the dtype under test.
    """
    for rows, classes in ((40, 3), (12, 100), (20, 1000), (12, 1001), (6, 9000)):
        student, teacher = (
            2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        for tau in (1.0, 4.0):
            yield [student, teacher], {"beta": 2.0, "gamma": 0.5, "tau": tau}
        yield [student, teacher.float()], {"tau": 2.0}
