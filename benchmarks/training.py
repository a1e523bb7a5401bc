"""Training, part by part: what the engine's own step, data path and evaluation take.

What is timed is the code that trains: the task's batches, its ``Distillation``, and the engine's
step with its optimiser and meter. Steps as they are and steps with marks between their parts take
turns, block by block; what the parts' times leave of the step's is ``unexplained``. A step is its
data and ``do_step``, as in the engine's loop, without progress bar, log and evaluation. Teachers
are not trained, and what is looked up in place of running them is random, which takes as long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import parts, results, tables
from benchmarks.harness import median_and_quantiles, probe, synchronise
from dnkd_ext.progress import Progress
from dnkd_ext.train import distillation
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data import batches as batches_module
from dnkd_ext.train.data.image_files import load_images
from dnkd_ext.train.data.memory import Images, ImageSet
from dnkd_ext.train.data.sources import MemorySource
from dnkd_ext.train.engine import _Training
from dnkd_ext.train.gather import gather_class_means
from dnkd_ext.train.networks import build_model
from dnkd_ext.train.plan import resolve
from dnkd_ext.train.presets import expand, load_preset
from dnkd_ext.train.signals import Interrupted
from dnkd_ext.train.teacher import Teacher
from dnkd_ext.train.teacher_outputs import TeacherOutputs, outputs_notes
from dnkd_ext.train.world import World

PRESETS = ("cifar100/resnet56-resnet20/{ce,kd,kd++}", "cifar100/resnet32x4-resnet8x4/kd++")
# CIFAR-100's own numbers of images and classes.
IMAGES, TEST_IMAGES, CLASSES = 50_000, 10_000, 100
SYNTHETIC = "synthetic"
# Steps before anything is timed: the engine's recorded step runs three before it is recorded.
WARM_UP = {"cpu": 2, "cuda": 12}


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rounds: blocks of steps, of either kind.
        steps: in a block; one wait for the device each.
        eval_images: for evaluation and class means.
        repeats: of whole epochs of data, evaluations and class means.
    """

    rounds: int
    steps: int
    eval_images: int
    repeats: int


def extent(device: str, rounds: int | None = None, eval_images: int | None = None) -> Extent:
    """The usual one of a device, with other rounds or images where they are given."""
    usual = Extent(7, 1, 1000, 1) if device == "cpu" else Extent(20, 50, TEST_IMAGES, 3)
    return dataclasses.replace(
        usual,
        rounds=usual.rounds if rounds is None else rounds,
        eval_images=usual.eval_images if eval_images is None else eval_images,
    )


# -- what is trained ------------------------------------------------------------------------------


def synthetic(images: int, test_images: int) -> ImageSet:
    """Random pixels of CIFAR's size, as many of every class."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Images:
        pixels = torch.randint(
            256, (count, 3, 32, 32), generator=generator, dtype=torch.int32
        ).byte()
        return Images(pixels, torch.arange(count) % CLASSES)

    classes = [str(number) for number in range(CLASSES)]
    return ImageSet(SYNTHETIC, split(images), split(test_images), classes, flips=True)


def some(split: Images, count: int) -> Images:
    """At most ``count`` images, evenly spread."""
    if count >= len(split):
        return split
    chosen = torch.arange(count, device=split.target.device) * len(split) // count
    return Images(split.pixels[chosen], split.target[chosen])


@torch.no_grad()
def untrained_teacher(name: str, data: ImageSet, config: TrainConfig, world: World) -> Teacher:
    """A teacher of fresh weights whose batch norms have seen images, so that it stays finite."""
    torch.manual_seed(0)
    model = build_model(name, len(data.classes), data.channels).to(world.device)
    if config.run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # means over all batches
    pixels = some(data.train, 256).pixels
    for part in pixels.split(128):
        model.train()(data.normalise(part))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return Teacher(model.eval().requires_grad_(False), "untrained", None)


def random_outputs(source: MemorySource, config: TrainConfig, world: World) -> TeacherOutputs:
    """What is looked up in place of running a teacher: numbers of its outputs' size and type."""
    rows = int(outputs_notes(config, source, "")["rows"])
    dtype = torch.bfloat16 if config.run.precision == "bfloat16" else torch.float32
    generator = torch.Generator(world.device).manual_seed(0)
    options: Any = {"generator": generator, "device": world.device}
    logits = torch.randn(rows, len(source.classes), dtype=dtype, **options)
    return TeacherOutputs(logits, torch.rand(rows, **options) + 1)


