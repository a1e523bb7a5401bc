"""Batches of images that worker processes read from disk, augment and send to the device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dnkd_ext.train.data.batches import BatchShare
from dnkd_ext.train.data.decoding import DataError
from dnkd_ext.train.data.folders import FileSplit
from dnkd_ext.train.data.reader_options import ReaderOptions
from dnkd_ext.train.data.samples import (
    MIX,
    ORDER,
    Batch,
    FileSamples,
    SampleMaker,
    ShardBatches,
    build_transform,
    collate,
    seeded,
)
from dnkd_ext.train.data.shards import ShardSplit
from dnkd_ext.train.data.workers import (
    WorkerDied,
    as_it_is,
    died_of,
    worker_death,
    worker_options,
)

__all__ = [
    "EvalLoader",
    "Order",
    "TrainLoader",
]


class Order(NamedTuple):
    """Which images this process has in an epoch, each (steps, its part of a batch) int64.

    ``index`` of the image, and with repeated augmentation ``copy``: which time it is.
    """

    index: np.ndarray
    copy: np.ndarray


class _Rows:
    """The batch sampler: keys of the samples of every batch that is left of an epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.order = Order(np.empty((0, 0), np.int64), np.empty((0, 0), np.int64))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for row in zip(*self.order, strict=True):
            places = zip(*(values.tolist() for values in row), strict=True)
            yield [(self.epoch, index, copy) for index, copy in places]

    def __len__(self) -> int:
        return len(self.order.index)


