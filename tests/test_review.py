"""ReviewKD++: its fusion blocks against sums over taps and indices, and what models offer it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dnkd_ext
from dnkd_ext.review import FusionBlock, ReviewFusion, stage_channels
from dnkd_ext.train.models import create_model
from dnkd_ext.train.models.cifar_resnet import CifarResNet
from tests.test_distributed import in_processes

CLASSES, WIDTH, ROWS = 10, 24, 6
STUDENT, TEACHER = [5, 7, 6], [8, 4, 9]
# Height and width per stage. The first is like resnet56 -> resnet20, the second like
# resnet50 -> mobilenetv2, the third a teacher with smaller maps, the last has no square.
SIZES = {
    "equal": ([(8, 8), (4, 4), (1, 1)], [(8, 8), (4, 4), (1, 1)]),
    "teacher larger": ([(4, 4), (2, 2), (1, 1)], [(8, 8), (8, 8), (1, 1)]),
    "teacher smaller": ([(8, 8), (8, 8), (1, 1)], [(4, 4), (2, 2), (1, 1)]),
    "oblong": ([(8, 12), (4, 6), (1, 1)], [(8, 4), (2, 8), (1, 1)]),
}
WEIGHTS = {"ce_weight": 0.75, "kd_weight": 2.5, "nd_weight": 1.5}
LEAVES = ("student_logits", "student_features")


def draw(generator, sizes="equal", target="indices", rows=ROWS):
    """float64 inputs of the criterion, and class means."""
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    if target == "mixup":
        other = torch.randint(CLASSES, (rows,), generator=generator)
        labels = (0.7 * F.one_hot(labels, CLASSES) + 0.3 * F.one_hot(other, CLASSES)).double()
    elif target == "ignored":
        labels[::4] = 255
    own, wanted = SIZES[sizes]
    return {
        "student_maps": [rand(rows, c, *size) for c, size in zip(STUDENT, own, strict=True)],
        "teacher_maps": [rand(rows, c, *size) for c, size in zip(TEACHER, wanted, strict=True)],
        "student_logits": 2 * rand(rows, CLASSES),
        "student_features": rand(rows, WIDTH),
        "target": labels,
        "teacher_features": 1.1 * rand(rows, WIDTH),
        "means": rand(CLASSES, WIDTH),
    }


def bring(inputs, dtype, device="cpu"):
    """To a dtype and device; the student's as leaves."""

    def one(value):
        return value.detach().to(device, dtype if value.is_floating_point() else value.dtype)

    result = {
        key: [one(v) for v in value] if isinstance(value, list) else one(value)
        for key, value in inputs.items()
    }
    for key in LEAVES:
        result[key] = result[key].clone().requires_grad_()
    result["student_maps"] = [v.clone().requires_grad_() for v in result["student_maps"]]
    return result


def leaves(inputs):
    return [*inputs["student_maps"], *(inputs[key] for key in LEAVES)]


def make(means, dtype=torch.float64, device="cpu", **options):
    """A criterion whose parameters are drawn anew, so that none has a value that hides it."""
    torch.manual_seed(0)
    options = {**WEIGHTS, "mid_channels": 3, **options}
    criterion = dnkd_ext.ReviewKDPlusPlus(means, STUDENT, TEACHER, **options)
    for parameter in criterion.parameters():
        nn.init.normal_(parameter, std=0.7)
    return criterion.to(device, dtype)


def call(criterion, inputs, **options):
    arguments = {key: value for key, value in inputs.items() if key != "means"}
    return criterion(**{**arguments, **options})


# -- the same, written down once more -------------------------------------------------------------


def resized(maps, size):
    """Nearest neighbour: where an output pixel's corner lies."""
    rows, columns = (
        torch.arange(new) * old // new for new, old in zip(size, maps.shape[2:], strict=True)
    )
    return maps[:, :, rows][:, :, :, columns]


def normalised(maps, layer):
    mean = maps.mean((0, 2, 3), keepdim=True)
    variance = (maps - mean).square().mean((0, 2, 3), keepdim=True)
    scaled = (maps - mean) / (variance + 1e-5).sqrt()
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]


def pointwise(maps, weight):
    return torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], maps)


def taps(maps, weight):
    """A 3 x 3 convolution as the sum of nine shifted products."""
    height, width = maps.shape[2:]
    padded = F.pad(maps, (1, 1, 1, 1))
    return sum(
        torch.einsum(
            "oc,nchw->nohw", weight[:, :, i, j], padded[:, :, i:, j:][..., :height, :width]
        )
        for i in range(3)
        for j in range(3)
    )


def fused(fusion, maps, sizes):
    results, carried = [], None
    for block, own, size in list(zip(fusion.blocks, maps, sizes, strict=True))[::-1]:
        x = normalised(pointwise(own, block.reduce[0].weight), block.reduce[1])
        if carried is not None:
            y = resized(carried, x.shape[2:])
            convolution, _ = block.attention
            half = x.shape[1]
            score = (
                pointwise(x, convolution.weight[:, :half])
                + pointwise(y, convolution.weight[:, half:])
                + convolution.bias[:, None, None]
            )
            share = 1 / (1 + (-score).exp())
            x = torch.einsum("nhw,nchw->nchw", share[:, 0], x) + torch.einsum(
                "nhw,nchw->nchw", share[:, 1], y
            )
        carried = resized(x, size)
        results.append(normalised(taps(carried, block.expand[0].weight), block.expand[1]))
    return results[::-1]


