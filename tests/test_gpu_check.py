"""gpu-check without a GPU: its plan, and stages of harmless commands that stop and go on."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dnkd_ext
from benchmarks import gpu_check, results, sanitize, sources, steps
from benchmarks.gpu_check import Item, State
from tests.benchmark_rows import gpu_rows

ROOT = Path(__file__).resolve().parents[1]


def touch(path: Path, *, code: int = 0, seconds: float = 0) -> tuple[str, ...]:
    """A command that notes that it ran, waits, and exits."""
    script = (
        f"import sys, time; open({str(path)!r}, 'a').write('x'); time.sleep({seconds}); "
        f"sys.exit({code})"
    )
    return sys.executable, "-c", script


@pytest.fixture
def state(tmp_path):
    return State(tmp_path / "state.json", {"device": "a GPU", "sources": "1"})


def ran(path: Path) -> int:
    return len(path.read_text()) if path.exists() else 0


def test_plans_every_stage_and_refuses_without_a_gpu():
    """Its plan names files and modules that exist."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", "unused"]
    planned = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    stages = {line.split(":")[0] for line in planned.stdout.splitlines()}
    assert stages == {*gpu_check.STAGES}
    assert "info --check" in planned.stdout
    assert "benchmarks run --device cuda --resume" in planned.stdout
    assert "benchmarks training --device cuda --resume --cuda-graph" in planned.stdout
    if not torch.cuda.is_available():
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 2
        assert refused.stderr.startswith("gpu-check needs a GPU")
        assert refused.stderr.count("\n") == 1
        assert not (ROOT / "unused").exists()


@pytest.mark.slow
def test_the_files_with_tests_for_a_gpu_are_those_that_pytest_finds(tmp_path):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, "-m", "cuda", "tests"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in found.stdout.splitlines() if "::" in line]
    wanted = {line.split("::")[0].removeprefix("tests/") for line in lines}
    planned = {item.name.partition(",")[0] for item in gpu_check.items("tests", tmp_path)} - {
        "self-check"
    }
    assert "test_parity.py" in wanted
    assert wanted <= planned
    # Files that want a package that is not there are not even looked into.
    whole = all(map(importlib.util.find_spec, ("tyro", "timm", "torchvision", "pycocotools")))
    assert not whole or planned == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_the_parts_of_a_file_are_all_of_it(name):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = []
    for chosen in ((), *(("-k", part) for part in gpu_check.PARTS[name])):
        done = subprocess.run(
            [*command, "-m", "cuda", f"tests/{name}", *chosen],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append([line for line in done.stdout.splitlines() if "::" in line])
    whole, *parts = found
    assert sorted(line for part in parts for line in part) == sorted(whole)
    assert all(parts)


def test_tests_for_a_gpu_that_are_not_found_fail(tmp_path, state):
    """Those of a host alone may be none."""
    module = tmp_path / "test_of_one.py"
    module.write_text("def test_of_a_host(): pass\n")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(module), "-m")
    known = {stage: gpu_check.items(stage, tmp_path)[-1].good for stage in ("tests", "host-tests")}
    for stage, word in (("tests", "FAIL"), ("host-tests", "PASS")):
        none = Item("none", (*command, "not_there"), good=known[stage])
        assert gpu_check.run_stage(stage, [none], tmp_path, state, 60) == word


def test_every_test_file_and_every_loss_under_every_tool(tmp_path):
    files = {*(ROOT / "tests").glob("test_*.py")}
    assert {item.name for item in gpu_check.items("host-tests", tmp_path)} == {
        path.name for path in files
    }
    names = [item.name for item in gpu_check.items("sanitize", tmp_path)]
    assert len(names) == len({*names})
    for tool in ("memcheck", "racecheck", "initcheck"):
        seen = []
        for name in names:
            words = name.split()
            if words[0] == tool:
                losses = [word for word in words[1:] if word in sanitize.LOSSES]
                dtypes = [word for word in words[1:] if word not in sanitize.LOSSES]
                seen += [(one, dtype) for one in losses for dtype in dtypes or sanitize.DTYPE_NAMES]
        wanted = [(one, dtype) for one in sanitize.LOSSES for dtype in sanitize.DTYPE_NAMES]
        assert sorted(seen) == sorted(wanted)
    # The dtypes have the same barriers.
    assert {name for name in names if name.startswith("synccheck")} == {
        f"synccheck {loss} float32" for loss in ("ce_kd_loss", "ce_dkd_loss", "dist_loss")
    }


