"""The CUDA kernel of the feature diagnostics, run on the CPU; see test_simt.py."""

from __future__ import annotations

import pytest
import torch

import dnkd_ext
from tests.simt import programs
from tests.simt.programs import DTYPES, accumulate, strided


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return programs.build("feature_diagnostics", tmp_path_factory)


def diagnose(
    harness, *, dtype, width, rows=11, classes=5, means_are_float=True, stride=None, shift=0,
    target="int64", teacher="features", ignored=(), bad=(), multiprocessors=2, reverse=False,
    phantom_classes=0,
):  # fmt: skip
    """The three values of the kernel, and of the reference in float64."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    means_dtype = torch.float32 if means_are_float else dtype
    classes = rows if target == "none" else classes
    student, features = draw(rows, width).to(dtype), (draw(rows, width) * 1.1).to(dtype)
    means = draw(classes, width).to(means_dtype)
    labels = torch.randint(classes, (rows,), generator=g) if rows else torch.zeros(0).long()
    labels[list(ignored)] = -100
    labels[list(bad)] = torch.tensor([classes, -1, 2**31 - 1])[: len(bad)]
    if target == "none":
        labels = torch.arange(rows)
    norms = features.double().norm(dim=1).to(accumulate(dtype))
    numbers = {
        "dtype": DTYPES.index(dtype), "directions_are_float": means_dtype == torch.float32,
        "target": {"none": 0, "int64": 64, "int32": 32}[target], "rows": rows, "columns": width,
        "classes": classes, "ignore_index": -100, "eps": 1e-12, "stride": stride or width,
        "shift": shift, "teacher": {"none": 0, "features": 1, "norms": 2}[teacher],
        "multiprocessors": multiprocessors, "reverse_blocks": reverse,
        "phantom_classes": phantom_classes,
    }  # fmt: skip
    arrays = [strided(student, stride or width)]
    if teacher != "none":
        arrays.append(strided(features, stride or width) if teacher == "features" else norms)
    arrays.append(strided(means, stride or width))
    if target != "none":
        arrays.append(labels.int() if target == "int32" else labels)
    (result,) = harness("feature_diagnostics", numbers, arrays, [((3,), accumulate(dtype))])

    labels[list(bad)] = 0
    if teacher == "features":
        options = {"teacher_features": features.double()}
    else:
        options = {"teacher_norms": norms.double()} if teacher == "norms" else {}
    expected = dnkd_ext.reference.feature_diagnostics(
        student.double(), labels, means.double(), **options
    )
    return result, torch.stack(expected)


def assert_close(result, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        result.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


# A warp per row: scalar; vectors that fill part of a warp; the largest a warp takes in bfloat16 and
# float32. A block per row: one element more; several vectors per thread; more than one read holds.
@pytest.mark.parametrize("width", [1, 5, 33, 64, 256, 512, 513, 520, 1096, 2304])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("means_are_float", [False, True])
def test_widths(harness, dtype, width, means_are_float):
    result, expected = diagnose(
        harness, dtype=dtype, width=width, means_are_float=means_are_float, ignored=(1, 4)
    )
    assert expected.isfinite().all()
    assert_close(result, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"target": "int32"},
        {"target": "none"},
        {"teacher": "none"},
        {"teacher": "norms"},
        {"stride": 72},  # rows apart, still aligned
        {"stride": 72, "width": 61},  # vectors and a scalar tail
        {"stride": 528, "width": 523, "teacher": "norms"},
        {"stride": 67},  # rows that vectors cannot read
        {"shift": 1},  # a base address that vectors cannot read
        {"rows": 0},
        {"rows": 1},
        {"rows": 5, "ignored": (0, 1, 2, 3, 4)},
        {"rows": 300, "width": 4, "ignored": range(0, 300, 3)},  # many rows per block
        {"rows": 60, "width": 1100, "ignored": (7,)},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_arguments(harness, dtype, options):
    assert_close(*diagnose(harness, dtype=dtype, **{"width": 64, **options}), dtype)


@pytest.mark.parametrize("width", [64, 1100])
def test_a_target_that_names_no_class(harness, width):
    for bad in ((0, 3, 4), (10,)):
        result, expected = diagnose(harness, dtype=torch.float32, width=width, bad=bad)
        assert expected.isfinite().all()
        assert result.isnan().all()


@pytest.mark.parametrize("width", [64, 1100])
def test_does_not_depend_on_the_order_of_blocks(harness, width):
    options = {"dtype": torch.float32, "width": width, "rows": 50, "multiprocessors": 6}
    forward, _ = diagnose(harness, **options)
    backward, _ = diagnose(harness, **options, reverse=True)
    assert torch.equal(forward, backward)


def test_the_shim_sees_mistakes(harness):
    """Reading behind the class table must be caught."""
    options = {"dtype": torch.float32, "width": 8, "bad": (2,)}
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        diagnose(harness, **options, phantom_classes=1)