def hierarchical(student, teacher):
    """HCL of maps whose sizes are multiples of the cells', or smaller."""
    total = 0
    for s, t in zip(student, teacher, strict=True):
        difference, height = s - t, s.shape[2]
        weighted, weights = difference.square().mean(), 1.0
        for level, cells in enumerate(c for c in (4, 2, 1) if c < height):
            tiles = difference.unflatten(2, (cells, -1)).unflatten(4, (cells, -1))
            weighted = weighted + 0.5 ** (level + 1) * tiles.mean((3, 5)).square().mean()
            weights += 0.5 ** (level + 1)
        total = total + weighted / weights
    return total


def expected(
    criterion,
    inputs,
    *,
    kd_ramp=1.0,
    nd_ramp=1.0,
    weights=WEIGHTS,
    smoothing=0.0,
    ignore_index=-100,
):
    """``(loss, ce, kd, nd)`` and gradients of leaves and parameters, in float64."""
    x, twin = bring(inputs, torch.float64), copy.deepcopy(criterion).cpu().double()
    soft = x["target"].is_floating_point()
    ce = F.cross_entropy(
        x["student_logits"],
        x["target"],
        label_smoothing=smoothing,
        ignore_index=-100 if soft else ignore_index,
    )
    sizes = [one.shape[2:] for one in x["teacher_maps"]]
    kd = hierarchical(fused(twin.fusion, x["student_maps"], sizes), x["teacher_maps"])
    nd = dnkd_ext.reference.nd_loss(
        x["student_features"],
        x["target"],
        x["means"],
        teacher_features=x["teacher_features"],
        ignore_index=ignore_index,
    )
    kd_weight, nd_weight = weights["kd_weight"] * kd_ramp, weights["nd_weight"] * nd_ramp
    loss = weights["ce_weight"] * ce + kd_weight * kd + nd_weight * nd
    nd = nd if nd_ramp else torch.zeros_like(nd)  # whose value is not known any more
    return (loss, ce, kd, nd), torch.autograd.grad(loss, [*leaves(x), *twin.parameters()])


def check(terms, gradients, truth, dtype=torch.float64):
    tolerance = 1e-9 if dtype == torch.float64 else 5e-5
    values, wanted = truth
    for name, result, value in zip(terms._fields, terms, values, strict=True):
        assert result.shape == (), name
        assert result.dtype == dtype, name
        assert result.item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name
    assert len(gradients) == len(wanted)
    for got, one in zip(gradients, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double().cpu(), one, rtol=0, atol=tolerance * max(float(one.abs().max()), 0.01)
        )


def gradients_of(terms, criterion, inputs):
    return torch.autograd.grad(terms.loss, [*leaves(inputs), *criterion.parameters()])


# -- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_sum_of_its_terms(sizes, dtype, device, generator):
    inputs = bring(draw(generator, sizes), dtype, device)
    criterion = make(inputs["means"], dtype, device)
    terms = call(criterion, inputs)
    assert terms.loss.requires_grad
    assert not any(term.requires_grad for term in terms[1:])
    check(terms, gradients_of(terms, criterion, inputs), expected(criterion, inputs), dtype)


@pytest.mark.parametrize("target", ["ignored", "mixup"])
def test_targets_and_options(target, device, generator):
    inputs = bring(draw(generator, target=target), torch.float64, device)
    criterion = make(inputs["means"], device=device, label_smoothing=0.1, ignore_index=255)
    terms = call(criterion, inputs)
    truth = expected(criterion, inputs, smoothing=0.1, ignore_index=255)
    check(terms, gradients_of(terms, criterion, inputs), truth)


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", ["kd_ramp", "nd_ramp"])
def test_ramp(name, ramp, as_tensor, generator):
    """Multiplies its term's weight; at 0 every parameter still gets a gradient, of 0."""
    inputs = bring(draw(generator), torch.float64)
    criterion = make(inputs["means"])
    terms = call(criterion, inputs, **{name: torch.tensor(float(ramp)) if as_tensor else ramp})
    gradients = gradients_of(terms, criterion, inputs)
    check(terms, gradients, expected(criterion, inputs, **{name: ramp}))
    if ramp == 0 and name == "kd_ramp":
        assert all(g.abs().max() == 0 for g in gradients[len(leaves(inputs)) :])


def test_weights_as_tensors(device, generator):
    """They are buffers, equal to floats, and may be changed in place."""
    inputs = bring(draw(generator), torch.float64, device)
    tensors = {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}
    criterion = make(inputs["means"], device=device, **tensors)
    check(
        terms := call(criterion, inputs),
        gradients_of(terms, criterion, inputs),
        expected(criterion, inputs),
    )
    other = {"ce_weight": 2.0, "kd_weight": 0.0, "nd_weight": -0.5}
    for name, weight in other.items():
        getattr(criterion, name).fill_(weight)
    check(
        terms := call(criterion, inputs),
        gradients_of(terms, criterion, inputs),
        expected(criterion, inputs, weights=other),
    )


def test_without_the_nd_loss(generator):
    """nd_weight=0 is plain ReviewKD, whatever class means and features are."""
    inputs = bring(draw(generator), torch.float64)
    weights = {**WEIGHTS, "nd_weight": 0}
    for means, features in ((None, None), (None, torch.ones(3, 5)), (inputs["means"], None)):
        criterion = make(means, nd_weight=0)
        terms = call(criterion, inputs, student_features=features, teacher_features=None)
        values, _ = expected(criterion, inputs, weights=weights)
        for result, value in zip(terms[:3], values[:3], strict=True):
            assert result.item() == pytest.approx(value.item(), rel=1e-9)
        assert terms.nd == 0


