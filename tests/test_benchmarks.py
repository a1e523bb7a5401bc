"""The benchmark harness: peers are checked, timed in turn, counted, and their results kept."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import platform
import re
import shutil
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import dnkd_ext
from benchmarks import cases, e2e, harness, peers, report, results, run, sources, steps, targets
from benchmarks.__main__ import main
from benchmarks.cases import KdPlusPlusCase, LogitCase, NdCase
from benchmarks.harness import measure, warm_allocator
from tests.benchmark_rows import rows_of

SMALL = NdCase(32, 16, 5)
right = peers.nd
CASES = [
    SMALL,
    LogitCase(32, 0, 10),
    LogitCase(32, 0, 10, loss="ce_dkd_loss"),
    LogitCase(32, 0, 10, loss="dist_loss"),
    KdPlusPlusCase(32, 16, 10),
]


@pytest.fixture
def no_compile(monkeypatch):
    """torch.compile as the identity, so that nothing waits for a compiler."""
    calls = []

    def compile(function, **options):
        calls.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(cases, "_COMPILED", {})
    return calls


# -- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", CASES, ids=lambda size: size.name)
def test_all_peers_compute_the_loss(size, no_compile):
    """The other forms equal the reference, loss and gradient."""
    own = {*size.functions()} - {"reference", "traced"}
    assert {"ours", "eager"} <= own
    found = size.peers()
    assert {*found.functions} == own | {"noise", "compile", "compiled"}
    assert not found.refused
    assert {*found.calls()} == {*found.functions}


WRONG = {
    "another value": lambda s, c, teacher, t: right(s, c, teacher, t) * 1.01,
    "no gradient": lambda s, c, teacher, t: right(s.detach(), c, teacher, t) + 0 * s.sum(),
    "other targets": lambda s, c, teacher, t: right(s, c, teacher, t.flip(0)),
    "NaN": lambda s, c, teacher, t: right(s, c, teacher, t) * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_peer_is_refused(wrong, monkeypatch):
    """By its name, and the others are not."""
    monkeypatch.setattr(peers, "nd", wrong)
    found = SMALL.peers(only={"eager", "ours"})
    assert {*found.functions} == {"ours"}
    assert found.refused["eager"].startswith(("eager computes", "eager gives a gradient"))
    assert SMALL.name in found.refused["eager"]


def test_a_peer_that_raises_is_refused_and_the_others_measured(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(peers, "nd", broken)
    found = SMALL.peers(only={"eager", "ours"})
    assert {*found.functions} == {"ours"}
    assert found.refused == {
        "eager": f"eager does not run for {SMALL.name}: RuntimeError: no such kernel"
    }


def test_what_cannot_run_here_says_why():
    assert "GPU" in peers.unavailable("liger", "cpu")
    assert "matrix multiplications" in peers.unavailable("compile-max", "cpu")
    assert peers.unavailable("compile-max", "cuda") is None
    assert all(peers.unavailable(name, "cpu") is None for name in ("ours", "compile", "copy"))


def test_liger_peer_keeps_its_input(monkeypatch):
    """Liger's cross entropy overwrites its input; the peer must not hand it the student's."""

    class CrossEntropy(torch.nn.Module):
        def forward(self, logits, target):
            loss = torch.nn.functional.cross_entropy(logits.detach().clone(), target)
            with torch.no_grad():
                logits.zero_()
            return loss + 0 * logits.sum()

    fake = SimpleNamespace(
        LigerCrossEntropyLoss=CrossEntropy,
        kl_div=SimpleNamespace(LigerKLDIVLoss=torch.nn.KLDivLoss),
    )
    for name, module in (
        ("liger_kernel", SimpleNamespace(transformers=fake)),
        ("liger_kernel.transformers", fake),
        ("liger_kernel.transformers.kl_div", fake.kl_div),
    ):
        monkeypatch.setitem(__import__("sys").modules, name, module)
    student, teacher, target = LogitCase(8, 0, 5).inputs(torch.Generator().manual_seed(0))
    kept = student.clone()
    loss = peers.liger_ce_kd()(student.requires_grad_(), teacher, target)
    assert torch.equal(student, kept)
    torch.testing.assert_close(loss, peers.ce_kd(student, teacher, target))


def test_compiled_once_per_case_with_a_code_of_its_own(no_compile):
    """Default and warm allocator share what was compiled; cases do not count against each other."""
    other = NdCase(16, 8, 5)
    for case in (SMALL, SMALL, other):
        case.peers(only={"compile"})
    assert len(no_compile) == 2
    first, second = (function for function, _ in no_compile)
    assert first.__code__ is not second.__code__
    assert all(options == {"dynamic": False} for _, options in no_compile)


def test_bytes_of_a_case():
    """Both features, the gradient, and the class means that occur: once each."""
    assert SMALL.bytes == (32 + 32 + 32 + 5) * 16 * 4
    assert NdCase(4, 8, 100, torch.bfloat16).bytes == (4 + 4 + 4 + 4) * 8 * 2
    assert LogitCase(32, 0, 10).bytes == 3 * 32 * 10 * 4
    assert LogitCase(32, 0, 10, loss="dist_loss").bytes == 5 * 32 * 10 * 4
    assert KdPlusPlusCase(32, 16, 10).bytes == 3 * 32 * 10 * 4 + (3 * 32 + 10) * 16 * 4
    assert KdPlusPlusCase(32, 16, 10).gradient_bytes == 32 * (10 + 16) * 4


def test_the_registry_covers_every_loss_on_every_device():
    for device in ("cpu", "cuda"):
        ladder = cases.cases(device)
        assert len({case.name for case in ladder}) == len(ladder)
        families = {case.family for case in ladder}
        assert families >= {"nd_loss", "ce_kd_loss", "ce_dkd_loss", "dist_loss", "KD++"}
        assert {(case.family, case.dtype) for case in ladder} == {
            (family, dtype) for family in families for dtype in (torch.float32, torch.bfloat16)
        }


def test_select_by_part_or_glob():
    ladder = cases.cases("cpu")
    assert cases.select(ladder, []) == ladder
    names = [case.name for case in cases.select(ladder, ["ND_loss 64x64", "kd++*float32 cpu"])]
    assert names == [
        "nd_loss 64x64 (100) float32 cpu",
        "KD++ 512x1000, 2048 features float32 cpu",
        "nd_loss 64x64 (100) bfloat16 cpu",
    ]
    with pytest.raises(ValueError, match=r"no case matches 'nothing'; there are\n  nd_loss 64x64"):
        cases.select(ladder, ["nothing"])


# -- timing ---------------------------------------------------------------------------------------


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
    assert all(t.low <= t.median <= t.high and t.blocks >= 7 for t in timings.values())
    assert timings["slow"].host == pytest.approx(timings["slow"].median, rel=0.2)
    first_slow, last_fast = order.index("slow"), len(order) - 1 - order[::-1].index("fast")
    assert first_slow < last_fast


def test_host_time_ends_before_the_device(monkeypatch):
    """What a GPU does after the call returned counts in the median alone."""
    work = []

    def synchronise(device):
        time.sleep(5e-3 * len(work))
        work.clear()

    monkeypatch.setattr(harness, "synchronise", synchronise)
    timing = measure({"queued": lambda: work.append(1)}, "cuda", seconds=0.1)["queued"]
    assert timing.median > 4e-3
    assert timing.host < timing.median / 4


def test_warm_allocator_is_undone():
    with warm_allocator() as is_warm, warm_allocator(False) as is_not:
        assert is_not is False
        torch.empty(1 << 24)
    assert is_warm == (platform.libc_ver()[0] == "glibc")
    assert torch.empty(1 << 24).shape == (1 << 24,)


# -- what is counted beside the time --------------------------------------------------------------


def test_peak_memory_of_a_call():
    """Two buffers live at once, the third after they are gone."""

    def run():
        a, b = torch.empty(1 << 20), torch.empty(1 << 19)
        del a, b
        torch.empty(1 << 20)

    assert harness.probe(run, "cpu").peak_bytes == 4 * ((1 << 20) + (1 << 19))
    assert harness.running_peak([(3, -8), (1, 8), (2, 16), (4, 4)]) == 24
    assert harness.running_peak([]) == 0


@pytest.mark.skipif(
    not dnkd_ext.build_info()["loaded"],
    reason="compiled library not loaded: the reference holds more",
)
def test_ours_holds_a_gradient_and_no_more():
    """The claim of the README, on a CPU: one gradient buffer and some scalars."""
    case = NdCase(256, 512, 10)
    found = case.peers(only={"ours", "eager"})
    peak = {
        name: harness.probe(found.probe_call(name, backward=True), "cpu").peak_bytes
        for name in found.functions
    }
    assert case.gradient_bytes <= peak["ours"] < case.gradient_bytes + 64 * case.rows + 4096
    assert peak["eager"] > 2 * case.gradient_bytes


def event(name, begin, length=1, device="CPU", annotation=False):
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: begin,
        duration_ns=lambda: length,
        device_type=lambda: SimpleNamespace(name=device),
        is_user_annotation=lambda: annotation,
    )


def test_launches_and_waits_of_a_profile():
    """Only what happened within the marked range, kernels by name, no marks of compiled code."""
    kernel = "void dnkd::(anonymous namespace)::nd_loss_forward_kernel<float, 4>(dnkd::Params)"
    events = [
        event("cudaStreamSynchronize", 5),
        event(kernel, 8, device="CUDA"),
        event("the call", 10, 100),
        event("the call", 12, 90, device="CUDA", annotation=True),
        event("Torch-Compiled Region", 13, 80, device="CUDA", annotation=True),
        event("cudaLaunchKernel", 14),
        event(kernel, 20, 3000, device="CUDA"),
        event(kernel, 40, 1000, device="CUDA"),
        event("Memset (Device)", 60, 500, device="CUDA"),
        event("cudaMemcpyAsync", 70),
        event("cudaStreamSynchronize", 71),
        event("cudaDeviceSynchronize", 80),
    ]
    launches, waits, kernels = harness.activity(events, "the call")
    assert (launches, waits) == (3, 2)
    assert kernels == pytest.approx({"nd_loss_forward_kernel": 4e-6, "Memset": 5e-7})
    with pytest.raises(RuntimeError, match="0 ranges called 'another'"):
        harness.activity(events, "another")


def test_kernel_names_fit_into_a_cell():
    assert harness.kernel_name("triton_poi_fused_0") == "triton_poi_fused_0"
    assert harness.kernel_name("void at::native::vectorized_kernel<4, F<int> >(int)") == (
        "vectorized_kernel"
    )
    assert not {*";:"} & {*harness.kernel_name("Memcpy DtoD (Device -> Device); a:b")}


# -- results --------------------------------------------------------------------------------------


def test_rows_are_appended_and_read_again(tmp_path, no_compile):
    rows, refused = results.measure_case(SMALL, warm=False, seconds=0.02)
    assert not refused
    both = {row["peer"] for row in rows if row["pass"] == results.BOTH}
    assert both == {"copy", "ours", "noise", "module", "compiled", "loop", "eager", "compile"}
    forward = [row for row in rows if row["pass"] == results.FORWARD]
    assert {row["peer"] for row in forward} == {"ours", "eager", "compile"}
    path = tmp_path / "results" / "losses.csv"
    for _ in range(2):
        results.append(rows, path)
    read = results.read(path)
    assert len(read) == 2 * len(rows)  # one header
    assert [r["median_us"] for r in read[: len(rows)]] == [r["median_us"] for r in rows]
    first, second = results.measurements(read)
    assert first.rows.keys() == second.rows.keys()
    assert first.value("peak_bytes") >= SMALL.gradient_bytes
    assert first.value("peak_bytes", "copy") is None
    assert first.value("host_us") is None  # a call on a CPU returns when its work is done
    assert f"{first.us('eager') / first.us('ours'):.1f}x" in results.table(rows)
    assert results.latest([first, second]) == {
        first.machine: {(SMALL.name, "default"): second},
    }


def test_a_loss_that_came_later_takes_no_verdict_from_recorded_runs():
    rows = results.read(results.RESULTS / "losses.csv")
    ladders = results.latest(results.measurements(rows))
    machine = next(m for m in ladders if m[1] == "cpu" and m[2] == "2.13.0+cpu")
    found = results.versions(ladders[machine])[0]
    date = next(iter(found.values())).common["date"]
    first = targets.first_measured(rows)
    assert first["nd_loss"] == min(row["date"] for row in rows if "nd_loss" in row["case"])

    def of(ladder, text, since):
        (verdict,) = (
            one for one in targets.evaluate(ladder, "cpu", since) if one.text.startswith(text)
        )
        return verdict

    assert targets.evaluate(found, "cpu", first) == targets.evaluate(found, "cpu")
    memory, kdpp = "peak extra memory", "KD++ at 512x1000 with 2048 features: at least 6x"
    assert of(found, memory, first).status == targets.PASS
    without = {key: one for key, one in found.items() if not key[0].startswith("dist_loss")}
    # Others had measured it by then: this run is a part of a ladder.
    assert of(without, memory, first).status == targets.NOT_MEASURED
    assert of(without, memory, None).status == targets.NOT_MEASURED
    for since in ({**first, "dist_loss": "9998-01-01"}, {**first, "dist_loss": date}):
        verdict = of(without, memory, since)
        came_later = since["dist_loss"] > date
        assert verdict.status == (targets.PASS if came_later else targets.NOT_MEASURED)
        assert verdict.where.endswith("without dist_loss") is came_later
    never = {family: when for family, when in first.items() if family != "dist_loss"}
    assert of(without, memory, never).status == targets.PASS
    # Of what is named nothing is left out.
    without = {key: one for key, one in found.items() if not key[0].startswith("KD++")}
    assert of(without, kdpp, {**first, "KD++": "9998-01-01"}).status == targets.NOT_MEASURED


def test_sixteen_bits_take_turns_with_float32(monkeypatch):
    """So that their ratio is of one run; rows without it are no measurement of the target."""

    def refusing(case, name, *_):
        if case.dtype == torch.float32:
            raise cases.WrongPeer(f"{name} is wrong")

    (target,) = (t for t in targets.targets("cpu") if t.text.startswith("bfloat16 within 5%"))
    case = NdCase(64, 64, 100, dtype=torch.bfloat16)
    assert (case.name, "default") in target.cases
    rows, refused = results.measure_case(case, warm=False, seconds=0.02, only=("ours", "float32"))
    assert not refused
    assert [row["peer"] for row in rows if row["pass"] == results.BOTH] == [
        "copy", "ours", "float32",
    ]  # fmt: skip
    found = {(case.name, "default"): results.measurements(rows)[0]}
    one = dataclasses.replace(target, cases=((case.name, "default"),))
    us = {row["peer"]: row["median_us"] for row in rows if row["pass"] == results.BOTH}
    assert one.evaluate(found).figure == f"{us['ours'] / us['float32']:.2f}x"
    without = results.measurements([row for row in rows if row["peer"] != "float32"])[0]
    assert one.evaluate({(case.name, "default"): without}).status == targets.NOT_MEASURED
    wrong = dataclasses.replace(case, rows=32)
    monkeypatch.setattr(NdCase, "_check", refusing)
    rows, refused = results.measure_case(wrong, warm=False, seconds=0.02, only=("ours", "float32"))
    assert "float32" not in {row["peer"] for row in rows}
    assert refused["float32"] == "ours is wrong"
    monkeypatch.undo()
    rows, _ = results.measure_case(SMALL, warm=False, seconds=0.02, only=("ours", "float32"))
    assert "float32" not in {row["peer"] for row in rows}


def test_what_a_gpu_adds_to_a_row(monkeypatch):
    """Launches, waits, time on the device per kernel, and whether a CUDA graph captures ours."""
    asked = []

    def probe_call(name, *, backward):
        asked.append((name, backward))
        return lambda: None

    found = SimpleNamespace(probe_call=probe_call)
    counted = harness.Probe(1024, 3, 0, {"rows_kernel": 2e-6, "scale_kernel": 5e-7})
    monkeypatch.setattr(results, "probe", lambda run, device: counted)
    monkeypatch.setattr(results, "capturable", lambda run: True)
    case = SimpleNamespace(device="cuda")
    both = results._counted(case, found, {"peer": "ours", "pass": results.BOTH})
    assert both == {
        "peak_bytes": 1024, "launches": 3, "syncs": 0, "device_us": 2.5, "graph": "yes",
        "device_kernels": "rows_kernel:2.00;scale_kernel:0.50",
    }  # fmt: skip
    forward = results._counted(case, found, {"peer": "ours", "pass": results.FORWARD})
    assert "graph" not in forward
    assert "graph" not in results._counted(case, found, {"peer": "eager", "pass": results.BOTH})
    assert asked == [("ours", True), ("ours", False), ("eager", True)]


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("date,commit\n2026-01-01,abc\n")
    with pytest.raises(results.ResultsError, match=r"other columns: missing \['hardware'"):
        results.append([dict.fromkeys(results.FIELDS, "1")], path)
    assert path.read_text() == "date,commit\n2026-01-01,abc\n"


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "losses.csv"
    results.append([dict.fromkeys(results.FIELDS, "1")], path)
    path.write_text(path.read_text() + "1,2\n")
    with pytest.raises(results.ResultsError, match=r"line 3: not \d+ cells"):
        results.read(path)
    path.write_text(path.read_text()[:-1])
    with pytest.raises(results.ResultsError, match="does not end with a whole line"):
        results.append([dict.fromkeys(results.FIELDS, "1")], path)
    path.unlink()
    results.append([{**dict.fromkeys(results.FIELDS, "1"), "median_us": "fast"}], path)
    with pytest.raises(results.ResultsError, match="line 2: median_us is 'fast'"):
        results.read(path)


def test_a_file_that_stops_within_its_last_cell_is_not_read(tmp_path):
    """Which would be another number."""
    path, whole = tmp_path / "losses.csv", dict.fromkeys(results.FIELDS, "123")
    results.append([whole], path)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(results.ResultsError, match="does not end with a whole line"):
        results.read(path)


def test_damaged_rows_are_not_added_to_the_recorded_ones(tmp_path):
    source, path = tmp_path / "losses.csv", tmp_path / "recorded.csv"
    recorded = dataclasses.replace(results.LOSSES, path=path)
    for number, damaged in enumerate(("1,2\n", "1" + ",1" * len(results.FIELDS) + "\n", "1,")):
        results.append([dict.fromkeys(results.FIELDS, str(number))], source)
        whole = source.read_text()
        source.write_text(whole + damaged)
        with pytest.raises(results.ResultsError):
            recorded.add_file(source)
        source.write_text(whole)
    assert not path.exists()
    assert recorded.add_file(source) == 3


def test_what_gets_slower_than_planned_ends_all_the_same():
    """A machine that others take: 0.05 s were asked for, and 200 rounds of 20 calls planned."""
    made = 0

    def run():
        nonlocal made
        made += 1
        if made > 3:
            time.sleep(0.003)

    found = measure({"a": run}, "cpu", seconds=0.05)
    assert found["a"].blocks == harness.LEAST_BLOCKS
    quick = measure({"a": lambda: None}, "cpu", seconds=0.05)
    assert quick["a"].blocks > harness.LEAST_BLOCKS


def test_the_share_of_the_cores_is_one(monkeypatch):
    """By the time of the process, of which half a core of two is a quarter."""
    monkeypatch.undo()
    assert 0 < harness.cpu_share(0.05) < 1.2
    now, cores = 0.0, torch.get_num_threads()

    def passed():
        nonlocal now
        now += 1e-3
        return now

    monkeypatch.setattr(time, "perf_counter", passed)
    monkeypatch.setattr(time, "process_time", lambda: cores * now / 4)
    assert harness.cpu_share(0.05) == pytest.approx(0.25, rel=0.1)


def test_an_empty_file_may_be_added_to(tmp_path):
    path = tmp_path / "losses.csv"
    path.touch()
    results.LOSSES.require_addable(path)
    with pytest.raises(results.ResultsError, match=r"losses\.csv is empty"):
        results.read(path)  # nothing says that it is a results file
    results.append([dict.fromkeys(results.FIELDS, "1")], path)
    assert len(results.read(path)) == 1


def test_an_empty_file_may_be_gone_on_with(tmp_path):
    """As the first rows leave it where the disk was full."""
    path = tmp_path / "losses.csv"
    path.touch()
    order = run.plan("cpu", patterns=["nd_loss 64x64"])
    assert run.remaining(order, path, "cpu", None) == order != []
    assert e2e.measured(path, "cpu") == set()
    training = pytest.importorskip("benchmarks.training", reason="training is not installed")
    assert training.measured(path, "cpu") == set()


def test_a_link_to_a_file_stays_one(tmp_path):
    link, path = tmp_path / "link.csv", tmp_path / "losses.csv"
    link.symlink_to(path)
    results.LOSSES.require_addable(link)
    results.append([dict.fromkeys(results.FIELDS, "1")], link)
    assert link.is_symlink()
    assert len(results.read(path)) == 1


def test_the_recorded_results_can_be_read():
    rows = results.read(results.RESULTS / "losses.csv")
    assert rows
    assert all(row["pass"] in (results.BOTH, results.FORWARD) for row in rows)
    assert all(row["median_us"] > 0 for row in rows)


def test_the_commit_is_that_of_these_sources_alone(tmp_path, monkeypatch):
    """With a mark where they differ, and not that of a repository around them."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    named = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")

    def run(*words, cwd):
        subprocess.run([git, *named, *words], cwd=cwd, check=True, capture_output=True)

    root = tmp_path / "around" / "package"
    (root / "benchmarks" / "results").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "benchmarks/run.py", "benchmarks/README.md"):
        (root / name).write_text("1\n")
    monkeypatch.setattr(sources, "ROOT", root)
    assert sources.commit() == f"files-{sources.source_hash()}"
    (root.parent / ".gitignore").write_text("package\n")
    run("init", cwd=root.parent)
    run("add", ".gitignore", cwd=root.parent)
    run("commit", "-m", "around", cwd=root.parent)
    assert sources.commit() == f"files-{sources.source_hash()}"
    run("init", cwd=root)
    assert sources.commit() == f"files-{sources.source_hash()}"  # without a commit yet
    run("add", ".", cwd=root)
    run("commit", "-m", "own", cwd=root)
    clean = sources.commit()
    assert re.fullmatch("[0-9a-f]{10}", clean)
    for name in ("benchmarks/README.md", "benchmarks/results/losses.csv", "notes.txt"):
        (root / name).write_text("2\n")
    assert sources.commit() == clean
    marked = set()
    (root / "dnkd_ext/train/recipes").mkdir(parents=True)
    for name in ("benchmarks/new.py", "setup.py", "dnkd_ext/train/recipes/new.yaml"):
        (root / name).write_text("2\n")
        assert sources.commit() == f"{clean}+{sources.source_hash()}"
        marked.add(sources.commit())
    assert len(marked) == 3


