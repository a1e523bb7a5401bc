"""The DIST loss: against a loop in NumPy and the golden vectors, its gradients, its operators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.library import opcheck

import dnkd_ext
from tests.test_distributed import in_processes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Largest error of a loss and a gradient relative to the largest element.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
# Scalar tails of each instruction set (1 to 33), whole vectors and a rest (100), several chunks of
# a row and tiles of columns (1100).
WIDTHS = (1, 2, 7, 33, 100, 1100)
IMPLEMENTATIONS = {"fused": dnkd_ext.dist_loss, "reference": dnkd_ext.reference.dist_loss}
OPTIONS = {"beta": 1.5, "gamma": 0.75, "tau": 2.0}


@pytest.fixture(params=IMPLEMENTATIONS)
def loss_of(request):
    return IMPLEMENTATIONS[request.param]


def logits(generator, *shape, dtype=torch.float32, device="cpu", teacher_dtype=None):
    """The student's, a leaf, and the teacher's."""
    student, teacher = (
        2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    student = student.to(device, dtype).requires_grad_()
    return student, teacher.to(device, teacher_dtype or dtype)


def oracle(student, teacher, beta=1.0, gamma=1.0, tau=1.0):
    """Loss, gradient and size of the terms that the gradient is a sum of, by the definition: one
    row and one column after the other."""
    z_s, z_t = (x.detach().double().cpu().numpy() for x in (student, teacher))
    shape = z_s.shape
    z_s, z_t = z_s.reshape(-1, shape[-1]), z_t.reshape(-1, shape[-1])
    rows, classes = z_s.shape

    def softmax(z):
        e = np.exp((z - z.max(1, keepdims=True)) / tau)
        return e / e.sum(1, keepdims=True)

    def pearson(a, b):
        """The correlation, its gradient by a, and the size of the gradient's terms."""
        a, b = a - a.mean(), b - b.mean()
        # What rounding leaves of a constant.
        a = np.zeros_like(a) if np.abs(a).max() < 1e-15 else a
        b = np.zeros_like(b) if np.abs(b).max() < 1e-15 else b
        long_a, long_b, product = np.linalg.norm(a), np.linalg.norm(b), float(a @ b)
        norms = long_a * long_b + 1e-8
        own = product * long_b * a / (long_a * norms**2) if long_a > 0 else 0 * a
        return product / norms, b / norms - own, np.abs(b / norms) + np.abs(own)

    y_s, y_t = softmax(z_s), softmax(z_t)
    by_y, sizes = np.zeros_like(y_s), np.zeros_like(y_s)
    inter = intra = 0.0
    for i in range(rows):
        rho, slope, size = pearson(y_s[i], y_t[i])
        inter += (1 - rho) / rows
        by_y[i] -= tau**2 * beta * slope / rows
        sizes[i] += tau**2 * abs(beta) * size / rows
    for k in range(classes):
        rho, slope, size = pearson(y_s[:, k], y_t[:, k])
        intra += (1 - rho) / classes
        by_y[:, k] -= tau**2 * gamma * slope / classes
        sizes[:, k] += tau**2 * abs(gamma) * size / classes
    gradient = y_s * (by_y - (y_s * by_y).sum(1, keepdims=True)) / tau
    magnitude = y_s * (sizes + (y_s * sizes).sum(1, keepdims=True)) / tau
    loss = tau**2 * (beta * inter + gamma * intra)
    return loss, gradient.reshape(shape), magnitude.reshape(shape)


def evaluate(function, student, teacher, upstream=1.0, **options):
    loss = function(student, teacher, **options)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    assert gradient.dtype == student.dtype
    return loss.detach(), gradient


