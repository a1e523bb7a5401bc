"""Result rows: measured, printed as a table, appended to a CSV file."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

import dnkd_ext
from benchmarks.cases import Case
from benchmarks.harness import copy_of, measure, warm_allocator

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels", "case", "peer",
    "allocator", "median_us", "low_us", "high_us", "blocks", "bytes", "copy_us",
)  # fmt: skip


def hardware(device: str) -> str:
    """The processor or GPU by name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit measured, with a + where files differ from it."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", "../csrc", "../dnkd_ext", ".", ":!results")
    return (revision or "unknown") + ("+" if changed else "")


def measure_case(case: Case, *, warm: bool, seconds: float = 1.0) -> list[dict[str, object]]:
    """One row per peer, and one for the copy, all from the same run."""
    info = dnkd_ext.build_info()
    with warm_allocator(warm) as is_warm:
        peers = {"copy": copy_of(case.bytes, case.device), **case.peers()}
        timings = measure(peers, case.device, seconds=seconds)
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(case.device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if case.device != "cpu" else "",
        "version": dnkd_ext.__version__,
        "kernels": info["cpu_isa"] if case.device == "cpu" else f"CUDA {info['cuda']}",
        "case": case.name,
        "allocator": "warm" if is_warm or case.device != "cpu" else "default",
        "bytes": case.bytes,
        "copy_us": round(timings["copy"].median * 1e6, 2),
    }
    return [
        {
            **common,
            "peer": name,
            "median_us": round(t.median * 1e6, 2),
            "low_us": round(t.low * 1e6, 2),
            "high_us": round(t.high * 1e6, 2),
            "blocks": t.blocks,
        }
        for name, t in timings.items()
    ]


def append(rows: list[dict[str, object]], path: Path) -> None:
    """Add rows to a CSV file, which gets a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, object]]) -> str:
    """Microseconds per forward and backward, and the ratios to ours."""
    lines = [
        f"{'forward + backward, us (median)':58}{'ours':>9}{'loop':>9}{'eager':>10}{'compile':>10}"
        f"{'copy':>9}  {'ours is faster than':>32}  {'time':>6} {'again':>6}",
        f"{'':58}{'':9}{'':9}{'':10}{'':10}{'':9}  {'loop':>10}{'eager':>11}{'compile':>11}"
        f"  {'/copy':>6} {'/ours':>6}",
    ]
    groups: dict[tuple[object, object], dict[object, float]] = {}
    for row in rows:
        key = row["case"], row["allocator"]
        groups.setdefault(key, {})[row["peer"]] = float(str(row["median_us"]))
    for (case, allocator), us in groups.items():

        def cell(peer, us=us):
            return f"{us[peer]:.0f}" if peer in us else "-"

        def ratio(peer, us=us):
            return f"{us[peer] / us['ours']:.1f}x" if peer in us else "-"

        lines.append(
            f"{case + ', ' + allocator + ' allocator':58}{cell('ours'):>9}{cell('loop'):>9}"
            f"{cell('eager'):>10}{cell('compile'):>10}{cell('copy'):>9}  {ratio('loop'):>10}"
            f"{ratio('eager'):>11}{ratio('compile'):>11}  {us['ours'] / us['copy']:>6.2f} "
            f"{us['noise'] / us['ours']:>6.2f}"
        )
    lines.append(
        "copy: as many bytes as ours must move (features or logits of both, the gradient, each "
        "class mean once), half read and half written, in the same run. again: ours once more."
    )
    return "\n".join(lines)
