"""What the worker processes of loaders.py do: from files to augmented samples."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dnkd_ext.train.data.decoding import DataError, RawImage, UnreadableError, decode
from dnkd_ext.train.data.folders import FileSplit
from dnkd_ext.train.data.reader_options import ReaderOptions
from dnkd_ext.train.data.shards import ShardSplit

__all__ = [
    "Batch",
    "FileSamples",
    "Item",
    "SampleMaker",
    "ShardBatches",
    "build_transform",
    "collate",
    "seeded",
]

# What is drawn; without it the draws of two things with the same numbers would be the same.
ORDER, SAMPLE, MIX, SHARDS = range(4)
# So many unreadable images in a row are no accident.
LONGEST_GAP = 100


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers depend on ``numbers`` within the context.

    Their states are restored afterwards; those of other devices are left alone.
    """
    words = np.random.SeedSequence(numbers).generate_state(3)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    # torch.manual_seed would seed the GPUs, too.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class Item(NamedTuple):
    """A place in a batch; ``pixels`` is None where it stays empty."""

    pixels: Tensor | None
    target: int
    failed: str = ""


class Batch(NamedTuple):
    """Images (N, C, H, W) uint8, or float32 and normalised, on the CPU.

    ``target`` (N,) int64, ``mask`` (N,) bool: False where a place is empty; ``failed``: paths of
    what could not be read, a shard's for each image that is lost with it; ``notes``: what is to be
    told of such shards.
    """

    images: Tensor
    target: Tensor
    mask: Tensor
    failed: list[str]
    notes: list[str]


def collate(
    items: list[Item | UnreadableError], blank: Tensor, size: int
) -> Batch | UnreadableError:
    """A batch of ``size`` places, or the first error among its items.

    An error is returned, not raised, so that it leaves the worker as what it is.
    """
    images, target = [], torch.zeros(size, dtype=torch.int64)
    mask = torch.zeros(size, dtype=torch.bool)
    failed = []
    for place, item in enumerate(items):
        if isinstance(item, UnreadableError):
            return item
        if item.failed:
            failed.append(item.failed)
        images.append(blank if item.pixels is None else item.pixels)
        mask[place] = item.pixels is not None
        target[place] = item.target if item.pixels is not None else 0
    images += [blank] * (size - len(items))
    return Batch(torch.stack(images), target, mask, failed, [])


def build_transform(
    options: ReaderOptions, mean: Sequence[float], std: Sequence[float], *, is_training: bool
) -> Callable[[Any], Tensor]:
    """timm's transforms, from a picture to (C, H, W) uint8, or float32 where it is erased."""
    from timm.data import auto_augment, create_transform

    erases = is_training and options.random_erasing > 0
    interpolation = options.interpolation
    if not is_training and interpolation == "random":
        interpolation = "bilinear"
    try:
        transform = create_transform(
            options.image_size,
            is_training=is_training,
            scale=options.scale,
            ratio=options.ratio,
            hflip=options.hflip,
            color_jitter=options.color_jitter or None,
            auto_augment=options.auto_augment or None,
            interpolation=interpolation,
            crop_pct=options.crop_pct,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=options.random_erasing if erases else 0.0,
            re_mode=options.erasing_mode,
            use_prefetcher=not erases,
        )
    except (AssertionError, KeyError, ValueError) as error:
        if not options.auto_augment:
            raise
        raise ValueError(
            f"--auto-augment must name one of timm's policies, got {options.auto_augment!r}"
        ) from error
    for step in transform.transforms:
        # RandAugment and AugMix have a list of operations, AutoAugment one of lists of them.
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits_to_keep: int, **options: Any) -> Any:
    """timm's, which at the greatest strengths asks for no bits at all: Pillow 13 refuses them."""
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return auto_augment.posterize(image, bits_to_keep, **options)


class SampleMaker:
    """What both kinds of data sets need to make a sample of what they read."""

    def __init__(
        self,
        transform: Callable[[Any], Tensor],
        mode: str,
        seed: int,
        on_error: str,
        is_training: bool,
    ) -> None:
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self.skips = on_error == "skip"
        self.is_training = is_training

    def item(self, image: Any, target: int, failed: str, *numbers: int) -> Item:
        """A picture's sample, its augmentation drawn from ``numbers``."""
        with seeded(SAMPLE, self.seed, *numbers):
            return Item(self.transform(image), target, failed)


