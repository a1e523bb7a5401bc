"""The results file of training, part by part."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.results import RESULTS, Machine, ResultsFile, Row, latest_settings, machine_of

# What a step is made of, in its order. A compiled forward pass is "forward" as a whole, and all of
# a recorded step but its data "graph".
DATA = ("index", "crop", "normalise")
PARTS = (
    *DATA, "teacher", "student", "criterion", "forward", "backward", "optimiser", "metering",
    "graph",
)  # fmt: skip
SETTING = (
    "preset", "student", "teacher", "data", "images", "batch", "precision", "channels_last",
    "compile", "cuda_graph", "teacher_outputs",
)  # fmt: skip
_MEASURED = (
    "rounds", "steps", "data_ips", "plan_ms", "step_ips", "step_ms", "low_ms", "high_ms",
    "host_ms", *(f"{name}_ms" for name in PARTS), "unexplained_ms", "eval_images", "eval_ips",
    "means_images", "means_ips", "device_ms", "launches", "syncs", "peak_bytes",
)  # fmt: skip
TRAINING_FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels", "device",
    *SETTING, *_MEASURED,
)  # fmt: skip
TRAINING = ResultsFile(
    RESULTS / "training.csv", TRAINING_FIELDS, {"threads", "images", "batch", *_MEASURED}
)
append_training, read_training = TRAINING.append, TRAINING.read


def setting(row: Row) -> tuple[str, ...]:
    """What was measured; rows of one setting replace each other in the report."""
    return tuple(str(row[name]) for name in SETTING)


def latest_training(rows: Iterable[Row]) -> dict[Machine, list[Row]]:
    """Per machine, the last measured first, every setting's last row."""
    return latest_settings(rows, lambda row: machine_of(row, str(row["device"])), SETTING)
