"""What a LossCase is, and what the tests do with the arguments it builds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Arguments are built on the CPU in float64 and then brought to the wanted dtype, so that every
# dtype and device sees the same numbers.
Arguments = tuple[list[Any], dict[str, Any]]
# (generator, rows, width of the student's rows, classes of a table of classes)
Build = Callable[[torch.Generator, int, int, int], Arguments]
Where = int | str  # a positional or a keyword argument


@dataclass(frozen=True)
class BadInput:
    """One wrong call: `change` spoils good arguments, `error` and `match` say what must come."""

    name: str
    change: Callable[[list[Any], dict[str, Any]], None]
    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    # Wrong for its values or its Python type, which cannot be seen while a graph is traced.
    is_traceable: bool = True


@dataclass(frozen=True)
class Truth:
    """What a loss must give: values, gradient for upstream 1 everywhere, size of its terms."""

    loss: np.ndarray
    loss_magnitude: np.ndarray
    gradient: np.ndarray
    magnitude: np.ndarray
    # Of a loss that returns its terms: each without its weight.
    terms: tuple[Truth, ...] = ()
    # Of a loss that takes sums of squares for those of deviations, in float64: the largest ratio of
    # the two, which multiplies what float64 rounds.
    squares: float = 0.0

    @property
    def float64_noise(self) -> float:
        """Relative error that float64's rounding of those sums may leave."""
        return 64 * 2.0**-53 * self.squares

    def loss_error(self, loss: Tensor) -> float:
        """Largest difference relative to the largest size of the terms that make up a loss."""
        return _error(loss, self.loss, self.loss_magnitude)

    def gradient_error(self, gradient: Tensor) -> float:
        """Largest difference relative to the largest term: terms may cancel."""
        return _error(gradient, self.gradient, self.magnitude)

    def times(self, weight: float) -> Truth:
        """The truth of a weighted loss."""
        size = abs(weight)
        return Truth(
            self.loss * weight,
            self.loss_magnitude * size,
            self.gradient * weight,
            self.magnitude * size,
        )

    def plus(self, other: Truth) -> Truth:
        """The truth of a sum."""
        return Truth(
            self.loss + other.loss,
            self.loss_magnitude + other.loss_magnitude,
            self.gradient + other.gradient,
            self.magnitude + other.magnitude,
        )


def _error(result: Tensor, expected: np.ndarray, magnitude: np.ndarray) -> float:
    result = result.detach().double().cpu().numpy()
    assert result.shape == expected.shape
    return float(np.abs(result - expected).max(initial=0) / max(magnitude.max(initial=0), 1e-30))


class Rows:
    """A term of a loss, collected row by row; `sizes` are of what each loss is a sum of."""

    def __init__(self, student: Tensor) -> None:
        self.shape = student.shape
        self.losses: list[float | None] = []  # None: the row does not count
        self.sizes: list[float] = []
        self.gradient = np.zeros((math.prod(self.shape[:-1]), self.shape[-1]))
        self.magnitude = np.zeros_like(self.gradient)

    def add(self, loss: float | None, size: float, gradient: Any = 0.0, magnitude: Any = 0.0):
        """The next row."""
        row = len(self.losses)
        self.losses.append(loss)
        self.sizes.append(size)
        self.gradient[row], self.magnitude[row] = gradient, magnitude

    def reduced(self, reduction: str) -> Truth:
        """The truth under a reduction; a mean is over the rows that count."""
        counted = [i for i, loss in enumerate(self.losses) if loss is not None]
        if reduction == "none":
            loss = np.array([loss or 0.0 for loss in self.losses]).reshape(self.shape[:-1])
            size = np.array(self.sizes).reshape(self.shape[:-1])
        else:
            loss = np.array(math.fsum(self.losses[i] for i in counted))
            size = np.array(math.fsum(self.sizes[i] for i in counted))
        truth = Truth(
            loss, size, self.gradient.reshape(self.shape), self.magnitude.reshape(self.shape)
        )
        return truth.times(1 / max(len(counted), 1)) if reduction == "mean" else truth


