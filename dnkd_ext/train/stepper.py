"""A step of the training: forward, backward, optimiser; eager, compiled, recorded or sharded."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext.train.average import MovingAverage
from dnkd_ext.train.config import OptimOptions, RunOptions
from dnkd_ext.train.sharding import (
    as_sharded,
    copy_whole,
    local,
    read_shards,
    shapes_of_shards,
    shard_model,
    shard_step,
)
from dnkd_ext.train.task import Task, autocast
from dnkd_ext.train.world import World

__all__ = ["Meter", "Recorded", "Stepper"]


class Meter:
    """Means of the terms since the last reset, and the first that was not finite, on the device."""

    NONE = 2**62

    def __init__(self, terms: int, device: torch.device) -> None:
        self.sums = torch.zeros(terms + 1, dtype=torch.float64, device=device)
        self.bad = torch.full((terms,), self.NONE, dtype=torch.int64, device=device)
        # The step of the epoch, counted on the device so that a recorded step counts on.
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def reset(self, step: int = 0) -> None:
        """Begin an epoch, or go on with it from a step."""
        self.sums.zero_()
        self.bad.fill_(self.NONE)
        self.step.fill_(step)

    @torch.no_grad()
    def add(self, terms: Tensor) -> None:
        """Count a step's terms (terms,) float32; waits for nothing."""
        self.sums[:-1] += terms
        self.sums[-1] += 1
        first = torch.where(terms.isfinite(), self.NONE, self.step)
        torch.minimum(self.bad, first, out=self.bad)
        self.step += 1

    def read(self, world: World) -> tuple[list[float], list[int | None]]:
        """Means, and the first step at which each was not finite, over all processes; waits."""
        sums = world.sum(self.sums.clone()).tolist()
        bad = world.smallest(self.bad.clone()).tolist()
        means = [value / max(1.0, sums[-1]) for value in sums[:-1]]
        return means, [None if step == self.NONE else step for step in bad]


