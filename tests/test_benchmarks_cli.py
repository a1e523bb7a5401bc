"""``python -m benchmarks``: run, report, compare, regression, and their errors."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._inductor.exc import InductorError

import dnkd_ext
from benchmarks import (
    cases,
    compare,
    disk,
    e2e,
    parts,
    peers,
    plots,
    report,
    results,
    run,
    sources,
    steps,
    targets,
)
from benchmarks import conftest as entry_points
from benchmarks.__main__ import main
from benchmarks.cases import LogitCase, NdCase
from tests.benchmark_rows import found_in, gpu_rows, rows_of

ROOT = Path(__file__).resolve().parents[1]
LADDER = [
    case
    for dtype in (torch.float32, torch.bfloat16)
    for case in (NdCase(16, 8, 5, dtype), NdCase(32, 8, 5, dtype), LogitCase(16, 0, 10, dtype))
]


@pytest.fixture
def small(monkeypatch):
    """A ladder of small cases, and no compiler to wait for."""
    monkeypatch.setattr(
        run, "cases", lambda device, dtypes: [c for c in LADDER if c.dtype in dtypes]
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(cases, "_COMPILED", {})


QUICK = ["--seconds", "0.005"]


# -- run ------------------------------------------------------------------------------------------


def test_run_measures_prints_and_keeps(small, tmp_path, capsys):
    out = tmp_path / "a.csv"
    arguments = ["run", "--case", "nd_loss", "--dtype", "float32", "--out", str(out), *QUICK]
    assert main(arguments) == 0
    found = results.measurements(results.read(out))
    assert [one.case for one in found] == [LADDER[0].name, LADDER[1].name]
    printed = capsys.readouterr().out
    assert LADDER[0].name in printed
    assert f"targets: {len(targets.targets('cpu'))} not measured" in printed  # of other sizes
    # What is in the file is left out, the rest is measured.
    arguments = ["run", "--dtype", "float32", "--resume", "--out", str(out), *QUICK]
    assert main(arguments) == 0
    assert len(results.measurements(results.read(out))) == 3
    assert main(arguments) == 0
    assert "nothing left to measure" in capsys.readouterr().out


def test_run_takes_peers_by_name(small, tmp_path):
    out = tmp_path / "a.csv"
    assert main(["run", "--peers", "ours,eager", "--out", str(out), "--quick", *QUICK]) == 0
    (first, *_) = results.measurements(results.read(out))
    assert {peer for _, peer in first.rows} == {"ours", "eager", "copy"}


def test_a_planted_wrong_peer_is_refused_and_the_rest_kept(small, tmp_path, monkeypatch, capsys):
    """By its name, before it is timed; the file stays whole."""
    right = peers.nd
    monkeypatch.setattr(peers, "nd", lambda *inputs: 1.01 * right(*inputs))
    out = tmp_path / "a.csv"
    assert main(["run", "--dtype", "float32", "--out", str(out), *QUICK]) == 1
    captured = capsys.readouterr()
    assert "refused: eager computes" in captured.err
    assert "refused: compile computes" in captured.err
    nd, _, logits = results.measurements(results.read(out))
    assert nd.us("eager") is None
    assert nd.us("compile") is None
    assert nd.us("ours") is not None
    assert logits.us("eager") is not None


def test_a_refused_peer_is_refused_again_by_a_resumed_run(small, tmp_path, monkeypatch, capsys):
    """Else the check that failed would pass when it is started again."""
    right = peers.nd
    monkeypatch.setattr(peers, "nd", lambda *inputs: 1.01 * right(*inputs))
    out = tmp_path / "a.csv"
    command = ["run", "--dtype", "float32", "--peers", "ours,eager", "--out", str(out), *QUICK]
    assert main([*command, "--case", "16x8", "--case", "ce_kd"]) == 1
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("refused: eager computes") == 2
    # What the file lacks altogether comes first, what is whole not at all.
    found = [one.case for one in results.measurements(results.read(out))]
    assert found == [LADDER[n].name for n in (0, 2, 1, 0)]


def test_a_resumed_run_measures_cases_that_lack_peers(small, tmp_path, capsys):
    """As those of a quick run, whose targets would never be evaluated otherwise."""
    out = tmp_path / "a.csv"
    command = ["run", "--case", "16x8", "--dtype", "bfloat16", "--out", str(out), *QUICK]
    assert main([*command, "--quick"]) == 0
    for _ in range(2):
        assert main([*command, "--resume"]) == 0
    assert "nothing left to measure" in capsys.readouterr().out
    first, second = results.measurements(results.read(out))
    assert first.us("compile") is None
    wanted = results.peers_of(LADDER[3], warm=False)
    assert wanted == {peer for which, peer in second.rows if which == results.BOTH}
    assert {"float32", "compile", "copy", "noise"} <= wanted


def test_kernels_that_were_not_measured_are_left(small, tmp_path, monkeypatch):
    out = tmp_path / "a.csv"
    command = ["run", "--case", "16x8", "--dtype", "float32", "--peers", "ours", "--out", str(out)]
    assert main([*command, *QUICK]) == 0
    here = results.environment("cpu")
    monkeypatch.setattr(results, "environment", lambda device: {**here, "kernels": "others"})
    assert main([*command, "--resume", *QUICK]) == 0
    assert len(results.measurements(results.read(out))) == 2


def test_an_interrupted_run_keeps_what_was_measured(small, tmp_path, monkeypatch, capsys):
    measure_case, seen = results.measure_case, []

    def interrupted(case, **options):
        seen.append(case)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measure_case(case, **options)

    monkeypatch.setattr(results, "measure_case", interrupted)
    out = tmp_path / "a.csv"
    assert main(["run", "--out", str(out), *QUICK]) == 130
    assert len(results.measurements(results.read(out))) == 2
    captured = capsys.readouterr()
    assert LADDER[0].name in captured.out  # the table of what there is
    assert "interrupted; what was measured is kept" in captured.err


def test_control_c_leaves_a_valid_file(tmp_path):
    """The process itself, interrupted by the signal while it measures."""
    out = tmp_path / "a.csv"
    # Whoever runs the tests in the background of a shell has them ignore the signal, and so would
    # the process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks", "run", "--case", "128x100", "--case", "64x64",
            "--peers", "ours,eager", "--seconds", "1", "--out", str(out),
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    found = results.measurements(results.read(out))
    assert 1 <= len(found) < 6
    assert all(one.us("ours") and one.us("eager") for one in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "nothing"], ["no case matches 'nothing'", "nd_loss 16x8"]),
        (["--peers", "ours,theirs"], ["no peer 'theirs'", "eager"]),
        (["--peers", "liger"], ["'liger' cannot be measured here", "GPU"]),
        (["--peers", "compile-max"], ["'compile-max' cannot", "matrix multiplications"]),
        (["--dtype", "int8"], ["no dtype 'int8'", "float32, bfloat16"]),
        (["--resume"], ["--resume needs --out"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_choice_is_named_with_what_there_is(small, arguments, words, capsys):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["run", "e2e", "training", "regression"])
def test_without_a_gpu_cuda_is_refused(command, capsys):
    assert main([command, "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks {command}: error: --device cuda needs a GPU")
    assert error.count("\n") == 1


def test_an_unreadable_file_is_found_before_anything_is_measured(small, tmp_path, capsys):
    out = tmp_path / "a.csv"
    out.write_text("something else\n")
    assert main(["run", "--out", str(out)]) == 2
    assert "other columns" in capsys.readouterr().err
    assert out.read_text() == "something else\n"
    assert main(["targets", str(tmp_path / "none.csv")]) == 2
    assert "none.csv cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["run"], ["e2e"], ["training", "--limit", "128"], ["loading", "--images", "64"]],
    ids=lambda words: words[0],
)
def test_a_file_that_cannot_be_written_is_found_before_anything_is_measured(
    small, command, tmp_path, monkeypatch, capsys
):
    def measuring(*_, **__):
        raise AssertionError("it was measured")

    if command[0] in ("training", "loading"):
        module = pytest.importorskip(f"benchmarks.{command[0]}", reason="training is not installed")
        name = {"training": "measure_preset", "loading": "write_pieces"}[command[0]]
        monkeypatch.setattr(module, name, measuring)
    monkeypatch.setattr(results, "measure_case", measuring)
    monkeypatch.setattr(e2e, "measure_shape", measuring)
    (tmp_path / "file").touch()
    (tmp_path / "cut.csv").write_text("date,")
    for out in (tmp_path / "file" / "a.csv", tmp_path, tmp_path / "cut.csv"):
        assert main([*command, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"benchmarks {command[0]}: error: "), error
        assert error.count("\n") == 1
    out = tmp_path / "folder" / "a.csv"
    with pytest.raises(AssertionError, match="it was measured"):
        main([*command, "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    "command", ["", "run", "e2e", "training", "report", "compare", "regression", "targets"]
)
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([*filter(None, [command]), "--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    wanted = {
        "": ["run", "e2e", "training", "report", "compare", "regression", "targets", "130"],
        "run": [
            "--device",
            "--case",
            "--dtype",
            "--peers",
            "--quick",
            "--out",
            "--seconds",
            "--resume",
        ],
        "e2e": ["--device", "--shape", "--rounds", "--out", "--resume"],
        "training": [
            "--device",
            "--preset",
            "--data",
            "--limit",
            "--eval-images",
            "--rounds",
            "--batch-size",
            "--precision",
            "--channels-last",
            "--compile",
            "--cuda-graph",
            "--out",
            "--resume",
        ],
        "report": ["--out", "--add", "--no-plots"],
        "compare": ["A", "B"],
        "regression": ["--device", "--case", "--dtype", "--against", "--seconds"],
        "targets": ["CSV", "--steps"],
    }
    assert all(word in printed for word in wanted[command])


# -- compare and regression -----------------------------------------------------------------------


def test_compare_tells_a_change_from_noise(tmp_path, capsys):
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    results.append(rows_of(("ours", 100), ("noise", 101), ("eager", 500)), before)
    results.append(rows_of(("ours", 120), ("noise", 119), ("eager", 505)), after)
    assert main(["compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ours, eager = (next(x for x in lines if f" {peer} " in x) for peer in ("ours", "eager"))
    assert ours.endswith("slower")
    assert " 1.19 " in ours  # eager took 1.01 times as long: that is of the machine
    assert " 1.01 " in eager
    assert eager.endswith(" -")
    # The other way round it got faster; within a noisy run nothing changed.
    first, second = found_in(results.read(before)), found_in(results.read(after))
    assert compare.compare(second, first)[0].verdict == "faster"
    noisy = found_in(rows_of(("ours", 120), ("noise", 160)))
    assert [change.verdict for change in compare.compare(first, noisy)] == ["same"]


def test_compare_takes_the_machine_out(tmp_path, capsys):
    """All took twice as long: the machine's day. Ours alone did: ours."""
    before, after, own = (tmp_path / f"{name}.csv" for name in "abc")
    results.append(rows_of(("ours", 100), ("eager", 500), ("copy", 10)), before)
    results.append(rows_of(("ours", 202), ("eager", 1000), ("copy", 20)), after)
    results.append(rows_of(("ours", 200), ("eager", 500), ("copy", 10)), own)
    for later, expected in ((after, "same"), (own, "slower")):
        assert main(["compare", str(before), str(later)]) == 0
        lines = capsys.readouterr().out.splitlines()
        verdicts = {
            peer: next(line for line in lines if f" {peer} " in line).split()[-1]
            for peer in ("ours", "eager", "copy")
        }
        assert verdicts == {"ours": expected, "eager": "-", "copy": "-"}
    # Of other kernels, another machine or torch it says how they differ, and judges nothing.
    for column, text in (
        ("kernels", "none kernels -> other kernels"),
        ("hardware", "a machine, torch 9.9.0 -> other, torch 9.9.0"),
        ("torch", "a machine, torch 9.9.0 -> a machine, torch other"),
    ):
        rows = rows_of(("ours", 200), ("eager", 500), **{column: "other"})
        path = tmp_path / f"{column}.csv"
        results.append(rows, path)
        assert main(["compare", str(before), str(path)]) == 0
        printed = capsys.readouterr().out
        assert text in printed
        assert next(x for x in printed.splitlines() if " ours " in x).endswith(" -")


