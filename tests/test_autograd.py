"""Gradients of every loss: first, second, retained, scaled, and what must not happen to tensors."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._dynamo import compiled_autograd

from tests.cases import CASES, convert, finite, replaced, rows_of, tensors_of, truth


def arguments(case, generator, dtype=torch.float32, device="cpu", rows=7, width=12, variant=None):
    """Finite ones; of the main variant unless another is named."""
    build = case.variants[variant or case.main]
    return finite(convert(build(generator, rows, width, 5), dtype, device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_gradcheck(case, implementation, reduction, device, generator):
    """First and second derivatives against finite differences."""
    for variant in case.smooth:
        args, kwargs = arguments(case, generator, torch.float64, device, 4, 5, variant)

        def function(x, args=args, kwargs=kwargs):
            return getattr(case, implementation)(x, *args[1:], **kwargs, reduction=reduction)

        assert torch.autograd.gradcheck(function, args[0]), variant
        assert torch.autograd.gradgradcheck(function, args[0]), variant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_hessian_vector_product(case, dtype, device, generator):
    """create_graph=True through the fused loss equals the reference, not silent zeros."""
    args, kwargs = arguments(case, generator, dtype, device)
    vector = torch.randn(7, 12, generator=generator).to(args[0])
    products = []
    for function in (case.fused, case.reference):
        (gradient,) = torch.autograd.grad(function(*args, **kwargs), args[0], create_graph=True)
        assert gradient.requires_grad
        (product,) = torch.autograd.grad((gradient * vector).sum(), args[0])
        products.append(product)
    assert products[1].abs().max() > 0
    torch.testing.assert_close(*products)


def test_second_derivative_through_the_upstream_gradient(case, device, generator):
    """d/dw of the gradient of w * loss is the gradient of the loss."""
    args, kwargs = arguments(case, generator, torch.float64, device)
    w = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(w * case.fused(*args, **kwargs), args[0], create_graph=True)
    (derivative,) = torch.autograd.grad(gradient.sum(), w)
    (plain,) = torch.autograd.grad(case.reference(*args, **kwargs), args[0])
    torch.testing.assert_close(derivative, plain.sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_retain_graph_with_different_upstream_values(case, dtype, reduction, device, generator):
    """Repeated backward passes with upstreams 1, 3, 1, then the final one, each from scratch."""
    args, kwargs = arguments(case, generator, dtype, device)
    expected = truth(case, (args, kwargs), reduction)
    loss = case.fused(*args, **kwargs, reduction=reduction)
    tolerance = torch.finfo(dtype).eps * 2
    seen = []
    for upstream, retain in ((1.0, True), (3.0, True), (1.0, True), (0.5, False)):
        (gradient,) = torch.autograd.grad(
            loss, args[0], torch.full_like(loss, upstream), retain_graph=retain
        )
        seen.append((upstream, gradient))
    for upstream, gradient in seen:  # compared last: a later pass must not change an earlier one
        assert expected.gradient_error(gradient.double() / upstream) <= max(tolerance, 1e-5)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss.sum(), args[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("upstream", [0.0, -2.0, 1.0, float("nan")])
def test_upstream_values(case, upstream, dtype, device, generator):
    args, kwargs = arguments(case, generator, dtype, device)
    gradients = [
        torch.autograd.grad(
            function(*args, **kwargs), args[0], torch.tensor(upstream, device=device)
        )[0]
        for function in (case.fused, case.reference)
    ]
    torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_inputs_and_upstream_are_not_modified(case, dtype, reduction, device, generator):
    for variant in case.smooth:
        args, kwargs = arguments(case, generator, dtype, device, variant=variant)
        tensors = tensors_of((args, kwargs)).values()
        copies = [t.detach().clone() for t in tensors]
        loss = case.fused(*args, **kwargs, reduction=reduction)
        upstream = torch.full_like(loss, 3.0)
        for retain in (True, False):
            torch.autograd.grad(loss, args[0], upstream, retain_graph=retain)
        assert (upstream == 3).all()
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy)


def test_editing_features_before_backward_raises(case, needs_extension, device, generator):
    """Also where the gradient is already formed; the reference need not have kept them."""
    args, kwargs = arguments(case, generator, device=device)
    features = args[0] * 1
    loss = case.fused(features, *args[1:], **kwargs)
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_student_gets_a_gradient(case, device, generator):
    for function in (case.fused, case.reference):
        args, kwargs = arguments(case, generator, device=device)
        others = [
            tensor.requires_grad_()
            for where, tensor in tensors_of((args, kwargs)).items()
            if where != 0 and tensor.is_floating_point()
        ]
        assert others
        function(*args, **kwargs).backward()
        assert args[0].grad is not None
        assert all(t.grad is None for t in others)
        with torch.no_grad():
            args[0].requires_grad_(False)
        assert not function(*args, **kwargs).requires_grad


def test_gradient_accumulation_and_sharing(case, device, generator):
    """Two losses on one feature, one weighted outside: the sum of both gradients."""
    args, kwargs = arguments(case, generator, torch.float64, device)
    gradients = []
    for function in (case.fused, case.reference):
        features = args[0] * 2
        total = (
            function(features, *args[1:], **kwargs)
            + 0.25 * function(features, *args[1:], reduction=case.reductions[-1]).sum()
        )
        gradients.append(torch.autograd.grad(total, args[0])[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(case, reentrant, device, generator):
    from torch.utils.checkpoint import checkpoint

    args, kwargs = arguments(case, generator, device=device)

    def run(x):
        return case.fused(x * 2, *args[1:], **kwargs)

    (checkpoint(run, args[0], use_reentrant=reentrant) * 3).backward()
    expected = torch.autograd.grad(case.reference(args[0] * 2, *args[1:], **kwargs) * 3, args[0])[0]
    torch.testing.assert_close(args[0].grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_activation_checkpointing_frees_the_teacher(case, dtype, needs_extension, generator):
    """It frees what it sees: what is recomputed need not be kept until backward."""
    from torch.utils.checkpoint import checkpoint

    given = arguments(case, generator, dtype)
    teacher = tensors_of(given)[case.teacher]
    seen = []

    def run(x):
        own = teacher * 1
        seen.append(weakref.ref(own))
        args, kwargs = replaced(given, {case.teacher: own})
        return case.fused(x, *args[1:], **kwargs)

    loss = checkpoint(run, given[0][0], use_reentrant=False)
    assert [reference() for reference in seen] == [None]
    expected = torch.autograd.grad(case.fused(*given[0], **given[1]), given[0][0])[0]
    torch.testing.assert_close(torch.autograd.grad(loss, given[0][0])[0], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_mutation_of_saved_tensors_can_be_allowed(case, dtype, reduction, device, generator):
    """torch's context keeps copies of what is overwritten, the teacher among it."""
    given = arguments(case, generator, dtype, device)
    expected = torch.autograd.grad(case.reference(*given[0], **given[1]), given[0][0])[0]
    teacher = tensors_of(given)[case.teacher].clone()
    args, kwargs = replaced(given, {case.teacher: teacher})
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = case.fused(*args, **kwargs, reduction=reduction)
        loss = loss.sum() if reduction == "none" else loss
        teacher.zero_()
        (gradient,) = torch.autograd.grad(loss, args[0])
    if reduction == "mean":
        torch.testing.assert_close(gradient, expected)
    else:
        reference = case.reference(*given[0], **given[1], reduction="none").sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(reference, given[0][0])[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compiled_autograd(case, dtype, reduction, device, generator):
    """A backward pass that torch.compile traces as it runs, of a forward pass that is eager."""
    args, kwargs = arguments(case, generator, dtype, device)

    def gradient():
        args[0].grad = None
        (3 * case.fused(*args, **kwargs, reduction=reduction).float().sum()).backward()
        return args[0].grad

    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        traced = [gradient() for _ in range(2)]
    assert torch.equal(traced[0], gradient())
    assert torch.equal(traced[1], gradient())


@pytest.mark.parametrize("one", [case for case in CASES if case.forms_gradient_forward], ids=repr)
def test_backward_with_upstream_one_makes_no_pass(one, needs_extension, generator):
    """The gradient that the forward pass formed arrives as it is, without an operator on it."""
    args, kwargs = arguments(one, generator)

    def operators(upstream):
        loss = one.fused(*args, **kwargs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(loss, args[0], upstream)
        names = {event.key for event in profile.key_averages()}
        return names & {
            "aten::mul",
            "aten::mul_",
            "dnkd_ext::_scale_",
            "aten::copy_",
            "aten::empty",
        }

    assert operators(torch.tensor(1.0)) == set()
    assert "dnkd_ext::_scale_" in operators(torch.tensor(2.0))


def test_no_gradient_buffer_without_requires_grad(case, needs_extension, generator):
    """Peak allocation of an evaluation is far below one gradient."""
    args, kwargs = arguments(case, generator, rows=512, width=256)
    buffer = args[0].numel() * args[0].element_size()

    def allocated(run):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            run()
        return sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())

    with torch.no_grad():
        assert allocated(lambda: case.fused(*args, **kwargs)) < buffer / 10
    detached = args[0].detach()
    assert allocated(lambda: case.fused(detached, *args[1:], **kwargs)) < buffer / 10
    formed = allocated(lambda: case.fused(*args, **kwargs))
    assert formed >= buffer if case.forms_gradient_forward else formed < buffer / 10


def test_float16_gradient_survives_the_loss_scale(case, device, generator):
    """Rounded before the scale is known it would underflow; it is formed in the backward."""
    args, kwargs = convert(case.underflowing(generator), torch.float16, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    parameter = torch.nn.Parameter(args[0].detach().float())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(case.fused(parameter.half(), *args[1:], **kwargs)).backward()
    scaler.unscale_(optimizer)
    exact = torch.from_numpy(truth(case, (args, kwargs), "mean").gradient)

    def error(gradient):
        return (gradient - exact).abs().max() / exact.abs().max()

    assert error(exact.half().double()) > 0.02
    assert error(parameter.grad.double().cpu()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bitwise_reproducible(case, dtype, device, generator):
    """The same bits from run to run, and on the CPU for every number of threads."""
    args, kwargs = arguments(case, generator, dtype, device, rows=600, width=200)

    def run():
        loss = case.fused(*args, **kwargs)
        return loss.detach(), torch.autograd.grad(loss, args[0])[0]

    first = run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_two_threads_take_part(case, needs_extension, generator):
    """at::parallel_for is silently serial without OpenMP."""
    import time

    import dnkd_ext

    assert dnkd_ext.build_info()["openmp"] is True
    if torch.get_num_threads() < 2:
        pytest.skip("this machine gives torch one thread")
    args, kwargs = arguments(case, generator, rows=2048, width=4096)
    student = args[0].detach()
    # Processor time of the process over that of the calling thread: 1 where it works alone.
    started = time.process_time(), time.thread_time()
    for _ in range(20):
        case.fused(student, *args[1:], **kwargs)
    process, thread = time.process_time() - started[0], time.thread_time() - started[1]
    assert process > 1.4 * thread


def test_autocast(case, device, generator):
    """Autocast neither changes the inputs' dtypes nor the loss's float32."""
    for variant in case.smooth:
        args, kwargs = arguments(case, generator, torch.bfloat16, device, variant=variant)
        plain = case.fused(*args, **kwargs)
        with torch.autocast(device, dtype=torch.bfloat16):
            mixed = case.fused(*args, **kwargs)
            reference = case.reference(*args, **kwargs)
        assert mixed.dtype == reference.dtype == torch.float32
        assert torch.equal(mixed, plain)
        torch.testing.assert_close(mixed, reference)
        mixed.backward()
        assert args[0].grad.dtype == torch.bfloat16


def test_functorch_transforms(case, device, generator):
    """vmap, grad and their compositions go through the reference."""
    args, kwargs = arguments(case, generator, torch.float64, device)
    per_row = rows_of(case, (args, kwargs))

    def one_row(*values):
        row = replaced((args, kwargs), dict(zip(per_row, values, strict=True)))
        return case.fused(*row[0], **row[1])

    rows = torch.func.vmap(one_row)(*(tensor.detach() for tensor in per_row.values()))
    losses = case.fused(*args, **kwargs, reduction=case.reductions[-1])
    if not case.is_sum_of_rows:  # a batch of one row each
        losses = torch.stack([one_row(*values) for values in zip(*per_row.values(), strict=True)])
    torch.testing.assert_close(rows, losses.detach())
    gradient = torch.func.grad(lambda s: case.fused(s, *args[1:], **kwargs))(args[0].detach())
    torch.testing.assert_close(
        gradient, torch.autograd.grad(case.fused(*args, **kwargs), args[0])[0]
    )
    hessian = torch.func.hessian(lambda s: case.fused(s, *args[1:], **kwargs))(args[0].detach())
    assert hessian.shape == (7, 12, 7, 12)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_synchronisation(case, dtype, generator):
    args, kwargs = arguments(case, generator, dtype, "cuda", rows=512, width=2048)
    case.fused(*args, **kwargs).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.fused(*args, **kwargs).backward()
        (3 * case.fused(*args, **kwargs)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert args[0].grad.isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cuda_graph(case, dtype, generator):
    """Captured once, replayed on new values."""
    args, kwargs = arguments(case, generator, dtype, "cuda", rows=64, width=256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(case.fused(*args, **kwargs), args[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = case.fused(*args, **kwargs)
        (gradient,) = torch.autograd.grad(loss, args[0])
    for _ in range(2):
        with torch.no_grad():
            args[0].normal_()
        graph.replay()
        expected = truth(case, (args, kwargs), "mean")
        assert expected.loss_error(loss) <= 1e-5
        assert expected.gradient_error(gradient) <= 1e-5 + torch.finfo(dtype).eps / 2


@pytest.mark.cuda
def test_a_backward_pass_captured_apart_may_be_replayed_again(case, generator):
    """torch.cuda.make_graphed_callables() captures it by itself: each replay scales the same."""
    args, kwargs = arguments(case, generator, torch.float32, "cuda", rows=64, width=256)
    graphed = torch.cuda.make_graphed_callables(
        lambda student: case.fused(student, *args[1:], **kwargs), (args[0],)
    )
    student = args[0].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.fused(student, *args[1:], **kwargs), student)
    loss = graphed(student)
    for factor in (3.0, 0.0, 1.0, 5.0):
        upstream = torch.tensor(factor, device="cuda")
        (gradient,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)


@pytest.mark.cuda
def test_side_stream_and_other_devices(case, generator):
    args, kwargs = arguments(case, generator, torch.float32, "cuda")
    expected = case.reference(*args, **kwargs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = case.fused(*args, **kwargs)
        loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(loss, expected)
    for index in range(1, torch.cuda.device_count()):  # the current device stays cuda:0
        args, kwargs = arguments(case, generator, torch.float32, f"cuda:{index}")
        torch.testing.assert_close(case.fused(*args, **kwargs), case.reference(*args, **kwargs))


@pytest.mark.cuda
def test_launches(case, generator):
    """Two kernels forward (count, rows) and one backward."""
    args, kwargs = arguments(case, generator, torch.float32, "cuda", 256, 512)
    case.fused(*args, **kwargs).backward()
    args[0].grad = None
    torch.cuda.synchronize()

    def kernels(run):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            result = run()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        return result, [e.name for e in profile.events() if e.device_type == cuda]

    loss, forward = kernels(lambda: case.fused(*args, **kwargs))
    upstream = torch.ones((), device="cuda")
    _, backward = kernels(lambda: torch.autograd.grad(loss, args[0], upstream))
    assert len(forward) <= 2, forward
    assert len(backward) <= 1, backward


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 255, 2**31])
@pytest.mark.parametrize("one", [case for case in CASES if case.drops_ignored], ids=repr)
def test_ignored_rows_under_a_weight_that_is_not_finite(
    one, weight, reduction, dtype, ignore_index, needs_extension, device, generator
):
    """They stay 0, and their index is not read as a class. The reference multiplies all rows."""
    args, kwargs = arguments(one, generator, dtype, device)
    args[one.target][[1, 4]] = ignore_index
    loss = one.fused(
        *args, **kwargs, ignore_index=ignore_index, reduction=reduction, loss_weight=weight
    )
    (gradient,) = torch.autograd.grad(loss.sum(), args[0])
    assert (gradient[[1, 4]] == 0).all()
    assert not gradient[0].isfinite().any()
    if reduction == "none":
        assert (loss[[1, 4]] == 0).all()


def test_forward_mode(case, device, generator):
    """A dual student gets its tangent, not silently none."""
    import torch.autograd.forward_ad as forward_ad

    args, kwargs = arguments(case, generator, torch.float64, device)
    direction = torch.randn(7, 12, generator=generator, dtype=torch.float64).to(device)
    (gradient,) = torch.autograd.grad(case.fused(*args, **kwargs), args[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[0].detach(), direction)
        tangent = forward_ad.unpack_dual(case.fused(dual, *args[1:], **kwargs)).tangent
    torch.testing.assert_close(tangent, (gradient * direction).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("primal", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_forward_mode_over_the_backward_pass(case, dtype, primal, reduction, device, generator):
    """An upstream gradient that is dual: the gradient is linear in it."""
    import torch.autograd.forward_ad as forward_ad

    args, kwargs = arguments(case, generator, dtype, device)
    loss = case.fused(*args, **kwargs, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), args[0], retain_graph=True)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(
            torch.full_like(loss, primal).detach(), torch.full_like(loss, 2.0).detach()
        )
        (dual,) = torch.autograd.grad(loss, args[0], upstream)
        value, tangent = forward_ad.unpack_dual(dual)
    assert not dual.requires_grad
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * primal * gradient.abs().max()}
    if dtype != torch.float16:  # by sums in another order
        tolerance["atol"] *= 4
    torch.testing.assert_close(value, primal * gradient, **tolerance)
    tolerance["atol"] *= 2
    torch.testing.assert_close(tangent, 2 * gradient, **tolerance)


def test_forward_mode_of_a_weight(case, device, generator):
    """The loss is linear in it."""
    import torch.autograd.forward_ad as forward_ad

    if not case.has_loss_weight:
        pytest.skip("the loss has no weight")
    args, kwargs = arguments(case, generator, torch.float64, device)
    plain = case.fused(*args, **kwargs)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(
            torch.tensor(0.5, dtype=torch.float64, device=device),
            torch.tensor(3.0, dtype=torch.float64, device=device),
        )
        loss = case.fused(*args, **kwargs, loss_weight=weight)
        value, tangent = forward_ad.unpack_dual(loss)
        torch.testing.assert_close(value, 0.5 * plain)
        torch.testing.assert_close(tangent, 3 * plain)


def test_upstream_that_is_a_lazy_view(case, generator):
    """Negative and zero tensors whose memory does not hold their value."""
    args, kwargs = arguments(case, generator)
    expected = torch.autograd.grad(case.fused(*args, **kwargs), args[0])[0]
    negative = torch.tensor(1j).conj().imag
    assert negative.is_neg()
    for upstream, factor in ((negative, -1), (torch._efficientzerotensor(()), 0)):
        loss = case.fused(*args, **kwargs)
        (gradient,) = torch.autograd.grad(loss, args[0], upstream)
        torch.testing.assert_close(gradient, factor * expected)


def test_saved_tensor_hooks_keep_their_tensors(case, generator):
    """A hook that keeps what it packed must not see it change."""
    args, kwargs = arguments(case, generator)
    kept = []

    def pack(tensor):
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.fused(*args, **kwargs)
    (3 * loss).backward()
    assert kept
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)
    expected = torch.autograd.grad(3 * case.reference(*args, **kwargs), args[0])[0]
    torch.testing.assert_close(args[0].grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_teacher_from_inference_mode(case, dtype, device, generator):
    given = arguments(case, generator, dtype, device)
    args, kwargs = given
    expected = torch.autograd.grad(case.reference(*args, **kwargs), args[0])[0]
    with torch.inference_mode():
        teacher = tensors_of(given)[case.teacher] * 1
    args, kwargs = replaced(given, {case.teacher: teacher})
    loss = case.fused(*args, **kwargs)
    torch.testing.assert_close(torch.autograd.grad(loss, args[0])[0], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_teacher_in_a_reused_buffer(case, dtype, reduction, needs_extension, device, generator):
    """Overwriting it is harmless where the gradient is already formed, and else an error."""
    given = arguments(case, generator, dtype, device)
    teacher = tensors_of(given)[case.teacher]
    buffer = teacher.clone()
    args, kwargs = replaced(given, {case.teacher: buffer})
    is_formed = case.forms_gradient_forward and dtype != torch.float16 and reduction == "mean"
    for create_graph in (True, False):
        buffer.copy_(teacher)
        loss = case.fused(*args, **kwargs, reduction=reduction).sum()
        (expected,) = torch.autograd.grad(loss, args[0], retain_graph=True)
        buffer.zero_()
        if not create_graph and (is_formed or not case.forms_gradient_from_teacher):
            assert torch.equal(torch.autograd.grad(loss, args[0])[0], expected)
            continue
        with pytest.raises(RuntimeError, match=r"teacher\S* .*modified by an inplace operation"):
            torch.autograd.grad(loss, args[0], create_graph=create_graph)


@pytest.mark.parametrize(
    ("one", "dtype", "teacher_dtype"),
    [(case, *dtypes) for case in CASES for dtypes in case.teachers_without_copy],
    ids=str,
)
def test_no_copy_of_a_teacher_in_another_dtype(
    one, dtype, teacher_dtype, needs_extension, generator
):
    """It is read without N x D more memory, and rightly."""
    given = arguments(one, generator, dtype, rows=4096, width=1024)
    teacher = tensors_of(given)[one.teacher].to(teacher_dtype)
    args, kwargs = replaced(given, {0: given[0][0].detach(), one.teacher: teacher})

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        loss = one.fused(*args, **kwargs)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= 4 << 20 < teacher.numel() * teacher.element_size() / 2 + 1
    torch.testing.assert_close(loss, one.reference(*args, **kwargs))
