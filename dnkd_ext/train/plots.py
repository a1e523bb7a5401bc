"""PNG plots of training runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnkd_ext._files import replacing

__all__ = ["new_figure", "plot_accuracy", "plot_curves", "plot_features", "save_figure"]

# Okabe and Ito's colours, which are told apart without red or green; a dash and a marker besides.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """A figure and its axes, apart from pyplot, whose backend and open figures stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def save_figure(figure: Any, path: Path | str, dpi: int = 130) -> None:
    """Write a file of the kind that its name says, which replaces an older one only when whole."""
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:])


def plot_accuracy(
    accuracies: dict[str, list[float]], teacher: float, title: str, path: Path
) -> None:
    """Test accuracy of every seed of every method, mean and deviation, and the teacher's."""
    figure, axes = new_figure(6.4, 4.2)
    for position, values in enumerate(accuracies.values()):
        percent = 100 * np.asarray(values)
        spread = percent.std(ddof=1) if len(percent) > 1 else 0.0
        axes.errorbar(
            position, percent.mean(), yerr=spread, fmt="o", color="black", capsize=6, zorder=3
        )
        offsets = np.linspace(-0.12, 0.12, len(percent)) if len(percent) > 1 else [0.12]
        axes.scatter(
            position + np.asarray(offsets),
            percent,
            s=18,
            alpha=0.6,
            color=COLOURS[position % len(COLOURS)],
            zorder=2,
        )
    axes.axhline(
        100 * teacher, linestyle="--", color="grey", label=f"teacher {100 * teacher:.2f} %"
    )
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set_xlim(-0.6, len(accuracies) - 0.4)
    axes.set_xlabel("training loss of the student")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, title="dots: seeds; bar: mean ± std")
    save_figure(figure, path)


def plot_features(norms: dict[str, Any], cosines: dict[str, Any], title: str, path: Path) -> None:
    """Distributions of the feature norm and of the cosine to the class mean, per model.

    Where few values are far beyond all others, they are left out, which the axis says.
    """
    figure, (left, right) = new_figure(10.5, 4.2, columns=2)
    for axes, values, label in (
        (left, norms, "feature norm"),
        (right, cosines, "cosine to the mean teacher feature of the class"),
    ):
        everything = np.concatenate([np.asarray(v) for v in values.values()])
        low, high = everything.min(), everything.max()
        usual = max(np.quantile(np.asarray(v), 0.99, method="lower") for v in values.values())
        if high - low > 2 * (usual - low) > 0:
            high, label = usual, f"{label}, the largest left out (up to {high:.3g})"
        bins = np.linspace(low, high, 50)
        students = [name for name in values if name != "teacher"]
        for name, value in values.items():
            is_teacher = name == "teacher"
            axes.hist(
                np.asarray(value),
                bins=bins,
                density=True,
                histtype="step",
                linewidth=2 if is_teacher else 1.5,
                color="black" if is_teacher else COLOURS[students.index(name) % len(COLOURS)],
                linestyle="--" if is_teacher else "-",
                label=f"{name} (mean {np.mean(value):.2f})",
            )
        axes.set_xlabel(label)
        axes.set_ylabel("density of test images")
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    figure.suptitle(title)
    save_figure(figure, path)


# -- curves over the epochs -----------------------------------------------------------------------

# Of every panel its title, the label of its axis, its scale, and the columns that are drawn in it,
# each with the word that tells it from others in the legend. Panels without a column are left out.
PANELS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "Loss",
        "weighted loss, mean per image",
        "log",
        {"train_loss": "training", "test_loss": "test"},
    ),
    ("Cross entropy", "cross entropy (nat)", "log", {"ce": ""}),
    ("Boxes", "smooth L1 of the offsets", "log", {"box": "box head", "rpn_box": "RPN"}),
    ("Objectness", "binary cross entropy (nat)", "log", {"objectness": ""}),
    ("Distillation", "distillation term, unweighted", "log", {"kd": ""}),
    ("Feature direction and norm", "ND loss, unweighted", "linear", {"nd": ""}),
    (
        "Accuracy",
        "top-1 accuracy (%)",
        "linear",
        {"test_top1": "test", "train_top1": "training", "ema_test_top1": "average"},
    ),
    (
        "Average precision",
        "AP (%)",
        "linear",
        {"test_ap": "AP", "test_ap50": "AP50", "ema_test_ap": "average"},
    ),
    ("Learning rate", "learning rate", "log", {"lr": ""}),
)


