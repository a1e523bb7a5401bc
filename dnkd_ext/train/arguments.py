"""Options of the training commands, from dataclasses by tyro; help and types come from those.

What the commands do is imported when their options have been read: timm and the rest take longer
than torch, for which nobody who asks for help, or mistypes, should wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from dnkd_ext.train.config import (
    GROUPS,
    DataOptions,
    DetectionOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReaderOptions,
    RunOptions,
    TrainConfig,
    methods_with,
    replace,
    unused,
)
from dnkd_ext.train.files import CONFIG, checked_config
from dnkd_ext.train.options import flag
from dnkd_ext.train.presets import describe, expand, format_presets, load_preset, preset_names
from dnkd_ext.train.signals import Interrupted
from dnkd_ext.train.world import SPEAKS, World, join_world, told_once

__all__ = ["COMMANDS"]

T = TypeVar("T")


def _only(kind: type, *names: str) -> Any:
    """A group with these options alone; the others keep their defaults."""
    hints = get_type_hints(kind)
    others = [
        (
            one.name,
            tyro.conf.Fixed[hints[one.name]],
            dataclasses.field(default=one.default, metadata=one.metadata),
        )
        for one in dataclasses.fields(kind)
        if one.name not in names
    ]
    return dataclasses.make_dataclass(kind.__name__, others, bases=(kind,), frozen=True)


# What a pass over images as they are goes by.
SeenData = _only(DataOptions, "task", "data", "limit", "cache", "mean", "std", "any_classes")
_RUN = ("device", "precision", "channels_last", "eval_batch_size", "progress")
SeenRun = _only(RunOptions, *_RUN)
# Sums of features depend on the order of what is added.
SummedRun = _only(RunOptions, *_RUN, "deterministic")
_READER = (
    *("reader", "train_split", "val_split", "class_map", "num_classes", "image_size"),
    *("crop_pct", "interpolation", "workers", "on_error"),
)
SeenReader = _only(ReaderOptions, *_READER)
EvaluatedReader = _only(ReaderOptions, *(name for name in _READER if name != "train_split"))
_DETECTED = ("train_set", "val_set", "min_size", "max_size", "anchor_sizes", "detect_batch_size")
SeenDetection = _only(DetectionOptions, *_DETECTED)
# Class means are those of sampled proposals.
SampledDetection = _only(DetectionOptions, *_DETECTED, "rpn_proposals", "proposals")


@dataclass
class Train:
    """Train a model, alone or from a teacher, and keep log, checkpoints, weights and plots.

    A preset gives the numbers of one of the paper's experiments (dnkd presets lists them), --config
    those of an earlier run; every option overrides its own. Under torchrun all processes share
    every batch.
    """

    out: str
    """Folder for the results; several presets or seeds get folders of their own in it."""
    preset: str = ""
    """Name of a preset, or a pattern of several: 'cifar100/resnet56-resnet20/{ce,kd,kd++}'; options
    of the teacher are then for those that have one, and {teacher} in its paths stands for its name
    in the preset, or for what --teacher gives, as runs/{teacher}."""
    config: str = ""
    """In place of a preset: a run's config.json, or its folder, whose options are then the
    defaults."""
    seeds: str = ""
    """Several seeds, one run each: 0,1,2."""
    at_once: int = 1
    """How many of several runs are trained at a time, in processes of their own on one device; on a
    GPU side by side where NVIDIA's multi-process service runs (nvidia-cuda-mps-control -d), else
    taking turns."""
    resume: bool = False
    """Go on with what --out holds, exactly where it stopped (on a GPU but for rounding, unless
    --deterministic is given); begin where there is nothing."""
    overwrite: bool = False
    """Replace the run that --out holds."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)
    reader: ReaderOptions = field(default_factory=ReaderOptions)
    detection: DetectionOptions = field(default_factory=DetectionOptions)


@dataclass
class Presets:
    """List the presets, or show what one consists of."""

    pattern: Annotated[str, tyro.conf.Positional] = ""
    """Only those that match, as 'cifar100/resnet56-*/{kd,kd++}'; all without one."""
    show: bool = False
    """All settings of each, with source, conflicts between sources, and published accuracy."""
    json: bool = False
    """Print JSON."""


