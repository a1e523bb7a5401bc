"""Fused and reference losses against a loop over rows in NumPy and against the golden vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import DTYPES, ND_LOSS, WIDTHS, convert, truth

# Largest error of a float32 or float64 result relative to the largest element.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


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


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_loop(case, implementation, reduction, dtype, width, device, generator):
    for name, build in case.variants.items():
        arguments = convert(build(generator, 19, width, 11), dtype, device)
        expected = truth(case, arguments, reduction)
        loss, gradient = evaluate(getattr(case, implementation), arguments, reduction)
        assert expected.loss_error(loss) <= TOLERANCE[dtype], name
        assert expected.gradient_error(gradient) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_half_precision(case, reduction, dtype, width, device, generator):
    """Against float64 arithmetic on the same half-precision inputs.

    The tolerance is that of the format: the gradient is rounded once, and the loss is float32. The
    same-dtype reference, which upcasts to float32, must not be better by more than that rounding.
    """
    epsilon = torch.finfo(dtype).eps
    for name, build in case.variants.items():
        arguments = convert(build(generator, 19, width, 11), dtype, device)
        expected = truth(case, arguments, reduction)
        fused = evaluate(case.fused, arguments, reduction)
        reference = evaluate(case.reference, arguments, reduction)
        assert expected.loss_error(fused[0]) <= 1e-5, name
        errors = [expected.gradient_error(gradient) for _, gradient in (fused, reference)]
        # Half a unit in the last place of the largest element, and float32 noise.
        assert errors[0] <= 0.5 * epsilon + 1e-5, (name, errors)
        assert errors[0] <= errors[1] + 0.25 * epsilon, (name, errors)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden(case, implementation, dtype, tolerance, golden, device):
    for arguments, loss, gradient in case.golden(golden):
        args, kwargs = convert(arguments, dtype, device)
        result = getattr(case, implementation)(*args, **kwargs)
        result.backward()
        assert abs(result.item() - loss) <= tolerance * abs(loss)
        difference = np.linalg.norm(args[0].grad.double().cpu().numpy() - gradient)
        assert difference <= tolerance * np.linalg.norm(gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_golden_half(case, dtype, golden, device):
    """On the golden inputs rounded to half, no worse than PyTorch operations in that dtype."""

    def same_dtype(student, target, class_means, teacher_features):
        unit = torch.nn.functional.normalize(class_means[target], dim=-1)
        norm = torch.maximum(student.norm(dim=-1), teacher_features.norm(dim=-1))
        return (1 - (student * unit).sum(-1) / norm).mean()

    for arguments, _, _ in ND_LOSS.golden(golden):
        args, kwargs = convert(arguments, dtype, device)
        expected = truth(ND_LOSS, (args, kwargs), "mean")
        naive = same_dtype(*args, kwargs["teacher_features"])
        naive.backward()
        naive_gradient = args[0].grad
        loss, gradient = evaluate(case.fused, (args, kwargs), "mean")
        assert expected.loss_error(loss) <= expected.loss_error(naive) + 1e-6
        theirs = expected.gradient_error(naive_gradient)
        assert expected.gradient_error(gradient) <= theirs + 0.5 * torch.finfo(dtype).eps


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape_stride_and_dtype(case, data):
    """Leading shapes, row strides, dtype mixtures and targets drawn by hypothesis."""
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=3), label="leading shape")
    width = data.draw(st.integers(1, 70), label="width")
    classes = data.draw(st.integers(1, 6), label="classes")
    dtype, means_dtype, teacher_dtype = (
        data.draw(st.sampled_from(DTYPES), label=label) for label in ("dtype", "means", "teacher")
    )
    layout = data.draw(st.sampled_from(["dense", "row stride", "column stride", "transposed"]))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    variant = data.draw(st.sampled_from(sorted(case.variants)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows = int(np.prod(shape))
    args, kwargs = convert(case.variants[variant](g, rows, width, classes), dtype, "cpu")

    def lay_out(x):
        """(rows, width) in the drawn memory layout and leading shape."""
        x = x.detach()
        if layout == "row stride":
            wide = x.new_full((rows, width + 3), float("nan"))
            wide[:, 1 : width + 1] = x
            x = wide[:, 1 : width + 1]
        elif layout == "column stride":
            wide = x.new_full((rows, 2 * width), float("nan"))
            wide[:, ::2] = x
            x = wide[:, ::2]
        elif layout == "transposed":
            x = x.t().contiguous().t()
        return x.reshape(*shape, width) if len(shape) != 1 else x

    args[0] = lay_out(args[0]).requires_grad_()
    args[1] = args[1].reshape((*shape, *args[1].shape[1:]))
    args[2] = args[2].to(means_dtype)
    if "teacher_features" in kwargs:
        kwargs["teacher_features"] = lay_out(kwargs["teacher_features"]).to(teacher_dtype)
    if "teacher_norms" in kwargs:
        kwargs["teacher_norms"] = kwargs["teacher_norms"].reshape(shape).to(teacher_dtype)
    expected = truth(case, (args, kwargs), reduction)
    result = case.fused(*args, **kwargs, reduction=reduction)
    (gradient,) = torch.autograd.grad(result.sum(), args[0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    unit = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0
    assert expected.loss_error(result) <= tolerance
    assert expected.gradient_error(gradient) <= tolerance + unit


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


FAULTS = {
    "nan in student": (0, float("nan")),
    "inf in student": (0, float("inf")),
    "nan in class mean": (2, float("nan")),
    "inf in class mean": (2, float("-inf")),
    "nan in teacher": ("teacher_features", float("nan")),
    "inf in teacher": ("teacher_features", float("inf")),
}


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("width", [5, 64, 1100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_faults_are_not_hidden(implementation, fault, width, dtype, device, generator):
    """A faulty row's loss is NaN, and so the mean; other rows keep their gradient."""
    where, value = FAULTS[fault]
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 6, width, 6), dtype, device
    )
    args[1] = torch.arange(6, device=device)
    with torch.no_grad():
        (args[where] if isinstance(where, int) else kwargs[where])[2, width // 2] = value
    loss = getattr(ND_LOSS, implementation)(*args, **kwargs, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    mean = getattr(ND_LOSS, implementation)(*args, **kwargs)
    assert mean.isnan()
    mean.backward()
    assert args[0].grad.isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted(implementation, rows, reduction, device):
    """An empty or fully ignored batch gives 0 and a zero gradient."""
    student = torch.full((rows, 8), float("nan"), device=device, requires_grad=True)
    target = torch.full((rows,), -100, device=device)
    loss = getattr(ND_LOSS, implementation)(
        student, target, torch.ones(3, 8, device=device), reduction=reduction
    )
    assert loss.tolist() == ([0.0] * rows if reduction == "none" else 0.0)
    loss.sum().backward()
    assert student.grad.tolist() == [[0.0] * 8] * rows


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_no_rows_of_odd_strides(implementation, device):
    """A tensor without rows calls itself contiguous whatever its strides."""
    student = torch.empty(0, 8, device=device)[:, ::2].requires_grad_()
    target = torch.empty(0, dtype=torch.long, device=device)
    loss = getattr(ND_LOSS, implementation)(
        student, target, torch.ones(3, 4, device=device), teacher_features=student.detach()
    )
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 4)


@pytest.mark.cuda
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_bad_target_on_cuda(implementation, generator, monkeypatch):
    """No out-of-bounds read: the row becomes NaN; asked for, an IndexError."""
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 8, 64, 5), torch.float32, "cuda"
    )
    args[1][3], args[1][5] = 5, 10**12
    loss = getattr(ND_LOSS, implementation)(*args, **kwargs, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3, 5]
    getattr(ND_LOSS, implementation)(*args, **kwargs).backward()
    assert args[0].grad.isnan().all(1).nonzero().flatten().tolist() == [3, 5]
    monkeypatch.setenv("DNKD_CHECK_TARGET", "1")
    with pytest.raises(IndexError, match=r"target\[3\] = 5 is out of range"):
        getattr(ND_LOSS, implementation)(*args, **kwargs)
    monkeypatch.delenv("DNKD_CHECK_TARGET")
    with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match="out of range"):
        getattr(ND_LOSS, implementation)(*args, **kwargs)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Element offsets beyond 32 bits; a few rows are compared with the reference."""
    rows, width = 2**17 + 5, 2**14
    assert rows * width > 2**31
    base = torch.randn(64, width).to(torch.bfloat16)
    student = base.repeat(rows // 64 + 1, 1)[:rows].requires_grad_()
    target = torch.arange(rows) % 7
    means = torch.randn(7, width)
    loss = ND_LOSS.fused(student, target, means, reduction="sum")
    loss.backward()
    last = slice(rows - 3, rows)
    few = student.detach()[last].clone().requires_grad_()
    ND_LOSS.reference(few, target[last], means, reduction="sum").backward()
    torch.testing.assert_close(student.grad[last], few.grad, rtol=1e-2, atol=1e-6)