def test_an_embedding_may_be_flat(generator):
    inputs = bring(draw(generator), torch.float64)
    criterion = make(inputs["means"])
    flat = {
        key: [*inputs[key][:-1], inputs[key][-1][..., 0, 0]]
        for key in ("student_maps", "teacher_maps")
    }
    assert torch.equal(call(criterion, inputs).loss, call(criterion, {**inputs, **flat}).loss)


def test_one_stage(generator):
    """The embedding alone: nothing is fused."""
    inputs = bring(draw(generator), torch.float64)
    criterion = dnkd_ext.ReviewKDPlusPlus(inputs["means"], STUDENT[-1:], TEACHER[-1:]).double()
    one = {key: inputs[key][-1:] for key in ("student_maps", "teacher_maps")}
    terms = call(criterion, {**inputs, **one})
    results = fused(criterion.fusion, one["student_maps"], [(1, 1)])
    wanted = (results[0] - one["teacher_maps"][0]).square().mean()
    assert terms.kd.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_teacher_gets_no_gradient_and_may_have_another_dtype(generator):
    inputs = bring(draw(generator), torch.float32)
    inputs["teacher_maps"] = [one.bfloat16().requires_grad_() for one in inputs["teacher_maps"]]
    criterion = make(inputs["means"], torch.float32)
    terms = call(criterion, inputs)
    terms.loss.backward()
    assert all(one.grad is None for one in inputs["teacher_maps"])
    values, _ = expected(criterion, inputs)
    assert terms.kd.item() == pytest.approx(values[2].item(), rel=1e-4)


def test_memory_formats(device, generator):
    """Channels-last maps and ones that are not contiguous give what contiguous ones give."""
    inputs = bring(draw(generator), torch.float64, device)
    criterion = make(inputs["means"], device=device)
    wanted = call(criterion, inputs)
    gradients = gradients_of(wanted, criterion, inputs)
    for change in (
        lambda one: one.to(memory_format=torch.channels_last),
        lambda one: torch.stack([one, one], -1)[..., 0],
        lambda one: one.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        moved = {**inputs, "teacher_maps": [change(one) for one in inputs["teacher_maps"]]}
        moved["student_maps"] = [change(one) for one in inputs["student_maps"]]
        terms = call(criterion, moved)
        torch.testing.assert_close(tuple(terms), tuple(wanted))
        torch.testing.assert_close(gradients_of(terms, criterion, inputs), gradients)


def test_inputs_are_not_modified(generator):
    inputs = bring(draw(generator), torch.float64)
    before = copy.deepcopy({k: v for k, v in inputs.items() if k != "target"})
    call(make(inputs["means"]), inputs).loss.backward()
    for key, value in before.items():
        torch.testing.assert_close(value, inputs[key], rtol=0, atol=0)


def test_retained_graphs_and_accumulation(generator):
    inputs = bring(draw(generator), torch.float64)
    criterion = make(inputs["means"])
    wanted = gradients_of(call(criterion, inputs), criterion, inputs)
    loss = 3 * call(criterion, inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip([*leaves(inputs), *criterion.parameters()], wanted, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * gradient)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training, generator):
    inputs = bring(draw(generator, rows=2), torch.float64)
    for key, spatial in (("student_maps", (2, 3)), ("teacher_maps", (4, 2))):
        maps = [inputs[key][0][:, :, : spatial[0], : spatial[1]], inputs[key][-1]]
        inputs[key] = [one.detach().clone() for one in maps]
    criterion = dnkd_ext.ReviewKDPlusPlus(
        inputs["means"], [5, 6], [8, 9], mid_channels=2, **WEIGHTS
    )
    criterion = criterion.double().train(training)

    def loss(first, second, logits, features):
        changed = {
            "student_maps": [first, second],
            "student_logits": logits,
            "student_features": features,
        }
        return call(criterion, {**inputs, **changed}).loss

    tensors = [
        one.detach().clone().requires_grad_()
        for one in (*inputs["student_maps"], *(inputs[key] for key in LEAVES))
    ]
    if training:
        assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


def test_autocast(device, generator):
    """The convolutions in bfloat16, the terms in float32, and close."""
    inputs = bring(draw(generator), torch.float32, device)
    criterion = make(inputs["means"], torch.float32, device)
    plain = call(criterion, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        half = {**inputs, "student_maps": [one.bfloat16() for one in inputs["student_maps"]]}
        for given in (inputs, half):
            mixed = call(criterion, given)
            assert all(term.dtype == torch.float32 for term in mixed)
            torch.testing.assert_close(tuple(mixed), tuple(plain), rtol=0.05, atol=0.02)
            gradients = gradients_of(mixed, criterion, inputs)
            wanted = gradients_of(call(criterion, inputs), criterion, inputs)
            for a, b in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0.1 * max(float(b.abs().max()), 0.1))


def test_a_bfloat16_criterion(generator):
    inputs = bring(draw(generator), torch.bfloat16)
    criterion = make(inputs["means"], torch.bfloat16)
    terms = call(criterion, inputs)
    terms.loss.backward()
    assert terms.loss.dtype == torch.float32
    values, _ = expected(criterion, inputs)
    assert terms.loss.item() == pytest.approx(values[0].item(), rel=0.05)


def test_an_empty_batch(device, generator):
    """0, gradients of 0, and running statistics that stay as they were."""
    inputs = bring(draw(generator, rows=0), torch.float64, device)
    criterion = make(inputs["means"], device=device)
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    terms = call(criterion, inputs)
    assert tuple(terms) == (0, 0, 0, 0)
    gradients = gradients_of(terms, criterion, inputs)
    assert all(g.abs().sum() == 0 for g in gradients)
    for key, value in criterion.state_dict().items():
        assert torch.equal(value, before[key]) or key.endswith("num_batches_tracked")


def test_one_sample(generator):
    """Of one pixel batch normalisation makes nothing in training, and all in evaluation."""
    inputs = bring(draw(generator, rows=1), torch.float64)
    criterion = make(inputs["means"])
    with pytest.raises(ValueError, match=r"student_maps\[2\] is one pixel of one sample"):
        call(criterion, inputs)
    assert call(criterion.eval(), inputs).loss.isfinite()


def test_nan_is_not_hidden(generator):
    for key in ("student_maps", "teacher_maps"):
        inputs = bring(draw(generator), torch.float64)
        with torch.no_grad():
            inputs[key][0][0, 0, 0, 0] = math.nan
        terms = call(make(inputs["means"]), inputs)
        assert terms.loss.isnan()
        assert terms.kd.isnan()


# -- module ---------------------------------------------------------------------------------------


def test_middle_width():
    for last, wanted in ((64, 64), (512, 512), (1280, 512)):
        criterion = dnkd_ext.ReviewKDPlusPlus(None, [8, last], [8, 16], nd_weight=0)
        assert criterion.fusion.mid_channels == wanted
        assert f"mid_channels={wanted}" in repr(criterion)


def test_state_dict_and_copies(generator):
    inputs = bring(draw(generator), torch.float64)
    criterion = make(inputs["means"], nd_weight=torch.tensor(2.0))
    call(criterion, inputs)  # running statistics of their own
    names = set(criterion.state_dict())
    assert {name for name in names if not name.startswith("fusion.blocks.")} == {
        "class_means",
        "nd_weight",
    }
    other = make(torch.zeros(CLASSES, WIDTH), nd_weight=torch.tensor(0.5))
    other.load_state_dict(criterion.state_dict())
    duplicate = copy.deepcopy(criterion)
    for one in (criterion, other, duplicate):
        one.eval()
    assert torch.equal(call(other, inputs).loss, call(criterion, inputs).loss)
    assert torch.equal(call(duplicate, inputs).loss, call(criterion, inputs).loss)


def test_warning_of_missing_classes_points_here(generator):
    accumulator = dnkd_ext.ClassMeans(3, 4)
    accumulator.update(torch.randn(6, 4, generator=generator), torch.tensor([0, 2, 0, 2, 2, 0]))
    with pytest.warns(UserWarning, match="no samples for 1 of 3 classes") as caught:
        dnkd_ext.ReviewKDPlusPlus(accumulator, [4], [4])
    model = create_model("cifar_resnet8x4")
    with pytest.warns(UserWarning, match="no samples for 1 of 3 classes") as more:
        dnkd_ext.ReviewKDPlusPlus.from_models(model, model, accumulator)
    assert caught[0].filename == more[0].filename == __file__


def _two_steps(rank, world_size, inputs):
    """Fails in the second step, if a parameter had no gradient in the first."""
    criterion = make(inputs["means"])
    wrapped = nn.parallel.DistributedDataParallel(criterion)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    for step in range(2):
        half = {
            key: [v.chunk(world_size)[rank] for v in value]
            if isinstance(value, list)
            else value.chunk(world_size)[rank]
            for key, value in inputs.items()
            if key != "means"
        }
        optimizer.zero_grad()
        wrapped(**half, kd_ramp=float(step)).loss.backward()
        optimizer.step()
    return [p.detach() for p in criterion.parameters()]


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path, generator):
    inputs = draw(generator)
    first, second = in_processes(_two_steps, tmp_path, inputs)
    before = list(make(inputs["means"]).parameters())
    for a, b, start in zip(first, second, before, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)