# What decides which weights of a run are the best: the first that it has.
DECIDING = ("ema_test_top1", "test_top1", "ema_test_ap", "test_ap")

# How the columns of a panel are told apart, each with the word for it: a run's are of one colour.
PLAIN, THIN, THICK = (
    ("", {"linewidth": 1.6}),
    ("thin: ", {"linewidth": 0.8, "alpha": 0.7}),
    ("thick: ", {"linewidth": 3.2, "alpha": 0.5}),
)

# Terms of the loss, whose columns may have train_ before their names.
OF_TRAINING = ("ce", "box", "rpn_box", "objectness", "kd", "nd")


def plot_curves(
    rows_by_run: Mapping[str, Iterable[Mapping[str, Any]]], path: Path | str, title: str = ""
) -> None:
    """Losses, accuracy and learning rate over the epochs, all runs over one another.

    A panel per quantity: the weighted loss, its terms, the accuracy, with the best epoch's marked
    and in the legend below, and the learning rate. Where a moving average of the weights was
    evaluated it is drawn, too, and the best is its. A panel that no run has a value for is left
    out; a term of the loss that is 0 in every epoch of a run is none of that run's, and an ND loss
    of 0 in an epoch, whose weight is 0 there, leaves a gap.

    Args:
        rows_by_run: per name of a run its logged rows, one per epoch and in any order. A row has
            ``epoch``, a number, and any of ``lr``, ``train_loss``, ``test_loss``, ``ce``,
            ``kd``, ``nd`` (or ``train_ce``, ``train_kd``, ``train_nd``), ``train_top1`` and
            ``test_top1`` in percent, and of a detector ``box``, ``rpn_box``, ``objectness`` (or
            ``train_box`` and so on), ``test_ap`` and ``test_ap50`` in percent; of the average
            ``ema_test_top1`` or ``ema_test_ap``; numbers, or their text as a CSV file has it. What
            is missing, None, empty or not finite leaves a gap; other columns are passed over.
        path: of the PNG file.
        title: above the panels.

    Raises:
        ValueError: no run, a row without an epoch or with a value that is no number, or nothing
            to draw.
    """
    curves = {run: _columns(run, rows) for run, rows in rows_by_run.items()}
    if not curves:
        raise ValueError("rows_by_run must have at least one run")
    panels = [
        panel
        for panel in PANELS
        if any(np.isfinite(c[name]).any() for c in curves.values() for name in panel[3])
    ]
    if not panels:
        known = ", ".join(name for panel in PANELS for name in panel[3])
        raise ValueError(
            f"no run has a finite value in any of the columns {known}; a term of the loss that "
            "is 0 throughout is none"
        )
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(1.2 + 4.4 * columns, 0.8 + 3.4 * rows, rows, columns)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    cells = np.atleast_1d(axes).ravel()
    for unused in cells[len(panels) :]:
        unused.remove()
    bests = {run: _best(curve) for run, curve in curves.items()}
    for axis, panel in zip(cells, panels, strict=False):
        _draw_panel(axis, panel, curves, bests)
    alone = len(curves) == 1
    handles = [_line(run, i, bests[run], alone) for i, run in enumerate(curves)]
    heading = figure.suptitle(title or (next(iter(curves)) if alone else ""))
    _make_room(figure, heading, [handle for handle in handles if handle.get_label()])
    save_figure(figure, path)


class _Best(NamedTuple):
    """The best epoch of a run, by the column that decides."""

    column: str
    epoch: float
    value: float

    def __str__(self) -> str:
        told = f"best {self.value:.2f} % in epoch {self.epoch:.0f}"
        return f"{told} (average)" if self.column.startswith("ema_") else told


def _best(curve: dict[str, np.ndarray]) -> _Best | None:
    for column in DECIDING:
        values = np.where(np.isfinite(curve[column]), curve[column], np.nan)
        if not np.isnan(values).all():
            place = int(np.nanargmax(values))
            return _Best(column, curve["epoch"][place], values[place])
    return None


