"""The performance targets and the roofline, on made-up results."""

from __future__ import annotations

import torch

from benchmarks import cases, report, results, steps, targets
from benchmarks.__main__ import main
from tests.benchmark_rows import found_in, gpu_rows, rows_of


def verdict(found, text, device="cpu"):
    (one,) = [v for v in targets.evaluate(found, device) if v.text.startswith(text)]
    return one


def test_a_target_passes_fails_or_was_not_measured():
    text = "ND at 64x64: at least 4x eager"
    assert verdict(found_in(rows_of(("ours", 10), ("eager", 41))), text).status == "PASS"
    failed = verdict(found_in(rows_of(("ours", 10), ("eager", 39))), text)
    assert (failed.status, failed.figure, failed.bound) == ("FAIL", "3.90x", "at least 4.00x")
    assert verdict(found_in(rows_of(("ours", 10))), text).status == "not measured"


def test_a_figure_that_fails_does_not_read_as_if_it_held():
    one = verdict(found_in(rows_of(("ours", 10), ("eager", 39.98))), "ND at 64x64: at least 4x")
    assert (one.status, one.figure, one.bound) == ("FAIL", "3.998x", "at least 4.00x")
    rows = gpu_rows()
    for row in rows:
        if row["case"].startswith("KD++") and row["pass"] == "forward":
            row["launches"] += 1
    one = verdict(found_in(rows), "256x512 to 512x2048: at most two launches forward", "cuda")
    assert (one.status, one.figure) == ("FAIL", "2.5 launches")
    pair = [{"shape": "imagenet", "method": "CE", "step_ms": 100.0, "loss_us": 1.0}]
    pair += [{"shape": "imagenet", "method": "KD++ ours", "step_ms": 101.02, "loss_us": 1.0}]
    one = targets.evaluate_steps(pair)[0]
    assert (one.status, one.figure, one.bound) == ("FAIL", "1.0102x", "at most 1.01x")


def test_the_worst_case_counts_and_a_missing_one_is_named():
    text = "ND at 256x512 and 256x2048"
    rows = rows_of(("ours", 10), ("eager", 80), case="nd_loss 256x512 (1000) float32 cpu")
    one = verdict(found_in(rows), text)
    assert one.status == "not measured"
    assert "not measured: nd_loss 256x2048" in one.where
    rows += rows_of(("ours", 10), ("eager", 60), case="nd_loss 256x2048 (1000) float32 cpu")
    one = verdict(found_in(rows), text)
    assert (one.status, one.figure) == ("FAIL", "6.00x")
    assert one.where.startswith("nd_loss 256x2048")


def test_the_floor_is_that_of_the_warm_allocator():
    text = "ND above: at most 1.3x the bytes floor"
    rows = [
        row
        for case in ("nd_loss 8192x1024 (81) float32 cpu", "nd_loss 65536x1024 (1000) float32 cpu")
        for allocator, us in (("default", 200), ("warm", 125))
        for row in rows_of(("ours", us), ("copy", 100), case=case, allocator=allocator)
    ]
    one = verdict(found_in(rows), text)
    assert (one.status, one.figure, one.bound) == ("PASS", "1.25x", "at most 1.30x")


def test_bfloat16_is_compared_with_float32():
    """Of the same run; a case of float32, measured at another time, is none of it."""
    rows, apart = [], []
    for case in cases.cases("cpu", [torch.bfloat16]):
        rows += rows_of(("ours", 90), ("float32", 100), case=case.name)
        apart += rows_of(("ours", 90), case=case.name)
        apart += rows_of(("ours", 100), case=case.name.replace("bfloat16", "float32"))
    assert verdict(found_in(rows), "bfloat16 within").status == "PASS"
    assert verdict(found_in(apart), "bfloat16 within").status == "not measured"
    rows += rows_of(("ours", 106), ("float32", 100), case="nd_loss 64x64 (100) bfloat16 cpu")
    one = verdict(found_in(rows), "bfloat16 within")
    assert (one.status, one.figure) == ("FAIL", "1.06x")


