"""Weights of a network from a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dnkd_ext._files import UNREADABLE

__all__ = ["load_weights", "read_notes", "read_weights"]

# Under which name checkpoints keep the state, the first that is there; mdistiller's say "model".
# timm's have a moving average beside the state where one was kept, and chose the best by it.
KEYS = ("state_dict_ema", "model", "state_dict")


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Put the weights of a file into the model, all of them and nothing else.

    Reads safetensors files, PyTorch files of a state dictionary, and checkpoints that hold one
    under ``model`` (mdistiller's) or ``state_dict`` (timm's). Of timm's the moving average,
    ``state_dict_ema``, is taken where there is one, as timm's ``load_checkpoint`` does by default.
    The prefix ``module.`` of DataParallel is dropped. Nothing in the file is executed. The model is
    untouched where an error is raised.

    Args:
        model: gets the weights.
        path: of the file.
        adapt: from what the file holds to the names and shapes that the model has; a ValueError of
            its own is told with the file's name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or the weights of another network: the first names and shapes
            that differ are told. Or values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    state = read_weights(path)
    if adapt is not None:
        try:
            state = adapt(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    broken = [name for name, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values that are not finite, the first in {broken[0]}")
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in wanted]
    shapes = {
        name: (list(state[name].shape), list(wanted[name].shape))
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    }
    # Where nothing but numbers of rows differ, and all alike, they are those of the classifier.
    rows = {(found[0], asked[0]) for found, asked in shapes.values() if found[1:] == asked[1:]}
    other = f"the weights of another network than {type(model).__name__}"
    if not problems and len(rows) == 1 and all(a[1:] == b[1:] for a, b in shapes.values()):
        ((found, asked),) = rows
        other = f"weights for {found} classes, and not for the {asked} that are wanted"
    problems += [
        f"{name} has shape {found}, wanted {asked}" for name, (found, asked) in shapes.items()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} holds {other}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dictionary of a file, on the CPU; see :func:`load_weights`.

    Raises:
        ValueError: not such a file.
    """
    state = _read(path)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def read_notes(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other, and for a damaged one."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}  # whoever loads the weights tells what is wrong


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        # timm's checkpoints hold the options of their run, which are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a PyTorch file of weights alone: {_why(error)}") from error
    for key in KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(
            f"{path} holds no state dictionary, neither as a whole nor under {' or '.join(KEYS)}"
        )
    return dict(content)


def _why(error: Exception) -> str:
    """What torch.load found wrong, in a line, without its advice to load the file all the same."""
    told = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    foreign = re.search(r"Unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", told)
    if foreign:
        return f"it holds {foreign[1]}, which is neither a tensor nor a plain value"
    told = told.rpartition("WeightsUnpickler error:")[2].strip()
    if told.isdecimal():  # the instruction that no pickle has
        return "it is of another format"
    return told.splitlines()[0] if told else type(error).__name__
