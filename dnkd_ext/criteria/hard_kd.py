"""Hard KD++: cross entropy, the hard distillation of DeiT and the ND loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dnkd_ext._checks import accumulate_dtype, require_floating, require_same_device, require_weight
from dnkd_ext.criteria._base import CriterionTerms, PlusPlus, cross_entropy, require_student
from dnkd_ext.losses._logits import LogitTerms

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["HardKDPlusPlus"]


class HardKDPlusPlus(PlusPlus):
    r"""Hard-label KD++: cross entropy, DeiT's hard distillation and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\,
        \mathrm{CE}\bigl(z_d, \operatorname{argmax} z_t\bigr)
        + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

    with the cross entropies of :func:`dnkd_ext.ce_kd_loss`, and :func:`dnkd_ext.nd_loss`. The
    :math:`z_d` are the logits of the student's distillation token, which
    :func:`dnkd_ext.distilled_features` gives beside those of the class token; any other student's
    logits :math:`z_s` serve both. DeiT weights them with ``ce_weight=0.5, kd_weight=0.5``. With
    ``nd_weight=0`` it is plain hard distillation.

    Source: "Training data-efficient image transformers & distillation through attention"
    (arXiv 2012.12877); "Improving Knowledge Distillation via Regularizing Feature Direction and
    Norm" (arXiv 2305.17007).

    Args:
        class_means: see :class:`dnkd_ext.KDPlusPlus`, as for all that is not named here.
        ce_weight: a finite float, or a 0-dim tensor, which becomes a buffer.
        kd_weight: as ``ce_weight``.
        nd_weight: as ``ce_weight``.
        label_smoothing: of the cross entropy with the target, between 0 and 1; the one with the
            teacher's decision is not smoothed.
        ignore_index: rows with this class index count in neither the cross entropy with the target
            nor the ND loss; the hard distillation counts every row. Their logits must not be NaN,
            else the loss is.
        eps: of the ND loss.

    Shape:
        ``criterion(student_logits, teacher_logits, student_features, target, *,
        distillation_logits=None, teacher_features=None, teacher_norms=None, kd_ramp=None,
        nd_ramp=None)``

        - distillation_logits: ``(..., C)`` as student_logits, of any of the four dtypes; None
          stands for the student_logits.
        - all others: as in :class:`dnkd_ext.KDPlusPlus`. Of the teacher's logits the first of the
          largest counts; a row of them that holds NaN or +infinity makes the loss NaN.

    Returns:
        As :class:`dnkd_ext.KDPlusPlus`; ``kd`` is the cross entropy with the teacher's decision.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :class:`dnkd_ext.KDPlusPlus`.

    Example:
        >>> criterion = HardKDPlusPlus(torch.randn(10, 64), ce_weight=0.5, kd_weight=0.5)
        >>> logits, of_token = (torch.randn(8, 10, requires_grad=True) for _ in range(2))
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> terms = criterion(logits, torch.randn(8, 10), features, torch.arange(8),
        ...                   distillation_logits=of_token)
        >>> terms.loss.backward()
    """

    def __init__(
        self,
        class_means: Tensor | ClassMeans | None,
        *,
        ce_weight: float | Tensor = 1.0,
        kd_weight: float | Tensor = 1.0,
        nd_weight: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
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

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_features: Tensor | None,
        target: Tensor,
        *,
        distillation_logits: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_norms: Tensor | None = None,
        kd_ramp: float | Tensor | None = None,
        nd_ramp: float | Tensor | None = None,
    ) -> CriterionTerms:
        """The weighted loss and its terms; see the class."""
        kd_weight, nd_weight = self._begin(student_logits, student_features, kd_ramp, nd_ramp)
        # Here, where it still has its name; the operator would call it its cross entropy's.
        require_weight(kd_weight, "kd_weight", student_logits, "student_logits")
        if distillation_logits is None:
            distillation_logits = student_logits
        for logits, name in (
            (teacher_logits, "teacher_logits"),
            (distillation_logits, "distillation_logits"),
        ):
            require_floating(logits, name)
            require_same_device(logits, name, student_logits, "student_logits")
            if logits.shape != student_logits.shape:
                raise ValueError(
                    f"{name} must have the shape of student_logits "
                    f"{list(student_logits.shape)}, got shape {list(logits.shape)}"
                )
        require_student(student_logits, teacher_logits)
        ce = self._cross_entropy(student_logits, target)
        largest, labels = teacher_logits.detach().max(-1)
        # The index alone would hide a teacher without a decision: 0, or NaN where a row has NaN
        # or infinity. In the weight, so that the gradient becomes NaN as well.
        doubt = (largest * 0).sum(dtype=accumulate_dtype(student_logits.dtype))
        # No label is negative, while ignore_index may be a class.
        kd = cross_entropy(distillation_logits, labels, kd_weight + doubt, 0.0, -100)
        dtype = ce.ce.dtype
        terms = LogitTerms((ce.loss + kd.loss).to(dtype), ce.ce, (kd.ce + doubt).to(dtype))
        return self._with_nd(
            terms, student_features, target, teacher_features, teacher_norms, nd_weight
        )
