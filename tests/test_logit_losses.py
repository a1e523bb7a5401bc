"""What only the losses on logits promise: their terms, and how they hang together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dnkd_ext
from dnkd_ext.losses import LogitTerms
from tests.cases import CE_DKD_LOSS, CE_KD_LOSS, DKD_LOSS, KD_LOSS, LOGIT_CASES, convert, truth

JOINED = pytest.mark.parametrize("joined", [CE_KD_LOSS, CE_DKD_LOSS], ids=repr)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["fused", "reference"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def terms_of(case, implementation):
    """The function that returns all terms, not the loss alone."""
    return getattr(dnkd_ext if implementation == "fused" else dnkd_ext.reference, case.name)


def logits(generator, *shape, scale=3.0):
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@JOINED
@IMPLEMENTATIONS
@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_terms(joined, implementation, reduction, dtype, device, generator):
    """Without their weights, without a gradient, and the loss is their weighted sum."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, build in joined.variants.items():
        for needs_gradient in (True, False):
            args, kwargs = convert(build(generator, 19, 37, 0), dtype, device)
            args[0] = args[0].detach().requires_grad_(needs_gradient)
            expected = truth(joined, (args, kwargs), reduction).terms
            result = terms_of(joined, implementation)(*args, **kwargs, reduction=reduction)
            assert isinstance(result, LogitTerms)
            assert result._fields == ("loss", "ce", "kd")
            assert result.loss.requires_grad is needs_gradient
            weights = {
                key: float(kwargs.get(key, 1)) for key in ("ce_weight", "kd_weight", "loss_weight")
            }
            for term, exact in zip((result.ce, result.kd), expected, strict=True):
                assert not term.requires_grad
                assert term.dtype == result.loss.dtype
                assert exact.loss_error(term) <= tolerance, name
            total = weights["ce_weight"] * result.ce + weights["kd_weight"] * result.kd
            torch.testing.assert_close(
                result.loss.detach(),
                weights["loss_weight"] * total,
                rtol=10 * tolerance,
                atol=10 * tolerance,
            )


@JOINED
@IMPLEMENTATIONS
@REDUCTIONS
def test_cross_entropy_is_that_of_pytorch(joined, implementation, reduction, device, generator):
    """Its mean is over the rows that are not ignored, whatever KD counts."""
    student, teacher = (logits(generator, 19, 37).to(device) for _ in range(2))
    target = torch.randint(37, (19,), generator=generator).to(device)
    ignored = target.clone()
    ignored[[2, 5, 11]] = -7
    probabilities = logits(generator, 19, 37).softmax(-1).to(device)
    for given, options in (
        (target, {}),
        (ignored, {"ignore_index": -7}),
        (ignored, {"ignore_index": -7, "label_smoothing": 0.3}),
        (probabilities, {}),
        (0.7 * probabilities, {"label_smoothing": 0.3}),
    ):
        args = student.clone().requires_grad_(), teacher, given
        result = terms_of(joined, implementation)(
            *args, **options, kd_weight=0.0, reduction=reduction
        )
        expected = F.cross_entropy(args[0], given, **options, reduction=reduction)
        torch.testing.assert_close(result.loss, expected)
        torch.testing.assert_close(result.ce, expected.detach())
        gradients = [
            torch.autograd.grad(loss.sum(), args[0])[0] for loss in (result.loss, expected)
        ]
        torch.testing.assert_close(*gradients)


