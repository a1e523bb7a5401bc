"""Where a classifier's images come from: held in memory, or read from disk while training."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.batches import EvalBatches, TrainBatches
from dnkd_ext.train.data.image_files import left_out, load_images
from dnkd_ext.train.data.memory import KINDS, ImageSet, told_kinds
from dnkd_ext.train.data.readers import Splits, open_splits
from dnkd_ext.train.world import World

__all__ = ["Clean", "DiskSource", "Epochs", "MemorySource", "Source", "open_source"]


class Epochs(Protocol):
    """Shuffled and augmented batches; ``len`` is how many an epoch has.

    Attributes:
        unreadable: images in this process's batches of the epoch so far that were replaced, because
            they could not be read.
    """

    unreadable: int

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """(images, target) of this process, from batch number ``start`` of an epoch on.

        Behind them the numbers of the cut images, where the teacher's outputs are looked up.
        """
        ...


class Clean(Protocol):
    """Every image once, as it is: (images, target, mask); mask is False where a batch is filled.

    Attributes:
        place: where the images are.
        unreadable: images of this process that could not be read, when they were run through last.
        first_unreadable: one of them.
    """

    place: str
    unreadable: int
    first_unreadable: str

    def __len__(self) -> int:
        """Batches, of each process."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of this process."""
        ...

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Those from number ``start`` on."""
        ...


class Source(ABC):
    """Training and test images of the same classes.

    Attributes:
        name: of the data set.
        classes: their names, in the order of the labels.
        channels: of every image.
        image_size: height of every image, in pixels, as the models see it.
        train_images: how many; 0 of a source that was opened for the test images alone.
        test_images: how many.
    """

    name: str
    classes: list[str]
    channels: int
    image_size: int
    train_images: int
    test_images: int

    @abstractmethod
    def fingerprint(self) -> str:
        """The same for the same images and classes."""

    @abstractmethod
    def train(self, config: TrainConfig, world: World) -> Epochs:
        """This process's part of the training batches."""

    @abstractmethod
    def test(self, config: TrainConfig, world: World) -> Clean:
        """This process's part of the test images."""

    @abstractmethod
    def clean(self, config: TrainConfig, world: World) -> Clean:
        """This process's part of the training images, as they are."""


def _shared(config: TrainConfig, world: World) -> dict[str, Any]:
    return {
        **config.data.normalisation,
        "rank": world.rank,
        "world_size": world.size,
        "channels_last": config.run.channels_last,
    }


def _at_once(config: TrainConfig) -> int:
    """Images of an evaluation's batch, in a configuration that nobody has resolved, too."""
    return config.run.eval_batch_size or 500


