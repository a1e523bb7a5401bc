"""Faster R-CNN with FPN of torchvision on four backbones, and their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models as classifiers
from torchvision.models import detection as detectors
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor

from dnkd_ext.train.config import NORMALISATION, DetectionOptions, TrainConfig
from dnkd_ext.train.detection.heads import DistillingRoIHeads
from dnkd_ext.train.models import load_weights
from dnkd_ext.train.networks import PRETRAINED, weights_digest

__all__ = ["FEATURES", "NAMES", "create_detector", "load_detector"]

PREFIX = "fasterrcnn_"
NAMES = tuple(
    f"{PREFIX}{backbone}" for backbone in ("resnet18", "resnet50", "resnet101", "mobilenet_v2")
)
# Width of the box head's output, as torchvision makes it.
FEATURES = 1024
# The blocks of MobileNetV2 that end a stage, their channels, and where the five parts begin that
# trainable_layers counts: stem, C2, C3, C4, C5.
MOBILENET_STAGES = {3: 24, 6: 32, 13: 96, 17: 320}
MOBILENET_PARTS = (0, 2, 4, 7, 14)
COUNTER = "num_batches_tracked"
CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
COCO = detectors.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
# How the SHA-256 of their file begins, which is in its name.
COCO_DIGEST = "258fb6c6"


class FrozenNorm(nn.BatchNorm2d):
    """Batch normalisation by its running statistics, none of it trained.

    torchvision's FrozenBatchNorm2d computes the same; under autocast it gives float32 maps, where
    this one stays in bfloat16.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, momentum=0.0)  # by which World sees that they never change
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenNorm:
        """Stays in evaluation mode."""
        return super().train(False)


def create_detector(
    name: str, num_classes: int, config: TrainConfig, *, backbone_weights: str | None = None
) -> FasterRCNN:
    """A detector with fresh weights, apart from its backbone where weights for that are named.

    With ``backbone_weights`` batch normalisation is frozen and of the backbone's five parts (stem
    and four stages) the last ``trainable_layers`` are trained; without, everything is.

    Args:
        name: one of :data:`NAMES`.
        num_classes: background included, which is class 0.
        config: its groups ``data`` (mean and std) and ``detection``.
        backbone_weights: a file of a classifier's weights by torchvision's names, or
            ``"pretrained"`` for those that torchvision downloads.

    Returns:
        torchvision's ``FasterRCNN`` whose ``roi_heads`` are :class:`DistillingRoIHeads`;
        ``num_features`` is the width of its box features.

    Raises:
        ValueError: no such detector, weights of another backbone, or none to be had.
        FileNotFoundError: no such file.
    """
    if name not in NAMES:
        raise ValueError(f"no detector {name!r}, there are {', '.join(NAMES)}")
    options = config.detection
    trained = options.trainable_layers if backbone_weights else 5
    norm = FrozenNorm if backbone_weights else nn.BatchNorm2d
    backbone = _backbone(name.removeprefix(PREFIX), norm, trained)
    if backbone_weights is not None:
        _load_backbone(backbone.body, name.removeprefix(PREFIX), backbone_weights)
    model = FasterRCNN(
        backbone,
        num_classes,
        min_size=list(options.min_size),
        max_size=options.max_size,
        image_mean=list(config.data.normalisation["mean"]),
        image_std=list(config.data.normalisation["std"]),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in options.anchor_sizes),
            ((0.5, 1.0, 2.0),) * len(options.anchor_sizes),
        ),
        rpn_post_nms_top_n_train=options.rpn_proposals,
        box_batch_size_per_image=options.proposals,
    )
    DistillingRoIHeads.put_into(model)
    model.rpn.anchor_generator.register_forward_pre_hook(_shapes_in_float32)
    model.rpn.head.register_forward_hook(_in_float32)
    model.roi_heads.box_predictor.__class__ = Float32Predictor
    model.num_features = FEATURES
    return model


# torchvision makes anchors in the dtype of the maps, and decodes boxes in that of the offsets; but
# bfloat16 has only every fourth or eighth pixel of a large image.


def _shapes_in_float32(module: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, ...]:
    """Placeholders of the maps, of which the anchor generator reads dtype and shape alone."""
    images, maps = inputs
    return images, [torch.empty((), device=one.device).expand(one.shape[-2:]) for one in maps]


def _in_float32(
    module: nn.Module, inputs: Any, output: tuple[list[Tensor], ...]
) -> tuple[list[Tensor], ...]:
    """Scores and offsets of the region proposal network in float32 under autocast."""
    narrow = (torch.bfloat16, torch.float16)
    return tuple(
        [one.float() if one.dtype in narrow else one for one in values] for values in output
    )


