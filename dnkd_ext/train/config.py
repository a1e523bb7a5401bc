"""What a training run is told: typed, with every field an option of the command line.

The fields are grouped for reading alone; their names are unique, so that options, recipes and files
are flat.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from torch import nn

from dnkd_ext.criteria import (
    DISTPlusPlus,
    DKDPlusPlus,
    HardKDPlusPlus,
    KDPlusPlus,
    ReviewKDPlusPlus,
)
from dnkd_ext.train.data.reader_options import ReaderOptions
from dnkd_ext.train.options import (
    Traits,
    above,
    at_least,
    between,
    check_ranges,
    converted,
    flag,
    in_words,
    option,
    traits_of,
)

__all__ = [
    "METHODS",
    "DataOptions",
    "DetectionOptions",
    "Method",
    "MethodOptions",
    "ModelOptions",
    "OptimOptions",
    "RunOptions",
    "TrainConfig",
    "flatten",
    "methods_with",
    "replace",
]


# Mean and standard deviation of every channel, by task: of CIFAR-100 and of ImageNet.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION = {
    "cifar": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": _IMAGENET,
    "detection": _IMAGENET,
}


class Method(NamedTuple):
    """What is distilled beside the features, and by what.

    Attributes:
        criterion: its class, which is made with the weights and these options (DIST: the
            temperature as tau).
        options: fields of :class:`MethodOptions`, apart from weights and ramps.
        compares_maps: the criterion compares maps of stages in place of logits.
        in_detection: whether it is there for detectors.
    """

    criterion: type[nn.Module]
    options: tuple[str, ...] = ()
    compares_maps: bool = False
    in_detection: bool = True


METHODS = {
    # Cross entropy and the ND loss, without a distillation of logits.
    "ce": Method(KDPlusPlus),
    "kd": Method(KDPlusPlus, ("temperature", "logit_standardization")),
    "dkd": Method(DKDPlusPlus, ("alpha", "beta", "temperature", "logit_standardization")),
    "dist": Method(DISTPlusPlus, ("beta", "gamma", "temperature"), in_detection=False),
    "reviewkd": Method(ReviewKDPlusPlus, ("mid_channels",), compares_maps=True),
    "hard_kd": Method(HardKDPlusPlus, in_detection=False),
}


@dataclass(frozen=True)
class DataOptions:
    """Images and what is done to them."""

    task: Literal["cifar", "imagenet", "detection"] = "cifar"
    """cifar: small images that are held in memory; imagenet: images that are read from disk while
    training (the reader options are theirs; --limit, --cache, --pad and --flip, where a command has
    them, are not); detection: boxes in images of COCO's format (the detection options are theirs,
    and of the reader's --workers)."""
    data: str = option("", free=True)
    """Folder of the data set: train/CLASS/* and test or val; for cifar also CIFAR-100 as
    torchvision unpacks it, for imagenet also tar archives and WebDataset shards. For detection
    train2017/*, val2017/* and annotations/instances_train2017.json, instances_val2017.json."""
    limit: int | None = option(None, at_least(1), tasks=("cifar", "detection"))
    """Use at most this many training images, as many of every class, and a third as many test
    images of every class, but one at least; for detection evenly spread over all."""
    cache: str | None = option(None, tasks=("cifar",), free=True)
    """Safetensors file in which decoded images are kept for the next run."""
    pad: int = option(4, at_least(0), tasks=("cifar",))
    """Black border, in pixels, from which training images are cut at random."""
    flip: bool = option(True, tasks=("cifar", "detection"))
    """Mirror every second training image."""
    mean: tuple[float, ...] | None = None
    """Mean of every channel, of pixels in [0, 1]; by default that of ImageNet, or with cifar that
    of CIFAR-100."""
    std: tuple[float, ...] | None = None
    """Standard deviation of every channel; likewise."""
    any_classes: bool = option(False, free=True)
    """Take weights and class means that were made with classes of other names, or in another order,
    than the data's, as their labels are."""

    @property
    def normalisation(self) -> dict[str, tuple[float, ...]]:
        """Mean and std as they are used."""
        mean, std = NORMALISATION[self.task]
        return {
            "mean": mean if self.mean is None else self.mean,
            "std": std if self.std is None else self.std,
        }


