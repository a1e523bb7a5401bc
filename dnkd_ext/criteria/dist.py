"""DIST++: cross entropy, DIST and the ND loss."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dnkd_ext._checks import require_finite, require_positive
from dnkd_ext.criteria._base import LogitPlusPlus
from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.dist_loss import dist_loss, require_process_group

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["DISTPlusPlus"]


class DISTPlusPlus(LogitPlusPlus):
    r"""DIST++: cross entropy, DIST and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, \tau^2 (\beta\,\mathrm{inter} +
        \gamma\,\mathrm{intra}) + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

    with the cross entropy of :func:`dnkd_ext.ce_kd_loss`, :func:`dnkd_ext.dist_loss` and
    :func:`dnkd_ext.nd_loss`. With ``nd_weight=0`` it is plain DIST.

    Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
    (arXiv 2305.17007).

    Args:
        class_means: see :class:`dnkd_ext.KDPlusPlus`, as for all that is not named here.
        ce_weight: a finite float, or a 0-dim tensor, which becomes a buffer.
        kd_weight: as ``ce_weight``.
        nd_weight: as ``ce_weight``.
        beta: weight of the correlation over each sample's classes.
        gamma: weight of the correlation over each class's samples.
        tau: temperature of the softmax, greater than 0.
        label_smoothing: of the cross entropy, between 0 and 1.
        ignore_index: rows with this class index count in neither the cross entropy nor the ND loss;
            DIST counts every row.
        process_group: of :func:`dnkd_ext.dist_loss`: the correlation over samples is then that of
            the batches of all its processes together.
        eps: of the ND loss.

    Shape, Returns, Raises:
        As :class:`dnkd_ext.KDPlusPlus`.

    Example:
        >>> criterion = DISTPlusPlus(torch.randn(10, 64), kd_weight=2.0, nd_weight=1.0)
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> criterion(logits, torch.randn(8, 10), features, torch.arange(8)).loss.backward()
    """

    def __init__(
        self,
        class_means: Tensor | ClassMeans | None,
        *,
        ce_weight: float | Tensor = 1.0,
        kd_weight: float | Tensor = 1.0,
        nd_weight: float | Tensor = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        process_group: torch.distributed.ProcessGroup | None = None,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(
            class_means,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            nd_weight=nd_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            eps=eps,
        )
        require_positive(tau, "tau")
        require_finite(beta, "beta")
        require_finite(gamma, "gamma")
        if process_group is not None:
            require_process_group(process_group)
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> DISTPlusPlus:
        """A copy in the same process group, which itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        state = self.__getstate__()  # which leaves out a compiled call, that of the original
        result.__setstate__(copy.deepcopy(state, memo))
        return result

    def __copy__(self) -> DISTPlusPlus:
        result = type(self).__new__(type(self))
        result.__setstate__(self.__getstate__())
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "DISTPlusPlus cannot be pickled with its process_group: save its state_dict(), or "
                "set criterion.process_group = None before"
            )
        return super().__reduce_ex__(protocol)

    def _logit_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        kd_weight: float | Tensor,
    ) -> LogitTerms:
        kd = dist_loss(
            student_logits,
            teacher_logits,
            beta=self.beta,
            gamma=self.gamma,
            tau=self.tau,
            process_group=self.process_group,
        )
        return self._with_cross_entropy(kd, kd_weight, student_logits, target)

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta, "gamma": self.gamma, "tau": self.tau}