# -- compilation and capture ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device, generator):
    """One graph; weights and ramp change without another."""
    torch._dynamo.reset()
    inputs = bring(draw(generator, "teacher larger"), torch.float32, device)
    tensors = {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}
    criterion = make(inputs["means"], torch.float32, device, **tensors)
    ramped = lambda ramp: call(criterion, inputs, kd_ramp=ramp, nd_ramp=1 - ramp)  # noqa: E731
    compiled = torch.compile(ramped, fullgraph=True, backend=backend)
    losses = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.0, 0.5):
            criterion.nd_weight.fill_(value + 1)
            ramp = torch.tensor(value, device=device)
            fast, slow = compiled(ramp), ramped(ramp)
            torch.testing.assert_close(tuple(fast), tuple(slow))
            torch.testing.assert_close(
                gradients_of(fast, criterion, inputs),
                gradients_of(slow, criterion, inputs),
                rtol=1e-4,
                atol=1e-5,
            )
            losses.add(slow.loss.item())
    assert len(losses) == 2


def test_compile_under_autocast(device, generator):
    torch._dynamo.reset()
    inputs = bring(draw(generator), torch.float32, device)
    criterion = make(inputs["means"], torch.float32, device)

    def step(ramp):
        with torch.autocast(device, dtype=torch.bfloat16):
            return call(criterion, inputs, kd_ramp=ramp)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ramp in (0.0, 0.5):
        torch.testing.assert_close(tuple(compiled(ramp)), tuple(step(ramp)), rtol=0.02, atol=0.01)


