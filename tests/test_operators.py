"""The operators as torch sees them: opcheck, compile, export, fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from tests.cases import convert

pytestmark = pytest.mark.usefixtures("needs_extension")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(case, dtype, reduction, needs_gradient, device, generator):
    for variant in ("direction_only", "teacher_features", "teacher_norms", "probabilities"):
        args, kwargs = convert(case.variants[variant](generator, 6, 16, 5), dtype, device)
        args[0] = args[0].detach().requires_grad_(needs_gradient)
        opcheck(*case.operator(*args, **kwargs, reduction=reduction))


def test_opcheck_of_inner_operators(device, generator):
    student = torch.randn(6, 16, device=device)
    target = torch.arange(6, device=device)
    means = torch.randn(6, 16, device=device)
    ops = torch.ops.dnkd_ext
    for needs_gradient in (False, True):
        for reduction in ("mean", "none"):
            arguments = (
                student,
                target,
                means,
                student * 2,
                None,
                None,
                2.0,
                -100,
                reduction,
                1e-12,
            )
            opcheck(ops._nd_loss_forward.default, (*arguments, needs_gradient))
    coefficients = torch.randn(6, 2, device=device)
    opcheck(
        ops._nd_loss_backward.default,
        (torch.ones(6, device=device), student, target, means, coefficients),
    )
    opcheck(ops._scale_.default, (student.clone(), torch.tensor(2.0, device=device)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "variant", ["teacher_features", "probabilities", "ignored", "weight_tensor"]
)
def test_compile(case, variant, dtype, reduction, device, generator):
    """fullgraph and dynamic: other batch sizes without a graph break, equal to eager."""
    torch._dynamo.reset()

    def step(student, args, kwargs):
        return case.fused(student.sin(), *args[1:], **kwargs, reduction=reduction) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (7, 12, 20):
        args, kwargs = convert(case.variants[variant](generator, rows, 24, 5), dtype, device)
        results = []
        for function in (step, compiled):
            loss = function(args[0], args, kwargs)
            upstream = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape)
            results.append((loss.detach(), torch.autograd.grad(loss, args[0], upstream)[0]))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(eager, fast, equal_nan=True)


def test_compile_without_gradient(case, device, generator):
    torch._dynamo.reset()
    args, kwargs = convert(
        case.variants["teacher_features"](generator, 7, 24, 5), torch.float32, device
    )
    compiled = torch.compile(lambda: case.fused(*args, **kwargs), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(), case.fused(*args, **kwargs))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(), case.fused(*args, **kwargs))


def test_a_weight_tensor_does_not_recompile(case, device, generator):
    torch._dynamo.reset()
    args, kwargs = convert(
        case.variants["teacher_features"](generator, 7, 24, 5), torch.float32, device
    )
    compiled = torch.compile(case.fused, fullgraph=True)
    plain = case.fused(*args, **kwargs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (0.5, 2.0, 3.0):
            tensor = torch.tensor(weight, device=device)
            torch.testing.assert_close(
                compiled(*args, **kwargs, loss_weight=tensor), plain * weight
            )


@pytest.mark.parametrize("variant", ["teacher_features", "probabilities"])
def test_export(case, variant, generator):
    """The exported program holds the operator and takes other batch sizes."""
    args, kwargs = convert(case.variants[variant](generator, 7, 24, 5), torch.float32, "cpu")
    tensors = [args[0].detach(), *args[1:], kwargs["teacher_features"]]

    class Criterion(torch.nn.Module):
        def forward(self, student, target, class_means, teacher):
            return case.fused(student, target, class_means, teacher_features=teacher)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Criterion(), tuple(tensors), dynamic_shapes=({0: rows}, {0: rows}, None, {0: rows})
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("dnkd_ext.") for name in targets), targets
    other, options = convert(case.variants[variant](generator, 11, 24, 5), torch.float32, "cpu")
    torch.testing.assert_close(
        program.module()(*other, options["teacher_features"]),
        case.fused(*other, **options),
    )


def test_fake_tensors_check_arguments(case, generator):
    """Shape errors surface while tracing, in the words of the eager ones."""
    from torch._subclasses import FakeTensorMode

    args, _ = convert(case.variants["teacher_features"](generator, 7, 24, 5), torch.float32, "cpu")
    with FakeTensorMode() as mode:
        student, target, means = (mode.from_tensor(t) for t in args)
        assert case.fused(student, target, means).shape == ()
        with pytest.raises(ValueError, match="23 wide but student_features is 24 wide"):
            case.fused(student, target, means[:, :-1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_module_in_a_compiled_training_step(backend, device, generator):
    """A whole step - model, loss through the module, backward - trains as the eager one."""
    import dnkd_ext

    torch._dynamo.reset()
    means = torch.randn(5, 16, generator=generator).to(device)
    images, teacher = (torch.randn(8, 12 + 4 * i, generator=generator).to(device) for i in (0, 1))
    target = torch.arange(8, device=device) % 5
    criterion = dnkd_ext.NDLoss(means, loss_weight=2.0).to(device)

    def train(compile_it):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16)
        )
        model = model.to(device)

        def loss_of(x, t):
            return criterion(model(x), target, teacher_features=t)

        run = torch.compile(loss_of, backend=backend, fullgraph=True) if compile_it else loss_of
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(images, teacher)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    eager, compiled = train(False), train(True)
    assert eager[-1] < eager[0]
    assert compiled == pytest.approx(eager, rel=1e-5)