@dataclass(frozen=True, repr=False)
class LossCase:
    """Everything the shared tests need to know about a loss. Its first argument is the student."""

    name: str
    # Both return the loss alone: see `only_loss` for a function that returns its terms, too.
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    # (arguments as float64 CPU tensors, reduction=...) -> the truth, computed row by row in NumPy.
    oracle: Callable[..., Truth]
    # Widths of the student's rows that between them reach every loop of the kernels.
    widths: tuple[int, ...]
    variants: dict[str, Build]
    # The variant for tests that look at one: with a teacher, and with a target where there is one.
    main: str
    # Variants that have a derivative everywhere once NaN and infinity are replaced.
    smooth: tuple[str, ...]
    # Variants that are compiled, each of which takes seconds.
    compiled: tuple[str, ...]
    # Arguments with a row per row of the student, given or not.
    per_row: tuple[Where, ...]
    teacher: Where
    # Golden vectors: arrays of a file -> (arguments, loss, gradient); None where no file has any.
    golden: Callable[[dict[str, np.ndarray]], Iterator[tuple[Arguments, float, np.ndarray]]] | None
    # The mean loss in plain PyTorch operations in the inputs' own dtype.
    same_dtype: Callable[..., Tensor]
    # name -> where a value makes the loss of its row NaN, and the value
    faults: dict[str, tuple[Where, float]]
    bad_inputs: tuple[BadInput, ...]
    # Arguments whose float16 gradient underflows unless it is scaled before it is rounded.
    underflowing: Callable[[torch.Generator], Arguments]
    # The operator is torch.ops.dnkd_ext.<operator>; (arguments) -> the operator's arguments.
    operator: str
    operator_arguments: Callable[..., tuple[Any, ...]]
    # (generator, device) -> calls of the operators behind it: names and arguments
    inner_operators: Callable[
        [torch.Generator, str | torch.device], Iterator[tuple[str, tuple[Any, ...]]]
    ]
    # Dtypes of student and teacher between which no copy of the teacher is made.
    teachers_without_copy: tuple[tuple[torch.dtype, torch.dtype], ...]
    # Where the class indices are; None for a loss without.
    target: int | None = None
    # Ignored rows have no loss at all.
    drops_ignored: bool = True
    # A gradient that is formed in the backward pass is formed from the teacher, too.
    forms_gradient_from_teacher: bool = False
    # The forward pass forms the gradient where its dtype keeps it for any upstream gradient.
    forms_gradient_forward: bool = True
    # Each row has a loss of its own, and there is a reduction; else the loss is called "mean".
    is_sum_of_rows: bool = True
    # It takes loss_weight.
    has_loss_weight: bool = True

    @property
    def reductions(self) -> tuple[str, ...]:
        """The reductions there are, the usual one first."""
        return ("mean", "sum", "none") if self.is_sum_of_rows else ("mean",)

    def __repr__(self) -> str:
        return f"LossCase({self.name})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


def only_loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function that returns a named tuple of terms, as one that returns its loss."""

    @functools.wraps(function)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs).loss

    return loss


# -- arguments ------------------------------------------------------------------------------------


def tensors_of(arguments: Arguments) -> dict[Where, Tensor]:
    """The tensors among the arguments, by where they are; the student is 0."""
    args, kwargs = arguments
    return {
        where: value
        for where, value in [*enumerate(args), *kwargs.items()]
        if isinstance(value, Tensor)
    }


def replaced(arguments: Arguments, changes: dict[Where, Any]) -> Arguments:
    """New arguments with other values in some places."""
    args, kwargs = list(arguments[0]), dict(arguments[1])
    for where, value in changes.items():
        (args if isinstance(where, int) else kwargs)[where] = value
    return args, kwargs


def rows_of(case: LossCase, arguments: Arguments) -> dict[Where, Tensor]:
    """The tensors that have a row per row of the student."""
    return {where: t for where, t in tensors_of(arguments).items() if where in case.per_row}


def convert(arguments: Arguments, dtype: torch.dtype, device: str | torch.device) -> Arguments:
    """Floating tensors to a dtype and everything to a device; the student as a fresh leaf."""
    changes = {
        where: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        for where, value in tensors_of(arguments).items()
    }
    args, kwargs = replaced(arguments, changes)
    args[0] = args[0].detach().clone().requires_grad_()
    return args, kwargs


def as_float64(arguments: Arguments) -> Arguments:
    """The same numbers in float64 on the CPU."""
    changes = {
        where: value.detach().cpu().to(torch.float64 if value.is_floating_point() else value.dtype)
        for where, value in tensors_of(arguments).items()
    }
    return replaced(arguments, changes)


def finite(arguments: Arguments) -> Arguments:
    """NaN and infinity replaced: finite differences cannot step away from them."""
    with torch.no_grad():
        for tensor in tensors_of(arguments).values():
            if tensor.is_floating_point():
                tensor.nan_to_num_(0.5, posinf=1.0, neginf=-1.0)
    return arguments


def truth(case: LossCase, arguments: Arguments, reduction: str) -> Truth:
    """The oracle's answer to the very numbers of the arguments."""
    args, kwargs = as_float64(arguments)
    return case.oracle(*args, **kwargs, reduction=reduction)


# -- spoiling them --------------------------------------------------------------------------------


def put(position: int, change: Callable[[Any], Any]):
    """Changes a positional argument."""

    def apply(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[position] = change(args[position])

    return apply


def option(**options: Any):
    """Sets keyword arguments, to values or to what functions of the arguments return."""

    def apply(args: list[Any], kwargs: dict[str, Any]) -> None:
        for key, value in options.items():
            kwargs[key] = value(args, kwargs) if callable(value) else value

    return apply


def bad_weight(name: str) -> tuple[BadInput, ...]:
    """Wrong values of a weight that is a float or a 0-dim tensor."""
    return (
        BadInput(
            f"{name} is a vector",
            option(**{name: lambda a, k: torch.ones(2)}),
            ValueError,
            f"{name} must be a float or a 0-dim tensor",
        ),
        BadInput(
            f"{name} needs a gradient",
            option(**{name: lambda a, k: torch.ones((), requires_grad=True)}),
            ValueError,
            f"{name} must not require a gradient",
        ),
    )


BAD_REDUCTION = BadInput(
    "unknown reduction",
    option(reduction="average"),
    ValueError,
    "reduction must be 'none', 'mean' or 'sum', got 'average'",
)
