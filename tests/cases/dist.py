"""The DIST loss, whose terms are of rows and of columns: its definition, inputs, wrong ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dnkd_ext
from tests.cases.base import DTYPES, Arguments, BadInput, Build, LossCase, Truth, option
from tests.cases.logits import bad_logits

# Added to the product of two norms.
EPS = 1e-8

# -- definition -----------------------------------------------------------------------------------


# So many values may be alike to some digits by chance.
FEW = 8


def _pearson(
    y: np.ndarray, other: np.ndarray, *, may_be_alike: bool = False
) -> tuple[float, np.ndarray, np.ndarray]:
    """The correlation, its gradient by y, and the size of the gradient's terms.

    Those are of deviations; of values and means where values may be alike to some digits: no
    arithmetic knows their deviations better than what those digits leave.
    """
    mean, other_mean = y.mean(), other.mean()
    a, b = y - mean, other - other_mean
    # What rounding leaves of a constant.
    a = np.zeros_like(a) if np.abs(a).max() < 1e-15 else a
    b = np.zeros_like(b) if np.abs(b).max() < 1e-15 else b
    long_a, long_b, product = np.linalg.norm(a), np.linalg.norm(b), float(a @ b)
    cross = 1 / (long_a * long_b + EPS)
    own = product * long_b / long_a * cross**2 if long_a > 0 else 0.0
    size = cross * np.abs(b) + abs(own) * np.abs(a)
    if may_be_alike and long_a > 0 and long_b > 0:
        size = cross * (other + other_mean) + abs(own) * (y + mean)
    return product * cross, cross * b - own * a, size


def _squares(y: np.ndarray) -> float:
    """The sum of squares over that of the deviations: what a difference of sums loses."""
    deviation = float(((y - y.mean()) ** 2).sum())
    return float((y**2).sum()) / deviation if deviation > 1e-30 else 0.0


def oracle(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    reduction: str = "mean",
) -> Truth:
    """By the definition: one row and one column after the other."""
    assert reduction == "mean"
    shape = student.shape
    z_s, z_t = (x.numpy().reshape(-1, shape[-1]) for x in (student, teacher))
    rows, classes = z_s.shape
    if not rows:
        return Truth(np.array(0.0), np.array(1.0), np.zeros(shape), np.zeros(shape))

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp((z - z.max(1, keepdims=True)) / tau)
        return e / e.sum(1, keepdims=True)

    y_s, y_t = softmax(z_s), softmax(z_t)
    by_y, by_y_t, sizes = (np.zeros_like(y_s) for _ in range(3))
    inter = intra = 0.0
    for i in range(rows):
        rho, slope, size = _pearson(y_s[i], y_t[i])
        inter += (1 - rho) / rows
        by_y[i] -= tau**2 * beta * slope / rows
        sizes[i] += tau**2 * abs(beta) * size / rows
        by_y_t[i] -= tau**2 * beta * _pearson(y_t[i], y_s[i])[1] / rows
    squares = 0.0
    for k in range(classes):
        rho, slope, size = _pearson(y_s[:, k], y_t[:, k], may_be_alike=rows < FEW)
        intra += (1 - rho) / classes
        by_y[:, k] -= tau**2 * gamma * slope / classes
        sizes[:, k] += tau**2 * abs(gamma) * size / classes
        by_y_t[:, k] -= tau**2 * gamma * _pearson(y_t[:, k], y_s[:, k])[1] / classes
        squares = max(squares, _squares(y_s[:, k]), _squares(y_t[:, k])) if gamma else 0.0
    gradient = y_s * (by_y - (y_s * by_y).sum(1, keepdims=True)) / tau
    magnitude = y_s * (sizes + (y_s * sizes).sum(1, keepdims=True)) / tau
    loss = tau**2 * (beta * inter + gamma * intra)
    # A sum of numbers near 1, each 1 less a correlation; and where values may be alike, what
    # independent relative errors of the probabilities add up to.
    size = tau**2 * (abs(beta) + abs(gamma))
    if rows < FEW:
        size = max(size, np.linalg.norm(by_y * y_s), np.linalg.norm(by_y_t * y_t))
    return Truth(
        np.array(loss),
        np.array(size),
        gradient.reshape(shape),
        magnitude.reshape(shape),
        squares=squares,
    )


def _same_dtype(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0
) -> Tensor:
    y_s, y_t = (student / tau).softmax(-1), (teacher / tau).softmax(-1)

    def lost(dim: int) -> Tensor:
        a, b = (y - y.mean(dim, keepdim=True) for y in (y_s, y_t))
        rho = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + EPS)
        return 1 - rho.mean()

    return tau**2 * (beta * lost(-1) + gamma * lost(0))


# -- inputs ---------------------------------------------------------------------------------------


def _build(**options: Any) -> Build:
    def build(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        return [
            2 * torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(2)
        ], dict(options)

    return build


def _underflowing(g: torch.Generator) -> Arguments:
    # Weights as small as those of a part among others.
    (student, teacher), _ = _build()(g, 1024, 1000, 0)
    return [student, teacher], {"beta": 2.0**-12, "gamma": 2.0**-12}


def _golden(arrays: dict[str, np.ndarray]) -> Iterator[tuple[Arguments, float, np.ndarray]]:
    names = ["student_logits", "teacher_logits"]
    args: list[Any] = [torch.from_numpy(arrays[name]).double() for name in names]
    for tau in (1, 4):
        name = f"dist_b1_g1_tau{tau}"
        yield (args, {"tau": float(tau)}), float(arrays[f"{name}_loss"]), arrays[f"{name}_grad"]


BAD_INPUTS = (
    *bad_logits("tau", least=1),
    *(
        BadInput(
            f"{name} {value}",
            option(**{name: value}),
            ValueError,
            f"{name} must be finite, got {value}",
        )
        for name in ("beta", "gamma")
        for value in (math.nan, -math.inf)
    ),
    BadInput(
        "process group of another type",
        option(process_group="world"),
        TypeError,
        "process_group must be a torch.distributed.ProcessGroup or None, got str",
        is_traceable=False,
    ),
)

# -- operators ------------------------------------------------------------------------------------


def _operator_arguments(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Any, ...]:
    weights = (options.get(name, 1.0) for name in ("beta", "gamma", "tau"))
    return student, teacher, None, None, *weights, 1


def _inner_operators(
    g: torch.Generator, device: str | torch.device
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    ops = torch.ops.dnkd_ext
    for dtype in DTYPES:
        student, teacher = (torch.randn(6, 16, generator=g).to(device, dtype) for _ in range(2))
        yield "_dist_loss_moments", (student, teacher, 2.0)
        rows, moments = ops._dist_loss_moments(student, teacher, 2.0)
        for needs_gradient in (False, True):
            yield "_dist_loss_forward", (student, teacher, 1.5, 0.75, 2.0, needs_gradient)
            yield "_dist_loss_finish", (rows, moments, 1.5, 0.75, 2.0, 2, needs_gradient)
        # What a process group added up, of two processes.
        yield "dist_loss", (student.requires_grad_(), teacher, rows, moments, 1.5, 0.75, 2.0, 2)
        _, columns = ops._dist_loss_finish(rows, moments, 1.5, 0.75, 2.0, 2, True)
        saved = (student.detach(), teacher, rows, columns)
        yield "_dist_loss_backward", (rows.new_ones(()), *saved, 1.5, 2.0)


def _of_the_batch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function without a reduction, as one that takes the only one there is."""

    @functools.wraps(function)
    def loss(*args: Any, reduction: str = "mean", **kwargs: Any) -> Tensor:
        assert reduction == "mean"
        return function(*args, **kwargs)

    return loss


