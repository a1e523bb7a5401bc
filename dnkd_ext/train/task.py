"""What a task has to tell the engine: batches, the loss of one, and how the model is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext.train.config import RunOptions
from dnkd_ext.train.world import World

__all__ = ["Task", "autocast"]


class Task(ABC):
    """What is trained.

    Attributes:
        step: called with a batch and the ramp of the distillation (a 0-dim float32 tensor on the
            device); returns a 0-dim tensor for each of ``terms``, the loss to minimise first. All
            its parameters are trained, all its state is in the checkpoints.
        model: the part of ``step`` that is wanted in the end.
        methods: of ``model``, by which it is run in place of its call. Where it is sharded, it and
            every child of ``step`` are run by their call or these methods alone.
        terms: what ``step`` returns, by name; means over the batch.
        metric: which of the figures of :meth:`evaluate` is to become large.
        evaluated: ``model`` and, behind it, what is trained beside it and evaluated with it.
        steps_per_epoch: batches of an epoch.
        batch_size: images of a batch, of all processes together.
        identity: what a checkpoint must have been made with to be gone on from.
        unreadable: images in this process's batches of the epoch so far that could not be read.
    """

    step: nn.Module
    model: nn.Module
    methods: tuple[str, ...] = ()
    unreadable: int = 0
    terms: tuple[str, ...]
    metric: str
    steps_per_epoch: int
    batch_size: int
    identity: dict[str, str]

    @property
    def evaluated(self) -> tuple[nn.Module, ...]:
        """The arguments of :meth:`evaluate`, of which a moving average may be kept."""
        return (self.model,)

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's batches of an epoch, from number ``start`` on; no state is kept."""

    def counts(self) -> dict[str, int]:
        """More of the epoch that was trained and evaluated last, for the log; a collective call."""
        return {}

    def split(self, batch: tuple[Tensor, ...], parts: int) -> list[tuple[Tensor, ...]]:
        """A batch in equal parts, for accumulated gradients."""
        return list(zip(*(tensor.chunk(parts) for tensor in batch), strict=True))

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures of ``evaluated`` or of copies, the same on all processes; a collective call."""

    def finish(self, out: Path, judged: tuple[nn.Module, ...], title: str) -> dict[str, Any]:
        """Write what else belongs into the folder of a finished run; a collective call.

        Args:
            out: the folder.
            judged: ``evaluated``, or copies: what the last evaluation was of.
            title: of pictures.

        Returns:
            What more the run's result is to tell.
        """
        return {}


def autocast(run: RunOptions, world: World, *, cache: bool = True) -> torch.autocast:
    """In which models run by the precision of the options.

    Without ``cache`` weights are cast anew wherever they are used, as a recorded step must.
    """
    is_half = run.precision == "bfloat16"
    return torch.autocast(world.device.type, torch.bfloat16, enabled=is_half, cache_enabled=cache)