def test_a_library_of_something_else_is_none_to_measure(tmp_path, monkeypatch):
    for name in ("csrc/ops/loss.cpp", "csrc/common/rows.cuh", "setup.py", "csrc/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    package = tmp_path / "package"
    package.mkdir()

    def obstacle(device="cpu", torch="2.11.0"):
        return sources.library_obstacle(package, device, torch)

    def built(**record):
        record = {"sources": sources.library_hash(), "torch": "2.11.0", "cuda": None, **record}
        (package / "_build.json").write_text(json.dumps(record))

    assert "no compiled library" in obstacle()
    (package / "_build.json").write_text("[]")
    assert "no compiled library" in obstacle()
    (package / "_build.json").write_text('{"torch": "2.11.0"}')
    assert "of other sources" in obstacle()
    for name in ("csrc/common/rows.cuh", "setup.py"):
        built()
        assert obstacle() is None
        (tmp_path / "csrc/notes.txt").write_text("2\n")
        assert obstacle() is None
        (tmp_path / name).write_text("2\n")
        assert "build it anew: python setup.py" in obstacle()
    built()
    assert "is for torch 2.11.0, here is 2.12.0" in obstacle(torch="2.12.0")
    assert "has no CUDA kernels" in obstacle("cuda")
    built(cuda="13.0", architectures="8.0;9.0+PTX")
    assert obstacle("cuda") is None
    for capability, fits in (((9, 0), True), ((8, 6), True), ((7, 5), False), ((10, 0), False)):
        found = sources.library_obstacle(package, "cuda", "2.11.0", capability)
        assert (found is None) == fits
        assert fits or f"here is {capability[0]}.{capability[1]}" in found
    built(cuda="13.0", architectures="8.0+PTX")  # of which the driver would make something else
    found = sources.library_obstacle(package, "cuda", "2.11.0", (9, 0))
    assert "is for GPUs of 8.0+PTX, here is 9.0" in found


def test_peers_follow_each_other_in_changing_order():
    """Who comes behind the copy, or behind a compiled peer, is slower for it."""
    order = []
    peers = {name: lambda name=name: order.append(name) for name in "abcd"}
    measure(peers, "cpu", seconds=0.01, calls=1)
    behind = {name: set() for name in peers}
    for first, second in itertools.pairwise(order[40:]):
        if first != second:
            behind[second].add(first)
    assert all(len(found) == 3 for found in behind.values())


def test_a_peer_that_takes_long_takes_the_first_call_from_no_other():
    calls = Counter()

    def slow():
        calls["slow"] += 1
        time.sleep(0.02)

    def quick():
        calls["quick"] += 1

    found = measure({"slow": slow, "quick": quick}, "cpu", seconds=0.05, calls=4)
    assert calls["slow"] == 3 + found["slow"].blocks  # alone: the first, and two to plan by
    assert calls["quick"] == 3 + 5 * found["quick"].blocks  # a call to get going, and four


def test_noise_counts_quantiles_and_ours_timed_twice():
    def row(peer, low, middle, high):
        return {"median_us": middle, "low_us": low, "high_us": high, "peer": peer}

    one = results.Measurement({})
    one.rows = {(results.BOTH, "ours"): row("ours", 97.0, 100.0, 103.0)}
    assert one.noise() == pytest.approx(0.03)
    one.rows[results.BOTH, "noise"] = row("noise", 104.0, 104.0, 104.0)
    assert one.noise() == pytest.approx(0.05)


def test_the_largest_a_gpu_is_asked_for_come_first():
    """Should the time not suffice: the bandwidth in both dtypes, and what the host bounds."""
    order = [case.name for case, _ in run.plan("cuda")]
    last = {
        next(n for n, target in enumerate(targets.targets("cuda")) if word in target.text)
        for word in ("bandwidth", "4x eager", "2x torch.compile")
    }
    asked = {name for n in last for name, _ in targets.targets("cuda")[n].cases}
    assert {*order[: len(asked)]} == asked
    assert len(asked) < len(order)


def test_the_warm_allocator_is_left_out_where_there_is_none(monkeypatch):
    assert any(warm for _, warm in run.plan("cpu")) == harness.can_keep_memory()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not any(warm for _, warm in run.plan("cpu"))


def test_the_floor_has_the_class_means_that_occur():
    case = NdCase(512, 64, 1000)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1000, (512,), generator=generator).unique().numel() for _ in range(200)]
    mean = sum(drawn) / len(drawn)
    assert case.bytes == pytest.approx((3 * 512 + mean) * 64 * 4, rel=2e-3)
    assert NdCase(8192, 64, 81).bytes == (3 * 8192 + 81) * 64 * 4