@IMPLEMENTATIONS
@pytest.mark.parametrize("standardize", [False, True])
def test_decoupling(implementation, standardize, device, generator):
    """KD = TCKD + (1 - q_label) NCKD, per row."""
    student, teacher = (logits(generator, 19, 37).to(device) for _ in range(2))
    target = torch.randint(37, (19,), generator=generator).to(device)
    options = {"temperature": 2.0, "reduction": "none", "logit_standardization": standardize}
    kd = getattr(KD_LOSS, implementation)(student, teacher, **options)
    tckd, nckd = (
        getattr(DKD_LOSS, implementation)(student, teacher, target, alpha=a, beta=b, **options)
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    )
    if standardize:
        teacher = (teacher - teacher.mean(-1, keepdim=True)) / teacher.std(-1, keepdim=True)
    q = (teacher / 2).softmax(-1).gather(1, target[:, None]).squeeze(1)
    assert nckd.min() > 1e-4
    # Standardization adds 1e-7 to the deviation that is not added here.
    tolerance = 1e-6 if standardize else 1e-12
    torch.testing.assert_close(tckd + (1 - q) * nckd, kd, rtol=tolerance, atol=tolerance)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_two_classes_have_no_nckd(implementation, dtype, device, generator):
    """One class besides the target is all there is of it, even for logits of ±1e4."""
    for scale in (1.0, 5e3):
        student, teacher = (logits(generator, 9, 2, scale=scale).clamp(-1e4, 1e4) for _ in range(2))
        target = torch.randint(2, (9,), generator=generator)
        args, _ = convert(([student, teacher, target], {}), dtype, device)
        loss = getattr(DKD_LOSS, implementation)(*args, alpha=0.0, beta=8.0, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), args[0])
        assert (loss == 0).all()
        assert (gradient == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equal_logits_have_no_divergence(implementation, dtype, device, generator):
    """Nor a gradient, beyond rounding."""
    for case in (KD_LOSS, DKD_LOSS):
        args, _ = convert(case.variants["plain"](generator, 9, 37, 0), dtype, device)
        args[1] = args[0].detach().clone()
        for standardize in (False, True):
            loss = getattr(case, implementation)(*args, logit_standardization=standardize)
            (gradient,) = torch.autograd.grad(loss, args[0])
            tolerance = 1e-13 if dtype == torch.float64 else 1e-4
            assert abs(loss.item()) <= tolerance
            assert gradient.abs().max() <= tolerance


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("one", LOGIT_CASES, ids=repr)
def test_row_without_deviation(one, implementation, dtype, device, generator):
    """Standardized, equal logits become 0: finite loss and gradient, of student and teacher."""
    args, _ = convert(one.variants["plain"](generator, 9, 8, 0), dtype, device)
    with torch.no_grad():
        args[0][0] = 3.0
        args[1][1] = -2.0
        args[0][2], args[1][2] = 0.0, 0.0
    kwargs = {"logit_standardization": True}
    expected = truth(one, (args, kwargs), "none")
    loss = getattr(one, implementation)(*args, **kwargs, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), args[0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert expected.loss_error(loss) <= tolerance
    # Row 0 has a gradient 1e7 times as large as the others, row 2 rounding errors as enlarged: the
    # others are compared by themselves.
    assert gradient[0].abs().max() > 1e5
    assert gradient[2].isfinite().all()
    assert expected.gradient_error(gradient) <= tolerance
    rest = [1, *range(3, 9)]
    torch.testing.assert_close(
        gradient[rest].double().cpu(),
        torch.from_numpy(expected.gradient[rest]),
        rtol=tolerance,
        atol=10 * tolerance,
    )


@IMPLEMENTATIONS
@pytest.mark.parametrize("one", LOGIT_CASES, ids=repr)
def test_half_precision_teacher_of_a_wide_student_and_back(one, implementation, device, generator):
    """Every pair of dtypes gives what the same numbers give in one."""
    for dtype, teacher_dtype in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
    ):
        args, kwargs = convert(one.variants["plain"](generator, 9, 37, 0), dtype, device)
        args[1] = args[1].to(teacher_dtype)
        expected = truth(one, (args, kwargs), "mean")
        loss = getattr(one, implementation)(*args, **kwargs)
        (gradient,) = torch.autograd.grad(loss, args[0])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert expected.loss_error(loss) <= tolerance
        unit = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        assert expected.gradient_error(gradient) <= tolerance + unit
