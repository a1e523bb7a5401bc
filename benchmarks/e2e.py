"""Whole training steps: teacher forward, student forward and backward, criterion, SGD.

All methods share the teacher and its forward pass, plain cross entropy too, so that only the loss
differs; a detector's plain training has no teacher. They take turns, a step each; the criterion's
part is timed alone on the step's own logits and features.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnkd_ext
from benchmarks import peers, results, steps, tables, targets
from benchmarks.cases import require_alike
from benchmarks.harness import measure, median_and_quantiles, synchronise
from dnkd_ext import reference
from dnkd_ext.progress import Progress

# What torch.compile raises where nothing can be compiled, as without a compiler.
NOT_COMPILED = ("InductorError", "BackendCompilerFailed")

# (logits, teacher's logits, features, teacher's features, class means, target) -> loss
Criterion = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The networks and the batch of a step.

    Attributes:
        name: "cifar", "imagenet" or "detection".
        models: teacher and student in words.
        batch: images per step.
        image: height; and width, but for detection (:func:`benchmarks.steps.image_width`).
        classes: of the classifiers.
        dtype: of autocast; float32 without.
        channels_last: how images and weights lie in memory.
        make: teacher and student; detectors are made by :mod:`benchmarks.detection`.
    """

    name: str
    models: str
    batch: int
    image: int
    classes: int
    dtype: torch.dtype
    channels_last: bool
    make: Callable[[], tuple[nn.Module, nn.Module]] | None


def _cifar_models() -> tuple[nn.Module, nn.Module]:
    from dnkd_ext.train.models import create_model

    return create_model("cifar_resnet56"), create_model("cifar_resnet20")


def _imagenet_models() -> tuple[nn.Module, nn.Module]:
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision.models import resnet18, resnet34

        return resnet34(), resnet18()
    import timm

    return timm.create_model("resnet34"), timm.create_model("resnet18")


def unavailable(name: str) -> str | None:
    """Why a shape cannot run here; None where it can."""
    if name == "imagenet" and not any(
        importlib.util.find_spec(package) for package in ("torchvision", "timm")
    ):
        return "neither torchvision nor timm is installed"
    if name == "detection":
        missing = [one for one in ("torchvision", "yaml") if importlib.util.find_spec(one) is None]
        return f"{missing[0]} is not installed" if missing else None
    return None


def shape(name: str, device: str) -> Shape:
    """The full size on a GPU; on a CPU ImageNet's and COCO's with few small images."""
    if name == "cifar":
        return Shape(
            name, "resnet56 -> resnet20", 128, 32, 100, torch.float32, False, _cifar_models
        )
    full = device != "cpu"
    if name == "detection":
        return Shape(
            name, "Faster R-CNN resnet101 -> resnet18", 8 if full else 2, 800 if full else 128, 81,
            torch.bfloat16 if full else torch.float32, full, None,
        )  # fmt: skip
    return Shape(
        name, "resnet34 -> resnet18", 256 if full else 16, 224 if full else 64, 1000,
        torch.bfloat16 if full else torch.float32, full, _imagenet_models,
    )  # fmt: skip


def methods(means: Tensor) -> dict[str, Criterion]:
    """The criteria by name."""
    ours = dnkd_ext.KDPlusPlus(means, temperature=peers.TEMPERATURE).to(means.device)

    def cross_entropy(logits, teacher_logits, features, teacher_features, means, target):
        return F.cross_entropy(logits, target)

    def kd(logits, teacher_logits, features, teacher_features, means, target):
        return peers.ce_kd(logits, teacher_logits, target)

    # In float32 with autocast, too: as ours and as published.
    def loop(logits, teacher_logits, features, teacher_features, means, target):
        return peers.ce_kd(logits, teacher_logits, target) + peers.nd_loop(
            features.float(), means, teacher_features.float(), target
        )

    def eager(logits, teacher_logits, features, teacher_features, means, target):
        return peers.ce_kd(logits, teacher_logits, target) + peers.nd(
            features.float(), means, teacher_features.float(), target
        )

    def fused(logits, teacher_logits, features, teacher_features, means, target):
        return ours(
            logits, teacher_logits, features, target, teacher_features=teacher_features
        ).loss

    torch._dynamo.reset()  # the other shape's graph is not wanted any more
    return {
        "CE": cross_entropy,
        "KD": kd,
        "KD++ loop": loop,
        "KD++ eager": eager,
        "KD++ compile": torch.compile(eager, dynamic=False),
        "KD++ ours": fused,
    }


