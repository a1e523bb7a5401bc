"""Images with boxes in COCO's format, and batches of images of like shape."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.decoding import DataError
from dnkd_ext.train.data.pixels import converted
from dnkd_ext.train.data.workers import as_it_is, worker_options
from dnkd_ext.train.world import World

__all__ = [
    "BoxSplit",
    "DetectionSource",
    "Sample",
    "TestBatches",
    "TrainBatches",
    "read_split",
    "read_test_split",
]

Target = dict[str, Tensor]


class Sample(NamedTuple):
    """Which image, and whether it is mirrored."""

    index: int
    mirrored: bool


@dataclass(frozen=True)
class BoxSplit:
    """Images of one annotation file, in its order, and the boxes that a detector is trained on.

    Attributes:
        annotations: the file.
        folder: of the images.
        names: of the images' files, in the folder.
        image_ids: (N,) int64, as the file has them.
        sizes: (N, 2) int64, height and width.
        boxes: (M, 4) float32, corners x1, y1, x2, y2 in pixels, image after image.
        labels: (M,) int64, from 1 on.
        starts: (N + 1,) int64, where each image's boxes begin.
        classes: names, the background first.
        category_ids: of the classes but the background, as the file has them, growing.
        dropped: (N,) int64, how many boxes of each image were left out because they have no area
            to speak of within it.
    """

    annotations: Path
    folder: Path
    names: list[str]
    image_ids: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    classes: list[str]
    category_ids: list[int]
    dropped: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def target(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and labels of an image."""
        own = slice(self.starts[index], self.starts[index + 1])
        return self.boxes[own], self.labels[own]

    def part(self, count: int) -> BoxSplit:
        """At most so many images, evenly spread over all."""
        if count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        own = [np.arange(self.starts[i], self.starts[i + 1]) for i in chosen]
        rows = np.concatenate(own)
        return BoxSplit(
            self.annotations,
            self.folder,
            [self.names[i] for i in chosen],
            self.image_ids[chosen],
            self.sizes[chosen],
            self.boxes[rows],
            self.labels[rows],
            np.cumsum([0, *map(len, own)]),
            self.classes,
            self.category_ids,
            self.dropped[chosen],
        )


# -- reading --------------------------------------------------------------------------------------

# Pixels; of a thinner box float32 may leave nothing once it is mirrored or resized.
THINNEST = 1e-2


def read_split(data: str, name: str) -> BoxSplit:
    """``annotations/instances_NAME.json`` of a folder, and the names of the images in ``NAME/``.

    Categories, whose ids may have gaps as COCO's 1 to 90 have, get the labels 1, 2, ... in the
    order of their ids. Images without boxes are kept. Boxes of crowds have no part in training,
    nor have those with a side below :data:`THINNEST` inside their image, which are counted.

    Raises:
        FileNotFoundError: the folder, the file, or an image is missing.
        DataError: a broken file; what is wrong, and where in it.
    """
    root = Path(data)
    path, folder = root / "annotations" / f"instances_{name}.json", root / name
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}")
    if not path.is_file():
        raise FileNotFoundError(
            f"no annotations at {path}; COCO's format has {name}/* and "
            f"annotations/instances_{name}.json in --data"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no images at {folder}, for which {path} has the annotations")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no whole JSON file: {error}") from error
    images = _list(content, "images", path)
    categories = sorted(_list(content, "categories", path), key=lambda c: _id(c, path))
    boxes = _list(content, "annotations", path, may_be_empty=True)
    category_ids = [_id(category, path) for category in categories]
    _unique(category_ids, "categories", path)
    labels = {number: label for label, number in enumerate(category_ids, 1)}
    image_ids = [_id(image, path) for image in images]
    _unique(image_ids, "images", path)
    places = {number: place for place, number in enumerate(image_ids)}
    names, sizes = _images(images, folder, path)
    rows: list[tuple[int, int, list[float]]] = []
    dropped = np.zeros(len(images), np.int64)
    for number, one in enumerate(boxes):
        where = f"annotation {number}"
        if not isinstance(one, dict) or not {"image_id", "category_id", "bbox"} <= one.keys():
            raise DataError(f"{path}: {where} lacks image_id, category_id or bbox")
        for what, known in (("image", places), ("category", labels)):
            owner = one[f"{what}_id"]
            if type(owner) is not int or owner not in known:
                raise DataError(f"{path}: {where} is of {what} {owner!r}, which it has not")
        box, crowd, area = one["bbox"], one.get("iscrowd", 0), one.get("area", 0)
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
            raise DataError(f"{path}: {where} has bbox {box!r}, not [x, y, width, height]")
        if crowd not in (0, 1):
            raise DataError(f"{path}: {where} has iscrowd {crowd!r}, not 0 or 1")
        if not _is_finite(area):
            raise DataError(f"{path}: {where} has area {area!r}, not a number")
        if crowd:
            continue
        place = places[one["image_id"]]
        height, width = sizes[place]
        x, y, w, h = box
        corners = [max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)]
        # As float32 has them, which the detectors compute with.
        corners = np.asarray(corners, np.float32).tolist()
        if min(corners[2] - corners[0], corners[3] - corners[1]) < THINNEST:
            dropped[place] += 1
            continue
        rows.append((place, labels[one["category_id"]], corners))
    rows.sort(key=lambda row: row[0])
    counts = np.bincount([row[0] for row in rows], minlength=len(images))
    return BoxSplit(
        path,
        folder,
        names,
        np.asarray(image_ids, np.int64),
        np.asarray(sizes, np.int64),
        np.asarray([row[2] for row in rows], np.float32).reshape(-1, 4),
        np.asarray([row[1] for row in rows], np.int64),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ["background", *(str(c.get("name", _id(c, path))) for c in categories)],
        category_ids,
        dropped,
    )