@dataclass
class ClassMeansArguments:
    """Gather the mean feature of every class over the training images, as they are.

    Of a detector that of every class and of the background, over sampled proposals.

    The file is what --class-means of dnkd train and dnkd_ext.ClassMeans.load read.
    """

    model: str
    """The teacher: a cifar_* name, or any name that timm knows; for detection
    fasterrcnn_resnet18, _resnet50, _resnet101 or _mobilenet_v2."""
    weights: str
    """File of its weights, the folder of the run that trained it, or pretrained: timm's own, for
    detection torchvision's."""
    out: str
    """File to write (safetensors)."""
    overwrite: bool = False
    """Replace the file."""
    resume: bool = False
    """Go on with a pass that was interrupted; begin where there is none."""
    seed: int = 0
    """Detection: of the proposals that are sampled."""
    data: SeenData = field(default_factory=SeenData)
    run: SummedRun = field(default_factory=SummedRun)
    reader: SeenReader = field(default_factory=SeenReader)
    detection: SampledDetection = field(default_factory=SampledDetection)


@dataclass
class Eval:
    """Evaluate trained weights on the test images, and print JSON.

    The training images need not be there, except with --cache, whose file holds both. Where they
    are missing from class folders, the first test image decides the size to which all are brought.
    """

    model: str
    """A cifar_* name, or any name that timm knows; for detection fasterrcnn_resnet18, _resnet50,
    _resnet101 or _mobilenet_v2."""
    weights: str
    """File of the weights, a run's folder, whose best weights are taken, or pretrained: timm's own,
    for detection torchvision's."""
    detections: str | None = None
    """Detection: file for what was found in every image, JSON in COCO's results format; one that is
    not there yet."""
    data: SeenData = field(default_factory=SeenData)
    run: SeenRun = field(default_factory=SeenRun)
    reader: EvaluatedReader = field(default_factory=EvaluatedReader)
    detection: SeenDetection = field(default_factory=SeenDetection)


@dataclass
class Plot:
    """Draw the curves of one or several runs into one picture, curves.png.

    With --task detection the boxes of some images, too: boxes.png of a single run, and
    boxes-1.png, boxes-2.png and so on of several.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs."""
    out: str
    """Folder for the pictures."""
    task: Literal["curves", "detection"] = "curves"
    """detection: draw the annotated boxes of some images of the evaluation, and those that student
    and teacher find, too."""
    images: tuple[int, ...] = ()
    """Ids of the images; by default some that are evenly spread over all."""
    count: int = 4
    """How many, where no ids are given."""
    threshold: float = 0.5
    """Smallest score of a box that is drawn."""
    data: str = ""
    """Folder of the data, where it is not that of the run any more."""
    teacher_weights: str = ""
    """Likewise the teacher's weights, a file or a run's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the detectors run."""


def _parse(kind: type[T], name: str, argv: Sequence[str], default: T | None = None) -> T:
    return tyro.cli(
        kind,
        prog=f"dnkd {name}",
        description=inspect.cleandoc(kind.__doc__ or ""),
        args=list(argv),
        default=default,
        console_outputs=SPEAKS,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.SuppressFixed,
        ),
    )


def _preset_config(preset: str) -> TrainConfig:
    """A preset's configuration; the defaults without a name."""
    settings = {"preset": preset, **load_preset(preset).settings} if preset else {}
    return replace(TrainConfig(), settings)


def _earlier_config(path: Path) -> TrainConfig:
    """The configuration of a run, from its file or its folder."""
    config = checked_config(path / CONFIG if path.is_dir() else path)
    if config.preset:
        try:
            load_preset(config.preset)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from error
    return config


def _arguments_of(config: TrainConfig, out: str) -> Train:
    """What the command is when only the configuration is given."""
    return Train(out, **{group: getattr(config, group) for group in GROUPS})


def _config(arguments: ClassMeansArguments | Eval) -> TrainConfig:
    """The configuration of a command that does not train."""
    return TrainConfig(
        data=DataOptions(**vars(arguments.data)),
        run=RunOptions(**vars(arguments.run)),
        reader=ReaderOptions(**vars(arguments.reader)),
        detection=DetectionOptions(**vars(arguments.detection)),
    )


def _without_teacher(config: TrainConfig, others: Sequence[TrainConfig]) -> TrainConfig:
    """The configuration without what it says of a teacher or class means that it has no use for.

    Of class means, and of a teacher's outputs for methods that compare maps, only where that is for
    other presets; otherwise it is an error that is told.
    """
    if not config.method.nd_weight and any(other.method.nd_weight for other in others):
        config = replace(config, {"class_means_momentum": None})
    if config.method.kind.compares_maps and any(
        other.needs_teacher and not other.method.kind.compares_maps for other in others
    ):
        config = replace(config, {"teacher_outputs": None})
    if config.needs_teacher:
        return config
    none = dict.fromkeys(("teacher", "teacher_weights", "class_means", "teacher_outputs"))
    return replace(config, {**none, "fsdp_teacher": False})