@pytest.mark.parametrize("shape", [(256, 512, 1000), (256, 2048, 1000)])
def test_peers_of_16_and_32_bits_rotate_alike(shape):
    sets = {len(NdCase(*shape, dtype)._inputs()) for dtype in (torch.float32, torch.bfloat16)}
    assert len(sets) == 1
    assert sum(x.nbytes for x in NdCase(*shape)._inputs()[0]) * sets.pop() > cases.CACHE or (
        shape == (256, 512, 1000)  # which stay in the cache
    )


def test_a_cell_that_is_too_long_is_named(tmp_path):
    path = tmp_path / "a.csv"
    row = dict.fromkeys(results.FIELDS, "1")
    results.append([row, {**row, "device_kernels": "k" * 200_000}], path)
    with pytest.raises(results.ResultsError, match=r"a\.csv, line 3: field larger"):
        results.read(path)


def test_garbage_is_not_collected_while_a_block_is_timed():
    seen = []

    def peer():
        seen.append(gc.isenabled())
        if len(seen) > 5:
            raise KeyboardInterrupt

    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        measure({"peer": peer}, "cpu", seconds=1.0)
    assert seen[0]  # the call that compiles and allocates
    assert not any(seen[1:3])  # blocks
    assert gc.isenabled()


def test_processors_of_one_name_are_apart_by_their_instructions(tmp_path, capsys):
    """A virtual machine's processor may call itself alike with AVX2 alone and with AVX-512."""
    path = tmp_path / "a.csv"
    results.append(rows_of(("ours", 10), ("eager", 39), kernels="avx2"), path)
    results.append(rows_of(("ours", 20), ("eager", 99), kernels="avx512", commit="def"), path)
    results.append(rows_of(("ours", 10), ("eager", 90), kernels="avx512_bf16", commit="def"), path)
    found = results.known_machines(results.read(path))
    assert [machine[0] for machine in found] == ["a machine, AVX-512", "a machine, AVX2"]
    eager = [[one.us("eager") for one in group.values()] for group in found.values()]
    assert eager == [[90], [39]]
    text = report.render(results.read(path), [])
    assert text.index("### a machine, AVX-512, torch 9.9.0") < text.index(
        "### a machine, AVX2, torch"
    )
    assert main(["targets", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "a machine, AVX2, torch 9.9.0, at abc, avx2 kernels\nFAIL         ND at 64x64" in printed
    assert "PASS         ND at 64x64: at least 4x eager: 9.00x" in printed


def test_steps_of_processors_of_one_name_are_apart():
    row = {
        **dict.fromkeys(steps.STEP_FIELDS, ""), "date": "2026-01-01", "hardware": "a machine",
        "device": "cpu", "shape": "cifar",
    }  # fmt: skip
    rows = [
        {**row, "kernels": kernels, "method": method}
        for kernels, method in (("avx2", "CE"), ("avx2", "KD"), ("avx512", "KD++"), ("avx2", "KD"))
    ]
    assert steps.latest_steps(rows[:3]) == [rows[:2], rows[2:3]]
    assert steps.latest_steps(rows) == [rows[3:], rows[2:3]]