def read_test_split(config: TrainConfig) -> BoxSplit:
    """The images of the evaluation, where a configuration limits them a part; as read_split."""
    split = read_split(config.data.data, config.detection.val_set)
    limit = config.data.limit
    return split if limit is None else split.part(-(-limit // 3))


def _is_finite(value: Any) -> bool:
    # Python's integers may be larger than any float.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )


def _list(content: Any, key: str, path: Path, *, may_be_empty: bool = False) -> list[Any]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not (found or may_be_empty):
        raise DataError(f"{path} must have a list of {key}, as COCO's instances files have")
    return found


def _id(one: Any, path: Path) -> int:
    number = one.get("id") if isinstance(one, dict) else None
    if type(number) is not int or abs(number) >= 2**63:
        raise DataError(f"{path}: an image or category has the id {number!r}, not an int64")
    return number


def _unique(numbers: list[int], what: str, path: Path) -> None:
    seen: set[int] = set()
    for number in numbers:
        if number in seen:
            raise DataError(f"{path}: two {what} have the id {number}")
        seen.add(number)


def _images(images: list[Any], folder: Path, path: Path) -> tuple[list[str], list[tuple[int, int]]]:
    present = {entry.name for entry in os.scandir(folder)}
    names, sizes = [], []
    for number, image in enumerate(images):
        name, size = image.get("file_name"), (image.get("height"), image.get("width"))
        if not isinstance(name, str) or not all(type(s) is int and 0 < s < 2**31 for s in size):
            raise DataError(
                f"{path}: image {number} must have file_name, height and width, got {name!r}, "
                f"{size[0]!r} and {size[1]!r}"
            )
        if name not in present and not (folder / name).is_file():
            raise FileNotFoundError(f"no image at {folder / name}, which {path} has")
        names.append(name)
        sizes.append(size)
    return names, sizes


# Where EXIF says how an image is to be turned, how (names of PIL's operations, from the value of 2
# on), and from which value on its sides change places.
ORIENTATION, SIDEWAYS = 0x0112, 5
TURNS = (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
    "ROTATE_90",
)  # fmt: skip


def _orientation(image: Any) -> int:
    """What EXIF says of an image (PIL's): 1 to 8, and 1 where nothing that can be read is there."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken data about an image that is itself whole, of as many kinds as fields
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Any, size: tuple[int, int]) -> Any:
    """The image (PIL's) as it is shown: turned as its EXIF data say.

    Not where ``size``, the annotations' width and height, tells that they are of the image as it is
    stored.
    """
    from PIL import Image

    if image.format == "TIFF":
        image.load()  # which turns it already; its EXIF data then say so
    orientation = _orientation(image)
    as_stored = orientation >= SIDEWAYS and image.size == size and size[0] != size[1]
    if orientation == 1 or as_stored:
        return image
    return image.transpose(getattr(Image.Transpose, TURNS[orientation - 2]))


Item = tuple[Tensor, Target, int]


class _Images(Dataset):
    """A sample to its image (3, H, W) uint8, its target, and its index."""

    def __init__(self, split: BoxSplit) -> None:
        self.split = split

    def __getitems__(self, batch: Sequence[Sample]) -> list[Item] | DataError:
        """A batch, or what is wrong with it: raised by a worker, it would bring its traceback."""
        try:
            return [self[sample] for sample in batch]
        except DataError as error:
            return error

    def __getitem__(self, sample: Sample) -> Item:
        from PIL import Image

        split = self.split
        path = split.folder / split.names[sample.index]
        height, width = split.sizes[sample.index].tolist()
        try:
            with Image.open(path) as opened:
                turned = _upright(opened, (width, height))
                pixels = np.array(converted(turned, "RGB", opened.format))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{path} is {pixels.shape[0]} x {pixels.shape[1]} pixels, but {split.annotations} "
                f"says {height} x {width}"
            )
        boxes, labels = split.target(sample.index)
        if sample.mirrored:
            pixels = pixels[:, ::-1]
            left, right = np.float32(width) - boxes[:, 2], np.float32(width) - boxes[:, 0]
            boxes = np.stack([left, boxes[:, 1], right, boxes[:, 3]], 1)
        target = {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels)}
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return image, target, sample.index


# -- batches --------------------------------------------------------------------------------------


def _read(
    split: BoxSplit, batches: list[list[Sample]], config: TrainConfig, world: World
) -> Iterator[list[Item]]:
    """The batches, by worker processes; DataError for an image that is not what it should be."""
    loader = DataLoader(
        _Images(split),
        batch_sampler=batches,
        collate_fn=as_it_is,
        pin_memory=world.device.type == "cuda",
        # Of its own, so that what the step draws does not depend on when a loader was made.
        generator=torch.Generator().manual_seed(0),
        **worker_options(config.reader.workers),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _on_device(batch: list[Item], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    images = [image.to(device, non_blocking=True).float() / 255 for image, _, _ in batch]
    targets = [
        {name: value.to(device, non_blocking=True) for name, value in target.items()}
        for _, target, _ in batch
    ]
    return images, targets


class TrainBatches:
    """Shuffled and mirrored batches of images that are all upright or all wide.

    Every pass over the images is drawn from (seed, number of the pass) alone, for all processes
    alike, and each takes its part of every batch. What upright and wide images leave over beside
    whole batches is put together, so that a pass has as many batches as without groups. An epoch
    is a pass, or ``epoch_steps`` batches of the passes one after another.

    Args:
        split: the images.
        config: batch size, seed, ``flip``, ``epoch_steps`` and workers.
        world: the processes.
    """

    def __init__(self, split: BoxSplit, config: TrainConfig, world: World) -> None:
        self.split = split
        self.config = config
        self.world = world
        self.batch_size = config.optim.batch_size
        self.per_pass = len(split) // self.batch_size
        if not self.per_pass:
            raise ValueError(
                f"--batch-size must be at most the {len(split)} training images, got "
                f"{self.batch_size}"
            )
        self.steps = config.detection.epoch_steps or self.per_pass
        self._wide = split.sizes[:, 1] >= split.sizes[:, 0]

    def __len__(self) -> int:
        return self.steps

    def plan(self, number: int) -> list[list[Sample]]:
        """The batches of a pass, of all processes together."""
        state = np.random.SeedSequence([self.config.run.seed, number, 2])
        random = np.random.default_rng(state)
        order = random.permutation(len(self.split))
        mirrored = random.integers(2, size=len(self.split)) > 0
        if not self.config.data.flip:
            mirrored[:] = False
        size, batches, rest = self.batch_size, [], []
        for group in (order[self._wide[order]], order[~self._wide[order]]):
            whole = len(group) // size * size
            batches += list(group[:whole].reshape(-1, size))
            rest.append(group[whole:])
        left = np.concatenate(rest)
        batches += list(left[: len(left) // size * size].reshape(-1, size))
        return [
            [Sample(int(i), bool(mirrored[i])) for i in batches[place]]
            for place in random.permutation(len(batches))
        ]

    def own(self, epoch: int, start: int = 0) -> Iterator[list[Sample]]:
        """This process's part of the batches of an epoch, from number ``start`` on."""
        first, rank = epoch * self.steps, self.world.rank
        share = self.batch_size // self.world.size
        known: tuple[int, list[list[Sample]]] = (-1, [])
        for step in range(first + start, first + self.steps):
            number, place = divmod(step, self.per_pass)
            if known[0] != number:
                known = (number, self.plan(number))
            yield known[1][place][rank * share : (rank + 1) * share]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """(images, targets) of this process, as torchvision's detectors take them."""
        batches = list(self.own(epoch, start))
        for batch in _read(self.split, batches, self.config, self.world):
            yield _on_device(batch, self.world.device)


# To a multiple of which torchvision's detectors pad a batch.
STRIDE = 32


def padded_sizes(sizes: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Height and width (N, 2) that images have in an evaluation, alone in their batch.

    Args:
        sizes: (N, 2) int64, height and width of the images.
        config: its last ``min_size``, and ``max_size``.
    """
    options = config.detection
    scale = np.minimum(options.min_size[-1] / sizes.min(1), options.max_size / sizes.max(1))
    resized = np.floor(sizes * scale[:, None]).astype(np.int64)
    return -(-resized // STRIDE) * STRIDE


class TestBatches:
    """Every image once: (images, targets, their numbers in the split), large ones first.

    A batch has images of one padded size. Each is then seen as it would be alone, since what is
    around an image has a part in what is found in it: the results are the same, up to rounding,
    for any batch size and number of processes. These share the images; one may have a batch less
    than another.
    """

    __test__ = False  # nothing for pytest

    def __init__(self, split: BoxSplit, config: TrainConfig, world: World) -> None:
        self.split = split
        self.config = config
        self.world = world
        size = -(-config.detection.detect_batch_size // world.size)
        padded = padded_sizes(split.sizes, config)
        batches: list[np.ndarray] = []
        for one in np.unique(padded, axis=0)[::-1]:
            own = np.flatnonzero((padded == one).all(1))
            batches += [own[i : i + size] for i in range(0, len(own), size)]
        self._own = [
            [Sample(int(i), False) for i in batch] for batch in batches[world.rank :: world.size]
        ]

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Target], list[int]]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[tuple[list[Tensor], list[Target], list[int]]]:
        """This process's batches, from number ``start`` on."""
        for batch in _read(self.split, self._own[start:], self.config, self.world):
            yield *_on_device(batch, self.world.device), [index for _, _, index in batch]


# -- the source -----------------------------------------------------------------------------------


class DetectionSource:
    """Training and test images with boxes of the same classes.

    Attributes:
        name: of the data set.
        classes: names, the background first.
        category_ids: of the classes but the background.
        train_split: to train on.
        test_split: for the evaluation.
    """

    def __init__(self, name: str, train_split: BoxSplit, test_split: BoxSplit) -> None:
        self.name = name
        self.train_split, self.test_split = train_split, test_split
        self.classes = train_split.classes
        self.category_ids = train_split.category_ids
        digest = hashlib.sha256(json.dumps([self.classes, self.category_ids]).encode())
        for split in (train_split, test_split):
            for values in (split.image_ids, split.sizes, split.starts, split.boxes, split.labels):
                digest.update(np.ascontiguousarray(values).data)
        self._digest = digest.hexdigest()[:16]

    @property
    def train_images(self) -> int:
        """How many there are to train on."""
        return len(self.train_split)

    @property
    def test_images(self) -> int:
        """How many there are in the evaluation."""
        return len(self.test_split)

    def fingerprint(self) -> str:
        """By every annotation, not by what is in the images."""
        return f"{self.train_images} + {self.test_images} images, boxes {self._digest}"

    @staticmethod
    def open(config: TrainConfig, *, progress: bool = False) -> DetectionSource:
        """The data set that the configuration names.

        Raises:
            FileNotFoundError: a folder, a file, or an image is missing.
            ValueError: a broken annotation file, or other categories in one than in the other.
        """
        began = time.perf_counter()
        train = read_split(config.data.data, config.detection.train_set)
        test = read_test_split(config)
        for what in ("category_ids", "classes"):
            if getattr(train, what) != getattr(test, what):
                raise ValueError(
                    f"{test.annotations} has other categories than {train.annotations}"
                )
        if config.data.limit is not None:
            train = train.part(config.data.limit)
        if progress:
            words = f"{len(train)} and {len(test)} images"
            if train.dropped.any():
                words += f", {train.dropped.sum()} training boxes without area left out"
            print(f"{config.data.data}: {words} ({time.perf_counter() - began:.0f} s)", flush=True)
        return DetectionSource(Path(config.data.data).name, train, test)
