"""One LossCase per loss; the tests of parity, autograd, compilation and errors iterate over them.

A new loss adds an entry to CASES and is then held to everything the others are held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dnkd_ext

# The rows of a width: 1 and 7 (scalar tails), 33 (odd rows: no vector loads), 64 (whole vectors),
# 136 (whole vectors of each instruction set and a remainder of most), 1100 (a block per row).
WIDTHS = (1, 7, 33, 64, 136, 1100)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Arguments are built on the CPU in float64 and then brought to the wanted dtype, so that every
# dtype and device sees the same numbers.
Arguments = tuple[list[Any], dict[str, Any]]


@dataclass(frozen=True)
class BadInput:
    """One wrong call: `change` spoils good arguments, `error` and `match` say what must come."""

    name: str
    change: Callable[[list[Any], dict[str, Any]], None]
    error: type[Exception]
    match: str


@dataclass(frozen=True, repr=False)
class LossCase:
    """Everything the shared tests need to know about a loss. Its first argument is the student."""

    name: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    # (arguments as float64 CPU tensors) -> loss per row (None: the row does not count), gradient,
    # and the size of the terms the gradient is a sum of, computed row by row in NumPy.
    oracle: Callable[..., tuple[list[float | None], np.ndarray, np.ndarray]]
    # name -> build(generator, rows, width, classes)
    variants: dict[str, Callable[[torch.Generator, int, int, int], Arguments]]
    # golden vectors: arrays of a file -> [(arguments, loss, gradient)]
    golden: Callable[[dict[str, np.ndarray]], Iterator[tuple[Arguments, float, np.ndarray]]]
    bad_inputs: tuple[BadInput, ...] = field(default=())
    # (arguments) -> the operator behind them and its arguments
    operator: Callable[..., tuple[Any, tuple[Any, ...]]] | None = None

    def __repr__(self) -> str:
        return f"LossCase({self.name})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


def convert(arguments: Arguments, dtype: torch.dtype, device: str | torch.device) -> Arguments:
    """Floating tensors to a dtype and everything to a device; the student as a fresh leaf."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wanted = dtype if value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=wanted)

    args, kwargs = arguments
    args = [one(value) for value in args]
    args[0] = args[0].detach().clone().requires_grad_()
    return args, {key: one(value) for key, value in kwargs.items()}


def as_float64(arguments: Arguments) -> Arguments:
    """The same numbers in float64 on the CPU."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            return value.double() if value.is_floating_point() else value
        return value

    args, kwargs = arguments
    return [one(value) for value in args], {key: one(value) for key, value in kwargs.items()}


@dataclass(frozen=True)
class Truth:
    """What a loss must give: values, gradient for upstream 1 everywhere, size of its terms."""

    loss: np.ndarray
    loss_magnitude: np.ndarray
    gradient: np.ndarray
    magnitude: np.ndarray

    def loss_error(self, loss: Tensor) -> float:
        """Largest difference relative to the largest value, or to 1 a row: 1 - cos may cancel."""
        return _error(loss, self.loss, self.loss_magnitude)

    def gradient_error(self, gradient: Tensor) -> float:
        """Largest difference relative to the largest term: terms may cancel."""
        return _error(gradient, self.gradient, self.magnitude)


def _error(result: Tensor, expected: np.ndarray, magnitude: np.ndarray) -> float:
    result = result.detach().double().cpu().numpy()
    assert result.shape == expected.shape
    return float(np.abs(result - expected).max(initial=0) / max(magnitude.max(initial=0), 1e-30))


def truth(case: LossCase, arguments: Arguments, reduction: str) -> Truth:
    """The oracle's answer under a reduction and a weight."""
    args, kwargs = as_float64(arguments)
    weight = float(kwargs.get("loss_weight", 1.0))
    losses, gradient, magnitude = case.oracle(*args, **kwargs)
    counted = [loss for loss in losses if loss is not None]
    scale = weight / max(len(counted), 1) if reduction == "mean" else weight
    if reduction == "none":
        loss = np.array([loss or 0.0 for loss in losses]).reshape(args[0].shape[:-1])
    else:
        loss = np.array(math.fsum(counted))
    loss_magnitude = np.abs(loss) + (1 if reduction == "none" else len(counted))
    return Truth(
        np.array(loss * scale),
        np.array(loss_magnitude * abs(scale)),
        gradient * scale,
        magnitude * abs(scale),
    )


# -- ND loss --------------------------------------------------------------------------------------