@dataclass(frozen=True)
class ModelOptions:
    """Student and teacher."""

    student: str = "cifar_resnet20"
    """Model to train: a cifar_* name, or any name that timm knows; for detection
    fasterrcnn_resnet18, _resnet50, _resnet101 or _mobilenet_v2."""
    teacher: str | None = None
    """Model to learn from, likewise; none for cross entropy alone."""
    teacher_weights: str | None = option(None, free=True)
    """File of the teacher's weights (safetensors or PyTorch), the folder of the run that trained
    it, whose best weights are taken, or pretrained: timm's own, for detection torchvision's."""
    class_means: str | None = option(None, free=True)
    """File of the teacher's class means (dnkd class-means, or the authors' JSON); without one they
    are gathered first and kept in the run's folder."""
    class_means_momentum: float | None = option(None, between(0, 1, open_low=True, open_high=True))
    """Let class means be a moving average of the features that the teacher has while training, with
    this share of the old mean in every step, instead of gathering them in a pass of their own; a
    mixed image counts for the class with the larger share, and with --accumulate every part moves
    them. All processes have the same."""
    teacher_outputs: str | None = option(None, free=True)
    """Safetensors file of the teacher's logits, and norms of its features, for every place of the
    crop in every training image, mirrored and not: steps look them up instead of running the
    teacher. Where there is none it is made first, by one process, which takes the teacher as long
    as 162 epochs with --pad 4 and --flip, and is kept for other runs of the same --precision. Of
    CIFAR-100 1.7 GB in bfloat16 and 3.3 GB in float32, on a GPU in the memory of every process. For
    --task cifar, and methods that compare logits."""
    dropout: float = option(0.5, between(0, 1))
    """Of the projector, which is there where student and class means differ in width."""
    drop_path: float = option(0.0, between(0, 1))
    """Rate of stochastic depth in the student, for models of timm that have it."""
    zero_init_last: bool = True
    """Let the student's residual blocks begin as identities where timm does so (its ResNets): the
    last BatchNorm of each has a weight of 0 at first, otherwise of 1 as in torchvision."""


@dataclass(frozen=True)
class MethodOptions:
    """The loss: ce_weight CE + ramp kd_weight (KD | DKD | DIST | ReviewKD | hard KD) + nd_weight
    ND. The ramp is that of --kd-warm-up; with --nd-ramp it is ND's, too.

    In detection all of the detector's own losses stand in the place of CE, and a sample is a
    proposal.
    """

    method: Literal[tuple(METHODS)] = "ce"
    """What is distilled beside the features; ce: nothing; hard_kd: the class that the teacher
    finds, by cross entropy, on the distillation token where the student has one. The ++ of a method
    is its nd_weight."""
    ce_weight: float = option(1.0, at_least(0))
    """Weight of the cross entropy."""
    kd_weight: float = option(1.0, at_least(0))
    """Weight of the distillation."""
    nd_weight: float = option(0.0, at_least(0))
    """Weight of the norm-and-direction loss; 0 leaves it out."""
    kd_warm_up: int = option(0, at_least(0))
    """Epochs over which the weight of the distillation grows from 0."""
    nd_ramp: bool = False
    """Let the weight of the norm-and-direction loss grow likewise."""
    temperature: float = option(4.0, above(0))
    """Of KD, DKD and DIST, whose criterion in the library has 1 by default."""
    alpha: float = option(1.0, at_least(0))
    """DKD: weight of the target class's part."""
    beta: float = option(1.0, at_least(0))
    """DKD: weight of the other classes' part, which in the library is 8 by default; presets set
    theirs. DIST: weight of the correlation over classes."""
    gamma: float = option(1.0, at_least(0))
    """DIST: weight of the correlation over samples."""
    mid_channels: int | None = option(None, at_least(1), strict=True)
    """ReviewKD: width of what its fusion blocks carry; by default that of the student's last stage,
    at most 512; 256 for detection."""
    label_smoothing: float = option(0.0, between(0, 1))
    """Of the cross entropy."""
    logit_standardization: bool = option(False, strict=True)
    """KD and DKD: standardise each row of logits before the temperature."""

    @property
    def kind(self) -> Method:
        """What the method is."""
        return METHODS[self.method]

    def of_criterion(self) -> dict[str, Any]:
        """The weights and options that the method's criterion is made with."""
        names = ("ce_weight", "kd_weight", "nd_weight", *self.kind.options)
        given = {name: getattr(self, name) for name in names}
        return {**given, "kd_weight": 0.0} if self.method == "ce" else given


