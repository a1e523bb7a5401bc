"""KD++, DKD++, DIST++ and hard KD++ as the sum of their terms, and the projector of features."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dnkd_ext

KINDS = ("kd", "dkd", "dist", "hard")
RAMPS = ("kd_ramp", "nd_ramp")
CLASSES, WIDTH = 10, 24
CRITERIA = {
    "kd": dnkd_ext.KDPlusPlus,
    "dkd": dnkd_ext.DKDPlusPlus,
    "dist": dnkd_ext.DISTPlusPlus,
    "hard": dnkd_ext.HardKDPlusPlus,
}
OPTIONS = {
    "kd": {"temperature": 3.0},
    "dkd": {"temperature": 3.0, "alpha": 0.5, "beta": 4.0},
    "dist": {"tau": 2.0, "beta": 0.5, "gamma": 1.5},
    "hard": {},
}
WEIGHTS = {"ce_weight": 0.75, "kd_weight": 2.5, "nd_weight": 1.5}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def pearson(a, b, dim):
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)


def distillation(kind, student, teacher, target, options, ignore_index=-100):
    """The term on logits, written down once more."""
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    if kind == "kd":
        t = options["temperature"]
        return t**2 * F.kl_div(
            (student / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="batchmean"
        )
    if kind == "dist":
        t = options["tau"]
        s, t_ = (student / t).softmax(-1), (teacher / t).softmax(-1)
        inter, intra = (1 - pearson(s, t_, dim).mean() for dim in (-1, 0))
        return t**2 * (options["beta"] * inter + options["gamma"] * intra)
    labels = target.argmax(-1) if target.is_floating_point() else target
    kept = labels != ignore_index if not target.is_floating_point() else labels >= 0
    t = options["temperature"]
    losses = []
    for s, u, label in zip(student[kept] / t, teacher[kept] / t, labels[kept], strict=True):
        others = torch.arange(len(s), device=s.device) != label
        p, q = s.softmax(-1), u.softmax(-1)
        pairs = [(q[label], p[label]), (q[others].sum(), p[others].sum())]
        tckd = sum(b * (b / a).log() for b, a in pairs)
        nckd = F.kl_div(s[others].log_softmax(-1), u[others].softmax(-1), reduction="sum")
        losses.append(t**2 * (options["alpha"] * tckd + options["beta"] * nckd))
    return torch.stack(losses).mean()


def draw(generator, target="indices", rows=12):
    """float64 inputs of a criterion: student and teacher logits, features, target, means."""
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    if target == "mixup":
        other = torch.randint(CLASSES, (rows,), generator=generator)
        labels = 0.7 * F.one_hot(labels, CLASSES) + 0.3 * F.one_hot(other, CLASSES)
        labels = labels.double()
    elif target == "ignored":
        labels[::4] = 255
    elif target == "int32":
        labels = labels.int()
    return {
        "student_logits": 2 * rand(rows, CLASSES),
        "teacher_logits": 2 * rand(rows, CLASSES),
        "student_features": rand(rows, WIDTH),
        "target": labels,
        "teacher_features": rand(rows, WIDTH) * 1.1,
        "means": rand(CLASSES, WIDTH),
    }


def call(criterion, inputs, **options):
    return criterion(
        inputs["student_logits"],
        inputs["teacher_logits"],
        inputs["student_features"],
        inputs["target"],
        teacher_features=inputs["teacher_features"],
        **options,
    )


def bring(inputs, dtype, device="cpu"):
    """To a dtype and device; the student's as leaves."""
    result = {
        key: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }
    for key in ("student_logits", "student_features"):
        result[key] = result[key].detach().clone().requires_grad_()
    return result


def expected(
    kind,
    inputs,
    *,
    kd_ramp=1.0,
    nd_ramp=1.0,
    weights=WEIGHTS,
    label_smoothing=0.0,
    ignore_index=-100,
):
    """``(loss, ce, kd, nd)`` and the gradients of logits and features, in float64."""
    x = bring(inputs, torch.float64)
    target = x["target"]
    soft = target.is_floating_point()
    ce = F.cross_entropy(
        x["student_logits"],
        target if soft else target.long(),
        label_smoothing=label_smoothing,
        ignore_index=-100 if soft else ignore_index,
    )
    kd = distillation(
        kind, x["student_logits"], x["teacher_logits"], target, OPTIONS[kind], ignore_index
    )
    nd = dnkd_ext.reference.nd_loss(
        x["student_features"],
        target,
        x["means"],
        teacher_features=x["teacher_features"],
        ignore_index=ignore_index,
    )
    kd_weight, nd_weight = weights["kd_weight"] * kd_ramp, weights["nd_weight"] * nd_ramp
    loss = weights["ce_weight"] * ce + kd_weight * kd + nd_weight * nd
    loss.backward()
    nd = nd if nd_weight else torch.zeros_like(nd)  # whose value is not known any more
    return (loss, ce, kd, nd), (x["student_logits"].grad, x["student_features"].grad)


def check(terms, inputs, truth, dtype=torch.float64):
    """Terms and the gradients that a backward pass left in `inputs`, against the truth."""
    unit = torch.finfo(dtype).eps
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    values, gradients = truth
    for name, result, value in zip(terms._fields, terms, values, strict=True):
        assert result.shape == (), name
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert result.item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name
    for key, wanted in zip(("student_logits", "student_features"), gradients, strict=True):
        got = inputs[key].grad
        assert got.dtype == dtype
        error = (got.double().cpu() - wanted).abs().max()
        assert error <= (tolerance + unit) * wanted.abs().max(), key


@pytest.mark.parametrize("target", ["indices", "int32", "ignored", "mixup"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_is_the_sum_of_its_terms(kind, target, dtype, device, generator):
    inputs = bring(draw(generator, target), dtype, device)
    options = {"label_smoothing": 0.1, "ignore_index": 255}
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind], **options)
    terms = call(criterion, inputs)
    assert terms.loss.requires_grad
    assert not any(term.requires_grad for term in terms[1:])
    terms.loss.backward()
    rounded = {key: value.detach().cpu() for key, value in inputs.items()}
    check(terms, inputs, expected(kind, rounded, **options), dtype)


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", RAMPS)
def test_ramp(kind, name, ramp, as_tensor, generator):
    """Multiplies the weight of its term, and what is logged stays unweighted."""
    inputs = bring(draw(generator), torch.float64)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    given = torch.tensor(float(ramp)) if as_tensor else ramp
    terms = call(criterion, inputs, **{name: given})
    terms.loss.backward()
    check(terms, inputs, expected(kind, inputs, **{name: ramp}))


