"""PNG plots of a distillation run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plot_accuracy", "plot_features"]


def _figure(width: float, height: float, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    return plt, figure, axes


def plot_accuracy(
    accuracies: dict[str, list[float]], teacher: float, title: str, path: Path
) -> None:
    """Test accuracy of every seed of every method, mean and deviation, and the teacher's."""
    plt, figure, axes = _figure(6.4, 4.2)
    for position, values in enumerate(accuracies.values()):
        percent = 100 * np.asarray(values)
        spread = percent.std(ddof=1) if len(percent) > 1 else 0.0
        axes.errorbar(
            position, percent.mean(), yerr=spread, fmt="o", color="black", capsize=6, zorder=3
        )
        offsets = np.linspace(-0.12, 0.12, len(percent)) if len(percent) > 1 else [0.12]
        axes.scatter(position + np.asarray(offsets), percent, s=18, alpha=0.6, zorder=2)
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
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_features(norms: dict[str, Any], cosines: dict[str, Any], title: str, path: Path) -> None:
    """Distributions of the feature norm and of the cosine to the class mean, per model."""
    plt, figure, (left, right) = _figure(10.5, 4.2, columns=2)
    for axes, values, label in (
        (left, norms, "feature norm"),
        (right, cosines, "cosine to the mean teacher feature of the class"),
    ):
        everything = np.concatenate([np.asarray(v) for v in values.values()])
        bins = np.linspace(everything.min(), everything.max(), 50)
        students = [name for name in values if name != "teacher"]
        for name, value in values.items():
            is_teacher = name == "teacher"
            axes.hist(
                np.asarray(value),
                bins=bins,
                density=True,
                histtype="step",
                linewidth=2 if is_teacher else 1.5,
                color="black" if is_teacher else f"C{students.index(name)}",
                linestyle="--" if is_teacher else "-",
                label=f"{name} (mean {np.mean(value):.2f})",
            )
        axes.set_xlabel(label)
        axes.set_ylabel("density of test images")
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
