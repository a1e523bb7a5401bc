"""What only the losses on logits have: streamed gradients, extreme logits, terms for logging."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dnkd_ext
from dnkd_ext.losses import LogitTerms
from tests.cases import CE_DKD_LOSS, CE_KD_LOSS, DKD_LOSS, KD_LOSS, LOGIT_CASES, convert, truth

JOINED = pytest.mark.parametrize("joined", [CE_KD_LOSS, CE_DKD_LOSS], ids=repr)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["fused", "reference"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def draw(generator, rows, classes, dtype=torch.float32):
    student, teacher = (
        3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


@pytest.mark.parametrize("loss", ["ce_kd_loss", "ce_dkd_loss"])
@pytest.mark.parametrize(
    ("dtype", "classes"),
    # Rows that begin at every alignment, at some, and shorter than a vector.
    [(torch.float32, 10007), (torch.float32, 6), (torch.bfloat16, 10004), (torch.float64, 5003)],
    ids=str,
)
def test_large_gradients_equal_small_ones(loss, dtype, classes, generator):
    """Past 4 MiB gradients bypass the cache; the numbers must not change by it."""
    rows = 2 * ((3 << 20) // (classes * dtype.itemsize))
    student, teacher, target = draw(generator, rows, classes, dtype)
    function = getattr(dnkd_ext, loss)

    def gradient(part):
        leaf = student.detach()[part].requires_grad_()
        total = function(leaf, teacher[part], target[part], reduction="sum").loss
        return torch.autograd.grad(total, leaf)[0]

    halves = [gradient(slice(0, rows // 2)), gradient(slice(rows // 2, rows))]
    assert halves[0].nbytes < 4 << 20 <= student.nbytes
    assert torch.equal(gradient(slice(0, rows)), torch.cat(halves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_pytorch_losses(dtype, device, generator):
    """CE and KD from one kernel are F.cross_entropy and F.kl_div."""
    student, teacher, target = (x.to(device) for x in draw(generator, 37, 129, dtype))
    student = student.detach().requires_grad_()
    target[5] = -100
    for smoothing in (0.0, 0.1):
        terms = dnkd_ext.ce_kd_loss(
            student, teacher, target, temperature=3.0, ce_weight=0.5, label_smoothing=smoothing
        )
        ce = F.cross_entropy(student, target, label_smoothing=smoothing)
        kd = 9 * F.kl_div(
            F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean"
        )
        torch.testing.assert_close(terms.ce, ce.detach())
        torch.testing.assert_close(terms.kd, kd.detach())
        torch.testing.assert_close(terms.loss, 0.5 * ce + kd)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, student)[0] for loss in (terms.loss, 0.5 * ce + kd))
        )


def test_two_classes_have_no_nckd(device):
    """With one class besides the target there is nothing to distribute: exactly 0."""
    student = torch.tensor([[3.0, -1e4], [-2.0, 1e4]], device=device, requires_grad=True)
    teacher = torch.tensor([[1.0, 7.0], [0.5, -3.0]], device=device)
    target = torch.tensor([0, 0], device=device)
    loss = dnkd_ext.dkd_loss(student, teacher, target, alpha=0.0, beta=8.0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("loss", ["kd_loss", "dkd_loss"])
def test_equal_logits_cost_nothing(loss, device, generator):
    """A student with the teacher's logits has no loss and no gradient, without rounding noise."""
    _, teacher, target = draw(generator, 9, 1001)
    teacher, target = teacher.to(device), target.to(device)
    student = teacher.clone().requires_grad_()
    labels = [target] if loss == "dkd_loss" else []
    result = getattr(dnkd_ext, loss)(student, teacher, *labels)
    result.backward()
    assert abs(result.item()) <= 1e-6
    assert student.grad.abs().max() <= 1e-7


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0])
def test_power_of_the_exponential_is_the_exponential(temperature, device, generator):
    """exp(z) as exp(z / T)^T is as exact as exp(z) itself, down to where it vanishes."""
    student, teacher, target = draw(generator, 8, 300)
    student = (student.detach() * 10).to(device).requires_grad_()
    args = student, teacher.to(device), target.to(device)
    terms = dnkd_ext.ce_kd_loss(*args, temperature=temperature)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    wide = student.detach().double().requires_grad_()
    truth = dnkd_ext.reference.ce_kd_loss(
        wide, args[1].double(), args[2], temperature=temperature
    ).loss
    (right,) = torch.autograd.grad(truth, wide)
    torch.testing.assert_close(terms.loss.double(), truth.detach(), rtol=3e-6, atol=0)
    assert (gradient - right).abs().max() <= 3e-6 * right.abs().max()