DIST_LOSS = LossCase(
    name="dist_loss",
    fused=_of_the_batch(dnkd_ext.dist_loss),
    reference=_of_the_batch(dnkd_ext.reference.dist_loss),
    oracle=oracle,
    # Scalar tails of each instruction set (1 to 33), whole vectors and a rest (100), several chunks
    # of a row and tiles of columns (1100).
    widths=(1, 2, 7, 33, 100, 1100),
    variants={
        "weights": _build(beta=1.5, gamma=0.75, tau=2.0),
        "inter": _build(gamma=0.0, tau=4.0),
        "intra": _build(beta=0.0),
        "tau=0.5": _build(tau=0.5),
    },
    main="weights",
    smooth=("weights", "inter", "intra"),
    compiled=("weights",),
    per_row=(0, 1),
    teacher=1,
    golden=_golden,
    same_dtype=_same_dtype,
    faults={
        "nan in student": (0, math.nan),
        "inf in student": (0, math.inf),
        "nan in teacher": (1, math.nan),
        "inf in teacher": (1, math.inf),
    },
    bad_inputs=BAD_INPUTS,
    underflowing=_underflowing,
    operator="dist_loss",
    operator_arguments=_operator_arguments,
    inner_operators=_inner_operators,
    teachers_without_copy=((torch.float16, torch.float32), (torch.bfloat16, torch.float32)),
    drops_ignored=False,
    forms_gradient_from_teacher=True,
    forms_gradient_forward=False,
    is_sum_of_rows=False,
    has_loss_weight=False,
)
