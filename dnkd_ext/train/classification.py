"""Classifiers, alone or learning from a teacher."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnkd_ext.adapters import distilled_features, features
from dnkd_ext.class_means import ClassMeans
from dnkd_ext.criteria import (
    DISTPlusPlus,
    DKDPlusPlus,
    HardKDPlusPlus,
    KDPlusPlus,
    ReviewKDPlusPlus,
)
from dnkd_ext.diagnostics import feature_diagnostics
from dnkd_ext.projector import FeatureProjector
from dnkd_ext.review import stage_channels, stage_maps
from dnkd_ext.train.class_names import check_classes, class_notes, classes_of_weights
from dnkd_ext.train.config import MethodOptions, TrainConfig
from dnkd_ext.train.models import create_model, load_weights, model_names
from dnkd_ext.train.models.weights import read_notes, read_weights
from dnkd_ext.train.presets import load_preset
from dnkd_ext.train.readers import DataError
from dnkd_ext.train.recompute import checkpoint_activations
from dnkd_ext.train.sources import Clean, Source
from dnkd_ext.train.task import Task, autocast
from dnkd_ext.train.world import OtherProcessFailed, World

__all__ = [
    "Classification",
    "Distillation",
    "Teacher",
    "build_model",
    "cast_once",
    "evaluate",
    "identity",
    "load_teacher",
    "try_out",
]

TERMS = ("loss", "ce", "kd", "nd", "top1")
# By which stage_maps runs a model, in place of its call.
STAGE_METHODS = ("forward_stages", "forward_intermediates")


# -- the step -------------------------------------------------------------------------------------


class RunningMeans(nn.Module):
    """Class means that follow the teacher while it runs, as a part of a step.

    What they hold lies in buffers: checkpoints have it, and a step that is compiled or recorded
    changes it in place.

    Args:
        means: with a momentum, on the step's device.
        process_group: processes whose batches count as one.
    """

    def __init__(self, means: ClassMeans, process_group: Any = None) -> None:
        super().__init__()
        self.means = means
        self.process_group = process_group
        averages, counts = means.tensors()
        self.register_buffer("averages", averages)
        self.register_buffer("counts", counts)

    def forward(self, features: Tensor, target: Tensor, table: Tensor) -> None:
        """Move the means by a batch, and write them to ``table``.

        A mixed image counts for the class with the larger share.
        """
        if target.dim() == 2:
            target = target.argmax(1)
        self.means.update(features.detach(), target, process_group=self.process_group)
        table.copy_(self.means.compute())


class Distillation(nn.Module):
    """A student with all that is trained beside it, from images to the terms of the loss.

    Args:
        student: the classifier to train.
        criterion: one of dnkd_ext's, or None for cross entropy alone.
        teacher: in evaluation mode, without gradients; no part of this module's state.
        projector: of the student's features, where the class means are of another width.
        method: as the configuration names it.
        label_smoothing: of the cross entropy alone; a criterion has its own.
        nd_ramp: let the ramp be that of the ND loss, too.
        running: class means that are the criterion's in every step, with the step's images in them.

    Shape:
        images (N, channels, H, W), target (N,) int64 or (N, classes) and ramp, 0-dim, to
        (loss, ce, kd, nd, top1): 0-dim, top1 in percent.
    """

    def __init__(
        self,
        student: nn.Module,
        criterion: nn.Module | None,
        teacher: nn.Module | None,
        projector: nn.Module | None,
        method: str,
        label_smoothing: float = 0.0,
        nd_ramp: bool = False,
        running: RunningMeans | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.projector = projector
        self.method = method
        self.label_smoothing = label_smoothing
        self.nd_ramp = nd_ramp
        self.running = running
        # In a tuple, so that neither state_dict nor train() nor DistributedDataParallel finds it.
        self._teacher = (teacher,)

    def forward(self, images: Tensor, target: Tensor, ramp: Tensor) -> tuple[Tensor, ...]:
        """The terms of a batch."""
        (teacher,) = self._teacher
        if self.criterion is None or teacher is None:
            logits = self.student(images)
            loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
            none = torch.zeros_like(loss)
            return loss, loss.detach(), none, none, _top1(logits, target)
        more: dict[str, Any] = {"nd_ramp": ramp} if self.nd_ramp else {}
        if self.method == "reviewkd":
            with torch.no_grad():
                # timm's models give their maps after the activation only.
                wanted, teacher_features, _ = stage_maps(
                    teacher, images, pre_activation=hasattr(teacher, "forward_stages")
                )
            maps, student_features, logits = stage_maps(self.student, images)
            compared = (maps, wanted, logits)
        else:
            with torch.no_grad():
                teacher_features, teacher_logits = features(teacher, images)
            if self.method == "hard_kd":
                student_features, logits, distilled = distilled_features(self.student, images)
                more["distillation_logits"] = distilled
            else:
                student_features, logits = features(self.student, images)
            compared = (logits, teacher_logits)
        if self.running is not None:
            self.running(teacher_features, target, self.criterion.class_means)
        if self.projector is not None:
            student_features = self.projector(student_features)
        terms = self.criterion(
            *compared,
            student_features,
            target,
            teacher_features=teacher_features,
            kd_ramp=ramp,
            **more,
        )
        return *terms, _top1(logits, target)


def _top1(logits: Tensor, target: Tensor) -> Tensor:
    if target.dim() == 2:
        target = target.argmax(1)  # of mixed images the class with the larger share
    return 100 * (logits.argmax(1) == target).float().mean()


# -- teacher --------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """A trained model, the digest of its weights, and the mean of its features per class.

    ``means_origin`` tells where the means come from: the digest of a file, or gathered here.
    """

    model: nn.Module
    digest: str
    class_means: ClassMeans | None
    means_origin: str = "gathered"


# What stands for timm's or torchvision's own weights in the place of a file.
PRETRAINED = "pretrained"


def build_model(
    name: str,
    num_classes: int,
    channels: int,
    *,
    pretrained: bool = False,
    drop_path: float = 0.0,
) -> nn.Module:
    """A model with fresh weights: one of ours by its name ``cifar_*``, or one of timm's.

    Raises:
        ValueError: no such model or tag, no published weights of it, or no stochastic depth in it.
        ModuleNotFoundError: the name is timm's, and timm is not installed.
    """
    if name in model_names() or name.startswith("cifar_"):
        if pretrained:
            raise ValueError(f"{name} has no weights to download; name a file of its weights")
        if drop_path:
            raise ValueError(f"--drop-path is for models that have it, {name} has not")
        return create_model(name, num_classes, channels)
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name!r} is none of {', '.join(model_names())}; for timm's models install timm"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"no model {name!r}, neither timm's nor one of {', '.join(model_names())}")
    plain, _, tag = name.partition(".")
    if tag and not timm.list_models(name, include_tags=True):
        known = [one.partition(".")[2] for one in timm.list_models(f"{plain}.*", include_tags=True)]
        raise ValueError(
            f"no weights {tag!r} of {plain}, as {name} asks for; timm has "
            f"{', '.join(known) or 'none'}"
        )
    options = {"num_classes": num_classes, "in_chans": channels}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if not pretrained:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                raise
            raise ValueError(f"--drop-path is for models that have it, {name} has not") from error
    try:
        model = timm.create_model(name, pretrained=True)
        own = getattr(model, "num_classes", None)
        if own != num_classes:
            raise ValueError(f"the pretrained {name} has {own} classes, the data {num_classes}")
        return model
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the pretrained weights of {name} cannot be had ({str(error).splitlines()[0]}); "
            "without a network, name a file of them"
        ) from error


def build_student(config: TrainConfig, source: Source) -> nn.Module:
    """The model to train, with fresh weights.

    Raises:
        ValueError: no such model, or one that does not fit the images or options.
        ModuleNotFoundError: the name is timm's, and timm is not installed.
    """
    options = config.model
    student = build_model(
        options.student, len(source.classes), source.channels, drop_path=options.drop_path
    )
    fit_image_size(student, source.image_size)
    return student


def weights_file(path: str) -> Path:
    """The file itself, or the best weights of a run's folder.

    Raises:
        FileNotFoundError: neither is there.
    """
    place = Path(path)
    if place.is_dir():
        place = place / "best.safetensors"
        if not place.is_file():
            raise FileNotFoundError(f"{path} is a folder without best.safetensors")
    if not place.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    return place


def weights_digest(path: Path) -> str:
    """By which weights are known again: of their names and values, in whatever file they are."""
    digest = hashlib.sha256()
    for name, value in sorted(read_weights(path).items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fit_image_size(model: nn.Module, size: int) -> None:
    """Prepare a transformer of timm's, made for images of one size, for those of another."""
    config = getattr(model, "pretrained_cfg", None) or {}
    own = config.get("input_size", (0, size, size))[1:]
    if config.get("fixed_input_size") and tuple(own) != (size, size):
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"{type(model).__name__} is for images of {own[0]} x {own[1]} pixels, got {size}"
            )
        model.set_input_size(img_size=(size, size))


