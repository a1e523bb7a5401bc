"""Images from disk, apart from any model: how many per second the training loaders bring.

What is timed is the loader that trains, with a preset's augmentation, over pieces of scikit-learn's
photographs as JPEG files of ImageNet's usual size, in each kind of storage; or over a data set of
one's own. The first epoch, in which the workers start, is not counted. The files stay in the
operating system's cache: it is decoding and augmenting that is measured, not the disk.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results, tables
from benchmarks.disk import LOADING, append_loading
from benchmarks.results import Row
from dnkd_ext.progress import Progress
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data.sources import Source, open_source
from dnkd_ext.train.presets import load_preset
from dnkd_ext.train.world import World

# A ResNet's augmentation, and DeiT's: RandAugment, erasing, Mixup and CutMix.
PRESETS = ("imagenet/resnet34-resnet18/kd++", "imagenet/regnety_160-deit_base/kd++")
STORAGE = ("folders", "tar", "wds")
CLASSES = 4
# Height and width of most of ImageNet's images, and about the quality of their files.
SIZE, QUALITY = (375, 500), 90
PIECES = "pieces of photographs"


# -- data -----------------------------------------------------------------------------------------


def pieces(count: int, seed: int) -> Iterator[bytes]:
    """JPEG files: pieces of two photographs at random places, some of them mirrored."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    draw = np.random.default_rng(seed)
    for _ in range(count):
        photograph = photographs[draw.integers(len(photographs))]
        top, left = (
            draw.integers(have - want + 1)
            for have, want in zip(photograph.shape[:2], SIZE, strict=True)
        )
        piece = photograph[top : top + SIZE[0], left : left + SIZE[1]]
        if draw.integers(2):
            piece = piece[:, ::-1]
        file = io.BytesIO()
        Image.fromarray(piece).save(file, "jpeg", quality=QUALITY)
        yield file.getvalue()


def write_pieces(root: Path, count: int, seen: int, shards: int) -> dict[str, Path]:
    """So many images for training and for evaluation, in every kind of storage."""
    notes: dict[str, Any] = {"classes": [str(c) for c in range(CLASSES)], "splits": {}}
    folders, archives, dealt = (root / name for name in STORAGE)
    for folder in (archives, dealt):
        folder.mkdir(parents=True)
    for seed, (split, images) in enumerate(
        {"train": count, "val": max(seen, shards, CLASSES)}.items()
    ):
        files = list(pieces(images, seed))
        with tarfile.open(archives / f"{split}.tar", "w") as archive:
            for number, content in enumerate(files):
                folder = folders / split / str(number % CLASSES)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number}.jpg").write_bytes(content)
                _add(archive, f"{number % CLASSES}/{number}.jpg", content)
        names, lengths = [], []
        for shard in range(shards):
            own = range(shard, images, shards)
            names.append(f"{split}-{shard:04d}.tar")
            lengths.append(len(own))
            with tarfile.open(dealt / names[-1], "w") as archive:
                for number in own:
                    _add(archive, f"{number}.jpg", files[number])
                    _add(archive, f"{number}.cls", str(number % CLASSES).encode())
        notes["splits"][split] = {
            "name": split, "num_samples": images, "filenames": names, "shard_lengths": lengths,
        }  # fmt: skip
    (dealt / "_info.json").write_text(json.dumps(notes))
    return {"folders": folders, "tar": archives, "wds": dealt}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# -- measuring ------------------------------------------------------------------------------------


def configure(preset: str, data: Path, storage: str, batch: int, workers: int) -> TrainConfig:
    """The preset's configuration over other data.

    Raises:
        ValueError: an unknown preset, or one whose images are held in memory.
    """
    settings = load_preset(preset).settings
    if settings.get("task") != "imagenet":
        raise ValueError(f"{preset} does not read images from disk while training")
    given = {
        **settings, "data": str(data), "reader": "wds/pieces" if storage == "wds" else "",
        "batch_size": batch, "eval_batch_size": batch, "workers": workers,
    }  # fmt: skip
    return replace(TrainConfig(), given)


def measure(config: TrainConfig, source: Source, rounds: int) -> Row:
    """Images per second of training batches, by epochs, and of a pass as in evaluation."""
    world = World(0, 1, torch.device("cpu"))
    train, test = source.train(config, world), source.test(config, world)
    rates = []
    for epoch in range(rounds + 1):
        begin = time.perf_counter()
        count = sum(len(images) for images, _ in train.epoch(epoch))
        if epoch > 0:
            rates.append(count / (time.perf_counter() - begin))
    train.close()
    for _ in range(2):  # the workers start in the first
        begin = time.perf_counter()
        count = sum(int(mask.sum()) for _, _, mask in test)
        seconds = time.perf_counter() - begin
    test.close()
    ordered = sorted(rates)
    return {
        "rounds": rounds,
        "train_ips": round(statistics.median(ordered), 1),
        "low_ips": round(ordered[0], 1),
        "high_ips": round(ordered[-1], 1),
        "eval_ips": round(count / seconds, 1),
    }


def _rows(
    presets: Sequence[str],
    storage: Sequence[str],
    data: str | None,
    images: int,
    batch: int,
    workers: Sequence[int],
    rounds: int,
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        if data is not None:
            places = {"wds" if list(Path(data).glob("*_info.json")) else "given": Path(data)}
        else:
            most = max(1, *workers)
            # A worker makes whole batches: each gets several.
            made = write_pieces(Path(folder), images, 4 * batch * most, shards=2 * most)
            places = {name: made[name] for name in storage}
        for preset, (kind, place), count in itertools.product(presets, places.items(), workers):
            configure(preset, place, kind, batch, count).check_data()  # before anything is measured
        with Progress(len(presets) * len(places) * len(workers), "loading", unit="setting") as bar:
            for preset, (kind, place), count in itertools.product(presets, places.items(), workers):
                bar.say(f"{preset}, {kind}, {count} workers")
                config = configure(preset, place, kind, batch, count)
                source = open_source(config, World(0, 1, torch.device("cpu")), progress=False)
                yield {
                    **results.environment("cpu"),
                    "preset": preset,
                    "data": PIECES if data is None else source.name,
                    "storage": kind,
                    "images": source.train_images,
                    "batch": batch,
                    "image": source.image_size,
                    "workers": count,
                    **measure(config, source, rounds),
                }
                bar.advance()


def run(
    *,
    presets: Sequence[str] = PRESETS,
    storage: Sequence[str] = STORAGE,
    data: str | None = None,
    images: int = 512,
    batch: int = 64,
    workers: Sequence[int] = (0, 2),
    rounds: int = 3,
    out: Path | None = None,
) -> int:
    """Measure, setting by setting, each of which is in ``out`` as soon as it is done.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as ``dnkd train`` on such data.
    """
    for name, value in (("images", images), ("batch-size", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if data is None and images < batch:
        raise ValueError(f"--images must be at least a batch, {batch}, got {images}")
    LOADING.require_addable(out)
    rows: list[Row] = []
    try:
        for row in _rows(presets, storage, data, images, batch, workers, rounds):
            if out is not None:
                append_loading([row], out)
            rows.append(row)
    finally:
        if rows:
            print(tables.loading_table(rows))
    return 0