@pytest.mark.parametrize("weight", [1.5, torch.tensor(1.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("ramp", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_an_nd_ramp_of_zero(kind, weight, ramp, generator):
    """The features get a gradient of zeros, as parameters in DistributedDataParallel must."""
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs["means"], nd_weight=weight, **OPTIONS[kind])
    terms = call(criterion, inputs, nd_ramp=ramp)
    terms.loss.backward()
    assert terms.nd == 0
    assert not terms.nd.requires_grad
    assert torch.equal(inputs["student_features"].grad, torch.zeros(12, WIDTH))
    inputs["student_features"].data[0] = math.nan
    terms = call(criterion, inputs, nd_ramp=ramp)
    assert terms.nd.isnan()
    assert terms.loss.isnan()


def test_an_nd_ramp_without_the_nd_loss(kind, generator):
    """Nothing to multiply, but no less wrong if it is no number."""
    inputs = bring(draw(generator), torch.float64)
    criterion = CRITERIA[kind](None, nd_weight=0, **OPTIONS[kind])
    ramped = call(criterion, inputs, nd_ramp=torch.tensor(0.5))
    assert tuple(ramped) == tuple(call(criterion, inputs))
    with pytest.raises(ValueError, match="nd_ramp must be finite, got inf"):
        call(criterion, inputs, nd_ramp=math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_as_tensors(kind, dtype, device, generator):
    """They are buffers, equal to floats, and may be changed in place."""
    inputs = bring(draw(generator), torch.float64, device)
    tensors = {name: torch.tensor(weight, dtype=dtype) for name, weight in WEIGHTS.items()}
    criterion = CRITERIA[kind](inputs["means"], **tensors, **OPTIONS[kind]).to(device)
    assert set(criterion.state_dict()) == {"class_means", *WEIGHTS}
    truth = {key: value.detach().cpu() for key, value in inputs.items()}
    terms = call(criterion, inputs)
    terms.loss.backward()
    check(terms, inputs, expected(kind, truth))
    other = {"ce_weight": 2.0, "kd_weight": 0.0, "nd_weight": -0.5}
    for name, weight in other.items():
        getattr(criterion, name).fill_(weight)
        assert tensors[name] == WEIGHTS[name]  # its own copy
    for key in ("student_logits", "student_features"):
        inputs[key].grad = None
    terms = call(criterion, inputs)
    terms.loss.backward()
    check(terms, inputs, expected(kind, truth, weights=other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ramp", [0.15, torch.tensor(0.15), torch.tensor(0.15).half()], ids=repr)
def test_a_half_precision_criterion(kind, dtype, ramp, generator):
    """What its tensors hold is rounded; their products with the ramps are not once more."""
    inputs = bring(draw(generator), torch.float32)
    tensors = {name: torch.tensor(weight / 3) for name, weight in WEIGHTS.items()}
    criterion = CRITERIA[kind](inputs["means"], **tensors, **OPTIONS[kind]).to(dtype)
    terms = call(criterion, inputs, kd_ramp=ramp, nd_ramp=ramp)
    terms.loss.backward()
    inputs["means"] = criterion.class_means
    weights = {name: getattr(criterion, name).double() for name in WEIGHTS}
    ramp = float(ramp)
    check(terms, inputs, expected(kind, inputs, weights=weights, kd_ramp=ramp, nd_ramp=ramp),
          torch.float32)  # fmt: skip


def test_a_weight_tensor_of_zero(kind, generator):
    """No gradient from the ND loss, and no NaN from dividing by the weight."""
    inputs = bring(draw(generator), torch.float64)
    criterion = CRITERIA[kind](inputs["means"], nd_weight=torch.tensor(0.0), **OPTIONS[kind])
    terms = call(criterion, inputs)
    terms.loss.backward()
    assert terms.nd == 0
    assert inputs["student_features"].grad.abs().max() == 0
    truth, _ = expected(kind, inputs, weights={"ce_weight": 1, "kd_weight": 1, "nd_weight": 0})
    assert terms.loss.item() == pytest.approx(truth[0].item(), rel=1e-9)
    inputs["student_features"].data[0] = math.nan
    terms = call(criterion, inputs)
    assert terms.nd.isnan()
    assert terms.loss.isnan()


def test_without_the_nd_loss(kind, generator):
    """nd_weight=0 is the plain method, whatever class means and features are."""
    inputs = bring(draw(generator), torch.float64)
    weights = {"ce_weight": 0.75, "kd_weight": 2.5, "nd_weight": 0}
    (loss, ce, kd, _), (gradient, _) = expected(kind, inputs, weights=weights)
    for means, features in ((None, None), (None, torch.ones(3, 5)), (inputs["means"], None)):
        criterion = CRITERIA[kind](means, **weights, **OPTIONS[kind])
        assert ("class_means" in criterion.state_dict()) == (means is not None)
        inputs["student_logits"].grad = None
        terms = criterion(
            inputs["student_logits"], inputs["teacher_logits"], features, inputs["target"]
        )
        terms.loss.backward()
        for result, value in zip(terms, (loss, ce, kd, torch.zeros(())), strict=True):
            assert result.item() == pytest.approx(value.item(), rel=1e-9)
        assert not terms.nd.requires_grad
        torch.testing.assert_close(inputs["student_logits"].grad, gradient, rtol=1e-9, atol=1e-12)


def nodes_of(loss):
    """The nodes of its graph but those of leaves."""
    nodes = [loss.grad_fn]
    for node in nodes:
        for other, _ in node.next_functions:
            if other is not None and "AccumulateGrad" not in other.name() and other not in nodes:
                nodes.append(other)
    return nodes


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(("name", "kernels"), [("kd", 2), ("dkd", 2), ("hard", 3)])
@pytest.mark.parametrize("ramp", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_upstream_gradients_stay_one(name, kernels, ramp, generator):
    """Weights enter the kernels: behind them nothing is multiplied, and backward costs no pass."""
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[name](inputs["means"], **WEIGHTS)
    loss = call(criterion, inputs, kd_ramp=ramp, nd_ramp=ramp).loss
    nodes = nodes_of(loss)
    sums = [node for node in nodes if node.name() == "AddBackward0"]
    assert len(sums) == kernels - 2  # the ND loss adds itself
    nodes = [node for node in nodes if node not in sums]
    assert len(nodes) == kernels
    assert all("dnkd" in node.name() for node in nodes), nodes
    seen = []
    for node in nodes:
        node.register_prehook(lambda gradients: seen.append(gradients[0]))
    loss.backward()
    assert [gradient.item() for gradient in seen] == [1.0] * kernels


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.append(str(operator))
        return operator(*arguments, **(options or {}))


@pytest.mark.usefixtures("needs_extension")
class TestTheNdLossAddsItself:
    """Its kernel gives the sum of the loss before it and itself, and itself without its weight."""

    LEAVES = ("student_logits", "student_features")

    def added(self, inputs, base, features=None, weight=1.5):
        is_tensor = isinstance(weight, torch.Tensor)
        return torch.ops.dnkd_ext._nd_loss_added(
            base,
            inputs["student_features"] if features is None else features,
            inputs["target"],
            inputs["means"],
            inputs["teacher_features"],
            None,
            weight if is_tensor else None,
            1.0 if is_tensor else weight,
            255,
            1e-12,
        )

    def plain(self, kind, inputs, weight, **options):
        """Loss and ND loss from the parts, added by PyTorch."""
        first = call(CRITERIA[kind](None, nd_weight=0, **OPTIONS[kind], **options), inputs)
        nd = lambda weight: dnkd_ext.nd_loss(  # noqa: E731
            inputs["student_features"],
            inputs["target"],
            inputs["means"],
            teacher_features=inputs["teacher_features"],
            loss_weight=weight,
            **options,
        )
        return first.loss + nd(weight), nd(1.0).detach() * (weight != 0)

    @pytest.mark.parametrize("target", ["indices", "ignored", "mixup"])
    @pytest.mark.parametrize("weight", [1.0, 0.3, -2.5, 0.0, torch.tensor(0.3), torch.tensor(0.0)])
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_as_pytorch_would(self, kind, dtype, weight, target, device, generator):
        inputs = bring(draw(generator, target), dtype, device)
        is_tensor = isinstance(weight, torch.Tensor)
        given = weight.to(device) if is_tensor else weight
        # The ramp is part of the weight; a criterion's own that is 0 leaves the ND loss out.
        criterion = CRITERIA[kind](inputs["means"], **OPTIONS[kind], ignore_index=255)
        terms = call(criterion, inputs, nd_ramp=given)
        loss, nd = self.plain(kind, inputs, given, ignore_index=255)
        unit = torch.finfo(loss.dtype).eps
        torch.testing.assert_close(terms.loss, loss, rtol=unit, atol=0)
        torch.testing.assert_close(terms.nd, nd, rtol=2 * unit, atol=0)
        if dtype != torch.float64:
            assert torch.equal(terms.loss, loss)
        leaves = [inputs[key] for key in self.LEAVES]
        for factor in (1.0, -3.0):
            for a, b in zip(
                torch.autograd.grad(factor * terms.loss, leaves, retain_graph=True),
                torch.autograd.grad(factor * loss, leaves, retain_graph=True),
                strict=True,
            ):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("nd_weight", [1.0, 1.5, torch.tensor(1.5)])
    def test_nothing_but_two_kernels(self, nd_weight, generator):
        inputs = bring(draw(generator), torch.float32)
        criterion = dnkd_ext.KDPlusPlus(inputs["means"], nd_weight=nd_weight)
        with _Calls() as calls:
            terms = call(criterion, inputs)
        names = [name for name in calls.names if not name.startswith("aten.detach")]
        if isinstance(nd_weight, torch.Tensor):
            assert names.pop(0) == "aten.mul.Tensor"  # by the ramp
        assert names == [
            "dnkd_ext._logit_loss_forward.default",
            "dnkd_ext._nd_loss_added_forward.default",
        ]
        assert len(nodes_of(terms.loss)) == 2

    def test_derivatives(self, generator):
        """First and second ones, in both modes, of what it is added to as of the features."""
        inputs = bring(draw(generator, "ignored", rows=4), torch.float64)
        base = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)

        def both(base, features):
            return self.added(inputs, base.exp(), features)[0] ** 2

        for function, leaves in (
            (both, (base, inputs["student_features"])),
            (lambda base: both(base, inputs["student_features"].detach()), (base,)),
            (lambda features: both(base.detach(), features), (inputs["student_features"],)),
        ):
            assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(function, leaves)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_the_gradient_of_the_base_is_that_of_the_sum(self, dtype, device, generator):
        inputs = bring(draw(generator), dtype, device)
        features = inputs["student_features"]
        for needs_gradient in (False, True):
            base = torch.tensor(2.0, device=device, requires_grad=True)
            loss, nd = self.added(inputs, base, features.detach().requires_grad_(needs_gradient))
            assert loss.requires_grad
            assert not nd.requires_grad
            upstream = torch.tensor(-7.0, device=device)
            with _Calls() as calls:
                (gradient,) = torch.autograd.grad(loss, base, upstream, retain_graph=True)
            assert gradient == -7
            assert not any("dnkd" in name for name in calls.names)  # nothing for the features
            loss.backward(upstream)
            assert base.grad == -7
        with torch.no_grad():
            assert not self.added(inputs, base)[0].requires_grad
        assert not self.added(inputs, base.detach(), features.detach())[0].requires_grad

    def test_features_that_need_no_gradient(self, kind, generator):
        inputs = bring(draw(generator), torch.float32)
        criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
        wanted = call(criterion, inputs)
        wanted.loss.backward()
        frozen = bring(inputs, torch.float32)
        frozen["student_features"].requires_grad_(False)
        terms = call(criterion, frozen)
        assert torch.equal(terms.loss, wanted.loss)
        terms.loss.backward()
        assert torch.equal(frozen["student_logits"].grad, inputs["student_logits"].grad)

    @pytest.mark.parametrize("wide", ["student_logits", "student_features"])
    def test_other_dtypes_are_added_as_ever(self, kind, wide, generator):
        inputs = bring(draw(generator), torch.float32)
        inputs[wide] = inputs[wide].detach().double().requires_grad_()
        terms = call(CRITERIA[kind](inputs["means"], **OPTIONS[kind]), inputs, nd_ramp=0.3)
        loss, nd = self.plain(kind, inputs, 0.3)
        assert terms.loss.dtype == torch.float64
        torch.testing.assert_close(terms.loss, loss)
        torch.testing.assert_close(terms.nd, nd)
        terms.loss.backward()
        assert [inputs[key].grad.dtype for key in self.LEAVES] == [
            inputs[key].dtype for key in self.LEAVES
        ]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_saved_tensor_hooks(self, dtype, generator):
        inputs = bring(draw(generator), dtype)
        criterion = dnkd_ext.KDPlusPlus(inputs["means"], **WEIGHTS)
        leaves = [inputs[key] for key in self.LEAVES]
        wanted = torch.autograd.grad(3 * call(criterion, inputs).loss, leaves)
        kept = []
        hooks = (lambda x: kept.append(x) or x), (lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = 3 * call(criterion, inputs).loss
        before = [one.clone() for one in kept]
        for a, b in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))

    @pytest.mark.parametrize(
        "base", [torch.ones(1), torch.ones((), dtype=torch.float64), torch.ones((), device="meta")]
    )
    def test_a_bad_base(self, base, generator):
        inputs = bring(draw(generator), torch.float32)
        with pytest.raises(RuntimeError, match="base must be a 0-dim tensor of type Float on cpu"):
            self.added(inputs, base)
        if base.device.type == "cpu":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = {name: mode.from_tensor(value) for name, value in inputs.items()}
                with pytest.raises(RuntimeError, match="base must be a 0-dim tensor of type"):
                    self.added(fakes, mode.from_tensor(base))

    @pytest.mark.parametrize("way", ["undefined", "not wanted"])
    def test_lets_the_teacher_go(self, way, generator):
        """Also where the features get no gradient in the end."""
        inputs = bring(draw(generator), torch.float32)
        teacher = weakref.ref(inputs["teacher_features"])
        base = torch.ones((), requires_grad=True)
        loss, _ = self.added(inputs, base)
        if way == "not wanted":
            torch.autograd.grad(loss, base)
        else:
            loss.backward()
        del inputs["teacher_features"]
        gc.collect()
        assert teacher() is None


def test_logit_standardization(generator):
    inputs = bring(draw(generator), torch.float64)
    for name, function in (
        ("kd", dnkd_ext.reference.kd_loss),
        ("dkd", dnkd_ext.reference.dkd_loss),
    ):
        criterion = CRITERIA[name](inputs["means"], logit_standardization=True)
        target = [inputs["target"]] if name == "dkd" else []
        wanted = function(
            inputs["student_logits"], inputs["teacher_logits"], *target, logit_standardization=True
        )
        assert call(criterion, inputs).kd.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_meta_device(kind, generator):
    """A criterion on meta, as a model before its weights are loaded: shapes and dtypes alone."""
    inputs = bring(draw(generator), torch.bfloat16, "meta")
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    terms = call(criterion, inputs)
    assert [(term.device.type, term.dtype, term.shape) for term in terms] == [
        ("meta", torch.float32, ())
    ] * 4
    terms.loss.backward()
    assert inputs["student_logits"].grad.shape == (12, CLASSES)
    assert inputs["student_features"].grad.shape == (12, WIDTH)


def test_more_dimensions(kind, generator):
    """(..., C) logits are rows."""
    inputs = bring(draw(generator, rows=12), torch.float64)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    cube = {
        key: value if key == "means" else value.unflatten(0, (3, 4))
        for key, value in inputs.items()
    }
    torch.testing.assert_close(tuple(call(criterion, cube)), tuple(call(criterion, inputs)))


def test_ignoring_every_row(kind, generator):
    """Nothing counted is 0, not NaN."""
    inputs = bring(draw(generator), torch.float64)
    inputs["target"] = torch.full_like(inputs["target"], -100)
    criterion = CRITERIA[kind](inputs["means"], **OPTIONS[kind])
    terms = call(criterion, inputs)
    assert (terms.ce, terms.nd) == (0, 0)
    terms.loss.backward()
    assert inputs["student_features"].grad.abs().max() == 0
    assert inputs["student_logits"].grad.isfinite().all()


@pytest.mark.parametrize("target", ["indices", "mixup"])
def test_an_empty_batch(kind, target, generator):
    inputs = bring(draw(generator, target), torch.float64)
    inputs = {key: value if key == "means" else value[:0] for key, value in inputs.items()}
    terms = call(CRITERIA[kind](inputs["means"]), inputs)
    assert tuple(terms) == (0, 0, 0, 0)
    gradients = torch.autograd.grad(
        terms.loss, [inputs["student_logits"], inputs["student_features"]]
    )
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, CLASSES), (0, WIDTH)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strided_rows(kind, dtype, device, generator):
    """Every other row of a tensor, and rows whose numbers lie apart."""
    inputs = bring(draw(generator, "mixup", rows=24), dtype, device)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    rows = {key: value if key == "means" else value[1::2] for key, value in inputs.items()}
    columns = {
        key: value if key == "means" else value.mT.contiguous().mT for key, value in rows.items()
    }
    packed = bring({key: value.contiguous() for key, value in rows.items()}, dtype, device)
    wanted = call(criterion, packed)
    wanted.loss.backward()
    for strided in (rows, columns):
        terms = call(criterion, strided)
        torch.testing.assert_close(tuple(terms), tuple(wanted))
        for key in ("student_logits", "student_features"):
            (gradient,) = torch.autograd.grad(terms.loss, inputs[key], retain_graph=True)
            torch.testing.assert_close(gradient[1::2], packed[key].grad)
            assert gradient[::2].abs().max() == 0


@pytest.mark.parametrize("target", ["indices", "mixup"])
def test_second_derivatives(kind, target, generator):
    """Against finite differences of the first."""
    inputs = bring(draw(generator, target, rows=4), torch.float64)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind], label_smoothing=0.1)
    ramps = {name: torch.tensor(0.5, dtype=torch.float64) for name in RAMPS}

    def loss(logits, features):
        changed = {**inputs, "student_logits": logits, "student_features": features}
        return call(criterion, changed, **ramps).loss

    leaves = [inputs["student_logits"], inputs["student_features"]]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("ramp", [1.0, 0.5])
def test_compiled_autograd(kind, ramp, device, generator):
    """A backward pass that torch.compile traces as it runs, of a forward pass that is eager."""
    inputs = draw(generator)
    truth = expected(kind, inputs, kd_ramp=ramp, nd_ramp=ramp)
    given = bring(inputs, torch.float64, device)
    criterion = CRITERIA[kind](given["means"], **WEIGHTS, **OPTIONS[kind])
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        terms = call(criterion, given, kd_ramp=ramp, nd_ramp=ramp)
        terms.loss.backward()
    assert not any(term.requires_grad for term in terms[1:])
    check(terms, given, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(kind, dtype, device, generator):
    """Features and logits of a model under autocast: the terms are float32, and close."""
    inputs = bring(draw(generator), torch.float32, device)
    torch.manual_seed(0)
    body, head = nn.Linear(WIDTH, WIDTH).to(device), nn.Linear(WIDTH, CLASSES).to(device)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind]).to(device)

    def step():
        features = body(inputs["student_features"])
        terms = criterion(
            head(features),
            inputs["teacher_logits"],
            features,
            inputs["target"],
            teacher_features=inputs["teacher_features"],
        )
        return terms, torch.autograd.grad(terms.loss, list(body.parameters()))

    plain, gradients = step()
    with torch.autocast(device, dtype=dtype):
        mixed, mixed_gradients = step()
    assert all(term.dtype == torch.float32 for term in mixed)
    unit = torch.finfo(dtype).eps
    for a, b in zip(mixed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=20 * unit, atol=20 * unit)
    for a, b in zip(mixed_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=40 * unit * float(b.abs().max()))


def test_gradient_accumulation(kind, generator):
    """Several backward passes add up, retained graphs included."""
    first, second = (bring(draw(generator), torch.float64) for _ in range(2))
    means = first["means"]
    second["means"] = means
    criterion = CRITERIA[kind](means, **WEIGHTS, **OPTIONS[kind])
    wanted = 0
    for inputs, factor in ((first, 1.0), (second, 3.0)):
        _, gradients = expected(kind, inputs)
        wanted = [
            factor * g + (w if isinstance(wanted, list) else 0)
            for g, w in zip(gradients, wanted or (0, 0), strict=True)
        ]
    shared = {
        key: first[key].detach().clone().zero_().requires_grad_()
        for key in ("student_logits", "student_features")
    }
    for inputs, factor in ((first, 1.0), (second, 3.0)):
        moved = {**inputs, **{k: shared[k] + inputs[k].detach() for k in shared}}
        loss = call(criterion, moved).loss * factor
        loss.backward(retain_graph=True)
        loss.backward()
    for key, gradient in zip(shared, wanted, strict=True):
        torch.testing.assert_close(shared[key].grad, 2 * gradient, rtol=1e-9, atol=1e-12)


def test_state_dict(kind, generator):
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs["means"], nd_weight=torch.tensor(2.0), **OPTIONS[kind])
    assert set(criterion.state_dict()) == {"class_means", "nd_weight"}
    assert list(criterion.parameters()) == []
    other = CRITERIA[kind](
        torch.zeros(CLASSES, WIDTH), nd_weight=torch.tensor(0.5), **OPTIONS[kind]
    )
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(call(other, inputs).loss, call(criterion, inputs).loss)
    inputs["means"].zero_()
    assert criterion.class_means.abs().sum() > 0  # its own copy
    table = dnkd_ext.NDLoss(torch.zeros(CLASSES, WIDTH))
    table.load_state_dict({"class_means": criterion.state_dict()["class_means"]})
    assert torch.equal(table.class_means, criterion.class_means)


