"""``python -m benchmarks report``: its plots, from the results files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.parts import latest_training
from benchmarks.results import Latest, Measurement, Row, allocator_of, known_machines, ordered
from benchmarks.tables import decimal, in_words, ms_of, parts_of, share_ms, value_of
from dnkd_ext._files import replacing

PLOTS = {
    "time": "time against size",
    "bandwidth": "fraction of the copy's bandwidth",
    "speedup": "how many times as long the peers take",
    "memory": "peak memory per peer",
}
# Okabe and Ito's colours, which are told apart without red or green; a marker each besides.
STYLES = {
    "ours": ("#000000", "o"),
    "module": ("#999999", "d"),
    "compiled": ("#56B4E9", "v"),
    "loop": ("#CC79A7", "x"),
    "eager": ("#E69F00", "s"),
    "compile": ("#0072B2", "^"),
    "compile-max": ("#009E73", "P"),
    "liger": ("#D55E00", "*"),
    "copy": ("#999999", "."),
}


def plot_path(kind: str, device: str) -> str:
    """Of a plot, from the folder of README.md."""
    return f"results/plots/{device}-{kind}.png"


def _with(found: Latest, device: str, dtype: str = "float32") -> list[tuple[Case, Measurement]]:
    measured = ordered(found, allocator_of(device))
    return [(case, one) for case, one in measured if str(case.dtype) == f"torch.{dtype}"]


def can_plot(kind: str, found: Latest, device: str) -> bool:
    """Whether anything was measured that this kind of plot shows."""
    cases = _with(found, device)
    if kind == "memory":
        return any(one.value("peak_bytes") is not None for _, one in cases)
    return any(one.us() is not None for _, one in cases)


def plot(rows: Sequence[Row], folder: Path, training: Sequence[Row] = ()) -> list[Path]:
    """Write the plots of the last measured machine of every device; the paths written."""
    drawings = {
        "time": _plot_time,
        "bandwidth": _plot_bandwidth,
        "speedup": _plot_speedup,
        "memory": _plot_memory,
    }
    written, seen = [], set()
    for (hardware, device, torch), found in known_machines(rows).items():
        if device in seen:
            continue
        seen.add(device)
        for kind, draw in drawings.items():
            if can_plot(kind, found, device):
                path = folder / plot_path(kind, device)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(_with(found, device), found, f"{hardware}, torch {torch}, float32", path)
                written.append(path)
    drawn = set()
    for (hardware, device, torch), group in latest_training(training).items():
        if device not in drawn:
            drawn.add(device)
            path = folder / plot_path("training", device)
            path.parent.mkdir(parents=True, exist_ok=True)
            _plot_training(group, f"{hardware}, torch {torch}: a training step", path)
            written.append(path)
    return written


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the plots need matplotlib ({error}); install it, or pass --no-plots"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt, figure, path: Path) -> None:
    # Without the version of matplotlib, so that the same figures are the same file.
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)


def _plot_time(cases, _found, title: str, path: Path) -> None:
    """Time of forward and backward against the elements of a panel's inputs, both logarithmic."""
    plt = _pyplot()
    families: dict[str, list[tuple[Case, Measurement]]] = {}
    for case, one in cases:
        families.setdefault(case.family, []).append((case, one))
    families = {name: sizes for name, sizes in families.items() if len(sizes) > 1} or families
    figure, axes = plt.subplots(
        1, len(families), figsize=(4.3 * len(families), 4.8), layout="constrained", squeeze=False
    )
    handles = {}
    for axis, (name, sizes) in zip(axes[0], families.items(), strict=True):
        for peer, (colour, marker) in STYLES.items():
            if peer in ("module", "compiled"):
                continue  # nearly ours: in the table
            points = sorted(
                (case.gradient_bytes / case.dtype.itemsize, us)
                for case, one in sizes
                if (us := one.us(peer)) is not None
            )
            if points:
                line = axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=":" if peer == "copy" else "-",
                    linewidth=2.2 if peer == "ours" else 1.4,
                )
                handles[peer] = line[0]
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("elements of the student's input (rows x columns)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward (µs)")
    figure.suptitle(title)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    _save(plt, figure, path)