def _without_unused(
    config: TrainConfig, base: TrainConfig, configs: Sequence[TrainConfig]
) -> TrainConfig:
    """The configuration without options of other methods: those of ``base``, which the options of
    the command change, or for other presets.

    Raises:
        ValueError: no configuration has a use for an option that was given.
    """
    for name, default in unused(config).items():
        given = getattr(config.method, name)
        is_given = given not in (default, getattr(base.method, name))
        if is_given and all(name in unused(other) for other in configs):
            methods = " and ".join(methods_with(name))
            raise ValueError(
                f"{flag(name)} is for --method {methods}, got --method {config.method.method}"
            )
    return replace(config, unused(config))


def _published(config: TrainConfig) -> float | None:
    """The preset's accuracy or AP, where models and method are still its own."""
    if not config.preset:
        return None
    preset = load_preset(config.preset)
    given = {
        "student": config.model.student,
        "teacher": config.model.teacher,
        "method": config.method.method,
        "with ND": config.method.nd_weight != 0,
    }
    own = {**preset.settings, "with ND": preset.settings.get("nd_weight", 0) != 0}
    # A tag says which of timm's weights of the same model are meant.
    alike = all(
        str(own.get(name)).partition(".")[0] == str(value).partition(".")[0]
        for name, value in given.items()
    )
    return preset.published if alike else None


def _with_names(config: TrainConfig) -> TrainConfig:
    """The configuration with the teacher's name in place of {teacher}.

    As the preset has it, or where another teacher is named, that one's.
    """
    name = config.model.teacher
    if config.preset and load_preset(config.preset).settings.get("teacher") == name:
        name = config.preset.split("/")[1].partition("-")[0]
    paths = {
        option: path.replace("{teacher}", name or "")
        for option in ("teacher_weights", "class_means", "teacher_outputs")
        if (path := getattr(config.model, option)) is not None
    }
    return replace(config, paths)


def _read_train(
    argv: Sequence[str],
) -> tuple[Train, list[tuple[TrainConfig, float | None]], list[int]]:
    """Options, a configuration and the published accuracy for every preset, and the seeds."""
    first = argparse.ArgumentParser("dnkd train", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="")
    first.add_argument("--config", default="")
    known = first.parse_known_args(argv)[0]
    if known.preset and known.config:
        raise ValueError(
            f"--preset {known.preset} and --config {known.config} each give all options; pass one "
            "of them"
        )
    if known.config:
        bases = [_earlier_config(Path(known.config))]
    else:
        bases = [_preset_config(name) for name in (expand(known.preset) if known.preset else [""])]
    configs, arguments = [], None
    for base in bases:
        # Parsed once per preset: options replace the preset's own numbers.
        default: Any = _arguments_of(base, tyro.MISSING)
        arguments = _parse(Train, "train", argv, default)
        groups = {group: getattr(arguments, group) for group in GROUPS}
        configs.append(TrainConfig(base.preset, **groups))
    configs = [
        _without_unused(config, base, configs) for config, base in zip(configs, bases, strict=True)
    ]
    if any(config.needs_teacher for config in configs):
        # What the options say of the teacher is for those that have one.
        configs = [_with_names(_without_teacher(config, configs)) for config in configs]
    assert arguments is not None
    if arguments.seeds and arguments.run.seed != bases[-1].run.seed:
        raise ValueError(
            f"--seed {arguments.run.seed} is for one run and --seeds {arguments.seeds} for "
            "several; pass one of them"
        )
    seeds = _seeds(arguments.seeds) if arguments.seeds else [arguments.run.seed]
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it; pass one")
    return arguments, [(config, _published(config)) for config in configs], seeds


def _named(out: str) -> Path:
    """The path of --out; an empty one, as of an unset variable, would be the current folder."""
    if not out.strip():
        raise ValueError(f"--out must name where to write to, got {out!r}")
    return Path(out)


def train(argv: Sequence[str]) -> int:
    """``dnkd train``."""
    with told_once():
        arguments, configs, seeds = _read_train(argv)
    out = _named(arguments.out)
    from dnkd_ext.train.jobs import run_jobs
    from dnkd_ext.train.plan import plan_jobs

    def work(world: World) -> None:
        # Where a node was replaced, its torchrun has restarted nothing yet.
        resume = world.any(arguments.resume or restarted())
        run_jobs(
            plan_jobs(configs, seeds, out),
            out,
            world,
            resume=resume,
            overwrite=arguments.overwrite and not resume,
            at_once=arguments.at_once,
        )

    return _until_stopped("train", arguments.run.device, work)