def test_takes_an_accumulator(kind, generator):
    """Class means as ClassMeans; a class without samples is named, where the criterion was made."""
    accumulator = dnkd_ext.ClassMeans(3, 4)
    accumulator.update(torch.randn(6, 4, generator=generator), torch.tensor([0, 2, 0, 2, 2, 0]))
    with pytest.warns(UserWarning, match=r"no samples for 1 of 3 classes \(1\)") as caught:
        criterion = CRITERIA[kind](accumulator)
    assert caught[0].filename == __file__
    assert torch.equal(criterion.class_means, accumulator.compute())


def test_repr(kind):
    text = repr(CRITERIA[kind](torch.ones(CLASSES, WIDTH), nd_weight=torch.tensor(2.0)))
    for part in (
        f"num_classes={CLASSES}",
        f"num_features={WIDTH}",
        "nd_weight=2.0",
        "ce_weight=1.0",
    ):
        assert part in text
    for name in OPTIONS[kind]:
        assert f"{name}=" in text
    assert "class_means=None" in repr(CRITERIA[kind](None, nd_weight=0))


# -- compilation and capture ----------------------------------------------------------------------


def test_weights_and_ramp_do_not_recompile(kind, device, generator):
    torch._dynamo.reset()
    inputs = bring(draw(generator), torch.float32, device)
    tensors = {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}
    criterion = CRITERIA[kind](inputs["means"], **tensors, **OPTIONS[kind]).to(device)
    ramped = lambda ramp: call(criterion, inputs, kd_ramp=ramp, nd_ramp=1 - ramp)  # noqa: E731
    compiled = torch.compile(ramped, fullgraph=True)
    leaves = [inputs["student_logits"], inputs["student_features"]]
    losses = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.0, 0.5, 1.0):
            criterion.nd_weight.fill_(value + 1)
            criterion.kd_weight.fill_(3 * value)
            ramp = torch.tensor(value, device=device)
            fast, slow = compiled(ramp), ramped(ramp)
            torch.testing.assert_close(tuple(fast), tuple(slow))
            for a, b in zip(
                torch.autograd.grad(fast.loss, leaves),
                torch.autograd.grad(slow.loss, leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
            losses.add(slow.loss.item())
    assert len(losses) == 3


def test_a_float_ramp_compiles(kind, generator):
    """More values than torch compiles: few are, the graph is whole, and none goes stale."""
    torch._dynamo.reset()
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    ramped = lambda ramp: call(criterion, inputs, kd_ramp=ramp, nd_ramp=1 - ramp)  # noqa: E731
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(ramped, fullgraph=True, backend=counter)
    leaves = [inputs["student_logits"], inputs["student_features"]]
    for epoch in range(torch._dynamo.config.recompile_limit + 6):
        ramp = min(1.0, epoch / 10)
        fast, slow = compiled(ramp), ramped(ramp)
        torch.testing.assert_close(tuple(fast), tuple(slow))
        torch.testing.assert_close(
            torch.autograd.grad(fast.loss, leaves), torch.autograd.grad(slow.loss, leaves)
        )
    assert counter.frame_count <= 4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step(kind, backend, device, generator):
    """Body, head, projector, criterion and backward: trains as the eager step does."""
    torch._dynamo.reset()
    inputs = bring(draw(generator, "mixup"), torch.float32, device)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind]).to(device)
    images = torch.randn(12, 8, generator=generator).to(device)

    def train(compile_it):
        torch.manual_seed(0)
        body, head = nn.Linear(8, 16).to(device), nn.Linear(16, CLASSES).to(device)
        projector = dnkd_ext.FeatureProjector(16, WIDTH, dropout=0.0).to(device)
        model = nn.ModuleList([body, head, projector])

        def loss_of(x, ramp):
            features = body(x).relu()
            return criterion(
                head(features),
                inputs["teacher_logits"],
                projector(features),
                inputs["target"],
                teacher_features=inputs["teacher_features"],
                kd_ramp=ramp,
                nd_ramp=ramp,
            ).loss

        run = torch.compile(loss_of, backend=backend, fullgraph=True) if compile_it else loss_of
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            loss = run(images, torch.tensor(min(1.0, (step + 1) / 2), device=device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    eager, compiled = train(False), train(True)
    assert eager[-1] < eager[1]
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.cuda
def test_cuda_graph(kind, generator):
    """Captured once; a weight and the ramp change between replays."""
    inputs = bring(draw(generator), torch.float32, "cuda")
    criterion = CRITERIA[kind](inputs["means"], nd_weight=torch.tensor(1.5), **OPTIONS[kind]).to(
        "cuda"
    )
    ramp = torch.ones((), device="cuda")
    leaves = [inputs["student_logits"], inputs["student_features"]]

    def step():
        terms = call(criterion, inputs, kd_ramp=ramp, nd_ramp=ramp)
        return (*terms, *torch.autograd.grad(terms.loss, leaves))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (0.0, 0.5):
        ramp.fill_(value)
        criterion.nd_weight.fill_(value + 1)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.cuda
def test_does_not_synchronise(kind, generator):
    inputs = bring(draw(generator), torch.float32, "cuda")
    criterion = CRITERIA[kind](inputs["means"], nd_weight=torch.tensor(1.5), **OPTIONS[kind]).to(
        "cuda"
    )
    ramp = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        terms = call(criterion, inputs, kd_ramp=ramp, nd_ramp=ramp)
        terms.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(term.isfinite() for term in terms)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"class_means": None}, ValueError, "class_means must be given unless nd_weight is 0"),
        (
            {"class_means": None, "nd_weight": torch.tensor(0.0)},
            ValueError,
            "class_means must be given",
        ),
        ({"class_means": torch.ones(3)}, ValueError, r"class_means must be \(C, D\)"),
        ({"class_means": [[1.0]]}, TypeError, "class_means must be a torch.Tensor, got list"),
        ({"ce_weight": math.nan}, ValueError, "ce_weight must be finite, got nan"),
        ({"kd_weight": math.inf}, ValueError, "kd_weight must be finite, got inf"),
        ({"nd_weight": -math.inf}, ValueError, "nd_weight must be finite, got -inf"),
        ({"nd_weight": "1"}, TypeError, "nd_weight must be a float or a 0-dim tensor, got str"),
        ({"nd_weight": True}, TypeError, "nd_weight must be a float or a 0-dim tensor, got bool"),
        ({"kd_weight": torch.ones(2)}, ValueError, "kd_weight must be a float or a 0-dim tensor"),
        (
            {"kd_weight": torch.ones((), requires_grad=True)},
            ValueError,
            "kd_weight must not require a gradient",
        ),
        ({"kd_weight": torch.tensor(1)}, TypeError, "kd_weight must be float16"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
    ],
    ids=str,
)
def test_bad_construction(kind, options, error, match):
    options = {"class_means": torch.ones(CLASSES, WIDTH), **options}
    with pytest.raises(error, match=match):
        CRITERIA[kind](options.pop("class_means"), **options)