def nd_oracle(
    student: Tensor,
    target: Tensor,
    class_means: Tensor,
    *,
    teacher_features: Tensor | None = None,
    teacher_norms: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
    **_: Any,
) -> tuple[list[float | None], np.ndarray, np.ndarray]:
    """The definition of the loss, row by row."""
    width = student.shape[-1]
    rows = student.reshape(-1, width).numpy()
    gradient, magnitude = np.zeros_like(rows), np.zeros_like(rows)
    losses: list[float | None] = []
    soft = target.is_floating_point()
    labels = target.reshape(-1, target.shape[-1]) if soft else target.reshape(-1)
    for i, f in enumerate(rows):
        if not soft and int(labels[i]) == ignore_index:
            losses.append(None)
            continue
        if soft:
            c = np.zeros(width)
            for k in range(class_means.shape[0]):
                c = c + float(labels[i, k]) * class_means[k].numpy()
        else:
            c = class_means[int(labels[i])].numpy()
        if teacher_features is not None:
            teacher = float(
                np.linalg.norm(teacher_features.reshape(-1, teacher_features.shape[-1])[i].numpy())
            )
        elif teacher_norms is not None:
            teacher = float(teacher_norms.reshape(-1)[i])
        else:
            teacher = 0.0
        length = float(np.linalg.norm(f))
        longest = max(length, teacher)
        if longest <= eps or not c.any():
            losses.append(1.0)
            continue
        e = c / max(float(np.linalg.norm(c)), eps)
        projection = float(f @ e)
        losses.append(1 - projection / longest)
        gradient[i] = -e / longest
        magnitude[i] = np.abs(e) / longest
        if length >= teacher:
            gradient[i] += projection * f / longest**3
            magnitude[i] += np.abs(projection * f) / longest**3
    return losses, gradient.reshape(student.shape), magnitude.reshape(student.shape)