def _until_stopped(name: str, device: str, work: Callable[[World], None]) -> int:
    """Do what a command does with all processes; the exit status, that of a signal among them."""
    try:
        with join_world(device) as world:
            try:
                work(world)
            except Interrupted as stopped:
                if not stopped.together:
                    raise
                return _stopped(name, stopped)
    except Interrupted as stopped:
        # Out of the world by an error: the others may be in a collective call.
        return _stopped(name, stopped)
    return 0


def _stopped(name: str, stopped: Interrupted) -> int:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"dnkd {name}: {stopped}", flush=True)
    return 128 + (stopped.signal or signal.SIGTERM)


def restarted() -> bool:
    """Whether torchrun started the same command again, because a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must be different integers from 0 on, as 0,1,2; got {text!r}")
    return seeds


def presets(argv: Sequence[str]) -> int:
    """``dnkd presets``."""
    arguments = _parse(Presets, "presets", argv)
    names = expand(arguments.pattern) if arguments.pattern else preset_names()
    if arguments.json:
        found = [load_preset(name) for name in names]
        print(json.dumps([vars(preset) for preset in found], indent=2))
    elif arguments.show:
        print("\n\n".join(describe(name) for name in names))
    else:
        print(format_presets(names))
    return 0


def class_means(argv: Sequence[str]) -> int:
    """``dnkd class-means``."""
    arguments = _parse(ClassMeansArguments, "class-means", argv)
    with told_once():
        if arguments.seed and arguments.data.task != "detection":
            raise ValueError(f"--seed is for --task detection, got {arguments.seed}")
        if arguments.resume and arguments.overwrite:
            raise ValueError("--resume goes on and --overwrite begins anew; pass one of them")
    config = replace(_config(arguments), {"seed": arguments.seed})
    out = _named(arguments.out)
    from dnkd_ext.train.commands import run_class_means

    def work(world: World) -> None:
        means = run_class_means(
            arguments.model,
            arguments.weights,
            config,
            out,
            world,
            overwrite=arguments.overwrite,
            resume=world.any(arguments.resume or restarted()),
        )
        if world.is_first:
            counts = means.counts
            samples = "proposals" if config.data.task == "detection" else "images"
            print(
                f"{out}: {means.num_classes} classes x {means.num_features} features of "
                f"{int(counts.sum())} {samples}"
            )

    return _until_stopped("class-means", arguments.run.device, work)


def evaluate(argv: Sequence[str]) -> int:
    """``dnkd eval``."""
    arguments = _parse(Eval, "eval", argv)
    config = _config(arguments)
    from dnkd_ext.train.commands import run_eval

    with join_world(arguments.run.device) as world:
        detections = None if arguments.detections is None else Path(arguments.detections)
        result = run_eval(arguments.model, arguments.weights, config, world, detections)
        if world.is_first:
            print(json.dumps(result, indent=2))
    return 0


def plot(argv: Sequence[str]) -> int:
    """``dnkd plot``."""
    arguments = _parse(Plot, "plot", argv)
    if not arguments.runs:
        raise ValueError("name at least one run's folder")
    if arguments.count < 1 or not 0 <= arguments.threshold <= 1:
        raise ValueError(
            "--count must be at least 1 and --threshold between 0 and 1, got "
            f"{arguments.count} and {arguments.threshold}"
        )
    if arguments.task == "curves":
        drawn = {one.name: one.default for one in dataclasses.fields(Plot)}
        for name in ("images", "count", "threshold", "data", "teacher_weights", "device"):
            value = getattr(arguments, name)
            if value != drawn[name]:
                raise ValueError(f"{flag(name)} is for the boxes of --task detection, got {value}")
    folders, out = [Path(run) for run in arguments.runs], _named(arguments.out)
    from dnkd_ext.train.commands import check_plot, read_run, run_pictures, run_plot

    check_plot(folders, out)
    if arguments.task == "detection":
        for folder in folders:  # before anything is written
            task = read_run(folder)[0].get("task")
            if task != arguments.task:
                raise ValueError(f"{folder} is a run of --task {task}, not of detection")
        with join_world(arguments.device) as world:  # first, for what may be refused there
            for number, folder in enumerate(folders, 1):
                print(
                    run_pictures(
                        folder,
                        out / ("boxes.png" if len(folders) == 1 else f"boxes-{number}.png"),
                        world,
                        images=arguments.images,
                        count=arguments.count,
                        threshold=arguments.threshold,
                        data=arguments.data,
                        teacher_weights=arguments.teacher_weights,
                    )
                )
    print(run_plot(folders, out))
    return 0


COMMANDS = {
    "train": train,
    "presets": presets,
    "class-means": class_means,
    "eval": evaluate,
    "plot": plot,
}