def load_weights_for(model: nn.Module, path: Path, size: int) -> None:
    """Weights of the model as it is published, or as it was trained on images of this size.

    Raises:
        FileNotFoundError, ValueError: as of load_weights.
    """
    try:
        load_weights(model, path)
    except ValueError:
        before = {name: value.shape for name, value in model.state_dict().items()}
        fit_image_size(model, size)
        if {name: value.shape for name, value in model.state_dict().items()} == before:
            raise
        load_weights(model, path)
    else:
        fit_image_size(model, size)


def load_teacher(
    name: str,
    weights: str,
    source: Source,
    device: torch.device,
    *,
    channels_last: bool = False,
    any_classes: bool = False,
) -> Teacher:
    """A trained model in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: no weights.
        ValueError: no such model, weights of another one, or unless ``any_classes`` of other
            classes, where the file tells.
    """
    if weights == PRETRAINED:
        model = build_model(name, len(source.classes), source.channels, pretrained=True)
        fit_image_size(model, source.image_size)
        digest = PRETRAINED
    else:
        path = weights_file(weights)
        if not any_classes:
            check_classes(str(path), classes_of_weights(path), source.classes)
        model = build_model(name, len(source.classes), source.channels)
        load_weights_for(model, path, source.image_size)
        digest = weights_digest(path)
    model = model.eval().requires_grad_(False).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Teacher(model, digest, None)


