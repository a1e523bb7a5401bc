"""What the runs of a call share: data, and what is the teacher's, read or gathered once."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import torch

from dnkd_ext.train import tasks
from dnkd_ext.train.class_names import CLASSES, check_classes
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.distillation import STAGE_METHODS
from dnkd_ext.train.files import CLASS_MEANS
from dnkd_ext.train.gather import remove_parts
from dnkd_ext.train.sharding import shard_model
from dnkd_ext.train.teacher import (
    Teacher,
    cast_once,
    means_digest,
    read_class_means,
    seen_otherwise,
    without_means,
)
from dnkd_ext.train.teacher_outputs import (
    TeacherOutputs,
    make_outputs,
    outputs_notes,
    read_outputs,
)
from dnkd_ext.train.world import World

__all__ = ["Shared"]


class Shared:
    """Data, teachers, their class means and outputs, each read once for all jobs of a call."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._sources: dict[Any, Any] = {}
        self._teachers: dict[Any, Teacher] = {}
        self._outputs: dict[str, TeacherOutputs] = {}
        self._sharded: set[Any] = set()
        self._told: set[str] = set()

    def forget(self) -> None:
        """Give the memory back that others are to have."""
        self._sources.clear()
        self._teachers.clear()
        self._outputs.clear()
        self._sharded.clear()
        self._release()

    def _release(self) -> None:
        """Let the memory go of what is not held any more."""
        gc.collect()  # models are in cycles
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _warn(self, told: str | None) -> None:
        """A warning by the first process, once in a call."""
        if told is not None and told not in self._told and self.world.is_first:
            warnings.warn(told, stacklevel=3)
            self._told.add(told)

    def source(self, config: TrainConfig) -> Any:
        """The data set, a Source or a DetectionSource."""
        key = (config.data, config.reader, config.detection)
        if key not in self._sources:
            self._sources[key] = tasks.open_data(config, self.world)
        return self._sources[key]

    def _key(self, config: TrainConfig) -> Any:
        model = config.model
        return (
            (model.teacher, model.teacher_weights, model.class_means),
            (config.data, config.reader, config.detection),
            (config.run.channels_last, config.run.fsdp_teacher and config.run.precision),
        )

    def teacher(self, config: TrainConfig) -> Teacher | None:
        """The teacher, whole, with class means where a file of them is named."""
        source = self.source(config)
        if not config.needs_teacher:
            return None
        key = self._key(config)
        if key not in self._teachers:
            assert config.model.teacher is not None
            assert config.model.teacher_weights is not None
            teacher = tasks.load_teacher(
                config.model.teacher, config.model.teacher_weights, source, config, self.world
            )
            if config.model.class_means is not None:
                path, name = config.model.class_means, config.model.teacher
                read = (
                    tasks.detection().read_means if tasks.is_detection(config) else read_class_means
                )
                means = read(path, name, teacher, source)
                if not config.data.any_classes:
                    noted = means.metadata.get(CLASSES)
                    check_classes(f"--class-means {path}", noted, source.classes)
                notes = tasks.origin_notes(name, teacher, source, config)
                self._warn(seen_otherwise(path, means, notes))
                origin = means_digest(means)
                teacher = teacher._replace(class_means=means, means_origin=origin)
            self._teachers[key] = teacher
        self._look_for_missing(config, self._teachers[key])
        return self._teachers[key]

    def _look_for_missing(self, config: TrainConfig, teacher: Teacher) -> None:
        """Warn of classes without a mean, where the loss compares with it."""
        if config.method.nd_weight and teacher.class_means is not None:
            self._warn(without_means(teacher.class_means, self.source(config).classes))

    def complete_teacher(self, config: TrainConfig, out: Path) -> Teacher | None:
        """The teacher with class means, and with the outputs that steps are to look up."""
        teacher = self._teacher_with_means(config, out)
        path = config.model.teacher_outputs if config.looks_up_teacher else None
        if path not in self._outputs and self._outputs:
            self._outputs.clear()  # one at a time: they are large
            self._release()
        if teacher is None or path is None:
            return teacher
        if path not in self._outputs:
            source = self.source(config)
            notes = outputs_notes(config, source, teacher.digest)
            with self.world.together():
                outputs = read_outputs(Path(path), notes, self.world.device)
                if outputs is None and self.world.size > 1:
                    raise FileNotFoundError(f"--teacher-outputs {path} is not there any more")
            if outputs is None:
                outputs = make_outputs(teacher.model, source, config, self.world, Path(path), notes)
            self._outputs[path] = outputs
        return teacher._replace(outputs=self._outputs[path])

    def _teacher_with_means(self, config: TrainConfig, out: Path) -> Teacher | None:
        """The teacher, sharded if asked, with its class means.

        These are gathered now unless ``out`` or a file has them; a pass that was interrupted is
        gone on with, which gives the same means as a new one. Without the ND loss they only serve
        diagnostics, and are left out where gathering them is a matter of hours.
        """
        teacher = self.teacher(config)
        if teacher is None:
            return None
        key = self._key(config)
        if config.run.fsdp_teacher and key not in self._sharded:
            if config.run.precision == "bfloat16":
                # As autocast would cast it in every step; half of it is sent then.
                teacher = teacher._replace(model=cast_once(teacher.model))
                self._teachers[key] = teacher
            shard_model(
                teacher.model, self.world.mesh, methods=STAGE_METHODS, compile=config.run.compile
            )
            self._sharded.add(key)
        if config.model.class_means_momentum is not None:
            return teacher
        if (
            config.data.task != "cifar"
            and not config.method.nd_weight
            and config.model.class_means is None
        ):
            # Nor those that another run of the call has gathered: resumed, it has gathered nothing.
            return teacher._replace(class_means=None)
        if teacher.class_means is None:
            assert config.model.teacher is not None
            source, means = self.source(config), None
            notes = tasks.origin_notes(config.model.teacher, teacher, source, config)
            with self.world.first_alone():
                if self.world.is_first:
                    means = tasks.kept_means(
                        out / CLASS_MEANS, notes, source, any_classes=config.data.any_classes
                    )
            means = self.world.from_first(means)
            if means is None:
                means = tasks.gather_class_means(
                    teacher.model,
                    source,
                    config,
                    self.world,
                    notes,
                    path=out / CLASS_MEANS,
                    resume=True,
                )
            teacher = teacher._replace(class_means=means)
            self._look_for_missing(config, teacher)
            self._teachers[key] = teacher
        with self.world.first_alone():
            if self.world.is_first:
                assert teacher.class_means is not None
                teacher.class_means.save(out / CLASS_MEANS)
                remove_parts(out / CLASS_MEANS)
        return teacher
