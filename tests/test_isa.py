"""bfloat16 is rounded alike by the instruction of AVX-512 and by integers."""

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


@pytest.mark.skipif(
    "avx512_bf16" not in (dnkd_ext.build_info()["cpu_isas"] or ()),
    reason="this CPU or build has no instruction that rounds to bfloat16",
)
def test_both_ways_of_rounding_are_equal(tmp_path):
    results = []
    for isa in ("avx512", "avx512_bf16"):
        path = tmp_path / isa
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)],
            env={**os.environ, "DNKD_CPU_ISA": isa},
            check=True,
        )
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
