"""The training and evaluation loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnkd_ext._modes import evaluating
from dnkd_ext.adapters import extract_features
from dnkd_ext.train.data.memory import Images, ImageSet

__all__ = ["Evaluation", "Optimisation", "evaluate", "fit"]


@dataclass(frozen=True)
class Optimisation:
    """SGD with Nesterov momentum under a cosine schedule, stepped every batch."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass
class Evaluation:
    """A model over a split: ``accuracy`` in [0, 1], features (N, D) and target (N,) on the CPU."""

    accuracy: float
    features: Tensor
    target: Tensor


# (images, target, epoch) -> the loss to minimise
Step = Callable[[Tensor, Tensor, int], Tensor]


def fit(
    parameters: Iterable[nn.Parameter],
    data: ImageSet,
    step: Step,
    options: Optimisation,
    *,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Minimise ``step`` over the augmented training split.

    Nothing is read back from the device before an epoch's end, where a loss that is not finite
    raises FloatingPointError with the epoch.
    """
    optimizer = torch.optim.SGD(
        parameters,
        lr=options.learning_rate,
        momentum=options.momentum,
        nesterov=True,
        weight_decay=options.weight_decay,
    )
    per_epoch = max(1, len(data.train) // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(options.epochs):
        total = torch.zeros((), device=data.train.pixels.device)
        for images, target in data.batches(data.train, options.batch_size, generator=generator):
            loss = step(images, target, epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if not bool(total.isfinite()):
            raise FloatingPointError(f"the loss became {float(total)} in epoch {epoch + 1}")
        on_epoch()


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageSet, split: Images, batch_size: int = 500) -> Evaluation:
    """Accuracy and features of a model in evaluation mode, which is then restored."""
    hits, features = [], []
    with evaluating(model):
        for images, target in data.batches(split, batch_size):
            feature, logits = extract_features(model, images)
            hits.append(logits.argmax(1) == target)
            features.append(feature.float())
    return Evaluation(
        torch.cat(hits).float().mean().item(), torch.cat(features).cpu(), split.target.cpu()
    )
