"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Let a model compute its activations again, by timm's ``set_grad_checkpointing``.

    BatchNorm takes part in running statistics in the forward pass alone, not again in the backward
    pass, so that training is the same as without.

    Args:
        model: the model.
        name: what an error calls it.

    Raises:
        ValueError: the model does not know how to.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError("it has no set_grad_checkpointing")
        switch(True)
    except AssertionError as error:  # timm's way of telling
        raise ValueError(f"--activation-checkpointing is not for {name}: {error}") from error
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            kept: list[float | None] = []
            module.register_forward_pre_hook(_freeze(kept))
            module.register_forward_hook(_restore(kept), always_call=True)


def _freeze(kept: list[float | None]) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        # Only while a backward pass runs: momentum 0 leaves the statistics as they are.
        if module.training and torch._C._current_graph_task_id() != -1:
            kept.append(module.momentum)
            module.momentum = 0.0

    return hook


def _restore(kept: list[float | None]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if kept:
            module.momentum = kept.pop()
            module.num_batches_tracked -= 1

    return hook
