"""KD++: cross entropy, KD and the ND loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dnkd_ext._checks import require_flag, require_positive
from dnkd_ext.criteria._base import LogitPlusPlus
from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.kd_loss import ce_kd_loss

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["KDPlusPlus"]


class KDPlusPlus(LogitPlusPlus):
    r"""KD++: cross entropy, KD and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, T^2\,
        \mathrm{KL}\bigl(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\bigr)
        + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

    each term a mean over the samples it counts (:func:`dnkd_ext.ce_kd_loss`,
    :func:`dnkd_ext.nd_loss`). The weights enter the terms' own kernels, so that each of them is
    differentiated with an upstream gradient of 1, which takes no pass over it. With ``nd_weight=0``
    it is plain KD: the class means and the student's features may then be None.

    Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
    (arXiv 2305.17007).

    Args:
        class_means: ``(C, D)`` tensor of a floating dtype, or a :class:`dnkd_ext.ClassMeans`, whose
            ``compute()`` is taken; kept as the persistent buffer ``class_means``, the
            name it has in :class:`dnkd_ext.NDLoss`. May be None with ``nd_weight=0``.
        ce_weight: a finite float, or a 0-dim tensor, which becomes a buffer. A tensor can be
            changed in place (``criterion.nd_weight.fill_(2.0)``) without ``torch.compile``
            recompiling and seen by a captured CUDA graph; a changed float recompiles.
        kd_weight: as ``ce_weight``.
        nd_weight: as ``ce_weight``. Only the float 0 leaves the ND loss out.
        temperature: T, greater than 0.
        label_smoothing: of the cross entropy, between 0 and 1.
        ignore_index: rows with this class index count in neither the cross entropy nor the ND loss;
            KD counts every row.
        logit_standardization: of KD, see :func:`dnkd_ext.kd_loss`.
        eps: of the ND loss, see :func:`dnkd_ext.nd_loss`.

    Shape:
        ``criterion(student_logits, teacher_logits, student_features, target, *,
        teacher_features=None, teacher_norms=None, kd_ramp=None, nd_ramp=None)``

        - student_logits, teacher_logits: ``(..., C)``, float16, bfloat16, float32 or float64; the
          teacher's get no gradient.
        - student_features: ``(..., D)``, any of the four dtypes. Where the student's width is not
          that of the class means, :class:`dnkd_ext.FeatureProjector` projects them.
        - target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of
          a floating dtype (mixup, cutmix), which cross entropy and ND loss take as they are.
        - teacher_features ``(..., D')``, or teacher_norms ``(...)``; without them the ND loss is
          direction-only.
        - kd_ramp: multiplies ``kd_weight``; the paper's is ``min(1, epoch / warm_up)`` with epochs
          counted from 0. None is 1. A float, of which ``torch.compile`` compiles the first and then
          all others once, with ``dynamic=False`` each value (no scalar of NumPy, which it takes for
          an array), or a 0-dim tensor on the logits' device, which neither recompiles nor has to be
          captured again when it changes.
        - nd_ramp: multiplies ``nd_weight``, as ``kd_ramp`` does ``kd_weight``; the paper's ImageNet
          experiments with DKD++ ramp both. At 0 the ND loss has a gradient of zeros.

    Returns:
        A named tuple ``(loss, ce, kd, nd)``: the weighted sum, and the terms without weights and
        ramps, which need no gradient. float32 for half-precision inputs.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: a weight that is not finite, a wrong shape or option, class means of another
            width than the features or another number of classes than the logits, features or class
            means that are missing.
        RuntimeError: arguments on different devices.
        IndexError: a class index out of range; on CUDA see :func:`dnkd_ext.nd_loss`.

    Example:
        >>> criterion = KDPlusPlus(torch.randn(10, 64), kd_weight=1.0, nd_weight=2.0)
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> terms = criterion(logits, torch.randn(8, 10), features, torch.arange(8),
        ...                   teacher_features=torch.randn(8, 64), kd_ramp=0.5)
        >>> terms.loss.backward()
    """

    def __init__(
        self,
        class_means: Tensor | ClassMeans | None,
        *,
        ce_weight: float | Tensor = 1.0,
        kd_weight: float | Tensor = 1.0,
        nd_weight: float | Tensor = 1.0,
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
        return ce_kd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=kd_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            logit_standardization=self.logit_standardization,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "logit_standardization": self.logit_standardization,
        }