def test_times_that_overlap_between_their_quantiles_have_not_changed():
    """Of two modes the median may be either."""
    one, two = rows_of(("ours", 50), ("eager", 381)), rows_of(("ours", 50), ("eager", 183))
    assert compare.regressions(found_in(one), found_in(two))[0].verdict == "slower"
    one[1]["low_us"] = 181  # and its median, at another time, too
    one[1]["high_us"] = 383
    (change,) = compare.regressions(found_in(one), found_in(two))
    assert change.ratio > 2 > 1 + change.noise
    assert change.verdict == "same"


def test_a_busy_machine_is_told_and_gets_no_verdict(small, tmp_path, monkeypatch, capsys):
    path = tmp_path / "losses.csv"
    choice = ["--case", "nd_loss 16x8", "--dtype", "float32"]

    def looks(*shares):
        """What the machine is found to be, one time after another."""
        found = iter(shares)
        monkeypatch.setattr("benchmarks.harness.cpu_share", lambda: next(found))

    looks(0.5)
    assert main(["run", *choice, "--quick", "--out", str(path), *QUICK]) == 0
    told = "the machine is busy: this process got 50 % of the time of"
    assert f"benchmarks run: warning: {told}" in capsys.readouterr().err
    recorded(path, 0.01)  # far slower now, for all that can be told
    for shares in ([0.5], [1.0, 0.5]):  # before, or behind what was measured
        looks(*shares)
        assert main(["regression", *choice, "--against", str(path), *QUICK]) == 3
        assert f"no verdict: {told}" in capsys.readouterr().err
    looks(1.0, 1.0)
    assert main(["regression", *choice, "--against", str(path), *QUICK]) == 1
    assert "busy" not in capsys.readouterr().err


