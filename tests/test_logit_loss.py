"""What only the losses on logits have: streamed gradients, extreme logits, terms for logging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dnkd_ext


def draw(generator, rows, classes, dtype=torch.float32):
    student, teacher = (
        3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


@pytest.mark.parametrize("loss", ["ce_kd_loss", "ce_dkd_loss"])
@pytest.mark.parametrize(
    ("dtype", "classes"),
    # Rows that begin at every alignment, at some, and shorter than a vector.
    [(torch.float32, 10007), (torch.float32, 6), (torch.bfloat16, 10004), (torch.float64, 5003)],
    ids=str,
)
def test_large_gradients_equal_small_ones(loss, dtype, classes, generator):
    """Past 16 MiB gradients bypass the cache; the numbers must not change by it."""
    rows = 2 * (9 << 20) // (classes * dtype.itemsize) + 2
    student, teacher, target = draw(generator, rows, classes, dtype)
    function = getattr(dnkd_ext, loss)

    def gradient(part):
        leaf = student.detach()[part].requires_grad_()
        total = function(leaf, teacher[part], target[part], reduction="sum").loss
        return torch.autograd.grad(total, leaf)[0]

    halves = [gradient(slice(0, rows // 2)), gradient(slice(rows // 2, rows))]
    assert halves[0].nbytes < 16 << 20 <= student.nbytes
    assert torch.equal(gradient(slice(0, rows)), torch.cat(halves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_pytorch_losses(dtype, device, generator):
    """CE and KD from one kernel are F.cross_entropy and F.kl_div."""
    student, teacher, target = (x.to(device) for x in draw(generator, 37, 129, dtype))
    student = student.detach().requires_grad_()
    target[5] = -100
    for smoothing in (0.0, 0.1):
        terms = dnkd_ext.ce_kd_loss(
            student, teacher, target, temperature=3.0, ce_weight=0.5, label_smoothing=smoothing
        )
        ce = F.cross_entropy(student, target, label_smoothing=smoothing)
        kd = 9 * F.kl_div(
            F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean"
        )
        torch.testing.assert_close(terms.ce, ce.detach())
        torch.testing.assert_close(terms.kd, kd.detach())
        torch.testing.assert_close(terms.loss, 0.5 * ce + kd)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, student)[0] for loss in (terms.loss, 0.5 * ce + kd))
        )


def test_two_classes_have_no_nckd(device):
    """With one class besides the target there is nothing to distribute: exactly 0."""
    student = torch.tensor([[3.0, -1e4], [-2.0, 1e4]], device=device, requires_grad=True)
    teacher = torch.tensor([[1.0, 7.0], [0.5, -3.0]], device=device)
    target = torch.tensor([0, 0], device=device)
    loss = dnkd_ext.dkd_loss(student, teacher, target, alpha=0.0, beta=8.0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("loss", ["kd_loss", "dkd_loss"])
def test_equal_logits_cost_nothing(loss, device, generator):
    """A student with the teacher's logits has no loss and no gradient, without rounding noise."""
    _, teacher, target = draw(generator, 9, 1001)
    teacher, target = teacher.to(device), target.to(device)
    student = teacher.clone().requires_grad_()
    labels = [target] if loss == "dkd_loss" else []
    result = getattr(dnkd_ext, loss)(student, teacher, *labels)
    result.backward()
    assert abs(result.item()) <= 1e-6
    assert student.grad.abs().max() <= 1e-7


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0])
def test_power_of_the_exponential_is_the_exponential(temperature, device, generator):
    """exp(z) as exp(z / T)^T is as exact as exp(z) itself, down to where it vanishes."""
    student, teacher, target = draw(generator, 8, 300)
    student = (student.detach() * 10).to(device).requires_grad_()
    args = student, teacher.to(device), target.to(device)
    terms = dnkd_ext.ce_kd_loss(*args, temperature=temperature)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    wide = student.detach().double().requires_grad_()
    truth = dnkd_ext.reference.ce_kd_loss(
        wide, args[1].double(), args[2], temperature=temperature
    ).loss
    (right,) = torch.autograd.grad(truth, wide)
    torch.testing.assert_close(terms.loss.double(), truth.detach(), rtol=3e-6, atol=0)
    assert (gradient - right).abs().max() <= 3e-6 * right.abs().max()


def test_masked_classes(device, generator):
    """Classes at -inf in both have no probability, no part in the loss and no gradient."""
    student, teacher, target = draw(generator, 6, 50)
    target = target % 40
    with torch.no_grad():
        student[:, 40:] = -torch.inf
    teacher[:, 40:] = -torch.inf
    student, teacher, target = student.detach().to(device), teacher.to(device), target.to(device)
    student.requires_grad_()
    for name in ("ce_kd_loss", "ce_dkd_loss"):
        function = getattr(dnkd_ext, name)
        loss = function(student, teacher, target).loss
        (gradient,) = torch.autograd.grad(loss, student)
        few = student.detach()[:, :40].clone().requires_grad_()
        right = function(few, teacher[:, :40], target).loss
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(gradient[:, :40], torch.autograd.grad(right, few)[0])
        assert gradient[:, 40:].abs().max() == 0
