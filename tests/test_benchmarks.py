"""The benchmark harness: peers are checked, timed in turn, and their results kept."""

from __future__ import annotations

import csv
import time

import pytest
import torch

from benchmarks import peers, results
from benchmarks.cases import KdPlusPlusCase, LogitCase, NdCase
from benchmarks.harness import measure, warm_allocator

SMALL = NdCase(32, 16, 5)
right = peers.nd
CASES = [
    SMALL,
    LogitCase(32, 0, 10),
    LogitCase(32, 0, 10, loss="ce_dkd_loss"),
    LogitCase(32, 0, 10, loss="dist_loss"),
    KdPlusPlusCase(32, 16, 10),
]


@pytest.mark.parametrize("size", CASES, ids=lambda size: size.name)
def test_all_peers_compute_the_loss(size):
    """The other forms equal the reference, loss and gradient."""
    wanted = {"ours", "loop", "eager", "reference", "noise"} & {*size.functions(), "noise"}
    assert {"ours", "eager", "reference"} < wanted
    assert set(size.peers(only=wanted)) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, c, teacher, t: right(s, c, teacher, t) * 1.01,
        lambda s, c, teacher, t: right(s.detach(), c, teacher, t) + 0 * s.sum(),
        lambda s, c, teacher, t: right(s, c, teacher, t.flip(0)),
    ],
    ids=["another value", "no gradient", "other targets"],
)
def test_a_wrong_peer_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(peers, "nd", wrong)
    with pytest.raises(ValueError, match=r"eager (computes|gives a gradient)"):
        SMALL.peers(only={"eager"})


def test_measures_in_turn():
    """Medians tell a slow peer from a fast one, and every peer gets its blocks."""
    order = []

    def peer(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    timings = measure({"fast": peer("fast", 1e-3), "slow": peer("slow", 2e-2)}, "cpu", seconds=0.2)
    assert 0.5e-3 < timings["fast"].median < timings["slow"].median
    assert timings["slow"].median >= 2e-2
    assert all(t.low <= t.median <= t.high and t.blocks >= 3 for t in timings.values())
    first_slow, last_fast = order.index("slow"), len(order) - 1 - order[::-1].index("fast")
    assert first_slow < last_fast


def test_warm_allocator_is_undone():
    with warm_allocator() as is_warm, warm_allocator(False) as is_not:
        assert is_not is False
        torch.empty(1 << 24)
    import platform

    assert is_warm == (platform.libc_ver()[0] == "glibc")
    assert torch.empty(1 << 24).shape == (1 << 24,)


def test_rows_are_appended_and_tabulated(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = results.measure_case(SMALL, warm=False, seconds=0.02)
    assert {row["peer"] for row in rows} >= {"copy", "ours", "noise", "loop", "eager"}
    path = tmp_path / "results" / "losses.csv"
    for _ in range(2):
        results.append(rows, path)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2 * len(rows)  # one header
    assert [float(r["median_us"]) for r in read[: len(rows)]] == [r["median_us"] for r in rows]
    by_peer = {row["peer"]: row["median_us"] for row in rows}
    text = results.table(rows)
    assert f"{by_peer['eager'] / by_peer['ours']:.1f}x" in text


def test_bytes_of_a_case():
    """Both features, the gradient, and the class means that occur: once each."""
    assert SMALL.bytes == (32 + 32 + 32 + 5) * 16 * 4
    assert NdCase(4, 8, 100, torch.bfloat16).bytes == (4 + 4 + 4 + 4) * 8 * 2
    assert LogitCase(32, 0, 10).bytes == 3 * 32 * 10 * 4
    assert KdPlusPlusCase(32, 16, 10).bytes == 3 * 32 * 10 * 4 + (3 * 32 + 10) * 16 * 4
