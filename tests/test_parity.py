"""Fused and reference losses against a loop over rows in NumPy and against the golden vectors."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dnkd_ext
from tests.cases import (
    CASES,
    DTYPES,
    KD_LOSS,
    ND_LOSS,
    convert,
    replaced,
    rows_of,
    tensors_of,
    truth,
)

# Largest error of a float32 or float64 result relative to the largest element.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def spoiled(values):
    """What must not be read in the place of a value per row: no class, no norm."""
    return torch.full_like(values, math.nan if values.is_floating_point() else 1 << 20)


def evaluate(function, arguments, reduction):
    """Loss and gradient for upstream 1 everywhere."""
    args, kwargs = arguments
    args[0].grad = None
    loss = function(*args, **kwargs, reduction=reduction)
    loss.sum().backward()
    assert args[0].grad.dtype == args[0].dtype
    expected = torch.float64 if args[0].dtype == torch.float64 else torch.float32
    assert loss.dtype == expected
    return loss.detach(), args[0].grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_loop(case, reduction, dtype, device, generator):
    for width, (name, build) in itertools.product(case.widths, case.variants.items()):
        arguments = convert(build(generator, 19, width, 11), dtype, device)
        expected = truth(case, arguments, reduction)
        for implementation in ("fused", "reference"):
            loss, gradient = evaluate(getattr(case, implementation), arguments, reduction)
            where = (implementation, name, width)
            assert expected.loss_error(loss) <= TOLERANCE[dtype], where
            assert expected.gradient_error(gradient) <= TOLERANCE[dtype], where


@pytest.mark.parametrize("width", [2048, 16384])
def test_wide_rows_of_one_value_keep_their_digits(width, device, generator):
    """Where every addition to a sum is rounded the same way."""
    features = torch.full((4, width), 0.1)
    means = torch.rand(4, width, generator=generator) + 0.5
    target = torch.arange(4)

    def run(function, *tensors):
        return function(*(tensor.to(device) for tensor in tensors)).double().cpu()

    loss = functools.partial(dnkd_ext.nd_loss, reduction="none")
    exact = run(dnkd_ext.reference.nd_loss, features.double(), target, means.double()).mean()
    assert abs(run(loss, features, target, means).mean() / exact - 1) < 1e-5
    now = run(lambda *given: dnkd_ext.feature_diagnostics(*given).norm_ratio, features, target,
              means, 3 * features)  # fmt: skip
    assert abs(now.item() * 3 - 1) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(case, reduction, dtype, device, generator):
    """Against float64 arithmetic on the same half-precision inputs.

    The tolerance is that of the format: the gradient is rounded once, and the loss is float32. The
    same-dtype reference, which upcasts to float32, must not be better by more than that rounding.
    """
    epsilon = torch.finfo(dtype).eps
    for width, (name, build) in itertools.product(case.widths, case.variants.items()):
        arguments = convert(build(generator, 19, width, 11), dtype, device)
        expected = truth(case, arguments, reduction)
        fused = evaluate(case.fused, arguments, reduction)
        reference = evaluate(case.reference, arguments, reduction)
        assert expected.loss_error(fused[0]) <= TOLERANCE[torch.float32], (name, width)
        errors = [expected.gradient_error(gradient) for _, gradient in (fused, reference)]
        # Half a unit in the last place of the largest element, and float32 noise.
        assert errors[0] <= 0.5 * epsilon + 1e-5, (name, width, errors)
        assert errors[0] <= errors[1] + 0.25 * epsilon, (name, width, errors)


def vectors(case, arrays):
    """The golden vectors of a loss in a file."""
    found = [] if case.golden is None else list(case.golden(arrays))
    if not found:
        pytest.skip(f"the file has no golden vectors of {case.name}")
    return found


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden(case, implementation, dtype, tolerance, golden, device):
    for arguments, loss, gradient in vectors(case, golden):
        args, kwargs = convert(arguments, dtype, device)
        result = getattr(case, implementation)(*args, **kwargs)
        result.backward()
        assert abs(result.item() - loss) <= tolerance * abs(loss)
        difference = np.linalg.norm(args[0].grad.double().cpu().numpy() - gradient)
        assert difference <= tolerance * np.linalg.norm(gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_golden_half(case, dtype, golden, device):
    """On the golden inputs rounded to half, no worse than PyTorch operations in that dtype."""
    for arguments, _, _ in vectors(case, golden):
        args, kwargs = convert(arguments, dtype, device)
        expected = truth(case, (args, kwargs), "mean")
        naive = case.same_dtype(*args, **kwargs)
        naive.backward()
        naive_gradient = args[0].grad
        loss, gradient = evaluate(case.fused, (args, kwargs), "mean")
        assert expected.loss_error(loss) <= expected.loss_error(naive) + 1e-6
        theirs = expected.gradient_error(naive_gradient)
        assert expected.gradient_error(gradient) <= theirs + 0.5 * torch.finfo(dtype).eps


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape_stride_and_dtype(case, data):
    """Leading shapes, row strides, dtype mixtures and targets drawn by hypothesis."""
    function = getattr(case, data.draw(st.sampled_from(["fused", "fused", "reference"])))
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=3), label="leading shape")
    width = data.draw(st.integers(min(case.widths), 70), label="width")
    classes = data.draw(st.integers(1, 6), label="classes")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    layout = data.draw(st.sampled_from(["dense", "row stride", "column stride", "transposed"]))
    reduction = data.draw(st.sampled_from(case.reductions))
    variant = data.draw(st.sampled_from(sorted(case.variants)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows = int(np.prod(shape))
    arguments = convert(case.variants[variant](g, rows, width, classes), dtype, "cpu")

    def lay_out(x):
        """(rows, ...) in the drawn memory layout and leading shape."""
        x = x.detach()
        if x.dim() == 1:
            values = x.reshape(shape)
            if layout == "column stride" and shape:
                values = torch.stack([values, spoiled(values)], -1).flatten(-2)[..., ::2]
            return values
        columns = x.shape[1]
        if layout == "row stride":
            wide = x.new_full((rows, columns + 3), float("nan"))
            wide[:, 1 : columns + 1] = x
            x = wide[:, 1 : columns + 1]
        elif layout == "column stride":
            wide = x.new_full((rows, 2 * columns), float("nan"))
            wide[:, ::2] = x
            x = wide[:, ::2]
        elif layout == "transposed":
            x = x.t().contiguous().t()
        return x.reshape(*shape, columns) if len(shape) != 1 else x

    changes = {where: lay_out(x) for where, x in rows_of(case, arguments).items()}
    for where, x in tensors_of(replaced(arguments, changes)).items():
        if where != 0 and x.is_floating_point() and x.dim() > 0:
            changes[where] = x.to(data.draw(st.sampled_from(DTYPES), label=f"dtype of {where}"))
    changes[0].requires_grad_()
    args, kwargs = replaced(arguments, changes)
    expected = truth(case, (args, kwargs), reduction)
    result = function(*args, **kwargs, reduction=reduction)
    (gradient,) = torch.autograd.grad(result.sum(), args[0])
    tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    tolerance = max(tolerance, expected.float64_noise)
    unit = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0
    assert expected.loss_error(result) <= tolerance
    assert expected.gradient_error(gradient) <= tolerance + unit


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("columns", [5, 64, 1100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_faults_are_not_hidden(case, implementation, columns, dtype, device, generator):
    """The loss is NaN; where rows have their own, other rows keep their loss and gradient."""
    function = getattr(case, implementation)
    for name, (where, value) in case.faults.items():
        arguments = convert(case.variants[case.main](generator, 6, columns, 6), dtype, device)
        args, kwargs = arguments
        if case.target is not None:
            # Each of its own class, and the fault elsewhere than in the column of the class.
            args[case.target] = torch.tensor([0, 1, 3, 2, 4, 4], device=device)
        row = 2 if where in case.per_row else 3
        with torch.no_grad():
            tensors_of(arguments)[where][row, 2] = value
        if case.is_sum_of_rows:
            loss = function(*args, **kwargs, reduction="none")
            assert loss.isnan().tolist() == [False, False, True, False, False, False], name
        mean = function(*args, **kwargs)
        assert mean.isnan()
        mean.backward()
        is_nan = args[0].grad.isnan().any(1).tolist()
        if case.is_sum_of_rows:
            assert is_nan == [False, False, True, False, False, False], name
        assert is_nan[2], name


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted(case, implementation, reduction, device, generator):
    """An empty or fully ignored batch gives 0 and a zero gradient."""
    for rows in (0, 4) if case.drops_ignored else (0,):
        args, kwargs = convert(
            case.variants[case.main](generator, rows, 8, 3), torch.float32, device
        )
        if rows:
            args[case.target].fill_(-100)
        with torch.no_grad():
            args[0].fill_(float("nan"))
        loss = getattr(case, implementation)(*args, **kwargs, reduction=reduction)
        assert loss.tolist() == ([0.0] * rows if reduction == "none" else 0.0)
        loss.sum().backward()
        assert args[0].grad.tolist() == [[0.0] * 8] * rows


# Their strides merge: to reshape them makes no copy.
LAYOUTS = {
    "every second": lambda x: torch.stack([x, spoiled(x)], -1).flatten(-2)[..., ::2],
    "a column": lambda x: torch.stack([x, spoiled(x)], -1).flatten(0, -2)[:, :1].view(x.shape),
    "expanded": lambda x: x[0, 0].clone().expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_value_per_row_of_any_stride(case, implementation, layout, device, generator):
    """Labels and norms, of rows in two dimensions."""
    # One label in all rows may be that which a variant ignores.
    for name in [case.main] if layout == "expanded" else case.variants:
        arguments = convert(case.variants[name](generator, 8, 12, 5), torch.float64, device)
        rows = {where: x.detach() for where, x in rows_of(case, arguments).items()}
        changes = {
            where: LAYOUTS[layout](x.view(2, 4)) if x.dim() == 1 else x.view(2, 4, -1)
            for where, x in rows.items()
        }
        changes[0] = changes[0].clone().requires_grad_()
        changed = replaced(arguments, changes)
        expected = truth(case, changed, "mean")
        loss, gradient = evaluate(getattr(case, implementation), changed, "mean")
        assert expected.loss_error(loss) <= TOLERANCE[torch.float64], name
        assert expected.gradient_error(gradient) <= TOLERANCE[torch.float64], name


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_no_rows_of_odd_strides(case, implementation, device, generator):
    """A tensor without rows calls itself contiguous whatever its strides."""
    arguments = convert(case.variants[case.main](generator, 0, 4, 3), torch.float32, device)
    odd = torch.empty(0, 8, device=device)[:, ::2]
    args, kwargs = replaced(arguments, {0: odd.requires_grad_(), case.teacher: odd.detach()})
    loss = getattr(case, implementation)(*args, **kwargs)
    loss.backward()
    assert loss.item() == 0
    assert args[0].grad.shape == (0, 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_meta_device(case, implementation, dtype, reduction, generator, monkeypatch):
    """Shapes and dtypes without numbers, as of every device without a kernel."""
    function = getattr(case, implementation)
    for name, build in case.variants.items():
        arguments = build(generator, 6, 8, 5)
        args, kwargs = convert(arguments, dtype, "cpu")
        wanted = function(*args, **kwargs, reduction=reduction)
        args, kwargs = convert(arguments, dtype, "meta")
        for asked in ("0", "1"):  # there is no target that could be looked at
            monkeypatch.setenv("DNKD_CHECK_TARGET", asked)
            loss = function(*args, **kwargs, reduction=reduction)
            assert (loss.device.type, loss.dtype, loss.shape) == (
                "meta",
                wanted.dtype,
                wanted.shape,
            ), name
        (gradient,) = torch.autograd.grad(loss.sum(), args[0])
        assert (gradient.dtype, gradient.shape) == (dtype, args[0].shape)


@pytest.mark.cuda
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("one", [case for case in CASES if case.target is not None], ids=repr)
def test_bad_target_on_cuda(one, implementation, generator, monkeypatch):
    """No out-of-bounds read: the row becomes NaN; asked for, an IndexError."""
    function = getattr(one, implementation)
    args, kwargs = convert(one.variants[one.main](generator, 8, 64, 5), torch.float32, "cuda")
    args[one.target][:] = 0
    args[one.target][3], args[one.target][5] = 64, 10**12
    loss = function(*args, **kwargs, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3, 5]
    function(*args, **kwargs).backward()
    assert args[0].grad.isnan().all(1).nonzero().flatten().tolist() == [3, 5]
    monkeypatch.setenv("DNKD_CHECK_TARGET", "1")
    with pytest.raises(IndexError, match=r"target\[3\] = 64 is out of range"):
        function(*args, **kwargs)
    monkeypatch.delenv("DNKD_CHECK_TARGET")
    with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match="out of range"):
        function(*args, **kwargs)


def test_tie_belongs_to_the_student(device):
    """Equal norms take the gradient of the cosine, which has no part along the feature."""
    student = torch.tensor([[3.0, 4.0]], device=device, requires_grad=True)
    means = torch.tensor([[1.0, 0.0]], device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    ND_LOSS.fused(
        student, target, means, teacher_norms=torch.tensor([5.0], device=device)
    ).backward()
    # -e/5 + 3 * f / 125
    torch.testing.assert_close(
        student.grad, torch.tensor([[-0.2 + 9 / 125, 12 / 125]], device=device)
    )


@pytest.mark.slow
@pytest.mark.parametrize("one", [ND_LOSS, KD_LOSS], ids=repr)
def test_more_than_two_to_the_31_elements(one, needs_extension):
    """Element offsets beyond 32 bits; a few rows are compared with the reference.

    Of the compiled kernels: the reference takes several copies of the features in float32.
    """
    rows, width = 2**17 + 5, 2**14
    assert rows * width > 2**31
    base = torch.randn(64, width).to(torch.bfloat16)
    student = base.repeat(rows // 64 + 1, 1)[:rows].requires_grad_()
    others = [torch.randn(1, width).expand(rows, width)]  # a teacher that is one row in memory
    if one is ND_LOSS:
        others = [torch.arange(rows) % 7, torch.randn(7, width)]
    one.fused(student, *others, reduction="sum").backward()
    last = slice(rows - 3, rows)
    few = student.detach()[last].clone().requires_grad_()
    others[0] = others[0][last]
    one.reference(few, *others, reduction="sum").backward()
    torch.testing.assert_close(student.grad[last], few.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_gradients_equal_small_ones(dtype, generator):
    """Past 4 MiB gradients bypass the cache; the numbers must not change by it."""
    rows, width = 2 * ((3 << 20) // (512 * dtype.itemsize)), 512
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, rows, width, 9), dtype, "cpu"
    )

    def gradient(part):
        leaf = args[0].detach()[part].requires_grad_()
        teacher = kwargs["teacher_features"][part]
        loss = ND_LOSS.fused(
            leaf, args[1][part], args[2], teacher_features=teacher, reduction="sum"
        )
        return torch.autograd.grad(loss, leaf)[0]

    halves = [gradient(slice(0, rows // 2)), gradient(slice(rows // 2, rows))]
    assert halves[0].nbytes < 4 << 20 <= args[0].nbytes
    assert torch.equal(gradient(slice(0, rows)), torch.cat(halves))
