"""A data set of COCO's format: coloured shapes on noise, with their boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

# Ids with gaps, as COCO's have, and not in the order of the names.
CATEGORIES = {3: "disc", 7: "square", 90: "triangle"}
COLOURS = {3: (220, 40, 40), 7: (40, 200, 60), 90: (50, 80, 230)}


def _mask(category: int, side: int) -> np.ndarray:
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    if category == 3:
        return (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    if category == 7:
        return np.ones((side, side), bool)
    return np.abs(x - 0.5) <= y / 2


def draw(folder: Path, train: int, val: int, *, side: int = 128, seed: int = 0) -> Path:
    """Write ``train2017``, ``val2017`` and ``annotations``; every ninth image has no boxes.

    Every third image is upright. The first of a split has a box without area and a crowd, too.
    """
    random = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = (side, side * 3 // 4) if number % 3 == 0 else (side * 3 // 4, side)
            pixels = random.normal(110, 25, (height, width, 3))
            image_id, taken = 1000 + 7 * number, []
            for _ in range(0 if number % 9 == 8 else random.integers(1, 4)):
                category = int(random.choice(list(CATEGORIES)))
                extent = int(random.integers(side // 5, side // 2))
                x, y = (int(random.integers(0, s - extent)) for s in (width, height))
                box = [x, y, extent, extent]
                if any(
                    min(x + extent, a + c) > max(x, a) and min(y + extent, b + c) > max(y, b)
                    for a, b, c, _ in taken
                ):
                    continue
                taken.append(box)
                mask = _mask(category, extent)
                pixels[y : y + extent, x : x + extent][mask] = COLOURS[category]
                annotations.append({"category_id": category, "bbox": box, "iscrowd": 0})
                annotations[-1] |= {"image_id": image_id, "area": extent * extent}
            pixels += random.normal(0, 10, pixels.shape)
            name = f"{image_id:06}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name)
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        first = {"image_id": 1000, "category_id": 7, "area": 0}
        annotations.append(first | {"bbox": [5, 5, 0, 10], "iscrowd": 0})
        annotations.append(first | {"bbox": [0, 0, 8, 8], "iscrowd": 1, "area": 64})
        annotations[-1]["segmentation"] = {"counts": [0, 64], "size": [8, 8]}
        for number, one in enumerate(annotations):
            one["id"] = number + 1
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in reversed(CATEGORIES.items())],
        }
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder
