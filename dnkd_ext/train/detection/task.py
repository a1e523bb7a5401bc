"""Detectors, alone or learning from a teacher, as the engine trains them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN

from dnkd_ext._modes import evaluating
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.train.class_names import check_classes, classes_of_weights
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.detection.data import (
    BoxSplit,
    DetectionSource,
    TestBatches,
    TrainBatches,
    read_test_split,
)
from dnkd_ext.train.detection.distillation import TERMS, DetectorDistillation, make_criterion
from dnkd_ext.train.detection.evaluation import (
    Detection,
    coco_figures,
    detect,
    ground_truth,
    write_detections,
)
from dnkd_ext.train.detection.models import FEATURES, create_detector, load_detector
from dnkd_ext.train.files import BEST, CONFIG, DETECTIONS, LAST, checked_config
from dnkd_ext.train.gather import gather_means
from dnkd_ext.train.networks import PRETRAINED, find_weights, weights_file
from dnkd_ext.train.options import flag
from dnkd_ext.train.task import Task, autocast
from dnkd_ext.train.teacher import Teacher, identity, read_class_means
from dnkd_ext.train.world import World

__all__ = [
    "DetectionTask",
    "check_settings",
    "gather_class_means",
    "gathering_notes",
    "load_teacher",
    "read_means",
    "run_evaluation",
]


def load_teacher(
    name: str, weights: str, source: DetectionSource | BoxSplit, config: TrainConfig, world: World
) -> Teacher:
    """A trained detector in evaluation mode, without gradients, on the device.

    Raises:
        FileNotFoundError: no weights.
        ValueError: no such detector, weights of another one or of another number of classes, or
            unless ``any_classes`` of other classes, where the file tells.
    """
    path = weights if weights == PRETRAINED else str(weights_file(weights, world))
    if weights != PRETRAINED and not config.data.any_classes:
        check_classes(path, classes_of_weights(Path(path)), source.classes)
    model, digest = load_detector(name, path, config, source.classes, source.category_ids)
    model.to(world.device)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)
    return Teacher(model, digest, None)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The options by which a detector sees images and boxes."""
    options = config.detection
    return {
        "anchor_sizes": options.anchor_sizes,
        "max_size": options.max_size,
        "min_size": options.min_size[-1],
        **config.data.normalisation,
    }


def check_settings(weights: str, config: TrainConfig) -> None:
    """ValueError where ``weights`` are of a run that trained its detector otherwise.

    That is the run's folder, or one of the two files of weights that are in it.
    """
    path = Path(weights)
    is_folder = path.is_dir()
    if not is_folder and path.name not in (BEST, LAST):
        return
    path = (path if is_folder else path.parent) / CONFIG
    if not path.is_file():
        return
    try:
        run = checked_config(path)
    except ValueError:
        if not is_folder:
            return  # another program's, which says nothing of the weights beside it
        raise
    if run.data.task != "detection":
        raise ValueError(f"{weights} is a run of --task {run.data.task}, not of detection")
    given = _settings(config)
    for name, value in _settings(run).items():
        if value != given[name]:
            option = flag(name)
            raise ValueError(
                f"{weights} is a run with {option} {_words(value)}, got {_words(given[name])}; "
                f"pass {option} {_words(value)}, or weights that were trained with the other"
            )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


NO_TRUTH = "so that the average precision is 0, whatever is found"


def _warn_without_boxes(split: BoxSplit, told: str) -> None:
    """A warning where none of the images has a box."""
    if not len(split.labels):
        left_out = f" ({split.dropped.sum()} without area)" if split.dropped.any() else ""
        warnings.warn(
            f"{split.annotations} has no box{left_out} in the {len(split)} images that are read, "
            f"{told}",
            stacklevel=3,
        )


def gathering_notes(config: TrainConfig) -> dict[str, str]:
    """What a file of class means says about how they were gathered."""
    options = config.detection
    seen = {
        "precision": config.run.precision,
        **_settings(config),
        "rpn_proposals": options.rpn_proposals,
        "proposals": options.proposals,
    }
    return {name: json.dumps(value) for name, value in seen.items()}


# What class means say whose background was moved to the first row.
BACKGROUND_FIRST = {"background": "first"}


