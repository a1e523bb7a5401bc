"""The training loop that all tasks share: epochs, checkpoints, logs, several processes.

A task says what a batch is, what its loss is and how it is evaluated; nothing here knows of images.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import signal
import time
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnkd_ext.progress import Progress
from dnkd_ext.train.average import MovingAverage
from dnkd_ext.train.checkpoint import load_checkpoint, save_checkpoint
from dnkd_ext.train.config import OptimOptions, RunOptions
from dnkd_ext.train.files import write_csv, write_tensors
from dnkd_ext.train.sharding import (
    as_sharded,
    copy_whole,
    gather_whole,
    local,
    read_shards,
    shapes_of_shards,
    shard_model,
    shard_step,
    write_shards,
)
from dnkd_ext.train.world import World

__all__ = [
    "Interrupted",
    "Signals",
    "Task",
    "autocast",
    "check_identity",
    "learning_rate",
    "merge_ranks",
    "ramp",
    "train",
]

BEST = "best.safetensors"
LAST = "last.safetensors"
LOG = "log.csv"


class Interrupted(Exception):
    """A command was asked to stop by ``signal`` and has kept what it did.

    ``together``: all processes stop at this very place.
    """

    def __init__(self, message: str, number: int, *, together: bool = True) -> None:
        super().__init__(message)
        self.signal = number
        self.together = together


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


def autocast(run: RunOptions, world: World, *, cache: bool = True) -> torch.autocast:
    """In which models run by the precision of the options.

    Without ``cache`` weights are cast anew wherever they are used, as a recorded step must.
    """
    is_half = run.precision == "bfloat16"
    return torch.autocast(world.device.type, torch.bfloat16, enabled=is_half, cache_enabled=cache)


def learning_rate(options: OptimOptions, time: float) -> float:
    """The learning rate ``time`` epochs after the start, between 0 and ``options.epochs``.

    The cosine spans all epochs; the warm-up takes the place of its beginning.
    """
    if time < options.lr_warm_up:
        return options.lr_start + (options.lr - options.lr_start) * time / options.lr_warm_up
    if options.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * time / options.epochs))
        return options.lr_end + (options.lr - options.lr_end) * height
    passed = sum(time >= milestone for milestone in options.milestones)
    return options.lr * options.lr_decay**passed


def ramp(warm_up: int, epoch: int) -> float:
    """The distillation's share in an epoch, counted from 0: 0 in the first, 1 after ``warm_up``."""
    return min(1.0, epoch / warm_up) if warm_up else 1.0


class _Meter:
    """Means of the terms since the last reset, and the first that was not finite, on the device."""

    NONE = 2**62

    def __init__(self, terms: int, device: torch.device) -> None:
        self.sums = torch.zeros(terms + 1, dtype=torch.float64, device=device)
        self.bad = torch.full((terms,), self.NONE, dtype=torch.int64, device=device)
        # The step of the epoch, counted on the device so that a recorded step counts on.
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def reset(self, step: int = 0) -> None:
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


class _Recorded:
    """A function of a batch that is run three times and then recorded as a CUDA graph.

    The runs before are part of the training like any other. All batches have the same shapes.
    """

    EAGER = 3

    def __init__(self, body: Callable[[tuple[Tensor, ...]], None]) -> None:
        self.body = body
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: tuple[Tensor, ...] = ()
        self.stream = torch.cuda.Stream()

    def __call__(self, batch: tuple[Tensor, ...]) -> None:
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
            own.copy_(given)
        self.graph.replay()


