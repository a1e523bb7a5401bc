"""KD++, DKD++, DIST++, ReviewKD++ and hard KD++: cross entropy, a distillation and the ND loss.

Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
(arXiv 2305.17007).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dnkd_ext._checks import (
    accumulate_dtype,
    product,
    require_flag,
    require_floating,
    require_integer,
    require_number,
    require_same_device,
    require_tensor,
    require_weight,
)
from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.dist_loss import dist_loss
from dnkd_ext.losses.dkd_loss import ce_dkd_loss
from dnkd_ext.losses.hcl_loss import hcl_loss
from dnkd_ext.losses.kd_loss import ce_kd_loss
from dnkd_ext.losses.nd_loss import add_nd_loss, class_means_table
from dnkd_ext.review import ReviewFusion, stage_channels

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = [
    "CriterionTerms",
    "DISTPlusPlus",
    "DKDPlusPlus",
    "HardKDPlusPlus",
    "KDPlusPlus",
    "ReviewKDPlusPlus",
]


class CriterionTerms(NamedTuple):
    """What a criterion returns: 0-dim tensors on the logits' device.

    Attributes:
        loss: ``ce_weight * ce + kd_weight * kd_ramp * kd + nd_weight * nd_ramp * nd``,
            differentiable.
        ce: the cross entropy without its weight, for logging; needs no gradient.
        kd: the distillation term (KD, DKD, DIST, ReviewKD's or the hard one) without its weight and
            ramp; needs no gradient.
        nd: the ND loss without its weight and ramp, needs no gradient; 0 where either is 0.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    nd: Tensor


class _PlusPlus(nn.Module):
    """What the criteria share: the weights, the cross entropy and the ND loss."""

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
        require_integer(ignore_index, "ignore_index")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        self.label_smoothing = label_smoothing
        self.ignore_index = int(ignore_index)
        self.eps = eps

    def _has_nd(self) -> bool:
        """Whether the ND loss takes part: a weight that is a tensor may change at any time."""
        return isinstance(self.nd_weight, Tensor) or self.nd_weight != 0

    def _begin(
        self,
        student_logits: Tensor,
        student_features: Tensor | None,
        kd_ramp: float | Tensor,
        nd_ramp: float | Tensor,
    ) -> tuple[float | Tensor, float | Tensor]:
        """Check what all criteria are given; the weights of the distillation and the ND loss."""
        if self._has_nd():
            self._check_features(student_logits, student_features)
        require_tensor(student_logits, "student_logits")
        for ramp, name in ((kd_ramp, "kd_ramp"), (nd_ramp, "nd_ramp")):
            require_weight(ramp, name, student_logits, "student_logits")
            if not isinstance(ramp, Tensor) and not torch.compiler.is_compiling():
                _require_finite(ramp, name)  # a traced float has no value to look at
        return (
            _ramped(self.kd_weight, kd_ramp, student_logits),
            _ramped(self.nd_weight, nd_ramp, student_logits),
        )

    def _cross_entropy(self, student_logits: Tensor, target: Tensor) -> LogitTerms:
        """The cross entropy with the target alone."""
        return _cross_entropy(
            student_logits, target, self.ce_weight, self.label_smoothing, self.ignore_index
        )

    def _with_cross_entropy(
        self, kd: Tensor, kd_weight: float | Tensor, student_logits: Tensor, target: Tensor
    ) -> LogitTerms:
        """A distillation that is no part of the fused operator, beside the cross entropy alone."""
        terms = self._cross_entropy(student_logits, target)
        loss = (terms.loss + kd_weight * kd).to(terms.ce.dtype)
        return LogitTerms(loss, terms.ce, kd.detach())

    def _with_nd(
        self,
        terms: LogitTerms,
        student_features: Tensor | None,
        target: Tensor,
        teacher_features: Tensor | None,
        teacher_norms: Tensor | None,
        nd_weight: float | Tensor,
    ) -> CriterionTerms:
        """The terms so far, and the ND loss where it takes part."""
        if not self._has_nd():
            return CriterionTerms(*terms, torch.zeros_like(terms.ce))
        assert student_features is not None
        assert self.class_means is not None
        # A weight of 0 may be a ramp's; the graph stays: gradients are 0, not None.
        loss, nd = add_nd_loss(
            terms.loss,
            student_features,
            target,
            self.class_means,
            teacher_features=teacher_features,
            teacher_norms=teacher_norms,
            ignore_index=self.ignore_index,
            loss_weight=nd_weight,
            eps=self.eps,
        )
        return CriterionTerms(loss, terms.ce, terms.kd, nd)

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


class _LogitPlusPlus(_PlusPlus):
    """The criteria that distil logits; a subclass adds the cross entropy and the distillation."""

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
        nd_ramp: float | Tensor = 1.0,
    ) -> CriterionTerms:
        """The weighted loss and its terms; see the class."""
        kd_weight, nd_weight = self._begin(student_logits, student_features, kd_ramp, nd_ramp)
        terms = self._logit_terms(student_logits, teacher_logits, target, kd_weight)
        return self._with_nd(
            terms, student_features, target, teacher_features, teacher_norms, nd_weight
        )