def test_a_stage_goes_on_where_it_stopped(tmp_path, state):
    """Killed after the first item: only the others run again."""
    marks = [tmp_path / name for name in ("a", "b", "c")]
    planned = [Item(mark.name, touch(mark)) for mark in marks]
    assert gpu_check.run_stage("tests", planned[:1], tmp_path, state, 60) == "PASS"
    again = State(state.path, state.key)  # as another process reads it
    assert gpu_check.status(again.of("tests"), planned) == "UNFINISHED"
    assert gpu_check.run_stage("tests", planned, tmp_path, again, 60) == "PASS"
    assert [ran(mark) for mark in marks] == [1, 1, 1]
    assert "== c" in (tmp_path / "tests.log").read_text()


def test_other_sources_or_another_gpu_begin_anew(tmp_path, state):
    mark = tmp_path / "a"
    planned = [Item("a", touch(mark))]
    gpu_check.run_stage("tests", planned, tmp_path, state, 60)
    for key in ({"device": "a GPU", "sources": "2"}, {"device": "another", "sources": "1"}):
        assert gpu_check.status(State(state.path, key).of("tests"), planned) == "UNFINISHED"
    state.path.write_text("{ damaged")
    assert gpu_check.status(State(state.path, state.key).of("tests"), planned) == "UNFINISHED"


def test_what_failed_runs_again_after_what_has_not_run(tmp_path, state):
    order = tmp_path / "order"
    planned = [Item("bad", touch(order, code=3)), Item("good", touch(tmp_path / "good"))]
    assert gpu_check.run_stage("tests", planned, tmp_path, state, 60) == "FAIL"
    log = tmp_path / "tests.log"
    assert "exit status 3" in log.read_text()
    log.unlink()
    planned.append(Item("new", touch(tmp_path / "new")))
    assert gpu_check.run_stage("tests", planned, tmp_path, state, 60) == "FAIL"
    assert ran(tmp_path / "good") == 1
    text = log.read_text()
    assert text.index("== new") < text.index("== bad")


def test_the_limit_keeps_what_was_done(tmp_path, state):
    """The slow item is stopped in time, is not called a failure, and runs again."""
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    planned = [Item("quick", touch(quick)), Item("slow", touch(slow, seconds=60))]
    assert gpu_check.run_stage("tests", planned, tmp_path, state, 3) == "UNFINISHED"
    known = json.loads(state.path.read_text())["stages"]["tests"]["items"]
    assert known == {"quick": "PASS"}
    assert "the stage's time was over" in (tmp_path / "tests.log").read_text()


def test_several_at_a_time(tmp_path, state):
    """They overlap, each has its part of the log, and the limit stops them all."""
    # Each waits for the others to have begun.
    script = (
        "import pathlib, sys, time\n"
        "folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "(folder / name).touch()\n"
        "while not all((folder / other).exists() for other in 'abc'):\n"
        "    time.sleep(0.01)\n"
        "print(name, 'was here')"
    )
    begun = tmp_path / "begun"
    begun.mkdir()
    planned = [Item(name, (sys.executable, "-c", script, str(begun), name)) for name in "abc"]
    assert gpu_check.run_stage("tests", planned, tmp_path, state, 60, jobs=3) == "PASS"
    log = (tmp_path / "tests.log").read_text()
    for name in ("a", "b", "c"):
        part = log[log.index(f"== {name}") :].split("\n\n==")[0]
        assert f"{name} was here\nexit status 0" in part
    slow = [Item(name, touch(tmp_path / name, seconds=60)) for name in ("d", "e", "f")]
    assert gpu_check.run_stage("tests", slow, tmp_path, state, 3, jobs=2) == "UNFINISHED"
    assert {name: state.of("tests")["items"].get(name) for name in "adef"} == {
        "a": "PASS", "d": None, "e": None, "f": None
    }  # fmt: skip