@pytest.mark.parametrize("kind", ["kd", "dkd"])
def test_bad_standardization(kind):
    with pytest.raises(TypeError, match="logit_standardization must be a bool, got str"):
        CRITERIA[kind](torch.ones(CLASSES, WIDTH), logit_standardization="no")


def test_an_ignore_index_of_numpy(kind, generator):
    """A label as NumPy gives it; the criterion keeps an int."""
    inputs = bring(draw(generator, "ignored"), torch.float32)
    given = CRITERIA[kind](inputs["means"], ignore_index=np.int64(255))
    assert type(given.ignore_index) is int
    terms = call(given, inputs)
    assert tuple(terms) == tuple(call(CRITERIA[kind](inputs["means"], ignore_index=255), inputs))


@pytest.mark.parametrize("kind", ["kd", "dkd", "dist"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(kind, value):
    name = "tau" if kind == "dist" else "temperature"
    with pytest.raises(ValueError, match=f"{name} must be finite and greater than 0, got {value}"):
        CRITERIA[kind](torch.ones(CLASSES, WIDTH), **{name: value})
    for other in {"alpha", "beta", "gamma"} & set(OPTIONS[kind]):
        with pytest.raises(ValueError, match=f"{other} must be finite, got nan"):
            CRITERIA[kind](torch.ones(CLASSES, WIDTH), **{other: math.nan})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"student_features": torch.ones(12, 7)},
            ValueError,
            r"class_means is 24 wide but student_features is 7 wide.*FeatureProjector\(7, 24\)",
        ),
        (
            {"student_features": torch.ones(12, 24, 7, 7)},
            ValueError,
            r"must be one vector per row of student_logits.*maps of shape \[12, 24, 7, 7\]; pool",
        ),
        (
            {"student_features": torch.ones(12, 7, 7, 24)},
            ValueError,
            r"must be one vector per row of student_logits.*maps of shape \[12, 7, 7, 24\]; pool",
        ),
        (
            {"student_features": None},
            ValueError,
            "student_features must be given unless nd_weight is 0, got None",
        ),
        ({"student_features": [1.0]}, TypeError, "student_features must be a torch.Tensor"),
        (
            {"student_logits": torch.ones(12, 9), "teacher_logits": torch.ones(12, 9)},
            ValueError,
            "class_means has 10 classes but student_logits has 9",
        ),
        ({"student_logits": None}, TypeError, "student_logits must be a torch.Tensor"),
        (
            {"student_logits": torch.ones(12, 10).long()},
            TypeError,
            "student_logits must be float16",
        ),
        ({"teacher_logits": torch.ones(12, 9)}, ValueError, "teacher_logits must have the shape"),
        ({"target": torch.ones(11).long()}, ValueError, "target of class indices must have the"),
        ({"target": torch.ones(12, 9)}, ValueError, "target of class probabilities must"),
        ({"target": torch.ones(12).bool()}, TypeError, "target must hold int64 or int32"),
        ({"target": torch.full((12,), 10)}, IndexError, r"target\[0\] = 10 is out of range for 10"),
        ({"target": None}, TypeError, "target must be a torch.Tensor"),
        ({"teacher_features": torch.ones(11, 24)}, ValueError, "teacher_features must have the"),
        ({"teacher_features": [1.0]}, TypeError, "teacher_features must be a torch.Tensor, got"),
        (
            {"teacher_features": None, "teacher_norms": np.ones(12)},
            TypeError,
            "teacher_norms must be a torch.Tensor, got ndarray",
        ),
        ({"teacher_norms": torch.ones(12)}, ValueError, "were both given"),
        (
            {"teacher_logits": torch.ones(12, 10).long()},
            TypeError,
            "teacher_logits must be float16",
        ),
        (
            {"teacher_logits": torch.ones(12, 10, device="meta")},
            RuntimeError,
            "teacher_logits is on meta but student_logits is on cpu",
        ),
    ],
    ids=str,
)
def test_bad_input(kind, changes, error, match, generator):
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs.pop("means"), **OPTIONS[kind])
    criterion(**inputs)  # good before it is spoilt
    with pytest.raises(error, match=match):
        criterion(**{**inputs, **changes})