@functools.cache
def _recording_stream() -> torch.cuda.Stream:
    """One for all runs of a process, on its one GPU: cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream()


class Recorded:
    """A function of a batch that is run three times and then recorded as a CUDA graph.

    The runs before are part of the training like any other. All batches have the same shapes.
    """

    EAGER = 3

    def __init__(self, body: Callable[[tuple[Tensor, ...]], None]) -> None:
        self.body = body
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: tuple[Tensor, ...] = ()
        self.stream = _recording_stream()

    def __call__(self, batch: tuple[Tensor, ...]) -> None:
        """Run the function, or replay it with this batch."""
        if self.runs < self.EAGER:
            self.runs += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                # An optimiser that can be recorded says that it is not being.
                warnings.filterwarnings("ignore", message="This instance was constructed with capt")
                self.body(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            self.static = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            # The threads that pin the next batches' memory go on meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.body(self.static)
            self.graph = graph
        for own, given in zip(self.static, batch, strict=True):
            if own.shape != given.shape:
                raise RuntimeError(
                    f"a step recorded for a batch of {tuple(own.shape)} was given "
                    f"{tuple(given.shape)}"
                )
            own.copy_(given)
        self.graph.replay()


def _distributed(step: nn.Module, device: torch.device) -> nn.Module:
    """The step with gradients averaged over processes, each with running statistics of its own."""
    kind = nn.parallel.DistributedDataParallel
    # By its older name up to torch 2.12.
    names = inspect.signature(kind.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return kind(
        step,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # else gradients are in memory twice
        **{option: False},
    )


class Stepper:
    """A task's modules, their optimiser, and a step of it.

    Attributes:
        lr, ramp: learning rate and share of the distillation, 0-dim tensors that a step reads.
        average: of ``task.evaluated``, where one is kept.
        meter: what the steps' terms were.
        do_step: a step of a batch.
    """

    def __init__(self, task: Task, optim: OptimOptions, run: RunOptions, world: World) -> None:
        self.task = task
        self.optim = optim
        self.run = run
        self.world = world
        device = world.device
        self.lr = torch.tensor(optim.lr, device=device)
        self.ramp = torch.tensor(1.0, device=device)
        self.average: MovingAverage | None = None
        if optim.ema_decay is not None:
            self.average = MovingAverage(task.evaluated, optim.ema_decay)
        self.meter = Meter(len(task.terms), device)
        self.module = task.step
        if run.fsdp:
            # The average is a copy from before, as what is sharded cannot be copied; it is sharded
            # alike, so that a process averages the shards it has.
            for module in self.average or ():
                shard_model(module, world.mesh, keep=False)
            shard_step(task.step, task.model, world.mesh, methods=task.methods, compile=run.compile)
        elif run.compile:
            task.step.compile(dynamic=False)
        if world.size > 1 and not run.fsdp:
            self.module = _distributed(task.step, device)
        self.names = [n for n, p in task.step.named_parameters() if p.requires_grad]
        self.parameters = [p for p in task.step.parameters() if p.requires_grad]
        # What the optimiser sees: of sharded parameters this process's part, in the same memory,
        # as a plain tensor. Steps are elementwise, and fused ones want that.
        self.trained = self.parameters
        if run.fsdp:
            self.trained = [nn.Parameter(local(p.detach())) for p in self.parameters]
        self.optimizer = self._optimizer()
        self.autocast = autocast(run, world, cache=not run.cuda_graph)
        self.do_step: Callable[[tuple[Tensor, ...]], None] = self._step
        if run.cuda_graph:
            self.do_step = Recorded(self._step)

    def _optimizer(self) -> torch.optim.Optimizer:
        optim = self.optim
        # Tokens and position embeddings are no vectors, but models of timm's name them.
        told = getattr(self.task.model, "no_weight_decay", set)()
        spared = {p for name, p in self.task.model.named_parameters() if name in told}
        decayed: list[Tensor] = []
        kept: list[Tensor] = []
        for parameter, part in zip(self.parameters, self.trained, strict=True):
            spares = not optim.decay_vectors and (parameter.dim() <= 1 or parameter in spared)
            (kept if spares else decayed).append(part)
        groups: list[dict[str, Any]] = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, optim.weight_decay), (kept, 0.0))
            if parameters
        ]
        # Fused, they take a learning rate that is a tensor without reading it back.
        if optim.optimizer == "adamw":
            return torch.optim.AdamW(
                groups,
                lr=self.lr,
                betas=optim.betas,
                fused=True,
                capturable=bool(self.run.cuda_graph),
            )
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True
        )

    def release(self) -> None:
        """Let go of what would otherwise wait for the garbage collector: processes, GPU memory."""
        del self.do_step, self.module, self.optimizer
        if self.run.compile:
            # Dynamo counts what it has compiled by code, not by model: the next run's step would
            # some time not be compiled any more.
            torch.compiler.reset()

    # -- a step --------------------------------------------------------------------------------

    def _step(self, batch: tuple[Tensor, ...]) -> None:
        """Gradients of a batch, the step of the optimiser, and the terms counted."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.run.fsdp:
            for parameter in self.parameters:
                parameter.grad = None
        parts = self.task.split(batch, self.optim.accumulate)
        terms: Tensor | None = None
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            # Only the last part's backward exchanges gradients.
            waits: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if self.run.fsdp:
                self.module.set_requires_gradient_sync(is_last)
            elif self.world.size > 1 and not is_last:
                waits = self.module.no_sync()
            with waits:
                with self.autocast:
                    values = self.module(*part, self.ramp)
                loss = values[0] if len(parts) == 1 else values[0] / len(parts)
                loss.backward()
            row = torch.stack([value.detach().float() for value in values])
            terms = row if terms is None else terms + row
        assert terms is not None
        if self.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.optim.clip_grad, foreach=True)
        if self.run.fsdp:
            for part, parameter in zip(self.trained, self.parameters, strict=True):
                part.grad = None if parameter.grad is None else local(parameter.grad)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.task.evaluated)
        self.meter.add(terms / len(parts))

    # -- state ---------------------------------------------------------------------------------

    def _buffers(self) -> dict[str, Tensor]:
        """Running statistics, which alone differ between processes within an epoch."""
        modules = {"step": self.task.step, "average": self.average}
        return {
            f"{place}.{prefix}.{name}": value
            for place, module in modules.items()
            if module is not None
            for prefix, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
            for name, value in part.named_buffers(recurse=False)
        }

    def _tensors(self) -> dict[str, Tensor]:
        """All that is trained or kept along, by name, sharded as it is."""
        modules = {"step": self.task.step, "average": self.average}
        tensors = {
            f"{place}.{name}": value
            for place, module in modules.items()
            if module is not None
            for name, value in module.state_dict().items()
        }
        for name, parameter, part in zip(self.names, self.parameters, self.trained, strict=True):
            for kind, value in self.optimizer.state[part].items():
                if isinstance(value, Tensor):
                    # Steps are counted by a scalar, which is nobody's part.
                    like = parameter if value.shape == part.shape else value
                    tensors[f"optimizer.{name}.{kind}"] = as_sharded(value, like)
        return tensors

    def _load_whole(self, state: dict[str, Any]) -> None:
        """Tensors that one process kept for all."""
        average = state["average"]
        if self.run.fsdp:
            for module, kept in ((self.task.step, state["step"]), (self.average, average)):
                if module is not None:
                    tensors = module.state_dict()
                    if tensors.keys() != kept.keys():
                        raise ValueError("it has other weights")
                    for name, tensor in tensors.items():
                        copy_whole(tensor, kept[name])
        else:
            self.task.step.load_state_dict(state["step"])
            if self.average is not None:
                self.average.load_state_dict(average)
        order = [part for group in self.optimizer.param_groups for part in group["params"]]
        of_part = dict(zip(self.trained, self.parameters, strict=True))
        for number, kinds in state["optimizer"]["state"].items():
            part = order[number]
            for kind, value in kinds.items():
                if isinstance(value, Tensor):
                    self._allocate(part, of_part[part], kind, value.shape, value.dtype, value)

    def _load_shards(self, folder: Path) -> None:
        """Tensors of which every process kept a part, of as many processes or others."""
        shapes = shapes_of_shards(folder)
        parts = {
            n: (s, p) for n, s, p in zip(self.names, self.trained, self.parameters, strict=True)
        }
        for key, (shape, dtype) in shapes.items():
            place, _, rest = key.partition(".")
            name, _, kind = rest.rpartition(".")
            if place == "optimizer" and name in parts:
                self._allocate(*parts[name], kind, shape, dtype)
        tensors = self._tensors()
        if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: shape for name, (shape, _) in shapes.items()
        }:
            raise ValueError("it has other weights")
        read_shards(folder, tensors)

    def _allocate(
        self,
        part: Tensor,
        parameter: Tensor,
        kind: str,
        shape: torch.Size,
        dtype: torch.dtype,
        value: Tensor | None = None,
    ) -> None:
        """The optimiser's state of a parameter, of which it has seen ``part``, for a whole value.

        It lies in memory as the parameter does now, which the fused optimisers go by.
        """
        if shape == parameter.shape:
            kept = torch.empty_like(part, requires_grad=False)
            to = as_sharded(kept, parameter)
        else:
            kept = to = torch.empty(shape, dtype=dtype, device=part.device)
        self.optimizer.state[part][kind] = kept
        if value is not None:
            copy_whole(to, value)