class FileSamples(Dataset):
    """Samples by (epoch, index of the image, which of its copies); an index of -1 is an empty one.

    A sample depends on these and the seed alone, not on the process that makes it.
    """

    def __init__(self, split: FileSplit, maker: SampleMaker) -> None:
        self.split = split
        self.maker = maker

    def __getitem__(self, key: tuple[int, int, int]) -> Item | UnreadableError:
        epoch, index, number = key
        if index < 0:
            return Item(None, 0)
        failed = ""
        tries = min(len(self.split), LONGEST_GAP)
        for step in range(tries):
            place = (index + step) % len(self.split)
            try:
                image = self.split.load(place, self.maker.mode)
            except UnreadableError as error:
                if not self.maker.skips:
                    return error
                failed = failed or error.name
                if not self.maker.is_training:
                    return Item(None, 0, failed)
                continue
            target = int(self.split.target[place])
            return self.maker.item(image, target, failed, epoch, index, number)
        return UnreadableError(failed, f"nor can the {tries - 1} behind it")


class _Ahead:
    """An iterator whose next values can be looked at."""

    def __init__(self, values: Iterator[RawImage]) -> None:
        self.values = values
        self.seen: deque[RawImage] = deque()

    def __next__(self) -> RawImage:
        return self.seen.popleft() if self.seen else next(self.values)

    def coming(self, count: int) -> Iterator[RawImage]:
        """The next ``count`` values, which stay where they are."""
        for place in range(count):
            if place == len(self.seen):
                self.seen.append(next(self.values))
            yield self.seen[place]


def _other_length(url: str, length: int, held: int | str) -> UnreadableError:
    return UnreadableError(url, f"{length} images were announced, it holds {held}")


class _Broken:
    """Shards of an epoch that broke off, as :class:`Batch` has them, each told once."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.notes: list[str] = []
        self.seen: set[str] = set()

    def add(self, error: UnreadableError, length: int | None, count: int, last: str) -> None:
        """A shard of which ``count`` images could be read, and the last of them."""
        if error.name in self.seen:
            return
        self.seen.add(error.name)
        lost = 1 if length is None else max(1, length - count)
        told = f"{lost} of {length} are lost"
        if length is None:
            told = "how many are lost is not known, and they count as one"
        behind = f", behind {last}" if last else ""
        self.failed += [error.name] * lost
        self.notes.append(f"{error}; it breaks off after {count} images{behind}: {told}")

    def move_to(self, batch: Batch) -> None:
        """What is new becomes the batch's."""
        batch.failed.extend(self.failed)
        batch.notes.extend(self.notes)
        self.forget()

    def forget(self) -> None:
        """Count nothing of what was added until now, nor tell it."""
        self.failed.clear()
        self.notes.clear()


