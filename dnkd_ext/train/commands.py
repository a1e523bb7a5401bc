"""The commands class-means, eval and plot. Checks come before anything is written."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnkd_ext.class_means import ClassMeans
from dnkd_ext.train import tasks
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.evaluation import evaluate
from dnkd_ext.train.files import (
    CLASS_MEANS,
    CONFIG,
    CURVES,
    LOG,
    OWN_FILES,
    check_place,
    read_config,
)
from dnkd_ext.train.gather import find_parts, remove_parts
from dnkd_ext.train.jobs import prepare_device
from dnkd_ext.train.networks import PRETRAINED, find_weights, try_out
from dnkd_ext.train.plan import resolve
from dnkd_ext.train.plots import plot_curves
from dnkd_ext.train.presets import load_preset
from dnkd_ext.train.task import autocast
from dnkd_ext.train.world import World

__all__ = ["check_plot", "read_run", "run_class_means", "run_eval", "run_pictures", "run_plot"]


def run_class_means(
    model: str,
    weights: str,
    config: TrainConfig,
    out: Path,
    world: World,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> ClassMeans:
    """Gather a teacher's class means and write their file.

    Raises:
        FileExistsError: ``out`` exists, or a part of it, and neither ``overwrite`` nor, for parts,
            ``resume`` is given.
        ValueError, FileNotFoundError: a wrong option or input.
        FloatingPointError: features are not finite.
    """
    with world.together():
        config.check_data()
        config = dataclasses.replace(config, run=resolve(config.run, world, config.data.task))
        if weights != PRETRAINED:
            find_weights(weights)  # not after minutes of decoding
    with world.first_alone():
        if world.is_first:
            _look_at_means(out, weights, overwrite, resume)
    prepare_device(config, world)
    with world.together():
        if tasks.is_detection(config):
            tasks.detection().check_settings(weights, config)
        source = tasks.open_data(config, world)
        teacher = tasks.load_teacher(model, weights, source, config, world)
        if not tasks.is_detection(config):
            source.clean(config, world)
            try_out(teacher.model, f"--model {model}", config, source)
    notes, done = tasks.origin_notes(model, teacher, source, config), None
    with world.first_alone():
        if world.is_first and resume and not overwrite:
            done = tasks.kept_means(out, notes, source, any_classes=config.data.any_classes)
            if done is None and out.exists():
                raise FileExistsError(
                    f"--out {out} exists, and is of other data, other classes or another model"
                )
    done = world.from_first(done)
    if done is not None:
        return done
    with world.first_alone():
        if world.is_first:
            out.parent.mkdir(parents=True, exist_ok=True)
            if not resume:
                remove_parts(out)
    try:
        means = tasks.gather_class_means(
            teacher.model, source, config, world, notes, path=out, resume=resume
        )
    except FloatingPointError as error:
        with world.together():  # one tells it
            raise error
    with world.first_alone():
        if world.is_first:
            means.save(out)
            remove_parts(out)
    return means


def _look_at_means(out: Path, weights: str, overwrite: bool, resume: bool) -> None:
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; name a file")
    if weights != PRETRAINED and out.resolve() == find_weights(weights).resolve():
        raise ValueError(f"--out {out} is the file of --weights {weights}; choose another name")
    if out.name in set(OWN_FILES) - {CLASS_MEANS}:
        raise ValueError(
            f"--out {out} is what a run calls another file of its own; choose another name"
        )
    if out.exists() and not (overwrite or resume):
        raise FileExistsError(f"--out {out} exists; choose another name, or pass --overwrite")
    if find_parts(out) and not (overwrite or resume):
        raise FileExistsError(
            f"a pass for --out {out} was interrupted; go on with it by --resume, or begin anew by "
            "--overwrite"
        )
    check_place("--out", out, out.parent)


def run_eval(
    model: str, weights: str, config: TrainConfig, world: World, detections: Path | None = None
) -> dict[str, float | int | str]:
    """Accuracy of trained weights over the test images, in percent; of a detector COCO's figures.

    Args:
        model: its name.
        weights: a file, a run's folder, or ``"pretrained"``.
        config: its groups ``data``, ``run``, ``reader`` and ``detection``.
        world: the processes.
        detections: file for a detector's detections, whose folder is made.

    Raises:
        FileExistsError: ``detections`` exists.
        ValueError, FileNotFoundError: a wrong option or input.
    """
    with world.together():
        config.check_data()
        config = dataclasses.replace(config, run=resolve(config.run, world, config.data.task))
        if weights != PRETRAINED:
            find_weights(weights)  # not after minutes of decoding
        if detections is not None and not tasks.is_detection(config):
            raise ValueError(f"--detections is for --task detection, got {detections}")
        if detections is not None and detections.is_dir():
            raise IsADirectoryError(f"--detections {detections} is a folder; name a file")
        if detections is not None:
            if detections.exists():
                raise FileExistsError(
                    f"--detections {detections} exists; choose another name, or remove it"
                )
            check_place("--detections", detections, detections.parent)
    if tasks.is_detection(config):
        return tasks.detection().run_evaluation(model, weights, config, world, detections)
    with world.together():
        source = open_source(config, world, progress=config.run.progress, test_only=True)
        network = tasks.load_teacher(model, weights, source, config, world).model
        try_out(network, f"--model {model}", config, source)
        batches = source.test(config, world)
    precision = autocast(config.run, world)
    result = evaluate(network, batches, len(source.classes), precision, world)
    return {
        "model": model,
        "weights": weights if weights == PRETRAINED else str(find_weights(weights)),
        "test_images": result.count,
        "test_unreadable": source.test_images - result.count,
        "test_top1": result.top1,
        "test_top5": result.top5,
    }


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Configuration and log of a run.

    Raises:
        FileNotFoundError: the folder holds no run, or one without a finished epoch.
        ValueError: a damaged file.
    """
    for name in (CONFIG, LOG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; it is no run, or has no epoch yet")
    config = read_config(folder / CONFIG)
    try:
        with (folder / LOG).open(newline="", encoding="utf-8") as file:
            rows = [
                {name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError) as error:  # the latter of a row with too many cells
        raise ValueError(f"{folder}: a damaged {LOG}: {error}") from error
    return config, rows


def _run_name(config: dict[str, Any]) -> str:
    preset, method, nd = (config.get(name) for name in ("preset", "method", "nd_weight"))
    student = config.get("student")
    own = _settings_of(preset)
    words = [str(preset or student)]
    if preset and student != own.get("student"):
        words.append(str(student))
    if method and (method, nd) != (own.get("method"), own.get("nd_weight")):
        words += [str(method), *([f"nd {nd}"] if nd else [])]
    return ", ".join([*words, f"seed {config.get('seed')}"])


def _settings_of(preset: Any) -> dict[str, Any]:
    """A preset's own, which its name tells; none of another version's, or where there is none."""
    try:
        return load_preset(preset).settings if isinstance(preset, str) and preset else {}
    except ValueError:
        return {}


def check_plot(folders: list[Path], out: Path) -> None:
    """An error where :func:`run_plot` may not write.

    Raises:
        FileExistsError: ``out`` is the folder of a run other than the only one that is drawn.
        NotADirectoryError, PermissionError: see :func:`dnkd_ext.train.files.check_place`.
    """
    is_run = (out / CONFIG).exists() or (out / LOG).exists()
    if is_run and {folder.resolve() for folder in folders} != {out.resolve()}:
        raise FileExistsError(
            f"--out {out} is the folder of a run, whose own {CURVES} would be replaced; choose "
            "another"
        )
    check_place("--out", out, out)


def run_plot(folders: list[Path], out: Path) -> Path:
    """The curves of several runs in one picture, ``out/curves.png``.

    A run's name is its preset or student, method and seed; where several have one name, their
    folders stand behind it.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_run`.
        FileExistsError, NotADirectoryError, PermissionError: see :func:`check_plot`.
    """
    check_plot(folders, out)
    found = {folder: read_run(folder) for folder in folders}
    names = {folder: _run_name(config) for folder, (config, _) in found.items()}
    count = Counter(names.values())
    runs = {
        names[folder] if count[names[folder]] == 1 else f"{names[folder]} ({folder})": rows
        for folder, (_, rows) in found.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, out / CURVES)
    return out / CURVES


def run_pictures(
    folder: Path,
    out: Path,
    world: World,
    *,
    images: Sequence[int],
    count: int,
    threshold: float,
    data: str,
    teacher_weights: str,
) -> Path:
    """Boxes that a run's student and teacher find, beside the annotated, as a PNG file."""
    tasks.detection()  # which tells what is not installed
    from dnkd_ext.train.detection.pictures import draw_run

    return draw_run(
        folder,
        out,
        world,
        images=images,
        count=count,
        threshold=threshold,
        data=data,
        teacher_weights=teacher_weights,
    )
