"""The results file of end-to-end steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.results import RESULTS, Row, append, machine_of, read

STEPS = RESULTS / "steps.csv"
STEP_FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels", "device",
    "shape", "models", "batch", "image", "dtype", "method", "step_ms", "low_ms", "high_ms",
    "rounds", "loss_us", "loss_low_us", "loss_high_us",
)  # fmt: skip
STEP_NUMBERS = {
    "threads", "batch", "image", "step_ms", "low_ms", "high_ms", "rounds", "loss_us",
    "loss_low_us", "loss_high_us",
}  # fmt: skip


def image_width(shape: str, height: int) -> int:
    """Of a shape's images: those of a detector are wide, the others square."""
    return height * 1333 // 800 if shape == "detection" else height


def append_steps(rows: list[Row], path: Path) -> None:
    """Add the steps of one shape, all or none."""
    append(rows, path, STEP_FIELDS)


def read_steps(path: Path) -> list[Row]:
    """The rows of a file of steps."""
    return read(path, STEP_FIELDS, STEP_NUMBERS)


def latest_steps(rows: Iterable[Row]) -> list[list[Row]]:
    """Per machine and shape the rows that were measured together last."""
    same = (
        "date", "commit", "hardware", "torch", "kernels", "device", "shape", "batch", "image",
        "dtype",
    )  # fmt: skip
    found: list[list[Row]] = []
    for row in rows:
        group = found[-1] if found else []
        if (
            not group
            or any(group[0][name] != row[name] for name in same)
            or row["method"] in {other["method"] for other in group}
        ):
            found.append([])
        found[-1].append(row)
    return list(
        {
            (machine_of(group[0], str(group[0]["device"])), group[0]["shape"]): group
            for group in found
        }.values()
    )