def read_means(path: str, name: str, teacher: Teacher, source: DetectionSource) -> ClassMeans:
    """Class means from a file, the background's in row 0.

    In the authors' JSON files the background is the last class, as in Detectron2; its row is moved,
    and the means' metadata say so, by which a run's file of them is known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of other classes or another teacher, or was made of a JSON file
            with its rows as they are.
    """
    means = read_class_means(path, name, teacher, source)
    if path.endswith(".json"):
        state = means.state_dict()
        moved = {"table": state["table"].roll(1, 0), "metadata": means.metadata | BACKGROUND_FIRST}
        means.load_state_dict(state | moved)
    elif (
        means.counts is None
        and means.metadata.get("source", "").endswith(".json")
        and not BACKGROUND_FIRST.items() <= means.metadata.items()
    ):
        raise ValueError(
            f"--class-means {path} was made of {means.metadata['source']}, which has the background"
            " last, and does not say that it is in the first row here; pass the JSON file"
        )
    return means


@torch.no_grad()
def gather_class_means(
    model: FasterRCNN,
    source: DetectionSource,
    config: TrainConfig,
    world: World,
    *,
    metadata: dict[str, str] | None = None,
    path: Path | None = None,
    resume: bool = False,
) -> ClassMeans:
    """Mean box features of every class and of the background, over sampled proposals.

    The training images as they are, at the size of the evaluation; of each the teacher's own
    proposals with the boxes of the annotations among them, sampled as in training. What is drawn
    depends on the seed and the image alone. The detector's modes are restored. Collective; goes on
    after a stop as :func:`dnkd_ext.train.gather.gather_means` says.
    """
    batches = TestBatches(source.train_split, config, world)
    devices = [world.device] if world.device.type == "cuda" else []
    precision = autocast(config.run, world)

    def look(batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        images, targets, numbers = batch
        with precision:
            seeds = [(config.run.seed, number) for number in numbers]
            return sampled_features(model, images, targets, seeds)

    with evaluating(model), torch.random.fork_rng(devices):
        # As many proposals as in training; its head has nothing that behaves otherwise then.
        model.rpn.train()
        return gather_means(
            batches,
            look,
            source,
            config,
            world,
            metadata=metadata,
            path=path,
            resume=resume,
            width=FEATURES,
        )


def sampled_features(
    model: FasterRCNN,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    seeds: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Box features (R, 1024) of sampled proposals and their labels (R,), with a seed per image.

    The detector is in evaluation mode, its ``rpn`` in training mode.
    """
    resized, scaled = model.transform(images, targets)
    maps = model.backbone(resized.tensors)
    proposals, _ = model.rpn(resized, maps, scaled)
    chosen: list[Tensor] = []
    labels: list[Tensor] = []
    for seed, own, target in zip(seeds, proposals, scaled, strict=True):
        state = np.random.SeedSequence([*seed, 3]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> np.uint64(1)))
        taken, _, label, _ = model.roi_heads.select_training_samples([own], [target])
        chosen += taken
        labels += label
    pooled = model.roi_heads.box_roi_pool(maps, chosen, resized.image_sizes)
    return model.roi_heads.box_head(pooled), torch.cat(labels)


def run_evaluation(
    model: str, weights: str, config: TrainConfig, world: World, detections: Path | None
) -> dict[str, float | int | str]:
    """COCO's figures of trained weights over the test images, in percent; writes the detections.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_teacher` and :func:`read_test_split`.
    """
    with world.together():
        check_settings(weights, config)
        split = read_test_split(config)
        network = load_teacher(model, weights, split, config, world).model
        # Now, lest its errors come when all is detected.
        truth = None
        if world.is_first:
            _warn_without_boxes(split, NO_TRUTH)
            truth = ground_truth(split)
            if detections is not None:
                detections.parent.mkdir(parents=True, exist_ok=True)
    found = detect(
        network,
        TestBatches(split, config, world),
        autocast(config.run, world),
        world,
        progress=config.run.progress,
    )
    figures: dict[str, float] = {}
    with world.first_alone():
        if world.is_first:
            figures = coco_figures(truth, found, split.image_ids.tolist())
            if detections is not None:
                write_detections(detections, found)
    return {
        "model": model,
        "weights": weights if weights == PRETRAINED else str(find_weights(weights)),
        "test_images": len(split),
        "detections": len(found),
        **{f"test_{name}": value for name, value in figures.items()},
    }


class DetectionTask(Task):
    """A student, its data and its teacher."""

    terms = TERMS
    metric = "test_ap"

    def __init__(
        self, config: TrainConfig, source: DetectionSource, teacher: Teacher | None, world: World
    ) -> None:
        self.world = world
        self.source = source
        run, device = config.run, world.device
        torch.manual_seed(run.seed)  # the same weights for every method, on every process
        student = create_detector(
            config.model.student,
            len(source.classes),
            config,
            backbone_weights=config.detection.backbone_weights,
        )
        criterion = None
        if config.needs_teacher:
            assert teacher is not None
            means = None if teacher.class_means is None else teacher.class_means.compute()
            criterion = make_criterion(config.method, means if config.method.nd_weight else None)
        self.step = DetectorDistillation(
            student,
            criterion,
            teacher.model if teacher else None,
            config.method.method,
            config.method.ce_weight,
            nd_ramp=config.method.nd_ramp,
        ).to(device)
        if run.channels_last:
            self.step.to(memory_format=torch.channels_last)
        self.model = student
        self._train = TrainBatches(source.train_split, config, world)
        self._test = TestBatches(source.test_split, config, world)
        self.steps_per_epoch = len(self._train)
        self.batch_size = config.optim.batch_size
        self.identity = identity(config, source, teacher)
        self._autocast = autocast(run, world)
        self._truth: Any = None
        with world.first_alone():
            if world.is_first:
                _warn_without_boxes(source.train_split, "so that all of them train as background")
                _warn_without_boxes(source.test_split, NO_TRUTH)
                self._truth = ground_truth(source.test_split)
        # Of the latest evaluation, on the first process.
        self._found: list[Detection] | None = None

    @staticmethod
    def check(config: TrainConfig, source: DetectionSource, teacher: Teacher | None) -> None:
        """What would fail once training begins, told before.

        Raises:
            ValueError: no such student, no or other weights of its backbone, too large a batch, or
                a teacher that was trained with other settings.
            FileNotFoundError: no such file of weights.
            ModuleNotFoundError: pycocotools is not installed.
        """
        import importlib.util

        if importlib.util.find_spec("pycocotools") is None:
            raise ModuleNotFoundError(
                "the evaluation of detectors needs pycocotools; install it with pip install "
                "'dnkd_ext[detect]'"
            )
        if config.optim.batch_size > source.train_images:
            raise ValueError(
                f"--batch-size must be at most the {source.train_images} training images, got "
                f"{config.optim.batch_size}"
            )
        if teacher is not None and config.model.teacher_weights is not None:
            check_settings(config.model.teacher_weights, config)
        create_detector(
            config.model.student,
            len(source.classes),
            config,
            backbone_weights=config.detection.backbone_weights,
        )

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Any, ...]]:
        """Lists of images and targets."""
        return self._train.epoch(epoch, start)

    def split(self, batch: tuple[Any, ...], parts: int) -> list[tuple[Any, ...]]:
        """Whole images in equal parts."""
        size = len(batch[0]) // parts
        return [tuple(values[i * size : (i + 1) * size] for values in batch) for i in range(parts)]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """COCO's figures in percent."""
        found = detect(model, self._test, self._autocast, self.world)
        figures: dict[str, float] = {}
        with self.world.first_alone():
            if self.world.is_first:
                ids = self.source.test_split.image_ids.tolist()
                figures = coco_figures(self._truth, found, ids)
                self._found = found
        figures = self.world.from_first(figures)
        return {f"test_{name}": value for name, value in figures.items()}

    def finish(self, out: Path, judged: tuple[nn.Module, ...], title: str) -> dict[str, Any]:
        """Write the detections of the last evaluation; where there was none, of ``judged``."""
        if self.world.any(self.world.is_first and self._found is None):
            self.evaluate(*judged)
        with self.world.first_alone():
            if self.world.is_first:
                assert self._found is not None
                write_detections(out / DETECTIONS, self._found)
        return {}
