"""The processes that train together: one alone, or those that torchrun started."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["SPEAKS", "OtherProcessFailed", "World", "join_world", "told_once"]


# Of the processes on a machine, which have one command line, the first tells what is wrong with it.
SPEAKS = int(os.environ.get("LOCAL_RANK", 0)) == 0

T = TypeVar("T")

# How long processes wait for one that decodes images, hashes, downloads or writes for all.
PATIENCE = datetime.timedelta(hours=2)


class OtherProcessFailed(RuntimeError):
    """Another process raised an error, which it tells itself."""


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A look at the command line and the machine alone, before processes meet."""
    try:
        yield
    except ValueError as error:
        if SPEAKS:
            raise
        raise OtherProcessFailed(str(error)) from error


@dataclass(frozen=True)
class World:
    """This process's place among all, and its device.

    Every method is a collective call: all processes make it, or none.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All processes, as what is sharded over them wants it."""
        return init_device_mesh(self.device.type, (self.size,))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def smallest(self, values: Tensor) -> Tensor:
        """The minimum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def to_first(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on the first; none on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values)
        return values or []

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """A part that only the first process does (``if world.is_first``): its errors reach all.

        The others, which would wait for it for ever, raise OtherProcessFailed.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        told = self.from_first(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if told is not None:
            raise OtherProcessFailed(f"the first process failed: {told}")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that all processes do alike: one tells the error.

        It has at most one collective call, whose errors reach all of them. Where several fail, the
        first of them raises its error and the others OtherProcessFailed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.gather(error is not None)
        if not any(failed):
            return
        first = failed.index(True)
        if error is not None and self.rank == first:
            raise error
        raise OtherProcessFailed(f"process {first} failed")

    def first_ahead(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, done by the first process and then by the others.

        For what leaves files that spare the others most of it, and which they must not write all
        at once.
        """
        done: list[T] = []
        with self.first_alone():
            if self.is_first:
                done.append(work())
        return done[0] if done else work()

    @torch.no_grad()
    def average_batch_norm(self, model: nn.Module) -> None:
        """Give all processes the mean of their running statistics, each of which saw its part.

        Frozen ones, with a momentum of 0, stay: their mean is not what they are to the last bit.
        """
        if self.size == 1:
            return
        statistics = [
            statistic
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.momentum != 0
            for statistic in (module.running_mean, module.running_var)
        ]
        if not statistics:
            return
        # All in one message.
        means = self.sum(torch.cat([statistic.flatten() for statistic in statistics])) / self.size
        parts = means.split([statistic.numel() for statistic in statistics])
        for statistic, part in zip(statistics, parts, strict=True):
            statistic.copy_(part.view_as(statistic))


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """This process's world, for as long as the context lasts.

    Under torchrun (RANK and WORLD_SIZE in the environment) that is a process group: NCCL for what
    is on GPUs, gloo for what is not, objects among it.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: no GPU where one is asked for, or fewer than processes on this machine.
    """
    with told_once():
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch.cuda.is_available() is False")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    size = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ or size == 1:
        yield World(0, 1, torch.device("cuda" if use_cuda else "cpu"))
        return
    place = torch.device("cpu")
    if use_cuda:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; start at "
                "most as many processes, or pass --device cpu"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            device_id=place if use_cuda else None,
            timeout=PATIENCE,
        )
    yield World(dist.get_rank(), dist.get_world_size(), place)
    # Not after an error, when others may wait in a collective call, and this would wait for them.
    if own:
        gc.collect()  # what still holds the group
        dist.barrier()
        dist.destroy_process_group()