def normalised_otherwise(
    name: str, weights: str, model: nn.Module, config: TrainConfig
) -> str | None:
    """How images were normalised for timm's own weights, where that is not the configuration's.

    Weights are timm's own as ``pretrained``, or in a file, not of a run of ours, for a name with a
    tag. None, too, where a preset gives this teacher images normalised so: it means to.
    """
    own = getattr(model, "pretrained_cfg", None) or {}
    if weights != PRETRAINED and ("." not in name or "model" in read_notes(weights_file(weights))):
        return None
    given = config.data.normalisation
    before = {key: tuple(own.get(key) or given[key]) for key in given}
    if before == given:
        return None
    if config.preset:
        preset = load_preset(config.preset).settings
        if name.partition(".")[0] == preset.get("teacher") and all(
            tuple(preset.get(key) or ()) == given[key] for key in given
        ):
            return None
    there, here = (
        " ".join(f"--{key} {' '.join(map(str, values[key]))}" for key in given)
        for values in (before, given)
    )
    return f"the weights of {name} are for images normalised by {there}, and this is with {here}"


def means_notes(name: str, digest: str, source: Source) -> dict[str, str]:
    """What a file of class means says about its origin, beside the classes."""
    return {
        "teacher": f"{name} {digest}",
        "dataset": f"{source.name}, {source.train_images} images",
    }


def feature_width(model: nn.Module) -> int | None:
    """Of the features of timm's models and ours; None for those that do not tell."""
    return getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)


