"""Pictures of boxes: ground truth, student and teacher side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dnkd_ext.train.detection.data import BoxSplit, Sample, _Images, read_split, read_test_split
from dnkd_ext.train.detection.task import check_settings, load_teacher
from dnkd_ext.train.files import CONFIG, checked_config
from dnkd_ext.train.plots import COLOURS, new_figure, save_figure
from dnkd_ext.train.world import World

__all__ = ["draw_boxes", "draw_run"]

# (boxes (N, 4) in pixels, labels (N,), scores (N,) or None) of an image.
Boxes = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def draw_boxes(
    pixels: Sequence[np.ndarray],
    columns: dict[str, Sequence[Boxes]],
    classes: Sequence[str],
    titles: Sequence[str],
    path: Path,
) -> None:
    """A row per image, a column per title of ``columns``; a colour per class.

    Args:
        pixels: of every image ``(H, W, 3)`` uint8.
        columns: per title of a column the boxes of every image.
        classes: names by label.
        titles: of the images.
        path: of the PNG file.
    """
    from matplotlib.patches import Rectangle

    figure, axes = new_figure(4 * len(columns), 3.4 * len(pixels), len(pixels), len(columns))
    cells = np.asarray(axes, object).reshape(len(pixels), len(columns))
    for row, image in enumerate(pixels):
        for cell, (name, of_images) in zip(cells[row], columns.items(), strict=True):
            cell.imshow(image)
            cell.set_axis_off()
            cell.set_title(f"{name}, {titles[row]}", fontsize="small")
            boxes, labels, scores = of_images[row]
            for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
                colour = COLOURS[label % len(COLOURS)]
                x1, y1, x2, y2 = box
                cell.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2)
                )
                score = "" if scores is None else f" {scores[i]:.2f}"
                cell.text(
                    x1,
                    y1,
                    f"{classes[label]}{score}",
                    fontsize="x-small",
                    verticalalignment="bottom",
                    color="black",
                    bbox={"facecolor": colour, "alpha": 0.7, "pad": 1, "edgecolor": "none"},
                )
    save_figure(figure, path, dpi=110)


@torch.no_grad()
def _found(model: nn.Module, image: torch.Tensor, threshold: float, device: Any) -> Boxes:
    result = model([image.to(device).float() / 255])[0]
    boxes, labels, scores = (result[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
    kept = scores >= threshold
    return boxes[kept], labels[kept], scores[kept]


def _chosen(split: BoxSplit, images: Sequence[int], count: int) -> list[int]:
    """Places of images by their ids, or of some that are evenly spread."""
    if not images:
        return np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int).tolist()
    places = {int(number): place for place, number in enumerate(split.image_ids)}
    missing = [number for number in images if number not in places]
    if missing:
        raise ValueError(f"--images {missing[0]} is no image of {split.annotations}")
    return [places[number] for number in images]


def draw_run(
    folder: Path,
    out: Path,
    world: World,
    *,
    images: Sequence[int] = (),
    count: int = 4,
    threshold: float = 0.5,
    data: str = "",
    teacher_weights: str = "",
) -> Path:
    """Boxes in images of the evaluation: annotated, and found by a run's student and teacher.

    Args:
        folder: of the run, whose best weights are taken.
        out: of the PNG file.
        world: this process alone.
        images: ids of the images; some that are evenly spread where empty.
        count: how many, where ``images`` is empty.
        threshold: smallest score of a box that is drawn.
        data: folder of the data, where it is not that of the run any more.
        teacher_weights: likewise the teacher's.

    Raises:
        ValueError: the run has no detector, or a damaged configuration, its teacher is of a run
            with other options, or an id of no image.
        FileNotFoundError: the weights or the data are not there.
    """
    config = checked_config(folder / CONFIG)
    if config.data.task != "detection":
        raise ValueError(f"{folder} is a run of --task {config.data.task}, not of detection")
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    if images:  # any of the file's, though the run may have evaluated a part of them
        split = read_split(config.data.data, config.detection.val_set)
    else:
        split = read_test_split(config)
    places = _chosen(split, images, count)
    models = {"student": load_teacher(config.model.student, str(folder), split, config, world)}
    weights = teacher_weights or config.model.teacher_weights
    if config.model.teacher is not None and weights is not None:
        check_settings(weights, config)
        models["teacher"] = load_teacher(config.model.teacher, weights, split, config, world)
    read = _Images(split)
    opened = [read[Sample(place, False)][0] for place in places]
    columns: dict[str, list[Boxes]] = {
        "annotated": [(*split.target(place), None) for place in places],
        **{
            name: [_found(teacher.model, image, threshold, world.device) for image in opened]
            for name, teacher in models.items()
        },
    }
    titles = [f"image {split.image_ids[place]}" for place in places]
    pixels = [image.permute(1, 2, 0).numpy() for image in opened]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_boxes(pixels, columns, split.classes, titles, out)
    return out
