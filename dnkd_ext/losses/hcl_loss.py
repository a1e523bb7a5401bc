"""The hierarchical context loss (HCL) of ReviewKD.

Source: "Distilling Knowledge via Knowledge Review" (CVPR 2021, arXiv 2104.09044).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dnkd_ext._checks import (
    accumulate_dtype,
    no_autocast,
    require_floating,
    require_same_device,
    require_sequence,
)

__all__ = ["hcl_loss"]


def hcl_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Mean squared error of feature maps and of their averages over ever larger cells.

    Per stage: the error at the map's own size with weight 1, then of both maps average-pooled to
    l x l cells for each l of 4, 2, 1 smaller than the map's height, each level used having half the
    weight of the one before; divided by the sum of the weights. The stages' losses are added.

    Pooling is linear, so that the difference of the maps is formed once and pooled. These are
    PyTorch operations, differentiable to any order.

    Args:
        student_maps: a sequence of ``(N, C, H, W)``, one per stage, float16, bfloat16, float32 or
            float64. An embedding takes part as a stage of 1 x 1.
        teacher_maps: as many of the same shapes; they get no gradient.

    Returns:
        The loss, 0-dim: float64 where a student map is, else float32. 0 without samples.

    Raises:
        TypeError: maps that are no sequence, a map that is no tensor or of a wrong dtype.
        ValueError: no stage, other numbers of stages, or shapes.
        RuntimeError: maps of a stage on different devices.

    Example:
        >>> maps = [torch.randn(2, 8, size, size, requires_grad=True) for size in (8, 4, 1)]
        >>> hcl_loss(maps, [torch.randn(m.shape) for m in maps]).backward()
    """
    require_sequence(student_maps, "student_maps")
    require_sequence(teacher_maps, "teacher_maps")
    if len(student_maps) != len(teacher_maps):
        raise ValueError(
            f"teacher_maps must have one map per stage of student_maps, {len(student_maps)}, "
            f"got {len(teacher_maps)}"
        )
    if len(student_maps) == 0:
        raise ValueError("student_maps must have at least one stage")
    total: Tensor | None = None
    for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        names = f"student_maps[{i}]", f"teacher_maps[{i}]"
        require_floating(student, names[0])
        require_floating(teacher, names[1])
        require_same_device(teacher, names[1], student, names[0])
        if student.dim() != 4:
            raise ValueError(f"{names[0]} must be (N, C, H, W), got shape {list(student.shape)}")
        if teacher.shape != student.shape:
            raise ValueError(
                f"{names[1]} must have the shape of {names[0]} {list(student.shape)}, "
                f"got shape {list(teacher.shape)}"
            )
        stage = _stage(student, teacher)
        total = stage if total is None else total + stage
    assert total is not None
    return total


def _stage(student: Tensor, teacher: Tensor) -> Tensor:
    dtype = accumulate_dtype(student.dtype)
    with no_autocast(student):
        difference = student.to(dtype) - teacher.detach().to(dtype)
        count = max(difference.numel(), 1)
        loss, weight, weights = difference.square().sum() / count, 1.0, 1.0
        for cells in (4, 2, 1):
            if cells >= student.shape[2] or difference.numel() == 0:
                continue
            weight /= 2
            weights += weight
            loss = loss + weight * _pooled(difference, cells).square().mean()
        return loss / weights


def _pooled(maps: Tensor, cells: int) -> Tensor:
    """Averages over cells x cells windows, which may overlap by a row or column.

    PyTorch's has no deterministic backward pass on CUDA. Matrix products have; they take up to 2.3
    times as long on a CPU.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(maps, cells)
    rows, columns = (_windows(size, cells, maps) for size in maps.shape[2:])
    return rows @ maps @ columns.T


def _windows(size: int, cells: int, like: Tensor) -> Tensor:
    """(cells, size): each row averages a window, from the floor of its beginning to the ceiling."""
    cell = torch.arange(cells, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)
    inside = (place >= cell * size // cells) & (place < -(-(cell + 1) * size // cells))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