def test_an_item_that_never_fits_is_a_failure(tmp_path, state):
    """It had the whole stage for itself; one that resumes by itself only goes on later."""
    slow = touch(tmp_path / "slow", seconds=60)
    assert gpu_check.run_stage("tests", [Item("slow", slow)], tmp_path, state, 1) == "FAIL"
    assert "alone needs more than the limit" in (tmp_path / "tests.log").read_text()
    planned = [Item("run", slow, resumes=True)]
    assert gpu_check.run_stage("bench", planned, tmp_path, state, 1) == "UNFINISHED"


def test_what_is_left_of_the_total_time_fails_nothing(pretend, tmp_path, monkeypatch, capsys):
    """It goes on in the next call, as if the stage had been stopped."""
    slow = [Item("slow", touch(tmp_path / "slow", seconds=60))]
    monkeypatch.setattr(gpu_check, "items", lambda *_, **__: slow)
    out, stage = tmp_path / "out", ["--stage", "kernels"]
    assert gpu_check.main(["--out", str(out), *stage, "--total", "3"]) == 1
    assert "UNFINISHED kernels" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(out), *stage, "--total", "60", "--limit", "0.5"]) == 1
    assert "FAIL kernels" in capsys.readouterr().out


def test_an_item_that_never_finishes_beside_others_fails_alone(tmp_path, state):
    planned = [
        Item("slow", touch(tmp_path / "slow", seconds=60)),
        Item("quick", touch(tmp_path / "quick")),
    ]
    assert gpu_check.run_stage("sanitize", planned, tmp_path, state, 3, jobs=2) == "UNFINISHED"
    assert gpu_check.run_stage("sanitize", planned, tmp_path, state, 1, jobs=2) == "FAIL"
    assert state.of("sanitize")["items"] == {"slow": "FAIL", "quick": "PASS"}


