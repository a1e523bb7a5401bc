"""Plots: what stands in the figures, looked up in matplotlib's own objects."""

from __future__ import annotations

import csv
import math
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from dnkd_ext.train import plots


def rows(seed=0, epochs=12):
    """A log like that of a run: the ramp leaves kd's weight 0 at first, accuracy peaks early."""
    rng = np.random.default_rng(seed)
    return [
        {
            "epoch": epoch,
            "lr": 0.1 * 0.1 ** (epoch // 5),
            "train_loss": 4.0 * 0.8**epoch + 0.1,
            "ce": 3.0 * 0.8**epoch,
            "kd": 9.0 * 0.7**epoch,
            "nd": 1 - 0.05 * epoch,
            "test_top1": 70.0 - (epoch - 9) ** 2 + rng.random() / 10,
            "seconds": 1.5,
        }
        for epoch in range(epochs)
    ]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    made = []
    original = plots.new_figure

    def remember(*arguments, **options):
        figure, axes = original(*arguments, **options)
        made.append(figure)
        return figure, axes

    monkeypatch.setattr(plots, "new_figure", remember)
    return made


def panels(figure):
    return {axis.get_title().split(" (")[0]: axis for axis in figure.axes}


def told(figure):
    """What stands in the legend below the panels."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def nothing_is_covered(figure):
    """Legend, title and panels, with all that stands at them, are in the figure and apart."""
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [legend.get_window_extent(), *(axis.get_tightbbox() for axis in figure.axes)]
    if figure.get_suptitle():
        boxes.append(figure._suptitle.get_window_extent())
    assert all(axis.get_legend() is None for axis in figure.axes)
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    # The panels are as high as without a legend.
    assert all(2 < axis.get_window_extent().height / figure.dpi < 4 for axis in figure.axes)


def test_curves(tmp_path, figures):
    logs = {"kd": rows(1), "kd++": rows(2)[::-1]}  # in any order
    plots.plot_curves(logs, tmp_path / "curves.png", title="resnet56 to resnet20")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    drawn = panels(figure)
    assert list(drawn) == [
        "Loss",
        "Cross entropy",
        "Distillation",
        "Feature direction and norm",
        "Accuracy",
        "Learning rate",
    ]
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() for axis in drawn.values())
    assert drawn["Accuracy"].get_ylabel() == "top-1 accuracy (%)"
    assert drawn["Learning rate"].get_yscale() == "log"
    for title, column in (("Loss", "train_loss"), ("Distillation", "kd"), ("Learning rate", "lr")):
        lines = drawn[title].get_lines()
        assert len(lines) == 2
        for line, seed in zip(lines, (1, 2), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), range(12))
            np.testing.assert_array_equal(line.get_ydata(), [row[column] for row in rows(seed)])
        assert lines[0].get_color() != lines[1].get_color()
    assert figure.get_suptitle() == "resnet56 to resnet20"
    best = [max(row["test_top1"] for row in log) for log in logs.values()]
    assert told(figure) == [
        f"{run}: best {value:.2f} % in epoch 9" for run, value in zip(logs, best, strict=True)
    ]


def test_best_accuracy_is_marked(tmp_path, figures):
    log = rows()
    plots.plot_curves({"kd++": log}, tmp_path / "curves.png")
    axis = panels(figures[0])["Accuracy"]
    line, best = axis.get_lines()
    wanted = max(row["test_top1"] for row in log)
    assert best.get_xdata().tolist() == [9]
    assert best.get_ydata().tolist() == [wanted]
    assert best.get_marker() != line.get_marker()
    assert told(figures[0]) == [f"best {wanted:.2f} % in epoch 9"]
    assert figures[0].get_suptitle() == "kd++"


@pytest.mark.parametrize("more", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_what_is_written_covers_nothing(tmp_path, figures, count, more):
    """All that is told stands in the figure, beside the panels and nothing else."""
    columns = ("test_top1", "lr", "ce", "kd", "nd")[: more + 1]
    logs = {
        f"cifar100/resnet32x4-shufflenetv2/reviewkd++, seed {i} (runs/{'long/' * 8}{i})": [
            {name: row[name] for name in ("epoch", *columns)} for row in rows(i)
        ]
        for i in range(count)
    }
    plots.plot_curves(logs, tmp_path / "curves.png")
    assert len(told(figures[0])) == count
    nothing_is_covered(figures[0])


def test_the_average_is_drawn_and_decides(tmp_path, figures):
    """Where a moving average is evaluated, its best is the run's, not that of the weights."""
    log = [
        {**row, "ema_test_top1": 60.0 + row["epoch"], "train_top1": 50.0, "test_ap50": ""}
        for row in rows(epochs=12)
    ]
    plots.plot_curves({"with": log, "without": rows()}, tmp_path / "curves.png")
    axis = panels(figures[0])["Accuracy"]
    assert axis.get_title() == "Accuracy (test; thin: training; thick: average)"
    drawn = [line.get_ydata().tolist() for line in axis.get_lines()]
    assert [row["ema_test_top1"] for row in log] in drawn
    assert [row["test_top1"] for row in log] in drawn
    assert [71.0] in drawn
    wanted = max(row["test_top1"] for row in rows())
    assert told(figures[0]) == [
        "with: best 71.00 % in epoch 11 (average)",
        f"without: best {wanted:.2f} % in epoch 9",
    ]
    detector = [{"epoch": e, "test_ap": 9.0 - e, "ema_test_ap": 1.0 + e} for e in range(3)]
    plots.plot_curves({"detector": detector}, tmp_path / "curves.png")
    (axis,) = figures[1].axes
    assert axis.get_title() == "Average precision (AP; thick: average)"
    assert told(figures[1]) == ["best 3.00 % in epoch 2 (average)"]
    more = {"lr": 0.1, "train_loss": 1, "ce": 1, "box": 1, "objectness": 1, "kd": 1, "nd": 1}
    whole = [{**row, **more, "rpn_box": 2, "test_ap50": 2.0} for row in detector]
    plots.plot_curves({"detector": whole}, tmp_path / "curves.png")
    assert len(figures[2].axes) == 8
    nothing_is_covered(figures[2])


def test_a_log_read_from_csv(tmp_path, figures):
    """Text, empty cells, columns of terms with the prefix, and values that are not finite."""
    log = [{("train_nd" if k == "nd" else k): v for k, v in row.items()} for row in rows()]
    log[3]["kd"] = ""
    log[4]["kd"] = math.inf
    with open(tmp_path / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        writer.writerows(log)
    with open(tmp_path / "log.csv", newline="") as file:
        plots.plot_curves({"run": csv.DictReader(file)}, tmp_path / "curves.png")
    drawn = panels(figures[0])
    values = drawn["Distillation"].get_lines()[0].get_ydata()
    assert np.isnan(values).tolist() == [i in (3, 4) for i in range(12)]
    nd = drawn["Feature direction and norm"].get_lines()[0].get_ydata()
    np.testing.assert_allclose(nd, [row["nd"] for row in rows()])


def test_what_runs_do_not_have_is_left_out(tmp_path, figures):
    """Cross entropy alone has no terms; zeros are drawn, on an axis that has a 0."""
    log = [
        # As the log of a run has it, in which the terms that are not used are 0 throughout.
        {"epoch": e, "train_loss": 0.0 if e else 1.0, "train_kd": 0.0, "nd": "0.0", "lr": 0.1}
        for e in range(3)
    ]
    plots.plot_curves({"ce": log, "empty": []}, tmp_path / "curves.png")
    drawn = panels(figures[0])
    assert list(drawn) == ["Loss", "Learning rate"]
    assert {axis.get_yscale() for axis in drawn.values()} == {"linear"}
    both = [{"epoch": 0, "train_loss": 2.0, "test_loss": 1.0}]
    plots.plot_curves({"one": both}, tmp_path / "curves.png")
    (axis,) = figures[1].axes
    assert axis.get_title() == "Loss (training; thin: test)"
    assert [line.get_marker() for line in axis.get_lines()] == [".", "."]


def test_a_term_that_a_run_does_not_use_is_no_line(tmp_path, figures):
    """What is 0 in every epoch, but no accuracy. An ND loss of 0 tells that its weight was."""
    logs = {"ce": rows(0), "kd": rows(1), "kd++": rows(2)}
    for row in logs["ce"]:
        row.update(kd=0.0, nd=0.0, test_top1=0.0)
    for row in logs["kd"]:
        row["nd"] = 0.0
    logs["kd++"][0]["nd"] = 0.0
    plots.plot_curves(logs, tmp_path / "curves.png")
    drawn = panels(figures[0])
    (nd,) = drawn["Feature direction and norm"].get_lines()
    wanted = [math.nan, *(row["nd"] for row in logs["kd++"][1:])]
    np.testing.assert_array_equal(nd.get_ydata(), wanted)
    assert len(drawn["Distillation"].get_lines()) == 2
    of_colour = {line.get_color() for line in drawn["Accuracy"].get_lines()}
    assert len(of_colour) == 3
    with pytest.raises(ValueError, match="no run has a finite value"):
        plots.plot_curves({"a": [{"epoch": 0, "kd": 0.0}]}, tmp_path / "none.png")


def test_more_runs_than_colours(tmp_path, figures):
    count = 10
    plots.plot_curves({f"run {i}": rows(i) for i in range(count)}, tmp_path / "curves.png")
    lines = panels(figures[0])["Loss"].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count


@pytest.mark.parametrize(
    ("logs", "match"),
    [
        ({}, "rows_by_run must have at least one run"),
        ({"a": []}, "no run has a finite value in any of the columns train_loss"),
        ({"a": [{"lr": 0.1}]}, "row 0 of run 'a' has no epoch"),
        ({"a": [{"epoch": 0, "lr": "fast"}]}, "row 0 of run 'a' has lr='fast', which is no number"),
    ],
)
def test_bad_logs(logs, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        plots.plot_curves(logs, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_features_and_accuracies(tmp_path, figures):
    rng = np.random.default_rng(0)
    norms = {name: rng.random(50) + i for i, name in enumerate(("teacher", "kd", "kd++"))}
    plots.plot_features(norms, norms, "title", tmp_path / "features.png")
    plots.plot_accuracy({"kd": [0.7, 0.71], "kd++": [0.72]}, 0.73, "t", tmp_path / "accuracy.png")
    left, right = figures[0].axes
    assert left.get_xlabel() == "feature norm"
    assert right.get_xlabel().startswith("cosine")
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert sorted(label.split(" (")[0] for label in labels) == ["kd", "kd++", "teacher"]
    assert f"teacher (mean {norms['teacher'].mean():.2f})" in labels
    assert len(list(tmp_path.iterdir())) == 2
    # A few that are far beyond all others would press those into a bar.
    norms["kd"][7] = 500.0
    plots.plot_features(norms, norms, "title", tmp_path / "features.png")
    left = figures[-1].axes[0]
    assert left.get_xlim()[1] < 10
    assert left.get_xlabel() == "feature norm, the largest left out (up to 500)"


def test_pyplot_is_left_alone(tmp_path):
    """Neither its backend nor its list of open figures is touched."""
    loaded = "matplotlib.pyplot" in sys.modules
    plots.plot_curves({"a": rows()}, tmp_path / "curves.png")
    if not loaded:
        assert "matplotlib.pyplot" not in sys.modules
    else:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