@dataclass(frozen=True)
class OptimOptions:
    """Optimiser and schedule."""

    epochs: int = option(240, at_least(1))
    """How long to train."""
    batch_size: int = option(128, at_least(1))
    """Images per step, of all processes together."""
    accumulate: int = option(1, at_least(1))
    """Parts in which a process takes its share of a batch one after another; BatchNorm, and DIST's
    correlation over samples, see a part at a time."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Which optimiser."""
    lr: float = option(0.1, above(0))
    """Highest learning rate, not scaled by anything."""
    momentum: float = option(0.9, between(0, 1, open_high=True))
    """Of SGD."""
    nesterov: bool = True
    """SGD: Nesterov's form of the momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = option(5e-4, at_least(0))
    """Of all parameters that are decayed."""
    decay_vectors: bool = True
    """Decay biases and other parameters of one dimension, too, and what timm's models name in
    no_weight_decay(): tokens and position embeddings."""
    clip_grad: float | None = option(None, above(0))
    """Largest norm of all gradients together."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """How the learning rate falls: at the milestones, or along a half cosine, every step."""
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs at which the learning rate is multiplied by --lr-decay."""
    lr_decay: float = option(0.1, above(0))
    """Factor of the learning rate at each of --milestones."""
    lr_warm_up: float = option(0.0, at_least(0))
    """Epochs over which the learning rate grows to --lr, every step; may be a part of one."""
    lr_start: float = option(0.0, at_least(0))
    """Learning rate at the start of the warm-up."""
    lr_end: float = option(0.0, at_least(0))
    """Learning rate at the end of the cosine."""
    cosine_after_warm_up: bool = False
    """Let the cosine begin where the warm-up ends; otherwise it spans all epochs, and the warm-up
    takes the place of its beginning."""
    ema_decay: float | None = option(None, between(0, 1, open_high=True))
    """Keep an exponential moving average of the weights with this decay per step, and evaluate it,
    too."""


@dataclass(frozen=True)
class RunOptions:
    """How it is run."""

    seed: int = option(0, at_least(0))
    """Of weights, order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", free=True)
    """Where; auto: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: autocast, the weights stay float32; auto: that on a GPU which has it. float32: on a
    GPU convolutions use TF32, as is PyTorch's default."""
    channels_last: bool = option(True, free=True)
    """Memory format of images and weights; faster on CPUs, too."""
    compile: bool = option(False, free=True)
    """torch.compile of teacher, student and loss; dropout draws other random numbers then."""
    cuda_graph: bool = option(False, free=True)
    """Record the step (teacher, student, loss, optimiser) after three, and replay it."""
    fsdp: bool = option(False, free=True)
    """Several processes share parameters, gradients and optimiser state of what is trained (FSDP2)
    instead of having copies; torch.compile is then that of the student's blocks."""
    fsdp_teacher: bool = option(False, free=True)
    """With --fsdp: the teacher's parameters are shared, too."""
    activation_checkpointing: bool = option(False, free=True)
    """Compute the student's activations again in the backward pass instead of keeping them, for
    models of timm that know how to."""
    deterministic: bool = option(False, free=True)
    """Only deterministic kernels on a GPU, so that a run can be repeated exactly."""
    eval_batch_size: int | None = option(None, at_least(1), free=True)
    """Images per step of the evaluation, of all processes together; made a multiple of these. By
    default 500, and 2000 for --task cifar on a GPU."""
    checkpoint_every: int | None = option(None, at_least(1), free=True)
    """Epochs between checkpoints, by default 1, and 10 for --task cifar on a GPU, whose epochs are
    short; the last epoch always has one."""
    checkpoint_minutes: float = option(30.0, at_least(0), free=True)
    """Minutes after which a checkpoint is written within an epoch, where the loss is looked at; 0:
    never."""
    log_every: int = option(50, at_least(1), free=True)
    """Steps between looks at the loss, which wait for the device."""
    tensorboard: bool = option(True, free=True)
    """Write TensorBoard's files, too."""
    wandb: bool = option(False, free=True)
    """Log every epoch to Weights & Biases, too; WANDB_PROJECT and its other environment variables
    say where."""
    progress: bool = option(True, free=True)
    """Show a progress bar."""


