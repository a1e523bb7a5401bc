"""DKD++: cross entropy, DKD and the ND loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dnkd_ext._checks import require_finite, require_flag, require_positive
from dnkd_ext.criteria._base import LogitPlusPlus
from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.dkd_loss import ce_dkd_loss

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["DKDPlusPlus"]


class DKDPlusPlus(LogitPlusPlus):
    r"""DKD++: cross entropy, DKD and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, T^2 (\alpha\,\mathrm{TCKD} +
        \beta\,\mathrm{NCKD}) + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

    with :func:`dnkd_ext.ce_dkd_loss` and :func:`dnkd_ext.nd_loss`. With ``nd_weight=0`` it is plain
    DKD.

    Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
    (arXiv 2305.17007).

    Args:
        class_means: see :class:`dnkd_ext.KDPlusPlus`, as for all that is not named here.
        ce_weight: a finite float, or a 0-dim tensor, which becomes a buffer.
        kd_weight: as ``ce_weight``.
        nd_weight: as ``ce_weight``.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, greater than 0.
        label_smoothing: of the cross entropy, between 0 and 1.
        ignore_index: rows with this class index count in no term.
        logit_standardization: of DKD, see :func:`dnkd_ext.kd_loss`.
        eps: of the ND loss.

    Shape, Returns, Raises:
        As :class:`dnkd_ext.KDPlusPlus`; there must be at least two classes. Of class probabilities
        DKD takes the most probable class as the target.

    Example:
        >>> criterion = DKDPlusPlus(torch.randn(10, 64), alpha=0.5, beta=8.0, nd_weight=4.0)
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
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        logit_standardization: bool = False,
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
        require_positive(temperature, "temperature")
        require_finite(alpha, "alpha")
        require_finite(beta, "beta")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        require_flag(logit_standardization, "logit_standardization")
        self.logit_standardization = bool(logit_standardization)

    def _logit_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        kd_weight: float | Tensor,
    ) -> LogitTerms:
        return ce_dkd_loss(
            student_logits,
            teacher_logits,
            target,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=kd_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            logit_standardization=self.logit_standardization,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "temperature": self.temperature,
            "logit_standardization": self.logit_standardization,
        }
