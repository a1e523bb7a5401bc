"""What depends on the instruction set: each that this CPU has computes the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import dnkd_ext

PROGRAM = """
import sys, torch, dnkd_ext
g = torch.Generator().manual_seed(0)
gradients = []
for scale in (1e-3, 1.0, 1e4, 1e38):
    for width in (7, 64, 1000):
        logits, teacher, means = (
            (scale * torch.randn(40, width, generator=g)).bfloat16() for _ in range(3)
        )
        logits[3, 2], teacher[5, 1], logits[7] = torch.nan, -torch.nan, torch.inf
        target = torch.arange(40) % width
        for loss_of in (
            lambda x: dnkd_ext.ce_kd_loss(x, teacher, target).loss,
            lambda x: dnkd_ext.ce_dkd_loss(x, teacher, target, reduction="none").loss.sum(),
            lambda x: dnkd_ext.nd_loss(x, target, means[:width], teacher_features=teacher),
        ):
            # Without the rows of NaN, too, which make a mean all NaN.
            for rows in (slice(None), slice(8, None)):
                leaf = logits.clone()
                if rows != slice(None):
                    leaf[:8] = 0
                    teacher[:8] = 0
                leaf.requires_grad_()
                gradients.append(torch.autograd.grad(loss_of(leaf), leaf)[0].view(torch.int16))
torch.save(gradients, sys.argv[1])
"""

ISAS = dnkd_ext.build_info()["cpu_isas"] or ()


def run(program: str, isa: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program with the kernels of one instruction set."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "DNKD_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


NAN = """
import torch, dnkd_ext

torch.manual_seed(0)
for bits in (0x7FFFFFFF, -1, 0x7FFF8000, 0x7F800001, 0x7FC00000):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    for columns in (5, 64, 100):
        student = torch.randn(6, columns).bfloat16().requires_grad_()
        sound, means, target = torch.randn(6, columns), torch.randn(6, columns), torch.arange(6)
        target = target % columns
        norms = torch.ones(6)
        teacher, faulty = sound.clone(), means.clone()
        for wide in (teacher, faulty):
            wide.view(torch.int32)[2, 3] = bits
        row, every = [0, 0, columns, 0, 0, 0], [columns] * 6
        rows, total = dict(reduction="none"), dict(reduction="sum")
        for name, loss, upstream, expected in (
            ("kd", dnkd_ext.kd_loss(student, teacher, **total), None, row),
            ("ce_kd", dnkd_ext.ce_kd_loss(student, teacher, target, **total).loss, None, row),
            ("ce_dkd", dnkd_ext.ce_dkd_loss(student, teacher, target).loss, None, row),
            ("rows", dnkd_ext.ce_kd_loss(student, teacher, target, **rows).loss.sum(), None, row),
            ("up", dnkd_ext.ce_kd_loss(student, sound, target).loss, nan, every),
            ("dist", dnkd_ext.dist_loss(student, teacher), None, every),
            ("dist up", dnkd_ext.dist_loss(student, sound), nan, every),
            ("nd", dnkd_ext.nd_loss(student, target, faulty, teacher_norms=norms), None, row),
            ("nd weight",
             dnkd_ext.nd_loss(student, target, means, teacher_norms=norms, loss_weight=nan),
             None, every),
            ("nd up", dnkd_ext.nd_loss(student, target, means, teacher_norms=norms, **rows),
             nan.expand(6), every),
        ):
            (gradient,) = torch.autograd.grad(loss, student, upstream)
            found = gradient.isnan().sum(1).tolist()
            assert found == expected, (name, hex(bits), columns, found)
    # A student that allows the label alone, where NCKD has nothing to compare.
    student = torch.full((1, 64), -torch.inf).bfloat16()
    student[0, 7] = 0
    student.requires_grad_()
    teacher = torch.zeros(1, 64)
    teacher.view(torch.int32)[0, 50] = bits
    loss = dnkd_ext.ce_dkd_loss(student, teacher, torch.tensor([7])).loss
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, [7, 50]].isnan().all(), (hex(bits), gradient)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_of_any_bits_stays_one(isa):
    """Rounded to bfloat16 as a number, one with the largest bits would become -0."""
    result = run(NAN, isa)
    assert result.returncode == 0, result.stderr


EXPONENTIALS = """
import torch, dnkd_ext

# The gradient of a cross entropy is the softmax: of all classes but one exp(-x) / (1 + 9 exp(-x)).
x = torch.cat([torch.linspace(0, 110, 200_001), torch.linspace(86, 89, 20_001)])
logits = torch.zeros(len(x), 10)
logits[:, 1:] = -x[:, None]
powers = torch.exp(-x.double())
for temperature in (1.0, 2.0, 3.0, 4.0):
    leaf = logits.clone().requires_grad_()
    target = torch.zeros(len(x), dtype=torch.int64)
    loss = dnkd_ext.ce_kd_loss(
        leaf, logits, target, temperature=temperature, kd_weight=0.0, reduction="sum"
    ).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = (powers / (1 + 9 * powers))[:, None]
    found = gradient[:, 1:].double()
    # A float's rounding of x in units of log 2, and the polynomial's; of a power its multiple.
    allowed = temperature * (5e-7 + 1.2e-7 * x.double()[:, None]) * expected
    smallest = torch.finfo(torch.float32).tiny  # below it digits go, and then the number
    error = (found - expected).abs() - allowed
    assert error.max() <= smallest * 0.75, (temperature, error.max())
    assert (error[expected[:, 0] >= smallest] <= 0).all(), temperature
    assert not found[x > 105].any() or temperature > 1  # below the half of 2^-149, too
"""


@pytest.mark.parametrize("isa", ISAS)
def test_exponentials_down_to_nothing(isa):
    result = run(EXPONENTIALS, isa)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(
    "avx512_bf16" not in ISAS,
    reason="this CPU or build has no instruction that rounds to bfloat16",
)
def test_both_ways_of_rounding_are_equal(tmp_path):
    results = []
    for isa in ("avx512", "avx512_bf16"):
        path = tmp_path / isa
        result = run(PROGRAM, isa, path)
        assert result.returncode == 0, result.stderr
        results.append(torch.load(path))
    different = distinct = 0
    for plain, instruction in zip(*results, strict=True):
        # The instruction flushes what is below the smallest normal number.
        tiny = (plain & 0x7FFF) < 0x0080
        assert torch.equal(plain[~tiny], instruction[~tiny])
        assert not (instruction[tiny] & 0x7FFF).any() or torch.equal(plain, instruction)
        different += (plain != instruction).sum().item()
        distinct += plain.unique().numel()
    assert distinct > 5000  # not all NaN or 0
    assert different <= 1e-3 * sum(gradient.numel() for gradient in results[0])
