"""The CUDA kernels of the ND loss, run on the CPU through the shim in tests/simt.

They are compared with the reference, under the address and undefined-behaviour sanitizers, so that
an access outside an array or a vector access that is not aligned fails as well as a wrong number.
None of this replaces a GPU.
"""

from __future__ import annotations

import pytest
import torch

import dnkd_ext
from tests.simt import programs
from tests.simt.programs import DTYPES, REDUCTIONS, accumulate, strided


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return programs.build("nd_loss", tmp_path_factory)


def run_nd_loss(
    harness, *, dtype, width, rows=11, classes=5, means_are_float=True, stride=None, shift=0,
    target="int64", teacher="features", reduction="mean", saves="gradient", weight=None,
    base=None, upstream=None, ignored=(), bad=(), multiprocessors=2, reverse=False, seed=0,
):  # fmt: skip
    """Both sides: (loss, gradient) of the kernels, and of the reference in float64.

    With `base`, that is added to the loss and the ND loss without its weights comes last.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    means_dtype = torch.float32 if means_are_float and dtype != torch.float64 else dtype
    if dtype == torch.float64 and means_are_float:
        means_dtype = torch.float32
    if target == "none":
        classes = rows
    student, features = draw(rows, width).to(dtype), (draw(rows, width) * 1.1).to(dtype)
    means = draw(classes, width).to(means_dtype)
    labels = torch.randint(classes, (rows,), generator=g)
    labels[list(ignored)] = -100
    labels[list(bad)] = torch.tensor([classes, -1, 2**31 - 1])[: len(bad)]
    if target == "none":
        labels = torch.arange(rows)
    norms = features.double().norm(dim=1).to(accumulate(dtype))
    stride = stride or width
    up = torch.ones(()) if upstream is None else upstream
    numbers = {
        "dtype": DTYPES.index(dtype),
        "directions_are_float": means_dtype == torch.float32,
        "target": {"none": 0, "int64": 64, "int32": 32}[target],
        "rows": rows, "columns": width, "classes": classes, "ignore_index": -100,
        "reduction": REDUCTIONS.index(reduction), "eps": 1e-12, "loss_weight": 1.5,
        "stride": stride, "directions_stride": stride, "shift": shift,
        "teacher": {"none": 0, "features": 1, "norms": 2}[teacher],
        "weight_tensor": weight is not None, "base": base is not None,
        "saves": {"nothing": 0, "gradient": 1, "coefficients": 2}[saves],
        "multiprocessors": multiprocessors, "reverse_blocks": reverse, "phantom_classes": 0,
    }  # fmt: skip
    arrays = [strided(student, stride)]
    if teacher != "none":
        arrays.append(strided(features, stride) if teacher == "features" else norms)
    arrays.append(strided(means, stride))
    if target != "none":
        arrays.append(labels.int() if target == "int32" else labels)
    if weight is not None:
        arrays.append(torch.tensor([weight], dtype=accumulate(dtype)))
    if base is not None:
        arrays.append(torch.tensor([base], dtype=accumulate(dtype)))
    if saves == "coefficients":
        full = up.expand(rows) if reduction == "none" else up.reshape(1).expand(max(rows, 1))
        arrays.append(full[:rows].to(accumulate(dtype)))
    outputs = [((rows,) if reduction == "none" else (), accumulate(dtype))]
    if saves != "nothing":
        outputs.append(((rows, width), dtype))
    if base is not None:
        outputs.append(((), accumulate(dtype)))
    result = harness("nd_loss", numbers, arrays, outputs)

    leaf = student.double().requires_grad_()
    in_range = labels.clone()
    in_range[list(bad)] = 0
    options = {"reduction": reduction, "loss_weight": 1.5 * (1.0 if weight is None else weight)}
    if teacher == "features":
        options["teacher_features"] = features.double()
    elif teacher == "norms":
        options["teacher_norms"] = norms.double()
    loss = dnkd_ext.reference.nd_loss(leaf, in_range, means.double(), **options)
    if rows:
        loss.backward(
            up.expand(loss.shape).double() if saves == "coefficients" else torch.ones_like(loss)
        )
    gradient = leaf.grad if rows else leaf
    if base is None:
        return result, (loss.detach(), gradient.detach())
    scale = options["loss_weight"]
    nd = loss / scale if scale else loss
    return result, ((base + loss).detach(), gradient.detach(), nd.detach())


def assert_close(result, expected, dtype):
    gradient = result[1] if len(result) > 1 else None
    programs.assert_close(result[:1], expected[:1], gradient, expected[1], dtype)


# A warp per row: scalar; vectors that fill part of a warp; the largest a warp takes in bfloat16 and
# float32. A block per row: one element more; several vectors per thread; more than registers keep.
@pytest.mark.parametrize("width", [1, 5, 33, 64, 256, 512, 513, 520, 1096, 2304])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("means_are_float", [False, True])
def test_forms_the_gradient(harness, dtype, width, means_are_float):
    rows = 11 if width < 300 else 6
    result = run_nd_loss(
        harness, dtype=dtype, width=width, rows=rows, means_are_float=means_are_float, ignored=(1,)
    )
    assert_close(*result, dtype)


@pytest.mark.parametrize("width", [64, 520])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_read_among_many(harness, dtype, width):
    """A block takes many rows, whose labels it reads ahead."""
    (losses, gradient), (expected, wanted) = run_nd_loss(
        harness, dtype=dtype, width=width, rows=45, means_are_float=False, ignored=(0, 7, 8),
        bad=(13, 31), multiprocessors=1, reduction="none",
    )  # fmt: skip
    assert losses[[13, 31]].isnan().all()
    assert gradient[[13, 31]].isnan().all()
    kept = [row for row in range(45) if row not in (13, 31)]
    assert_close((losses[kept], gradient[kept]), (expected[kept], wanted[kept]), dtype)


@pytest.mark.parametrize("width", [7, 64, 520, 2304])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_from_row_scalars(harness, dtype, width, reduction):
    upstream = torch.linspace(-1, 2, 6) if reduction == "none" else torch.tensor(1024.0)
    result = run_nd_loss(
        harness, dtype=dtype, width=width, rows=6, means_are_float=width > 64, ignored=(2,),
        reduction=reduction, saves="coefficients", upstream=upstream, teacher="norms",
    )  # fmt: skip
    assert_close(*result, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"target": "int32"},
        {"target": "none"},
        {"teacher": "none"},
        {"teacher": "norms", "weight": 0.25},
        {"reduction": "sum"},
        {"reduction": "none", "saves": "nothing"},
        {"stride": 72},  # rows apart, still aligned
        {"stride": 72, "width": 61, "saves": "nothing"},  # vectors and a scalar tail
        {"stride": 528, "width": 523, "saves": "coefficients"},
        {"stride": 67},  # rows that vectors cannot read
        {"shift": 1},  # a base address that vectors cannot read
        {"rows": 0},
        {"rows": 1},
        {"rows": 5, "ignored": (0, 1, 2, 3, 4)},
        {"bad": (0, 3, 4)},  # targets that name no class
        {"bad": (2,), "reduction": "none", "saves": "coefficients", "width": 600},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_arguments(harness, dtype, options):
    bad = options.get("bad", ())
    result, (loss, gradient) = run_nd_loss(harness, dtype=dtype, **{"width": 64, **options})
    if bad:  # the reference was given good targets for them
        loss = loss.clone()
        loss[list(bad) if loss.dim() else ...] = float("nan")
        gradient = gradient.clone()
        gradient[list(bad)] = float("nan")
    assert_close(result, (loss, gradient), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": 0.25}, {"weight": 0.0}, {"width": 1100, "saves": "coefficients"}, {"rows": 0}],
    ids=str,
)
def test_adds_to_a_base(harness, dtype, options):
    """The sum and the ND loss alone, without its weights and 0 where they are."""
    result, expected = run_nd_loss(
        harness, dtype=dtype, **{"width": 64, "ignored": (1,) if not options else (), **options},
        base=-2.5,
    )  # fmt: skip
    (loss, gradient, nd), (wanted, wanted_gradient, wanted_nd) = result, expected
    programs.assert_close((loss, nd), (wanted, wanted_nd), gradient, wanted_gradient, dtype)


@pytest.mark.parametrize("width", [64, 1100])
def test_counts_many_rows(harness, width):
    """Several blocks of the count kernel, each block of the row kernel with many rows."""
    ignored = tuple(range(0, 1300, 3))
    result = run_nd_loss(
        harness, dtype=torch.float32, width=4 if width == 64 else 516, rows=1300, ignored=ignored,
        multiprocessors=2,
    )  # fmt: skip
    assert_close(*result, torch.float32)


@pytest.mark.parametrize("width", [64, 1100])
def test_does_not_depend_on_the_order_of_blocks(harness, width):
    """Bitwise: which block comes last decides who adds, not in which order."""
    options = {"dtype": torch.float32, "width": width, "rows": 50, "multiprocessors": 6}
    forward, _ = run_nd_loss(harness, **options)
    backward, _ = run_nd_loss(harness, **options, reverse=True)
    assert torch.equal(forward[0], backward[0])
    assert torch.equal(forward[1], backward[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 8, 4099])
@pytest.mark.parametrize("upstream", [1.0, -2.5, float("nan")])
def test_scale(harness, dtype, count, upstream):
    gradient = torch.randn(count).to(dtype)
    up = torch.tensor([upstream], dtype=accumulate(dtype))
    numbers = {
        "dtype": DTYPES.index(dtype),
        "count": count,
        "multiprocessors": 1,
        "reverse_blocks": 0,
    }
    (result,) = harness("scale", numbers, [gradient, up], [((count,), dtype)])
    expected = (gradient.to(accumulate(dtype)) * up).to(dtype)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
    assert torch.equal(result.isnan(), expected.isnan())


def test_the_shim_sees_mistakes(harness):
    """It is no use if it lets everything pass: reading behind the class table must be caught."""
    numbers = {
        "dtype": 2, "directions_are_float": 1, "target": 64, "rows": 2, "columns": 8, "classes": 4,
        "ignore_index": -100, "reduction": 1, "eps": 1e-12, "loss_weight": 1, "stride": 8,
        "directions_stride": 8, "shift": 0, "teacher": 0, "weight_tensor": 0, "base": 0, "saves": 1,
        "multiprocessors": 1, "reverse_blocks": 0,
    }  # fmt: skip
    outputs = [((), torch.float32), ((2, 8), torch.float32)]
    arrays = [torch.randn(16), torch.randn(32), torch.tensor([3, 4])]  # 4 names no class
    loss, _ = harness("nd_loss", {**numbers, "phantom_classes": 0}, arrays, outputs)
    assert loss.isnan()
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        harness("nd_loss", {**numbers, "phantom_classes": 1}, arrays, outputs)