def test_a_stopped_command_may_write_what_it_has(tmp_path, state):
    """It is interrupted as by Ctrl-C before it is killed."""
    kept = tmp_path / "kept"
    script = (
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    open({str(kept)!r}, 'w').write('measured')"
    )
    planned = [Item("run", (sys.executable, "-c", script), resumes=True)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as gpu-check's own start
    try:
        assert gpu_check.run_stage("bench", planned, tmp_path, state, 12) == "UNFINISHED"
    finally:
        signal.signal(signal.SIGINT, before)
    assert kept.read_text() == "measured"


def test_a_missing_tool_is_a_failure(tmp_path, state):
    planned = [Item("memcheck", (str(tmp_path / "no-such-tool"),))]
    assert gpu_check.run_stage("sanitize", planned, tmp_path, state, 60) == "FAIL"
    assert "cannot be started" in (tmp_path / "tools.log").read_text()


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A GPU, and one harmless command per stage that writes the stage's results."""
    monkeypatch.setattr(gpu_check, "gpu", lambda: ("a GPU", "9.0"))
    monkeypatch.setattr(gpu_check, "library_obstacle", lambda *given: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    fails = set()

    def items(stage, out, *, force=False):
        return [Item(stage, touch(tmp_path / stage, code=1 if stage in fails else 0))]

    monkeypatch.setattr(gpu_check, "items", items)
    return fails


def here(rows):
    """As if measured on this GPU with these sources."""
    now = {"hardware": "a GPU", "commit": sources.commit(), "torch": str(torch.__version__)}
    return [{**row, **now} for row in rows]


def step_rows():
    common = {**dict.fromkeys(steps.STEP_FIELDS, ""), "device": "cuda"}
    return [
        {**common, "shape": shape, "method": method, "step_ms": step, "loss_us": loss}
        for shape in ("imagenet", "detection")
        for method, step, loss in (
            ("CE" if shape == "imagenet" else "plain", 100, 50),
            ("KD++ ours", 100.5, 100),
            ("KD++ loop", 400, 9000),
        )
    ]


def test_all_stages_leave_few_files_and_print_the_targets(pretend, tmp_path, monkeypatch, capsys):
    there = lambda *given: None if ran(tmp_path / "build") else "there is none"  # noqa: E731
    monkeypatch.setattr(gpu_check, "library_obstacle", there)
    out = tmp_path / "out"
    out.mkdir()
    results.append(here(gpu_rows()), out / "losses.csv")
    # Of other sources, which say nothing about these.
    steps.append_steps([{**row, "commit": "older"} for row in here(step_rows())], out / "steps.csv")
    assert gpu_check.main(["--out", str(out)]) == 1
    printed = capsys.readouterr().out
    for stage in gpu_check.STAGES:
        assert f"PASS {stage}" in printed
        assert ran(tmp_path / stage) == 1
    assert "rows_kernel" in printed  # the roofline
    assert "PASS         no host synchronisation" in printed
    assert "not measured ImageNet-shape step with KD++" in printed
    assert len([*out.iterdir()]) <= 8
    assert (out / "summary.txt").read_text() in printed
    # Again: nothing runs; with --force everything does.
    steps.append_steps(here(step_rows()), out / "steps.csv")
    assert gpu_check.main(["--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "tests is done with these sources" in printed
    assert "PASS         ImageNet-shape step with KD++" in printed
    assert "PASS         COCO-shape step: the loss part" in printed
    assert ran(tmp_path / "build") == 1
    assert ran(tmp_path / "tests") == 1
    assert gpu_check.main(["--out", str(out), "--force", "--stage", "tests"]) == 0
    assert (ran(tmp_path / "tests"), ran(tmp_path / "bench")) == (2, 1)


def test_a_failing_stage_or_target_is_the_exit_status(pretend, tmp_path, capsys):
    out = tmp_path / "out"
    pretend.add("sanitize")
    assert gpu_check.main(["--out", str(out), "--stage", "sanitize", "--stage", "tests"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL       sanitize: 0 of 1" in printed
    assert "failed: sanitize; see tools.log" in printed
    assert "not run    bench" in printed
    pretend.clear()
    assert gpu_check.main(["--out", str(out), "--stage", "sanitize"]) == 0
    results.append(here(gpu_rows(syncs=1)), out / "losses.csv")
    assert gpu_check.main(["--out", str(out), "--stage", "bench"]) == 1
    assert "FAIL         no host synchronisation" in capsys.readouterr().out


def test_a_library_of_other_sources_is_built_first(pretend, tmp_path, monkeypatch, capsys):
    there = lambda *given: None if ran(tmp_path / "build") else "of other sources"  # noqa: E731
    monkeypatch.setattr(gpu_check, "library_obstacle", there)
    out = tmp_path / "out"
    gpu_check.main(["--out", str(out), "--stage", "kernels"])
    assert (ran(tmp_path / "build"), ran(tmp_path / "kernels")) == (1, 1)
    monkeypatch.setattr(gpu_check, "library_obstacle", lambda *given: "for other GPUs")
    # One that the build does not mend, as TORCH_CUDA_ARCH_LIST says otherwise.
    assert gpu_check.main(["--out", str(out), "--stage", "tests"]) == 1
    assert "could not be built: for other GPUs" in capsys.readouterr().err
    assert not ran(tmp_path / "tests")
    # Where that fails, nothing is said of the old one.
    pretend.add("build")
    assert gpu_check.main(["--out", str(out), "--stage", "tests", "--stage", "bench"]) == 1
    captured = capsys.readouterr()
    assert "FAIL build" in captured.out
    assert "nothing else is run" in captured.err
    assert not ran(tmp_path / "tests")
    assert not ran(tmp_path / "bench")


def test_stages_run_in_their_order_however_they_are_named(pretend, tmp_path, capsys):
    pretend.add("build")
    stages = ["--stage", "bench", "--stage", "build"]
    assert gpu_check.main(["--out", str(tmp_path / "out"), *stages]) == 1
    assert (ran(tmp_path / "build"), ran(tmp_path / "bench")) == (1, 0)


def test_commands_hold_the_folder_too(tmp_path, state):
    """So that it is in use for as long as one runs, whatever becomes of gpu-check."""
    held = gpu_check._hold(tmp_path)
    state.held = (held,)
    command = (sys.executable, "-c", f"import os; os.fstat({held})")
    assert gpu_check.run_stage("bench", [Item("one", command)], tmp_path, state, 60) == "PASS"
    os.close(held)


def test_where_folders_cannot_be_locked_nobody_is_kept_out(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(gpu_check.fcntl, "flock", fail)
    os.close(gpu_check._hold(tmp_path))


def test_a_folder_in_use_is_left_alone(pretend, tmp_path, capsys):
    """By another gpu-check, or by what one that was killed left running."""
    out = tmp_path / "out"
    out.mkdir()
    held = gpu_check._hold(out)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=(held,))
    os.close(held)
    assert gpu_check.main(["--out", str(out), "--stage", "build"]) == 2
    assert "is in use by another gpu-check" in capsys.readouterr().err
    assert not ran(tmp_path / "build")
    child.communicate(b"\n")
    gpu_check.main(["--out", str(out), "--stage", "build"])
    assert ran(tmp_path / "build") == 1
    file = tmp_path / "file"
    file.touch()
    capsys.readouterr()
    assert gpu_check.main(["--out", str(file)]) == 2
    assert capsys.readouterr().err.startswith("gpu-check: error: ")


def test_all_logs_and_results_are_few_files(tmp_path):
    """Those of every stage, of which some share a log."""
    written = {gpu_check.STATE, gpu_check.SUMMARY, *gpu_check.LOGS.values()}
    for stage in ("bench", "e2e"):
        written |= {Path(item.command[-1]).name for item in gpu_check.items(stage, tmp_path)}
    assert len(written) <= 8
    assert {"losses.csv", "steps.csv", "training.csv"} <= written


def test_detectors_are_measured_apart(tmp_path):
    """Which takes a part of the stage's time, and goes on where the stage stopped."""
    found = {item.name: item.command for item in gpu_check.items("e2e", tmp_path)}
    assert found["detection"][-4:-2] == ("--shape", "detection")
    assert found["detection"][-1] == found["e2e"][-1]
    assert "--shape" not in found["e2e"]


def test_force_measures_again_what_a_file_has(tmp_path):
    (usual,) = gpu_check.items("bench", tmp_path)
    (forced,) = gpu_check.items("bench", tmp_path, force=True)
    assert "--resume" in usual.command
    assert "--resume" not in forced.command


# -- what the sanitizers watch --------------------------------------------------------------------

# 16-byte vectors per element size, and vectors of a row per thread that the kernels keep.
VECTOR = {2: 8, 4: 4, 8: 2}
KEPT = {2: 2, 4: 4, 8: 2}


@pytest.mark.parametrize("widths", [sanitize.ND_WIDTHS, [c for _, c in sanitize.DIST_SIZES]])
def test_widths_reach_every_variant_of_the_row_kernels(widths):
    """By the launchers' rules: vectors or not; a warp, a block, a block that reads again."""
    for size, vector in VECTOR.items():
        found = set()
        for width in widths:
            step = vector if width % vector == 0 else 1
            block = width > 32 * KEPT[size] * step
            again = width > 128 * KEPT[size] * step
            found.add((step > 1, block, again))
        readers = ((False, False), (True, False), (True, True))
        assert found == {(vectors, *reader) for vectors in (True, False) for reader in readers}, (
            size
        )


@pytest.mark.parametrize("classes", [9001, 19_999, 32_767, 65_537])
def test_labels_of_the_sanitizer_are_in_all_parts_of_a_row(classes):
    """Of a cluster's blocks and their warps others have one in every row."""
    parts = sanitize._labels(64, classes) * 8 // classes
    assert parts.unique().numel() == 8
    assert (parts[1:] != parts[:-1]).float().mean() > 0.8


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("size", VECTOR)
def test_classes_reach_every_variant_of_the_logit_kernels(size, is_wide, decoupled):
    """By the launchers' numbers, of an H100: a warp, a block, a large block, clusters of 2, 4 and 8
    blocks, or with a wider teacher a huge block, each with and without elements beside the vectors;
    rows beyond what the last keeps; and without vectors."""
    if is_wide and size != 2:
        pytest.skip("a teacher of another type is for 16 bits")
    source = "".join(
        (ROOT / "csrc/ops/cuda" / name).read_text()
        for name in ("logit_loss.cu", "logit_columns.cuh")
    )
    warp, block, in_cluster, in_large, in_huge, large_registers, huge_registers = (
        int(re.search(rf"\b{name} = (\d+)[,;]", source)[1])
        for name in (
            "kWarpRounds", "kBlockRounds", "kClusterBlock", "kLargeBlock", "kHugeBlock",
            "kLargeRegisters", "kHugeRegisters",
        )
    )  # fmt: skip
    common = (ROOT / "csrc/common/device.cuh").read_text()
    other = int(re.search(r"kOtherShared = (\d+) << 10;", common)[1]) << 10
    vector = VECTOR[size]
    vector_bytes = vector * (size + (4 if is_wide else size))
    found = set()
    for classes in sanitize.LOGIT_WIDTHS:
        vectors = classes // vector

        def keeps(threads, sharing, registers=0, blocks=1, vectors=vectors):
            """The part of a row that is kept, by threads of blocks that share the memory."""
            most = min((228 << 10) // sharing, 227 << 10) - other
            slots = most // (threads * vector_bytes)
            return (slots + registers) / max(1, -(-vectors // (threads * blocks)))

        large = keeps(in_large, 2, large_registers - (is_wide or decoupled) if size < 8 else 0)
        if vectors <= 32 * warp:
            kind, kept = "warp", 1.0
        elif vectors <= 128 * block:
            kind, kept = "block", 1.0
        elif size < 8 and not is_wide and large < 0.95:
            parts = {n: keeps(in_cluster, 3, blocks=n) for n in (2, 4, 8)}
            kind = next((n for n in (2, 4) if parts[n] >= 0.9), 8)
            kept = parts[kind] / 0.9
        elif size < 8 and large < 0.75:
            kind, kept = "huge", keeps(in_huge, 1, huge_registers - is_wide)
        else:
            kind, kept = "large", large
        found.add((kind, classes % vector > 0, kept >= 1))
    last = ["large"] if size == 8 else ["large", "huge"] if is_wide else ["large", 2, 4, 8]
    wanted = {(k, rest, True) for k in ["warp", "block", *last] for rest in (False, True)}
    assert wanted | {(last[-1], rest, False) for rest in (False, True)} <= found
    assert {classes <= 32 * warp for classes in sanitize.UNLIKE_WIDTHS} == {True, False}


needs_library = pytest.mark.skipif(
    not dnkd_ext.build_info()["loaded"], reason="compiled library not loaded: nothing to compare"
)


@needs_library
@pytest.mark.parametrize("name", sanitize.LOSSES)
def test_the_runs_agree_with_the_reference(name, capsys):
    assert sanitize.main(["--device", "cpu", "--loss", name]) == 0
    assert f"{name} on cpu: 0 runs differ" in capsys.readouterr().out


@needs_library
def test_only_the_dtypes_asked_for_run(monkeypatch):
    seen = []
    monkeypatch.setattr(sanitize, "error", lambda run, dtype, device: seen.append(dtype) or 0.0)
    asked = ["--loss", "scale", "--dtype", "float16", "--dtype", "float64"]
    assert sanitize.main(["--device", "cpu", *asked]) == 0
    assert {*seen} == {torch.float16, torch.float64}


@needs_library
def test_a_wrong_kernel_would_be_seen(monkeypatch, capsys):
    monkeypatch.setattr(
        dnkd_ext.reference, "dist_loss", lambda *a, **k: 1.001 * dnkd_ext.dist_loss(*a, **k)
    )
    assert sanitize.main(["--device", "cpu", "--loss", "dist_loss"]) == 1
    assert "FAIL dist_loss float32" in capsys.readouterr().out