class MemorySource(Source):
    """Images in memory, on the device."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.name, self.classes, self.channels = images.name, images.classes, images.channels
        self.image_size = images.train.pixels.shape[2]
        self.train_images, self.test_images = len(images.train), len(images.test)
        digest = hashlib.sha256(json.dumps(images.classes).encode())
        for split in (images.train, images.test):
            digest.update(split.pixels.cpu().numpy().data)
            digest.update(split.target.cpu().numpy().data)
        self._digest = digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """By every pixel."""
        return f"{self.train_images} + {self.test_images} images {self._digest}"

    def train(self, config: TrainConfig, world: World) -> TrainBatches:
        """Cut and mirrored at random."""
        return TrainBatches(
            self.images.train,
            config.optim.batch_size,
            seed=config.run.seed,
            pad=config.data.pad,
            flip=config.data.flip,
            gives_rows=config.looks_up_teacher,
            **_shared(config, world),
        )

    def test(self, config: TrainConfig, world: World) -> EvalBatches:
        """In order."""
        return EvalBatches(self.images.test, _at_once(config), **_shared(config, world))

    def clean(self, config: TrainConfig, world: World) -> EvalBatches:
        """In order."""
        return EvalBatches(self.images.train, _at_once(config), **_shared(config, world))


class DiskSource(Source):
    """Images that workers read, by timm's readers and transforms."""

    def __init__(self, name: str, splits: Splits, channels: int, image_size: int) -> None:
        self.splits = splits
        self.name, self.classes, self.channels = name, splits.classes, channels
        self.image_size = image_size
        self.train_images = 0 if splits.train is None else len(splits.train)
        self.test_images = len(splits.val)
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (splits.train, splits.val):
            for name in () if split is None else split.names():
                digest.update(f"{name}\n".encode())
            digest.update(b"\n")
        self._digest = digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """By the images' paths, or the shards' names and lengths, not by what is in them."""
        return f"{self.train_images} + {self.test_images} images {self._digest}"

    def train(self, config: TrainConfig, world: World) -> Epochs:
        """By the options of the reader: crops, colours, Mixup and so on."""
        from dnkd_ext.train.data.loaders import TrainLoader

        return TrainLoader(
            self.splits.train,
            config.optim.batch_size,
            config.reader,
            num_classes=len(self.classes),
            label_smoothing=config.method.label_smoothing if config.reader.mixes else 0.0,
            seed=config.run.seed,
            device=world.device,
            **_shared(config, world),
        )

    def _clean(self, split: Any, config: TrainConfig, world: World) -> Clean:
        from dnkd_ext.train.data.loaders import EvalLoader

        return EvalLoader(
            split,
            _at_once(config),
            config.reader,
            device=world.device,
            **_shared(config, world),
        )

    def test(self, config: TrainConfig, world: World) -> Clean:
        """Resized, and the centre of it."""
        return self._clean(self.splits.val, config, world)

    def clean(self, config: TrainConfig, world: World) -> Clean:
        """Likewise, of the training images."""
        return self._clean(self.splits.train, config, world)


def open_source(
    config: TrainConfig, world: World, *, progress: bool = True, test_only: bool = False
) -> Source:
    """The data set that the configuration names; collective.

    The first process opens it first: what it keeps, the index of an archive or a file of decoded
    images, is there for the others.

    Args:
        config: its groups ``data`` and ``reader``.
        world: the processes.
        progress: show a progress bar while decoding.
        test_only: the test images alone. Those for training need not be there, and are not read;
            with ``--cache`` all are, for the file holds both.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
        ModuleNotFoundError: timm is needed and not installed.
        ValueError: a broken data set, or options that do not fit it.
        OtherProcessFailed: the first process could not open it.
    """
    return world.first_ahead(lambda: _open(config, world, progress, test_only))


def _tell_left_out(counts: Mapping[str, int], place: str | Path) -> None:
    if counts:
        warnings.warn(
            f"{sum(counts.values())} image files of {place} were left out ({told_kinds(counts)}): "
            f"the kinds that are read are {KINDS}",
            stacklevel=2,
        )


def _open(config: TrainConfig, world: World, progress: bool, test_only: bool = False) -> Source:
    options = config.data
    if config.data.task == "imagenet":
        splits = open_splits(options.data, config.reader, test_only=test_only)
        if world.is_first:
            for split in (splits.train, splits.val):
                _tell_left_out(getattr(split, "left_out", {}), getattr(split, "place", ""))
        channels = len(options.normalisation["mean"])
        return DiskSource(Path(options.data).name, splits, channels, config.reader.image_size)
    was_cached = bool(options.cache) and Path(options.cache or "").exists()
    # The choice of a limited set does not depend on the seed: all seeds see the same.
    images = load_images(
        options.data,
        limit=options.limit,
        seed=0,
        cache=options.cache,
        progress=progress and world.is_first,
        test_only=test_only,
    )
    # Of a cache that was told when it was made; looking takes as long as listing all files.
    if world.is_first and not was_cached:
        # A cache holds both splits.
        alone = test_only and not options.cache
        _tell_left_out(left_out(options.data, test_only=alone), options.data)
    for name, values in options.normalisation.items():
        if len(values) != images.channels:
            raise ValueError(
                f"--{name} must have a value for each of {images.channels} channels, got "
                f"{len(values)}"
            )
    return MemorySource(images.to(world.device))
