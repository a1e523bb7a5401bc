"""Results that were never measured, for the tests of what is made of results."""

from __future__ import annotations

from benchmarks import cases, results


def rows_of(*peers_us, case="nd_loss 64x64 (100) float32 cpu", allocator="default", **columns):
    """Rows of one case: (peer, us), or (peer, us, pass)."""
    common = {
        **dict.fromkeys(results.FIELDS, ""), "date": "2026-01-01", "commit": "abc",
        "hardware": "a machine", "torch": "9.9.0", "version": "0.0", "kernels": "none",
        "case": case, "allocator": allocator, "blocks": 7, "threads": 1, **columns,
    }  # fmt: skip
    return [
        {
            **common, "peer": peer, "pass": which[0] if which else results.BOTH,
            "median_us": us, "low_us": us * 0.99, "high_us": us * 1.01,
        }
        for peer, us, *which in peers_us
    ]  # fmt: skip


def found_in(rows):
    (found,) = results.latest(results.measurements(rows)).values()
    return found


def gpu_rows(*, launches=(2, 3), syncs=0, graph="yes", peak=None, copy=95):
    rows = []
    for case in cases.cases("cuda"):
        forward, both = (count * case.losses for count in launches)
        for row in rows_of(
            ("copy", copy), ("ours", 100), ("eager", 500), ("compile", 250),
            ("ours", 60, results.FORWARD),
            case=case.name, allocator="warm", syncs=syncs, graph=graph,
        ):  # fmt: skip
            row["launches"] = forward if row["pass"] == results.FORWARD else both
            row["peak_bytes"] = case.gradient_bytes + 8 if peak is None else peak
            row["device_us"], row["bytes"], row["copy_us"] = 98.0, case.bytes, copy
            row["device_kernels"] = "rows_kernel:97;scale_kernel:1"
            rows.append(row)
    return rows