class _Loader(BatchShare):
    """What training and evaluation share: workers, their errors, and the way to the device."""

    def __init__(
        self,
        split: FileSplit | ShardSplit,
        batch_size: int,
        options: ReaderOptions,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        channels_last: bool,
        dtype: torch.dtype,
        is_training: bool,
    ) -> None:
        options.check()
        if len(mean) not in (1, 3) or len(std) != len(mean):
            raise ValueError(
                "--mean and --std must have a value for each of 3 colours, or 1 for grey images, "
                f"got {len(mean)} and {len(std)}"
            )
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        super().__init__(
            batch_size,
            len(mean),
            mean=mean,
            std=std,
            rank=rank,
            world_size=world_size,
            device=torch.device(device),
            channels_last=channels_last,
            dtype=dtype,
        )
        self.split = split
        self.place = split.place
        self.options = options
        self.unreadable = 0
        self.first_unreadable = ""
        erases = is_training and options.random_erasing > 0
        self._blank = torch.zeros(
            len(mean),
            options.image_size,
            options.image_size,
            dtype=torch.float32 if erases else torch.uint8,
        )
        self._collate = functools.partial(collate, blank=self._blank, size=self.local_size)
        self._maker = SampleMaker(
            build_transform(options, mean, std, is_training=is_training),
            "RGB" if len(mean) == 3 else "L",
            seed,
            options.on_error,
            is_training,
        )
        self._loader: DataLoader | None = None
        self._stream: torch.cuda.Stream | None = None
        self._rows = _Rows()
        self._turn = 0
        self._streams = max(1, options.workers)
        self._shards: ShardBatches | None = None

    def _divide(self, split: ShardSplit, steps: int) -> ShardBatches:
        return ShardBatches(
            split,
            self._maker,
            self._collate,
            self.local_size,
            steps,
            self._streams,
            self.rank,
            self.world_size,
            self.options.shuffle_buffer,
        )

    def _start(self) -> DataLoader:
        """The loader, whose workers are kept from epoch to epoch."""
        if self._loader is None:
            shared: dict[str, Any] = {
                **worker_options(self.options.workers),
                "pin_memory": self.device.type == "cuda",
                "persistent_workers": self.options.workers > 0,
                # Else every epoch would draw from torch's own, which dropout uses, too.
                "generator": torch.Generator(),
            }
            if self._shards is not None:
                self._loader = DataLoader(
                    self._shards, batch_size=None, collate_fn=as_it_is, **shared
                )
            else:
                self._loader = DataLoader(
                    FileSamples(self.split, self._maker),
                    batch_sampler=self._rows,
                    collate_fn=self._collate,
                    **shared,
                )
        return self._loader

    def close(self) -> None:
        """End the worker processes; the next epoch starts new ones."""
        self._loader = None
        self._turn += 1

    def _read(self, aim: Callable[[], None]) -> Iterator[Batch]:
        """Batches on the CPU; errors of the workers become errors of this process.

        Args:
            aim: says which batches the workers are to make, when the first is asked for.

        Raises:
            WorkerDied: one did.
            RuntimeError: another epoch was begun meanwhile.
            DataError: an image cannot be read, or has no class.
        """
        self._turn += 1
        turn = self._turn
        self.unreadable = count = 0
        self.first_unreadable = first = ""
        batches: Iterator[Any] | None = None
        while True:
            if turn != self._turn:
                raise RuntimeError(
                    "this epoch cannot go on: another one of the same loader was begun"
                )
            died: WorkerDied | None = None
            try:
                if batches is None:
                    aim()
                    batches = iter(self._start())
                batch = next(batches)
            except StopIteration:
                break
            except RuntimeError as error:
                died = worker_death(error, self.options.workers)
                if died is None:
                    raise
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                # It held the memory of batches that were on their way. What was raised within a
                # worker says that it was caught there.
                if not self.options.workers or str(error).startswith("Caught "):
                    raise
                died = died_of(f"{type(error).__name__}: {error}", self.options.workers)
            # Who keeps an error keeps all that its traceback refers to. Workers must not be among
            # that: found by the garbage collector, they take seconds to end.
            if died is not None:
                batches = None
                self.close()
                try:
                    raise died
                finally:
                    del died
            if isinstance(batch, DataError):
                batches = None
                self.close()
                try:
                    raise batch
                finally:
                    del batch
            for note in batch.notes:
                warnings.warn(note, stacklevel=3)
            count += len(batch.failed)
            self.first_unreadable = first = first or next(iter(batch.failed), "")
            yield batch
        if count:
            done = "replaced by the next" if self._maker.is_training else "left out"
            warnings.warn(
                f"{count} images could not be read and were {done}; one is {first}",
                stacklevel=3,
            )

    def _sent(self, images: Tensor) -> Tensor:
        """Images as they come from the workers, on the device and normalised, float32."""
        return self._normalised(images.to(self.device, non_blocking=True))

    def _on_device(
        self, batches: Iterator[Batch], finish: Callable[[int, Batch], tuple[Tensor, ...]]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Batches made ready by ``finish``; on a GPU one ahead, beside the step on the last one.

        A batch is to be used on the stream that is current when the next one is asked for.
        """
        if self.device.type != "cuda":
            for number, batch in enumerate(batches):
                self.unreadable += len(batch.failed)
                yield finish(number, batch)
            return
        if self._stream is None:
            # One for all epochs: the allocator keeps memory for each stream apart.
            self._stream = torch.cuda.Stream(self.device)
        ready: tuple[Tensor, ...] | None = None
        failed = 0
        for number, batch in enumerate(batches):
            # What the user has freed may be written anew only when the work on it is done.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                coming = finish(number, batch)
            if ready is not None:
                self.unreadable += failed
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            ready, failed = coming, len(batch.failed)
        if ready is not None:
            self.unreadable += failed
            yield ready


class TrainLoader(_Loader):
    """Shuffled and augmented batches, one epoch at a time, by timm's transforms.

    With class folders and archives every random number of a sample comes from (seed, epoch, image),
    so that a batch depends neither on the number of workers nor on where an interrupted epoch goes
    on, and the parts of all processes together not on how many there are. Images behind the last
    whole batch are left out, other ones every epoch. With repeated augmentation a batch has each
    of its images ``repeats`` times, as far from each other as can be, and an epoch as much fewer.

    WebDataset shards are divided between processes and workers, each of which shuffles its own and
    begins anew when they end; an epoch has as many batches as were announced, and some images
    twice or never. It is the same for the same seed, epoch, number of processes and of workers.
    To go on within an epoch, a worker reads what was seen again and drops it undecoded.

    Mixup and CutMix (timm's, one share and rectangle per batch) draw from (seed, epoch, step). An
    image is mixed with the one at the mirrored place of its process's part. So that these pairs do
    not depend on the number of processes, a process's part are then places from the beginning of
    the batch, and as many from its end.

    Args:
        split: the images.
        batch_size: of all processes together.
        options: what is done to them.
        num_classes: width of soft targets.
        mean: of every channel, of pixels in [0, 1]; one value for grey images, else three.
        std: likewise.
        label_smoothing: of soft targets; without mixing the targets are hard.
        seed: not negative.
        rank: number of this process.
        world_size: how many there are.
        device: where batches are wanted.
        channels_last: memory format of the images.
        dtype: of the images.

    Attributes:
        unreadable: images of this process that were replaced in the batches that it has had of the
            epoch that was begun last.

    Raises:
        ValueError: a value out of range; no whole batch; parts of a batch that cannot be mixed in
            pairs; or fewer shards than workers.
    """

    def __init__(
        self,
        split: FileSplit | ShardSplit,
        batch_size: int,
        options: ReaderOptions,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        label_smoothing: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            split,
            batch_size,
            options,
            mean=mean,
            std=std,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
            channels_last=channels_last,
            dtype=dtype,
            is_training=True,
        )
        self.seed = seed
        self._steps = len(split) // batch_size
        if not self._steps:
            raise ValueError(
                f"batch_size must be at most the number of images, {len(split)}, got {batch_size}"
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        self._mixup = None
        if options.mixes:
            from timm.data import Mixup

            if self.local_size % 2:
                raise ValueError(
                    "batch_size must give every process an even number of images to mix, got "
                    f"{batch_size} over {world_size}"
                )
            self._mixup = Mixup(
                options.mixup,
                options.cutmix,
                prob=options.mixup_prob,
                switch_prob=options.mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        if isinstance(split, ShardSplit):
            if len(split.urls) < self._streams * world_size:
                raise ValueError(
                    f"{len(split.urls)} shards cannot be divided between {world_size} processes "
                    f"with --workers {options.workers}: at least "
                    f"{self._streams * world_size} are needed"
                )
            self._shards = self._divide(split, self._steps)

    def __len__(self) -> int:
        return self._steps

    def order(self, epoch: int) -> Order:
        """The images of this process's part of an epoch, batch after batch; not for shards.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        state = np.random.SeedSequence([ORDER, self.seed, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        shuffled = torch.randperm(len(self.split), generator=generator).numpy()
        repeats = self.options.repeats
        places = np.arange(self._steps * self.batch_size).reshape(self._steps, -1)
        # First copies first, then the second ones: so they fall to different processes.
        apart = np.argsort(places % repeats, axis=1, kind="stable")
        places = np.take_along_axis(places, apart, axis=1)
        size = self.local_size
        if self._mixup is None:
            own = places[:, self.rank * size : (self.rank + 1) * size]
        else:
            half = size // 2
            begin, end = self.rank * half, self.batch_size - self.rank * half
            own = np.hstack([places[:, begin : begin + half], places[:, end - half : end]])
        return Order(shuffled[own // repeats], own % repeats)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, target) of this process, from batch number ``start`` of the epoch on.

        Images are (N, C, H, W); the target is (N,) int64, or (N, num_classes) float32 where images
        are mixed. Only one epoch of a loader can be run through at a time.

        Raises:
            ValueError: a negative epoch, or a start outside of it. While iterating
                :class:`~dnkd_ext.train.data.decoding.DataError`, which names the image.
            RuntimeError: while iterating: another epoch was begun, or :class:`WorkerDied`.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[Any]:
        def aim() -> None:
            if self._shards is not None:
                self._shards.place.copy_(torch.tensor([epoch, start]))
            else:
                self._rows.epoch = epoch
                self._rows.order = Order(*(values[start:] for values in self.order(epoch)))

        def finish(number: int, batch: Batch) -> tuple[Tensor, ...]:
            images = self._sent(batch.images)
            target = batch.target.to(self.device, non_blocking=True)
            if self._mixup is not None:
                with seeded(MIX, self.seed, epoch, start + number):
                    images, target = self._mixup(images, target)
            return images.to(self.dtype), target

        return self._on_device(self._read(aim), finish)


class EvalLoader(_Loader):
    """Every image once, resized and cut as in evaluation: (images, target, mask).

    ``mask`` (N,) is False where a batch is filled up, and where ``on_error="skip"`` left an image
    out; such images are black, of class 0. All processes yield as many batches. Class folders and
    archives come in order; WebDataset shards are divided between processes and workers, and the
    order depends on how many there are.

    Args:
        split: the images; those for training, too, can be seen like this.
        batch_size: of all processes together.
        options: what is done to them.
        mean: of every channel, of pixels in [0, 1]; one value for grey images, else three.
        std: likewise.
        rank: number of this process.
        world_size: how many there are.
        device: where batches are wanted.
        channels_last: memory format of the images.
        dtype: of the images.

    Attributes:
        place: of the split.
        unreadable: images of this process that were left out, when they were run through last.
        first_unreadable: one of them.

    Raises:
        ValueError: a value out of range, or no images.
        FileNotFoundError: a shard that must be counted is missing.
    """

    def __init__(
        self,
        split: FileSplit | ShardSplit,
        batch_size: int,
        options: ReaderOptions,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            split,
            batch_size,
            options,
            mean=mean,
            std=std,
            seed=0,
            rank=rank,
            world_size=world_size,
            device=device,
            channels_last=channels_last,
            dtype=dtype,
            is_training=False,
        )
        if len(split) == 0:
            raise ValueError("split holds no images")
        if isinstance(split, ShardSplit):
            split = split.measured()
            self._steps = max(self._batches_of(split, other) for other in range(world_size))
            self._shards = self._divide(split, self._steps)
        else:
            self._steps = -(-len(split) // batch_size)

    def _batches_of(self, split: ShardSplit, rank: int) -> int:
        """How many batches a process's shards make; every worker fills up its last one."""
        assert split.lengths is not None
        every = self._streams * self.world_size
        streams = range(rank * self._streams, (rank + 1) * self._streams)
        return sum(-(-sum(split.lengths[stream::every]) // self.local_size) for stream in streams)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches from number ``start`` on; of shards those before are read and dropped.

        Raises:
            ValueError: a start that is no batch. While iterating
                :class:`~dnkd_ext.train.data.decoding.DataError`, which names the image.
            RuntimeError: while iterating: another pass was begun, or :class:`WorkerDied`.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._pass(start)

    def _pass(self, start: int) -> Iterator[Any]:
        def aim() -> None:
            places = np.arange(self._steps * self.batch_size).reshape(self._steps, -1)
            own = places[start:, self.rank * self.local_size : (self.rank + 1) * self.local_size]
            own = np.where(own < len(self.split), own, -1)
            self._rows.order = Order(own, np.zeros_like(own))

        batches = self._read(aim) if self._shards is None else islice(self._filled(), start, None)

        def finish(number: int, batch: Batch) -> tuple[Tensor, ...]:
            rest = (
                value.to(self.device, non_blocking=True) for value in (batch.target, batch.mask)
            )
            return self._sent(batch.images).to(self.dtype), *rest

        return self._on_device(batches, finish)

    def _filled(self) -> Iterator[Batch]:
        """This process's batches, and empty ones to be as many as any process has."""
        count = 0
        for batch in self._read(lambda: None):
            count += 1
            yield batch
        empty = self._collate([])
        for _ in range(self._steps - count):
            yield empty
