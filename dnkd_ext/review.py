"""ReviewKD's fusion blocks, and the maps of a model's stages that they and the loss read.

Source: "Distilling Knowledge via Knowledge Review" (CVPR 2021, arXiv 2104.09044).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnkd_ext._checks import (
    require_count,
    require_floating,
    require_same_device,
    require_sequence,
)
from dnkd_ext._export import exportable
from dnkd_ext.adapters import (
    check_model,
    is_observed,
    is_pair,
    more_than_parts,
    run_head,
    run_parts,
)

__all__ = ["FusionBlock", "ReviewFusion", "StageMaps", "stage_channels", "stage_maps"]

Size = tuple[int, int]


class _Convolution(nn.Conv2d):
    """With ReviewKD's initial weights, which modules made on the meta device get later, too."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=1)


class FusionBlock(nn.Module):
    """One stage's attention based fusion (ABF).

    The student's map at the middle width, plus what the deeper stages carried here, each weighted
    per pixel by an attention over both; then at the teacher's size and, by a 3 x 3 convolution, of
    the teacher's width. The deepest stage has nothing to fuse with.

    Args:
        in_channels: of the student's map.
        mid_channels: of what is carried from stage to stage.
        out_channels: of the teacher's map.
        fuse: False for the deepest stage, whose ``carried`` is None.

    Shape:
        ``(N, in_channels, H, W)``, ``carried`` ``(N, mid_channels, h, w)`` and the teacher's size
        ``(H', W')`` to a pair of ``(N, out_channels, H', W')`` for the loss and
        ``(N, mid_channels, H', W')`` for the next stage.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            _Convolution(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.attention = (
            nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        )
        self.expand = nn.Sequential(
            _Convolution(mid_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, maps: Tensor, carried: Tensor | None, size: Size) -> tuple[Tensor, Tensor]:
        """The stage's map for the loss, and what is carried to the next shallower stage."""
        own = self.reduce(maps)
        if self.attention is not None:
            assert carried is not None
            carried = _at_size(carried, own.shape[2:])
            weights = self.attention(torch.cat([own, carried], 1))
            own = own * weights[:, :1] + carried * weights[:, 1:]
        own = _at_size(own, size)
        return self.expand(own), own


def _at_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="nearest")