@pytest.mark.cuda
def test_cuda_graph(generator):
    """Captured once without synchronising; the ramp changes between replays."""
    inputs = bring(draw(generator), torch.float32, "cuda")
    criterion = make(inputs["means"], torch.float32, "cuda", nd_weight=torch.tensor(1.5))
    ramp = torch.ones((), device="cuda")

    def step():
        terms = call(criterion, inputs, kd_ramp=ramp)
        return (*terms, *gradients_of(terms, criterion, inputs))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        for value in (0.0, 0.5):
            ramp.fill_(value)
            graph.replay()
            results = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(captured, results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- models ---------------------------------------------------------------------------------------

# Channels and map sizes of the published table's pairs, written down from their networks.
MODELS = {
    "cifar_resnet56": ([16, 32, 64, 64], [32, 16, 8, 1]),
    "cifar_resnet8x4": ([64, 128, 256, 256], [32, 16, 8, 1]),
    "cifar_wrn_40_1": ([16, 32, 64, 64], [32, 16, 8, 1]),
    "cifar_mobilenetv2": ([12, 16, 48, 160, 1280], [16, 8, 4, 2, 1]),
    "cifar_resnet50": ([256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1]),
    "cifar_shufflenetv1": ([240, 480, 960, 960], [16, 8, 4, 1]),
    "cifar_shufflenetv2": ([116, 232, 464, 1024], [16, 8, 4, 1]),
}


@pytest.mark.parametrize("name", MODELS)
def test_stage_maps(name, generator):
    """The lists, and that the maps have them; the logits are the model's."""
    channels, sizes = MODELS[name]
    model = create_model(name).eval()
    assert stage_channels(model) == channels
    images = torch.randn(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        before, after = (
            dnkd_ext.stage_maps(model, images, pre_activation=pre) for pre in (True, False)
        )
        torch.testing.assert_close(after.logits, model(images))
    for maps in (before.maps, after.maps):
        assert [list(one.shape) for one in maps] == [
            [1, c, size, size] for c, size in zip(channels, sizes, strict=True)
        ]
    assert torch.equal(after.maps[-1][..., 0, 0], after.features)
    if "mobilenet" not in name:  # whose stages end without an activation
        assert before.maps[0].min() < 0
    assert torch.equal(dnkd_ext.stage_maps(model, images).maps[0].detach(), after.maps[0])


@pytest.mark.parametrize(
    ("teacher", "student", "middle"),
    [("wrn_40_2", "wrn_40_1", 64), ("resnet50", "mobilenetv2", 512)],
)
def test_from_models_trains(teacher, student, middle, generator):
    """Both models and the criterion in one step; the loss falls on one batch."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    target = torch.arange(4)
    teacher = create_model(f"cifar_{teacher}").eval()
    student = create_model(f"cifar_{student}")
    width, own = teacher.num_features, student.num_features
    means = torch.randn(100, width, generator=generator)
    criterion = dnkd_ext.ReviewKDPlusPlus.from_models(student, teacher, means, kd_weight=2.0)
    assert criterion.fusion.mid_channels == middle
    assert criterion.kd_weight == 2.0
    projector = dnkd_ext.FeatureProjector(own, width, dropout=0.0)
    modules = nn.ModuleList([student, projector, criterion])
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.02)
    with torch.no_grad():
        wanted = dnkd_ext.stage_maps(teacher, images, pre_activation=True)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        got = dnkd_ext.stage_maps(student, images)
        terms = criterion(
            got.maps,
            wanted.maps,
            got.logits,
            projector(got.features),
            target,
            teacher_features=wanted.features,
        )
        terms.loss.backward()
        assert all(p.grad is not None for p in modules.parameters())
        optimizer.step()
        losses.append(terms.kd.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "channels", "sizes"),
    [
        ("resnet18", [64, 128, 256, 512, 512], [16, 8, 4, 2, 1]),
        ("mobilenetv1_100", [128, 256, 512, 1024, 1024], [16, 8, 4, 2, 1]),
        ("convnext_atto", [40, 80, 160, 320, 320], [16, 8, 4, 2, 1]),
        ("mobilenetv3_small_100", [16, 24, 48, 576, 1024], [16, 8, 4, 2, 1]),
    ],
)
def test_models_of_timm(name, channels, sizes, generator):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64, generator=generator)
    assert stage_channels(model) == channels
    with torch.no_grad():
        result = dnkd_ext.stage_maps(model, images)
        features, logits = dnkd_ext.features(model, images)
    assert [list(one.shape) for one in result.maps] == [
        [2, c, size, size] for c, size in zip(channels, sizes, strict=True)
    ]
    torch.testing.assert_close(result.features, features)
    torch.testing.assert_close(result.logits, logits)
    criterion = dnkd_ext.ReviewKDPlusPlus.from_models(model, model, None, nd_weight=0)
    assert criterion(result.maps, result.maps, logits, None, torch.arange(2)).loss.isfinite()
    with pytest.raises(ValueError, match="maps after their activation only"):
        dnkd_ext.stage_maps(model, images, pre_activation=True)


@pytest.mark.parametrize("name", ["efficientvit_m0", "dla34"])
def test_logits_of_timms_stages_are_the_models(name, generator):
    """Of heads with a normalisation between, or a convolution as the last layer."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(1, 3, 224, 224, generator=generator)
    with torch.no_grad():
        result = dnkd_ext.stage_maps(model, images)
        torch.testing.assert_close(result.logits, model(images))
        torch.testing.assert_close(result.features, dnkd_ext.features(model, images)[0])


def test_models_of_timm_whose_stages_do_not_make_the_logits():
    timm = pytest.importorskip("timm")
    images = torch.zeros(1, 3, 64, 64)
    for name, options, match in (
        ("resnet18", {"num_classes": 0}, r"get_classifier\(\) gives Identity"),
        ("levit_128s", {"img_size": 64}, "has two heads"),
    ):
        with pytest.raises(ValueError, match=match):
            dnkd_ext.stage_maps(timm.create_model(name, **options).eval(), images)
    model = timm.create_model("resnet18", num_classes=3)
    model.aux_head = nn.Linear(1, 1)  # as VOLO's
    with pytest.raises(ValueError, match="adds the output of its aux_head"):
        dnkd_ext.stage_maps(model, images)
    # Both heads read one embedding.
    both = timm.create_model("repvit_m0_9", num_classes=3).eval()
    found = dnkd_ext.stage_maps(both, images)
    torch.testing.assert_close(found.logits, both(images))
    two = timm.create_model("deit_tiny_distilled_patch16_224")
    one = timm.create_model("deit_tiny_patch16_224")
    for pair in ((two, one), (one, two)):
        with pytest.raises(ValueError, match="VisionTransformerDistilled has two heads"):
            dnkd_ext.ReviewKDPlusPlus.from_models(*pair, None, nd_weight=0)


def test_models_that_do_not_tell():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 10))
    good = create_model("cifar_resnet8x4")
    for student, teacher in ((plain, good), (good, plain)):
        with pytest.raises(
            ValueError, match=r"Sequential does not tell.*pass student_channels= and"
        ):
            dnkd_ext.ReviewKDPlusPlus.from_models(student, teacher, None, nd_weight=0)
    with pytest.raises(ValueError, match="Sequential does not tell the maps of its stages"):
        dnkd_ext.stage_maps(plain, torch.zeros(1, 3, 32, 32))


