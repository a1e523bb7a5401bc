"""The ND loss: its definition in NumPy, inputs of every kind, and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dnkd_ext
from tests.cases.base import (
    BAD_REDUCTION,
    Arguments,
    BadInput,
    LossCase,
    Rows,
    Truth,
    bad_weight,
    option,
    put,
)

# 1 and 7 (scalar tails), 33 (odd rows: no vector loads), 64 (whole vectors), 136 (whole vectors of
# each instruction set and a remainder of most), 1100 (a block per row).
WIDTHS = (1, 7, 33, 64, 136, 1100)


def nd_oracle(
    student: Tensor,
    target: Tensor,
    class_means: Tensor,
    *,
    teacher_features: Tensor | None = None,
    teacher_norms: Tensor | None = None,
    ignore_index: int = -100,
    loss_weight: float | Tensor = 1.0,
    eps: float = 1e-12,
    reduction: str = "mean",
) -> Truth:
    """The definition of the loss, row by row."""
    width = student.shape[-1]
    rows = Rows(student)
    soft = target.is_floating_point()
    labels = target.reshape(-1, target.shape[-1]) if soft else target.reshape(-1)
    for i, f in enumerate(student.reshape(-1, width).numpy()):
        if not soft and int(labels[i]) == ignore_index:
            rows.add(None, 1)
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
            rows.add(1.0, 2)
            continue
        e = c / max(float(np.linalg.norm(c)), eps)
        projection = float(f @ e)
        loss = 1 - projection / longest
        gradient, magnitude = -e / longest, np.abs(e) / longest
        if length >= teacher:
            gradient = gradient + projection * f / longest**3
            magnitude = magnitude + np.abs(projection * f) / longest**3
        rows.add(loss, abs(loss) + 1, gradient, magnitude)  # 1 - cos may cancel
    return rows.reduced(reduction).times(float(loss_weight))


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
        args[0][3] = 0
        args[0][3, 0] = 3  # a length that every dtype and every order of summation gives exactly
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


def _nd_same_dtype(
    student: Tensor, target: Tensor, class_means: Tensor, *, teacher_features: Tensor
) -> Tensor:
    unit = torch.nn.functional.normalize(class_means[target], dim=-1)
    norm = torch.maximum(student.norm(dim=-1), teacher_features.norm(dim=-1))
    return (1 - (student * unit).sum(-1) / norm).mean()


def _nd_underflowing(g: torch.Generator) -> Arguments:
    """4096 x 1024: a gradient element is about 1e-8, below float16's smallest of 6e-8."""
    args, kwargs = _nd_teacher(g, 4096, 1024, 10)
    kwargs["teacher_features"] *= 8
    return args, kwargs


