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
    return programs.build("dist_loss", tmp_path_factory.mktemp("simt"))


def run(
    harness, *, dtype, classes, rows=11, teacher_is_wide=False, stride=None, shift=0, tau=2.0,
    upstream=1.0, processes=1, needs_gradient=True, multiprocessors=2, reverse=False, change=None,
):  # fmt: skip
    """Both sides: (loss, gradient) of the kernels, and of the reference in float64."""
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
@pytest.mark.parametrize("teacher_is_wide", [False, True])
def test_equals_the_reference(harness, dtype, classes, teacher_is_wide):
    rows = 11 if classes < 300 else 3
    options = {"dtype": dtype, "classes": classes, "rows": rows, "upstream": -3.0}
    check(*run(harness, **options, teacher_is_wide=teacher_is_wide), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
def test_arguments(harness, dtype, options):
    check(*run(harness, dtype=dtype, **{"classes": 64, **options}), dtype)


@pytest.mark.parametrize("classes", [3, 5, 64])
def test_many_rows(harness, classes):
    """Columns split among many warps, several blocks of the finish kernel."""
    check(*run(harness, dtype=torch.float32, classes=classes, rows=1100), torch.float32)


def test_many_columns(harness):
    """Several blocks of the finish kernel by columns."""
    check(*run(harness, dtype=torch.float32, classes=1100, rows=2), torch.float32)


@pytest.mark.parametrize("classes", [64, 520])
def test_does_not_depend_on_the_order_of_blocks(harness, classes):
    options = {"dtype": torch.float32, "classes": classes, "rows": 20, "multiprocessors": 6}
    forward, _ = run(harness, **options)
    backward, _ = run(harness, **options, reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_processes(harness, dtype):
    """The same batch in two processes: the same loss, the gradient of the columns twice."""
    options = {"dtype": dtype, "classes": 24}
    (alone, gradient), _ = run(harness, **options)
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