def read_class_means(path: str, name: str, teacher: Teacher, source: Source) -> ClassMeans:
    """Class means from a file, of as many classes as the data have and of the teacher.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of other classes or another teacher.
    """
    model = teacher.model
    means = (ClassMeans.from_json if path.endswith(".json") else ClassMeans.load)(path)
    if means.num_classes != len(source.classes):
        raise ValueError(
            f"--class-means {path} has {means.num_classes} classes, but the data have "
            f"{len(source.classes)}"
        )
    width = feature_width(model)
    if width is not None and means.num_features != width:
        raise ValueError(
            f"--class-means {path} is {means.num_features} wide, but the teacher's features are "
            f"{width}: it is of another teacher"
        )
    for key, wanted in means_notes(name, teacher.digest, source).items():
        found = means.metadata.get(key)
        # Files that were not written by dnkd class-means say something else, or nothing.
        is_own = found is not None and (" images" in found or len(found.split()) == 2)
        if is_own and found != wanted and key == "teacher":
            raise ValueError(f"--class-means {path} is of {found}, but the teacher is {wanted}")
        if is_own and found != wanted:
            warnings.warn(f"--class-means {path} is of {found}, not {wanted}", stacklevel=2)
    return means


def seen_otherwise(path: str, means: ClassMeans, notes: dict[str, str]) -> str | None:
    """What the file of class means says about how images were seen that is not as in the notes.

    Options are named; None where none differs. Precision is a matter of rounding, and who the
    teacher is and on what data was looked at before.
    """
    before = [
        (f"--{key.replace('_', '-')}", _words(means.metadata[key]), _words(wanted))
        for key, wanted in notes.items()
        if key not in ("teacher", "dataset", "precision")
        and means.metadata.get(key, wanted) != wanted
    ]
    if not before:
        return None
    there = " ".join(f"{option} {found}" for option, found, _ in before)
    here = " ".join(f"{option} {wanted}" for option, _, wanted in before)
    return f"--class-means {path} were gathered with {there}, and this is with {here}"


def without_means(means: ClassMeans, classes: Sequence[str]) -> str | None:
    """Which classes have no mean, and what becomes of them; None where all have one."""
    missing = means.missing
    if not missing:
        return None
    names = ", ".join(repr(classes[label]) for label in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"{len(missing)} of {len(classes)} classes have no class mean ({names}{more}): the ND loss "
        "of their images is always 1, and has no gradient"
    )


def _words(noted: str) -> str:
    """A value as the command line has it, from its JSON."""
    try:
        value = json.loads(noted)
    except ValueError:
        return noted
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def means_digest(means: ClassMeans) -> str:
    """Of the table's values."""
    return hashlib.sha256(means.compute().numpy().tobytes()).hexdigest()[:16]


def identity(config: TrainConfig, source: Source, teacher: Teacher | None) -> dict[str, str]:
    """What a checkpoint must have been made with to be gone on from."""
    result = {"student": config.model.student, "data": source.fingerprint()}
    backbone = config.detection.backbone_weights
    if backbone is not None:
        result["backbone"] = backbone if backbone == PRETRAINED else weights_digest(Path(backbone))
    if teacher:
        result["teacher"] = f"{config.model.teacher} {teacher.digest}"
        if config.method.nd_weight:
            momentum = config.model.class_means_momentum
            origin = teacher.means_origin if momentum is None else f"running, momentum {momentum}"
            result["class_means"] = origin
    return result


