"""Published experiments by name: their settings, where these come from, and what is in dispute.

The tables are the YAML files in the folder recipes; a file's name is the first part of its presets'
names.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import textwrap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal

from dnkd_ext.train.config import KINDS, METHODS
from dnkd_ext.train.options import converted, in_words

__all__ = ["Preset", "describe", "expand", "format_presets", "load_preset", "preset_names"]


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Attributes:
        name: as ``cifar100/resnet56-resnet20/kd++``, or ``cifar100/teacher/resnet56``.
        source: who published it, and in which files.
        conflicts: sentences on what the sources disagree in.
        published: top-1 in percent, or None; for CIFAR-100 the best epoch's.
        settings: of a training run, by their flat names; what the method has no use for is left
            out. A ``kd_warm_up`` of 0 means no ramp.
        inferred: why, for every setting that no source gives.
    """

    name: str
    source: str
    conflicts: tuple[str, ...]
    published: float | None
    settings: dict[str, Any]
    inferred: dict[str, str] = field(default_factory=dict)


def preset_names() -> list[str]:
    """All presets: of every file the teachers, then pair by pair the methods."""
    return list(_presets())


def load_preset(name: str) -> Preset:
    """The preset of that name; its dictionaries may be changed.

    Raises:
        ValueError: an unknown name; the message has those that are close.
    """
    preset = _presets().get(name)
    if preset is None:
        raise ValueError(_unknown(name))
    return replace(preset, settings=dict(preset.settings), inferred=dict(preset.inferred))


def expand(pattern: str) -> list[str]:
    """Names of presets from a pattern, each once, in the pattern's order.

    As in a shell: braces are alternatives and may be nested, and ``*``, ``?`` and ``[...]`` match
    within one part of a name, so that ``cifar100/*/{ce,kd}`` is CE and KD of every pair.

    Raises:
        ValueError: an alternative that is no preset or matches none, or braces that do not close.
    """
    found: list[str] = []
    for alternative in _alternatives(pattern):
        if any(character in alternative for character in "*?["):
            names = [name for name in _presets() if _matches(name, alternative)]
        else:
            names = [name for name in _presets() if name == alternative]
        if not names:
            raise ValueError(_unknown(alternative))
        found.extend(names)
    return list(dict.fromkeys(found))


def format_presets(names: Iterable[str]) -> str:
    """A table, one line per preset; a value that was inferred has a star."""
    columns = {
        "lr": "lr",
        "ce": "ce_weight",
        "kd": "kd_weight",
        "nd": "nd_weight",
        "alpha": "alpha",
        "beta": "beta",
        "gamma": "gamma",
        "T": "temperature",
        "ramp": "kd_warm_up",
    }
    rows = [("preset", *columns, "published")]
    for name in names:
        preset = load_preset(name)
        cells = [
            _number(preset.settings.get(key)) + "*" * (key in preset.inferred)
            for key in columns.values()
        ]
        published = "-" if preset.published is None else f"{preset.published:.2f}"
        rows.append((name, *cells, published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if any("*" in cell for row in rows[1:] for cell in row[1:]):
        lines.append("* inferred, no source gives it; --show tells why")
    return "\n".join(lines)


def describe(name: str) -> str:
    """All that is known of one preset, for reading.

    Raises:
        ValueError: an unknown name.
    """
    preset = load_preset(name)
    lines = [preset.name, *_wrapped(f"source: {preset.source}", "")]
    if preset.published is not None:
        of = ", the best epoch's" if preset.settings["task"] == "cifar" else ""
        lines.append(f"published: {preset.published:.2f} % top-1{of}")
    width = max(map(len, preset.settings))
    lines.append("settings:")
    for key, value in preset.settings.items():
        shown = " ".join(map(_number, value)) if isinstance(value, tuple) else _number(value)
        shown = shown or "-"
        lines.append(f"  {key.ljust(width)}  {shown}")
    if preset.inferred:
        lines.append("inferred:")
        for key, reason in preset.inferred.items():
            lines += _wrapped(f"- {key}: {reason}", "  ")
    if preset.conflicts:
        lines.append("conflicts:")
        for sentence in preset.conflicts:
            lines += _wrapped(f"- {sentence}", "  ")
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )


# -- patterns -------------------------------------------------------------------------------------


def _alternatives(pattern: str) -> list[str]:
    """What a pattern's braces stand for, the first brace varying slowest."""
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise ValueError(f"preset pattern {pattern!r} closes a brace that it does not open")
        return [pattern]
    depth, parts, begin = 0, [], start + 1
    for place in range(start, len(pattern)):
        character = pattern[place]
        depth += (character == "{") - (character == "}")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(pattern[begin:place])
            begin = place + 1
        if depth == 0:
            rests = _alternatives(pattern[begin:])
            inner = [choice for part in parts for choice in _alternatives(part)]
            return [pattern[:start] + choice + rest for choice in inner for rest in rests]
    raise ValueError(f"preset pattern {pattern!r} opens a brace that it does not close")


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _presets(), 4)
    hint = f"; close are: {', '.join(close)}" if close else ""
    return f"no preset {name!r}{hint}. dnkd presets lists all"


