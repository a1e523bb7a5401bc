"""The training loop that all tasks share: epochs, checkpoints, logs, several processes.

A task says what a batch is, what its loss is and how it is evaluated; nothing here knows of images.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnkd_ext.progress import Progress
from dnkd_ext.train.checkpoint import load_checkpoint, save_checkpoint
from dnkd_ext.train.config import OptimOptions, RunOptions
from dnkd_ext.train.files import BEST, LAST, LOG, TENSORBOARD, write_csv, write_tensors
from dnkd_ext.train.schedule import learning_rate, ramp
from dnkd_ext.train.sharding import gather_whole, write_shards
from dnkd_ext.train.signals import Interrupted, Signals
from dnkd_ext.train.stepper import Stepper
from dnkd_ext.train.task import Task
from dnkd_ext.train.world import World

__all__ = ["check_identity", "merge_ranks", "train"]


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


class _Training(Stepper):
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
        super().__init__(task, optim, run, world)
        self.out = out
        self.kd_warm_up = kd_warm_up
        self.metadata = metadata
        self.settings = settings or {}
        self.metric = task.metric if self.average is None else f"ema_{task.metric}"
        self.epoch = 0
        self.start = 0
        self.rows: list[dict[str, Any]] = []
        self.best = -math.inf
        self.best_epoch = 0
        self.stopped = 0  # a signal that came at the very end
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = 0.0
        # When the last checkpoint was written, or this part of the run begun.
        self.saved = time.monotonic()
        # Of the run at Weights & Biases, which goes on when this one does.
        self.wandb_id = ""

    # -- checks -------------------------------------------------------------------------------

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

            def tell(row: dict[str, Any]) -> None:
                with self.world.first_alone():
                    if writer:
                        for name in row.keys() - {"epoch"}:
                            writer.add_scalar(name, row[name], row["epoch"])
                        writer.flush()
                    if dashboard:
                        dashboard.log(row)

            for epoch in range(self.epoch, self.optim.epochs):
                self._epoch(epoch, bar, signals, tell)
        self._write_weights(LAST)
        return {
            "rows": self.rows,
            "metric": self.metric,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "judged": self._judged(),
            "stopped": self.stopped,
        }

    def _epoch(
        self,
        epoch: int,
        bar: Progress,
        signals: Signals,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
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
        # Before the checkpoint, behind which nothing of the epoch is told any more.
        tell(self.rows[-1])
        stop = world.any(bool(signals.received))
        last = epoch + 1 == self.optim.epochs
        if stop or last or (epoch + 1) % (self.run.checkpoint_every or 1) == 0:
            self._save(epoch + 1, 0)
        if stop and not last:
            self._stop(signals, f"after epoch {epoch + 1}")
        if last and world.any(bool(signals.received)):
            self.stopped = signals.received or signal.SIGTERM

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
        return SummaryWriter(os.fspath(self.out / TENSORBOARD), purge_step=self.epoch + 1)

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
