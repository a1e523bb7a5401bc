"""What the criteria share: weights and ramps, the cross entropy, and the ND loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from dnkd_ext._checks import (
    accumulate_dtype,
    product,
    require_finite,
    require_floating,
    require_integer,
    require_number,
    require_tensor,
    require_weight,
)
from dnkd_ext._export import exportable
from dnkd_ext.losses._logits import LogitTerms
from dnkd_ext.losses.dkd_loss import ce_dkd_loss
from dnkd_ext.losses.kd_loss import ce_kd_loss
from dnkd_ext.losses.nd_loss import add_nd_loss, class_means_table

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["CriterionTerms", "LogitPlusPlus", "PlusPlus", "cross_entropy"]


@exportable
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


class PlusPlus(nn.Module):
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
                with torch.inference_mode(False):  # else it could never be filled anew
                    self.register_buffer(name, weight.detach().clone())
            else:
                require_finite(weight, name)
                setattr(self, name, float(weight))
        if class_means is not None:
            class_means = class_means_table(
                class_means, stacklevel=4, warns_of_missing=self._has_nd()
            )
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
        kd_ramp: float | Tensor | None,
        nd_ramp: float | Tensor | None,
    ) -> tuple[float | Tensor, float | Tensor]:
        """Check what all criteria are given; the weights of the distillation and the ND loss."""
        if self._has_nd():
            self._check_features(student_logits, student_features)
        require_tensor(student_logits, "student_logits")
        for ramp, name in ((kd_ramp, "kd_ramp"), (nd_ramp, "nd_ramp")):
            if ramp is None:
                continue
            require_weight(ramp, name, student_logits, "student_logits")
            if not isinstance(ramp, Tensor) and not torch.compiler.is_compiling():
                require_finite(ramp, name)  # a traced float has no value to look at
        return (
            _ramped(self.kd_weight, kd_ramp, student_logits),
            _ramped(self.nd_weight, nd_ramp, student_logits),
        )

    def _cross_entropy(self, student_logits: Tensor, target: Tensor) -> LogitTerms:
        """The cross entropy with the target alone."""
        return cross_entropy(
            student_logits, target, self.ce_weight, self.label_smoothing, self.ignore_index
        )

    def _with_cross_entropy(
        self, kd: Tensor, kd_weight: float | Tensor, student_logits: Tensor, target: Tensor
    ) -> LogitTerms:
        """A distillation that is no part of the fused operator, beside the cross entropy alone."""
        require_weight(kd_weight, "kd_weight", student_logits, "student_logits")
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
        if student_features.dim() == student_logits.dim() + 2:
            raise ValueError(
                "student_features must be one vector per row of student_logits, as the "
                f"classifier reads them, got maps of shape {list(student_features.shape)}; "
                "pool them over height and width first"
            )
        if student_features.dim() >= 1 and student_features.shape[-1] != width:
            own = student_features.shape[-1]
            if own == classes and student_logits.shape[-1:] == (width,):
                raise ValueError(
                    f"class_means is {classes} classes by {width} features but student_logits is "
                    f"{width} wide and student_features {own} wide: the two seem to be swapped"
                )
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


class LogitPlusPlus(PlusPlus):
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
        kd_ramp: float | Tensor | None = None,
        nd_ramp: float | Tensor | None = None,
    ) -> CriterionTerms:
        """The weighted loss and its terms; see the class."""
        kd_weight, nd_weight = self._begin(student_logits, student_features, kd_ramp, nd_ramp)
        require_student(student_logits, teacher_logits)
        terms = self._logit_terms(student_logits, teacher_logits, target, kd_weight)
        return self._with_nd(
            terms, student_features, target, teacher_features, teacher_norms, nd_weight
        )


def require_student(student_logits: Tensor, teacher_logits: object) -> None:
    """ValueError where it is the teacher's logits alone that a gradient could reach.

    While a graph is compiled or transformed, and in forward mode, tensors do not tell.
    """
    if (
        isinstance(teacher_logits, Tensor)
        and teacher_logits.requires_grad
        and not student_logits.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    ):
        raise ValueError(
            "teacher_logits needs a gradient but student_logits needs none: the two seem to be "
            "swapped (the teacher gets no gradient: detach its logits where that is meant)"
        )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: float | Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> LogitTerms:
    """The fused operator with nothing but its cross entropy."""
    require_tensor(target, "target")
    # The KD from the student itself is 0, and DKD does not look at ignored rows, which KD counts.
    can_ignore = not target.dtype.is_floating_point and logits.shape[-1] > 1
    loss = ce_dkd_loss if can_ignore else ce_kd_loss
    return loss(
        logits,
        logits.detach(),
        target,
        temperature=1.0,
        ce_weight=weight,
        kd_weight=0.0,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def _ramped(weight: float | Tensor, ramp: float | Tensor | None, logits: Tensor) -> float | Tensor:
    if ramp is None:
        ramp = 1.0
    elif torch.compiler.is_compiling() and not isinstance(ramp, Tensor):
        # A float of an operator is a constant of the graph: each value of a ramp would be compiled,
        # and past torch's limit nothing any more. A product is not, whatever the number; but a
        # number that is compared with 1 here is one that every later graph is compiled for anew.
        ramp = ramp * logits.new_ones((), dtype=accumulate_dtype(logits.dtype))
    tensor, scale = product(weight, ramp, of=logits)
    return scale if tensor is None else tensor * scale
