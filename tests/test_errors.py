"""Wrong calls: the right exception, naming the argument, from every way in."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

import dnkd_ext
from tests.cases import CASES, ND_LOSS, convert, replaced, tensors_of

ALL = [
    pytest.param(case, bad, id=f"{case.name}-{bad.name}")
    for case in CASES
    for bad in case.bad_inputs
]


@pytest.mark.parametrize(("one", "bad"), ALL)
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_bad_input(one, bad, implementation, needs_gradient, generator):
    args, kwargs = convert(one.variants[one.main](generator, 6, 8, 5), torch.float32, "cpu")
    args[0] = args[0].detach().requires_grad_(needs_gradient)
    getattr(one, implementation)(*args, **kwargs)  # good before it is spoilt
    bad.change(args, kwargs)
    with pytest.raises(bad.error, match=bad.match):
        getattr(one, implementation)(*args, **kwargs)


def misplaced(case, arguments, device):
    """Arguments of which one tensor is elsewhere, and what the error must begin with."""
    names = list(inspect.signature(case.reference).parameters)
    for where, tensor in tensors_of(arguments).items():
        if where != 0:
            name = names[where] if isinstance(where, int) else where
            message = f"{name} is on {device} but {names[0]} is on "
            yield replaced(arguments, {where: tensor.to(device)}), message


@pytest.mark.cuda
def test_devices_differ(case, generator):
    arguments = convert(case.variants[case.main](generator, 6, 8, 5), torch.float32, "cuda")
    for (args, kwargs), message in misplaced(case, arguments, "cpu"):
        for function in (case.fused, case.reference):
            with pytest.raises(RuntimeError, match=f"{message}cuda:0; they must be on the same"):
                function(*args, **kwargs)


def test_devices_differ_without_a_gpu(case, generator):
    arguments = convert(case.variants[case.main](generator, 6, 8, 5), torch.float32, "cpu")
    for (args, kwargs), message in misplaced(case, arguments, "meta"):
        for function in (case.fused, case.reference):
            with pytest.raises(RuntimeError, match=f"{message}cpu; they must be on the same"):
                function(*args, **kwargs)


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
@pytest.mark.parametrize(
    ("option", "value", "error", "wanted"),
    [
        ("ignore_index", None, TypeError, "an int, got NoneType"),
        ("ignore_index", 1.0, TypeError, "an int, got float"),
        ("ignore_index", True, TypeError, "an int, got bool"),
        ("ignore_index", torch.tensor(1), TypeError, "an int, got Tensor"),
        ("eps", True, TypeError, "a float, got bool"),
        ("eps", torch.tensor(1e-12), TypeError, "a float, got Tensor"),
        ("reduction", None, ValueError, "'none', 'mean' or 'sum', got None"),
        ("loss_weight", "1", TypeError, "a float or a 0-dim tensor, got str"),
        ("loss_weight", True, TypeError, "a float or a 0-dim tensor, got bool"),
    ],
    ids=str,
)
def test_options_of_other_types(implementation, option, value, error, wanted, generator):
    args, kwargs = ND_LOSS.variants["teacher_features"](generator, 6, 8, 5)
    message = f"{option} must be {wanted}"
    with pytest.raises(error, match=message):
        implementation.nd_loss(*args, **kwargs, **{option: value})
    with pytest.raises(error, match=message):
        dnkd_ext.NDLoss(args[2], **{option: value})
    if option in ("ignore_index", "eps"):
        with pytest.raises(error, match=message):
            implementation.feature_diagnostics(*args, **kwargs, **{option: value})


@pytest.mark.parametrize("implementation", [dnkd_ext, dnkd_ext.reference], ids=["fused", "ref"])
def test_options_of_numpy(implementation, generator):
    """Its scalars are numbers as any other."""
    args, kwargs = ND_LOSS.variants["teacher_features"](generator, 6, 8, 5)
    label = int(args[1][0])
    plain = {"ignore_index": label, "eps": 0.5}
    given = {"ignore_index": np.int64(label), "eps": np.float64(0.5)}
    for name in ("nd_loss", "feature_diagnostics"):
        function = getattr(implementation, name)
        wanted = function(*args, **kwargs, **plain)
        torch.testing.assert_close(function(*args, **kwargs, **given), wanted, rtol=0, atol=0)
    module = dnkd_ext.NDLoss(args[2], **given, loss_weight=np.float32(2.0))
    wanted = dnkd_ext.nd_loss(*args, **kwargs, **plain, loss_weight=2.0)
    torch.testing.assert_close(module(*args[:2], **kwargs), wanted, rtol=0, atol=0)


class TestModule:
    def test_equals_functional(self, generator):
        args, kwargs = convert(
            ND_LOSS.variants["teacher_features"](generator, 6, 8, 5), torch.float32, "cpu"
        )
        options = {"ignore_index": 3, "reduction": "sum", "loss_weight": 0.5, "eps": 1e-6}
        criterion = dnkd_ext.NDLoss(args[2], **options)
        assert torch.equal(
            criterion(args[0], args[1], **kwargs), dnkd_ext.nd_loss(*args, **kwargs, **options)
        )

    def test_state_and_devices(self, generator):
        means = torch.randn(5, 8, generator=generator)
        criterion = dnkd_ext.NDLoss(means, loss_weight=torch.tensor(2.0))
        assert set(criterion.state_dict()) == {"class_means", "loss_weight"}
        means.zero_()
        assert criterion.class_means.abs().sum() > 0  # its own copy
        other = dnkd_ext.NDLoss(torch.zeros(5, 8), loss_weight=torch.tensor(0.0))
        other.load_state_dict(criterion.state_dict())
        assert torch.equal(other.class_means, criterion.class_means)
        assert criterion.to(torch.bfloat16).class_means.dtype == torch.bfloat16
        assert "num_classes=5, num_features=8" in repr(criterion)
        assert list(criterion.parameters()) == []

    def test_a_weight_made_for_inference(self, generator):
        means = torch.randn(5, 8, generator=generator)
        with torch.inference_mode():
            criterion = dnkd_ext.NDLoss(means, loss_weight=torch.tensor(0.5))
        features = torch.randn(3, 8, generator=generator, requires_grad=True)
        loss = criterion(features, torch.arange(3))
        loss.backward()
        assert features.grad.abs().sum() > 0
        criterion.loss_weight.fill_(1.0)
        torch.testing.assert_close(criterion(features, torch.arange(3)), 2 * loss)

    def test_transposed_class_means_are_laid_out_once(self, generator):
        means = torch.randn(8, 5, generator=generator).t()
        criterion = dnkd_ext.NDLoss(means)
        assert torch.equal(criterion.class_means, means)
        assert criterion.class_means.is_contiguous()

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "match"),
        [
            (
                (torch.zeros(3, 2),),
                {"loss_weight": math.nan},
                ValueError,
                "must be finite",
            ),
            ((torch.zeros(3),), {}, ValueError, r"class_means must be \(C, D\)"),
            ((torch.zeros(3, 2).long(),), {}, TypeError, "class_means must be float16"),
            (([[1.0]],), {}, TypeError, "class_means must be a torch.Tensor, got list"),
            ((torch.zeros(3, 2),), {"reduction": "avg"}, ValueError, "reduction must be"),
            ((torch.zeros(3, 2),), {"eps": float("nan")}, ValueError, "eps must be finite"),
        ],
    )
    def test_bad_construction(self, arguments, options, error, match):
        with pytest.raises(error, match=match):
            dnkd_ext.NDLoss(*arguments, **options)
