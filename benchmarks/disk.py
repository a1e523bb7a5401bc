"""The results file of images from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import RESULTS, Row, append, processor, read

LOADING = RESULTS / "loading.csv"
LOADING_SETTING = ("preset", "data", "storage", "images", "batch", "image", "workers")
_MEASURED = ("rounds", "train_ips", "low_ips", "high_ips", "eval_ips")
LOADING_FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels",
    *LOADING_SETTING, *_MEASURED,
)  # fmt: skip
LOADING_NUMBERS = {"threads", "images", "batch", "image", "workers", *_MEASURED}


def append_loading(rows: list[Row], path: Path) -> None:
    """Add the rows of what was measured."""
    append(rows, path, LOADING_FIELDS)


def read_loading(path: Path) -> list[Row]:
    """The rows of a file of loaders."""
    return read(path, LOADING_FIELDS, LOADING_NUMBERS)


def latest_loading(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Per machine (processor, torch), the last measured first, every setting's last row."""
    machines: dict[tuple[str, str], dict[tuple[str, ...], Row]] = {}
    for row in rows:
        machine = processor(row), str(row["torch"])
        found = machines.pop(machine, {})
        found[tuple(str(row[name]) for name in LOADING_SETTING)] = row
        machines[machine] = found
    return {machine: list(machines[machine].values()) for machine in reversed(machines)}
