"""Detections in COCO's results format, and their average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext.progress import Progress
from dnkd_ext.train.detection.data import BoxSplit, TestBatches
from dnkd_ext.train.files import replacing
from dnkd_ext.train.world import World

__all__ = ["FIGURES", "coco_figures", "detect", "ground_truth", "write_detections"]

# Places of COCOeval's stats.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

Detection = dict[str, Any]


def to_results(
    found: dict[str, Tensor], image_id: int, category_ids: Sequence[int]
) -> list[Detection]:
    """One image's detections, as torchvision's detectors give them, in COCO's results format."""
    boxes = found["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    return [
        {
            "image_id": int(image_id),
            "category_id": category_ids[label - 1],
            "bbox": [round(value, 3) for value in box],
            "score": score,
        }
        for box, label, score in rows
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
    """All processes' detections of a detector in evaluation mode; its modes are restored.

    Collective. In the order of the images, then of the scores, whatever the number of processes.
    """
    split = batches.split
    modes = {module: module.training for module in model.modules()}
    model.eval()
    own: list[tuple[int, list[Detection]]] = []
    shown = progress and world.is_first
    try:
        with Progress(len(batches), "evaluate", unit="batch", enabled=shown) as bar:
            for images, _, numbers in batches:
                with autocast:
                    found = model(images)
                for number, one in zip(numbers, found, strict=True):
                    results = to_results(one, split.image_ids[number], split.category_ids)
                    own.append((number, results))
                bar.advance()
    finally:
        for module, mode in modes.items():
            module.training = mode
    parts = [part for of_process in world.gather(own) for part in of_process]
    return [one for _, results in sorted(parts, key=lambda part: part[0]) for one in results]


def ground_truth(split: BoxSplit) -> Any:
    """pycocotools' ``COCO`` of the split's annotation file, crowds and all.

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
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(split.annotations))


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
