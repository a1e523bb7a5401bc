"""ReviewKD++: cross entropy, ReviewKD and the ND loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dnkd_ext.criteria._base import CriterionTerms, PlusPlus
from dnkd_ext.losses.hcl_loss import hcl_loss
from dnkd_ext.losses.nd_loss import class_means_table
from dnkd_ext.review import ReviewFusion, stage_channels

if TYPE_CHECKING:
    from dnkd_ext.class_means import ClassMeans

__all__ = ["ReviewKDPlusPlus"]


class ReviewKDPlusPlus(PlusPlus):
    r"""ReviewKD++: cross entropy, ReviewKD with its fusion blocks, and the ND loss.

    .. math::
        w_{ce}\,\mathrm{CE}(z_s, y) + w_{kd}\, r\, \mathrm{HCL}(\mathrm{fused}(m_s), m_t)
        + w_{nd}\, r'\, \mathrm{ND}(f_s, y)

    with the cross entropy of :func:`dnkd_ext.ce_kd_loss`, :func:`dnkd_ext.hcl_loss` and
    :func:`dnkd_ext.nd_loss`. With ``nd_weight=0`` it is plain ReviewKD.

    The fusion blocks (``criterion.fusion``, a :class:`dnkd_ext.review.ReviewFusion`) are trained
    with the student: give ``criterion.parameters()`` to the optimiser beside the student's, and
    save ``criterion.state_dict()`` with it. With several processes wrap one module in
    DistributedDataParallel whose ``forward`` runs :func:`dnkd_ext.stage_maps` of the student and
    then the criterion: gradients of its own forward pass alone are exchanged, not those of what is
    called as its ``module``. Every parameter gets a gradient in every step, zeros where
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
            ReviewKD counts every sample. Their logits must be finite, else the loss is NaN.
        eps: of the ND loss.

    Shape:
        ``criterion(student_maps, teacher_maps, student_logits, student_features, target, *,
        teacher_features=None, teacher_norms=None, kd_ramp=None, nd_ramp=None)``

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
            weight = options.get("nd_weight", 1.0)
            class_means = class_means_table(
                class_means,
                stacklevel=3,
                warns_of_missing=isinstance(weight, Tensor) or weight != 0,
            )
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
        kd_ramp: float | Tensor | None = None,
        nd_ramp: float | Tensor | None = None,
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
