"""KD++, DKD++ and DIST++: cross entropy, a distillation of logits, and the ND loss, weighted.

Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
(arXiv 2305.17007).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dnkd_ext._checks import (
    require_floating,
    require_number,
    require_tensor,
    require_weight,
)
from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.dkd_loss import ce_dkd_loss
from dnkd_ext.losses.kd_loss import ce_kd_loss
from dnkd_ext.losses.nd_loss import class_means_table, nd_loss

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["CriterionTerms", "DISTPlusPlus", "DKDPlusPlus", "KDPlusPlus"]


class CriterionTerms(NamedTuple):
    """What a criterion returns: 0-dim tensors on the logits' device.

    Attributes:
        loss: ``ce_weight * ce + kd_weight * kd_ramp * kd + nd_weight * nd``, differentiable.
        ce: the cross entropy without its weight, for logging; needs no gradient.
        kd: the distillation term (KD, DKD or DIST) without its weight; needs no gradient.
        nd: the ND loss without its weight, needs no gradient; 0 where its weight is 0.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    nd: Tensor


class _PlusPlus(nn.Module):
    """What the criteria share; a subclass adds the cross entropy and the term on logits."""

    class_means: Tensor | None
    ce_weight: float | Tensor
    kd_weight: float | Tensor
    nd_weight: float | Tensor

    def __init__(
        self,
        class_means: Tensor | ClassMeans | None,
        *,
        ce_weight: float | Tensor,
        kd_weight: float | Tensor,
        nd_weight: float | Tensor,
        label_smoothing: float,
        ignore_index: int,
        eps: float,
    ) -> None:
        super().__init__()
        for name, weight in (
            ("ce_weight", ce_weight),
            ("kd_weight", kd_weight),
            ("nd_weight", nd_weight),
        ):
            require_weight(weight, name, weight, "itself")
            if isinstance(weight, Tensor):
                self.register_buffer(name, weight.detach().clone())
            else:
                _require_finite(weight, name)
                setattr(self, name, float(weight))
        if class_means is not None:
            class_means = class_means_table(class_means, stacklevel=4)
        elif self._has_nd():
            raise ValueError("class_means must be given unless nd_weight is 0, got None")
        self.register_buffer("class_means", class_means)
        require_number(label_smoothing, "label_smoothing")
        require_number(eps, "eps")
        if not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.eps = eps

    def _has_nd(self) -> bool:
        """Whether the ND loss takes part: a weight that is a tensor may change at any time."""
        return isinstance(self.nd_weight, Tensor) or self.nd_weight != 0

    def _logit_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        kd_weight: float | Tensor,
    ) -> LogitTerms:
        raise NotImplementedError

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_features: Tensor | None,
        target: Tensor,
        *,
        teacher_features: Tensor | None = None,
        teacher_norms: Tensor | None = None,
        kd_ramp: float | Tensor = 1.0,
    ) -> CriterionTerms:
        """The weighted loss and its terms; see the class."""
        has_nd = self._has_nd()
        if has_nd:
            self._check_features(student_logits, student_features)
        require_tensor(student_logits, "student_logits")
        require_weight(kd_ramp, "kd_ramp", student_logits, "student_logits")
        if not isinstance(kd_ramp, Tensor) and not torch.compiler.is_compiling():
            _require_finite(kd_ramp, "kd_ramp")  # a traced float has no value to look at
        terms = self._logit_terms(student_logits, teacher_logits, target, self.kd_weight * kd_ramp)
        if not has_nd:
            return CriterionTerms(*terms, torch.zeros_like(terms.ce))
        assert student_features is not None
        assert self.class_means is not None
        weighted = nd_loss(
            student_features,
            target,
            self.class_means,
            teacher_features=teacher_features,
            teacher_norms=teacher_norms,
            ignore_index=self.ignore_index,
            loss_weight=self.nd_weight,
            eps=self.eps,
        )
        nd = weighted.detach() / self.nd_weight
        if isinstance(self.nd_weight, Tensor):
            # On the device, where alone the weight is known; NaN / 0 must not hide behind the 0.
            nd = torch.where((self.nd_weight == 0) & (weighted == 0), 0, nd).to(weighted.dtype)
        return CriterionTerms(terms.loss + weighted, terms.ce, terms.kd, nd)

    def _check_features(self, student_logits: Tensor, student_features: Tensor | None) -> None:
        """Errors that name what the criterion needs, before anything is computed."""
        if self.class_means is None:
            raise ValueError("class_means must be given unless nd_weight is 0, got None")
        if student_features is None:
            raise ValueError("student_features must be given unless nd_weight is 0, got None")
        require_floating(student_features, "student_features")
        require_floating(student_logits, "student_logits")
        classes, width = self.class_means.shape
        if student_features.dim() >= 1 and student_features.shape[-1] != width:
            own = student_features.shape[-1]
            raise ValueError(
                f"class_means is {width} wide but student_features is {own} wide; project the "
                f"student's features to the width of the class means, as "
                f"dnkd_ext.FeatureProjector({own}, {width}) does"
            )
        if student_logits.dim() >= 1 and student_logits.shape[-1] != classes:
            raise ValueError(
                f"class_means has {classes} classes but student_logits has "
                f"{student_logits.shape[-1]}"
            )

    def _options(self) -> dict[str, Any]:
        return {}

    def extra_repr(self) -> str:
        """Sizes and options for ``print(module)``."""
        if self.class_means is None:
            sizes: dict[str, Any] = {"class_means": None}
        else:
            classes, features = self.class_means.shape
            sizes = {"num_classes": classes, "num_features": features}
        options = {
            **sizes,
            "ce_weight": self.ce_weight,
            "kd_weight": self.kd_weight,
            "nd_weight": self.nd_weight,
            **self._options(),
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "eps": self.eps,
        }
        return ", ".join(f"{name}={value}" for name, value in options.items())


