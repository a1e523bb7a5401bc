"""Accuracies of a classifier over test images, and the features it gave."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dnkd_ext._modes import evaluating
from dnkd_ext.adapters import features
from dnkd_ext.train.data.decoding import DataError
from dnkd_ext.train.data.sources import Clean
from dnkd_ext.train.world import OtherProcessFailed, World

__all__ = ["Evaluated", "evaluate"]


class Evaluated(NamedTuple):
    """Accuracies in percent over the test images of all processes, and this process's features.

    ``count`` is how many images there were in all processes, but for those that could not be read.
    The features where they are wanted; ``target`` is -100 where a batch was filled up.
    """

    top1: float
    top5: float
    count: int
    features: Tensor | None = None
    target: Tensor | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Clean,
    classes: int,
    autocast: Any,
    world: World,
    *,
    keep: bool = False,
) -> Evaluated:
    """A model in evaluation mode over test images; its modes are restored. Collective.

    With ``keep`` the features of all images of this process stay on the device.

    The hits are counted on the device: torchmetrics, where some rows are to be left out, waits for
    it in every batch.

    Raises:
        DataError: not one of the images could be read.
        OtherProcessFailed: likewise; the first process tells it.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    taken, targets = [], []
    with evaluating(model):
        for images, target, mask in batches:
            with autocast:
                feature, logits = features(model, images)
            best = logits.topk(min(5, classes), dim=1).indices == target[:, None]
            best &= ~logits.isnan().any(1, keepdim=True)  # the first of which would be the highest
            hits = torch.stack([best[:, 0], best.any(1), torch.ones_like(mask)], 1)
            counts += (hits & mask[:, None]).sum(0)
            if keep:
                taken.append(feature.float())
                targets.append(target.where(mask, -100))
    top1, top5, count = world.sum(counts).tolist()
    if not count:
        failed = world.gather((batches.unreadable, batches.first_unreadable))
        if not world.is_first:
            raise OtherProcessFailed("nothing could be evaluated")
        total = sum(number for number, _ in failed)
        first = next((name for _, name in failed if name), "")
        raise DataError(
            f"nothing can be evaluated: none of the {total} images of {batches.place} could be "
            f"read; one is {first}"
        )
    kept = (torch.cat(taken), torch.cat(targets)) if keep else ()
    return Evaluated(round(100 * top1 / count, 4), round(100 * top5 / count, 4), count, *kept)
