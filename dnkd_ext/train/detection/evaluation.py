"""Detections in COCO's results format, and their average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnkd_ext._files import replacing
from dnkd_ext._modes import evaluating
from dnkd_ext.progress import Progress
from dnkd_ext.train.detection.data import BoxSplit, TestBatches
from dnkd_ext.train.world import World

__all__ = ["FIGURES", "coco_figures", "detect", "ground_truth", "write_detections"]

# Places of COCOeval's stats.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

Detection = dict[str, Any]


def _compact(found: dict[str, Tensor]) -> np.ndarray:
    """An image's detections as (R, 6) float64: x, y, width, height, label, score."""
    columns = [found["boxes"], found["labels"][:, None], found["scores"][:, None]]
    rows = torch.cat([column.double() for column in columns], 1).cpu().numpy()
    rows[:, 2:4] -= rows[:, :2]
    return rows


def _results(rows: np.ndarray, image_id: int, category_ids: Sequence[int]) -> list[Detection]:
    """The same in COCO's results format."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label) - 1],
            "bbox": [round(value, 3) for value in box],
            "score": score,
        }
        for *box, label, score in rows.tolist()
    ]


@torch.no_grad()
def detect(
    model: nn.Module,
    batches: TestBatches,
    autocast: Any,
    world: World,
    *,
    progress: bool = False,
) -> list[Detection]:
    """Detections of a detector in evaluation mode; its modes are restored. Collective.

    The first process gets those of all, in the order of the images, then of the scores, whatever
    the number of processes; the others get none.
    """
    split = batches.split
    own: list[tuple[int, np.ndarray]] = []
    shown = progress and world.is_first
    bar = Progress(len(batches), "evaluate", unit="batch", enabled=shown)
    with evaluating(model), bar:
        for images, _, numbers in batches:
            with autocast:
                found = model(images)
            own += [(n, _compact(one)) for n, one in zip(numbers, found, strict=True)]
            bar.advance()
    of_all = world.gather(own)
    if not world.is_first:
        return []
    parts = sorted((part for of_one in of_all for part in of_one), key=lambda part: part[0])
    return [
        one
        for number, rows in parts
        for one in _results(rows, int(split.image_ids[number]), split.category_ids)
    ]


def ground_truth(split: BoxSplit) -> Any:
    """pycocotools' ``COCO`` of the split's annotation file, crowds and all.

    The annotations are numbered anew: pycocotools takes the id 0 for none, and of annotations with
    one id the last. ``iscrowd`` is 0 and ``area`` the box's where the file has none.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the evaluation of detectors needs pycocotools ({error}); install it with "
            "pip install 'dnkd_ext[detect]'"
        ) from error
    content = json.loads(split.annotations.read_text(encoding="utf-8"))
    truth = COCO()
    truth.dataset = content | {
        "annotations": [
            {
                "id": number,
                "image_id": one["image_id"],
                "category_id": one["category_id"],
                "bbox": one["bbox"],
                "iscrowd": one.get("iscrowd", 0),
                "area": one.get("area", one["bbox"][2] * one["bbox"][3]),
            }
            for number, one in enumerate(content["annotations"], 1)
        ]
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def coco_figures(
    truth: Any, detections: list[Detection], image_ids: Sequence[int]
) -> dict[str, float]:
    """AP, AP50, AP75 and AP of small, medium and large objects, in percent, by ``COCOeval``.

    Args:
        truth: see :func:`ground_truth`.
        detections: in COCO's results format.
        image_ids: the images that count, those without detections among them.

    Returns:
        By :data:`FIGURES`; what has no object to be found is left out, AP apart, which is 0 then.
    """
    from pycocotools.cocoeval import COCOeval

    if not detections:
        return dict.fromkeys(FIGURES[:3], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        # Copies, to which pycocotools adds fields.
        evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in detections]), "bbox")
        evaluation.params.imgIds = [int(number) for number in image_ids]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [float(value) for value in evaluation.stats[: len(FIGURES)]]
    figures = {
        name: round(100 * value, 4)
        for name, value in zip(FIGURES, stats, strict=True)
        if value >= 0  # pycocotools' -1 where there are no objects
    }
    return {"ap": 0.0, **figures}


def write_detections(path: Path, detections: list[Detection]) -> None:
    """Detections as JSON that pycocotools' ``loadRes`` reads, an image per line."""
    by_image: dict[int, list[Detection]] = {}
    for one in detections:
        by_image.setdefault(one["image_id"], []).append(one)
    lines = [", ".join(json.dumps(one) for one in group) for group in by_image.values()]
    with replacing(path) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