def doubled_by_a_hook(model):
    model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def halved_by_a_hook(model):
    model.register_forward_hook(lambda _, args, output: output / 2)


def doubled_by_a_replaced_forward(model):
    forward = model.forward
    model.forward = lambda images: forward(images * 2)


def doubled_by_a_subclass(model):
    base = type(model)
    model.__class__ = type(
        "Doubles", (base,), {"forward": lambda self, images: base.forward(self, images * 2)}
    )


def doubled_by_a_call(model):
    base = type(model)
    model.__class__ = type(
        "Doubles", (base,), {"__call__": lambda self, images: base.__call__(self, images * 2)}
    )


def doubled_in_its_features(model):
    base = type(model)
    double = lambda self, images: base.forward_features(self, images * 2)  # noqa: E731
    model.__class__ = type("Doubles", (base,), {"forward_features": double})


def doubled_by_replaced_features(model):
    features = model.forward_features
    model.forward_features = lambda images: features(images * 2)


def doubled_by_a_subclass_with_a_head(model):
    base = type(model)
    doubled_by_a_subclass(model)
    type(model).forward_head = lambda self, maps, **more: base.forward_head(self, maps, **more)


SURROUND = {
    doubled_by_a_hook: "a hook on it changes what it reads",
    halved_by_a_hook: "a hook on it changes what it gives",
    doubled_by_a_replaced_forward: "its forward was replaced",
    doubled_by_replaced_features: "its forward_features was replaced",
    doubled_by_a_subclass: "its forward is not of the class that its forward_",
    doubled_by_a_subclass_with_a_head: "its forward is not of the class that its forward_",
    doubled_in_its_features: "its forward_features is not of the class that its forward_",
    doubled_by_a_call: "Doubles has a __call__ of its own",
}


@pytest.mark.parametrize("name", ["cifar_resnet8x4", "resnet10t"])
@pytest.mark.parametrize("surround", SURROUND)
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, backend="eager")])
def test_what_surrounds_a_models_stages_is_not_left_out(name, surround, wrap):
    make = create_model if name.startswith("cifar_") else pytest.importorskip("timm").create_model
    model = make(name).eval()
    surround(model)
    with pytest.raises(ValueError, match=SURROUND[surround]):
        wrap(lambda images: dnkd_ext.stage_maps(model, images))(torch.zeros(1, 3, 32, 32))


def test_a_head_of_stages_that_was_changed():
    images = torch.zeros(1, 3, 32, 32)
    model = create_model("cifar_resnet8x4").eval()
    head = model.forward_head
    model.forward_head = lambda maps, pre_logits=False: 2 * head(maps, pre_logits)
    with pytest.raises(ValueError, match="its forward_head was replaced"):
        dnkd_ext.stage_maps(model, images)
    model = create_model("cifar_resnet8x4").eval()
    model.get_classifier().register_forward_pre_hook(lambda _, args: (F.normalize(args[0]),))
    with pytest.raises(ValueError, match="its classifier has a forward pre-hook"):
        dnkd_ext.stage_maps(model, images)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, backend="eager")])
def test_a_replaced_head_of_timms_that_scales_the_logits(wrap):
    model = pytest.importorskip("timm").create_model("resnet10t").eval()
    head = model.forward_head
    model.forward_head = lambda maps, pre_logits=False: head(maps, pre_logits) * 2
    with pytest.raises(ValueError, match="did not produce the model's output"):
        wrap(lambda images: dnkd_ext.stage_maps(model, images))(torch.ones(1, 3, 32, 32))


class Scaled(CifarResNet):
    def forward_head(self, maps, pre_logits=False):
        return super().forward_head(maps, pre_logits) * (1 if pre_logits else 2)