def _bars(cases, series, title: str, label: str, path: Path, *, log: bool, reference=None) -> None:
    """Grouped horizontal bars: a group per case, a bar per series (name, colour, value)."""
    plt = _pyplot()
    series = [
        (name, colour, values)
        for name, colour, values in series
        if any(value is not None for value in values)
    ]
    height = 0.8 / max(1, len(series))
    figure, axis = plt.subplots(
        figsize=(8.6, 1.3 + 0.16 * len(cases) * (len(series) + 1)), layout="constrained"
    )
    for number, (name, colour, values) in enumerate(series):
        positions = [row - 0.4 + (number + 0.5) * height for row in range(len(cases))]
        shown = [(p, v) for p, v in zip(positions, values, strict=True) if v is not None]
        bars = axis.barh(*zip(*shown, strict=True), height=height, color=colour, label=name)
        axis.bar_label(bars, labels=[_short(v) for _, v in shown], fontsize=7, padding=2)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    if reference is not None:
        axis.axvline(reference, color="black", linewidth=1, linestyle="--")
    axis.margins(x=0.12)
    axis.set_yticks(range(len(cases)), [case.label for case, _ in cases])
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=max(1, len(series)))
    _save(plt, figure, path)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _plot_bandwidth(cases, found: Latest, title: str, path: Path) -> None:
    series = [
        (peer, STYLES[peer][0], [one.ratio("copy", to=peer) for _, one in cases])
        for peer in ("ours", "compile", "eager")
    ]
    warm = [found.get((case.name, "warm")) for case, _ in cases]
    if cases[0][0].device == "cpu":
        series.insert(
            1, ("ours, warm allocator", "#56B4E9", [o.ratio("copy") if o else None for o in warm])
        )
    _bars(
        cases,
        series,
        title,
        "bytes that must be moved / time, as a fraction of a copy of as many bytes (1 = the copy)",
        path,
        log=False,
        reference=1.0,
    )


def _plot_speedup(cases, _found, title: str, path: Path) -> None:
    series = [
        (peer, STYLES[peer][0], [one.ratio(peer) for _, one in cases])
        for peer in STYLES
        if peer not in ("ours", "copy")
    ]
    _bars(
        cases, series, title, "time of the peer / time of ours (1 = as fast; logarithmic)", path,
        log=True, reference=1.0,
    )  # fmt: skip


def _plot_memory(cases, _found, title: str, path: Path) -> None:
    def mebibytes(one: Measurement, peer: str) -> float | None:
        value = one.value("peak_bytes", peer)
        return None if value is None else value / 2**20

    series = [
        (peer, colour, [mebibytes(one, peer) for _, one in cases])
        for peer, (colour, _) in STYLES.items()
        if peer not in ("copy", "module", "compiled")  # the latter two hold what ours does
    ]
    _bars(cases, series, title, "peak memory beyond the inputs (MiB, logarithmic)", path, log=True)


# Of the parts, in the order of tables.SHARES; neighbours differ in lightness, too.
SHARE_COLOURS = {
    "data": "#000000", "teacher": "#56B4E9", "student": "#E69F00", "criterion": "#CC79A7",
    "forward": "#56B4E9", "backward": "#0072B2", "optimiser": "#F0E442", "metering": "#D55E00",
    "graph": "#009E73", "unexplained": "#BBBBBB",
}  # fmt: skip


def _plot_training(rows: Sequence[Row], title: str, path: Path) -> None:
    """A bar per setting, of the parts' shares of the step one after another."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9.6, 1.8 + 0.55 * len(rows)), layout="constrained")
    ends = [0.0] * len(rows)
    steps = [value_of(row, "step_ms") or math.inf for row in rows]
    for name in parts_of(rows):
        widths = [
            max(0.0, 100 * (share_ms(row, name) or 0.0) / step)
            for row, step in zip(rows, steps, strict=True)
        ]
        axis.barh(
            range(len(rows)), widths, left=ends, height=0.6, color=SHARE_COLOURS[name],
            edgecolor="white", linewidth=0.4, label=name,
        )  # fmt: skip
        for number, width in enumerate(widths):
            if width >= 4:
                dark = name in ("data", "backward", "metering", "graph")
                axis.text(
                    ends[number] + width / 2, number, f"{width:.0f} %", fontsize=8,
                    ha="center", va="center", color="white" if dark else "black",
                )  # fmt: skip
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for number, row in enumerate(rows):
        text = f"{ms_of(row, 'step_ms')} ms, {decimal(value_of(row, 'step_ips'))} images/s"
        axis.text(max(ends) + 1.5, number, text, va="center", fontsize=8)
    axis.set_xlim(0, max(ends) + 30)
    axis.set_xticks(range(0, 101, 20))
    axis.set_yticks(
        range(len(rows)), [f"{row['preset']}\n{in_words(row)}" for row in rows], fontsize=8
    )
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("percent of the step (beyond 100: steps with marks were slower)")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=8, fontsize=8)
    _save(plt, figure, path)