@dataclass(frozen=True)
class DetectionOptions:
    """Detectors and their data."""

    TASKS = ("detection",)

    train_set: str = "train2017"
    """Folder of the training images in the data's; annotations/instances_NAME.json beside it."""
    val_set: str = "val2017"
    """Likewise of the images of the evaluation."""
    backbone_weights: str | None = option(None, free=True)
    """ImageNet weights with which the student's backbone begins: a file by torchvision's names, or
    pretrained for those that torchvision downloads. Its batch normalisation is frozen then."""
    trainable_layers: int = option(3, between(0, 5))
    """How many of the backbone's five parts (stem and four stages), from the last, are trained;
    all of them without --backbone-weights."""
    min_size: tuple[int, ...] = (800,)
    """Length to which the shorter side of an image is resized; of several one is drawn for every
    training image, and the last is for evaluation."""
    max_size: int = 1333
    """Longest side of a resized image, which overrules --min-size."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side of the anchors of the feature pyramid's five levels, in pixels."""
    rpn_proposals: int = option(1000, at_least(1))
    """Proposals of every training image from which are sampled those the box head sees."""
    proposals: int = option(512, at_least(1))
    """Sampled proposals of every image, at most a quarter of them on objects."""
    epoch_steps: int | None = option(None, at_least(1))
    """Steps that are called an epoch: evaluations, checkpoints, milestones and epochs count in
    these; by default a pass over the training images."""
    detect_batch_size: int = option(8, at_least(1), free=True)
    """Images per step of evaluation and of class means, of all processes together; made a multiple
    of these."""

    def check(self) -> None:
        """ValueError for sizes that do not fit, naming the option."""
        sizes = self.min_size
        if not sizes or min(sizes) < 1 or self.max_size < max(sizes):
            raise ValueError(
                f"--min-size must be sizes from 1 to --max-size {self.max_size}, got {sizes}"
            )
        if len(self.anchor_sizes) != 5 or min(self.anchor_sizes) < 1:
            raise ValueError(
                f"--anchor-sizes must be five sizes from 1 on, got {self.anchor_sizes}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    preset: str = ""
    """Where the numbers come from; see dnkd presets."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)
    reader: ReaderOptions = field(default_factory=ReaderOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)

    def check(self, world_size: int = 1) -> None:
        """ValueError for values out of range or at odds with each other, naming the option."""
        self.check_data()
        if self.run.seed >= 2**63:
            raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {self.run.seed}")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"--betas must be in [0, 1), got {self.optim.betas}")
        if self.optim.lr_warm_up >= self.optim.epochs and self.optim.lr_warm_up > 0:
            raise ValueError(
                f"--lr-warm-up must be below --epochs {self.optim.epochs}, got "
                f"{self.optim.lr_warm_up}"
            )
        if self.optim.cosine_after_warm_up and self.optim.schedule != "cosine":
            raise ValueError(
                f"--cosine-after-warm-up wants --schedule cosine, got {self.optim.schedule}"
            )
        is_sgd = self.optim.optimizer == "sgd"
        if is_sgd and self.optim.nesterov and self.optim.momentum == 0:
            raise ValueError("--nesterov wants a --momentum greater than 0, got 0")
        steps = self.optim.milestones
        if list(steps) != sorted(set(steps)) or any(step < 1 for step in steps):
            raise ValueError(f"--milestones must be growing epochs from 1 on, got {steps}")
        share = world_size * self.optim.accumulate
        if self.optim.batch_size % share:
            raise ValueError(
                f"--batch-size must be a multiple of {world_size} processes times --accumulate "
                f"{self.optim.accumulate}, got {self.optim.batch_size}"
            )
        if self.reader.mixes and self.optim.batch_size // world_size % 2:
            raise ValueError(
                "--batch-size must give every process an even number of images to mix by --mixup "
                f"and --cutmix, got {self.optim.batch_size} for {world_size} processes"
            )
        if self.run.fsdp and world_size == 1:
            raise ValueError("--fsdp is for several processes, started by torchrun; got one")
        if self.run.fsdp and self.run.cuda_graph:
            raise ValueError("--cuda-graph cannot record the messages of --fsdp; pass one of them")
        if self.run.activation_checkpointing:
            for name in ("compile", "cuda_graph"):
                if getattr(self.run, name):
                    raise ValueError(
                        f"{flag(name)} cannot follow what --activation-checkpointing computes "
                        "again; pass one of them"
                    )
        if self.run.fsdp_teacher and not self.run.fsdp:
            raise ValueError("--fsdp-teacher goes with --fsdp only")
        if self.run.fsdp_teacher and not self.needs_teacher:
            raise ValueError("--fsdp-teacher, but --method ce with --nd-weight 0 has no teacher")
        self._check_class_means()
        self._check_teacher_outputs()
        if self.data.task == "detection":
            self._check_detection()
        if self.needs_teacher:
            if self.model.teacher is None:
                raise ValueError(
                    f"--method {self.method.method} with --nd-weight {self.method.nd_weight:g} "
                    "needs a --teacher, got none"
                )
            if self.model.teacher_weights is None:
                raise ValueError(
                    f"--teacher-weights must name the trained weights of {self.model.teacher}, or "
                    "the folder of the run that trained it; got nothing"
                )
        elif self.model.teacher is not None:
            raise ValueError(
                f"--teacher {self.model.teacher} has no part in --method ce with --nd-weight 0; "
                "name a --method"
            )
        elif not self.preset:  # of several presets they are for those with a teacher
            for name in ("teacher_weights", "class_means", "teacher_outputs"):
                if getattr(self.model, name) is not None:
                    raise ValueError(
                        f"{flag(name)} has no part in --method ce with --nd-weight 0, which "
                        "has no teacher; name a --teacher and a --method"
                    )

    def _check_class_means(self) -> None:
        """The moving average, and what it does not go with."""
        momentum = self.model.class_means_momentum
        if momentum is None:
            return
        if self.model.class_means is not None:
            raise ValueError(
                "--class-means are read and --class-means-momentum gathers them while training; "
                "pass one of them"
            )
        if not self.method.nd_weight:
            raise ValueError("--class-means-momentum has no part in --nd-weight 0")
        if self.data.task == "detection":
            raise ValueError("--class-means-momentum is not there for --task detection")

    def _check_teacher_outputs(self) -> None:
        """What they do not go with."""
        if self.model.teacher_outputs is None:
            return
        if self.data.task != "cifar":
            raise ValueError(
                "--teacher-outputs are of images in memory, those of --task cifar, got --task "
                f"{self.data.task}"
            )
        if self.method.kind.compares_maps:
            raise ValueError(
                f"--teacher-outputs are logits, and --method {self.method.method} compares maps"
            )
        if self.model.class_means_momentum is not None:
            raise ValueError(
                "--class-means-momentum follows the features of a teacher that is run, and "
                "--teacher-outputs are looked up; pass one of them"
            )

    def _check_detection(self) -> None:
        """What detection has no part in."""
        if not self.method.kind.in_detection:
            raise ValueError(f"--method {self.method.method} has no part in --task detection")
        if self.method.label_smoothing:
            raise ValueError("--label-smoothing has no part in --task detection")
        ours = (
            (self.model, "zero_init_last"),
            (self.model, "drop_path"),
            (self.model, "dropout"),
            (self.method, "gamma"),
        )
        for group, name in ours:
            value = getattr(group, name)
            if value != getattr(type(group)(), name):
                raise ValueError(f"{flag(name)} has no part in --task detection, got {value:g}")
        for name in ("fsdp", "activation_checkpointing"):
            if getattr(self.run, name):
                raise ValueError(f"{flag(name)} is not there for --task detection")
        for name in ("compile", "cuda_graph"):
            if getattr(self.run, name):
                raise ValueError(
                    f"{flag(name)} is for batches of one shape, and those of --task detection "
                    "have many"
                )

    def check_data(self) -> None:
        """What is wrong with the data's options alone, and with numbers of any."""
        task = self.data.task
        for group in (self.data, self.reader, self.detection):
            for name, value in vars(group).items():
                tasks = TRAITS[name].tasks or getattr(group, "TASKS", None) or (task,)
                if task not in tasks and value != getattr(type(group)(), name):
                    raise ValueError(
                        f"{flag(name)} is for --task {' and '.join(tasks)}, got {value}"
                    )
        for name in GROUPS:
            check_ranges(getattr(self, name))
        for name, values in self.data.normalisation.items():
            if not all(map(math.isfinite, values)):
                raise ValueError(f"--{name} must be finite numbers, got {values}")
        if min(self.data.normalisation["std"], default=0) <= 0:
            raise ValueError(f"--std must be positive numbers, got {self.data.std}")
        if task == "detection":
            self.detection.check()
        elif task == "imagenet":
            self.reader.check()
        if not self.data.data:
            raise ValueError("--data must name the folder of the data set, got nothing")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at a teacher."""
        return self.method.method != "ce" or self.method.nd_weight != 0

    @property
    def looks_up_teacher(self) -> bool:
        """Whether what the teacher gives is looked up in a file."""
        return self.needs_teacher and self.model.teacher_outputs is not None


# The groups of options by name; the type and the traits of every option, of --preset too.
GROUPS: dict[str, type] = get_type_hints(TrainConfig)
KINDS: dict[str, Any] = {"preset": GROUPS.pop("preset")}
TRAITS = {"preset": Traits()}
for _group in GROUPS.values():
    KINDS |= get_type_hints(_group)
    TRAITS |= traits_of(_group)
# Options in which a run may differ from the one that it goes on with. What paths name is compared
# by digest, or by what the file says of itself. Two do change something: --workers, which divide
# shards among them (a resumed run is warned), and --compile, whose dropout draws other numbers
# (its help says so).
FREE = frozenset(name for name, traits in TRAITS.items() if traits.free)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All fields of all groups by their name; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {"preset": config.preset}
    for group in GROUPS:
        for name, value in dataclasses.asdict(getattr(config, group)).items():
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def unused(config: TrainConfig) -> dict[str, Any]:
    """The options that the configuration's method has no use for, as they are without them."""
    own = config.method.kind.options
    return {
        name: getattr(MethodOptions(), name)
        for name, traits in traits_of(MethodOptions).items()
        if traits.strict and name not in own
    }


def methods_with(name: str) -> list[str]:
    """The methods whose criterion is made with an option."""
    return [method for method, kind in METHODS.items() if name in kind.options]


def replace(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """The configuration with some fields, by their flat names, set to other values.

    Raises:
        ValueError: a name that does not exist, or a value of another type.
    """
    settings = dict(settings)
    preset = _typed("preset", settings.pop("preset", config.preset))
    groups = {}
    for group in GROUPS:
        options = getattr(config, group)
        changes = {name: settings.pop(name) for name in vars(options) if name in settings}
        groups[group] = dataclasses.replace(
            options, **{name: _typed(name, value) for name, value in changes.items()}
        )
    if settings:
        raise ValueError(f"no such option of a training run: {', '.join(sorted(settings))}")
    return TrainConfig(preset, **groups)


def _typed(name: str, value: Any) -> Any:
    """The value as the option's type has it."""
    if value is None and type(None) in get_args(KINDS[name]):
        return None
    found = converted(KINDS[name], value)
    if found is None:
        raise ValueError(f"{name} must be {in_words(KINDS[name])}, got {value!r}")
    return found