class Signals:
    """SIGINT and SIGTERM as a wish to stop, while the context lasts; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing is caught
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(
    task: Task,
    optim: OptimOptions,
    run: RunOptions,
    out: Path,
    world: World,
    *,
    kd_warm_up: int = 0,
    resume: bool = False,
    metadata: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a task and keep its log, checkpoints and weights in ``out``.

    Every epoch is evaluated and adds a row to ``log.csv``; ``best.safetensors`` and
    ``last.safetensors`` hold the model's weights, ``checkpoint.pt`` all that is needed to go on,
    where the step is sharded together with the folder that it names.
    With ``resume`` the run continues from there as if it had never stopped: after a signal at the
    very step, otherwise at the last epoch, or step of a long one, that was kept.

    Args:
        task: what is trained; a sharded run leaves its modules sharded.
        optim: optimiser and schedule.
        run: how it is run.
        out: folder of the run, which all processes share.
        world: all processes.
        kd_warm_up: epochs over which the distillation's share grows.
        resume: go on with what ``out`` holds.
        metadata: of the files of weights.
        settings: what a dashboard shows as the run's configuration.

    Returns:
        ``rows`` of the log, ``metric``, the name of the deciding figure, its ``best`` and
        ``best_epoch``, ``seconds`` of training, evaluation and checkpoints left out, over all parts
        of the run, and ``judged``, the task's ``evaluated`` modules. With a moving average of the
        weights, that is what is evaluated for it, written as weights and returned.

    Raises:
        FloatingPointError: a term of the loss is not finite; epoch, step and term are named, and
            the last checkpoint is from before.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of this very step is written.
        ValueError: the checkpoint is damaged, or of another training.
    """
    training = _Training(task, optim, run, out, world, kd_warm_up, metadata or {}, settings)
    try:
        return training.run_all(resume)
    finally:
        training.release()


def check_identity(out: Path, state: dict[str, Any], identity: dict[str, str]) -> None:
    """ValueError for a checkpoint that was made with another model, teacher or data."""
    before = state["identity"]
    # What only one of them has differs, too: a backbone that began from weights, or at random.
    differs = [
        f"{name} is {identity.get(name, 'none')}, in the checkpoint {before.get(name, 'none')}"
        for name in dict.fromkeys((*before, *identity))
        if identity.get(name) != before.get(name)
    ]
    if differs:
        raise ValueError(f"{out} holds another training: {'; '.join(differs)}")


