"""Argument checks of the references and fake kernels.

The compiled operators make the same checks with the same words, without entering Python.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnkd_ext._export import constant_result

LOSS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")


def shown(numbers: Sequence[int]) -> str:
    """The first ten, for a message."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def rows_not_finite(table: Tensor) -> list[int]:
    """The rows of a matrix that hold NaN or infinity; waits for a GPU."""
    return (~table.isfinite().all(1)).nonzero().flatten().tolist()


def require_tensor(value: object, name: str) -> None:
    """TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_sequence(values: object, name: str) -> None:
    """TypeError unless the value holds tensors by number; a tensor itself does not count."""
    is_mapping = isinstance(values, Mapping)
    has_numbers = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    if isinstance(values, (Tensor, str)) or is_mapping or not has_numbers:
        raise TypeError(
            f"{name} must be a sequence of tensors, one per stage, got {type(values).__name__}"
        )


def require_dense(tensor: Tensor, name: str) -> None:
    """TypeError unless the tensor is neither sparse nor nested with rows of several lengths."""
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def require_floating(tensor: Tensor, name: str) -> None:
    """TypeError unless the value is a tensor of one of the four floating dtypes."""
    require_tensor(tensor, name)
    require_dense(tensor, name)
    if tensor.dtype not in LOSS_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def require_same_device(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """RuntimeError, as PyTorch's own, unless both tensors are on one device."""
    if tensor.device != other.device:
        raise RuntimeError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; "
            "they must be on the same device"
        )


def require_reduction(reduction: object) -> None:
    """ValueError unless the reduction is one of the three."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def require_number(value: object, name: str) -> None:
    """TypeError unless the value is a number of Python's, which alone a kernel's options are."""
    if isinstance(value, bool) or not isinstance(
        value, (int, float, torch.SymInt, torch.SymFloat, np.integer, np.floating)
    ):
        hint = "; it is an option and gets no gradient" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a float, got {type(value).__name__}{hint}")


def require_integer(value: object, name: str) -> None:
    """TypeError unless the value is an integer; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def require_count(value: object, name: str) -> None:
    """An error unless the value is an integer of at least 1."""
    require_integer(value, name)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def require_flag(value: object, name: str) -> None:
    """TypeError unless the value is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def require_finite(value: float, name: str) -> None:
    """An error unless the value is a number other than infinity and NaN."""
    require_number(value, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def require_positive(value: float, name: str) -> None:
    """An error unless the value is a finite number greater than 0."""
    require_number(value, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def require_weight(weight: object, name: str, other: Any, other_name: str) -> None:
    """An error unless the value is a float or a 0-dim tensor beside `other` without gradient."""
    if not isinstance(weight, Tensor):
        if isinstance(weight, bool) or not isinstance(
            weight, (int, float, torch.SymInt, torch.SymFloat, np.integer, np.floating)
        ):
            raise TypeError(
                f"{name} must be a float or a 0-dim tensor, got {type(weight).__name__}"
            )
        return
    require_floating(weight, name)
    require_same_device(weight, name, other, other_name)
    if weight.dim() != 0:
        raise ValueError(
            f"{name} must be a float or a 0-dim tensor, got shape {list(weight.shape)}"
        )
    if weight.requires_grad:
        raise ValueError(f"{name} must not require a gradient; multiply the loss by it instead")


def product(*weights: float | Tensor, of: Tensor) -> tuple[Tensor | None, float]:
    """The product of weights of a loss of `of` as a 0-dim tensor (None without any) and a float.

    Half-precision tensors are multiplied in float32, in which two of them are exact, and all in
    float64 where that is the loss's dtype.
    """
    tensor, scale = None, 1.0
    for weight in weights:
        if isinstance(weight, Tensor):
            # Not promote_types(), which is an operator of its own to who records them.
            is_double = torch.float64 in (weight.dtype, of.dtype)
            wide = weight.to(torch.float64 if is_double else torch.float32)
            tensor = wide if tensor is None else tensor * wide
        else:
            scale = scale * weight
    return tensor, scale


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Operations in the dtypes that are written down; some devices (meta) know no autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _knows_autocast(device) else nullcontext()


@constant_result  # torch 2.11 cannot look into it while it traces
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _is_traced() -> bool:
    """Whether make_fx records: torch.func.linearize does."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def check_target(target: Tensor, is_bad: Tensor, classes: int, what: str) -> None:
    """IndexError naming the first bad target, where its value can be read.

    On a GPU only if DNKD_CHECK_TARGET or anomaly detection asks for it: it synchronises. While a
    graph is traced or transformed, and on the meta device, there is no value; such rows are then
    NaN.
    """
    asked = os.environ.get("DNKD_CHECK_TARGET", "0") not in {"", "0"}
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (target.device.type != "cpu" and not (asked or torch.is_anomaly_enabled()))
        or target.is_meta
        or isinstance(is_bad, torch._subclasses.FakeTensor)
        or _is_traced()
        or not bool(is_bad.any())
    ):
        return
    position = int(is_bad.flatten().nonzero()[0])
    raise IndexError(
        f"target[{position}] = {int(target.flatten()[position])} is out of range for {classes} "
        f"{what}"
    )
