"""Batches of images that are held in memory: cut, mirrored and normalised on their device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnkd_ext.train.data.memory import Images, crop_and_flip

__all__ = ["BatchShare", "EvalBatches", "Plan", "TrainBatches"]


class Plan(NamedTuple):
    """What becomes of an epoch's or a batch's images, each (N,) int64 on the images' device.

    ``index`` of the image, the crop's offsets ``dy`` and ``dx`` in the padded image, and whether
    it is ``mirrored`` (0 or 1).
    """

    index: Tensor
    dy: Tensor
    dx: Tensor
    mirrored: Tensor


class BatchShare:
    """What all that makes batches has: a process's part of a batch, and normalisation.

    Args:
        batch_size: of all processes together.
        channels: of every image.
        mean: of every channel, of pixels in [0, 1].
        std: likewise.
        rank: number of this process.
        world_size: how many there are.
        device: where batches are wanted.
        channels_last: memory format of the images.
        dtype: of the images.

    Raises:
        ValueError: a value out of range.
    """

    # What is in memory has been read.
    unreadable = 0
    first_unreadable = ""
    place = "memory"

    def __init__(
        self,
        batch_size: int,
        channels: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int,
        world_size: int,
        device: torch.device,
        channels_last: bool,
        dtype: torch.dtype,
    ) -> None:
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size must be a positive multiple of world_size, got {batch_size} "
                f"over {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name} must have a value for each of {channels} channels, got {len(values)}"
                )
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.batch_size = batch_size
        self.local_size = batch_size // world_size
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.channels_last = channels_last
        self.dtype = dtype
        # (x / 255 - mean) / std as one product and one sum.
        deviation = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        centre = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (1 / (255 * deviation)).float().to(device)
        self._shift = (-centre / deviation).float().to(device)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Bytes to float32 in the wanted memory format; what is no bytes was normalised before."""
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if pixels.dtype == torch.uint8:
            pixels = torch.addcmul(self._shift, pixels.float(), self._scale)
        return pixels