@pytest.mark.parametrize("name", RAMPS)
@pytest.mark.parametrize(
    ("ramp", "error", "match"),
    [
        (math.nan, ValueError, "must be finite, got nan"),
        ("1", TypeError, "must be a float or a 0-dim tensor, got str"),
        (True, TypeError, "must be a float or a 0-dim tensor, got bool"),
        (torch.ones(2), ValueError, "must be a float or a 0-dim tensor, got shape"),
        (torch.ones((), requires_grad=True), ValueError, "must not require a gradient"),
        (torch.ones((), device="meta"), RuntimeError, "is on meta but student_logits is on cpu"),
    ],
    ids=str,
)
def test_bad_ramp(kind, name, ramp, error, match, generator):
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs["means"], **OPTIONS[kind])
    with pytest.raises(error, match=f"^{name} {match}"):
        call(criterion, inputs, **{name: ramp})


# -- hard distillation ----------------------------------------------------------------------------


class TestTwoHeads:
    """HardKDPlusPlus with the logits of a distillation token beside those of the class token."""

    def draw(self, generator, target="indices", dtype=torch.float64, device="cpu"):
        inputs = draw(generator, target)
        inputs["distillation_logits"] = 2 * torch.randn(
            12, CLASSES, generator=generator, dtype=torch.float64
        )
        inputs = bring(inputs, dtype, device)
        inputs["distillation_logits"].requires_grad_()
        return inputs, dnkd_ext.HardKDPlusPlus(
            inputs.pop("means"), **WEIGHTS, label_smoothing=0.1, ignore_index=255
        )

    @pytest.mark.parametrize("target", ["indices", "ignored", "mixup"])
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_each_learns_from_its_own(self, target, dtype, device, generator):
        """Smoothing and ignored rows are the target's; the teacher's decision is in all rows."""
        inputs, criterion = self.draw(generator, target, dtype, device)
        terms = criterion(**inputs, kd_ramp=0.5)
        terms.loss.backward()
        x = {key: value.detach().cpu() for key, value in inputs.items()}
        x = {key: v.double() if v.is_floating_point() else v for key, v in x.items()}
        own, other = (x[key].requires_grad_() for key in ("student_logits", "distillation_logits"))
        soft = x["target"].is_floating_point()
        ignored = {} if soft else {"ignore_index": 255}
        ce = F.cross_entropy(own, x["target"], label_smoothing=0.1, **ignored)
        kd = F.cross_entropy(other, x["teacher_logits"].argmax(1))
        (WEIGHTS["ce_weight"] * ce + 0.5 * WEIGHTS["kd_weight"] * kd).backward()
        exact = dtype == torch.float64
        tolerance = 1e-9 if exact else 2e-5
        for result, value in ((terms.ce, ce), (terms.kd, kd)):
            assert result.dtype == (torch.float64 if exact else torch.float32)
            assert not result.requires_grad
            assert result.item() == pytest.approx(value.item(), rel=tolerance)
        sum_of_terms = terms.loss.item() - WEIGHTS["nd_weight"] * terms.nd.item()
        wanted = WEIGHTS["ce_weight"] * ce + 0.5 * WEIGHTS["kd_weight"] * kd
        assert sum_of_terms == pytest.approx(wanted.item(), rel=10 * tolerance)
        for key, leaf in (("student_logits", own), ("distillation_logits", other)):
            error = (inputs[key].grad.double().cpu() - leaf.grad).abs().max()
            bound = tolerance + torch.finfo(dtype).eps
            assert error <= bound * leaf.grad.abs().max(), key

    def test_without_them_the_logits_serve_both(self, generator):
        inputs, criterion = self.draw(generator)
        inputs["distillation_logits"] = inputs["student_logits"]
        both = criterion(**inputs)
        inputs["distillation_logits"] = None
        torch.testing.assert_close(tuple(criterion(**inputs)), tuple(both), rtol=0, atol=0)

    def test_an_ignored_class_may_be_the_teachers_decision(self, generator):
        """ignore_index is about targets, even where it is a class."""
        inputs, _ = self.draw(generator)
        inputs["teacher_logits"][:6, 3] = 20.0
        criterion = dnkd_ext.HardKDPlusPlus(None, nd_weight=0, ignore_index=3)
        wanted = F.cross_entropy(inputs["distillation_logits"], inputs["teacher_logits"].argmax(1))
        assert criterion(**inputs).kd.item() == pytest.approx(wanted.item(), rel=1e-9)

    def test_other_dtypes(self, generator):
        """Heads and teacher need not agree; the loss is that of the student's logits."""
        inputs, criterion = self.draw(generator, dtype=torch.float32)
        inputs["teacher_logits"] = inputs["teacher_logits"].bfloat16()
        inputs["distillation_logits"] = inputs["distillation_logits"].detach().double()
        terms = criterion(**inputs)
        wanted = F.cross_entropy(inputs["distillation_logits"], inputs["teacher_logits"].argmax(1))
        assert all(term.dtype == torch.float32 for term in terms)
        assert terms.kd.item() == pytest.approx(wanted.item(), rel=1e-6)

    def test_the_teacher_gets_no_gradient(self, generator):
        inputs, criterion = self.draw(generator)
        inputs["teacher_logits"].requires_grad_()
        criterion(**inputs).loss.backward()
        assert inputs["teacher_logits"].grad is None

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_teacher_without_a_decision_is_not_hidden(self, value, generator):
        inputs, criterion = self.draw(generator)
        inputs["teacher_logits"][2, 4] = value
        terms = criterion(**inputs)
        assert terms.loss.isnan()
        assert terms.kd.isnan()
        assert terms.ce.isfinite()
        terms.loss.backward()
        assert inputs["distillation_logits"].grad.isnan().any()

    def test_impossible_classes_of_the_teacher_count(self, generator):
        """-infinity is a logit as any other, unless all are."""
        inputs, criterion = self.draw(generator)
        inputs["teacher_logits"][2, 4:] = -math.inf
        assert criterion(**inputs).loss.isfinite()

    def test_retained_graphs(self, generator):
        inputs, criterion = self.draw(generator)
        loss = criterion(**inputs).loss
        loss.backward(retain_graph=True)
        once = inputs["distillation_logits"].grad.clone()
        (3 * loss).backward()
        torch.testing.assert_close(inputs["distillation_logits"].grad, 4 * once)

    def test_second_derivatives(self, generator):
        inputs, criterion = self.draw(generator)
        keys = ("student_logits", "distillation_logits")
        leaves = [inputs[key].detach()[:3].clone().requires_grad_() for key in keys]
        rows = {key: value[:3] for key, value in inputs.items()}

        def loss(own, other):
            changed = {"student_logits": own, "distillation_logits": other}
            return criterion(**{**rows, **changed}).loss

        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compile(self, backend, device, generator):
        """One graph, whatever the ramps are."""
        torch._dynamo.reset()
        inputs, criterion = self.draw(generator, "mixup", torch.float32, device)
        run = lambda ramp: criterion(**inputs, kd_ramp=ramp, nd_ramp=ramp)  # noqa: E731
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        leaves = [value for value in inputs.values() if value.requires_grad]
        assert len(leaves) == 3
        with torch._dynamo.config.patch(error_on_recompile=True):
            for value in (0.0, 0.5):
                ramp = torch.tensor(value, device=device)
                fast, slow = compiled(ramp), run(ramp)
                torch.testing.assert_close(tuple(fast), tuple(slow))
                torch.testing.assert_close(
                    torch.autograd.grad(fast.loss, leaves), torch.autograd.grad(slow.loss, leaves)
                )

    @pytest.mark.parametrize(
        ("logits", "error", "match"),
        [
            ([1.0], TypeError, "must be a torch.Tensor, got list"),
            (torch.ones(12, CLASSES).long(), TypeError, "must be float16"),
            (torch.ones(12, 9), ValueError, r"must have the shape of student_logits \[12, 10\]"),
            (torch.ones(12, 10, device="meta"), RuntimeError, "is on meta but student_logits is"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", ["teacher_logits", "distillation_logits"])
    def test_bad_input(self, name, logits, error, match, generator):
        inputs, criterion = self.draw(generator)
        with pytest.raises(error, match=f"^{name} {match}"):
            criterion(**{**inputs, name: logits})


# -- projector ------------------------------------------------------------------------------------


class TestFeatureProjector:
    def test_is_norm_dropout_linear(self, generator):
        torch.manual_seed(0)
        projector = dnkd_ext.FeatureProjector(6, 4, dropout=0.0)
        features = torch.randn(32, 6, generator=generator) * 3 + 1
        centred = features - features.mean(0)
        normal = centred / (centred.square().mean(0) + projector.norm.eps).sqrt()
        torch.testing.assert_close(
            projector(features), normal @ projector.linear.weight.T + projector.linear.bias
        )
        assert [type(module) for module in projector.children()] == [
            nn.BatchNorm1d,
            nn.Dropout,
            nn.Linear,
        ]
        assert dnkd_ext.FeatureProjector(np.int64(6), np.int64(4)).dropout.p == 0.5
        made = dnkd_ext.FeatureProjector(6, 4, device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float64)}
        assert "in_features=6, out_features=4" in repr(projector)

    def test_rows_are_no_view(self):
        """Of which FSDP2 warns, as its hooks would not survive a change in place."""
        assert dnkd_ext.FeatureProjector(6, 4)(torch.randn(5, 6))._base is None

    def test_leading_dimensions(self, generator):
        """The statistics are over all rows, however they are laid out."""
        features = torch.randn(3, 5, 6, generator=generator)
        torch.manual_seed(0)
        cube = dnkd_ext.FeatureProjector(6, 4, dropout=0.0)
        torch.manual_seed(0)
        flat = dnkd_ext.FeatureProjector(6, 4, dropout=0.0)
        torch.testing.assert_close(cube(features).flatten(0, 1), flat(features.flatten(0, 1)))
        torch.testing.assert_close(cube.norm.running_mean, flat.norm.running_mean)
        cube.eval()
        assert cube(features[0, 0]).shape == (4,)
        assert cube(features[:0]).shape == (0, 5, 4)

    def test_drops_features_in_training_only(self, generator):
        torch.manual_seed(0)
        projector = dnkd_ext.FeatureProjector(6, 4)
        features = torch.randn(32, 6, generator=generator)
        assert not torch.equal(projector(features), projector(features))
        projector.eval()
        assert torch.equal(projector(features), projector(features))

    def test_trains_with_a_criterion(self, generator):
        inputs = bring(draw(generator), torch.float32)
        projector = dnkd_ext.FeatureProjector(7, WIDTH)
        features = torch.randn(12, 7, generator=generator, requires_grad=True)
        criterion = dnkd_ext.KDPlusPlus(inputs["means"])
        call(criterion, {**inputs, "student_features": projector(features)}).loss.backward()
        assert features.grad.abs().sum() > 0
        assert all(p.grad is not None for p in projector.parameters())

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ((0, 4), ValueError, "in_features must be at least 1, got 0"),
            ((4, -1), ValueError, "out_features must be at least 1, got -1"),
            ((4.0, 4), TypeError, "in_features must be an int, got float"),
            ((True, 4), TypeError, "in_features must be an int, got bool"),
            ((4, 4, 1.5), ValueError, "dropout must be between 0 and 1, got 1.5"),
            ((4, 4, None), TypeError, "dropout must be a float, got NoneType"),
            ((4, 4, torch.tensor(0.5)), TypeError, "dropout must be a float, got Tensor"),
        ],
    )
    def test_bad_construction(self, arguments, error, match):
        with pytest.raises(error, match=match):
            dnkd_ext.FeatureProjector(*arguments)

    def test_bad_input(self):
        projector = dnkd_ext.FeatureProjector(6, 4)
        with pytest.raises(ValueError, match=r"features must be \(\.\.\., 6\), got shape \[8, 5\]"):
            projector(torch.ones(8, 5))
        with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got list"):
            projector([1.0])