@pytest.mark.parametrize("name", ["ce_kd_loss", "ce_dkd_loss", "dkd_loss"])
def test_probabilities_of_another_dtype_that_overlap(name, device, generator):
    """A window that moves over one array, whose cast keeps its shape and no strides of rows."""
    student, teacher, _ = draw(generator, 6, 9)
    student = student.detach().to(device).requires_grad_()
    array = torch.rand(14, generator=generator, dtype=torch.float64).to(device)
    windows = array.unfold(0, 9, 1)
    assert windows.stride() == (1, 1)
    function = getattr(dnkd_ext, name)
    losses = [function(student, teacher.to(device), p) for p in (windows, windows.float().clone())]
    losses = [one if isinstance(one, torch.Tensor) else one.loss for one in losses]
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dkd_alone_reads_of_probabilities_the_largest(reduction, device, generator):
    """Which class it is, and not what the others are: there 0 times infinity would be NaN."""
    student, teacher, target = draw(generator, 6, 9)
    student = student.detach().to(device).requires_grad_()
    teacher, target = teacher.to(device), target.to(device)
    scores = torch.zeros(6, 9, device=device).scatter_(1, target[:, None], torch.inf)
    results = []
    for one in (scores, target):
        loss = dnkd_ext.dkd_loss(student, teacher, one, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), student)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("mean", "deviation"), [(10.0, 1e-2), (100.0, 1.0), (-30.0, 0.1)])
def test_standardization_of_logits_far_from_zero(mean, deviation, device, generator):
    """Against the very numbers in float64: an offset costs no digits."""
    student, teacher = (
        (mean + deviation * torch.randn(6, 40, generator=generator)).to(device) for _ in range(2)
    )
    gradients = []
    for dtype in (torch.float32, torch.float64):
        own = student.to(dtype).requires_grad_()
        loss = dnkd_ext.kd_loss(own, teacher.to(dtype), logit_standardization=True)
        gradients.append(torch.autograd.grad(loss, own)[0].double())
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    assert error <= 3e-6


def test_masked_classes(device, generator):
    """Classes at -inf in both have no probability, no part in the loss and no gradient."""
    student, teacher, target = draw(generator, 6, 50)
    target = target % 40
    with torch.no_grad():
        student[:, 40:] = -torch.inf
    teacher[:, 40:] = -torch.inf
    student, teacher, target = student.detach().to(device), teacher.to(device), target.to(device)
    student.requires_grad_()
    for name in ("ce_kd_loss", "ce_dkd_loss"):
        function = getattr(dnkd_ext, name)
        loss = function(student, teacher, target).loss
        (gradient,) = torch.autograd.grad(loss, student)
        few = student.detach()[:, :40].clone().requires_grad_()
        right = function(few, teacher[:, :40], target).loss
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(gradient[:, :40], torch.autograd.grad(right, few)[0])
        assert gradient[:, 40:].abs().max() == 0


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", ["ce_kd_loss", "ce_dkd_loss"])
def test_smoothing_reaches_masked_classes(name, implementation, device, generator):
    """Smoothed, every class is expected: one at -inf makes the row's cross entropy infinite."""
    student, teacher, _ = draw(generator, 4, 9)
    probabilities = torch.rand(4, 9, generator=generator)
    with torch.no_grad():
        for logits in (student, teacher, probabilities):
            logits[1:3, 3] = -torch.inf
    probabilities[1, 3], probabilities[2, 3] = 0, 0.5
    args = [one.detach().to(device) for one in (student, teacher, probabilities)]
    namespace = dnkd_ext if implementation == "fused" else dnkd_ext.reference
    found = getattr(namespace, name)(*args, label_smoothing=0.1, reduction="none").ce
    right = torch.nn.functional.cross_entropy(
        args[0], args[2], label_smoothing=0.1, reduction="none"
    )
    assert right.isinf().tolist() == [False, True, True, False]
    torch.testing.assert_close(found, right.to(found.dtype))
    unsmoothed = getattr(namespace, name)(*args, reduction="none").ce
    assert unsmoothed[1].isnan()  # as PyTorch's, whose probability of 0 is multiplied
    assert unsmoothed[2].isinf()