def _nd_base(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    student = draw(rows, width)
    target = torch.randint(classes, (rows,), generator=g)
    return [student, target, draw(classes, width)], {}


def _nd_teacher(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    args, kwargs = _nd_base(g, rows, width, classes)
    # Lengths on both sides of the student's.
    scale = 0.5 + torch.rand(rows, 1, generator=g, dtype=torch.float64)
    kwargs["teacher_features"] = torch.randn(rows, width, generator=g, dtype=torch.float64) * scale
    return args, kwargs


def _nd_norms(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    args, kwargs = _nd_teacher(g, rows, width, classes)
    kwargs["teacher_norms"] = kwargs.pop("teacher_features").norm(dim=-1)
    args[1] = args[1].int()
    return args, kwargs


def _nd_ignored(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    args, kwargs = _nd_teacher(g, rows, width, classes)
    ignored = torch.rand(rows, generator=g) < 0.4
    args[1] = torch.where(ignored, 255, args[1])
    args[0][ignored] = math.nan  # whatever such a row holds
    kwargs["teacher_features"][ignored] = math.inf
    kwargs["ignore_index"] = 255
    return args, kwargs


def _nd_soft(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    args, kwargs = _nd_teacher(g, rows, width, classes)
    args[1] = torch.rand(rows, classes, generator=g, dtype=torch.float64).softmax(-1)
    return args, kwargs


def _nd_weighted(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    args, kwargs = _nd_teacher(g, rows, width, classes)
    kwargs["loss_weight"] = torch.tensor(2.5, dtype=torch.float64)
    return args, kwargs


def _nd_degenerate(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
    args, kwargs = _nd_teacher(g, rows, width, classes)
    if rows:
        args[0][0] = 0
        kwargs["teacher_features"][0] = 0  # both of length 0
    if rows > 1:
        args[0][1] = 0  # a student of length 0 under a teacher
    args[2][0] = 0  # a class without a mean
    if rows > 2:
        args[1][2] = 0
    if rows > 3:
        kwargs["teacher_features"][3] = args[0][3]  # a tie
    return args, kwargs


def _nd_golden(arrays: dict[str, np.ndarray]) -> Iterator[tuple[Arguments, float, np.ndarray]]:
    tensor = lambda name: torch.from_numpy(arrays[name])  # noqa: E731
    args = [tensor("student").double(), tensor("labels"), tensor("class_means").double()]
    yield (
        (args, {"teacher_features": tensor("teacher").double()}),
        float(arrays["nd_loss"]),
        arrays["nd_grad"],
    )


def _set(position: int, change: Callable[[Any], Any]):
    def apply(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[position] = change(args[position])

    return apply


def _option(**options: Any):
    def apply(args: list[Any], kwargs: dict[str, Any]) -> None:
        for key, value in options.items():
            kwargs[key] = value(args, kwargs) if callable(value) else value

    return apply


ND_BAD_INPUTS = (
    BadInput("student is a list", _set(0, lambda x: [1.0]), TypeError, "student_features"),
    BadInput(
        "student is integer", _set(0, lambda x: x.long()), TypeError, "student_features must be"
    ),
    BadInput(
        "student is 0-dim",
        _set(0, lambda x: x.sum()),
        ValueError,
        r"student_features must be \(\.\.\., D\)",
    ),
    BadInput(
        "student has no features",
        lambda a, k: (_set(0, lambda x: x[:, :0])(a, k), _set(2, lambda x: x[:, :0])(a, k)),
        ValueError,
        "at least one feature",
    ),
    BadInput(
        "class means is 3-dim",
        _set(2, lambda x: x[None]),
        ValueError,
        r"class_means must be \(C, D\), got shape",
    ),
    BadInput(
        "class means is integer", _set(2, lambda x: x.int()), TypeError, "class_means must be"
    ),
    BadInput(
        "class means of another width",
        _set(2, lambda x: x[:, :-1]),
        ValueError,
        r"class_means is \d+ wide but student_features is \d+ wide; project",
    ),
    BadInput(
        "target is a list", _set(1, lambda x: x.tolist()), (TypeError, RuntimeError), "target"
    ),
    BadInput(
        "target is bool", _set(1, lambda x: x > 0), TypeError, "target must hold int64 or int32"
    ),
    BadInput(
        "target is int16",
        _set(1, lambda x: x.short()),
        TypeError,
        "target must hold int64 or int32",
    ),
    BadInput(
        "target too long",
        _set(1, lambda x: torch.cat([x, x])),
        ValueError,
        "target of class indices must have the leading shape",
    ),
    BadInput(
        "target of too few probabilities",
        _set(1, lambda x: torch.rand(len(x), 2)),
        ValueError,
        "target of class probabilities must be",
    ),
    BadInput(
        "target above",
        _set(1, lambda x: x.index_fill(0, torch.tensor([3]), 9)),
        IndexError,
        r"target\[3\] = 9 is out of range for 5 rows of class_means",
    ),
    BadInput(
        "target negative",
        _set(1, lambda x: x.index_fill(0, torch.tensor([2]), -1)),
        IndexError,
        r"target\[2\] = -1 is out of range",
    ),
    BadInput(
        "both teacher arguments",
        _option(teacher_norms=lambda a, k: torch.ones(len(a[0]))),
        ValueError,
        "teacher_features and teacher_norms were both given",
    ),
    BadInput(
        "teacher too short",
        _option(teacher_features=lambda a, k: k["teacher_features"][1:]),
        ValueError,
        "teacher_features must have the leading shape",
    ),
    BadInput(
        "teacher integer",
        _option(teacher_features=lambda a, k: k["teacher_features"].long()),
        TypeError,
        "teacher_features must be",
    ),
    BadInput(
        "norms of wrong shape",
        _option(teacher_features=None, teacher_norms=lambda a, k: torch.ones(len(a[0]), 1)),
        ValueError,
        "teacher_norms must have the leading shape",
    ),
    BadInput(
        "unknown reduction",
        _option(reduction="average"),
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'average'",
    ),
    BadInput(
        "negative eps", _option(eps=-1.0), ValueError, "eps must be finite and not negative, got -1"
    ),
    BadInput(
        "weight is a vector",
        _option(loss_weight=lambda a, k: torch.ones(2)),
        ValueError,
        "loss_weight must be a float or a 0-dim tensor",
    ),
    BadInput(
        "weight needs a gradient",
        _option(loss_weight=lambda a, k: torch.ones((), requires_grad=True)),
        ValueError,
        "loss_weight must not require a gradient",
    ),
)


def _nd_operator(student, target, class_means, **options):
    weight = options.get("loss_weight", 1.0)
    is_tensor = isinstance(weight, Tensor)
    return torch.ops.dnkd_ext.nd_loss.default, (
        student,
        target,
        class_means,
        options.get("teacher_features"),
        options.get("teacher_norms"),
        weight if is_tensor else None,
        1.0 if is_tensor else weight,
        options.get("ignore_index", -100),
        options.get("reduction", "mean"),
        options.get("eps", 1e-12),
    )


ND_LOSS = LossCase(
    name="nd_loss",
    fused=dnkd_ext.nd_loss,
    reference=dnkd_ext.reference.nd_loss,
    oracle=nd_oracle,
    variants={
        "direction_only": _nd_base,
        "teacher_features": _nd_teacher,
        "teacher_norms": _nd_norms,
        "ignored": _nd_ignored,
        "probabilities": _nd_soft,
        "weight_tensor": _nd_weighted,
        "degenerate": _nd_degenerate,
    },
    golden=_nd_golden,
    bad_inputs=ND_BAD_INPUTS,
    operator=_nd_operator,
)

CASES = (ND_LOSS,)
