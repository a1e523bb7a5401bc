"""The results file of images from disk."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import RESULTS, ResultsFile, Row, latest_settings, processor

_SETTING = ("preset", "data", "storage", "images", "batch", "image", "workers")
_MEASURED = ("rounds", "train_ips", "low_ips", "high_ips", "eval_ips")
LOADING_FIELDS = (
    "date", "commit", "hardware", "threads", "torch", "cuda", "version", "kernels",
    *_SETTING, *_MEASURED,
)  # fmt: skip
LOADING = ResultsFile(
    RESULTS / "loading.csv",
    LOADING_FIELDS,
    {"threads", "images", "batch", "image", "workers", *_MEASURED},
)
append_loading, read_loading = LOADING.append, LOADING.read


def latest_loading(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Per machine (processor, torch), the last measured first, every setting's last row."""
    return latest_settings(rows, lambda row: (processor(row), str(row["torch"])), _SETTING)
