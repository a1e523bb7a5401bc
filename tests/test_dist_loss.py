"""The DIST loss, beyond what all losses are held to: what does not vary, extremes, processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributed, nn

import dnkd_ext
from tests.cases import DIST_LOSS, DTYPES, truth
from tests.test_distributed import in_processes

# Largest error of a loss and a gradient relative to the largest element.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
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


def evaluate(function, student, teacher, upstream=1.0, **options):
    loss = function(student, teacher, **options)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    assert gradient.dtype == student.dtype
    return loss.detach(), gradient


def errors(result, student, teacher, upstream=1.0, **options):
    """Of the loss and the gradient, relative to the largest of their terms."""
    expected = truth(DIST_LOSS, ([student, teacher], options), "mean")
    loss, gradient = result
    return expected.loss_error(loss), expected.gradient_error(gradient.double() / upstream)


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
    assert max(errors(result, student, teacher, **OPTIONS)) <= TOLERANCE[dtype]
    result = evaluate(loss_of, student, torch.zeros_like(teacher), **OPTIONS)
    assert result[0].item() == pytest.approx(4 * 2.25)
    assert not result[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_alike_to_some_digits(loss_of, dtype, device, generator):
    """Two rows alike but for their fourth digit: as exact as what that digit leaves.

    Float64 columns are summed with their squares, which leave half of that.
    """
    for _ in range(20):
        rows = [
            (x.detach() + 1e-4 * torch.randn(2, 28, generator=generator, dtype=dtype).to(device))
            for x in logits(generator, 1, 28, dtype=dtype, device=device)
        ]
        student, teacher = rows[0].requires_grad_(), rows[1]
        noise = truth(DIST_LOSS, ([student, teacher], OPTIONS), "mean").float64_noise
        tolerance = max(2e-6 if dtype == torch.float32 else 1e-12, noise)
        found = errors(evaluate(loss_of, student, teacher, **OPTIONS), student, teacher, **OPTIONS)
        assert max(found) <= tolerance


@pytest.mark.parametrize("tau", [50.0, 0.1])
def test_nearly_uniform_and_nearly_certain(loss_of, tau, device, generator):
    """Rows whose squares would cancel, and exponentials that vanish."""
    student, teacher = logits(generator, 11, 600, device=device)
    found = errors(evaluate(loss_of, student, teacher, tau=tau), student, teacher, tau=tau)
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
    found = errors(result, student, teacher, tau=100.0)
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


def test_float16_gradient_survives_the_loss_scale(device, generator):
    """With the scale folded in, elements far below float16's smallest are right."""
    student, teacher = logits(generator, 256, 1000, dtype=torch.float16, device=device)
    loss, gradient = evaluate(dnkd_ext.dist_loss, student, teacher, upstream=2.0**16)
    exact = truth(DIST_LOSS, ([student, teacher], {}), "mean").gradient
    small = np.abs(exact) < 6e-8
    assert small.any()
    assert errors((loss, gradient), student, teacher, 2.0**16)[1] < 1e-3
    found = gradient.double().cpu().numpy() / 2.0**16
    np.testing.assert_allclose(found[small], exact[small], rtol=0.1, atol=1e-11)


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
    found = errors(evaluate(dnkd_ext.dist_loss, student, teacher), student, teacher)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [100, 1100])
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_half_precision_beside_teachers_of_any(dtype, width, teacher_dtype, device, generator):
    """Chunks of rows and tiles of columns of two dtypes, against float64 on the same inputs."""
    student, teacher = logits(
        generator, 19, width, dtype=dtype, device=device, teacher_dtype=teacher_dtype
    )
    epsilon = torch.finfo(dtype).eps
    fused, reference = (
        errors(evaluate(function, student, teacher, **OPTIONS), student, teacher, **OPTIONS)
        for function in IMPLEMENTATIONS.values()
    )
    assert fused[0] <= 1e-5
    assert fused[1] <= 0.5 * epsilon + 1e-5
    assert fused[1] <= reference[1] + 0.25 * epsilon


def test_vmap_over_batches(device, generator):
    """The columns of each batch are correlated by themselves."""
    batches = torch.randn(3, 7, 12, generator=generator, dtype=torch.float64).to(device)
    teacher = torch.randn(7, 12, generator=generator, dtype=torch.float64).to(device)
    losses = torch.func.vmap(lambda x: dnkd_ext.dist_loss(x, teacher, **OPTIONS))(batches)
    expected = torch.stack([dnkd_ext.dist_loss(x, teacher, **OPTIONS) for x in batches])
    torch.testing.assert_close(losses, expected)
    inter = torch.stack(
        [dnkd_ext.dist_loss(x, teacher, **{**OPTIONS, "gamma": 0}) for x in batches]
    )
    assert ((losses - inter).abs() > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_hessian_vector_product_of_leading_dimensions(dtype, device, generator):
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


def test_compile_of_leading_dimensions_and_a_converted_teacher(device, generator):
    torch._dynamo.reset()
    student, teacher = logits(generator, 2, 4, 24, teacher_dtype=torch.float64, device=device)
    compiled = torch.compile(dnkd_ext.dist_loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(
        evaluate(compiled, student, teacher), evaluate(dnkd_ext.dist_loss, student, teacher)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher), dnkd_ext.dist_loss(student, teacher))


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