class KDPlusPlus(_PlusPlus):
    r"""KD++: cross entropy, KD and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, T^2\,
        \mathrm{KL}\bigl(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\bigr)
        + w_{nd}\, \mathrm{ND}(f_s, y)

    each term a mean over the samples it counts (:func:`dnkd_ext.ce_kd_loss`,
    :func:`dnkd_ext.nd_loss`). The weights enter the terms' own kernels, so that each of them is
    differentiated with an upstream gradient of 1, which costs nothing. With ``nd_weight=0`` it is
    plain KD: the class means and the student's features may then be None.

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
        teacher_features=None, teacher_norms=None, kd_ramp=1.0)``

        - student_logits, teacher_logits: ``(..., C)``, float16, bfloat16, float32 or float64; the
          teacher's get no gradient.
        - student_features: ``(..., D)``, any of the four dtypes. Where the student's width is not
          that of the class means, :class:`dnkd_ext.FeatureProjector` projects them.
        - target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of
          a floating dtype (mixup, cutmix), which cross entropy and ND loss take as they are.
        - teacher_features ``(..., D')``, or teacher_norms ``(...)``; without them the ND loss is
          direction-only.
        - kd_ramp: multiplies ``kd_weight``; the paper's is ``min(1, epoch / warm_up)`` with epochs
          counted from 0. A float, or a 0-dim tensor on the logits' device, which neither recompiles
          nor has to be captured again when it changes.

    Returns:
        A named tuple ``(loss, ce, kd, nd)``: the weighted sum, and the terms without weights and
        ramp, which need no gradient. float32 for half-precision inputs.

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
        _require_positive(temperature, "temperature")
        self.temperature = temperature
        self.logit_standardization = logit_standardization

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


class DKDPlusPlus(_PlusPlus):
    r"""DKD++: cross entropy, DKD and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, T^2 (\alpha\,\mathrm{TCKD} +
        \beta\,\mathrm{NCKD}) + w_{nd}\, \mathrm{ND}(f_s, y)

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
        _require_positive(temperature, "temperature")
        _require_finite(alpha, "alpha")
        _require_finite(beta, "beta")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.logit_standardization = logit_standardization

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


class DISTPlusPlus(_PlusPlus):
    r"""DIST++: cross entropy, DIST and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, \tau^2 (\beta\,\mathrm{inter} +
        \gamma\,\mathrm{intra}) + w_{nd}\, \mathrm{ND}(f_s, y)

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
        _require_positive(tau, "tau")
        _require_finite(beta, "beta")
        _require_finite(gamma, "gamma")
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> DISTPlusPlus:
        """A copy in the same process group, which itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    def _logit_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        kd_weight: float | Tensor,
    ) -> LogitTerms:
        from dnkd_ext.losses.dist_loss import dist_loss

        kd = dist_loss(
            student_logits,
            teacher_logits,
            beta=self.beta,
            gamma=self.gamma,
            tau=self.tau,
            process_group=self.process_group,
        )
        # The cross entropy alone: the fused one beside a KD from the student itself, which is 0.
        terms = ce_kd_loss(
            student_logits,
            student_logits.detach(),
            target,
            temperature=1.0,
            ce_weight=self.ce_weight,
            kd_weight=0.0,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        loss = (terms.loss + kd_weight * kd).to(terms.ce.dtype)
        return LogitTerms(loss, terms.ce, kd.detach())

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta, "gamma": self.gamma, "tau": self.tau}


# -- options --------------------------------------------------------------------------------------


def _require_finite(value: float, name: str) -> None:
    require_number(value, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _require_positive(value: float, name: str) -> None:
    require_number(value, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
