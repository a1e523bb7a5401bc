"""What changes with the epochs: the learning rate, and the distillation's share."""

from __future__ import annotations

import math

from dnkd_ext.train.config import OptimOptions

__all__ = ["learning_rate", "ramp"]


def learning_rate(options: OptimOptions, time: float) -> float:
    """The learning rate ``time`` epochs after the start, between 0 and ``options.epochs``.

    The cosine spans all epochs, and the warm-up takes the place of its beginning; or it spans those
    after the warm-up.
    """
    if time < options.lr_warm_up:
        return options.lr_start + (options.lr - options.lr_start) * time / options.lr_warm_up
    if options.schedule == "cosine":
        start = options.lr_warm_up if options.cosine_after_warm_up else 0.0
        passed = (time - start) / (options.epochs - start)
        height = 0.5 * (1 + math.cos(math.pi * passed))
        return options.lr_end + (options.lr - options.lr_end) * height
    fallen = sum(time >= milestone for milestone in options.milestones)
    return options.lr * options.lr_decay**fallen


def ramp(warm_up: int, epoch: int) -> float:
    """The distillation's share in an epoch, counted from 0: 0 in the first, 1 after ``warm_up``."""
    return min(1.0, epoch / warm_up) if warm_up else 1.0