def test_what_is_no_process_group():
    with pytest.raises(TypeError, match="process_group must be a torch"):
        dnkd_ext.DISTPlusPlus(torch.ones(3, 4), process_group="all")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_class_means_that_are_not_finite(kind, value):
    means = torch.ones(5, 4)
    means[[1, 3], 2] = value
    with pytest.raises(ValueError, match="class_means is not finite in the classes 1, 3"):
        CRITERIA[kind](means, **OPTIONS[kind])


def test_criteria_are_made_where_nothing_can_be_looked_at(kind):
    """While a graph is compiled or transformed, and of fake tensors."""
    torch._dynamo.reset()

    def width(means):
        return CRITERIA[kind](means, **OPTIONS[kind]).class_means.sum()

    means = torch.ones(5, 4)
    assert torch.compile(width, backend="eager", fullgraph=True)(means) == 20
    assert torch.func.vmap(width)(torch.stack([means, 2 * means])).tolist() == [20, 40]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert width(means).shape == ()
        assert width(mode.from_tensor(means)).shape == ()


def test_a_copy_stays_in_its_process_group():
    """A process group cannot be copied; averages of weights and checkpoints copy criteria."""

    class Group:
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    group = Group()
    criterion = dnkd_ext.DISTPlusPlus(torch.ones(3, 4), beta=2.0)
    criterion.process_group = group
    other = copy.deepcopy(criterion)
    assert other.process_group is group
    shallow = copy.copy(criterion)
    assert shallow.process_group is group
    assert shallow.class_means is criterion.class_means
    with pytest.raises(TypeError, match="DISTPlusPlus cannot be pickled with its process_group"):
        pickle.dumps(criterion)
    criterion.process_group = None
    assert pickle.loads(pickle.dumps(criterion)).tau == criterion.tau
    assert other.beta == 2.0
    assert torch.equal(other.class_means, criterion.class_means)
    assert other.class_means.data_ptr() != criterion.class_means.data_ptr()


