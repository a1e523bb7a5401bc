"""The tables of the report that commands print by themselves, too, and how figures are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.parts import DATA
from benchmarks.results import Row

# -- figures ---------------------------------------------------------------------------------------


def decimal(value: float | None, digits: int = 0) -> str:
    """Digits after the point, and commas; a dash where nothing was measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    rows = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    rows += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def value_of(row: Row, column: str) -> float | None:
    """A column's number; None where it was not measured."""
    return None if row[column] in (None, "") else float(str(row[column]))


def ms_of(row: Row, column: str) -> str:
    """A column's milliseconds, with more digits where they are few."""
    value = value_of(row, column)
    return "-" if value is None else f"{value:,.{1 if value >= 100 else 2 if value >= 1 else 3}f}"


# -- tables ----------------------------------------------------------------------------------------


def loading_table(group: Sequence[Row]) -> str:
    """Images per second by augmentation, storage and workers."""
    return markdown(
        ["", "storage", "workers", "training, images/s (least-most)", "evaluation, images/s"],
        (
            [
                str(row["preset"]),
                str(row["storage"]),
                decimal(value_of(row, "workers")) if value_of(row, "workers") else "none",
                f"{decimal(value_of(row, 'train_ips'))} "
                f"({decimal(value_of(row, 'low_ips'))}-{decimal(value_of(row, 'high_ips'))})",
                decimal(value_of(row, "eval_ips")),
            ]
            for row in group
        ),
    )


def step_table(group: Sequence[Row]) -> str:
    """The methods of one shape: the step, and the loss part relative to the authors' loop."""
    loop = next((row for row in group if row["method"] == "KD++ loop"), None)
    lines = []
    for row in group:
        step, low, high = (float(str(row[name])) for name in ("step_ms", "low_ms", "high_ms"))
        ratio, part = "-", value_of(row, "loss_us")
        if loop is not None and part and str(row["method"]).startswith("KD++"):
            ratio = f"{float(str(loop['loss_us'])) / part:.1f}x"
        lines.append(
            [
                str(row["method"]),
                f"{step:,.1f} ({low:,.1f}-{high:,.1f})",
                f"{1000 * float(str(row['batch'])) / step:,.0f}",
                decimal(part),
                ratio,
            ]
        )
    header = [
        "", "step, ms (20-80 %)", "images/s", "loss part, us", "the loop's loss part takes",
    ]  # fmt: skip
    return markdown(header, lines)


# What is shown, of which columns: the step's parts in order.
SHARES = {
    "data": DATA,
    **{
        name: (name,)
        for name in (
            "teacher", "student", "criterion", "forward", "backward", "optimiser", "metering",
            "graph", "unexplained",
        )
    },
}  # fmt: skip


def share_ms(row: Row, name: str) -> float | None:
    """What one of SHARES takes of a step, in milliseconds."""
    values = [value_of(row, f"{column}_ms") for column in SHARES[name]]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def in_words(row: Row) -> str:
    """A row's setting: precision and what else was chosen, in words."""
    words = [str(row["precision"])]
    for column, word in (
        ("channels_last", "channels last"), ("compile", "compiled"), ("cuda_graph", "recorded"),
        ("teacher_outputs", "the teacher's outputs looked up"),
    ):  # fmt: skip
        words += [word] if row[column] == "yes" else []
    if row["batch"] != 128:
        words.append(f"batch {float(str(row['batch'])):.0f}")
    return ", ".join(words)


def parts_of(rows: Sequence[Row]) -> list[str]:
    """The parts that any of the rows has."""
    return [name for name in SHARES if any(share_ms(row, name) is not None for row in rows)]


def training_table(rows: Sequence[Row]) -> str:
    """A line per setting: images/s, and the shares of the step."""
    shown = parts_of(rows)

    def share(row: Row, name: str) -> str:
        ms, step = share_ms(row, name), value_of(row, "step_ms")
        return "-" if ms is None or not step else f"{round(100 * ms / step, 1) + 0.0:.1f} %"

    return markdown(
        ["", "step, images/s", "step, ms (20-80 %)", *shown, "data alone, images/s",
         "evaluation, images/s", "class means, images/s"],
        (
            [
                f"{row['preset']}, {in_words(row)}",
                decimal(value_of(row, "step_ips")),
                f"{ms_of(row, 'step_ms')} ({ms_of(row, 'low_ms')}-{ms_of(row, 'high_ms')})",
                *(share(row, name) for name in shown),
                *(decimal(value_of(row, c)) for c in ("data_ips", "eval_ips", "means_ips")),
            ]
            for row in rows
        ),
    )  # fmt: skip