def errors(result, expected, upstream=1.0):
    """Of the loss relative to it, of the gradient relative to its largest term."""
    loss, gradient = result
    truth, slope, magnitude = expected
    difference = np.abs(gradient.double().cpu().numpy() - upstream * slope).max(initial=0)
    return (
        abs(loss.item() - truth) / max(abs(truth), 1e-30),
        difference / max(abs(upstream) * magnitude.max(initial=0), 1e-30),
    )


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("rows", [2, 19])
def test_equals_loop(loss_of, dtype, width, rows, device, generator):
    student, teacher = logits(generator, rows, width, dtype=dtype, device=device)
    for options in (OPTIONS, {"beta": 0.0}, {"gamma": 0.0, "tau": 4.0}, {"tau": 0.5}):
        result = evaluate(loss_of, student, teacher, **options)
        found = errors(result, oracle(student, teacher, **options))
        # With two rows or two classes a correlation is 1 or -1 but for eps, and terms cancel.
        factor = 100 if min(rows, width) == 2 else 1
        assert max(found) <= factor * TOLERANCE[dtype], (options, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS[2:])
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_half_precision(dtype, width, teacher_dtype, device, generator):
    """Against float64 arithmetic on the same inputs; the reference must not be better by more."""
    student, teacher = logits(
        generator, 19, width, dtype=dtype, device=device, teacher_dtype=teacher_dtype
    )
    epsilon = torch.finfo(dtype).eps
    expected = oracle(student, teacher, **OPTIONS)
    fused, reference = (
        errors(evaluate(function, student, teacher, **OPTIONS), expected)
        for function in IMPLEMENTATIONS.values()
    )
    assert fused[0] <= 1e-5
    assert fused[1] <= 0.5 * epsilon + 1e-5
    assert fused[1] <= reference[1] + 0.25 * epsilon


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tau", [1, 4])
def test_golden(loss_of, tau, dtype, tolerance, golden, device):
    student, teacher = (
        torch.from_numpy(golden[name]).to(device, dtype)
        for name in ("student_logits", "teacher_logits")
    )
    loss, gradient = evaluate(loss_of, student.requires_grad_(), teacher, tau=tau)
    truth = golden[f"dist_b1_g1_tau{tau}_loss"]
    slope = golden[f"dist_b1_g1_tau{tau}_grad"]
    assert abs(loss.item() - truth) <= tolerance * abs(truth)
    difference = np.linalg.norm(gradient.double().cpu().numpy() - slope)
    assert difference <= tolerance * np.linalg.norm(slope)


