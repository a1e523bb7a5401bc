"""The results file of end-to-end steps."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.results import RESULTS, ResultsFile, Row, machine_of

STEP_FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels", "device",
    "shape", "models", "batch", "image", "dtype", "method", "step_ms", "low_ms", "high_ms",
    "rounds", "loss_us", "loss_low_us", "loss_high_us",
)  # fmt: skip
_NUMBERS = {
    "threads", "batch", "image", "step_ms", "low_ms", "high_ms", "rounds", "loss_us",
    "loss_low_us", "loss_high_us",
}  # fmt: skip
STEPS = ResultsFile(RESULTS / "steps.csv", STEP_FIELDS, _NUMBERS)
append_steps, read_steps = STEPS.append, STEPS.read


def image_width(shape: str, height: int) -> int:
    """Of a shape's images: those of a detector are wide, the others square."""
    return height * 1333 // 800 if shape == "detection" else height


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