class KDPlusPlus(_LogitPlusPlus):
    r"""KD++: cross entropy, KD and the ND loss in one criterion.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, T^2\,
        \mathrm{KL}\bigl(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\bigr)
        + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

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
        teacher_features=None, teacher_norms=None, kd_ramp=1.0, nd_ramp=1.0)``

        - student_logits, teacher_logits: ``(..., C)``, float16, bfloat16, float32 or float64; the
          teacher's get no gradient.
        - student_features: ``(..., D)``, any of the four dtypes. Where the student's width is not
          that of the class means, :class:`dnkd_ext.FeatureProjector` projects them.
        - target: class indices ``(...)`` in int64 or int32, or class probabilities ``(..., C)`` of
          a floating dtype (mixup, cutmix), which cross entropy and ND loss take as they are.
        - teacher_features ``(..., D')``, or teacher_norms ``(...)``; without them the ND loss is
          direction-only.
        - kd_ramp: multiplies ``kd_weight``; the paper's is ``min(1, epoch / warm_up)`` with epochs
          counted from 0. A float, of which ``torch.compile`` compiles the first, 1 and all others
          once each (no scalar of NumPy, which it takes for an array), or a 0-dim tensor on the
          logits' device, which neither recompiles nor has to be captured again when it changes.
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
        _require_positive(temperature, "temperature")
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


class DKDPlusPlus(_LogitPlusPlus):
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
        _require_positive(temperature, "temperature")
        _require_finite(alpha, "alpha")
        _require_finite(beta, "beta")
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


class DISTPlusPlus(_LogitPlusPlus):
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


class ReviewKDPlusPlus(_PlusPlus):
    r"""ReviewKD++: cross entropy, ReviewKD with its fusion blocks, and the ND loss.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, \mathrm{HCL}(\mathrm{fused}(m_s), m_t)
        + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

    with the cross entropy of :func:`dnkd_ext.ce_kd_loss`, :func:`dnkd_ext.hcl_loss` and
    :func:`dnkd_ext.nd_loss`. With ``nd_weight=0`` it is plain ReviewKD.

    The fusion blocks (``criterion.fusion``, a :class:`dnkd_ext.review.ReviewFusion`) are trained
    with the student: give ``criterion.parameters()`` to the optimiser beside the student's, save
    ``criterion.state_dict()`` with it, and with several processes wrap the criterion in
    DistributedDataParallel, too. Every parameter gets a gradient in every step, zeros where
    ``kd_ramp`` is 0. After training they are thrown away.

    Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
    (arXiv 2305.17007); "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044).

    Args:
        class_means: see :class:`dnkd_ext.KDPlusPlus`, as for all that is not named here.
        student_channels: channels of the student's maps, one int per stage, the shallowest first
            and the embedding's width last. :meth:`from_models` reads them from models.
        teacher_channels: as many, of the teacher's maps.
        mid_channels: width in which the stages are fused. None is that of the CIFAR experiments,
            ``min(512, student_channels[-1])``; on ImageNet it is 512 for ResNet-18 and 256 for
            MobileNetV1, in detection 256.
        ce_weight: a finite float, or a 0-dim tensor, which becomes a buffer.
        kd_weight: as ``ce_weight``.
        nd_weight: as ``ce_weight``.
        label_smoothing: of the cross entropy, between 0 and 1.
        ignore_index: rows with this class index count in neither the cross entropy nor the ND loss;
            ReviewKD counts every sample.
        eps: of the ND loss.

    Shape:
        ``criterion(student_maps, teacher_maps, student_logits, student_features, target, *,
        teacher_features=None, teacher_norms=None, kd_ramp=1.0, nd_ramp=1.0)``

        - student_maps: one ``(N, C_i, H_i, W_i)`` per stage, the shallowest first; the embedding,
          ``(N, D)`` or ``(N, D, 1, 1)``, last. :func:`dnkd_ext.stage_maps` gives such a list. The
          dtype is that of the fusion blocks, or any of the four under ``torch.autocast``.
        - teacher_maps: as many ``(N, C'_i, H'_i, W'_i)`` of any of the four dtypes; they get no
          gradient. Sizes may differ from the student's, from stage to stage and from step to step:
          the fusion blocks give maps of the teacher's. The CIFAR experiments take them before the
          activation.
        - student_logits, student_features, target, teacher_features, teacher_norms, kd_ramp,
          nd_ramp: as in :class:`dnkd_ext.KDPlusPlus`.

        In training mode there must be two samples, or maps of more than one pixel, because the
        fusion blocks end in batch normalisation. Without any sample ReviewKD's term is 0.

    Returns:
        As :class:`dnkd_ext.KDPlusPlus`; ``kd`` is the hierarchical context loss.

    Raises:
        TypeError: an argument of a wrong dtype.
        ValueError: as :class:`dnkd_ext.KDPlusPlus`; maps of other channels, or of another number
            of stages or samples, than there should be; a single sample in training mode.
        RuntimeError: arguments on different devices.
        IndexError: a class index out of range; on CUDA see :func:`dnkd_ext.nd_loss`.

    Example:
        >>> criterion = ReviewKDPlusPlus(torch.randn(10, 64), [16, 32, 64], [32, 64, 64])
        >>> student_maps = [torch.randn(8, 16, 8, 8), torch.randn(8, 32, 4, 4), torch.randn(8, 64)]
        >>> teacher_maps = [torch.randn(8, 32, 8, 8), torch.randn(8, 64, 4, 4), torch.randn(8, 64)]
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> terms = criterion(student_maps, teacher_maps, logits, student_maps[-1],
        ...                   torch.arange(8), teacher_features=teacher_maps[-1])
        >>> terms.loss.backward()
    """

    def __init__(
        self,
        class_means: Tensor | ClassMeans | None,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        mid_channels: int | None = None,
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
        self.fusion = ReviewFusion(student_channels, teacher_channels, mid_channels)

    @classmethod
    def from_models(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        class_means: Tensor | ClassMeans | None,
        **options: Any,
    ) -> ReviewKDPlusPlus:
        """The criterion for two models, whose stages' channels it reads from them.

        Of the networks of :mod:`dnkd_ext.train.models` all stages, of timm's those from a quarter
        of the image's size on, as :func:`dnkd_ext.stage_maps` gives their maps. Sizes are read from
        the maps in every step. The fusion blocks are made on the CPU in float32.

        Args:
            student: the model that is trained.
            teacher: the model that it learns from.
            class_means: as of the class.
            options: all others of the class but the channels.

        Raises:
            ValueError: a model that does not tell its stages, as torchvision's: pass the lists of
                channels to the class; or models of different numbers of stages.
        """
        if class_means is not None:
            class_means = class_means_table(class_means, stacklevel=3)
        channels = stage_channels(student), stage_channels(teacher)
        if len(channels[0]) != len(channels[1]):
            raise ValueError(
                f"student and teacher must have equally many stages, but those of the student "
                f"({type(student).__name__}) have {channels[0]} channels and those of the teacher "
                f"({type(teacher).__name__}) {channels[1]}, embedding last; choose stages by hand "
                "and pass their student_channels= and teacher_channels= to the class"
            )
        return cls(class_means, *channels, **options)

    def forward(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        student_logits: Tensor,
        student_features: Tensor | None,
        target: Tensor,
        *,
        teacher_features: Tensor | None = None,
        teacher_norms: Tensor | None = None,
        kd_ramp: float | Tensor = 1.0,
        nd_ramp: float | Tensor = 1.0,
    ) -> CriterionTerms:
        """The weighted loss and its terms; see the class."""
        kd_weight, nd_weight = self._begin(student_logits, student_features, kd_ramp, nd_ramp)
        self.fusion.check(student_maps, teacher_maps)
        student_maps, teacher_maps = (
            [one if one.dim() == 4 else one[..., None, None] for one in maps]
            for maps in (student_maps, teacher_maps)
        )
        fused = self.fusion(student_maps, [one.shape[2:] for one in teacher_maps])
        kd = hcl_loss(fused, teacher_maps)
        terms = self._with_cross_entropy(kd, kd_weight, student_logits, target)
        return self._with_nd(
            terms, student_features, target, teacher_features, teacher_norms, nd_weight
        )

    def _options(self) -> dict[str, Any]:
        return {"mid_channels": self.fusion.mid_channels}


class HardKDPlusPlus(_PlusPlus):
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
            nor the ND loss; the hard distillation counts every row.
        eps: of the ND loss.

    Shape:
        ``criterion(student_logits, teacher_logits, student_features, target, *,
        distillation_logits=None, teacher_features=None, teacher_norms=None, kd_ramp=1.0,
        nd_ramp=1.0)``

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
        kd_ramp: float | Tensor = 1.0,
        nd_ramp: float | Tensor = 1.0,
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
        ce = self._cross_entropy(student_logits, target)
        largest, labels = teacher_logits.detach().max(-1)
        # The index alone would hide a teacher without a decision: 0, or NaN where a row has NaN
        # or infinity. In the weight, so that the gradient becomes NaN as well.
        doubt = (largest * 0).sum(dtype=accumulate_dtype(student_logits.dtype))
        # No label is negative, while ignore_index may be a class.
        kd = _cross_entropy(distillation_logits, labels, kd_weight + doubt, 0.0, -100)
        dtype = ce.ce.dtype
        terms = LogitTerms((ce.loss + kd.loss).to(dtype), ce.ce, (kd.ce + doubt).to(dtype))
        return self._with_nd(
            terms, student_features, target, teacher_features, teacher_norms, nd_weight
        )


# -- parts and options ----------------------------------------------------------------------------


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: float | Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> LogitTerms:
    """The fused operator with nothing but its cross entropy."""
    return ce_kd_loss(
        logits,
        logits.detach(),  # the KD from the student itself is 0
        target,
        temperature=1.0,
        ce_weight=weight,
        kd_weight=0.0,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def _ramped(weight: float | Tensor, ramp: float | Tensor, logits: Tensor) -> float | Tensor:
    if torch.compiler.is_compiling() and not isinstance(ramp, Tensor) and ramp != 1:
        # A float of an operator is a constant of the graph: each value of a ramp would be compiled,
        # and past torch's limit nothing any more. A product is not, whatever the number.
        ramp = ramp * logits.new_ones((), dtype=accumulate_dtype(logits.dtype))
    tensor, scale = product(weight, ramp)
    return scale if tensor is None else tensor * scale


def _require_finite(value: float, name: str) -> None:
    require_number(value, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _require_positive(value: float, name: str) -> None:
    require_number(value, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