class _Batches(BatchShare):
    """What training and evaluation share: the images and a process's part of them."""

    def __init__(self, split: Images, batch_size: int, **shared: Any) -> None:
        if len(split) == 0:
            raise ValueError("split holds no images")
        super().__init__(batch_size, split.pixels.shape[1], device=split.pixels.device, **shared)
        self.split = split

    def _own(self, values: Tensor) -> Tensor:
        """This process's part of whole batches that stand one after another: (..., M / W)."""
        return self._share(values, values.shape[-1] // self.batch_size)

    def _share(self, values: Tensor, batches: int) -> Tensor:
        """This process's part of ``batches`` batches of any one size: (..., M) to (..., M / W)."""
        size = values.shape[-1] // (max(1, batches) * self.world_size)
        parts = values.unflatten(-1, (batches, self.world_size, size))
        return parts[..., self.rank, :].flatten(-2)


class TrainBatches(_Batches):
    """Shuffled, randomly cropped and mirrored batches, one epoch at a time.

    Everything random of an epoch is drawn at once from (seed, epoch), for all processes alike, and
    each takes its slice of every batch: the batches do not depend on device, on what ran before,
    or, taken together, on the number of processes. Drawing happens on the CPU, with one upload per
    epoch; nothing is read back.

    Args:
        split: the images, uint8, on the device where the batches are wanted.
        batch_size: of all processes together.
        mean: of every channel, of pixels in [0, 1].
        std: likewise.
        seed: not negative.
        pad: black border from which the image's size is cut.
        flip: mirror every second image.
        rank: number of this process.
        world_size: how many there are.
        drop_last: leave out the images behind the last whole batch, other ones every epoch.
        channels_last: memory format of the images.
        dtype: of the images.
        gives_rows: let batches be (images, target, rows); see :meth:`rows`.

    Raises:
        ValueError: a value out of range; no whole batch; or a last batch that is to be kept, but
            cannot be shared equally.
    """

    def __init__(
        self,
        split: Images,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        pad: int = 4,
        flip: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        gives_rows: bool = False,
    ) -> None:
        super().__init__(
            split,
            batch_size,
            mean=mean,
            std=std,
            rank=rank,
            world_size=world_size,
            channels_last=channels_last,
            dtype=dtype,
        )
        for name, value in (("seed", seed), ("pad", pad)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        side = max(split.pixels.shape[2:])
        if pad > side:
            raise ValueError(f"pad must be at most the images' larger side, {side}, got {pad}")
        whole, rest = divmod(len(split), batch_size)
        if drop_last and whole == 0:
            raise ValueError(
                f"batch_size must be at most the number of images, {len(split)}, got {batch_size}"
            )
        if not drop_last and rest % world_size:
            raise ValueError(
                f"drop_last=False leaves a last batch of {rest} images, which {world_size} "
                "processes cannot share equally"
            )
        self.seed = seed
        self.pad = pad
        self.flip = flip
        self._gives_rows = gives_rows
        self._whole = whole
        self._rest = 0 if drop_last else rest

    def __len__(self) -> int:
        return self._whole + (self._rest > 0)

    def plan(self, epoch: int) -> Plan:
        """The draws of this process's part of an epoch, batch after batch.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        count = len(self.split)
        draws = torch.empty(4, count, dtype=torch.int64)
        draws[0] = torch.randperm(count, generator=generator)
        draws[1:3] = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        draws[3] = torch.randint(2, (count,), generator=generator) if self.flip else 0
        whole = self._whole * self.batch_size
        rest = draws[:, whole : whole + self._rest]
        own = torch.cat([self._own(draws[:, :whole]), self._share(rest, 1)], 1)
        if self.device.type == "cuda":
            own = own.pin_memory()
        return Plan(*own.to(self.device, non_blocking=True))

    def make(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and target (N,) of one batch's plan; may be captured in a graph."""
        pixels = self.split.pixels[plan.index]
        pixels = crop_and_flip(pixels, plan.dy, plan.dx, plan.mirrored.bool(), self.pad)
        return self._normalised(pixels).to(self.dtype), self.split.target[plan.index]

    def rows(self, plan: Plan) -> Tensor:
        """Numbers (N,) int64 of a batch's cut images among all cuts, of all images each.

        Cuts are ordered by ``dy``, ``dx``, and where images are mirrored at all by that.
        """
        side = 2 * self.pad + 1
        cut = (plan.dy * side + plan.dx) * (1 + self.flip) + plan.mirrored
        return cut * len(self.split) + plan.index

    def plan_of(self, rows: Tensor) -> Plan:
        """The plan by which a batch has these rows (N,) int64."""
        count, side = len(self.split), 2 * self.pad + 1
        cut = rows // count
        place = cut // (1 + self.flip)
        return Plan(rows % count, place // side, place % side, cut % (1 + self.flip))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """(images, target) of this process, from batch number ``start`` of the epoch on.

        Behind them the rows where these are wanted.

        Raises:
            ValueError: a negative epoch, or a start outside of it.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._batches_of(self.plan(epoch), start)

    def _batches_of(self, plan: Plan, start: int) -> Iterator[tuple[Tensor, ...]]:
        for step in range(start, len(self)):
            chosen = slice(step * self.local_size, (step + 1) * self.local_size)
            own = Plan(*(values[chosen] for values in plan))
            yield (*self.make(own), self.rows(own)) if self._gives_rows else self.make(own)


class EvalBatches(_Batches):
    """Every image once, in order, in batches of one size: (images, target, mask).

    The last batch, and with several processes the part of one, is filled up with the last image;
    ``mask`` (N,) is False there. All processes yield as many batches.

    Args:
        split: the images, uint8, on the device where the batches are wanted.
        batch_size: of all processes together.
        mean: of every channel, of pixels in [0, 1].
        std: likewise.
        rank: number of this process.
        world_size: how many there are.
        channels_last: memory format of the images.
        dtype: of the images.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        split: Images,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            split,
            batch_size,
            mean=mean,
            std=std,
            rank=rank,
            world_size=world_size,
            channels_last=channels_last,
            dtype=dtype,
        )

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches from number ``start`` on.

        Raises:
            ValueError: a start that is no batch.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._from(start)

    def _from(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count = len(self.split)
        places = self._own(torch.arange(len(self) * self.batch_size, device=self.device))
        for chosen in places[start * self.local_size :].split(self.local_size):
            if not len(chosen):  # what split gives of nothing
                return
            index = chosen.clamp(max=count - 1)
            images = self._normalised(self.split.pixels[index]).to(self.dtype)
            yield images, self.split.target[index], chosen < count