class Float32Predictor(FastRCNNPredictor):
    """torchvision's box predictor, in its weights' float32 under autocast, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As torchvision's."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.cls_score.weight.dtype))


def _backbone(name: str, norm: Callable[[int], nn.Module], trained: int) -> BackboneWithFPN:
    if name != "mobilenet_v2":
        return resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=norm, trainable_layers=trained
        )
    body = classifiers.mobilenet_v2(weights=None, norm_layer=norm).features
    first = (*MOBILENET_PARTS, len(body))[5 - trained]
    for block in body[:first]:
        block.requires_grad_(False)
    # torchvision's own extractor takes the first block of a stage, and 1280 channels at the end.
    return BackboneWithFPN(
        body,
        {str(block): str(level) for level, block in enumerate(MOBILENET_STAGES)},
        list(MOBILENET_STAGES.values()),
        256,
    )


# -- weights --------------------------------------------------------------------------------------


def _download(weights: object, what: str) -> dict[str, Tensor]:
    """A state dictionary of torchvision's hub."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True)  # type: ignore[attr-defined]
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"the pretrained weights of {what} cannot be had ({str(error).splitlines()[0]}); "
            "without a network, name a file of them"
        ) from error


def _counted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with batch normalisation's counters, which frozen ones do not keep."""
    wanted = model.state_dict()
    return state | {
        name: value
        for name, value in wanted.items()
        if name.endswith(COUNTER) and name not in state
    }


def _load_backbone(body: nn.Module, name: str, weights: str) -> None:
    def adapt(state: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = body.state_dict()
        own = {key.removeprefix("features."): value for key, value in state.items()}
        # The classifier, and what comes behind the last stage, has no part in a detector.
        return _counted({key: value for key, value in own.items() if key in wanted}, body)

    if weights == PRETRAINED:
        chosen = classifiers.get_model_weights(name)["IMAGENET1K_V1"]
        body.load_state_dict(adapt(_download(chosen, name)))
    else:
        load_weights(body, weights, adapt=adapt)


def load_detector(
    name: str,
    weights: str,
    config: TrainConfig,
    classes: Sequence[str],
    category_ids: Sequence[int],
) -> tuple[FasterRCNN, str]:
    """A trained detector in evaluation mode, without gradients, and the digest of its weights.

    Args:
        name: one of :data:`NAMES`.
        weights: a file, whose classes are those of the data, or the 91 that torchvision's have, by
            COCO's category ids and names; or ``"pretrained"``, which torchvision has of resnet50.
        config: its groups ``data`` and ``detection``.
        classes: names, the background first.
        category_ids: of the other classes, in their order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such detector, weights of another one or of other classes, or torchvision's
            with other anchors, or another mean or std, than they were trained with.
    """
    model = create_detector(name, len(classes), config)

    def adapt(state: dict[str, Tensor]) -> dict[str, Tensor]:
        # As torchvision's first files name the region proposal network's convolution.
        state = {
            key.replace("rpn.head.conv.", "rpn.head.conv.0.0.")
            if key.startswith(("rpn.head.conv.weight", "rpn.head.conv.bias"))
            else key: value
            for key, value in state.items()
        }
        return _counted(_of_categories(state, classes, category_ids), model)

    if weights == PRETRAINED:
        if name != "fasterrcnn_resnet50":
            raise ValueError(f"torchvision has no weights of {name} to download; name a file")
        _check_torchvisions(weights, config)
        model.load_state_dict(adapt(_download(COCO, name)))
        digest, is_torchvisions = PRETRAINED, True
    else:
        path = Path(weights)
        load_weights(model, path, adapt=adapt)
        digest = weights_digest(path)
        file = hashlib.sha256(path.read_bytes()).hexdigest()
        is_torchvisions = file.startswith(COCO_DIGEST)
        if is_torchvisions:
            _check_torchvisions(weights, config)
    if is_torchvisions:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0  # as those weights were trained
    return model.eval().requires_grad_(False), digest


def _check_torchvisions(weights: str, config: TrainConfig) -> None:
    """ValueError where torchvision's weights would see images or anchors that are not theirs."""
    wanted: dict[str, Sequence[float]] = {"anchor-sizes": DetectionOptions().anchor_sizes}
    wanted["mean"], wanted["std"] = NORMALISATION["detection"]
    given = {"anchor-sizes": config.detection.anchor_sizes, **config.data.normalisation}
    for option, values in wanted.items():
        if tuple(given[option]) != tuple(values):
            raise ValueError(
                f"{weights}: torchvision's weights are for --{option} {_words(values)}, got "
                f"{_words(given[option])}"
            )


def _words(values: Sequence[float]) -> str:
    return " ".join(map(str, values))


def _of_categories(
    state: dict[str, Tensor], classes: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Tensor]:
    """The state with a box predictor of as many classes as the data have."""
    found = state.get(CLASSIFIER)
    if found is None or len(found) == len(classes):
        return state
    told = (
        f"the detector was trained for {len(found) - 1} classes and the background, but the data "
        f"have {len(classes) - 1}"
    )
    known = COCO.meta["categories"]
    if len(found) != len(known):
        raise ValueError(told)
    names = dict(enumerate(known))
    for number, name in zip(category_ids, classes[1:], strict=True):
        if names.get(number) != name:
            raise ValueError(
                f"{told}; these are not COCO's, whose category {number} is "
                f"{names.get(number)!r}, not {name!r}"
            )
    rows = torch.tensor([0, *category_ids])
    boxes = (4 * rows[:, None] + torch.arange(4)).flatten()
    chosen = {"cls_score": rows, "bbox_pred": boxes}
    return {
        key: value[chosen[key.split(".")[-2]]]
        if key.startswith("roi_heads.box_predictor.")
        else value
        for key, value in state.items()
    }
