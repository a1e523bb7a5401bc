"""The hierarchical context loss against its definition in NumPy and against the golden vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dnkd_ext

# Batch, channels, height and width of a stage: one cell, heights at which each further level
# begins to count (cells < height), and maps that are not square, narrow or wide or without a whole
# number of pixels per cell.
STAGES = (
    (2, 3, 1, 1),
    (2, 3, 2, 2),
    (2, 3, 3, 3),
    (2, 3, 4, 4),
    (2, 3, 5, 5),
    (1, 2, 8, 8),
    (2, 3, 7, 3),
    (2, 3, 2, 9),
    (3, 1, 6, 11),
)


def stage_truth(student, teacher):
    """Loss and gradient of a stage: its error, and that of l x l cells for l below its height."""
    difference = student - teacher
    samples, channels, height, width = difference.shape
    levels = [None, *(cells for cells in (4, 2, 1) if cells < height)]
    weights = [0.5**i for i in range(len(levels))]
    loss, gradient = 0.0, np.zeros_like(difference)
    for cells, weight in zip(levels, weights, strict=True):
        weight /= sum(weights)
        if cells is None:
            loss += weight * np.mean(difference**2)
            gradient += weight * 2 * difference / difference.size
            continue
        count = samples * channels * cells * cells
        for i in range(cells):
            # From the floor of its beginning to the ceiling of its end.
            y = slice(i * height // cells, -(-(i + 1) * height // cells))
            for j in range(cells):
                x = slice(j * width // cells, -(-(j + 1) * width // cells))
                mean = difference[:, :, y, x].mean((2, 3), keepdims=True)
                pixels = difference[0, 0, y, x].size
                loss += weight * float((mean**2).sum()) / count
                gradient[:, :, y, x] += weight * 2 * mean / (count * pixels)
    return loss, gradient


def maps(generator, shapes, dtype, device):
    """Student and teacher maps, the student's as leaves."""
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    student, teacher = ([draw(s).to(device, dtype) for s in shapes] for _ in range(2))
    return [m.requires_grad_() for m in student], teacher


def float64(tensors):
    return [t.detach().double().cpu().numpy() for t in tensors]