def test_a_copy_of_a_compiled_criterion_is_its_own(kind, generator):
    """Not a way to call the original."""
    criterion = CRITERIA[kind](torch.randn(CLASSES, WIDTH, generator=generator), nd_weight=1.0)
    criterion.compile(backend="eager")
    student, teacher = torch.randn(2, 6, CLASSES, generator=generator)
    features = torch.randn(6, WIDTH, generator=generator)
    target = torch.arange(6)
    other = copy.deepcopy(criterion)
    other.class_means.zero_()
    nd = [one(student, teacher, features, target).nd.item() for one in (criterion, other)]
    assert nd[1] == 1  # without a direction
    assert abs(nd[0] - 1) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_label_that_is_the_only_class_costs_nothing(dtype, generator):
    """All others masked: the cross entropy is 0, and so is its gradient."""
    student = torch.randn(4, CLASSES, generator=generator).to(dtype)
    student[1] = -torch.inf
    student[1, 3] = 2.0
    student.requires_grad_()
    target = torch.tensor([0, 3, 5, -100])
    of_token = torch.randn(4, CLASSES, generator=generator).to(dtype)
    criterion = dnkd_ext.HardKDPlusPlus(None, nd_weight=0.0)
    terms = criterion(student, of_token, None, target, distillation_logits=of_token)
    wanted = F.cross_entropy(student.double(), target)
    assert terms.ce.item() == pytest.approx(wanted.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient.isfinite().all()
    assert gradient[1].abs().max() == 0


@pytest.mark.parametrize("filler", [torch.nan, -torch.inf, torch.inf])
def test_ignored_rows_do_not_enter_the_cross_entropy_whatever_they_hold(filler, generator):
    student = torch.randn(4, CLASSES, generator=generator)
    student[2] = filler
    student.requires_grad_()
    target = torch.tensor([0, 3, -100, 1])
    criterion = dnkd_ext.HardKDPlusPlus(None, nd_weight=0.0, kd_weight=0.0)
    of_token = torch.randn(4, CLASSES, generator=generator)
    terms = criterion(student, of_token, None, target, distillation_logits=of_token)
    wanted = F.cross_entropy(student, target)
    torch.testing.assert_close(terms.ce, wanted.detach())
    torch.testing.assert_close(terms.loss, wanted)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient[2].abs().max() == 0
    (expected,) = torch.autograd.grad(
        F.cross_entropy(student[[0, 1, 3]], target[[0, 1, 3]]), student
    )
    torch.testing.assert_close(gradient[[0, 1, 3]], expected[[0, 1, 3]])


def test_a_target_that_is_no_tensor_is_named(generator):
    criterion = dnkd_ext.HardKDPlusPlus(None, nd_weight=0.0)
    logits = torch.randn(2, CLASSES, generator=generator)
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got list"):
        criterion(logits, logits, None, [1, 2])


def test_a_weight_made_under_inference_mode_can_be_filled(kind):
    with torch.inference_mode():
        criterion = CRITERIA[kind](None, nd_weight=0.0, kd_weight=torch.tensor(2.0))
    criterion.kd_weight.fill_(3.0)
    assert criterion.kd_weight.item() == 3


def test_a_weight_on_another_device_is_named(kind, generator):
    criterion = CRITERIA[kind](None, nd_weight=0.0, kd_weight=torch.tensor(2.0, device="meta"))
    student, teacher = torch.randn(2, 6, CLASSES, generator=generator)
    with pytest.raises(RuntimeError, match="kd_weight"):
        criterion(student, teacher, None, torch.arange(6))


@pytest.mark.parametrize("first", [0.5, 1.0, 1])
def test_a_ramp_that_was_1_early_does_not_compile_every_value(kind, first, generator):
    """As validation without a ramp makes it."""
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(ramp):
        return call(criterion, inputs, kd_ramp=ramp)

    for ramp in (None, first, *(step / 20 for step in range(20)), 1.0, None):
        torch.testing.assert_close(
            tuple(compiled(ramp)), tuple(call(criterion, inputs, kd_ramp=ramp))
        )
    assert counter.frame_count <= 4
    # Without one there is nothing to multiply.
    nodes = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert not any("new_ones" in node for node in nodes)


def test_a_teacher_with_a_graph_under_transforms(kind, generator):
    """There a student's tensor does not tell that it needs a gradient."""
    inputs = bring(draw(generator), torch.float64)
    teacher = inputs["teacher_logits"].detach().requires_grad_()
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])

    def loss(logits):
        return call(criterion, {**inputs, "student_logits": logits, "teacher_logits": teacher}).loss

    point = inputs["student_logits"].detach()
    (wanted,) = torch.autograd.grad(loss(point.clone().requires_grad_()), [teacher], None,
                                    allow_unused=True)  # fmt: skip
    assert wanted is None
    tangent = torch.randn(point.shape, generator=generator, dtype=torch.float64)
    _, slope = torch.func.jvp(loss, (point,), (tangent,))
    batched = torch.func.vmap(loss)(torch.stack([point, point]))
    torch.testing.assert_close(batched[0], loss(point.clone().requires_grad_()).detach())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(point, tangent)))
    torch.testing.assert_close(dual.tangent, slope)


