"""pytest-benchmark entry points: ours at every size of the registry.

``pytest benchmarks --benchmark-only --benchmark-autosave`` keeps the timings, and
``--benchmark-compare`` finds regressions. The peers are measured by ``python -m benchmarks run``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import cases


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("device")
    metafunc.parametrize("case", cases(device), ids=lambda case: case.name)


def test_loss(case, benchmark):
    """Forward and backward; the gradient is compared with the reference before."""
    if case.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    peers = case.peers(only={"ours"})
    assert not peers.refused
    run = peers.calls()["ours"]

    def measured():
        run()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(case=case.name, bytes=case.bytes)
    benchmark.pedantic(
        measured, rounds=7 if case.large else 30, iterations=1 if case.large else 20,
        warmup_rounds=1,
    )  # fmt: skip
