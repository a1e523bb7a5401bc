"""The operators as torch sees them: opcheck, compile, export, fake tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from tests.cases import CASES, ND_LOSS, convert, finite, replaced, tensors_of

pytestmark = pytest.mark.usefixtures("needs_extension")


def main_arguments(case, generator, rows=7, width=24, device="cpu"):
    return convert(case.variants[case.main](generator, rows, width, 5), torch.float32, device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(case, dtype, reduction, needs_gradient, device, generator):
    operator = getattr(torch.ops.dnkd_ext, case.operator).default
    for variant in case.smooth:
        args, kwargs = finite(convert(case.variants[variant](generator, 6, 16, 5), dtype, device))
        args[0] = args[0].detach().requires_grad_(needs_gradient)
        opcheck(operator, case.operator_arguments(*args, **kwargs, reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("needing", [(), ("base",), ("student",), ("base", "student")], ids=str)
def test_opcheck_of_the_added_nd_loss(dtype, needing, device, generator):
    for variant in ND_LOSS.smooth:
        given = convert(ND_LOSS.variants[variant](generator, 6, 16, 5), dtype, device)
        args, kwargs = finite(given)
        student, *others, reduction, eps = ND_LOSS.operator_arguments(*args, **kwargs)
        assert reduction == "mean"
        student = student.detach().requires_grad_("student" in needing)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        base = torch.tensor(2.0, dtype=wide, device=device, requires_grad="base" in needing)
        opcheck(torch.ops.dnkd_ext._nd_loss_added.default, (base, student, *others, eps))


def test_opcheck_of_inner_operators(case, device, generator):
    for name, arguments in case.inner_operators(generator, device):
        opcheck(getattr(torch.ops.dnkd_ext, name).default, arguments)


def test_opcheck_of_scale(device):
    gradient = torch.randn(6, 16, device=device)
    opcheck(torch.ops.dnkd_ext._scale_.default, (gradient, torch.tensor(2.0, device=device)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("one", "variant"), [(case, name) for case in CASES for name in case.compiled], ids=str
)
def test_compile(one, variant, dtype, reduction, device, generator):
    """fullgraph and dynamic: other batch sizes without a graph break, equal to eager."""
    torch._dynamo.reset()

    def step(student, args, kwargs):
        return one.fused(student.sin(), *args[1:], **kwargs, reduction=reduction) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (7, 12, 20):
        args, kwargs = convert(one.variants[variant](generator, rows, 24, 5), dtype, device)
        results = []
        for function in (step, compiled):
            loss = function(args[0], args, kwargs)
            upstream = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape)
            results.append((loss.detach(), torch.autograd.grad(loss, args[0], upstream)[0]))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(eager, fast, equal_nan=True)


def test_compile_without_gradient(case, device, generator):
    torch._dynamo.reset()
    args, kwargs = main_arguments(case, generator, device=device)
    compiled = torch.compile(lambda: case.fused(*args, **kwargs), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(), case.fused(*args, **kwargs))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(), case.fused(*args, **kwargs))


@pytest.mark.parametrize("one", [case for case in CASES if case.has_loss_weight], ids=repr)
def test_a_weight_tensor_does_not_recompile(one, device, generator):
    torch._dynamo.reset()
    args, kwargs = main_arguments(one, generator, device=device)
    compiled = torch.compile(one.fused, fullgraph=True)
    plain = one.fused(*args, **kwargs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (0.5, 2.0, 3.0):
            tensor = torch.tensor(weight, device=device)
            torch.testing.assert_close(
                compiled(*args, **kwargs, loss_weight=tensor), plain * weight
            )


def test_export(case, generator):
    """The exported program holds the operator and takes other batch sizes."""
    for variant in (case.main, *({"probabilities"} & set(case.variants))):

        def build(rows, variant=variant):
            arguments = case.variants[variant](generator, rows, 24, 5)
            args, kwargs = convert(arguments, torch.float32, "cpu")
            return replaced((args, kwargs), {0: args[0].detach()})

        first = build(7)
        places = tuple(tensors_of(first))

        class Criterion(torch.nn.Module):
            def forward(self, *tensors, places=places, first=first):
                args, kwargs = replaced(first, dict(zip(places, tensors, strict=True)))
                return case.fused(*args, **kwargs)

        rows = torch.export.Dim("rows", min=2)
        shapes = tuple({0: rows} if where in case.per_row else None for where in places)
        program = torch.export.export(
            Criterion(), tuple(tensors_of(first).values()), dynamic_shapes={"tensors": shapes}
        )
        targets = {str(node.target) for node in program.graph.nodes}
        assert any(name.startswith("dnkd_ext.") for name in targets), targets
        other = build(11)
        torch.testing.assert_close(
            program.module()(*tensors_of(other).values()), case.fused(*other[0], **other[1])
        )
        # Decomposed, it can still be trained.
        found = []
        for module in (Criterion(), program.run_decompositions().module()):
            student, *rest = tensors_of(first).values()
            student = student.clone().requires_grad_()
            found.append(torch.autograd.grad(module(student, *rest), student)[0])
        torch.testing.assert_close(*found, equal_nan=True)
        assert found[0].abs().sum() > 0


@contextlib.contextmanager
def fakes(case, generator):
    """Arguments without values, and the mode of tensors that have none, as in a trace."""
    given = convert(case.variants[case.main](generator, 6, 8, 5), torch.float32, "cpu")
    with FakeTensorMode() as mode:
        yield replaced(given, {w: mode.from_tensor(t) for w, t in tensors_of(given).items()})


def test_shapes_of_fake_tensors(case, generator):
    with fakes(case, generator) as (args, kwargs):
        assert case.fused(*args, **kwargs).shape == ()
        if case.is_sum_of_rows:
            assert case.fused(*args, **kwargs, reduction="none").shape == (6,)


@pytest.mark.parametrize(
    ("one", "bad"),
    [
        pytest.param(case, bad, id=f"{case.name}-{bad.name}")
        for case in CASES
        for bad in case.bad_inputs
        if bad.is_traceable
    ],
)
def test_fake_tensors_check_arguments(one, bad, generator):
    """Wrong arguments surface while tracing, in the words of the eager ones."""
    with fakes(one, generator) as (args, kwargs):
        bad.change(args, kwargs)
        with pytest.raises(bad.error, match=bad.match):
            one.fused(*args, **kwargs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step(case, backend, device, generator):
    """A whole step - model, loss, backward - trains as the eager one."""
    torch._dynamo.reset()
    args, kwargs = main_arguments(case, generator, 8, 16, device)
    images = torch.randn(8, 12, generator=generator).to(device)
    weight = {"loss_weight": torch.tensor(0.5, device=device)} if case.has_loss_weight else {}

    def train(compile_it):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16)
        )
        model = model.to(device)

        def loss_of(x):
            return case.fused(model(x), *args[1:], **kwargs, **weight)

        run = torch.compile(loss_of, backend=backend, fullgraph=True) if compile_it else loss_of
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(images)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    eager, compiled = train(False), train(True)
    assert eager[-1] < eager[0]
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_mixtures_of_class_means_are_exact_in_a_compiled_graph(needs_extension, device, generator):
    """A matrix product that the compiler sees is TF32 where the user allows that; eager is not."""
    import dnkd_ext

    student, means = (torch.randn(n, 8, generator=generator).to(device) for n in (6, 5))
    target = torch.randn(6, 5, generator=generator).softmax(-1).to(device)
    student.requires_grad_()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    for run in (dnkd_ext.nd_loss, dnkd_ext.feature_diagnostics):
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=keep)
        torch.compile(run, fullgraph=True, backend=backend)(student, target, means)
    assert len(graphs) >= 2
    called = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    products = [names & {"aten.mm.default", "aten.matmul.default"} for names in called]
    assert not any(products), products
    assert sum("dnkd_ext._nd_mixtures.default" in names for names in called) >= 1


def test_module_compiles(device, generator):
    import dnkd_ext

    torch._dynamo.reset()
    criterion = dnkd_ext.NDLoss(torch.randn(5, 16, generator=generator), loss_weight=2.0)
    criterion = criterion.to(device)
    student, teacher = (torch.randn(8, 16, generator=generator).to(device) for _ in range(2))
    target = torch.arange(8, device=device) % 5
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(student, target, teacher_features=teacher),
        criterion(student, target, teacher_features=teacher),
    )