def merge_ranks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What several processes kept of the epoch that they left, as of one: counts, statistics."""
    meters = [own["meter"] for own in ranks]
    buffers: dict[str, Tensor] = {}
    for name, first in ranks[0].get("buffers", {}).items():
        values = [own["buffers"][name] for own in ranks]
        # Frozen ones are the same everywhere, and their mean might not be to the last bit. Counts
        # of batches have none.
        alike = all(torch.equal(first, value) for value in values)
        averaged = first.is_floating_point() and not alike
        buffers[name] = torch.stack(values).mean(0) if averaged else first
    return {
        "meter": {
            # Each counts its own steps, so that those of this epoch weigh alike before and after.
            "sums": torch.stack([meter["sums"] for meter in meters]).mean(0),
            "bad": torch.stack([meter["bad"] for meter in meters]).amin(0),
        },
        "unreadable": sum(own.get("unreadable", 0) for own in ranks),
        "buffers": buffers,
    }


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


class _Training:
    def __init__(
        self,
        task: Task,
        optim: OptimOptions,
        run: RunOptions,
        out: Path,
        world: World,
        kd_warm_up: int,
        metadata: dict[str, str],
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.task = task
        self.optim = optim
        self.run = run
        self.out = out
        self.world = world
        self.kd_warm_up = kd_warm_up
        self.metadata = metadata
        self.settings = settings or {}
        device = world.device
        self.lr = torch.tensor(optim.lr, device=device)
        self.ramp = torch.tensor(1.0, device=device)
        self.average: MovingAverage | None = None
        self.metric = task.metric
        if optim.ema_decay is not None:
            self.average = MovingAverage(task.evaluated, optim.ema_decay)
            self.metric = f"ema_{task.metric}"
        self.meter = _Meter(len(task.terms), device)
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
            self.do_step = _Recorded(self._step)
        self.epoch = 0
        self.start = 0
        self.rows: list[dict[str, Any]] = []
        self.best = -math.inf
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = 0.0
        # When the last checkpoint was written, or this part of the run begun.
        self.saved = time.monotonic()
        # Of the run at Weights & Biases, which goes on when this one does.
        self.wandb_id = ""

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

    def _check_finite(self, epoch: int) -> list[float]:
        """The means so far; FloatingPointError naming the first term that was not finite."""
        means, bad = self.meter.read(self.world)
        steps = [step for step in bad if step is not None]
        if steps:
            first = min(steps)
            # The sum is not finite because a term is not: that is the one to name.
            names = [n for n, s in zip(self.task.terms, bad, strict=True) if s == first]
            names = [name for name in names if name != "loss"] or names
            raise FloatingPointError(
                f"epoch {epoch + 1}, step {first + 1} of {self.task.steps_per_epoch}: "
                f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite; "
                f"{self._advice()}"
            )
        return means

    def _check_weights(self, epoch: int) -> None:
        """FloatingPointError for weights that are not finite, before they are kept."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.trained]))
        # The others' parts, too, where each has a part.
        bad = self.world.sum((~norms.isfinite()).int())
        if not bool(bad.any()):
            return
        at = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"epoch {epoch + 1}: the weights {self.names[at]} are not finite, though the loss was; "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        kept = "no checkpoint was written yet"
        if self.epoch or self.start:
            steps = f" and {self.start} steps" if self.start else ""
            kept = f"the checkpoint after {self.epoch} epochs{steps} is kept"
        return (
            f"{kept}. A smaller --lr or weight of that term, or --precision float32, may help, in "
            "another --out"
        )

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

    def _save(self, epoch: int, start: int) -> None:
        """A checkpoint from which training goes on in ``epoch`` before step ``start``."""
        random = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        meters = {"sums": self.meter.sums.cpu(), "bad": self.meter.bad.cpu()}
        own: dict[str, Any] = {
            "random": random,
            "meter": meters,
            "unreadable": self.task.unreadable,
        }
        if start and self.world.size > 1:
            own["buffers"] = {name: value.cpu() for name, value in self._buffers().items()}
        of_ranks = self.world.to_first(own)
        kept: dict[str, Any]
        if self.run.fsdp:
            kept = {
                "shards": write_shards(self.out, f"{epoch}-{start}", self._tensors(), self.world)
            }
        else:
            kept = {
                "step": self.task.step.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
            }
        with self.world.first_alone():
            if self.world.is_first:
                save_checkpoint(
                    self.out,
                    {
                        "identity": self.task.identity,
                        "epoch": epoch,
                        "start": start,
                        **kept,
                        "rows": self.rows,
                        "best": self.best,
                        "best_epoch": self.best_epoch,
                        "best_weights": self.best_weights,
                        "seconds": self.seconds,
                        "wandb": self.wandb_id,
                        "ranks": of_ranks,
                    },
                )
        self.epoch, self.start = epoch, start
        self.saved = time.monotonic()

    def _load(self) -> bool:
        """Go on from a checkpoint, if there is one."""
        state = load_checkpoint(self.out, self.world)
        found = None if state is None else (state["epoch"], state["start"])
        if len(set(self.world.gather(found))) > 1:
            raise ValueError(
                f"the processes find different checkpoints in {self.out}; it must be a folder that "
                "all of them share"
            )
        if state is None:
            return False
        check_identity(self.out, state, self.task.identity)
        try:
            if "shards" in state:
                self._load_shards(self.out / state["shards"]["folder"])
            else:
                self._load_whole(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.out} holds another training: {error}") from error
        self.epoch, self.start = state["epoch"], state["start"]
        self.rows, self.seconds = state["rows"], state["seconds"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.best_weights = state["best_weights"]
        if self.average is not None:
            self.average.begun = True  # there is no checkpoint before the first step
        self.wandb_id = state.get("wandb", "")
        if self.start:
            own = self._share(state["ranks"])
            self.meter.reset(self.start)
            self.meter.sums.copy_(own["meter"]["sums"])
            self.meter.bad.copy_(own["meter"]["bad"])
            self.task.unreadable = own.get("unreadable", 0)
            buffers = self._buffers()
            for name, value in own.get("buffers", {}).items():
                if name in buffers:  # checkpoints of earlier versions have others, too
                    buffers[name].copy_(value)
            if "random" not in own:
                self._seed(self.epoch, self.start)
                return True
            torch.set_rng_state(own["random"]["cpu"])
            if self.world.device.type == "cuda" and "cuda" in own["random"]:
                torch.cuda.set_rng_state(own["random"]["cuda"])
        return True

    def _share(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """What this process goes on with of what the processes had that left within an epoch.

        Its own, where they are as many; else what is the same for all of them.
        """
        if len(ranks) == self.world.size:
            return ranks[self.world.rank]
        if self.world.is_first:
            warnings.warn(
                f"{self.out} was left within an epoch by {len(ranks)} processes and is gone on "
                f"with by {self.world.size}: the rest of the epoch has other random numbers and "
                "running statistics, and where data are shards, other images",
                stacklevel=2,
            )
        own = merge_ranks(ranks)
        if not self.world.is_first:
            own["unreadable"] = 0
        return own

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

    def _seed(self, epoch: int, start: int = 0) -> None:
        """Everything random of an epoch depends on seed, epoch and process alone.

        And on the step where another number of processes went on.
        """
        place = [self.run.seed, epoch, self.world.rank, 1, *([start] if start else [])]
        state = np.random.SeedSequence(place)
        torch.manual_seed(int(state.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    # -- epochs --------------------------------------------------------------------------------

    def run_all(self, resume: bool) -> dict[str, Any]:
        if resume and self._load():
            # As the checkpoint has them: what came after it does not count.
            self._write_weights(BEST)
            self._write_log()
        total = self.optim.epochs * self.task.steps_per_epoch
        done = self.epoch * self.task.steps_per_epoch + self.start
        shown = self.run.progress and self.world.is_first
        writer = self._tensorboard()
        dashboard = self._wandb()
        with (
            Signals() as signals,
            Progress(total, "train", unit="step", initial=done, enabled=shown) as bar,
            contextlib.closing(writer) if writer else contextlib.nullcontext(),
            dashboard or contextlib.nullcontext(),
        ):
            for epoch in range(self.epoch, self.optim.epochs):
                self._epoch(epoch, bar, signals)
                with self.world.first_alone():
                    if writer:
                        row = self.rows[-1]
                        for name in row.keys() - {"epoch"}:
                            writer.add_scalar(name, row[name], row["epoch"])
                    if dashboard:
                        dashboard.log(self.rows[-1])
        self._write_weights(LAST)
        return {
            "rows": self.rows,
            "metric": self.metric,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "judged": self._judged(),
        }

    def _epoch(self, epoch: int, bar: Progress, signals: Signals) -> None:
        task, world = self.task, self.world
        start = self.start if epoch == self.epoch else 0
        if not start:
            self.meter.reset()
            self._seed(epoch)
        self.ramp.fill_(ramp(self.kd_warm_up, epoch))
        task.step.train()
        began, before = time.perf_counter(), self.seconds
        step = start
        for batch in task.batches(epoch, start):
            if self.optim.schedule == "cosine" or epoch < self.optim.lr_warm_up or step == start:
                self.lr.fill_(learning_rate(self.optim, epoch + step / task.steps_per_epoch))
            self.do_step(batch)
            step += 1
            bar.advance()
            looks = step % self.run.log_every == 0 or step == task.steps_per_epoch
            if looks:
                means = self._check_finite(epoch)
                self.seconds = before + time.perf_counter() - began
                speed = (step - start) * task.batch_size / (time.perf_counter() - began)
                bar.say(self._postfix(epoch, means[0], speed))
            # Alone a process stops at once, together they agree where they meet anyway.
            stop = bool(signals.received) and world.size == 1
            if looks and world.size > 1:
                stop = world.any(bool(signals.received))
            if (stop or (looks and self._is_due())) and step < task.steps_per_epoch:
                self._check_finite(epoch)
                self._check_weights(epoch)
                paused = time.perf_counter()
                self.seconds = before + paused - began
                self._save(epoch, step)
                began += time.perf_counter() - paused
            if stop and step < task.steps_per_epoch:
                self._stop(signals, f"in epoch {epoch + 1} after step {step}")
        self._check_weights(epoch)
        world.average_batch_norm(task.step)
        figures = task.evaluate(*task.evaluated)
        if self.average is not None:
            world.average_batch_norm(self.average)
            of_average = task.evaluate(*self.average)
            figures.update({f"ema_{name}": value for name, value in of_average.items()})
        self._finish(epoch, means, figures, speed)
        stop = world.any(bool(signals.received))
        last = epoch + 1 == self.optim.epochs
        if stop or last or (epoch + 1) % (self.run.checkpoint_every or 1) == 0:
            self._save(epoch + 1, 0)
        if stop and not last:
            self._stop(signals, f"after epoch {epoch + 1}")

    def _is_due(self) -> bool:
        """Whether the last checkpoint is so old that one is written within the epoch; collective.

        By the first process's clock.
        """
        minutes = self.run.checkpoint_minutes
        passed = time.monotonic() - self.saved
        return minutes > 0 and self.world.any(self.world.is_first and passed >= 60 * minutes)

    def _stop(self, signals: Signals, where: str) -> None:
        number = signals.received or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} {where}; the checkpoint is in {self.out}, "
            "--resume goes on from there",
            number,
        )

    def _finish(
        self, epoch: int, means: list[float], figures: dict[str, float], speed: float
    ) -> None:
        """The epoch's row, and its weights where they are the best."""
        metric = figures[self.metric]
        is_best = metric > self.best
        if is_best:
            self.best, self.best_epoch = metric, epoch + 1
        self.rows.append(
            {
                "epoch": epoch + 1,
                "lr": learning_rate(self.optim, epoch),
                "kd_ramp": ramp(self.kd_warm_up, epoch),
                **{f"train_{n}": v for n, v in zip(self.task.terms, means, strict=True)},
                **figures,
                **self.task.counts(),
                "images_per_second": round(speed, 1),
                "seconds": round(self.seconds, 3),
            }
        )
        if is_best:
            self.best_weights = self._weights()
            self._write_weights(BEST)
        self._write_log()

    def _write_log(self) -> None:
        with self.world.first_alone():
            if self.world.is_first:
                write_csv(self.out / LOG, self.rows)

    def _weights(self) -> dict[str, Tensor]:
        """The model's state, or its average's, on the CPU; empty but on the first process."""
        model, *_ = self._judged()
        return gather_whole(model.state_dict(), self.world)

    def _judged(self) -> tuple[nn.Module, ...]:
        """What decides which weights are the best, and is evaluated in the end."""
        return self.task.evaluated if self.average is None else tuple(self.average)

    def _write_weights(self, name: str) -> None:
        weights, epoch = self.best_weights, self.best_epoch
        if name == LAST:
            weights, epoch = self._weights(), self.optim.epochs
        with self.world.first_alone():
            if self.world.is_first and weights:
                write_tensors(self.out / name, weights, {**self.metadata, "epoch": str(epoch)})

    def _postfix(self, epoch: int, loss: float, speed: float) -> str:
        best = f", best {self.metric} {self.best:.2f}" if self.rows else ""
        return f"epoch {epoch + 1}/{self.optim.epochs}, {speed:.0f} img/s, loss {loss:.3f}{best}"

    def _tensorboard(self) -> Any:
        if not (self.run.tensorboard and self.world.is_first):
            return None
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote behind its checkpoint does not count.
        return SummaryWriter(os.fspath(self.out / "tensorboard"), purge_step=self.epoch + 1)

    def _wandb(self) -> Any:
        """A run at Weights & Biases, on the first process; its errors reach all."""
        run = None
        with self.world.first_alone():
            if self.run.wandb and self.world.is_first:
                import wandb

                self.wandb_id = self.wandb_id or uuid.uuid4().hex[:12]
                run = wandb.init(
                    dir=os.fspath(self.out),
                    id=self.wandb_id,
                    name=self.out.name,
                    config={**self.metadata, **self.settings},
                    resume="allow",
                )
                # Epochs that are done once more after a crash are logged once more.
                run.define_metric("*", step_metric="epoch")
        return run