@pytest.fixture(params=[False, True], ids=["plain", "deterministic"])
def deterministic(request, monkeypatch):
    """With deterministic algorithms alone, too, which PyTorch's pooling has not on CUDA."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [*([s] for s in STAGES), STAGES], ids=str)
def test_equals_definition(shapes, dtype, device, generator, deterministic):
    student, teacher = maps(generator, shapes, dtype, device)
    loss = dnkd_ext.hcl_loss(student, teacher)
    loss.backward()
    expected = [stage_truth(s, t) for s, t in zip(float64(student), float64(teacher), strict=True)]
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(sum(value for value, _ in expected), rel=exact)
    for one, (_, gradient) in zip(student, expected, strict=True):
        assert one.grad.dtype == dtype
        error = np.abs(float64([one.grad])[0] - gradient).max() / np.abs(gradient).max()
        assert error <= exact + (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden(dtype, tolerance, golden, device):
    stages = [name for name in golden if name.startswith("hcl_student")]
    assert len(stages) >= 4
    student, teacher = (
        [torch.from_numpy(golden[f"hcl_{who}{i}"]).to(device, dtype) for i in range(len(stages))]
        for who in ("student", "teacher")
    )
    for one in student:
        one.requires_grad_()
    loss = dnkd_ext.hcl_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["hcl_loss"]), rel=tolerance)
    for i, one in enumerate(student):
        expected = golden[f"hcl_grad{i}"]
        difference = np.linalg.norm(float64([one.grad])[0] - expected)
        assert difference <= tolerance * np.linalg.norm(expected)


def test_gradcheck(device, generator, deterministic):
    """First and second derivatives; the teacher gets none."""
    shapes = [(1, 2, 5, 3), (1, 2, 1, 1)]
    student, teacher = maps(generator, shapes, torch.float64, device)
    for one in teacher:
        one.requires_grad_()

    def function(*tensors):
        return dnkd_ext.hcl_loss(tensors, teacher)

    assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradgradcheck(function, student)
    function(*student).backward()
    assert all(one.grad is not None for one in student)
    assert all(one.grad is None for one in teacher)


def test_dtypes_of_teacher_and_student_may_differ(device, generator):
    student, teacher = maps(generator, [(2, 3, 4, 4)], torch.float32, device)
    half = [teacher[0].bfloat16()]
    expected, _ = stage_truth(*float64([student[0], half[0]]))
    loss = dnkd_ext.hcl_loss(student, half)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float64, torch.float16), torch.float64),
    ],
    ids=str,
)
def test_dtypes_of_stages_may_differ(dtypes, wanted, device, generator):
    """The loss is of the widest; every map gets a gradient of its own dtype."""
    student, teacher = maps(generator, [(2, 3, 4, 4), (2, 3, 1, 1)], torch.float64, device)
    student = [x.detach().to(t).requires_grad_() for x, t in zip(student, dtypes, strict=True)]
    expected = sum(
        stage_truth(s, t)[0] for s, t in zip(float64(student), float64(teacher), strict=True)
    )
    loss = dnkd_ext.hcl_loss(student, teacher)
    loss.backward()
    assert loss.dtype == wanted
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert tuple(x.grad.dtype for x in student) == dtypes


def test_half_precision_does_not_overflow(device):
    """Squares of 300 are beyond float16, their mean in float32 is not."""
    student = torch.full((2, 3, 8, 8), 300.0, dtype=torch.float16, device=device)
    loss = dnkd_ext.hcl_loss([student], [torch.zeros_like(student)])
    # Exactly on the CPU; a GPU's mean of equal numbers may be off by a unit in the last place.
    assert loss.item() == pytest.approx(90000, rel=0 if device == "cpu" else 2**-23)


def test_autocast(device, generator, deterministic):
    student, teacher = maps(generator, [(2, 3, 8, 8), (2, 3, 1, 1)], torch.float32, device)
    plain = dnkd_ext.hcl_loss(student, teacher)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = dnkd_ext.hcl_loss(student, teacher)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_deterministic_pooling_is_not_pytorchs(generator, monkeypatch):
    """On a CPU, too, so that it is tested there."""
    student, teacher = maps(generator, [(2, 3, 9, 14)], torch.float32, "cpu")
    wanted = dnkd_ext.hcl_loss(student, teacher)
    monkeypatch.setattr(torch.nn.functional, "adaptive_avg_pool2d", None)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(dnkd_ext.hcl_loss(student, teacher), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile(device, generator, deterministic):
    """One graph, value and gradients as in eager."""
    torch._dynamo.reset()
    compiled = torch.compile(dnkd_ext.hcl_loss, fullgraph=True)
    student, teacher = maps(generator, [(2, 3, 8, 6), (2, 3, 1, 1)], torch.float32, device)
    results = []
    for function in (dnkd_ext.hcl_loss, compiled):
        loss = function(student, teacher)
        results.append((loss, *torch.autograd.grad(3 * loss, student)))
    torch.testing.assert_close(*results)


def test_inputs_are_not_modified(device, generator):
    student, teacher = maps(generator, [(2, 3, 8, 8)], torch.float32, device)
    copies = [student[0].detach().clone(), teacher[0].clone()]
    dnkd_ext.hcl_loss(student, teacher).backward()
    assert torch.equal(student[0].detach(), copies[0])
    assert torch.equal(teacher[0], copies[1])


def test_memory_formats(device, generator):
    """Channels-last maps and ones that are not contiguous give what contiguous ones give."""
    student, teacher = maps(generator, [(2, 3, 8, 8)], torch.float64, device)
    expected = dnkd_ext.hcl_loss(student, teacher)
    last = [student[0].detach().to(memory_format=torch.channels_last)]
    strided = [torch.stack([teacher[0], teacher[0]], -1)[..., 0]]
    torch.testing.assert_close(dnkd_ext.hcl_loss(last, strided), expected.detach())


def test_meta_device(generator, deterministic):
    """Shapes without numbers, as of a model before its weights are loaded."""
    student, teacher = maps(generator, [(2, 3, 8, 8), (2, 3, 1, 1)], torch.bfloat16, "meta")
    loss = dnkd_ext.hcl_loss(student, teacher)
    loss.backward()
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())
    assert [one.grad.shape for one in student] == [one.shape for one in student]


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 0)], ids=str)
def test_nothing_to_compare(shape, device, generator):
    """No samples or no pixels: 0 and a gradient of the same emptiness, beside other stages."""
    student, teacher = maps(generator, [shape], torch.float32, device)
    loss = dnkd_ext.hcl_loss(student, teacher)
    assert loss.item() == 0
    loss.backward()
    assert student[0].grad.shape == shape


def test_nan_is_not_hidden(device, generator):
    for who in (0, 1):
        both = maps(generator, [(2, 3, 8, 8), (2, 3, 1, 1)], torch.float32, device)
        with torch.no_grad():
            both[who][0][1, 2, 3, 4] = float("nan")
        assert dnkd_ext.hcl_loss(*both).isnan()


def _maps(*shapes):
    return [torch.zeros(shape) for shape in shapes]


ONE = (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "match"),
    [
        (
            torch.zeros(ONE),
            _maps(ONE),
            TypeError,
            "student_maps must be a sequence of tensors, one per stage, got Tensor",
        ),
        (_maps(ONE), torch.zeros(ONE), TypeError, "teacher_maps must be a sequence.*got Tensor"),
        (None, _maps(ONE), TypeError, "student_maps must be a sequence.*got NoneType"),
        (set(_maps(ONE)), _maps(ONE), TypeError, "student_maps must be a sequence.*got set"),
        (_maps(ONE), {0: _maps(ONE)[0]}, TypeError, "teacher_maps must be a sequence.*got dict"),
        (_maps(ONE), iter(_maps(ONE)), TypeError, "teacher_maps must be a sequence.*got list_iter"),
        ([], [], ValueError, "student_maps must have at least one stage"),
        (
            _maps(ONE, ONE),
            _maps(ONE),
            ValueError,
            "teacher_maps must have one map per stage of student_maps, 2, got 1",
        ),
        ([[1.0]], _maps(ONE), TypeError, r"student_maps\[0\] must be a torch.Tensor, got list"),
        (
            _maps(ONE, ONE),
            [torch.zeros(ONE), None],
            TypeError,
            r"teacher_maps\[1\] must be a torch.Tensor, got NoneType",
        ),
        (
            [torch.zeros(ONE, dtype=torch.long)],
            _maps(ONE),
            TypeError,
            r"student_maps\[0\] must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            _maps((2, 3)),
            _maps((2, 3)),
            ValueError,
            r"student_maps\[0\] must be \(N, C, H, W\), got shape \[2, 3\]",
        ),
        (
            _maps(ONE, ONE),
            _maps(ONE, (2, 3, 4, 5)),
            ValueError,
            r"teacher_maps\[1\] must have the shape of student_maps\[1\] \[2, 3, 4, 4\], "
            r"got shape \[2, 3, 4, 5\]",
        ),
        (
            _maps(ONE),
            [torch.zeros(ONE, device="meta")],
            RuntimeError,
            r"teacher_maps\[0\] is on meta but student_maps\[0\] is on cpu",
        ),
    ],
)
def test_bad_input(student, teacher, error, match):
    with pytest.raises(error, match=match):
        dnkd_ext.hcl_loss(student, teacher)