@pytest.mark.parametrize("name", ["ce_kd_loss", "ce_dkd_loss"])
def test_infinite_weight_of_an_ignored_row(name, device, generator):
    """What an ignored row does not count is left out, and not multiplied by its weight."""
    student, teacher, target = (one.detach().to(device) for one in draw(generator, 4, 9))
    target[1] = -100
    function = getattr(dnkd_ext, name)
    weight = torch.tensor(torch.inf, device=device)
    loss = function(student, teacher, target, ce_weight=weight, reduction="none").loss
    assert loss.isinf().tolist() == [True, False, True, True]
    assert loss[1] == function(student, teacher, target, reduction="none").loss[1]


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
@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [2, 7, 40])
def test_a_row_that_allows_the_label_alone(
    implementation, reduction, dtype, classes, device, generator
):
    """Masked actions: all other classes at -inf. There is nothing to learn or to compare."""
    student, teacher, target = draw(generator, 6, classes, dtype)
    student, teacher = student.detach().to(device), teacher.to(device)
    target = target.to(device)
    others = torch.arange(classes, device=device) != target[:, None]
    alone = torch.tensor([False, True, False, False, True, False], device=device)
    student[alone[:, None] & others] = teacher[alone[:, None] & others] = -torch.inf
    student.requires_grad_()
    for case, options in ((DKD_LOSS, {}), (CE_DKD_LOSS, {"ce_weight": 0.5})):
        run = getattr(case, implementation)
        rows = run(student, teacher, target, reduction="none", **options)
        assert rows[alone].tolist() == [0.0, 0.0]
        without = student.detach()[~alone].requires_grad_()
        of_others = run(without, teacher[~alone], target[~alone], reduction="none", **options)
        torch.testing.assert_close(rows[~alone], of_others)
        loss = run(student, teacher, target, reduction=reduction, **options).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient[alone].abs().max() == 0
        (expected,) = torch.autograd.grad(of_others.sum(), without)
        share = 1 / 6 if reduction == "mean" else 1
        tolerance = {"rtol": 2e-3, "atol": 1e-4} if dtype == torch.float16 else {}
        torch.testing.assert_close(gradient[~alone], expected * share, **tolerance)


@IMPLEMENTATIONS
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_the_label_alone_in_one_of_them(implementation, who, device, generator):
    """A teacher sure of the label asks for -log p; a student that is, of another, for infinity."""
    student, teacher, target = (x.detach().to(device) for x in draw(generator, 3, 7, torch.float64))
    others = torch.arange(7, device=device) != target[:, None]
    (teacher if who == "teacher" else student)[1, others[1]] = -torch.inf
    student.requires_grad_()
    run = getattr(DKD_LOSS, implementation)
    options = {"temperature": 2.0, "alpha": 1.5, "beta": 3.0, "reduction": "none"}
    rows = run(student, teacher, target, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient.isfinite().all()
    if who == "student":
        assert rows.isinf().tolist() == [False, True, False]
        return
    wanted = 1.5 * 4 * F.cross_entropy(student / 2.0, target, reduction="none")
    torch.testing.assert_close(rows[1], wanted[1])
    torch.testing.assert_close(gradient[1], torch.autograd.grad(wanted[1], student)[0][1])


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


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_faults_at_the_label(implementation, whose, value, device, generator):
    """The label is left out of DKD's sums; a fault there must reach the loss all the same."""
    student, teacher, target = draw(generator, 4, 30)
    student, teacher = student.detach().to(device), teacher.to(device)
    (student, teacher)[whose][2, target[2]] = value
    student.requires_grad_()
    for name in ("dkd_loss", "ce_dkd_loss", "ce_kd_loss"):
        result = getattr(implementation, name)(
            student, teacher, target.to(device), reduction="none"
        )
        loss = result if name == "dkd_loss" else result.loss
        assert loss.isnan().tolist() == [False, False, True, False], name
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.isnan().any(1).tolist() == [False, False, True, False], name


@IMPLEMENTATIONS
@JOINED
def test_products_of_half_precision_weights(joined, implementation, device, generator):
    """300 * 300 is beyond float16, and a tenth of a weight is not rounded to it."""
    student, teacher, target = (x.to(device) for x in draw(generator, 5, 20))
    student = student.detach().requires_grad_()
    function = terms_of(joined, implementation)
    half = lambda x: torch.tensor(x, dtype=torch.float16, device=device)  # noqa: E731
    results = []
    for weight, others, scale in (
        (half(300.0), {"ce_weight": half(300.0), "kd_weight": 0.1}, 1.0),
        (1.0, {"ce_weight": 300.0, "kd_weight": 0.1}, 300.0),
    ):
        loss = scale * function(student, teacher, target, **others, loss_weight=weight).loss
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), student)
        results.append((loss, gradient, second))
    torch.testing.assert_close(*results, rtol=1e-5, atol=0.01)


def test_small_cross_entropy_of_probabilities_is_exact(device):
    """A label of large odds leaves exp(-odds), which must not drown in the sums around it."""
    student = torch.zeros(1, 10)
    student[0, 3] = 30.0
    target = F.one_hot(torch.tensor([3]), 10).float()
    ce = dnkd_ext.ce_dkd_loss(student.to(device), student.to(device), target.to(device)).ce
    right = math.log1p(9 * math.exp(-30.0))
    assert abs(ce.item() - right) <= 1e-5 * right