def test_the_targets_of_a_gpu():
    assert {v.status for v in targets.evaluate(found_in(gpu_rows()), "cuda")} == {"PASS"}
    for change, text in (
        ({"launches": (3, 4)}, "256x512 to 512x2048: at most two launches forward"),
        ({"launches": (2, 4)}, "256x512 to 512x2048: at most one launch backward"),
        ({"syncs": 1}, "no host synchronisation"),
        ({"graph": "no"}, "capturable in a CUDA graph"),
        ({"peak": 1 << 33}, "peak extra memory"),
        ({"copy": 89}, "ND at 65536x2048 and CE+KD at 8192x32768"),
    ):
        assert verdict(found_in(gpu_rows(**change)), text, "cuda").status == "FAIL", text


def test_what_adds_the_losses_of_a_criterion_counts():
    text = "256x512 to 512x2048: at most two launches forward"
    for more, status in ((0, "PASS"), (1, "FAIL")):
        rows = gpu_rows()
        for row in rows:
            if row["case"].startswith("KD++") and row["pass"] == "forward":
                assert row["launches"] == 4
                row["launches"] += more
        assert verdict(found_in(rows), text, "cuda").status == status


def test_the_targets_of_a_step():
    def step(method, ms, us, shape="imagenet"):
        return {"shape": shape, "method": method, "step_ms": ms, "loss_us": us}

    def status(*more):
        return [v.status for v in targets.evaluate_steps([*rows, *more])]

    rows = [step("CE", 100.0, 50.0), step("KD++ loop", 130.0, 30000.0)]
    assert status() == ["not measured"] * 3
    assert status(step("KD++ ours", 100.9, 500.0)) == ["PASS", "PASS", "not measured"]
    assert status(step("KD++ ours", 102.0, 700.0)) == ["FAIL", "FAIL", "not measured"]
    # A detector's plain step has no loss part; 4,096 proposals.
    rows += [step("KD++ ours", 100.9, 500.0)]
    rows += [step("plain", 100.0, None, "detection"), step("KD++ loop", 1e3, 8e5, "detection")]
    assert status(step("KD++ ours", 200.0, 1.5e4, "detection")) == ["PASS"] * 3
    assert status(step("KD++ ours", 200.0, 1.7e4, "detection")) == ["PASS", "PASS", "FAIL"]


def test_targets_of_a_file(tmp_path, capsys):
    path = tmp_path / "a.csv"
    results.append(rows_of(("ours", 10), ("eager", 41)), path)
    assert main(["targets", str(path)]) == 0
    assert "PASS         ND at 64x64: at least 4x eager: 4.10x" in capsys.readouterr().out
    results.append(rows_of(("ours", 10), ("eager", 39)), path)
    assert main(["targets", str(path)]) == 1


def test_targets_of_a_file_are_those_of_the_newest_version(tmp_path, capsys):
    """As in the report: an older commit's figures, or other kernels', pass nothing."""
    path = tmp_path / "a.csv"
    old = {"kernels": "avx512"}
    results.append(rows_of(("ours", 10), ("eager", 41), **old), path)
    results.append(
        rows_of(("ours", 10), ("eager", 80), case="nd_loss 256x512 (1000) float32 cpu", **old),
        path,
    )
    for number, kernels in enumerate(("avx512", "avx512_bf16")):
        case = ("ce_kd_loss", "ce_dkd_loss")[number] + " 128x100 float32 cpu"
        results.append(
            rows_of(("ours", 10), ("eager", 50), case=case, commit="def", kernels=kernels), path
        )
        assert main(["targets", str(path)]) == 0
        printed = capsys.readouterr().out
        assert f"a machine, AVX-512, torch 9.9.0, at def, {kernels} kernels\n" in printed
        assert "not measured ND at 64x64: at least 4x eager\n" in printed
        assert "not measured CE+KD and CE+DKD at 128x100: at least 4x eager: 5.00x" in printed
        assert f"[{case}; not measured: " in printed