def _style(position: int) -> dict[str, Any]:
    """Colour and dash of a run: new dashes when the colours are used up."""
    return {
        "color": COLOURS[position % len(COLOURS)],
        "linestyle": DASHES[position // len(COLOURS) % len(DASHES)],
    }


def _mark(position: int) -> dict[str, Any]:
    """The marker of a run's best epoch, another where a colour comes again."""
    return {
        "marker": MARKERS[(position + position // len(COLOURS)) % len(MARKERS)],
        "markersize": 8,
        "markeredgecolor": "black",
    }


def _line(run: str, position: int, best: _Best | None, alone: bool) -> Any:
    """A run in the legend: its name, unless that is the title, and its best epoch."""
    from matplotlib.lines import Line2D

    words = [] if alone else [run]
    words += [str(best)] if best else []
    mark = _mark(position) if best else {}
    return Line2D([], [], label=": ".join(words), **_style(position), **mark)


def _make_room(figure: Any, heading: Any, handles: list[Any]) -> None:
    """The legend below all panels, in as many columns as fit; the figure grows by what is told."""
    width, height = figure.get_size_inches()
    wanted = heading.get_window_extent().width / figure.dpi
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            handlelength=4,  # so that dashes show beside the marker
        )
        box = legend.get_window_extent()
        # Text is a little wider or narrower at another resolution, at which the file may be.
        needed = 1.05 * box.width / figure.dpi
        if needed <= width or columns == 1:
            wanted = max(wanted, needed)
            height += box.height / figure.dpi
            break
        legend.remove()
    figure.set_size_inches(max(width, wanted + 0.2), height)


def _columns(run: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The rows by epoch as one float64 array per column, NaN where nothing is.

    A term of the loss that is 0 throughout is one that the run does not use, and is NaN, too, as is
    an ND loss of 0 in an epoch: there its weight is, as at the beginning of a ramp.
    """
    rows = list(rows)
    names = [name for panel in PANELS for name in panel[3]]
    table = {name: [] for name in ("epoch", *names)}
    for number, row in enumerate(rows):
        for name, values in table.items():
            value = row.get(name)
            if value in (None, "") and name in OF_TRAINING:
                value = row.get(f"train_{name}")
            try:
                values.append(math.nan if value in (None, "") else float(value))
            except (TypeError, ValueError):
                raise ValueError(
                    f"row {number} of run {run!r} has {name}={value!r}, which is no number"
                ) from None
        if not math.isfinite(table["epoch"][-1]):
            raise ValueError(f"row {number} of run {run!r} has no epoch")
    order = np.argsort(table["epoch"], kind="stable")
    found = {name: np.asarray(values, float)[order] for name, values in table.items()}
    for name in OF_TRAINING:
        if not found[name][np.isfinite(found[name])].any():
            found[name][:] = np.nan
    found["nd"][found["nd"] == 0] = np.nan
    return found


def _plain_numbers():
    """The ticks that matplotlib would label on a logarithmic axis, as 0.2 and not 2 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    return Plain()


def _draw_panel(
    axis: Any,
    panel: tuple[str, str, str, dict[str, str]],
    curves: dict[str, dict[str, np.ndarray]],
    bests: dict[str, _Best | None],
) -> None:
    from matplotlib.ticker import MaxNLocator

    name, label, scale, columns = panel
    drawn: list[np.ndarray] = []
    used = [c for c in columns if any(np.isfinite(one[c]).any() for one in curves.values())]
    kinds = dict.fromkeys(used, THIN)
    kinds[used[0]] = PLAIN
    kinds |= {column: THICK for column in used[1:] if column.startswith("ema_")}
    for position, (run, curve) in enumerate(curves.items()):
        for column in used:
            values = np.where(np.isfinite(curve[column]), curve[column], np.nan)
            if np.isnan(values).all():
                continue
            drawn.append(values)
            axis.plot(
                curve["epoch"],
                values,
                # A single epoch would draw no line.
                marker="." if np.isfinite(values).sum() == 1 else None,
                **_style(position),
                **kinds[column][1],
            )
        best = bests[run]
        if best is not None and best.column in used:
            axis.plot(
                best.epoch,
                best.value,
                **_style(position) | _mark(position) | {"linestyle": "none"},
                zorder=3,
            )
    # What is 0 in the ramp's first epoch, or constant, has no place on a logarithmic axis.
    positive = np.concatenate(drawn)
    positive = positive[np.isfinite(positive)]
    if scale == "log" and positive.min() > 0 and positive.max() > 1.5 * positive.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain_numbers())
        axis.yaxis.set_minor_formatter(_plain_numbers())
    words = [kinds[column][0] + columns[column] for column in used if columns[column]]
    if words:
        name += f" ({'; '.join(words)})"
    axis.set_title(name)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