# -- evaluation --------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """Accuracies in percent over the test images of all processes, and this process's features.

    ``count`` is how many images there were in all processes, but for those that could not be read.
    The features where they are wanted; ``target`` is -100 where a batch was filled up.
    """

    top1: float
    top5: float
    count: int
    features: Tensor | None = None
    target: Tensor | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Clean,
    classes: int,
    autocast: Any,
    world: World,
    *,
    keep: bool = False,
) -> Evaluated:
    """A model in evaluation mode over test images; its modes are restored. Collective.

    With ``keep`` the features of all images of this process stay on the device.

    The hits are counted on the device: torchmetrics, where some rows are to be left out, waits for
    it in every batch.

    Raises:
        DataError: not one of the images could be read.
        OtherProcessFailed: likewise; the first process tells it.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    taken, targets = [], []
    try:
        for images, target, mask in batches:
            with autocast:
                feature, logits = features(model, images)
            best = logits.topk(min(5, classes), dim=1).indices == target[:, None]
            hits = torch.stack([best[:, 0], best.any(1), torch.ones_like(mask)], 1)
            counts += (hits & mask[:, None]).sum(0)
            if keep:
                taken.append(feature.float())
                targets.append(target.where(mask, -100))
    finally:
        for module, mode in modes.items():
            module.training = mode
    top1, top5, count = world.sum(counts).tolist()
    if not count:
        failed = world.gather((batches.unreadable, batches.first_unreadable))
        if not world.is_first:
            raise OtherProcessFailed("nothing could be evaluated")
        total = sum(number for number, _ in failed)
        first = next((name for _, name in failed if name), "")
        raise DataError(
            f"nothing can be evaluated: none of the {total} images of {batches.place} could be "
            f"read; one is {first}"
        )
    kept = (torch.cat(taken), torch.cat(targets)) if keep else ()
    return Evaluated(round(100 * top1 / count, 4), round(100 * top5 / count, 4), count, *kept)


# -- the task -------------------------------------------------------------------------------------


def _criterion(
    options: MethodOptions,
    class_means: Tensor | None,
    student: nn.Module,
    teacher: nn.Module,
    world: World,
    label_smoothing: float,
) -> nn.Module:
    shared = {
        "ce_weight": options.ce_weight,
        "kd_weight": options.kd_weight,
        "nd_weight": options.nd_weight,
        "label_smoothing": label_smoothing,
    }
    makers: dict[str, Callable[[], nn.Module]] = {
        # Cross entropy and the ND loss without a distillation of logits.
        "ce": lambda: KDPlusPlus(class_means, **{**shared, "kd_weight": 0.0}),
        "kd": lambda: KDPlusPlus(
            class_means,
            **shared,
            temperature=options.temperature,
            logit_standardization=options.logit_standardization,
        ),
        "dkd": lambda: DKDPlusPlus(
            class_means,
            **shared,
            alpha=options.alpha,
            beta=options.beta,
            temperature=options.temperature,
            logit_standardization=options.logit_standardization,
        ),
        "dist": lambda: DISTPlusPlus(
            class_means,
            **shared,
            beta=options.beta,
            gamma=options.gamma,
            tau=options.temperature,
            process_group=torch.distributed.group.WORLD if world.size > 1 else None,
        ),
        "hard_kd": lambda: HardKDPlusPlus(class_means, **shared),
        "reviewkd": lambda: ReviewKDPlusPlus.from_models(
            student, teacher, class_means, **shared, mid_channels=options.mid_channels
        ),
    }
    return makers[options.method]()


def _running_means(
    config: TrainConfig, source: Source, teacher: Teacher, world: World
) -> RunningMeans:
    width = feature_width(teacher.model)
    if width is None:
        raise ValueError(
            f"--class-means-momentum is for teachers that tell the width of their features, "
            f"{config.model.teacher} does not"
        )
    means = ClassMeans(
        len(source.classes),
        width,
        momentum=config.model.class_means_momentum,
        device=world.device,
    )
    assert config.model.teacher is not None
    means.metadata = means_notes(config.model.teacher, teacher.digest, source)
    means.metadata |= class_notes(source.classes)
    return RunningMeans(means, torch.distributed.group.WORLD if world.size > 1 else None)


def cast_once(teacher: nn.Module) -> nn.Module:
    """A copy whose weights are what autocast would make of them in every step again.

    Normalisations keep theirs in float32, in which autocast uses them.
    """
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.to(torch.bfloat16)
    return teacher


def _check_stages(student: nn.Module, teacher: nn.Module, config: TrainConfig) -> None:
    """ValueError for models whose stages ReviewKD cannot compare."""
    pair = f"--student {config.model.student}", f"--teacher {config.model.teacher}"
    widths = []
    for model, option in zip((student, teacher), pair, strict=True):
        try:
            widths.append(stage_channels(model))
        except ValueError as error:
            raise ValueError(
                f"--method reviewkd compares the maps of stages, which {option} does not tell; "
                "another model is needed"
            ) from error
    if len(widths[0]) != len(widths[1]):
        raise ValueError(
            "--method reviewkd is not there for models of different numbers of stages: with the "
            f"embedding, {pair[0]} has maps of {widths[0]} channels and {pair[1]} of {widths[1]}"
        )


