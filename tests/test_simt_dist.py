"""The CUDA kernels of the DIST loss, run on the CPU through the shim in tests/simt."""

from __future__ import annotations

import math

import pytest
import torch

import dnkd_ext
from tests.simt import programs
from tests.simt.programs import DTYPES, accumulate, assert_close, strided


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return programs.build("dist_loss", tmp_path_factory)


def run(
    harness, *, dtype, classes, rows=11, teacher_is_wide=False, stride=None, shift=0, tau=2.0,
    upstream=1.0, processes=0, needs_gradient=True, multiprocessors=2, reverse=False, change=None,
):  # fmt: skip
    """Both sides: (loss, gradient) of the kernels, and of the reference in float64.

    ``processes``: 0 for moments and finish in one, otherwise apart, between them the all-reduce.
    """
    g = torch.Generator().manual_seed(rows * 10000 + classes)
    draw = lambda: 2 * torch.randn(rows, classes, generator=g, dtype=torch.float64)  # noqa: E731
    teacher_dtype = accumulate(dtype) if teacher_is_wide else dtype
    student, teacher = draw().to(dtype), draw().to(teacher_dtype)
    if change is not None:
        change(student, teacher)
    numbers = {
        "dtype": DTYPES.index(dtype), "teacher_is_wide": teacher_dtype != dtype,
        "rows": rows, "columns": classes, "stride": stride or classes, "shift": shift,
        "tau": tau, "beta": 1.5, "gamma": 0.75, "processes": processes,
        "needs_gradient": needs_gradient, "multiprocessors": multiprocessors,
        "reverse_blocks": reverse,
    }  # fmt: skip
    arrays = [strided(x, stride or classes) for x in (student, teacher)]
    arrays.append(torch.tensor([upstream], dtype=accumulate(dtype)))
    outputs = [((), accumulate(dtype))] + [((rows, classes), dtype)] * needs_gradient
    result = harness("dist_loss", numbers, arrays, outputs)

    leaf = student.double().requires_grad_()
    loss = dnkd_ext.reference.dist_loss(leaf, teacher.double(), beta=1.5, gamma=0.75, tau=tau)
    loss.backward(torch.tensor(upstream, dtype=torch.float64))
    return result, (loss.detach(), leaf.grad)


def check(result, expected, dtype):
    gradient = result[1] if len(result) > 1 else None
    assert_close(result[:1], expected[:1], gradient, expected[1], dtype)


# A warp per row: scalar; vectors that fill part of a warp; the most a warp keeps. A block per row:
# one element more; vectors, more than one tile of columns, and more than registers keep.
@pytest.mark.parametrize("classes", [1, 33, 64, 104, 520, 2304])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("teacher_is_wide", "processes"), [(False, 0), (True, 0), (False, 1)])
def test_equals_the_reference(harness, dtype, classes, teacher_is_wide, processes):
    rows = 11 if classes < 300 else 3
    options = {"dtype": dtype, "classes": classes, "rows": rows, "upstream": -3.0}
    check(*run(harness, **options, teacher_is_wide=teacher_is_wide, processes=processes), dtype)


# Columns are read as vectors where whole tiles of them have work for all warps of a multiprocessor,
# the last tile cut off: two parts of float64, of float32, of 16 bits; a single part.
@pytest.mark.parametrize(("classes", "rows"), [(136, 70), (264, 70), (520, 70), (2304, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("teacher_is_wide", "processes"), [(False, 0), (True, 1)])
def test_columns_in_vectors(harness, dtype, classes, rows, teacher_is_wide, processes):
    options = {"dtype": dtype, "classes": classes, "rows": rows, "processes": processes}
    options |= {"teacher_is_wide": teacher_is_wide, "multiprocessors": 1}
    check(*run(harness, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"needs_gradient": False},
        {"stride": 72},  # rows apart, still aligned
        {"stride": 72, "classes": 61},  # the last vector would be cut off
        {"stride": 67},  # rows that vectors cannot read
        {"shift": 1},  # a base address that vectors cannot read
        {"rows": 0},
        {"rows": 1},
        {"rows": 3},
        {"tau": 30.0},  # nearly uniform
        {"tau": 0.25},
        {"upstream": math.nan},
        {"multiprocessors": 1, "rows": 40},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_arguments(harness, dtype, processes, options):
    options = {"classes": 64, "processes": processes, **options}
    check(*run(harness, dtype=dtype, **options), dtype)


@pytest.mark.parametrize("classes", [3, 5, 64])
@pytest.mark.parametrize(("multiprocessors", "processes"), [(40, 0), (2, 1)])
def test_many_rows(harness, classes, multiprocessors, processes):
    """Columns split among many warps, of which some get no row; several blocks that finish."""
    options = {"classes": classes, "rows": 1100, "multiprocessors": multiprocessors}
    check(*run(harness, dtype=torch.float32, processes=processes, **options), torch.float32)


@pytest.mark.parametrize("processes", [0, 1])
def test_many_columns(harness, processes):
    """Several blocks that finish, by columns."""
    options = {"classes": 1100, "rows": 2, "processes": processes}
    check(*run(harness, dtype=torch.float32, **options), torch.float32)


# Three and more parts, whose sum depends on the order: of several tiles; of one; of two that are
# read as vectors of float64, which alone does not round the difference away.
@pytest.mark.parametrize(
    ("classes", "rows", "multiprocessors"), [(200, 80, 12), (17, 150, 6), (128, 125, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("processes", [0, 1])
def test_does_not_depend_on_the_order_of_blocks(
    harness, dtype, classes, rows, multiprocessors, processes
):
    """Bit for bit: another block is the last of its tile, another tile the last of all."""
    options = {"dtype": dtype, "classes": classes, "rows": rows, "processes": processes}
    options["multiprocessors"] = multiprocessors
    forward, expected = run(harness, **options)
    backward, _ = run(harness, **options, reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    check(forward, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_processes(harness, dtype):
    """The same batch in two processes: the same loss, the gradient of the columns twice."""
    options = {"dtype": dtype, "classes": 24}
    (alone, gradient), _ = run(harness, **options, processes=1)
    (together, doubled), _ = run(harness, **options, processes=2)
    # Twice the rows of the same numbers: every correlation stays but for eps, and a column's
    # derivative by one row halves.
    tolerance = 1e-6
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(doubled, gradient, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [7, 520])
def test_faults_and_masks(harness, dtype, classes):
    """A NaN reaches the loss; a logit of -inf is a probability of 0."""

    def nan(student, teacher):
        student[2, classes // 2] = math.nan

    (loss, _), _ = run(harness, dtype=dtype, classes=classes, change=nan)
    assert loss.isnan()

    def teacher_nan(student, teacher):
        teacher[0, 0] = math.nan

    (loss, _), _ = run(harness, dtype=dtype, classes=classes, change=teacher_nan)
    assert loss.isnan()

    def masked(student, teacher):
        student[:, 0] = -math.inf
        teacher[1, : classes // 2] = -math.inf

    check(*run(harness, dtype=dtype, classes=classes, change=masked), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_deviations(harness, dtype):
    """Uniform rows and constant columns: what rounding leaves of them is not taken for a slope."""

    def uniform_teacher(student, teacher):
        teacher[:] = 0.75

    def one_row(student, teacher):
        student[:] = student[:1].clone()
        teacher[:] = teacher[:1].clone()

    for change in (uniform_teacher, one_row):
        check(*run(harness, dtype=dtype, classes=10, change=change), dtype)