def references(means: Tensor) -> dict[str, Criterion]:
    """What the methods of a kind compute, in other code than theirs: by their name's first word."""

    def kd(logits, teacher_logits, features, teacher_features, means, target):
        return reference.ce_kd_loss(
            logits, teacher_logits, target, temperature=peers.TEMPERATURE
        ).loss

    def kd_with_nd(logits, teacher_logits, features, teacher_features, means, target):
        nd = reference.nd_loss(features, target, means, teacher_features=teacher_features)
        return kd(logits, teacher_logits, features, teacher_features, means, target) + nd

    def cross_entropy(logits, teacher_logits, features, teacher_features, means, target):
        own = logits.double().log_softmax(1)
        return -own[torch.arange(len(target), device=target.device), target].mean()

    return {"CE": cross_entropy, "KD": kd, "KD++": kd_with_nd}


class Trainer:
    """A shape's networks on a device, and one student with its optimiser per method."""

    def __init__(self, shape: Shape, device: str, names: Sequence[str] | None = None) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        assert shape.make is not None
        teacher, student = shape.make()
        layout = torch.channels_last if shape.channels_last else torch.contiguous_format
        self.teacher = teacher.to(device, memory_format=layout).eval().requires_grad_(False)
        size = (shape.batch, 3, shape.image, shape.image)
        self.images = torch.randn(size).to(device, memory_format=layout)
        self.target = torch.randint(shape.classes, (shape.batch,)).to(device)
        width = dnkd_ext.adapters.find_classifier(teacher).in_features
        # On the scale of features after a ReLU.
        self.means = torch.rand(shape.classes, width, device=device)
        self.criteria: dict[str, Criterion | None] = {**methods(self.means)}
        self.references = references(self.means)
        if names is not None:
            self.criteria = {name: self.criteria[name] for name in names}
        self.students, self.optimizers = {}, {}
        for name in self.criteria:
            own = copy.deepcopy(student).to(device, memory_format=layout).train()
            self.students[name] = own
            self.optimizers[name] = torch.optim.SGD(
                own.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4
            )

    def _autocast(self):
        if self.shape.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.shape.dtype)

    def forward(self, name: str) -> tuple[Tensor, ...]:
        """What a method's criterion gets in a step."""
        with self._autocast():
            with torch.no_grad():
                teacher_features, teacher_logits = dnkd_ext.extract_features(
                    self.teacher, self.images
                )
            features, logits = dnkd_ext.extract_features(self.students[name], self.images)
        return logits, teacher_logits, features, teacher_features, self.means, self.target

    def step(self, name: str) -> Tensor:
        """One training step; the loss."""
        criterion = self.criteria[name]
        assert criterion is not None
        loss = criterion(*self.forward(name))
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()
        return loss.detach()

    def losses(self) -> dict[str, float]:
        """Every criterion on the same logits and features.

        Methods that cannot be compiled here are left out from now on, which is told.

        Raises:
            WrongPeer: one whose loss or gradients, those of logits and features, are not its
                reference's, by name.
        """
        inputs = self._criterion_inputs()

        def evaluate(criterion: Criterion) -> tuple[float, list[Tensor]]:
            leaves = [inputs[0], inputs[2]]
            loss = criterion(*inputs)
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
            return loss.item(), [gradient.double() for gradient in gradients]

        truths = {name: evaluate(one) for name, one in self.references.items()}
        losses = {}
        for name, criterion in self._there().items():
            try:
                found = evaluate(criterion)
            except RuntimeError as error:
                if type(error).__name__ not in NOT_COMPILED:
                    raise
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                print(f"{name} is left out: {first}", file=sys.stderr)
                del self.criteria[name], self.students[name], self.optimizers[name]
                continue
            truth = truths[name.split()[0]]
            require_alike(
                name, self.shape.models, found, truth, self.shape.dtype, ("logits", "features")
            )
            losses[name] = found[0]
        return losses

    def _there(self) -> dict[str, Criterion]:
        """The criteria of the methods that have one."""
        return {name: one for name, one in self.criteria.items() if one is not None}

    def _criterion_inputs(self) -> list[Tensor]:
        """The step's logits and features, cut off from the networks."""
        inputs = [value.detach() for value in self.forward(next(iter(self._there())))]
        inputs[0].requires_grad_()
        inputs[2].requires_grad_()
        return inputs

    def criterion_calls(self) -> dict[str, Callable[[], None]]:
        """Forward and backward of every criterion alone."""
        inputs = self._criterion_inputs()

        def call(criterion):
            def run() -> None:
                criterion(*inputs).backward()
                inputs[0].grad = inputs[2].grad = None

            return run

        return {name: call(criterion) for name, criterion in self._there().items()}


