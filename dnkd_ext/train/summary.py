"""Results of runs for reading: a line for each, and a table over their seeds."""

from __future__ import annotations

import json
import statistics
import warnings
from pathlib import Path
from typing import Any

from dnkd_ext.train.config import FREE, TrainConfig, flatten
from dnkd_ext.train.files import RESULT
from dnkd_ext.train.presets import preset_names

__all__ = ["all_results", "format_summary", "is_result", "result_line", "summary"]


def all_results(out: Path) -> list[dict[str, Any]]:
    """Those of all runs below a folder, also of earlier calls.

    A warning names files that are no results of runs, which are left out.
    """
    results = []
    for path in sorted(out.rglob(RESULT)):
        try:
            result = json.loads(path.read_text("utf-8"))
            wrong = None if is_result(result) else "it is no result of a run"
        except (ValueError, OSError) as error:
            wrong = str(error)
        if wrong is None:
            results.append(result)
        else:
            warnings.warn(f"{path} is left out of the table: {wrong}", stacklevel=2)
    return results


def is_result(value: Any) -> bool:
    """Whether it has what the table is made of."""
    if not isinstance(value, dict):
        return False
    figures = [name for name in FIGURES if f"best_{name}" in value]
    number = int | float
    wanted = {"config": dict, "seed": int, "best_epoch": int, "training_seconds": number}
    # What may be missing or null, of a run without preset or of an earlier version.
    optional = {"preset": str, "metric": str, "teacher_top1": number}
    for name in figures:
        wanted |= {f"best_{name}": number, f"last_{name}": number}
        optional[f"published_{name}"] = number
    return (
        bool(figures)
        and value.keys() >= {"preset", *(f"published_{name}" for name in figures)}
        and all(isinstance(value.get(name), kind) for name, kind in wanted.items())
        and all(isinstance(value.get(name), kind | None) for name, kind in optional.items())
    )


def result_line(result: dict[str, Any], out: Path) -> str:
    """What the terminal shows of a finished run."""
    name = _figure(result)
    published = result[f"published_{name}"]
    beside = "" if published is None else f" (published, on all data: {published:.2f})"
    if "teacher_top1" in result:
        beside += f", the teacher's {result['teacher_top1']:.2f}"
    # Results of earlier versions do not say what decides.
    metric = result.get("metric") or ""
    of_average = f" of the average ({metric})" if metric.startswith("ema_") else ""
    return (
        f"{result['preset'] or 'run'}, seed {result['seed']}: best {FIGURES[name]}{of_average} "
        f"{result[f'best_{name}']:.2f} "
        f"in epoch {result['best_epoch']}, last {result[f'last_{name}']:.2f}{beside}; "
        f"{result['training_seconds']:.0f} s; results in {out}"
    )


# What a result's accuracy is called: in its file, and for reading.
FIGURES = {"top1": "top-1", "ap": "AP"}


def _figure(result: dict[str, Any]) -> str:
    return next(name for name in FIGURES if f"best_{name}" in result)


# What a run may go on with elsewhere, but what may be another thing from run to run.
OTHER_THINGS = {"data", "teacher_weights", "class_means", "backbone_weights"}


def _alike(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A preset's results by what their options are that not all of them have: for one, by ""."""
    defaults = flatten(TrainConfig())
    configs = [{**defaults, **result["config"]} for result in results]
    differing = [
        name
        for name in configs[0]
        if name not in FREE - OTHER_THINGS | {"seed"}
        and any(config.get(name) != configs[0][name] for config in configs)
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for result, config in zip(results, configs, strict=True):
        told = ", ".join(f"{name} {config.get(name)}" for name in differing)
        groups.setdefault(told, []).append(result)
    return groups


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per preset: best and last accuracy (or AP) over its seeds, and the published.

    In the order of ``dnkd presets``, behind it all others in that of the results.
    Of a preset that ran with several configurations a row for each; ``differing`` has the options
    in which they differ.
    """
    known = {name: number for number, name in enumerate(preset_names())}
    presets = sorted(
        dict.fromkeys(result["preset"] for result in results),
        key=lambda name: known.get(name, len(known)),
    )
    groups = [
        (preset, told, own)
        for preset in presets
        for told, own in _alike([r for r in results if r["preset"] == preset]).items()
    ]
    rows = []
    for preset, told, own in groups:
        row: dict[str, Any] = {"preset": preset, "seeds": len(own)}
        figure = _figure(own[0])
        for name in (f"best_{figure}", f"last_{figure}"):
            values = [result[name] for result in own]
            row[name] = round(statistics.fmean(values), 3)
            row[f"{name}_std"] = round(statistics.stdev(values), 3) if len(values) > 1 else None
        row[f"published_{figure}"] = own[0][f"published_{figure}"]
        row["training_seconds"] = round(sum(r["training_seconds"] for r in own) / len(own), 1)
        row["differing"] = told
        rows.append(row)
    return rows


def format_summary(rows: list[dict[str, Any]]) -> str:
    """The table for the terminal."""

    def cell(row: dict[str, Any], which: str) -> str:
        name = f"{which}_{_figure(row)}"
        spread = row[f"{name}_std"]
        return f"{row[name]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")

    width = max(len("preset"), *(len(row["preset"] or "run") for row in rows))
    words = "/".join(dict.fromkeys(FIGURES[_figure(row)] for row in rows))
    lines = [
        f"{'preset':{width}}  seeds  {'best ' + words:>14}  {'last ' + words:>14}  published  "
        "seconds/run"
    ]
    for row in rows:
        known = row[f"published_{_figure(row)}"]
        published = "-" if known is None else f"{known:.2f}"
        lines.append(
            f"{row['preset'] or 'run':{width}}  {row['seeds']:5}  {cell(row, 'best'):>14}  "
            f"{cell(row, 'last'):>14}  {published:>9}  {row['training_seconds']:11.0f}"
            + (f"  with {row['differing']}" if row["differing"] else "")
        )
    lines.append("accuracies in percent, mean ± std over seeds; published: best epoch, all data")
    return "\n".join(lines)
