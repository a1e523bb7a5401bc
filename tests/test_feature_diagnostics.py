"""feature_diagnostics against its definition row by row, and as torch sees it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.library import opcheck

import dnkd_ext
from tests.cases import ND_LOSS, convert
from tests.cases.base import as_float64

FUNCTIONS = {
    "fused": dnkd_ext.feature_diagnostics,
    "reference": dnkd_ext.reference.feature_diagnostics,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
VARIANTS = ["direction_only", "teacher_features", "teacher_norms", "ignored", "probabilities"]


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def truth(arguments):
    """The definition, in NumPy."""
    (student, target, means), options = as_float64(arguments)
    width = student.shape[-1]
    eps, ignored = options.get("eps", 1e-12), options.get("ignore_index", -100)
    rows = student.reshape(-1, width).numpy()
    if options.get("teacher_features") is not None:
        features = options["teacher_features"]
        norms = np.linalg.norm(features.reshape(-1, features.shape[-1]).numpy(), axis=1)
    elif options.get("teacher_norms") is not None:
        norms = options["teacher_norms"].reshape(-1).numpy()
    else:
        norms = None
    soft = target.is_floating_point()
    labels = target.reshape(len(rows), -1) if soft else target.reshape(-1)
    lengths, teachers, cosines, reached = [], [], [], []
    for i, row in enumerate(rows):
        if not soft and int(labels[i]) == ignored:
            continue
        c = labels[i].numpy() @ means.numpy() if soft else means[int(labels[i])].numpy()
        length = float(np.linalg.norm(row))
        degenerate = length <= eps or not c.any()
        lengths.append(length)
        cosines.append(
            0.0 if degenerate else float(row @ c) / length / max(float(np.linalg.norm(c)), eps)
        )
        if norms is not None:
            teachers.append(float(norms[i]))
            reached.append(length >= float(norms[i]))
    if not lengths:
        return math.nan, math.nan, math.nan
    if norms is None:
        return math.nan, float(np.mean(cosines)), math.nan
    return sum(lengths) / sum(teachers), float(np.mean(cosines)), float(np.mean(reached))


def check(result, wanted, tolerance):
    assert result._fields == ("norm_ratio", "cosine", "reached")
    for name, value, want in zip(result._fields, result, wanted, strict=True):
        assert value.shape == ()
        assert value.item() == pytest.approx(want, rel=tolerance, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_definition(function, variant, dtype, device, generator):
    for width in (*ND_LOSS.widths, 2304):
        arguments = convert(ND_LOSS.variants[variant](generator, 23, width, 5), dtype, device)
        result = function(*arguments[0], **arguments[1])
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(value.dtype == accumulate for value in result)
        assert all(value.device.type == device for value in result)
        check(result, truth(arguments), 1e-12 if dtype == torch.float64 else 3e-6)


def test_degenerate_rows(function, device, generator):
    """Rows of length 0 and classes without a mean have a cosine of 0; a tie has reached."""
    arguments = convert(ND_LOSS.variants["degenerate"](generator, 6, 16, 5), torch.float64, device)
    check(function(*arguments[0], **arguments[1]), truth(arguments), 1e-12)
    args, kwargs = arguments
    same = function(args[0], args[1], args[2], args[0].detach())
    assert same.norm_ratio == 1
    assert same.reached == 1
    short = function(*args, **kwargs, eps=1e3)
    assert short.cosine == 0


def test_is_what_the_nd_loss_sees(device, generator):
    """Without a teacher the mean cosine is one minus the loss."""
    args, _ = convert(
        ND_LOSS.variants["direction_only"](generator, 30, 64, 5), torch.float64, device
    )
    cosine = dnkd_ext.feature_diagnostics(*args).cosine
    assert cosine.item() == pytest.approx(1 - dnkd_ext.nd_loss(*args).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dtypes_and_widths_beside(function, dtype, device, generator):
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 23, 64, 5), torch.float32, device
    )
    for means in DTYPES:
        for teacher in DTYPES:
            mixed = [args[0].detach().to(dtype), args[1], args[2].to(means)]
            features = torch.cat([kwargs["teacher_features"], kwargs["teacher_features"]], 1)
            for given in (features.to(teacher), features[:, :64].to(teacher)):
                result = function(*mixed, given)
                check(result, truth((mixed, {"teacher_features": given})), 5e-6)


def test_strides_and_shapes(function, device, generator):
    """Any leading shape; rows apart, transposed, and at addresses that vectors cannot read."""
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 24, 40, 5), torch.float32, device
    )
    student, target, means = args[0].detach(), *args[1:]
    teacher = kwargs["teacher_features"]
    wanted = truth(((student, target, means), {"teacher_features": teacher}))

    def apart(tensor, offset, step):
        wide = torch.full((len(tensor), step), math.nan, device=device)
        wide[:, offset : offset + tensor.shape[1]] = tensor
        return wide[:, offset : offset + tensor.shape[1]]

    for change in (
        lambda t: apart(t, 0, 48),
        lambda t: apart(t, 4, 48),
        lambda t: apart(t, 1, 47),
        lambda t: t.t().contiguous().t(),
    ):
        check(function(change(student), target, change(means), change(teacher)), wanted, 3e-6)
    cube = function(
        student.view(2, 3, 4, 40), target.view(2, 3, 4), means, teacher.view(2, 3, 4, 40)
    )
    check(cube, wanted, 3e-6)
    mixture = torch.nn.functional.one_hot(target.view(2, 12), 5).float()
    check(function(student.view(2, 12, 40), mixture, means, teacher.view(2, 12, 40)), wanted, 3e-6)
    # Strides that merge: to reshape such targets and norms makes no copy.
    norms = teacher.norm(dim=1)
    labels, lengths = (
        torch.stack([x, x + 7], -1).flatten(-2)[..., ::2]
        for x in (target.view(2, 12), norms.view(2, 12))
    )
    check(function(student.view(2, 12, 40), labels, means, teacher_norms=lengths), wanted, 3e-6)
    alike = target[0].expand(2, 12)
    check(
        function(student.view(2, 12, 40), alike, means, teacher.view(2, 12, 40)),
        truth(((student, alike.reshape(-1), means), {"teacher_features": teacher})),
        3e-6,
    )
    row = function(student[0], target[0], means, teacher[0])
    check(row, truth(((student[:1], target[:1], means), {"teacher_features": teacher[:1]})), 3e-6)


@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_counted_row(function, rows, device, generator):
    """A mean over nothing is no number."""
    student = torch.randn(rows, 16, generator=generator).to(device)
    target = torch.full((rows,), -100, device=device)
    means = torch.randn(5, 16, generator=generator).to(device)
    for result in function(student, target, means, student * 2):
        assert result.isnan()


def test_meta_device(function, generator):
    """Shapes without numbers, as of every device without a kernel."""
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 12, 33, 5), torch.float16, "meta"
    )
    for value in function(*args, **kwargs):
        assert (value.device.type, value.dtype, value.shape) == ("meta", torch.float32, ())


@pytest.mark.parametrize("fault", ["student", "infinite student", "mean", "teacher", "norms"])
def test_nothing_hides_a_fault(function, fault, device, generator):
    """What makes the ND loss NaN makes all three NaN, unless the row is ignored."""
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 12, 33, 5), torch.float32, device
    )
    student, target, means = args[0].detach(), *args[1:]
    target[4] = 2
    options = {"teacher_features": kwargs["teacher_features"]}
    if fault == "student":
        student[4, 7] = math.nan
    elif fault == "infinite student":
        student[4, 7] = math.inf
    elif fault == "mean":
        means[2, 0] = math.nan
    elif fault == "teacher":
        options["teacher_features"][4, 32] = math.inf
    else:
        options = {
            "teacher_norms": torch.ones(12, device=device).index_fill(0, target[4:5] * 2, math.nan)
        }
    assert dnkd_ext.nd_loss(student, target, means, **options).isnan()
    assert all(value.isnan() for value in function(student, target, means, **options))
    ignored = torch.where(target == 2, -100, target)
    assert all(value.isfinite() for value in function(student, ignored, means, **options))


def test_has_no_gradient(function, device, generator):
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 12, 33, 5), torch.float32, device
    )
    assert args[0].requires_grad
    args[2].requires_grad_()
    before = args[0].detach().clone()
    for value in function(*args, **kwargs):
        assert not value.requires_grad
        assert value.grad_fn is None
    assert torch.equal(args[0], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(function, dtype, device, generator):
    args, kwargs = convert(
        ND_LOSS.variants["probabilities"](generator, 12, 33, 5), torch.float32, device
    )
    plain = function(*args, **kwargs)
    with torch.autocast(device, dtype=dtype):
        assert all(map(torch.equal, function(*args, **kwargs), plain))


def test_is_reproducible_over_threads(generator):
    args, kwargs = convert(
        ND_LOSS.variants["ignored"](generator, 2000, 64, 5), torch.float32, "cpu"
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(dnkd_ext.feature_diagnostics(*args, **kwargs))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_under_the_transforms_of_torch_func(generator):
    """They go to the reference: the kernel cannot be seen through."""
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 12, 8, 5), torch.float64, "cpu"
    )

    def loss(student):
        now = dnkd_ext.feature_diagnostics(student, *args[1:], **kwargs)
        return student.square().sum() * now.cosine, now

    gradient, now = torch.func.grad(loss, has_aux=True)(args[0].detach())
    check(now, truth((args, kwargs)), 1e-12)
    torch.testing.assert_close(gradient, 2 * args[0].detach() * now.cosine)  # a constant


# -- as torch sees it -----------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    "variant", VARIANTS[1:]
)  # opcheck takes NaN, without a teacher, as unequal
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_opcheck(variant, dtype, device, generator):
    args, kwargs = convert(ND_LOSS.variants[variant](generator, 6, 16, 5), dtype, device)
    opcheck(
        torch.ops.dnkd_ext.feature_diagnostics.default,
        (
            *args,
            kwargs.get("teacher_features"),
            kwargs.get("teacher_norms"),
            kwargs.get("ignore_index", -100),
            1e-12,
        ),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_compile(function, variant, device, generator):
    """In a step beside a loss: one graph for every batch size, and the loss's gradient unharmed."""
    torch._dynamo.reset()

    def step(student, args, kwargs):
        features = student.sin()
        return features.square().sum(), function(features, *args[1:], **kwargs)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (7, 12, 20):
        args, kwargs = convert(
            ND_LOSS.variants[variant](generator, rows, 24, 5), torch.float32, device
        )
        (loss, eager), (fast_loss, fast) = (
            step(args[0], args, kwargs),
            compiled(args[0], args, kwargs),
        )
        torch.testing.assert_close(tuple(fast), tuple(eager), equal_nan=True)
        torch.testing.assert_close(
            torch.autograd.grad(fast_loss, args[0], retain_graph=True),
            torch.autograd.grad(loss, args[0], retain_graph=True),
            equal_nan=True,
        )