ND_BAD_INPUTS = (
    BadInput(
        "student is a list",
        put(0, lambda x: [1.0]),
        TypeError,
        "student_features",
        is_traceable=False,
    ),
    BadInput(
        "student is integer", put(0, lambda x: x.long()), TypeError, "student_features must be"
    ),
    BadInput(
        "student is 0-dim",
        put(0, lambda x: x.sum()),
        ValueError,
        r"student_features must be \(\.\.\., D\)",
    ),
    BadInput(
        "student has no features",
        lambda a, k: (put(0, lambda x: x[:, :0])(a, k), put(2, lambda x: x[:, :0])(a, k)),
        ValueError,
        "at least one feature",
    ),
    BadInput(
        "class means is 3-dim",
        put(2, lambda x: x[None]),
        ValueError,
        r"class_means must be \(C, D\), got shape",
    ),
    BadInput("class means is integer", put(2, lambda x: x.int()), TypeError, "class_means must be"),
    BadInput(
        "class means of another width",
        put(2, lambda x: x[:, :-1]),
        ValueError,
        r"class_means is \d+ wide but student_features is \d+ wide; project",
    ),
    BadInput(
        "target is a list",
        put(1, lambda x: x.tolist()),
        TypeError,
        "target must be a torch.Tensor, got list",
        is_traceable=False,
    ),
    BadInput(
        "class means as they are gathered",
        put(2, lambda x: dnkd_ext.ClassMeans(*x.shape)),
        TypeError,
        "class_means must be a torch.Tensor, got ClassMeans",
        is_traceable=False,
    ),
    BadInput(
        "teacher features is a list",
        option(teacher_features=[1.0]),
        TypeError,
        "teacher_features must be a torch.Tensor, got list",
        is_traceable=False,
    ),
    BadInput(
        "target is bool", put(1, lambda x: x > 0), TypeError, "target must hold int64 or int32"
    ),
    BadInput(
        "target is int16",
        put(1, lambda x: x.short()),
        TypeError,
        "target must hold int64 or int32",
    ),
    BadInput(
        "target too long",
        put(1, lambda x: torch.cat([x, x])),
        ValueError,
        "target of class indices must have the leading shape",
    ),
    BadInput(
        "target is an integer one-hot",
        put(1, lambda x: torch.eye(10, dtype=torch.long)[x]),
        ValueError,
        "target of class indices must have the leading shape .*; class probabilities are floating",
    ),
    BadInput(
        "features are sparse",
        put(0, lambda x: x.detach().to_sparse()),
        TypeError,
        "student_features must be a dense tensor, got layout",
        is_traceable=False,
    ),
    BadInput(
        "target is sparse",
        put(1, lambda x: x.to_sparse()),
        TypeError,
        "target must be a dense tensor, got layout",
        is_traceable=False,
    ),
    BadInput(
        "class means are sparse",
        put(2, lambda x: x.to_sparse()),
        TypeError,
        "class_means must be a dense tensor, got layout",
        is_traceable=False,
    ),
    BadInput(
        "teacher is sparse",
        option(teacher_features=lambda a, k: k["teacher_features"].to_sparse()),
        TypeError,
        "teacher_features must be a dense tensor, got layout",
        is_traceable=False,
    ),
    BadInput(
        "target of too few probabilities",
        put(1, lambda x: torch.rand(len(x), 2)),
        ValueError,
        "target of class probabilities must be",
    ),
    BadInput(
        "target above",
        put(1, lambda x: x.index_fill(0, torch.tensor([3]), 9)),
        IndexError,
        r"target\[3\] = 9 is out of range for 5 rows of class_means",
        is_traceable=False,
    ),
    BadInput(
        "target negative",
        put(1, lambda x: x.index_fill(0, torch.tensor([2]), -1)),
        IndexError,
        r"target\[2\] = -1 is out of range",
        is_traceable=False,
    ),
    BadInput(
        "both teacher arguments",
        option(teacher_norms=lambda a, k: torch.ones(len(a[0]))),
        ValueError,
        "teacher_features and teacher_norms were both given",
    ),
    BadInput(
        "teacher too short",
        option(teacher_features=lambda a, k: k["teacher_features"][1:]),
        ValueError,
        "teacher_features must have the leading shape",
    ),
    BadInput(
        "teacher integer",
        option(teacher_features=lambda a, k: k["teacher_features"].long()),
        TypeError,
        "teacher_features must be",
    ),
    BadInput(
        "norms of wrong shape",
        option(teacher_features=None, teacher_norms=lambda a, k: torch.ones(len(a[0]), 1)),
        ValueError,
        "teacher_norms must have the leading shape",
    ),
    BAD_REDUCTION,
    BadInput(
        "negative eps", option(eps=-1.0), ValueError, "eps must be finite and not negative, got -1"
    ),
    *bad_weight("loss_weight"),
)


def _nd_operator(student, target, class_means, **options):
    weight = options.get("loss_weight", 1.0)
    is_tensor = isinstance(weight, Tensor)
    return (
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


def _nd_inner_operators(
    g: torch.Generator, device: str | torch.device
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    student, means = (torch.randn(6, 16, generator=g).to(device) for _ in range(2))
    target = torch.arange(6, device=device)
    for needs_gradient in (False, True):
        for reduction in ("mean", "none"):
            options = (None, None, 2.0, -100, reduction, 1e-12, needs_gradient)
            yield "_nd_loss_forward", (student, target, means, student * 2, *options)
        base = torch.ones((), device=device)
        options = (None, None, 2.0, -100, 1e-12, needs_gradient)
        yield "_nd_loss_added_forward", (base, student, target, means, student * 2, *options)
    yield "_nd_mixtures", (torch.eye(6, device=device), means)
    coefficients = torch.randn(6, 2, generator=g).to(device)
    upstream = torch.ones(6, device=device)
    yield "_nd_loss_backward", (upstream, student, target, means, coefficients)


ND_LOSS = LossCase(
    name="nd_loss",
    fused=dnkd_ext.nd_loss,
    reference=dnkd_ext.reference.nd_loss,
    oracle=nd_oracle,
    widths=WIDTHS,
    variants={
        "direction_only": _nd_base,
        "teacher_features": _nd_teacher,
        "teacher_norms": _nd_norms,
        "ignored": _nd_ignored,
        "probabilities": _nd_soft,
        "weight_tensor": _nd_weighted,
        "degenerate": _nd_degenerate,
    },
    main="teacher_features",
    smooth=("direction_only", "teacher_features", "teacher_norms", "probabilities", "ignored"),
    compiled=("teacher_features", "probabilities", "ignored", "weight_tensor"),
    per_row=(0, 1, "teacher_features", "teacher_norms"),
    teacher="teacher_features",
    golden=_nd_golden,
    same_dtype=_nd_same_dtype,
    faults={
        "nan in student": (0, math.nan),
        "inf in student": (0, math.inf),
        "nan in class mean": (2, math.nan),
        "inf in class mean": (2, -math.inf),
        "nan in teacher": ("teacher_features", math.nan),
        "inf in teacher": ("teacher_features", math.inf),
    },
    bad_inputs=ND_BAD_INPUTS,
    underflowing=_nd_underflowing,
    operator="nd_loss",
    operator_arguments=_nd_operator,
    inner_operators=_nd_inner_operators,
    # Norms are taken of what is of another dtype, block by block.
    teachers_without_copy=(
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
    ),
    target=1,
)