def make_trainer(shape: Shape, device: str) -> Trainer:
    """The trainer of a shape: of classifiers, or of detectors."""
    if shape.name == "detection":
        from benchmarks.detection import DetectorTrainer

        return DetectorTrainer(shape, device)
    return Trainer(shape, device)


def measure_shape(shape: Shape, device: str, *, rounds: int, seconds: float) -> list[results.Row]:
    """A row per method, all from the same run."""
    trainer = make_trainer(shape, device)
    trainer.losses()  # or an error where one computes something else
    times: dict[str, list[float]] = {name: [] for name in trainer.criteria}
    with Progress(rounds + 2, shape.models, unit="round") as progress:
        for turn in range(rounds + 1):
            order = list(trainer.criteria)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:  # in turn
                progress.say(name)
                synchronise(device)
                begin = time.perf_counter()
                loss = trainer.step(name)
                synchronise(device)
                if turn > 0:  # the first warms up
                    times[name].append(time.perf_counter() - begin)
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"the loss of {name} became {loss.item()}")
            progress.advance()
        progress.say("the criteria alone")
        alone = measure(trainer.criterion_calls(), device, seconds=seconds)
        progress.advance()
    common = {
        **results.environment(device),
        "device": device,
        "shape": shape.name,
        "models": shape.models,
        "batch": shape.batch,
        "image": shape.image,
        "dtype": str(shape.dtype)[6:] + (" autocast" if shape.dtype != torch.float32 else ""),
    }
    rows = []
    for name, values in times.items():
        median, low, high = median_and_quantiles(values)
        part = alone.get(name)  # none where nothing is added to the model's own loss
        rows.append(
            {
                **common,
                "method": name,
                "step_ms": round(median * 1e3, 3),
                "low_ms": round(low * 1e3, 3),
                "high_ms": round(high * 1e3, 3),
                "rounds": len(values),
                "loss_us": "" if part is None else round(part.median * 1e6, 2),
                "loss_low_us": "" if part is None else round(part.low * 1e6, 2),
                "loss_high_us": "" if part is None else round(part.high * 1e6, 2),
            }
        )
    return rows


def measured(path: Path, device: str) -> set[str]:
    """The shapes that a results file has of this commit on this machine."""
    return {str(row["shape"]) for row in steps.STEPS.measured_here(path, device)}


def run(
    device: str,
    names: Sequence[str],
    *,
    rounds: int | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> int:
    """Measure shapes; every shape is in ``out`` as soon as it is done.

    Returns:
        1 where on a GPU, whose targets ask for all of them, a shape could not be measured, else 0.
    """
    left_out = 0
    if rounds is not None and rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    steps.STEPS.require_addable(out)
    done = measured(out, device) if resume and out is not None else set()
    for name in names:
        if name in done:
            print(f"{name}: measured before at this commit on this machine")
            continue
        reason = unavailable(name)
        if reason is not None:
            print(f"{name}: not run, {reason}", file=sys.stderr)
            left_out += device == "cuda"
            continue
        rows = measure_shape(
            shape(name, device),
            device,
            rounds=rounds or (7 if device == "cpu" else 20),
            seconds=0.4 if device == "cpu" else 1.0,
        )
        if out is not None:
            steps.append_steps(rows, out)
        print(results.header(rows))
        print(tables.step_table(rows))
        if device == "cuda" and name in targets.STEPS:
            print(*targets.lines(targets.evaluate_steps(rows, [name])), sep="\n")
    return 1 if left_out else 0