# -- files ----------------------------------------------------------------------------------------


# Settings of presets of all tasks, or of all that have such an option, in the order in which they
# are shown.
_COMMON = (
    *("task", "method", "ce_weight", "kd_weight", "nd_weight", "alpha", "beta", "gamma"),
    *("temperature", "kd_warm_up", "epochs", "batch_size", "lr", "momentum", "nesterov"),
    *("weight_decay", "milestones", "lr_decay", "pad", "flip", "mean", "std"),
)
# The settings that only the presets of the imagenet task have.
_IMAGENET = (
    *("nd_ramp", "mid_channels", "label_smoothing", "optimizer", "betas", "decay_vectors"),
    *("schedule", "lr_warm_up", "lr_end", "cosine_after_warm_up", "zero_init_last"),
    *("image_size", "scale", "crop_pct", "interpolation", "hflip", "auto_augment"),
    *("random_erasing", "mixup", "cutmix", "drop_path"),
)
# Likewise of the detection task.
_DETECTION = (
    *("lr_start", "epoch_steps", "backbone_weights", "trainable_layers", "min_size", "max_size"),
    *("anchor_sizes", "rpn_proposals", "proposals"),
)
# Every setting's type, that of the option; but where the command line takes any number of numbers,
# the reader of images wants two, and no preset draws the interpolation, which evaluation has, too.
SETTINGS: dict[str, Any] = {name: KINDS[name] for name in (*_COMMON, *_IMAGENET, *_DETECTION)}
SETTINGS["scale"] = tuple[float, float]
SETTINGS["interpolation"] = Literal["bilinear", "bicubic"]

# The settings that only some methods, optimizers and schedules have.
OF_METHODS = {
    name: {*method.options, *(() if name == "ce" else ("kd_warm_up",))}
    for name, method in METHODS.items()
}
OF_OPTIMIZERS = {"sgd": {"momentum", "nesterov"}, "adamw": {"betas"}}
OF_TASKS = {
    "cifar": {"pad", "flip"},
    "imagenet": set(_IMAGENET),
    "detection": {"flip", "mid_channels", "lr_warm_up", *_DETECTION},
}
OF_SCHEDULES = {
    "multistep": {"milestones", "lr_decay"},
    "cosine": {"lr_warm_up", "lr_end", "cosine_after_warm_up"},
}


def _wanted(settings: dict[str, Any]) -> set[str]:
    """What settings there must be, and no others, by what the settings themselves say."""
    wanted = set(SETTINGS)
    for choices, choice in (
        (OF_METHODS, settings.get("method", "ce")),
        (OF_OPTIMIZERS, settings.get("optimizer", "sgd")),
        (OF_SCHEDULES, settings.get("schedule", "multistep")),
        (OF_TASKS, settings.get("task", "cifar")),
    ):
        wanted -= set().union(*choices.values()) - choices[choice]
    # Detectors begin slowly whatever the schedule.
    return wanted | ({"lr_warm_up"} if settings.get("task") == "detection" else set())


def _given(kind: Any, value: Any) -> Any:
    """The value as a type has it; None also where it is an empty list, or not finite."""
    found = converted(kind, value)
    items = found if isinstance(found, tuple) else (found,)
    is_finite = all(math.isfinite(item) for item in items if isinstance(item, float))
    return found if items and is_finite else None


@dataclass
class _Part:
    """What one mapping of a file adds to its presets."""

    settings: dict[str, Any] = field(default_factory=dict)
    inferred: dict[str, str] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    source: str = ""
    published: float | None = None