def test_logits_of_student_and_teacher_that_are_swapped_are_told(kind, generator):
    """The classifier would not be trained, without a word."""
    inputs = bring(draw(generator), torch.float32)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])
    names = "student_logits", "teacher_logits"
    swapped = {**inputs, **dict(zip(names, (inputs[name] for name in names[::-1]), strict=True))}
    assert inputs["student_logits"].requires_grad
    with pytest.raises(ValueError, match="teacher_logits needs a gradient but student_logits"):
        call(criterion, swapped)
    with torch.no_grad():
        call(criterion, swapped)
    if WIDTH != CLASSES:
        swapped = {**inputs, "student_logits": inputs["student_features"]}
        swapped["student_features"] = inputs["student_logits"]
        with pytest.raises(ValueError, match="the two seem to be swapped"):
            call(criterion, swapped)


def test_missing_class_means_are_told_where_they_count(kind):
    means = dnkd_ext.ClassMeans(CLASSES, WIDTH)
    means.update(torch.ones(1, WIDTH), torch.zeros(1, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CRITERIA[kind](means, nd_weight=0)
    with pytest.warns(UserWarning, match="no samples"):
        CRITERIA[kind](means)


def test_linearize(kind, generator):
    """It records what the reference does, and there labels have no value to look at."""
    inputs = bring(draw(generator), torch.float64)
    criterion = CRITERIA[kind](inputs["means"], **WEIGHTS, **OPTIONS[kind])

    def loss(logits):
        return call(criterion, {**inputs, "student_logits": logits}).loss

    point = inputs["student_logits"].detach()
    tangent = torch.randn(point.shape, generator=generator, dtype=torch.float64)
    value, linear = torch.func.linearize(loss, point)
    wanted, slope = torch.func.jvp(loss, (point,), (tangent,))
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(linear(tangent), slope)


def test_an_exported_criterion_is_saved(kind, generator, tmp_path):
    inputs = bring(draw(generator), torch.float32)
    names = "student_logits", "teacher_logits", "student_features", "target"
    given = tuple(inputs[name].detach() for name in names)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = CRITERIA[kind](inputs["means"], **OPTIONS[kind])

        def forward(self, *args):
            return self.criterion(*args)

    program = torch.export.export(Model(), given)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(tuple(loaded(*given)), tuple(Model()(*given)))
    assert isinstance(loaded(*given), dnkd_ext.CriterionTerms)
    gradients = []
    # Decompositions make detach() an alias, so that the references' graphs have other gradients.
    is_fused = dnkd_ext.build_info()["loaded"]
    exported = program.run_decompositions() if is_fused else program
    for module in (Model(), exported.module()):
        students = [inputs[name].detach().requires_grad_() for name in (names[0], names[2])]
        loss = module(students[0], given[1], students[1], given[3]).loss
        gradients.append(torch.autograd.grad(loss, students))
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