def test_what_failed_stays_so_until_it_is_measured_again(tmp_path, capsys):
    path = tmp_path / "a.csv"
    other = {"case": "ce_kd_loss 128x100 float32 cpu", "commit": "def"}
    results.append(rows_of(("ours", 10), ("eager", 39)), path)
    results.append(rows_of(("ours", 10), ("eager", 50), **other), path)
    assert main(["targets", str(path)]) == 1
    printed = capsys.readouterr().out
    told = (
        "FAIL         ND at 64x64: at least 4x eager: 3.90x (at least 4.00x) [nd_loss 64x64 (100)"
    )
    assert f"{told} float32 cpu], at abc, none kernels\n" in printed
    assert "not measured ND at 64x64: at least 4x eager\n" in printed
    results.append(rows_of(("ours", 10), ("eager", 41), commit="def"), path)
    assert main(["targets", str(path)]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_steps_of_a_machine_without_a_ladder_are_evaluated(tmp_path, capsys):
    ladder, walked = tmp_path / "losses.csv", tmp_path / "steps.csv"
    results.append(gpu_rows(), ladder)
    common = {
        **dict.fromkeys(steps.STEP_FIELDS, ""), "device": "cuda", "shape": "imagenet",
        "torch": "9.9.0", "commit": "abc",
    }  # fmt: skip
    times = {"CE": (100, 50), "KD++ loop": (130, 30000), "KD++ ours": (105, 500)}
    for hardware in ("a machine", "another"):
        rows = [
            {**common, "hardware": hardware, "method": method, "step_ms": ms, "loss_us": us}
            for method, (ms, us) in times.items()
        ]
        steps.append_steps(rows, walked)
    assert main(["targets", str(ladder), "--steps", str(walked)]) == 1
    first, second = capsys.readouterr().out.split("another, torch 9.9.0, at abc, ")
    for text in (first, second):
        assert "FAIL         ImageNet-shape step with KD++: at most 1% more" in text
    assert "no host synchronisation" not in second
    # Their last ones, whatever the ladder's version.
    good = {**common, "hardware": "a machine", "commit": "def"}
    times["KD++ ours"] = (100, 500)
    rows = [{**good, "method": m, "step_ms": ms, "loss_us": us} for m, (ms, us) in times.items()]
    bad = steps.read_steps(walked)[:3]
    for word, newest in (("PASS", [*bad, *rows]), ("FAIL", [*rows, *bad])):
        own = tmp_path / f"{word}.csv"
        steps.append_steps(newest, own)
        main(["targets", str(ladder), "--steps", str(own)])
        printed = capsys.readouterr().out
        assert f"{word}         ImageNet-shape step with KD++: at most 1% more" in printed
        assert ("steps at def" in printed) == (word == "PASS")


def test_a_file_without_a_measurement_meets_no_target(tmp_path, capsys):
    path = tmp_path / "a.csv"
    results.append([], path)
    assert main(["targets", str(path)]) == 2
    assert "has nothing that was measured" in capsys.readouterr().err


def test_a_roofline_line_per_kernel():
    """Against the largest copy: of a small one the host's time is all."""
    rows = gpu_rows()
    most = max(row["bytes"] for row in rows)
    for row in rows:
        if row["bytes"] < most:
            row.update(copy_us=1e6, device_us=49.0, device_kernels="rows_kernel:48;scale_kernel:1")
    rows = [row for row in rows if row["bytes"] == most or "nd_loss 256x512" in str(row["case"])]
    lines = report.roofline(found_in(rows))
    large = [line for line in lines if "97.0 of 98.0 us" in line]
    assert any("97 % of the largest copy's" in line for line in large)
    small = next(row for row in rows if row["bytes"] < most and row["peer"] == "ours")
    lines = report.roofline(
        found_in(
            [
                {**row, "device_kernels": "own:48"} if row["case"] == small["case"] else row
                for row in rows
            ]
        )
    )
    (line,) = [line for line in lines if line.startswith("own ")]
    per_cent = 100 * small["bytes"] / 49.0 / (most / 95)
    assert f" {per_cent:.0f} % of the largest copy's" in line
