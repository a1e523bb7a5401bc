"""Gradients of every loss: first, second, retained, scaled, and what must not happen to tensors."""

from __future__ import annotations

import pytest
import torch

from tests.cases import ND_LOSS, convert, truth

VARIANTS = ["direction_only", "teacher_features", "probabilities", "ignored"]


def arguments(case, variant, generator, dtype=torch.float32, device="cpu", rows=7, width=12):
    args, kwargs = convert(case.variants[variant](generator, rows, width, 5), dtype, device)
    if variant == "ignored":  # gradcheck cannot step away from NaN
        with torch.no_grad():
            args[0].nan_to_num_(0.5)
            kwargs["teacher_features"].nan_to_num_(posinf=1.0)
    return args, kwargs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_gradcheck(case, implementation, variant, reduction, device, generator):
    """First and second derivatives against finite differences."""
    args, kwargs = arguments(case, variant, generator, torch.float64, device, rows=4, width=5)
    function = lambda x: getattr(case, implementation)(x, *args[1:], **kwargs, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, args[0])
    assert torch.autograd.gradgradcheck(function, args[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_hessian_vector_product(case, dtype, device, generator):
    """create_graph=True through the fused loss equals the reference, not silent zeros."""
    args, kwargs = arguments(case, "teacher_features", generator, dtype, device)
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
    args, kwargs = arguments(case, "teacher_features", generator, torch.float64, device)
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
    args, kwargs = arguments(case, "teacher_features", generator, dtype, device)
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
    args, kwargs = arguments(case, "teacher_features", generator, dtype, device)
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
    for variant in VARIANTS:
        args, kwargs = arguments(case, variant, generator, dtype, device)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        copies = [t.detach().clone() for t in tensors]
        loss = case.fused(*args, **kwargs, reduction=reduction)
        upstream = torch.full_like(loss, 3.0)
        for retain in (True, False):
            torch.autograd.grad(loss, args[0], upstream, retain_graph=retain)
        assert (upstream == 3).all()
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy)


def test_editing_features_before_backward_raises(case, device, generator):
    args, kwargs = arguments(case, "teacher_features", generator, device=device)
    features = args[0] * 1
    loss = case.fused(features, *args[1:], **kwargs)
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_student_gets_a_gradient(case, device, generator):
    for function in (case.fused, case.reference):
        args, kwargs = arguments(case, "teacher_features", generator, device=device)
        others = [args[2].requires_grad_(), kwargs["teacher_features"].requires_grad_()]
        function(*args, **kwargs).backward()
        assert args[0].grad is not None
        assert [t.grad for t in others] == [None, None]
        with torch.no_grad():
            args[0].requires_grad_(False)
        assert not function(*args, **kwargs).requires_grad


def test_gradient_accumulation_and_sharing(case, device, generator):
    """Two losses on one feature, one weighted outside: the sum of both gradients."""
    args, kwargs = arguments(case, "teacher_features", generator, torch.float64, device)
    gradients = []
    for function in (case.fused, case.reference):
        features = args[0] * 2
        total = function(features, *args[1:], **kwargs) + 0.25 * function(
            features, *args[1:], reduction="sum"
        )
        gradients.append(torch.autograd.grad(total, args[0])[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(case, reentrant, device, generator):
    from torch.utils.checkpoint import checkpoint

    args, kwargs = arguments(case, "teacher_features", generator, device=device)

    def run(x):
        return case.fused(x * 2, *args[1:], **kwargs)

    (checkpoint(run, args[0], use_reentrant=reentrant) * 3).backward()
    expected = torch.autograd.grad(case.reference(args[0] * 2, *args[1:], **kwargs) * 3, args[0])[0]
    torch.testing.assert_close(args[0].grad, expected)


def test_backward_with_upstream_one_makes_no_pass(case, needs_extension, generator):
    """The gradient that the forward pass formed arrives as it is, without an operator on it."""
    args, kwargs = arguments(case, "teacher_features", generator)

    def operators(upstream):
        loss = case.fused(*args, **kwargs)
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
    args, kwargs = arguments(case, "teacher_features", generator, rows=512, width=256)
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
    assert allocated(lambda: case.fused(*args, **kwargs)) >= buffer


def test_float16_gradient_survives_the_loss_scale(device, generator):
    """Formed with 1/N before the scale is known it would underflow; it is formed in the backward.

    4096 x 1024: a gradient element is about 1e-8, below float16's smallest of 6e-8.
    """
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 4096, 1024, 10), torch.float16, device
    )
    kwargs["teacher_features"] *= 8
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    parameter = torch.nn.Parameter(args[0].detach().float())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale(ND_LOSS.fused(parameter.half(), *args[1:], **kwargs)).backward()
    scaler.unscale_(optimizer)
    expected = truth(ND_LOSS, (args, kwargs), "mean")
    assert abs(expected.gradient).max() < 1e-6
    assert expected.gradient_error(parameter.grad) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bitwise_reproducible(case, dtype, device, generator):
    """The same bits from run to run, and on the CPU for every number of threads."""
    args, kwargs = arguments(
        case, "teacher_features", generator, dtype, device, rows=600, width=200
    )

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


def test_two_threads_take_part(needs_extension):
    """at::parallel_for is silently serial without OpenMP."""
    import dnkd_ext

    assert dnkd_ext.build_info()["openmp"] is True
    if torch.get_num_threads() < 2:
        pytest.skip("this machine gives torch one thread")
    student = torch.randn(4096, 4096)
    target = torch.zeros(4096, dtype=torch.long)
    means = torch.randn(1, 4096)

    def seconds(clock):
        import time

        started = getattr(time, clock)()
        for _ in range(20):
            ND_LOSS.fused(student, target, means)
        return getattr(time, clock)() - started

    # Processor time of the process over that of the calling thread: 1 where it works alone.
    import time

    started = time.process_time(), time.thread_time()
    seconds("process_time")
    process, thread = time.process_time() - started[0], time.thread_time() - started[1]
    assert process > 1.4 * thread


def test_autocast(case, device, generator):
    """Autocast neither changes the inputs' dtypes nor the loss's float32."""
    for variant in VARIANTS:
        args, kwargs = arguments(case, variant, generator, torch.bfloat16, device)
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
    args, kwargs = arguments(case, "teacher_features", generator, torch.float64, device)
    rows = torch.func.vmap(
        lambda s, t, teacher: case.fused(s, t, args[2], teacher_features=teacher)
    )(args[0].detach(), args[1], kwargs["teacher_features"])
    torch.testing.assert_close(rows, case.fused(*args, **kwargs, reduction="none").detach())
    gradient = torch.func.grad(lambda s: case.fused(s, *args[1:], **kwargs))(args[0].detach())
    torch.testing.assert_close(
        gradient, torch.autograd.grad(case.fused(*args, **kwargs), args[0])[0]
    )
    hessian = torch.func.hessian(lambda s: case.fused(s, *args[1:], **kwargs))(args[0].detach())
    assert hessian.shape == (7, 12, 7, 12)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_synchronisation(case, dtype, generator):
    args, kwargs = arguments(
        case, "teacher_features", generator, dtype, "cuda", rows=512, width=2048
    )
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
    args, kwargs = arguments(case, "teacher_features", generator, dtype, "cuda", rows=64, width=256)
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
def test_side_stream_and_other_devices(case, generator):
    args, kwargs = arguments(case, "teacher_features", generator, torch.float32, "cuda")
    expected = case.reference(*args, **kwargs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = case.fused(*args, **kwargs)
        loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(loss, expected)
    for index in range(1, torch.cuda.device_count()):  # the current device stays cuda:0
        args, kwargs = arguments(
            case, "teacher_features", generator, torch.float32, f"cuda:{index}"
        )
        torch.testing.assert_close(case.fused(*args, **kwargs), case.reference(*args, **kwargs))


@pytest.mark.cuda
def test_launches(case, generator):
    """Two kernels forward (count, rows) and one backward."""
    args, kwargs = arguments(case, "teacher_features", generator, torch.float32, "cuda", 256, 512)
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
def test_ignored_rows_under_a_weight_that_is_not_finite(
    case, weight, reduction, dtype, ignore_index, device, generator
):
    """They stay 0, and their index is not read as a class."""
    args, kwargs = arguments(case, "teacher_features", generator, dtype, device)
    args[1][[1, 4]] = ignore_index
    loss = case.fused(
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

    args, kwargs = arguments(case, "teacher_features", generator, torch.float64, device)
    direction = torch.randn(7, 12, generator=generator, dtype=torch.float64).to(device)
    (gradient,) = torch.autograd.grad(case.fused(*args, **kwargs), args[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[0].detach(), direction)
        tangent = forward_ad.unpack_dual(case.fused(dual, *args[1:], **kwargs)).tangent
    torch.testing.assert_close(tangent, (gradient * direction).sum())


def test_upstream_that_is_a_lazy_view(case, generator):
    """Negative and zero tensors whose memory does not hold their value."""
    args, kwargs = arguments(case, "teacher_features", generator)
    expected = torch.autograd.grad(case.fused(*args, **kwargs), args[0])[0]
    negative = torch.tensor(1j).conj().imag
    assert negative.is_neg()
    for upstream, factor in ((negative, -1), (torch._efficientzerotensor(()), 0)):
        loss = case.fused(*args, **kwargs)
        (gradient,) = torch.autograd.grad(loss, args[0], upstream)
        torch.testing.assert_close(gradient, factor * expected)


def test_saved_tensor_hooks_keep_their_tensors(case, generator):
    """A hook that keeps what it packed must not see it change."""
    args, kwargs = arguments(case, "teacher_features", generator)
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


def test_teacher_from_inference_mode_and_reused_buffers(case, device, generator):
    """The teacher's tensors are not needed by the first backward pass."""
    args, kwargs = arguments(case, "teacher_features", generator, device=device)
    expected = torch.autograd.grad(case.reference(*args, **kwargs), args[0])[0]
    with torch.inference_mode():
        teacher = kwargs["teacher_features"] * 1
    loss = case.fused(*args, teacher_features=teacher)
    torch.testing.assert_close(torch.autograd.grad(loss, args[0])[0], expected)
    buffer = kwargs["teacher_features"].clone()
    loss = case.fused(*args, teacher_features=buffer)
    buffer.zero_()
    with pytest.raises(RuntimeError, match="teacher's features or norms were modified"):
        torch.autograd.grad(loss, args[0], create_graph=True)
    loss = case.fused(*args, teacher_features=buffer.copy_(kwargs["teacher_features"]))
    buffer.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, args[0])[0], expected)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_no_copy_of_a_teacher_in_another_dtype(
    case, dtype, teacher_dtype, needs_extension, generator
):
    """Its norms are taken without N x D more memory, and are right."""
    args, kwargs = arguments(case, "teacher_features", generator, dtype, rows=4096, width=1024)
    teacher = kwargs["teacher_features"].to(teacher_dtype)
    student = args[0].detach()

    def run():
        return case.fused(student, *args[1:], teacher_features=teacher)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        loss = run()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= 4 << 20 < teacher.numel() * 4
    torch.testing.assert_close(loss, case.reference(student, *args[1:], teacher_features=teacher))