def test_regression_compares_with_the_same_kernels(small, tmp_path, monkeypatch, capsys):
    path = tmp_path / "losses.csv"
    choice = ["--case", "nd_loss 16x8", "--dtype", "float32"]
    assert main(["run", *choice, "--quick", "--out", str(path), *QUICK]) == 0
    here = results.environment("cpu")
    monkeypatch.setattr(results, "environment", lambda device: {**here, "kernels": "others"})
    capsys.readouterr()
    assert main(["regression", *choice, "--against", str(path), *QUICK]) == 3
    assert "with others kernels in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", ""], "no peer ''; there are ours"),
        (["--peers", "ours,,eager"], "no peer ''; there are ours"),
        (["--case", ""], "a pattern of cases must not be empty, got ''"),
        (["--peers", "eager,copy", "--out", "a.csv"], "--peers eager,copy lacks ours"),
        (["--out", os.devnull], f"{os.devnull} is no regular file"),
    ],
)
def test_choices_that_would_measure_all_or_nothing(
    small, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *arguments, *QUICK]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_dtype_that_is_named_twice_is_measured_once():
    assert run.choose_dtypes(["float32", "bfloat16", "float32"]) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("cell", ["nan", "-5", "inf"])
def test_figures_that_are_none(cell, tmp_path):
    path = tmp_path / "losses.csv"
    results.append(rows_of(("ours", 100)), path)
    path.write_text(path.read_text().replace(",100,", f",{cell},"))
    with pytest.raises(results.ResultsError, match=f"line 2: median_us is '{cell}'"):
        results.read(path)