class ShardBatches(IterableDataset):
    """Whole batches of this process's shards, which its workers share.

    Every worker has shards of its own. Epoch and first batch reach the workers, which outlive
    epochs, through shared memory.
    """

    def __init__(
        self,
        split: ShardSplit,
        maker: SampleMaker,
        collate: Callable[[list[Any]], Any],
        local_size: int,
        steps: int,
        streams: int,
        rank: int,
        world_size: int,
        buffer: int,
    ) -> None:
        self.split = split
        self.lengths = dict(zip(split.urls, split.lengths or (), strict=False))
        self.maker = maker
        self.collate = collate
        self.local_size = local_size
        self.steps = steps
        self.streams = streams
        self.first = rank * streams
        self.of = streams * world_size
        self.buffer = buffer
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        epoch, start = self.place.tolist()
        if self.maker.is_training:
            return self._guarded(self._training(number, epoch, start))
        return self._guarded(self._evaluation(number))

    def _guarded(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except DataError as error:
            # Handed over, not raised, so that it leaves the worker as what it is.
            yield error

    def _decoded(self, raw: RawImage, failed: str, *numbers: int) -> Item:
        image = decode(raw.name, raw.content, self.maker.mode)
        # The folder's name is none of the image's.
        name = zlib.crc32(raw.name.rpartition("/")[2].encode())
        return self.maker.item(image, raw.target, failed, *numbers, name)

    # -- training: an endless stream -----------------------------------------------------------

    def _training(self, worker: int, epoch: int, start: int) -> Iterator[Any]:
        # The loader asks its workers in turn, beginning with the first.
        stream = (worker + start) % self.streams
        broken = _Broken()
        images = _Ahead(self._stream(stream, epoch, broken))
        passed = len(range(stream, start, self.streams))
        for _ in range(passed * self.local_size):
            next(images)
        broken.forget()
        for _ in range(start + worker, self.steps, self.streams):
            items = [self._next(images, epoch) for _ in range(self.local_size)]
            batch = self.collate(items)
            if isinstance(batch, Batch):
                broken.move_to(batch)
            yield batch

    def _next(self, images: _Ahead, epoch: int) -> Item:
        raw = next(images)
        try:
            return self._decoded(raw, "", epoch)
        except UnreadableError:
            if not self.maker.skips:
                raise
        for other in images.coming(LONGEST_GAP):
            with contextlib.suppress(UnreadableError):
                return self._decoded(other, raw.name, epoch)
        raise UnreadableError(raw.name, f"nor can the {LONGEST_GAP} behind it")

    def _stream(self, stream: int, epoch: int, broken: _Broken) -> Iterator[RawImage]:
        """Undecoded images, shuffled, again and again."""
        numbers = [SHARDS, self.maker.seed, epoch]
        words = np.random.SeedSequence(numbers).generate_state(1)
        shards = list(self.split.urls)
        # All processes and workers alike, so that they can divide the shards.
        random.Random(int(words[0])).shuffle(shards)
        own = shards[self.first + stream :: self.of]
        words = np.random.SeedSequence([*numbers, 1 + self.first + stream]).generate_state(1)
        draw = random.Random(int(words[0]))
        while True:
            found = 0
            for raw in self._shuffled(self._opened(own, broken), draw):
                found += 1
                yield raw
            if not found:
                raise UnreadableError(own[0], "no shard of this worker holds an image")
            draw.shuffle(own)

    def _shuffled(self, images: Iterator[RawImage], draw: random.Random) -> Iterator[RawImage]:
        buffer: list[RawImage] = []
        for raw in images:
            if len(buffer) < self.buffer:
                buffer.append(raw)
                continue
            place = draw.randrange(len(buffer))
            chosen, buffer[place] = buffer[place], raw
            yield chosen
        draw.shuffle(buffer)
        yield from buffer

    def _opened(self, shards: list[str], broken: _Broken) -> Iterator[RawImage]:
        """The images of the shards, one shard after another."""
        for url in shards:
            length = self.lengths.get(url)
            count, last, error = 0, "", None
            try:
                for raw in self.split.read(url):
                    count, last = count + 1, raw.name
                    yield raw
            except UnreadableError as caught:
                if not self.maker.skips:
                    raise
                error = caught
            if count == length:
                continue  # only what lies behind the images is broken
            # An archive that ends between two files looks like a whole one.
            if error is None and count < (length or 0):
                error = _other_length(url, length, count)
                if not self.maker.skips:
                    raise error
            if error is not None:
                broken.add(error, length, count, last)

    # -- evaluation: every image once ----------------------------------------------------------

    def _evaluation(self, worker: int) -> Iterator[Any]:
        items: list[Item] = []
        for place in range(self.first + worker, len(self.split.urls), self.of):
            for item in self._whole(place):
                items.append(item)
                if len(items) == self.local_size:
                    yield self.collate(items)
                    items = []
        if items:
            yield self.collate(items)

    def _whole(self, place: int) -> Iterator[Item]:
        """As many items as the shard was said to hold."""
        assert self.split.lengths is not None
        url, length = self.split.urls[place], self.split.lengths[place]
        count = 0
        try:
            for raw in self.split.read(url):
                count += 1
                if count > length:
                    break
                try:
                    yield self._decoded(raw, "")
                except UnreadableError:
                    if not self.maker.skips:
                        raise
                    yield Item(None, 0, raw.name)
        except UnreadableError:
            if not self.maker.skips:
                raise
        if count != length:
            if not self.maker.skips:
                raise _other_length(url, length, "more" if count > length else count)
            for _ in range(length - count):
                yield Item(None, 0, url)