class _File:
    """Reads one table; every error names the file and the key."""

    def __init__(self, file: str, table: str, text: str) -> None:
        self.file = file
        self.table = table
        self.root = self._mapping(
            self._parse(text),
            "",
            {"models", "settings", "conflicts", "methods", "pairs"},
            {"teachers"},
        )

    def presets(self) -> list[Preset]:
        shared = self._part(self.root, "", {"settings", "conflicts"}, ignore=set(self.root))
        made = [self._teacher(model, shared, *rest) for model, *rest in self._teachers()]
        methods = {
            method: self._part(
                content, f"methods.{method}", {"source", "settings", "conflicts"}, set()
            )
            for method, content in self._items(self.root["methods"], "methods")
        }
        for pair, content in self._items(self.root["pairs"], "pairs"):
            key = f"pairs.{pair}"
            teacher, dash, student = pair.partition("-")
            if not (teacher and dash and student):
                raise self._error(key, "must be TEACHER-STUDENT")
            models = {"student": self._model(student, key), "teacher": self._model(teacher, key)}
            without = self._without(content, key, methods)
            cells = [method for method in methods if method not in without]
            self._mapping(content, key, set(cells), {"settings", "conflicts", "without"})
            of_pair = self._part(content, key, {"settings", "conflicts"}, {"without", *cells})
            for method in cells:
                part = methods[method]
                own = self._part(
                    content[method],
                    f"{key}.{method}",
                    {"published", "conflicts", "source"},
                    may_lack={"source"},
                )
                if own.source:  # what is said of the method is of another source
                    part = replace(part, conflicts=[])
                with_teacher = (part.settings | own.settings).get("method") != "ce"
                own_models = models if with_teacher else models | {"teacher": None}
                made.append(
                    self._preset(f"{pair}/{method}", own_models, [shared, part, of_pair, own])
                )
        return made

    def _teachers(self) -> Iterator[tuple[str, _Part, _Part]]:
        """Name, what all have, and its own part, of every teacher that is trained itself."""
        if "teachers" not in self.root:
            return
        teachers = self._mapping(
            self.root["teachers"], "teachers", {"source", "settings", "conflicts", "models"}
        )
        common = self._part(teachers, "teachers", {"source", "settings", "conflicts"}, {"models"})
        for model, cell in self._items(teachers["models"], "teachers.models"):
            yield (
                model,
                common,
                self._part(cell, f"teachers.models.{model}", {"published", "conflicts"}),
            )

    def _teacher(self, model: str, shared: _Part, common: _Part, own: _Part) -> Preset:
        models = {"student": self._model(model, f"teachers.models.{model}"), "teacher": None}
        return self._preset(f"teacher/{model}", models, [shared, common, own])

    def _model(self, name: str, key: str) -> str:
        """A model's full name: "models" has what stands before all, or every one by its own."""
        models = self.root["models"]
        if not isinstance(models, dict):
            return self._text(models, "models") + name
        if name not in models:
            raise self._error(key, f"has {name}, which models lacks")
        return self._text(models[name], f"models.{name}")

    def _without(self, content: Any, key: str, methods: Iterable[str]) -> list[str]:
        """The methods that a pair has not, for which nothing was published."""
        if "without" not in dict(self._items(content, key)):
            return []
        without = content["without"]
        known = isinstance(without, list) and without and all(name in methods for name in without)
        if not known:
            raise self._error(f"{key}.without", f"must be a list of methods, got {without!r}")
        return without

    def _preset(self, name: str, models: dict[str, Any], parts: list[_Part]) -> Preset:
        settings: dict[str, Any] = {}
        inferred: dict[str, str] = {}
        for part in parts:
            for key, value in part.settings.items():
                settings[key] = value
                inferred.pop(key, None)
            inferred.update(part.inferred)
        wanted = _wanted(settings)
        # What stands first is for all, and they take what they need; the rest was meant.
        needless = set(parts[0].settings).difference(wanted, *(p.settings for p in parts[1:]))
        settings = {key: value for key, value in settings.items() if key not in needless}
        inferred = {key: value for key, value in inferred.items() if key not in needless}
        for problem, keys in (
            ("lacks", wanted - set(settings)),
            ("has no use for", set(settings) - wanted),
        ):
            if keys:
                raise self._error(name, f"{problem} {', '.join(sorted(keys))}")
        settings = models | settings
        order = ["task", *models, *(key for key in SETTINGS if key != "task")]
        return Preset(
            name=f"{self.table}/{name}",
            source=next(part.source for part in reversed(parts) if part.source),
            # What is particular first.
            conflicts=tuple(text for part in reversed(parts) for text in part.conflicts),
            published=parts[-1].published,
            settings={key: settings[key] for key in order if key in settings},
            inferred=inferred,
        )

    def _part(
        self,
        content: Any,
        key: str,
        known: set[str],
        ignore: set[str] | None = None,
        may_lack: Collection[str] = (),
    ) -> _Part:
        """A mapping with some of the keys of :class:`_Part`.

        Where ``ignore`` is None the settings stand in it themselves; else they stand under
        "settings", and the keys to ignore are those that are read elsewhere.
        """
        part = _Part()
        flat = ignore is None
        dot = f"{key}." if key else ""
        for name, value in self._items(content, key):
            place = f"{dot}{name}"
            if name == "published" and name in known:
                part.published = _given(float, value)
                if part.published is None:
                    raise self._error(place, f"must be a number, got {value!r}")
            elif name == "source" and name in known:
                part.source = self._text(value, place)
            elif name == "conflicts" and name in known:
                if not isinstance(value, list) or not value:
                    raise self._error(place, f"must be a list of sentences, got {value!r}")
                part.conflicts = [self._text(text, place) for text in value]
            elif name == "settings" and name in known:
                for setting, given in self._items(value, place):
                    self._setting(part, setting, given, f"{place}.{setting}")
            elif flat:
                self._setting(part, name, value, place)
            elif name not in ignore:
                raise self._error(place, f"is not known; there are {', '.join(sorted(known))}")
        if "source" in known and "source" not in may_lack and not part.source:
            raise self._error(key, "lacks source")
        return part

    def _setting(self, part: _Part, name: str, value: Any, place: str) -> None:
        if name not in SETTINGS:
            close = difflib.get_close_matches(name, SETTINGS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise self._error(place, f"is no setting{hint}")
        if isinstance(value, dict):
            self._mapping(value, place, {"value", "inferred", "reason"})
            if value["inferred"] is not True:
                raise self._error(f"{place}.inferred", f"must be true, got {value['inferred']!r}")
            part.inferred[name] = self._text(value["reason"], f"{place}.reason")
            value = value["value"]
        part.settings[name] = _given(SETTINGS[name], value)
        if part.settings[name] is None:
            raise self._error(place, f"must be {in_words(SETTINGS[name])}, got {value!r}")

    def _mapping(
        self, value: Any, key: str, keys: set[str], optional: Collection[str] = ()
    ) -> dict[str, Any]:
        """A mapping with exactly these keys, and perhaps the optional ones."""
        for problem, others in (
            ("lacks", keys - dict(self._items(value, key)).keys()),
            ("has unknown keys:", value.keys() - keys - set(optional)),
        ):
            if others:
                raise self._error(key, f"{problem} {', '.join(sorted(map(str, others)))}")
        return value

    def _items(self, value: Any, key: str) -> list[tuple[str, Any]]:
        if not isinstance(value, dict) or not value:
            raise self._error(key, f"must be a mapping, got {value!r}")
        for name in value:
            if not isinstance(name, str):
                raise self._error(key, f"must have texts as keys, got {name!r}")
        return list(value.items())

    def _text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value:
            raise self._error(key, f"must be a text, got {value!r}")
        return value

    def _error(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.file}: {f'{key} ' if key else ''}{problem}")

    def _parse(self, text: str) -> Any:
        try:
            import yaml
        except ImportError as error:
            raise ModuleNotFoundError(
                "presets need PyYAML, which is not installed: pip install 'dnkd_ext[train]'"
            ) from error

        class Loader(yaml.SafeLoader):
            """A key that stands twice is an error, where YAML's own readers take the last."""

        def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
            keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    line = node.value[place][0].start_mark.line + 1
                    raise ValueError(f"{self.file}: line {line} has {key!r} a second time")
            return loader.construct_mapping(node, deep=True)

        Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{self.file} is not YAML: {error}") from error


@functools.cache
def _presets() -> dict[str, Preset]:
    folder = resources.files("dnkd_ext.train") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {
        preset.name: preset
        for file in files
        for preset in _File(
            file.name, file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")
        ).presets()
    }