def test_one_class_and_one_row(loss_of, device, generator):
    """Nothing varies: correlations of 0, without a gradient."""
    student, teacher = logits(generator, 5, 1, device=device)
    loss, gradient = evaluate(loss_of, student, teacher, **OPTIONS)
    assert loss.item() == pytest.approx(4 * 2.25)
    assert gradient.tolist() == [[0.0]] * 5
    student, teacher = logits(generator, 1, 9, device=device)
    loss, gradient = evaluate(loss_of, student, teacher, **OPTIONS)
    alone = evaluate(loss_of, student, teacher, **{**OPTIONS, "gamma": 0.0})
    assert loss.item() == pytest.approx(alone[0].item() + 4 * 0.75)
    torch.testing.assert_close(gradient, alone[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_columns_and_rows(loss_of, dtype, device, generator):
    """What rounding leaves of deviations is not multiplied by 1 / eps."""
    student, teacher = logits(generator, 13, 10, dtype=dtype, device=device)
    with torch.no_grad():
        student[:] = student[:1].clone()
        teacher[:] = teacher[:1].clone()
    result = evaluate(loss_of, student, teacher, **OPTIONS)
    assert max(errors(result, oracle(student, teacher, **OPTIONS))) <= TOLERANCE[dtype]
    result = evaluate(loss_of, student, torch.zeros_like(teacher), **OPTIONS)
    assert result[0].item() == pytest.approx(4 * 2.25)
    assert not result[1].any()


@pytest.mark.parametrize("tau", [50.0, 0.1])
def test_nearly_uniform_and_nearly_certain(loss_of, tau, device, generator):
    """Rows whose squares would cancel, and exponentials that vanish."""
    student, teacher = logits(generator, 11, 600, device=device)
    found = errors(evaluate(loss_of, student, teacher, tau=tau), oracle(student, teacher, tau=tau))
    # y - 1 / C keeps what a float32 exponential near 1 leaves of it.
    assert max(found) <= 2e-5


def test_large_logits_and_masks(loss_of, device, generator):
    """1e4 does not overflow; -inf is a probability of 0."""
    student, teacher = logits(generator, 8, 33, device=device)
    with torch.no_grad():
        student *= 2000
        student[:, 3] = -math.inf
        teacher[2, 4:20] = -math.inf
    result = evaluate(loss_of, student, teacher, tau=100.0)
    found = errors(result, oracle(student, teacher, tau=100.0))
    assert max(found) <= 1e-4  # a float32 difference of 1e4 is exact to 1e-3


@pytest.mark.parametrize("width", [5, 64, 1100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_faults_are_not_hidden(loss_of, width, dtype, which, fault, device, generator):
    for column in (0, width // 2, width - 1):
        student, teacher = logits(generator, 6, width, dtype=dtype, device=device)
        with torch.no_grad():
            (student, teacher)[which][2, column] = fault
        loss, gradient = evaluate(loss_of, student, teacher, **OPTIONS)
        assert loss.isnan()
        assert gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_meta_device(loss_of, dtype, generator):
    """Shapes and dtypes without numbers, as of every device without a kernel."""
    loss, gradient = evaluate(loss_of, *logits(generator, 4, 9, dtype=dtype, device="meta"))
    assert loss.device.type == gradient.device.type == "meta"
    assert gradient.shape == (4, 9)


def test_empty_batch(loss_of, device):
    for shape in ((0, 4), (2, 0, 4)):
        student = torch.empty(shape, device=device, requires_grad=True)
        loss, gradient = evaluate(loss_of, student, torch.empty(shape, device=device))
        assert loss.item() == 0
        assert gradient.shape == shape


@pytest.mark.parametrize(
    "layout", ["row stride", "column stride", "transposed", "leading", "1-dim"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(loss_of, layout, dtype, device, generator):
    student, teacher = (x.detach() for x in logits(generator, 12, 20, dtype=dtype, device=device))

    def lay_out(x):
        if layout == "row stride":
            wide = x.new_full((12, 27), math.nan)
            wide[:, 1:21] = x
            return wide[:, 1:21]
        if layout == "column stride":
            wide = x.new_full((12, 40), math.nan)
            wide[:, ::2] = x
            return wide[:, ::2]
        if layout == "transposed":
            return x.t().contiguous().t()
        return x.reshape(2, 3, 2, 20) if layout == "leading" else x[0]

    student, teacher = lay_out(student).requires_grad_(), lay_out(teacher)
    expected = oracle(student, teacher, **OPTIONS)
    found = errors(evaluate(loss_of, student, teacher, **OPTIONS), expected)
    unit = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0
    assert found[0] <= 1e-5
    assert found[1] <= 1e-5 + unit


def test_rows_of_any_stride_are_not_copied(needs_extension, generator):
    """The largest allocation of an evaluation is far below the logits."""
    wide = torch.randn(2, 512, 600, generator=generator)[:, :, 3:503]
    assert not wide[0].is_contiguous()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        dnkd_ext.dist_loss(wide[0], wide[1])
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= wide[0].numel() * 4 / 10


# -- gradients ------------------------------------------------------------------------------------


def test_gradcheck(loss_of, device, generator):
    """First and second derivatives against finite differences."""
    student, teacher = logits(generator, 4, 5, dtype=torch.float64, device=device)
    function = lambda x: loss_of(x, teacher, **OPTIONS)  # noqa: E731
    assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradgradcheck(function, student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_hessian_vector_product(dtype, device, generator):
    """create_graph=True through the fused loss equals the reference, not silent zeros."""
    student, teacher = logits(generator, 2, 3, 12, dtype=dtype, device=device)
    vector = torch.randn(2, 3, 12, generator=generator).to(student)
    products = []
    for function in IMPLEMENTATIONS.values():
        (gradient,) = torch.autograd.grad(
            function(student, teacher, **OPTIONS), student, create_graph=True
        )
        products.append(torch.autograd.grad((gradient * vector).sum(), student)[0])
    assert products[1].abs().max() > 0
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retain_graph_with_different_upstream_values(dtype, device, generator):
    student, teacher = logits(generator, 7, 12, dtype=dtype, device=device)
    _, expected, _ = oracle(student, teacher, **OPTIONS)
    loss = dnkd_ext.dist_loss(student, teacher, **OPTIONS)
    seen = []
    for upstream, retain in ((1.0, True), (3.0, True), (1.0, True), (0.5, False)):
        (gradient,) = torch.autograd.grad(
            loss, student, torch.full_like(loss, upstream), retain_graph=retain
        )
        seen.append((upstream, gradient))
    for upstream, gradient in seen:  # compared last: a later pass must not change an earlier one
        difference = np.abs(gradient.double().cpu().numpy() / upstream - expected).max()
        assert difference <= max(2 * torch.finfo(dtype).eps, 1e-5) * np.abs(expected).max()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, student)


def test_float16_gradient_survives_the_loss_scale(device, generator):
    """With the scale folded in, elements far below float16's smallest are right."""
    student, teacher = logits(generator, 256, 1000, dtype=torch.float16, device=device)
    loss, gradient = evaluate(dnkd_ext.dist_loss, student, teacher, upstream=2.0**16)
    expected = oracle(student, teacher)
    small = np.abs(expected[1]) < 6e-8
    assert small.any()
    assert errors((loss, gradient), expected, 2.0**16)[1] < 1e-3
    found = gradient.double().cpu().numpy() / 2.0**16
    np.testing.assert_allclose(found[small], expected[1][small], rtol=0.1, atol=1e-11)


def test_inputs_and_upstream_are_not_modified(device, generator):
    student, teacher = logits(generator, 7, 12, device=device)
    copies = student.detach().clone(), teacher.clone()
    loss = dnkd_ext.dist_loss(student, teacher)
    upstream = torch.full_like(loss, 3.0)
    for retain in (True, False):
        torch.autograd.grad(loss, student, upstream, retain_graph=retain)
    assert upstream.item() == 3
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_editing_logits_before_backward_raises(needs_extension, shape, device, generator):
    student, teacher = logits(generator, *shape, device=device)
    student = student * 1
    loss = dnkd_ext.dist_loss(student, teacher)
    student.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    student, teacher = logits(generator, *shape, device=device)
    loss = dnkd_ext.dist_loss(student, teacher)
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="teacher_logits were modified by an inplace"):
        loss.backward()


def test_edited_teacher_that_was_converted(needs_extension, generator):
    """Its copy is as it was."""
    student, teacher = logits(generator, 6, 5, teacher_dtype=torch.float64)
    expected = evaluate(dnkd_ext.dist_loss, student, teacher)
    loss = dnkd_ext.dist_loss(student, teacher)
    teacher.zero_()
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected[1])


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_teacher_from_inference_mode(shape, device, generator):
    student, teacher = logits(generator, *shape, device=device)
    expected = evaluate(dnkd_ext.reference.dist_loss, student, teacher)
    with torch.inference_mode():
        teacher = teacher * 1
    result = evaluate(dnkd_ext.dist_loss, student, teacher)
    torch.testing.assert_close(result, expected)


def test_only_the_student_gets_a_gradient(loss_of, device, generator):
    student, teacher = logits(generator, 6, 5, device=device)
    teacher.requires_grad_()
    loss_of(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not loss_of(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not loss_of(student, teacher).requires_grad


def test_upstream_that_is_a_lazy_view(generator):
    """Negative and zero tensors whose memory does not hold their value."""
    student, teacher = logits(generator, 6, 5)
    _, expected = evaluate(dnkd_ext.dist_loss, student, teacher)
    for upstream, factor in (
        (torch.tensor(1j).conj().imag, -1),
        (torch._efficientzerotensor(()), 0),
    ):
        loss = dnkd_ext.dist_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student, upstream)
        torch.testing.assert_close(gradient, factor * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(700, 300), (3000, 5)])
def test_bitwise_reproducible(needs_extension, dtype, shape, device, generator):
    """The same bits from run to run, and on the CPU for every number of threads."""
    student, teacher = logits(generator, *shape, dtype=dtype, device=device)
    first = evaluate(dnkd_ext.dist_loss, student, teacher)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            result = evaluate(dnkd_ext.dist_loss, student, teacher)
            assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_many_rows_of_few_classes(device, generator):
    """Sums over columns that are split by rows."""
    student, teacher = logits(generator, 3001, 5, device=device)
    found = errors(evaluate(dnkd_ext.dist_loss, student, teacher), oracle(student, teacher))
    assert max(found) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_larger_than_the_caches(needs_extension, dtype, generator):
    """Stored past them: 4200 x 1024 float32 and 8300 x 1024 bfloat16 are more than 16 MiB."""
    rows = 4200 if dtype == torch.float32 else 8300
    student, teacher = (torch.randn(rows, 1024, generator=generator).to(dtype) for _ in range(2))
    student.requires_grad_()
    result = evaluate(dnkd_ext.dist_loss, student, teacher)
    expected = evaluate(dnkd_ext.reference.dist_loss, student, teacher)
    torch.testing.assert_close(result[0], expected[0])
    scale = expected[1].abs().max().item()
    unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(result[1], expected[1], rtol=unit, atol=(1e-5 + unit) * scale)


# -- what torch does with it ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_extension, dtype, needs_gradient, device, generator):
    student, teacher = logits(generator, 6, 16, dtype=dtype, device=device)
    student = student.detach().requires_grad_(needs_gradient)
    ops = torch.ops.dnkd_ext
    opcheck(ops.dist_loss.default, (student, teacher, None, None, 1.5, 0.75, 2.0, 1))
    rows, moments = ops._dist_loss_moments(student.detach(), teacher, 2.0)
    opcheck(ops.dist_loss.default, (student, teacher, rows, moments, 1.5, 0.75, 2.0, 2))
    student = student.detach()
    opcheck(ops._dist_loss_forward.default, (student, teacher, 1.5, 0.75, 2.0, needs_gradient))
    opcheck(ops._dist_loss_moments.default, (student, teacher, 2.0))
    opcheck(ops._dist_loss_finish.default, (rows, moments, 1.5, 0.75, 2.0, 2, needs_gradient))
    _, columns = ops._dist_loss_finish(rows, moments, 1.5, 0.75, 2.0, 2, True)
    opcheck(
        ops._dist_loss_backward.default,
        (rows.new_ones(()), student, teacher, rows, columns, 1.5, 2.0),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compile(dtype, device, generator):
    """fullgraph and dynamic: other batch sizes without a graph break, equal to eager."""
    torch._dynamo.reset()

    def step(student, teacher):
        return dnkd_ext.dist_loss(student.sin(), teacher, **OPTIONS) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 12, 20):
        student, teacher = logits(generator, rows, 24, dtype=dtype, device=device)
        for eager, fast in zip(
            evaluate(step, student, teacher, 0.5),
            evaluate(compiled, student, teacher, 0.5),
            strict=True,
        ):
            torch.testing.assert_close(eager, fast)


def test_compile_with_inductor(device, generator):
    torch._dynamo.reset()
    student, teacher = logits(generator, 2, 4, 24, teacher_dtype=torch.float64, device=device)
    compiled = torch.compile(dnkd_ext.dist_loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(
        evaluate(compiled, student, teacher), evaluate(dnkd_ext.dist_loss, student, teacher)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher), dnkd_ext.dist_loss(student, teacher))


def test_export(needs_extension, generator):
    """The exported program holds the operator and takes other batch sizes."""

    class Criterion(nn.Module):
        def forward(self, student, teacher):
            return dnkd_ext.dist_loss(student, teacher, **OPTIONS)

    student, teacher = logits(generator, 7, 24)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Criterion(), (student.detach(), teacher), dynamic_shapes=({0: rows}, {0: rows})
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("dnkd_ext.") for name in targets), targets
    student, teacher = (x.detach() for x in logits(generator, 11, 24))
    torch.testing.assert_close(
        program.module()(student, teacher), dnkd_ext.dist_loss(student, teacher, **OPTIONS)
    )


def test_autocast(device, generator):
    student, teacher = logits(
        generator, 7, 12, dtype=torch.bfloat16, teacher_dtype=torch.float32, device=device
    )
    plain = dnkd_ext.dist_loss(student, teacher)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = dnkd_ext.dist_loss(student, teacher)
        reference = dnkd_ext.reference.dist_loss(student, teacher)
    assert mixed.dtype == reference.dtype == torch.float32
    assert torch.equal(mixed, plain)
    torch.testing.assert_close(mixed, reference)


def test_functorch_transforms(device, generator):
    student, teacher = logits(generator, 7, 12, dtype=torch.float64, device=device)
    gradient = torch.func.grad(lambda x: dnkd_ext.dist_loss(x, teacher))(student.detach())
    torch.testing.assert_close(gradient, evaluate(dnkd_ext.dist_loss, student, teacher)[1])
    both = torch.stack([student.detach(), teacher])
    losses = torch.func.vmap(lambda x: dnkd_ext.dist_loss(x, teacher))(both)
    expected = torch.stack([dnkd_ext.dist_loss(x, teacher) for x in both])
    torch.testing.assert_close(losses, expected)


def test_forward_mode(device, generator):
    """A dual student gets its tangent, not silently none."""
    import torch.autograd.forward_ad as forward_ad

    student, teacher = logits(generator, 7, 12, dtype=torch.float64, device=device)
    direction = torch.randn_like(student)
    _, gradient = evaluate(dnkd_ext.dist_loss, student, teacher)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), direction)
        tangent = forward_ad.unpack_dual(dnkd_ext.dist_loss(dual, teacher)).tangent
    torch.testing.assert_close(tangent, (gradient * direction).sum())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_synchronisation(dtype, generator):
    student, teacher = logits(generator, 512, 1000, dtype=dtype, device="cuda")
    dnkd_ext.dist_loss(student, teacher).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (3 * dnkd_ext.dist_loss(student, teacher)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad.isfinite().all()


# -- wrong calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"student": torch.zeros(6, 5).long()}, TypeError, "student_logits must be float16, bfl"),
        ({"student": [[1.0]]}, TypeError, "student_logits must be a torch.Tensor, got list"),
        ({"teacher": torch.zeros(6, 5).int()}, TypeError, "teacher_logits must be float16"),
        ({"student": torch.tensor(1.0)}, ValueError, r"student_logits must be \(\.\.\., C\), got"),
        ({"student": torch.zeros(6, 0)}, ValueError, "must have at least 1 class, got 0"),
        (
            {"teacher": torch.zeros(6, 4)},
            ValueError,
            r"teacher_logits must have the shape of student_logits \[6, 5\], got shape \[6, 4\]",
        ),
        ({"tau": 0.0}, ValueError, "tau must be finite and greater than 0, got 0"),
        ({"tau": -1.5}, ValueError, "tau must be finite and greater than 0, got -1.5"),
        ({"tau": math.nan}, ValueError, "tau must be finite and greater than 0, got nan"),
        ({"tau": math.inf}, ValueError, "tau must be finite and greater than 0, got inf"),
        ({"beta": math.nan}, ValueError, "beta must be finite, got nan"),
        ({"gamma": -math.inf}, ValueError, "gamma must be finite, got -inf"),
        (
            {"teacher": torch.zeros(6, 5, device="meta")},
            RuntimeError,
            "teacher_logits is on meta but student_logits is on cpu; they must be on the same",
        ),
        (
            {"process_group": "world"},
            TypeError,
            "process_group must be a torch.distributed.ProcessGroup or None, got str",
        ),
    ],
    ids=str,
)
def test_bad_input(loss_of, change, error, match, needs_gradient):
    arguments = {"student": torch.zeros(6, 5), "teacher": torch.zeros(6, 5), **OPTIONS}
    loss_of(arguments.pop("student"), arguments.pop("teacher"), **arguments)  # good before
    arguments = {"student": torch.zeros(6, 5), "teacher": torch.zeros(6, 5), **OPTIONS, **change}
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    if isinstance(student, torch.Tensor) and student.is_floating_point():
        student.requires_grad_(needs_gradient)
    with pytest.raises(error, match=match):
        loss_of(student, teacher, **arguments)


def test_fake_tensors_check_arguments():
    """Shape errors surface while tracing, in the words of the eager ones."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert dnkd_ext.dist_loss(torch.zeros(3, 5), torch.zeros(3, 5)).shape == ()
        with pytest.raises(ValueError, match=r"must have the shape of student_logits \[3, 5\]"):
            dnkd_ext.dist_loss(torch.zeros(3, 5), torch.zeros(3, 4))


# -- several processes ----------------------------------------------------------------------------

INPUTS, CLASSES, ROWS = 6, 9, 14


def student_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, 10), nn.Tanh(), nn.Linear(10, CLASSES)).double()


def gradients_of(model, images, teacher, loss_of, **options):
    loss = loss_of(model(images), teacher, **options)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def train_half(rank, world_size, images, teacher, options):
    """Fused and reference, through DistributedDataParallel, over the group."""
    images, teacher = (x.chunk(world_size)[rank] for x in (images, teacher))
    results = {}
    for name, loss_of in IMPLEMENTATIONS.items():
        model = nn.parallel.DistributedDataParallel(student_model())
        group = distributed.group.WORLD
        results[name] = gradients_of(
            model, images, teacher, loss_of, **options, process_group=group
        )
    for name, loss_of in IMPLEMENTATIONS.items():
        model = student_model()
        loss = loss_of(model(images), teacher, **options, process_group=group)
        try:
            (slope,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
            slope.square().sum().backward()
            results[f"{name} twice"] = "no error"
        except RuntimeError as error:
            results[f"{name} twice"] = str(error)
    # One process without rows still takes part.
    rows = 0 if rank == 0 else len(images)
    uneven = dnkd_ext.dist_loss(
        model(images[:rows]), teacher[:rows], gamma=2.0, beta=0.0, process_group=group
    )
    results["uneven"] = uneven.detach()
    with torch.no_grad():
        results["alone"] = dnkd_ext.dist_loss(model(images), teacher, gamma=2.0, beta=0.0)
    return results


def test_process_group(tmp_path, generator):
    """DDP's mean over two processes is the gradient of one with the whole batch."""
    images, teacher = (
        torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
        for width in (INPUTS, CLASSES)
    )
    results = in_processes(train_half, tmp_path, images, teacher, OPTIONS)
    exact = {"rtol": 1e-10, "atol": 1e-13}
    model = student_model()
    whole, gradients = gradients_of(model, images, teacher, dnkd_ext.reference.dist_loss, **OPTIONS)
    local = [
        gradients_of(student_model(), *(x.chunk(2)[rank] for x in (images, teacher)),
                     dnkd_ext.reference.dist_loss, **OPTIONS)
        for rank in (0, 1)
    ]  # fmt: skip
    for name in IMPLEMENTATIONS:
        mean = (results[0][name][0] + results[1][name][0]) / 2
        torch.testing.assert_close(mean, whole, **exact)
        for result in results:
            torch.testing.assert_close(result[name][1], gradients, **exact)
    # The local batches alone would have given something else.
    for i, gradient in enumerate(gradients):
        difference = (local[0][1][i] + local[1][1][i]) / 2 - gradient
        assert difference.abs().max() > 1e-3 * gradient.abs().max()
    # Second derivatives would be those of the local rows: refused by both.
    once = "differentiate twice a function that was marked with @once_differentiable"
    assert once in results[0]["reference twice"]
    if dnkd_ext.build_info()["loaded"]:
        assert "process_group has no second derivative" in results[0]["fused twice"]
    # Rows of one process alone: the intra part is theirs in both.
    torch.testing.assert_close(results[0]["uneven"], results[1]["alone"], **exact)
    torch.testing.assert_close(results[1]["uneven"], results[1]["alone"], **exact)


@pytest.mark.parametrize("rows", [1000, 10000])
def test_constant_columns_of_many_rows(rows, device, generator):
    """What adding many equal float64 numbers leaves is no deviation, in either implementation."""
    row = torch.randn(1, 7, generator=generator, dtype=torch.float64)
    student = row.repeat(rows, 1).to(device).requires_grad_()
    teacher = torch.randn(rows, 7, generator=generator, dtype=torch.float64).to(device)
    gradients = []
    for function in (dnkd_ext.dist_loss, dnkd_ext.reference.dist_loss):
        loss = function(student, teacher, beta=0.0)
        assert loss.item() == pytest.approx(1.0, abs=1e-12)
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-9 * gradients[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradient(dtype, generator):
    """Past 4 MiB gradients bypass the cache; the numbers must not change by it."""
    rows = (5 << 20) // (1024 * dtype.itemsize)
    student, teacher = (torch.randn(rows, 1024, generator=generator).to(dtype) for _ in range(2))
    gradients = []
    for function, wide in ((dnkd_ext.dist_loss, dtype), (dnkd_ext.reference.dist_loss, None)):
        leaf = student.to(wide or torch.float64).requires_grad_()
        loss = function(leaf, teacher.to(leaf.dtype), tau=2.0)
        gradients.append(torch.autograd.grad(loss, leaf)[0].double())
    assert student.nbytes >= 4 << 20
    error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps + 1e-5)