@pytest.mark.parametrize("name", ["kd_loss", "ce_kd_loss", "dkd_loss", "ce_dkd_loss"])
def test_one_gradient_buffer(name, generator, needs_extension):
    """Forward and backward allocate the gradient, and beside it only scalars of rows."""
    student, teacher, target = draw(generator, 256, 600)  # small enough for torch's own allocator
    labels = [target] if name != "kd_loss" else []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = getattr(dnkd_ext, name)(student, teacher, *labels)
        (result if name in ("kd_loss", "dkd_loss") else result.loss).backward()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert student.nbytes <= allocated <= 1.05 * student.nbytes


@pytest.mark.parametrize("name", ["kd_loss", "dkd_loss"])
def test_the_teacher_is_let_go_with_the_graph(name, generator):
    """A loss that is kept for logging must not keep the teacher's logits."""
    student, teacher, target = draw(generator, 4, 10)
    teacher = teacher * 1
    seen = weakref.ref(teacher)
    loss = getattr(dnkd_ext, name)(student, teacher, *([target] if name == "dkd_loss" else []))
    loss.backward(retain_graph=True)
    loss.backward()
    del teacher
    assert seen() is None
    assert loss.isfinite()


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ignore_index", None),
        ("ignore_index", 1.0),
        ("ignore_index", True),
        ("ignore_index", torch.tensor(1)),
        ("logit_standardization", "no"),
        ("logit_standardization", None),
        ("temperature", torch.tensor(4.0)),
        ("temperature", "4"),
        ("temperature", None),
        ("alpha", torch.ones(())),
        ("beta", [8.0]),
        ("label_smoothing", True),
        ("kd_weight", True),
        ("kd_weight", "1"),
        ("loss_weight", None),
    ],
    ids=str,
)
def test_options_of_other_types(implementation, option, value, generator):
    """A tensor would be read by the host, and a temperature to be learnt get no gradient."""
    args = draw(generator, 4, 10)
    wanted = {"ignore_index": "an int", "logit_standardization": "a bool"}.get(option, "a float")
    with pytest.raises(TypeError, match=f"{option} must be {wanted}.*got {type(value).__name__}"):
        implementation.ce_dkd_loss(*args, **{option: value})
    if option in ("temperature", "beta"):
        other = {"temperature": "tau", "beta": "gamma"}[option]
        with pytest.raises(TypeError, match=f"{other} must be a float, got {type(value).__name__}"):
            implementation.dist_loss(*args[:2], **{other: value})


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
def test_options_of_numpy(implementation, generator):
    """Its scalars are numbers as any other."""
    args = draw(generator, 4, 10)
    label = int(args[2][0])
    plain = {"temperature": 2.0, "ignore_index": label, "ce_weight": 0.5}
    given = {
        "temperature": np.float32(2.0),
        "ignore_index": np.int64(label),
        "ce_weight": np.float64(0.5),
        "logit_standardization": np.bool_(False),
    }
    assert tuple(implementation.ce_dkd_loss(*args, **given)) == tuple(
        implementation.ce_dkd_loss(*args, **plain)
    )


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
def test_a_reduction_that_is_no_string(implementation, generator):
    args = draw(generator, 4, 10)
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got None"):
        implementation.ce_kd_loss(*args, reduction=None)


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
def test_the_most_probable_class_of_finer_probabilities(implementation, device, generator):
    """Of float64 probabilities that float32 does not tell apart, the larger is the target."""
    student, teacher, _ = (x.detach().to(device) for x in draw(generator, 1, 6))
    target = torch.full((1, 6), 0.1, dtype=torch.float64, device=device)
    target[0, 2], target[0, 4] = 0.3, 0.3 + 1e-12
    assert target.float()[0, 2] == target.float()[0, 4]
    wanted = implementation.dkd_loss(student, teacher, torch.tensor([4], device=device))
    assert torch.equal(implementation.dkd_loss(student, teacher, target), wanted)


def test_two_tensors_weigh_float64_logits_exactly(generator):
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.arange(5)
    weights = {"ce_weight": torch.tensor(0.1), "loss_weight": torch.tensor(2.3), "kd_weight": 0.0}
    loss = dnkd_ext.ce_kd_loss(student, teacher, target, **weights).loss
    exact = torch.nn.functional.cross_entropy(student, target)
    exact = exact * weights["ce_weight"].double() * weights["loss_weight"].double()
    assert abs(loss / exact - 1) < 1e-14
