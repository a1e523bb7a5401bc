"""pytest-benchmark entry points: ours at every size, with the ladder of peers beside it.

``pytest benchmarks --benchmark-only`` times ours with pytest-benchmark, whose
``--benchmark-compare`` finds regressions, and all peers in turn, from which the closing table is
made.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import cpu_cases, cuda_cases
from benchmarks.harness import warm_allocator


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("device")
    cases = cpu_cases() if device == "cpu" else cuda_cases()
    if metafunc.function is test_loss_with_a_warm_allocator:
        cases = [case for case in cases if device == "cpu" and case.large]
    metafunc.parametrize("case", cases, ids=lambda case: case.name)


def test_loss(case, benchmark, ladder):
    """With the allocator as it is by default."""
    if case.device == "cuda":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("torch.cuda.is_available() is False")
    medians = ladder(case, warm=False)
    benchmark.extra_info.update(case=case.name, bytes=case.bytes, ladder_us=medians)
    run = case.peers(only={"ours"})["ours"]
    rounds = max(3, min(50, int(5e5 / medians["ours"])))
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=1)
    assert medians["ours"] > 0


def test_loss_with_a_warm_allocator(case, benchmark, ladder):
    """Last of all: what keeps the memory changes the allocator for the rest of the process."""
    medians = ladder(case, warm=True)
    benchmark.extra_info.update(case=case.name, bytes=case.bytes, ladder_us=medians)
    with warm_allocator():
        benchmark.pedantic(case.peers(only={"ours"})["ours"], rounds=5, warmup_rounds=1)
    assert medians["ours"] > 0