def configure(preset: str, world: World, settings: dict[str, Any], data: str = "") -> TrainConfig:
    """The preset's configuration with other settings, as the training command would resolve it.

    Raises:
        ValueError: an unknown preset, or settings that do not fit it or the device.
    """
    given = {
        **load_preset(preset).settings, **settings, "preset": preset, "data": data or SYNTHETIC,
        "teacher_weights": "untrained", "progress": False, "tensorboard": False,
    }  # fmt: skip
    config = replace(TrainConfig(), given)
    if config.data.task != "cifar":  # its images would not be those that are made here
        raise ValueError(
            f"--preset {preset} is of --task {config.data.task}, and only cifar, whose images are "
            "held in memory, is measured part by part; python -m benchmarks loading and e2e are "
            "for the others"
        )
    config.check(world.size)
    return dataclasses.replace(config, run=resolve(config.run, world))


def _looking_up(config: TrainConfig) -> list[TrainConfig]:
    """The configuration with the teacher's outputs looked up; none where that is not there."""
    if not config.needs_teacher or config.method.kind.compares_maps:
        return []
    return [replace(config, {"teacher_outputs": "random"})]


# -- the parts ------------------------------------------------------------------------------------


class Marks:
    """Points in time between the parts of steps; on a GPU events, which nothing waits for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._marks: list[tuple[str | None, Any]] = []

    def mark(self, part: str | None) -> None:
        """What ran since the last mark was ``part``; None: nothing that has a name."""
        if self.device == "cpu":
            self._marks.append((part, time.perf_counter()))
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))

    def read(self) -> dict[str, float]:
        """Seconds of every part in all, once the device is done; forgets them."""
        seconds: dict[str, float] = {}
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                passed = end - begin if self.device == "cpu" else begin.elapsed_time(end) / 1e3
                seconds[part] = seconds.get(part, 0.0) + passed
        self._marks.clear()
        return seconds


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute of an object, class or module while the context lasts."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def marked(training: _Training, marks: Marks) -> Iterator[None]:
    """The engine's step with marks between its parts while the context lasts.

    A recorded step is left as it is, and so is what is compiled.
    """

    def around(
        owner: Any, name: str, before: str | None, after: str
    ) -> contextlib.AbstractContextManager[None]:
        call = getattr(owner, name)

        def run(*arguments: Any, **named: Any) -> Any:
            marks.mark(before)
            result = call(*arguments, **named)
            marks.mark(after)
            return result

        return _replaced(owner, name, run)

    step = training.task.step
    (teacher,) = step._teacher

    def network(name: str) -> contextlib.AbstractContextManager[None]:
        call = getattr(distillation, name)

        def run(model: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
            marks.mark(None)
            result = call(model, *arguments, **named)
            marks.mark("teacher" if model is teacher else "student")
            return result

        return _replaced(distillation, name, run)

    with contextlib.ExitStack() as stack:
        stack.enter_context(around(batches_module, "crop_and_flip", "index", "crop"))
        if not training.run.cuda_graph:
            stack.enter_context(around(training.optimizer, "zero_grad", None, "optimiser"))
            stack.enter_context(around(torch.Tensor, "backward", None, "backward"))
            stack.enter_context(around(training.optimizer, "step", "metering", "optimiser"))
            stack.enter_context(around(training.meter, "add", None, "metering"))
            if training.run.compile:
                stack.enter_context(around(training, "module", None, "forward"))
            else:
                # From the student's output to the accuracy's: projector, criterion.
                stack.enter_context(around(distillation, "_top1", "criterion", "metering"))
                stack.enter_context(network("features"))
                stack.enter_context(network("stage_maps"))
                stack.enter_context(around(TeacherOutputs, "look_up", None, "teacher"))
                if step.criterion is None:  # which calls the student itself
                    hooks = (
                        step.student.register_forward_pre_hook(lambda *_: marks.mark(None)),
                        step.student.register_forward_hook(lambda *_: marks.mark("student")),
                    )
                    for hook in hooks:
                        stack.callback(hook.remove)
        yield


@dataclass(frozen=True)
class Block:
    """Seconds per step: with its wait for the device, and until the host was done with it."""

    wall: float
    host: float


def block(
    training: _Training, batches: Iterator[tuple[Tensor, ...]], steps: int, marks: Marks | None
) -> Block:
    """Steps as the engine takes them, and one wait for the device."""
    device = training.world.device.type
    synchronise(device)
    begin = time.perf_counter()
    if marks is None:
        for _ in range(steps):
            training.do_step(next(batches))
    else:
        with marked(training, marks):
            marks.mark(None)
            for _ in range(steps):
                batch = next(batches)
                marks.mark("normalise")
                training.do_step(batch)
                if training.run.cuda_graph:
                    marks.mark("graph")
    returned = time.perf_counter()
    synchronise(device)
    return Block((time.perf_counter() - begin) / steps, (returned - begin) / steps)


def endless(task: Classification) -> Iterator[tuple[Tensor, ...]]:
    """The batches of one epoch after another."""
    epoch = 0
    while True:
        yield from task.batches(epoch, 0)
        epoch += 1


def _seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median of some calls after a first."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        begin = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


# -- a preset -------------------------------------------------------------------------------------


def measure_preset(
    config: TrainConfig, data: ImageSet, world: World, size: Extent, progress: Progress
) -> results.Row:
    """The row of one configuration.

    Raises:
        FloatingPointError: the loss is not finite: what was timed is no training.
    """
    device = world.device.type
    if device == "cuda":
        torch.backends.cudnn.benchmark = not config.run.deterministic
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()  # another preset's graphs are not wanted any more
    few = dataclasses.replace(
        data, train=some(data.train, size.eval_images), test=some(data.test, size.eval_images)
    )
    config = replace(config, {"eval_batch_size": min(config.run.eval_batch_size, len(few.test))})
    row: results.Row = {}

    teacher = None
    if config.needs_teacher:
        progress.say("class means")
        teacher = untrained_teacher(config.model.teacher, few, config, world)

        def gather():
            return gather_class_means(teacher.model, MemorySource(few), config, world)

        seconds = _seconds(gather, device, size.repeats)
        row.update(means_images=len(few.train), means_ips=_rate(len(few.train), seconds))
        teacher = teacher._replace(class_means=gather())
    source = MemorySource(dataclasses.replace(few, train=data.train))
    if teacher is not None and config.model.teacher_outputs is not None:
        progress.say("teacher's outputs")
        teacher = teacher._replace(outputs=random_outputs(source, config, world))
    Classification.check(config, source, teacher)
    task = Classification(config, source, teacher, world)
    training = _Training(
        task, config.optim, config.run, Path(), world, config.method.kd_warm_up, {}
    )

    progress.say("data alone")

    def epoch():
        for _ in task.batches(0, 0):
            pass

    row["data_ips"] = _rate(
        task.steps_per_epoch * task.batch_size, _seconds(epoch, device, max(3, size.repeats))
    )
    row["plan_ms"] = _ms(_seconds(lambda: task._train.plan(0), device, 3))

    progress.say("steps")
    task.step.train()
    batches = endless(task)
    block(training, batches, WARM_UP[device], None)
    marks = Marks(device)
    block(training, batches, 1, marks)
    marks.read()
    plain, apart = [], []
    for _ in range(size.rounds):
        plain.append(block(training, batches, size.steps, None))
        block(training, batches, size.steps, marks)
        apart.append({part: value / size.steps for part, value in marks.read().items()})
        progress.advance()
    training._check_finite(0)
    median, low, high = median_and_quantiles(one.wall for one in plain)
    row.update(
        rounds=size.rounds,
        steps=size.steps,
        step_ips=_rate(task.batch_size, median),
        step_ms=_ms(median),
        low_ms=_ms(low),
        high_ms=_ms(high),
    )
    explained = 0.0
    for part in parts.PARTS:
        if part in apart[0]:
            value = statistics.median(one[part] for one in apart)
            explained += value
            row[f"{part}_ms"] = _ms(value)
    row["unexplained_ms"] = _ms(median - explained)
    if device != "cpu":  # where a call returns when its work is done
        row["host_ms"] = _ms(statistics.median(one.host for one in plain))
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        counted = probe(lambda: training.do_step(next(batches)), device)
        row.update(launches=counted.launches, syncs=counted.syncs, device_ms=_ms(counted.device))

    progress.say("evaluation")
    seconds = _seconds(lambda: task.evaluate(*task.evaluated), device, size.repeats)
    row.update(eval_images=len(few.test), eval_ips=_rate(len(few.test), seconds))
    return {
        **dict.fromkeys(parts.TRAINING_FIELDS, ""),
        **results.environment(device),
        "device": device,
        **described(config, data),
        **row,
    }


def described(config: TrainConfig, data: ImageSet) -> results.Row:
    """The columns that say what is measured."""
    return {
        "preset": config.preset,
        "student": config.model.student,
        "teacher": config.model.teacher if config.needs_teacher else "",
        "data": data.name,
        "images": len(data.train),
        "batch": config.optim.batch_size,
        "precision": config.run.precision,
        **{
            name: "yes" if getattr(config.run, name) else "no"
            for name in ("channels_last", "compile", "cuda_graph")
        },
        "teacher_outputs": "no" if config.model.teacher_outputs is None else "yes",
    }


def _ms(seconds: float | None) -> float | str:
    return "" if seconds is None else round(seconds * 1e3, 4)


def _rate(images: int, seconds: float) -> float:
    return round(images / seconds, 1)


def measured(path: Path, device: str) -> set[tuple[str, ...]]:
    """The settings that a results file has of this commit on this machine."""
    return {_key(row) for row in parts.TRAINING.measured_here(path, device)}


def _key(row: results.Row) -> tuple[str, ...]:
    """A setting, the same of a row that was read as of one that is to be written."""
    numbers = {name: float(str(row[name])) for name in ("images", "batch")}
    return parts.setting({**row, **numbers})


def run(
    device: str,
    patterns: Sequence[str] = PRESETS,
    *,
    settings: dict[str, Any] | None = None,
    looks_up: bool = False,
    data: str | None = None,
    limit: int | None = None,
    rounds: int | None = None,
    eval_images: int | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> int:
    """Measure presets; each is in ``out`` as soon as it is done.

    Args:
        device: "cpu" or "cuda".
        patterns: names of presets, or patterns of several.
        settings: options of a training run by their flat names, in place of the preset's.
        looks_up: measure presets that distil logits once more, with the teacher's outputs looked
            up.
        data: folder of the data set; synthetic images without one.
        limit: training images.
        rounds: see :class:`Extent`.
        eval_images: likewise.
        out: results file to append to.
        resume: leave out what ``out`` has of this commit on this machine.

    Returns:
        0.

    Raises:
        ValueError: an unknown preset or a setting out of range, before anything is measured.
    """
    for name, value in (("rounds", rounds), ("limit", limit), ("eval-images", eval_images)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    world = World(0, 1, torch.device(device))
    names = dict.fromkeys(name for pattern in patterns for name in expand(pattern))
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    configs = [configure(name, world, settings, data or "") for name in names]
    if looks_up:
        configs = [one for config in configs for one in (config, *_looking_up(config))]
    parts.TRAINING.require_addable(out)
    size = extent(device, rounds, eval_images)
    if data is None:
        count = limit or IMAGES
        images = synthetic(count, min(size.eval_images, TEST_IMAGES))
    else:
        images = load_images(data, limit=limit, seed=0)
    for config in configs:
        if config.optim.batch_size > len(images.train):
            raise ValueError(
                f"the batch of {config.optim.batch_size} must be at most the {len(images.train)} "
                "training images"
            )
    images = images.to(world.device)
    done = measured(out, device) if resume and out is not None else set()
    rows = []
    try:
        with Progress(size.rounds * len(configs), "training", unit="round") as progress:
            for config in configs:
                if _key(described(config, images)) in done:
                    looked_up = ", the teacher looked up" if config.looks_up_teacher else ""
                    before = "measured before at this commit on this machine"
                    print(f"{config.preset}{looked_up}: {before}")
                    progress.advance(size.rounds)
                    continue
                row = measure_preset(config, images, world, size, progress)
                if out is not None:
                    parts.append_training([row], out)
                rows.append(row)
    except Interrupted as error:  # what gathers class means tells so of a signal
        if error.signal == signal.SIGINT:
            raise KeyboardInterrupt from error
        print(f"benchmarks training: {error}", file=sys.stderr)
        return 128 + error.signal
    finally:
        if rows:
            print(tables.training_table(rows))
    return 0