@torch.no_grad()
def try_out(model: nn.Module, option: str, config: TrainConfig, source: Source) -> None:
    """Run a model as training will, on two images of noise, in evaluation mode.

    Raises:
        ValueError: it cannot take images of this size, or gives no features or maps.
    """
    size = source.image_size
    # Of its own generator: what is drawn later does not depend on this.
    noise = torch.randn(2, source.channels, size, size, generator=torch.Generator().manual_seed(0))
    modes = {module: module.training for module in model.modules()}
    run = stage_maps if config.method.method == "reviewkd" else features
    try:
        run(model.eval(), noise.to(next(model.parameters()).device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        known = " (--image-size)" if config.data.task == "imagenet" else ""
        raise ValueError(
            f"{option} cannot be run on images of {size} x {size} pixels{known}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


class Classification(Task):
    """A student, its data and its teacher, as the engine trains them."""

    terms = TERMS
    methods = STAGE_METHODS
    metric = "test_top1"

    def __init__(
        self, config: TrainConfig, source: Source, teacher: Teacher | None, world: World
    ) -> None:
        self.world = world
        self.source = source
        run, device = config.run, world.device
        torch.manual_seed(run.seed)  # the same weights for every method, on every process
        student = build_student(config, source)
        if run.activation_checkpointing:
            checkpoint_activations(student, config.model.student)
        criterion = projector = guide = running = None
        mixes = config.data.task == "imagenet" and config.reader.mixes
        # Where images are mixed their targets are smoothed, which all terms of the loss read.
        smoothing = 0.0 if mixes else config.method.label_smoothing
        if config.needs_teacher:
            assert teacher is not None
            means = None if teacher.class_means is None else teacher.class_means.compute()
            if config.model.class_means_momentum is not None:
                running = _running_means(config, source, teacher, world)
                means = running.means.compute()
            if config.method.nd_weight:
                assert means is not None
                width = getattr(student, "head_hidden_size", None) or student.num_features
                if width != means.shape[1]:
                    projector = FeatureProjector(width, means.shape[1], config.model.dropout)
            criterion = _criterion(config.method, means, student, teacher.model, world, smoothing)
            guide = teacher.model
            if run.precision == "bfloat16" and not run.fsdp_teacher:
                guide = cast_once(guide)
        method = config.method
        self.step = Distillation(
            student, criterion, guide, projector, method.method, smoothing, method.nd_ramp, running
        ).to(device)
        if run.channels_last:
            self.step.to(memory_format=torch.channels_last)
        self.model = student
        self._train = source.train(config, world)
        self._test = source.test(config, world)
        self.steps_per_epoch = len(self._train)
        self.batch_size = config.optim.batch_size
        self.identity = identity(config, source, teacher)
        self._autocast = autocast(run, world)
        self._teacher = teacher
        self._teacher_norms: Tensor | None = None
        # Of the test images, in percent; None until feature_figures has looked at it.
        self.teacher_top1: float | None = None
        self._skips = config.data.task == "imagenet" and config.reader.on_error == "skip"
        self._counted = source.test_images

    @staticmethod
    def check(config: TrainConfig, source: Source, teacher: Teacher | None) -> None:
        """What would fail once training begins, told before.

        Raises:
            ValueError: no such student, stages that do not fit the teacher's, too large a batch.
            ModuleNotFoundError: the student is timm's, and timm is not installed.
        """
        if config.optim.batch_size > source.train_images:
            raise ValueError(
                f"--batch-size must be at most the {source.train_images} training images, got "
                f"{config.optim.batch_size}"
            )
        student = build_student(config, source)
        if config.run.activation_checkpointing:
            checkpoint_activations(student, config.model.student)
        if config.method.method == "reviewkd":
            assert teacher is not None
            _check_stages(student, teacher.model, config)
        try_out(student, f"--student {config.model.student}", config, source)
        if teacher is not None:
            try_out(teacher.model, f"--teacher {config.model.teacher}", config, source)

    @property
    def class_means(self) -> Tensor | None:
        """Those of the criterion, (classes, features)."""
        return None if self.step.criterion is None else self.step.criterion.class_means

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Cut, mirrored and normalised images, and their classes."""
        before = self.unreadable if start else 0
        for batch in self._train.epoch(epoch, start):
            self.unreadable = before + self._train.unreadable
            yield batch

    def counts(self) -> dict[str, int]:
        """Where unreadable images are skipped, how many were in the epoch and in the evaluation."""
        if not self._skips:
            return {}
        count = torch.tensor(self.unreadable, device=self.world.device)
        return {
            "train_unreadable": int(self.world.sum(count)),
            "test_unreadable": self.source.test_images - self._counted,
        }

    @property
    def evaluated(self) -> tuple[nn.Module, ...]:
        """The student, and its projector."""
        return self.model, *filter(None, [self.step.projector])

    def evaluate(self, model: nn.Module, projector: nn.Module | None = None) -> dict[str, float]:
        """Accuracies, and where there are class means the features' norms and directions."""
        classes = len(self.source.classes)
        keeps = self.class_means is not None
        result = evaluate(model, self._test, classes, self._autocast, self.world, keep=keeps)
        self._counted = result.count
        figures = {"test_top1": result.top1, "test_top5": result.top5}
        if self.class_means is None:
            return figures
        assert self._teacher is not None
        if self._teacher_norms is None:
            of_teacher = evaluate(
                self._teacher.model, self._test, classes, self._autocast, self.world, keep=True
            )
            self._teacher_norms = of_teacher.features.norm(dim=1)
        return {**figures, **self._diagnostics(result, projector)}

    @staticmethod
    @torch.no_grad()
    def _projected(student: Tensor, projector: nn.Module | None) -> Tensor:
        """The student's features as the loss sees them."""
        if projector is None:
            return student
        was_training = projector.training
        projector.eval()
        try:
            dtype = next(projector.parameters()).dtype  # the evaluation gives float32
            return projector(student.to(dtype)).float()
        finally:
            projector.train(was_training)

    @torch.no_grad()
    def _diagnostics(self, result: Evaluated, projector: nn.Module | None) -> dict[str, float]:
        assert self._teacher_norms is not None
        student, means = self._projected(result.features, projector), self.class_means
        if student.shape[1] != means.shape[1]:
            return {}  # the widths differ, and nothing projects one to the other
        own = feature_diagnostics(student, result.target, means, teacher_norms=self._teacher_norms)
        counted = result.target != -100
        # Means over this process's images become sums, those of all processes means again.
        count = counted.sum()
        norms = self._teacher_norms[counted].sum()
        sums = torch.stack(
            [own.norm_ratio * norms, norms, own.cosine * count, own.reached * count, count]
        ).double()
        if not count:
            sums = torch.zeros_like(sums)
        student_norm, teacher_norm, cosine, reached, total = self.world.sum(sums).tolist()
        return {
            "norm_ratio": student_norm / teacher_norm,
            "cosine": cosine / total,
            "reached": reached / total,
        }

    def feature_figures(
        self, model: nn.Module, projector: nn.Module | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Norms, and cosines to the class means, of the test images' features, by model.

        Of the teacher, and of the student or its average. Empty without class means. Of this
        process's images only.
        """
        means = self.class_means
        if means is None:
            return {}, {}
        assert self._teacher is not None
        norms, cosines = {}, {}
        for name, network in (("teacher", self._teacher.model), ("student", model)):
            classes = len(self.source.classes)
            result = evaluate(network, self._test, classes, self._autocast, self.world, keep=True)
            own = result.features
            if name == "teacher":
                self.teacher_top1 = result.top1
            else:
                own = self._projected(own, projector)
            kept = result.target != -100
            norms[name] = own[kept].norm(dim=1).cpu().numpy()
            if own.shape[1] == means.shape[1]:
                cosine = F.cosine_similarity(own[kept], means[result.target[kept]], dim=1)
                cosines[name] = cosine.cpu().numpy()
        return norms, cosines