def test_a_command_that_is_terminated_ends_as_if_interrupted(small, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(run, "run", stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run", *QUICK]) == 130
    assert "benchmarks run: interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_part_of_the_cases_measured_anew_hides_no_missed_target():
    """Of an older version, as the command targets has it."""
    case = "nd_loss 256x512 (1000) float32 cpu"
    old = rows_of(("ours", 100), ("eager", 120), ("compile", 110), case=case, commit="old")
    new = rows_of(("ours", 10), ("eager", 500), ("compile", 300), commit="new")
    text = report.render([*old, *new], [], [], [])
    assert "before them what an older one missed" in text
    (line,) = (x for x in text.splitlines() if "at old, none kernels" in x and "7" in x)
    assert line.strip().startswith("FAIL")
    assert "an older one missed" not in report.render(new, [], [], [])


def test_compare_needs_something_in_common(tmp_path, capsys):
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    results.append(rows_of(("ours", 100)), before)
    results.append(rows_of(("ours", 100), case="nd_loss 1x1 (1) float32 cpu"), after)
    assert main(["compare", str(before), str(after)]) == 2
    assert "no case of the same device in common" in capsys.readouterr().err


def test_compare_takes_the_same_machine_where_both_have_it(tmp_path, capsys):
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    for path in (before, after):
        for hardware in ("one", "two"):
            results.append(rows_of(("ours", 100), hardware=hardware), path)
    results.append(rows_of(("ours", 100), hardware="three"), after)
    assert main(["compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " -> " in line] == [
        "one, torch 9.9.0 -> one, torch 9.9.0", "two, torch 9.9.0 -> two, torch 9.9.0",
        "one, torch 9.9.0 -> three, torch 9.9.0", "two, torch 9.9.0 -> three, torch 9.9.0",
    ]  # fmt: skip
    assert sum("another machine" in line for line in lines) == 2


def recorded(path, factor):
    """What was measured now, as if it had been faster or slower then, on both sides of noise."""
    rows = results.read(path)
    path.unlink()
    for row in rows:
        if row["peer"] in ("ours", "noise"):
            for name in ("median_us", "low_us", "high_us"):
                row[name] *= factor
        row["low_us"] = row["high_us"] = row["median_us"]
    results.append(rows, path)


def test_regression_finds_what_got_slower_than_recorded(small, tmp_path, capsys):
    path = tmp_path / "losses.csv"
    choice = ["--case", "nd_loss 16x8", "--dtype", "float32"]
    assert main(["run", *choice, "--quick", "--seconds", "0.1", "--out", str(path)]) == 0
    again = ["regression", *choice, "--seconds", "0.1", "--against", str(path)]
    recorded(path, 0.2)
    assert main(again) == 1
    printed = capsys.readouterr().out
    assert "got slower by more than the noise" in printed
    assert "slower\n" in printed
    recorded(path, 25.0)
    before = path.read_text()
    assert main(again) == 0
    assert "none of" in capsys.readouterr().out
    assert path.read_text() == before  # a regression check records nothing


def test_what_is_slower_once_is_measured_again():
    def ladder(ours):
        return {(case, "default"): found_in(rows_of(("ours", us), ("eager", 500), case=case))[
            case, "default"
        ] for case, us in ours.items()}  # fmt: skip

    one, two, three = (f"nd_loss {n}x8 (5) float32 cpu" for n in (1, 2, 3))
    before = ladder({one: 100, two: 100, three: 100})
    runs = [{one: 150, two: 150, three: 90}, {one: 101, two: 140}]
    asked = []

    def measure(names):
        asked.append(names)
        return ladder(runs[len(asked) - 1])

    found = compare.confirmed_regressions(before, measure, 0.1)
    assert asked == [{one, two, three}, {one, two}]
    verdicts = {change.case: (change.verdict, round(change.ratio, 2)) for change in found}
    assert verdicts == {one: ("same", 1.01), two: ("slower", 1.4), three: ("faster", 0.9)}


def test_the_noise_is_at_least_what_runs_differ_by(small, tmp_path, monkeypatch, capsys):
    def runs(*factors):
        """Of five cases ours, in a first run and a second."""
        return results.measurements([
            row
            for second in (False, True)
            for number, factor in enumerate(factors)
            for row in rows_of(
                ("ours", 100 * (factor if second else 1)), ("eager", 500),
                case=f"nd_loss {number}x8 (5) float32 cpu", commit=str(second),
            )
        ])  # fmt: skip

    assert compare.between_runs(runs(1.0, 1.1, 1.0, 1.1, 1.2)) == pytest.approx(0.15)
    assert compare.between_runs(runs(1.0, 1.1, 1.0, 1.1, 1.2)[:5]) == 0
    # Neither what was improved in one, nor in all of them, hides that it is undone.
    assert compare.between_runs(runs(1.0, 1.1, 1.0, 1.1, 0.2)) == pytest.approx(0.15)
    assert compare.between_runs(runs(0.4, 0.5, 0.5, 0.5, 0.6)) == compare.MOST_NOISE
    path = tmp_path / "losses.csv"
    choice = ["--case", "nd_loss 16x8", "--dtype", "float32"]
    assert main(["run", *choice, "--quick", "--seconds", "0.1", "--out", str(path)]) == 0
    recorded(path, 0.2)
    check = ["regression", *choice, "--against", str(path), *QUICK]
    assert main(check) == 1
    assert "as between recorded runs" not in capsys.readouterr().out
    monkeypatch.setattr(compare, "between_runs", lambda found: 1e9)
    assert main(check) == 0
    assert "none of" in (said := capsys.readouterr().out)
    assert "as between recorded runs of this machine" in said


def test_regression_tells_when_ours_is_refused(small, tmp_path, monkeypatch, capsys):
    path = tmp_path / "losses.csv"
    choice = ["--case", "nd_loss 16x8", "--dtype", "float32"]
    assert main(["run", *choice, "--quick", "--out", str(path), *QUICK]) == 0
    right = dnkd_ext.nd_loss
    monkeypatch.setattr(dnkd_ext, "nd_loss", lambda *a, **k: 1.01 * right(*a, **k))
    capsys.readouterr()
    assert main(["regression", *choice, "--against", str(path), *QUICK]) == 1
    captured = capsys.readouterr()
    assert "refused: ours computes" in captured.err
    assert "error:" not in captured.err
    assert "got slower" not in captured.out


def test_only_what_is_kept_is_said_to_be(small, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    path = tmp_path / "losses.csv"
    choice = ["--case", "nd_loss 16x8", "--dtype", "float32"]
    assert main(["run", *choice, "--quick", "--out", str(path), *QUICK]) == 0
    monkeypatch.setattr(results, "measure_case", interrupted)
    for command in (["regression", "--against", str(path)], ["run"], ["run", "--out", str(path)]):
        assert main([*command, *choice, *QUICK]) == 130
        kept = "; what was measured is kept" if "--out" in command else ""
        told = f"benchmarks {command[0]}: interrupted{kept}\n"
        assert capsys.readouterr().err.endswith(told)


def test_regression_without_a_record_says_so(small, tmp_path, capsys):
    path = tmp_path / "losses.csv"
    results.append(rows_of(("ours", 100), ("eager", 500)), path)
    assert main(["regression", "--against", str(path)]) == 3
    printed = capsys.readouterr().out
    assert "nothing is recorded of" in printed
    assert "a machine, cpu, 9.9.0" in printed


# -- report ---------------------------------------------------------------------------------------


def test_the_committed_report_is_that_of_the_committed_results():
    rows = results.read(results.RESULTS / "losses.csv")
    trained, loaded = parts.TRAINING.recorded(), disk.LOADING.recorded()
    text = report.render(rows, steps.STEPS.recorded(), trained, loaded)
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert page == text, "run python -m benchmarks report"
    shown = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert shown
    assert all((ROOT / "benchmarks" / path).is_file() for path in shown)


def test_results_of_another_machine_are_added_once(tmp_path, monkeypatch, capsys):
    """Those of gpu-check: added to the recorded ones and shown."""
    folder, recorded_in = tmp_path / "gpu", tmp_path / "results"
    for module, name in ((results, "LOSSES"), (steps, "STEPS"), (parts, "TRAINING")):
        file = getattr(module, name)
        monkeypatch.setattr(
            module, name, dataclasses.replace(file, path=recorded_in / file.path.name)
        )
    results.append(rows_of(("ours", 10)), recorded_in / "losses.csv")
    results.append(gpu_rows(), folder / "losses.csv")
    command = ["report", "--add", str(folder), "--out", str(tmp_path / "out"), "--no-plots"]
    for count in (len(gpu_rows()), 0):
        assert main(command) == 0
        assert f"added {count} rows" in capsys.readouterr().out
    assert len(results.read(recorded_in / "losses.csv")) == 1 + len(gpu_rows())
    assert "make gpu-check STAGE=bench" in (tmp_path / "out/README.md").read_text()
    assert main(["report", "--add", str(tmp_path)]) == 2
    assert "has none of losses.csv, steps.csv, training.csv, loading.csv" in capsys.readouterr().err


def test_the_report_says_what_was_not_run():
    text = report.render(rows_of(("ours", 10), ("eager", 41), ("noise", 11), ("copy", 1)), [])
    assert text.count("Not run: there is no result of a GPU") == 3
    assert (
        "nd_loss 64x64 (100), float32 | 10.0 (9.9-10.1) | 1.10 | 41 (4.1x) | 1.0 | 10 % |" in text
    )
    assert "2026-01-01, dnkd_ext 0.0 at abc" in text
    # Peers, too, that could have been measured on the device.
    assert "\nNot measured here: module, float32, compiled, loop, compile.\n" in text
    text = report.render(gpu_rows(), [])
    assert (
        "\nNot measured here: noise, module, float32, compiled, loop, compile-max, liger.\n" in text
    )


def test_figures_of_an_older_version_are_marked_and_meet_no_target():
    older = rows_of(("ours", 10), ("eager", 100), ("compile", 90))
    other = rows_of(("ours", 20), ("eager", 50), case="nd_loss 256x512 (1000) float32 cpu")
    newer = rows_of(("ours", 9), ("eager", 90), commit="def")
    text = report.render([*older, *other], [])
    assert r"\*" not in text
    assert "PASS         ND at 64x64: at least 4x eager: 10.00x" in text
    text = report.render([*older, *other, *newer], [])
    assert "dnkd_ext 0.0 at def, none kernels; 2026-01-01, dnkd_ext 0.0 at abc" in text
    assert r"none kernels (marked \*)" in text
    assert "| nd_loss 64x64 (100), float32 | 9.0" in text
    assert r"| nd_loss 256x512 (1000), float32\* | 20.0" in text
    assert "not measured ND at 256x512 and 256x2048: at least 7x eager" in text
    # Measured again in the old version, the other is of the newest one that there is.
    text = report.render([*other, *newer, *older], [])
    assert r"dnkd_ext 0.0 at abc, none kernels." in text


def test_the_report_shows_every_dtype_that_can_be_measured():
    rows = []
    for dtype in run.DTYPE_NAMES:
        rows += rows_of(("ours", 10), ("eager", 41), case=f"nd_loss 64x64 (100) {dtype} cpu")
    text = report.render(rows, [])
    for dtype in run.DTYPE_NAMES:
        assert f"| nd_loss 64x64 (100), {dtype} | 10.0" in text
    assert "PASS         ND at 64x64: at least 4x eager: 4.10x" in text


def test_the_report_of_a_gpu_and_of_steps():
    step = {
        **dict.fromkeys(steps.STEP_FIELDS, ""), "device": "cuda", "shape": "imagenet",
        "models": "resnet34 -> resnet18", "batch": 256.0, "image": 224.0, "dtype": "bfloat16",
        "hardware": "a GPU", "rounds": 20.0, "low_ms": 99.0, "high_ms": 102.0,
    }  # fmt: skip
    methods = {"CE": (100.0, 40.0), "KD++ loop": (130.0, 30000.0), "KD++ ours": (100.5, 500.0)}
    group = [
        {**step, "method": name, "step_ms": ms, "loss_us": us} for name, (ms, us) in methods.items()
    ]
    detection = {"shape": "detection", "image": 800.0, "batch": 8.0}
    group += [{**row, **detection} for row in group[1:]]
    text = report.render(gpu_rows(), group)
    assert "batch 8, 800x1333, bfloat16" in text
    assert "PASS         COCO-shape step: the loss part" in text
    assert text.count("ImageNet-shape step with KD++") == 1  # beside its own figures alone
    assert text.count("Not run: there is no result of a GPU") == 1  # training, part by part
    assert "make gpu-check STAGE=bench" in text
    assert "| KD++ ours | 100.5 (99.0-102.0) | 2,547 | 500 | 60.0x |" in text
    assert "PASS         ImageNet-shape step with KD++" in text


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for number, case in enumerate(cases.cases("cpu")):
        us = 10.0 * (number + 1)
        for allocator in ("default", "warm"):
            rows += rows_of(
                ("copy", us / 3), ("ours", us), ("noise", us), ("eager", 9 * us), ("loop", 90 * us),
                case=case.name, allocator=allocator, peak_bytes=1e6,
            )  # fmt: skip
    written = plots.plot(rows, tmp_path)
    assert [path.name for path in written] == [
        f"cpu-{kind}.png" for kind in ("time", "bandwidth", "speedup", "memory")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


# -- what the machine lacks, and libraries of other sources ----------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FloatingPointError("kd is nan at step 3"), "kd is nan at step 3"),
        (torch.OutOfMemoryError("no memory\nmore"), "OutOfMemoryError: no memory"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), "can't allocate"),
        (InductorError(RuntimeError("no c++"), None), "InductorError: "),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "worker process"),
    ],
)
def test_what_the_machine_lacks_is_a_line(small, monkeypatch, capsys, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(results, "measure_case", fail)
    assert main(["run", "--quick", *QUICK]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.startswith("benchmarks run: error: ")
    assert told in line


@pytest.mark.parametrize("error", [RuntimeError("a defect"), Unsupported("a defect")])
def test_a_defect_is_not_hidden(small, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(results, "measure_case", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["run", "--quick", *QUICK])


@pytest.mark.parametrize("command", [["run"], ["e2e"], ["training"], ["regression"]])
def test_only_the_library_of_these_sources_is_measured(
    command, needs_extension, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(sources, "library_hash", lambda: "another")
    if command != ["regression"]:
        command = [*command, "--out", str(tmp_path / "a.csv")]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "the compiled library is of other sources than these" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.csv").exists()


def test_a_library_without_cuda_is_none_for_a_gpu(needs_extension, monkeypatch, capsys):
    """Of which the losses would be the reference's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(run, "library_obstacle", lambda *given: None)
    info = {**dnkd_ext.build_info(), "cuda": None}
    monkeypatch.setattr(dnkd_ext, "build_info", lambda: info)
    assert main(["run", "--device", "cuda"]) == 2
    assert "the compiled library has no CUDA kernels" in capsys.readouterr().err


def test_the_entry_points_of_pytest_measure_no_other_library(monkeypatch):
    config = SimpleNamespace(option=SimpleNamespace(collectonly=False), getoption=lambda _: "cpu")
    monkeypatch.setattr(run, "library_obstacle", lambda *given: "another library")
    with pytest.raises(pytest.UsageError, match="another library"):
        entry_points.pytest_collection_finish(SimpleNamespace(config=config))
    config.option.collectonly = True
    entry_points.pytest_collection_finish(SimpleNamespace(config=config))
