"""A projection of the student's features, for teachers of another width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dnkd_ext._checks import require_count, require_number

__all__ = ["FeatureProjector"]


class FeatureProjector(nn.Module):
    """BatchNorm1d, Dropout, Linear: student features to the width of the class means.

    As in the paper (arXiv 2305.17007), where the student is narrower or wider than its teacher. It
    is trained with the student (its parameters go to the optimiser beside the student's) and serves
    the loss alone: the student's own classifier goes on reading the features as they are, and after
    training the projector is thrown away.

    Args:
        in_features: width of the student's features.
        out_features: width of the class means, which is that of the teacher's features.
        dropout: probability of dropping a feature in training mode.
        device: of the parameters, as of any module of PyTorch.
        dtype: likewise.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``. The statistics of the batch normalisation
        are over all leading dimensions; in training mode there must be more than one row.

    Raises:
        TypeError: widths that are no integers, a dropout that is no number; features that are no
            tensor.
        ValueError: a width below 1, a dropout outside ``[0, 1]``, features of another width.

    Example:
        >>> projector = FeatureProjector(64, 128)
        >>> projector(torch.randn(8, 64)).shape
        torch.Size([8, 128])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dropout: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            require_count(value, name)
        require_number(dropout, "dropout")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.in_features = int(in_features)
        self.out_features = int(out_features)
        self.norm = nn.BatchNorm1d(in_features, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, out_features, device=device, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """The projected features, with the leading dimensions of ``features``."""
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}")
        if features.dim() < 1 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"features must be (..., {self.in_features}), got shape {list(features.shape)}"
            )
        if features.dim() == 2:  # no view, which FSDP2 warns of
            return self.linear(self.dropout(self.norm(features)))
        flat = features.reshape(math.prod(features.shape[:-1]), self.in_features)
        projected = self.linear(self.dropout(self.norm(flat)))
        return projected.reshape(*features.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Widths for ``print(module)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