def test_fake_tensors_check_arguments(generator):
    from torch._subclasses import FakeTensorMode

    args, _ = convert(ND_LOSS.variants["direction_only"](generator, 7, 24, 5), torch.float16, "cpu")
    with FakeTensorMode() as mode:
        student, target, means = (mode.from_tensor(t) for t in args)
        cosine = dnkd_ext.feature_diagnostics(student, target, means).cosine
        assert (cosine.shape, cosine.dtype) == ((), torch.float32)
        with pytest.raises(ValueError, match="23 wide but student_features is 24 wide"):
            dnkd_ext.feature_diagnostics(student, target, means[:, :-1])


@pytest.mark.cuda
def test_does_not_synchronise(generator):
    """Nothing is read back, and a captured graph sees new features."""
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 40, 64, 5), torch.float32, "cuda"
    )
    student = args[0].detach()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dnkd_ext.feature_diagnostics(student, *args[1:], **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dnkd_ext.feature_diagnostics(student, *args[1:], **kwargs)
    for _ in range(2):
        student.copy_(torch.randn_like(student))
        graph.replay()
        check(captured, truth(((student, *args[1:]), kwargs)), 3e-6)


@pytest.mark.cuda
def test_a_bad_target_on_a_gpu(generator):
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 40, 64, 5), torch.float32, "cuda"
    )
    args[1][3] = 5
    assert all(value.isnan() for value in dnkd_ext.feature_diagnostics(*args, **kwargs))


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("isa", dnkd_ext.build_info()["cpu_isas"] or ["baseline"])
def test_every_instruction_set(isa, generator, tmp_path):
    """Each one's kernel, forced in a process of its own."""
    arguments = [
        convert(ND_LOSS.variants[variant](generator, 9, 137, 5), dtype, "cpu")
        for variant in ("teacher_features", "ignored", "probabilities")
        for dtype in DTYPES
    ]
    torch.save(arguments, tmp_path / "arguments.pt")
    code = (
        "import json, torch, dnkd_ext\n"
        f"arguments = torch.load({str(tmp_path / 'arguments.pt')!r})\n"
        "print(json.dumps([dnkd_ext.build_info()['cpu_isa']] + [[v.item() for v in "
        "dnkd_ext.feature_diagnostics(*a, **k)] for a, k in arguments]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DNKD_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used, *results = json.loads(done.stdout)
    assert used == isa
    for result, one in zip(results, arguments, strict=True):
        assert result == pytest.approx(truth(one), rel=3e-6, abs=3e-6)


# Those of the ND loss that are not about what diagnostics do not have.
BAD = [bad for bad in ND_LOSS.bad_inputs if not any(w in bad.name for w in ("reduction", "weight"))]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(function, bad, generator):
    assert len(BAD) >= 15
    args, kwargs = convert(
        ND_LOSS.variants["teacher_features"](generator, 6, 8, 5), torch.float32, "cpu"
    )
    args[0] = args[0].detach()
    function(*args, **kwargs)  # good before it is spoilt
    bad.change(args, kwargs)
    with pytest.raises(bad.error, match=bad.match):
        function(*args, **kwargs)