def test_a_subclass_whose_head_scales_the_logits():
    model = Scaled(8, (16, 16, 32, 64), num_classes=5).eval()
    with pytest.raises(ValueError, match="its forward_head is not of the class that its forward_"):
        dnkd_ext.stage_maps(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["cifar_resnet8x4", "resnet10t"])
def test_hooks_that_change_nothing_see_the_call(name):
    make = create_model if name.startswith("cifar_") else pytest.importorskip("timm").create_model
    model = make(name).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.register_forward_pre_hook(lambda _, args: args)
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    model.register_forward_hook(lambda _, args, output: seen.append(output))
    model.register_forward_hook(lambda _, args, kwargs, output: output, with_kwargs=True)
    found = dnkd_ext.stage_maps(model, images)
    assert seen[0] is images
    assert seen[1] is found.logits
    torch.testing.assert_close(found.logits, model(images))


@pytest.mark.parametrize("name", ["cifar_resnet8x4", "resnet10t"])
@pytest.mark.parametrize("function", [dnkd_ext.features, dnkd_ext.stage_maps])
def test_tracers_that_stand_in_for_calls(name, function):
    """They put a call of their own in the place of torch.nn.Module's."""
    make = create_model if name.startswith("cifar_") else pytest.importorskip("timm").create_model
    model = make(name).eval()
    images = torch.randn(2, 3, 32, 32)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return function(self.model, x)[-1]

    with torch.no_grad():
        wanted = model(images)
        traced = torch.fx.experimental.proxy_tensor.make_fx(Logits())(images)
        torch.testing.assert_close(traced(images), wanted)
        for is_strict in (False, True):
            program = torch.export.export(Logits(), (images,), strict=is_strict)
            torch.testing.assert_close(program.module()(images), wanted)


def test_methods_that_fsdp_wraps_are_the_models_own():
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    class State:  # of a module that is not divided
        def _pre_forward(self, module, args, kwargs):
            return args, kwargs

        def _post_forward(self, module, args, output):
            return output

    model = create_model("cifar_resnet8x4").eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = dnkd_ext.stage_maps(model, images)
    kind = type(model)
    model.__class__ = type("Sharded", (FSDPModule, kind), {"_get_fsdp_state": lambda _: State()})
    for name in ("forward_stages", "forward_head", "forward_features"):
        register_fsdp_forward_method(model, name)
        assert name in vars(model)
    torch.testing.assert_close(dnkd_ext.stage_maps(model, images).logits, wanted.logits)


def test_hooks_of_torch_surround_nothing():
    model = create_model("cifar_resnet8x4").eval()
    nn.utils.spectral_norm(model.get_classifier())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(dnkd_ext.stage_maps(model, images).logits, model(images))


def test_what_has_no_stages_is_named():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        dnkd_ext.stage_maps(None, torch.zeros(1, 3, 32, 32))
    model = torch.compile(create_model("cifar_resnet8x4"), backend="eager")
    with pytest.raises(ValueError, match=r"compile the function around stage_maps\(\) instead"):
        dnkd_ext.stage_maps(model, torch.zeros(1, 3, 32, 32))


def test_models_of_other_stages():
    models = create_model("cifar_resnet20"), create_model("cifar_mobilenetv2")
    match = r"\(CifarResNet\) have \[16, 32, 64, 64\] .*\(MobileNetV2\) \[12, 16, 48, 160, 1280\]"
    with pytest.raises(ValueError, match=match):
        dnkd_ext.ReviewKDPlusPlus.from_models(*models, None, nd_weight=0)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"student_channels": 3},
            TypeError,
            "student_channels must be a sequence of ints.*got int",
        ),
        ({"teacher_channels": "34"}, TypeError, "teacher_channels must be a sequence of ints"),
        ({"student_channels": []}, ValueError, "student_channels must have at least one stage"),
        (
            {"teacher_channels": [8, 4]},
            ValueError,
            r"teacher_channels must have one width per stage of student_channels \[5, 7, 6\], "
            r"got \[8, 4\]",
        ),
        ({"student_channels": [5, 0, 6]}, ValueError, r"student_channels\[1\] must be at least 1"),
        (
            {"teacher_channels": [5, 1.0, 6]},
            TypeError,
            r"teacher_channels\[1\] must be an int, got",
        ),
        ({"mid_channels": 0}, ValueError, "mid_channels must be at least 1, got 0"),
        ({"mid_channels": "a"}, TypeError, "mid_channels must be an int, got str"),
        ({"class_means": None}, ValueError, "class_means must be given unless nd_weight is 0"),
        ({"kd_weight": math.inf}, ValueError, "kd_weight must be finite, got inf"),
        ({"nd_weight": "1"}, TypeError, "nd_weight must be a float or a 0-dim tensor, got str"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
    ],
    ids=str,
)
def test_bad_construction(changes, error, match):
    options = {
        "class_means": torch.ones(CLASSES, WIDTH),
        "student_channels": STUDENT,
        "teacher_channels": TEACHER,
    }
    with pytest.raises(error, match=match):
        dnkd_ext.ReviewKDPlusPlus(**{**options, **changes})


def test_widths_of_numpy():
    """As they come out of tables."""
    student, teacher = list(np.array(STUDENT)), list(np.array(TEACHER))
    criterion = dnkd_ext.ReviewKDPlusPlus(
        None, student, teacher, mid_channels=student[0], nd_weight=0.0
    )
    fusion = criterion.fusion
    widths = [*fusion.student_channels, *fusion.teacher_channels, fusion.mid_channels]
    assert widths == [*STUDENT, *TEACHER, STUDENT[0]]
    widths += [m.in_channels for m in fusion.modules() if isinstance(m, nn.Conv2d)]
    assert {type(width) for width in widths} == {int}