class ReviewFusion(nn.Module):
    """The fusion blocks of all stages: student maps to maps like the teacher's.

    The deepest stage comes first, and what it found is carried up to the shallower ones. It is
    trained with the student and thrown away after training.

    Args:
        student_channels: of every stage's map, the shallowest first, the embedding last.
        teacher_channels: as many, of the teacher's.
        mid_channels: of what is carried; ``min(512, student_channels[-1])`` where None.

    Shape:
        ``fusion(student_maps, sizes)``: one ``(N, C_i, H_i, W_i)`` and one ``(H'_i, W'_i)`` per
        stage to as many ``(N, C'_i, H'_i, W'_i)``.

    Raises:
        TypeError: widths that are no integers.
        ValueError: no stage, other numbers of stages, a width below 1.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        for name, channels in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
        ):
            if isinstance(channels, (str, bytes)) or not isinstance(channels, Sequence):
                raise TypeError(
                    f"{name} must be a sequence of ints, one per stage, "
                    f"got {type(channels).__name__}"
                )
            for i, width in enumerate(channels):
                require_count(width, f"{name}[{i}]")
        stages = len(student_channels)
        if stages == 0:
            raise ValueError("student_channels must have at least one stage")
        if len(teacher_channels) != stages:
            raise ValueError(
                f"teacher_channels must have one width per stage of student_channels "
                f"{list(student_channels)}, got {list(teacher_channels)}"
            )
        if mid_channels is None:
            mid_channels = min(512, student_channels[-1])
        require_count(mid_channels, "mid_channels")
        self.student_channels = tuple(map(int, student_channels))
        self.teacher_channels = tuple(map(int, teacher_channels))
        self.mid_channels = mid_channels = int(mid_channels)
        pairs = zip(self.student_channels, self.teacher_channels, strict=True)
        self.blocks = nn.ModuleList(
            FusionBlock(own, mid_channels, wanted, fuse=i < stages - 1)
            for i, (own, wanted) in enumerate(pairs)
        )

    def forward(self, student_maps: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """The stages' maps for the loss, the shallowest first."""
        fused: list[Tensor] = []
        carried: Tensor | None = None
        for i in reversed(range(len(self.blocks))):
            result, carried = self.blocks[i](student_maps[i], carried, sizes[i])
            fused.append(result)
        return fused[::-1]

    def check(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> None:
        """An error that names the first map the blocks cannot take, before anything is computed."""
        like = self.blocks[0].reduce[0].weight
        for name, maps, channels in (
            ("student_maps", student_maps, self.student_channels),
            ("teacher_maps", teacher_maps, self.teacher_channels),
        ):
            require_sequence(maps, name)
            if len(maps) != len(channels):
                raise ValueError(
                    f"{name} must have {len(channels)} stages, the last of them the embedding, "
                    f"got {len(maps)}"
                )
            for i, (one, width) in enumerate(zip(maps, channels, strict=True)):
                stage = f"{name}[{i}]"
                require_floating(one, stage)
                if one.dim() not in (2, 4) or one.shape[1] != width:
                    raise ValueError(
                        f"{stage} must be (N, {width}, H, W), or (N, {width}) for an embedding, "
                        f"got shape {list(one.shape)}"
                    )
                require_same_device(one, stage, like, "the criterion")
                if one.shape[0] != student_maps[0].shape[0]:
                    raise ValueError(
                        f"{stage} must have the {student_maps[0].shape[0]} samples of "
                        f"student_maps[0], got {one.shape[0]}"
                    )
                if one.dim() == 4 and 0 in one.shape[2:]:
                    raise ValueError(f"{stage} has no pixels, its shape is {list(one.shape)}")
                if self.training and one.shape[0] * one.shape[2:].numel() == 1:
                    raise ValueError(
                        f"{stage} is one pixel of one sample, which the fusion blocks cannot "
                        "normalise in training mode; give at least two samples"
                    )
        for i, one in enumerate(student_maps):
            # Autocast converts what a convolution reads; else its weights' dtype is wanted.
            if one.dtype != like.dtype and not torch.is_autocast_enabled(one.device.type):
                raise TypeError(
                    f"student_maps[{i}] is {one.dtype} but the fusion blocks are {like.dtype}; "
                    "convert one of them, or call the criterion under torch.autocast"
                )

    def extra_repr(self) -> str:
        """Widths for ``print(module)``."""
        return (
            f"student_channels={self.student_channels}, teacher_channels={self.teacher_channels}, "
            f"mid_channels={self.mid_channels}"
        )


# -- what models offer ----------------------------------------------------------------------------


@exportable
class StageMaps(NamedTuple):
    """What ReviewKD reads of a model.

    Attributes:
        maps: of every stage ``(N, C_i, H_i, W_i)``, and the embedding ``(N, D, 1, 1)`` as the last.
        features: the embedding ``(N, D)``, which the classifier reads.
        logits: ``(N, C)``.
    """

    maps: list[Tensor]
    features: Tensor
    logits: Tensor


def _has_stages(model: nn.Module) -> bool:
    """Whether the model has ``forward_stages``, as the networks of dnkd_ext.train.models have."""
    return callable(getattr(model, "forward_stages", None)) and hasattr(model, "feature_info")


def _timm_stages(model: nn.Module) -> list[int]:
    """Indices into a timm model's ``feature_info``.

    A map of half the image's size is the stem's: ReviewKD begins at a quarter.
    """
    parts = ("forward_intermediates", "forward_head", "get_classifier")
    if not hasattr(model, "feature_info") or not all(
        callable(getattr(model, name, None)) for name in parts
    ):
        raise ValueError(
            f"{type(model).__name__} does not tell the maps of its stages, as timm's models do by "
            "feature_info and forward_intermediates(): take the maps with hooks, and pass "
            "student_channels= and teacher_channels= to ReviewKDPlusPlus (of a teacher in "
            "DistributedDataParallel, pass its module; a student's maps are to be taken in the "
            "forward of a module that is wrapped, else its gradients are not exchanged)"
        )
    if is_pair(model.get_classifier()):
        raise ValueError(
            f"{type(model).__name__} has two heads, of the class and the distillation token, and "
            "no embedding that is read by one alone: ReviewKD wants a model with a single head"
        )
    return [i for i, info in enumerate(model.feature_info) if info["reduction"] > 2]


def stage_channels(model: nn.Module) -> list[int]:
    """Channels of the maps that :func:`stage_maps` gives: the stages', then the embedding's.

    Raises:
        ValueError: the model does not tell its stages (torchvision's do not), or has two heads.
    """
    info = list(model.feature_info) if _has_stages(model) else None
    if info is None:
        indices = _timm_stages(model)
        info = [model.feature_info[i] for i in indices]
    width = getattr(model, "head_hidden_size", None) or model.num_features
    return [stage["num_chs"] for stage in info] + [width]


def stage_maps(model: nn.Module, images: Tensor, *, pre_activation: bool = False) -> StageMaps:
    """Run a classifier once and return the maps of its stages, its features and its logits.

    For the networks of :mod:`dnkd_ext.train.models` and those of timm that have
    ``forward_intermediates``; the stages of the latter begin at a quarter of the image's size. The
    model's parts are run, and not the model; hooks on it are called as by itself, and must change
    nothing.

    Args:
        model: the classifier itself, in no wrapper. DistributedDataParallel exchanges gradients of
            its own forward pass alone: of a student it must wrap a module whose ``forward`` calls
            this function.
        images: its input.
        pre_activation: maps before the activation that ends their stage, where there is one.
            ReviewKD reads the teacher so on CIFAR, and the student after it. timm's models give
            maps after the activation only.

    Returns:
        ``(maps, features, logits)``, see :class:`StageMaps`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model does not tell its stages (torchvision's do not), has two heads (DeiT's
            with a distillation token), or ``pre_activation=True`` of a model that has none; calling
            it is more than running its stages and head (a hook that changes the images or the
            logits, a method that was replaced or is of another class than the one that gives the
            stages), which would be left out; or it was compiled by itself.

    Example:
        >>> from dnkd_ext.train.models import create_model
        >>> model = create_model("cifar_resnet20")
        >>> [tuple(one.shape[1:]) for one in stage_maps(model, torch.randn(2, 3, 32, 32)).maps]
        [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 1, 1)]
    """
    check_model(model, "stage_maps")
    if _has_stages(model):

        def run(images: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor]:
            return model.forward_stages(images, pre_activation=pre_activation)

        parts = ("forward_stages", "forward_head")
        if is_observed(model.get_classifier()):
            raise more_than_parts(model, parts, "its classifier has a forward pre-hook")
        maps, features, logits = run_parts(model, images, run, parts)
    else:
        indices = _timm_stages(model)
        if pre_activation:
            raise ValueError(
                f"{type(model).__name__} gives maps after their activation only, but "
                "pre_activation=True was given"
            )

        def run(images: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor]:
            last, maps = model.forward_intermediates(images, indices=indices)
            return maps, *run_head(model, last)

        maps, features, logits = run_parts(model, images, run, ("forward_intermediates",))
    return StageMaps([*maps, features[..., None, None]], features, logits)