def _stages(channels, index, replacement, rows=ROWS):
    maps = [torch.zeros(rows, c, 4, 4) for c in channels]
    maps[index] = replacement
    return maps


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"student_maps": torch.ones(ROWS, 5, 4, 4)},
            TypeError,
            "student_maps must be a sequence of tensors, one per stage, got Tensor",
        ),
        ({"teacher_maps": None}, TypeError, "teacher_maps must be a sequence of tensors.*NoneType"),
        (
            {"student_maps": [torch.ones(ROWS, 5, 4, 4)] * 2},
            ValueError,
            "student_maps must have 3 stages, the last of them the embedding, got 2",
        ),
        ({"teacher_maps": []}, ValueError, "teacher_maps must have 3 stages"),
        (
            {"student_maps": _stages(STUDENT, 1, None)},
            TypeError,
            r"student_maps\[1\] must be a torch.Tensor, got NoneType",
        ),
        (
            {"student_maps": _stages(STUDENT, 1, torch.ones(ROWS, 5, 4, 4))},
            ValueError,
            r"student_maps\[1\] must be \(N, 7, H, W\), or \(N, 7\) for an embedding, got shape "
            r"\[6, 5, 4, 4\]",
        ),
        (
            {"teacher_maps": _stages(TEACHER, 2, torch.ones(ROWS))},
            ValueError,
            r"teacher_maps\[2\] must be \(N, 9, H, W\)",
        ),
        (
            {"teacher_maps": _stages(TEACHER, 0, torch.ones(5, 8, 4, 4))},
            ValueError,
            r"teacher_maps\[0\] must have the 6 samples of student_maps\[0\], got 5",
        ),
        (
            {"student_maps": _stages(STUDENT, 0, torch.ones(ROWS, 5, 0, 4))},
            ValueError,
            r"student_maps\[0\] has no pixels, its shape is \[6, 5, 0, 4\]",
        ),
        (
            {"student_maps": _stages(STUDENT, 2, torch.ones(ROWS, 6, 1, 1).double())},
            TypeError,
            r"student_maps\[2\] is torch.float64 but the fusion blocks are torch.float32.*autocast",
        ),
        (
            {"teacher_maps": _stages(TEACHER, 2, torch.ones(ROWS, 9, 1, 1).long())},
            TypeError,
            r"teacher_maps\[2\] must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"teacher_maps": _stages(TEACHER, 2, torch.ones(ROWS, 9, 1, 1, device="meta"))},
            RuntimeError,
            r"teacher_maps\[2\] is on meta but the criterion is on cpu",
        ),
        ({"student_features": None}, ValueError, "student_features must be given unless nd_weight"),
        (
            {"student_features": torch.ones(ROWS, 7)},
            ValueError,
            r"class_means is 24 wide but student_features is 7 wide.*FeatureProjector\(7, 24\)",
        ),
        ({"student_logits": None}, TypeError, "student_logits must be a torch.Tensor"),
        (
            {"student_logits": torch.ones(ROWS, 9)},
            ValueError,
            "class_means has 10 classes but student_logits has 9",
        ),
        ({"target": torch.full((ROWS,), 10)}, IndexError, r"target\[0\] = 10 is out of range"),
        ({"target": torch.ones(5).long()}, ValueError, "target of class indices must have the"),
        ({"kd_ramp": math.nan}, ValueError, "kd_ramp must be finite, got nan"),
        ({"kd_ramp": torch.ones(2)}, ValueError, "kd_ramp must be a float or a 0-dim tensor, got"),
        ({"nd_ramp": math.nan}, ValueError, "nd_ramp must be finite, got nan"),
        ({"nd_ramp": "1"}, TypeError, "nd_ramp must be a float or a 0-dim tensor, got str"),
    ],
    ids=str,
)
def test_bad_input(changes, error, match, generator):
    inputs = bring(draw(generator), torch.float32)
    criterion = make(inputs["means"], torch.float32)
    call(criterion, inputs)  # good before it is spoilt
    with pytest.raises(error, match=match):
        call(criterion, inputs, **changes)


def test_blocks_alone(generator):
    """Both are public for other losses: shapes, and no attention at the deepest stage."""
    block = FusionBlock(4, 3, 5, fuse=True)
    maps = torch.randn(2, 4, 6, 6, generator=generator)
    result, carried = block(maps, torch.randn(2, 3, 3, 3, generator=generator), (12, 12))
    assert result.shape == (2, 5, 12, 12)
    assert carried.shape == (2, 3, 12, 12)
    fusion = ReviewFusion(STUDENT, TEACHER)
    assert [one.attention is None for one in fusion.blocks] == [False, False, True]
    assert "mid_channels=6" in repr(fusion)


def test_blocks_made_on_the_meta_device_get_the_same_initial_weights():
    """As FSDP2 wants models: without memory first, then reset_parameters() of every module."""
    torch.manual_seed(0)
    made = ReviewFusion((8, 16), (24, 32))
    with torch.device("meta"):
        later = ReviewFusion((8, 16), (24, 32))
    later.to_empty(device="cpu")
    for module in later.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for fusion in (made, later):
        for block in fusion.blocks:
            for layer in (block.reduce[0], block.expand[0]):
                assert layer.bias is None
                # Uniform with a variance of 1 / fan-in.
                bound = (3 / layer.weight[0].numel()) ** 0.5
                assert 0.9 * bound < layer.weight.abs().max() <= bound
