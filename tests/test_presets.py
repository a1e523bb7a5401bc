"""Published experiments by name, against the tables they were taken from."""

from __future__ import annotations

import sys

import pytest

from dnkd_ext.train import presets
from dnkd_ext.train.models import model_names
from dnkd_ext.train.presets import (
    describe,
    expand,
    format_presets,
    load_preset,
    preset_names,
)

pytest.importorskip("yaml")

# Typed again from the paper's description, not read from the file.
PAIRS = [
    "resnet56-resnet20",
    "resnet32x4-resnet8x4",
    "wrn_40_2-wrn_40_1",
    "resnet50-mobilenetv2",
    "resnet32x4-shufflenetv1",
    "resnet32x4-shufflenetv2",
]
LR = [0.1, 0.1, 0.1, 0.02, 0.02, 0.02]
WEIGHTS = {
    "kd++": [(1, 2), (3.5, 2), (1, 1.5), (3, 0.5), (2.5, 1.5), (4, 0.5)],
    "dist++": [(2, 1), (1.5, 4), (2.5, 3), (7, 1), (2.5, 3), (3, 4)],
    "reviewkd++": [(1.2, 1), (8, 1), (5, 4), (6, 2), (7, 1), (8, 1.5)],
}
DKD_PLUS = [(2.5, 4, 3.5), (2, 8, 0.5), (1, 6, 1), (0.5, 8, 1), (0.5, 8, 4), (0.5, 6, 0.5)]
DKD_BETA = [2, 8, 6, 8, 8, 8]
REVIEWKD = [0.6, 5, 5, 5, 5, 8]
PUBLISHED = {
    "teacher": [72.34, 79.42, 75.61, 79.34, 79.42, 79.42],
    "ce": [69.06, 72.50, 71.98, 64.60, 70.50, 71.82],
    "kd": [70.66, 73.33, 73.54, 67.65, 74.07, 74.45],
    "kd++": [72.53, 75.54, 74.59, 70.10, 75.45, 76.42],
    "dkd": [71.97, 75.44, 74.81, 70.35, 76.45, 77.07],
    "dkd++": [72.16, 76.28, 75.02, 70.82, 77.11, 77.49],
    "dist": [71.78, 75.79, 74.42, 69.17, 75.23, 76.08],
    "dist++": [72.52, 76.13, 75.00, 69.80, 75.60, 76.64],
    "reviewkd": [71.89, 75.63, 75.09, 69.89, 77.45, 77.78],
    "reviewkd++": [72.05, 76.07, 75.66, 70.45, 77.68, 77.93],
}
METHODS = [name for name in PUBLISHED if name != "teacher"]
SHARED = {
    "task": "cifar",
    "epochs": 240,
    "batch_size": 128,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "milestones": (150, 180, 210),
    "lr_decay": 0.1,
    "pad": 4,
    "flip": True,
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
}


def expected(row, method):
    """All settings of a method for a pair."""
    teacher, student = (f"cifar_{name}" for name in PAIRS[row].split("-"))
    kind = method.removesuffix("++")
    settings = SHARED | {
        "student": student,
        "teacher": None if method == "ce" else teacher,
        "method": kind,
        "lr": LR[row],
        "ce_weight": 1.0,
        "kd_weight": 1.0,
        "nd_weight": 0.0,
    }
    if method == "ce":
        return settings | {"kd_weight": 0.0}
    settings["kd_warm_up"] = 0 if method in ("kd", "dist") else 20
    if kind != "reviewkd":
        settings["temperature"] = 4.0
    if method in WEIGHTS:
        settings["kd_weight"], settings["nd_weight"] = WEIGHTS[method][row]
    if kind == "dist":
        settings |= {"beta": 1.0, "gamma": 1.0}
    if method == "kd":
        settings |= {"ce_weight": 0.1, "kd_weight": 0.9}
    elif method == "dkd":
        settings |= {"alpha": 1.0, "beta": DKD_BETA[row]}
    elif method == "dkd++":
        settings["alpha"], settings["beta"], settings["nd_weight"] = DKD_PLUS[row]
    elif method == "dist":
        settings["kd_weight"] = 2.0
    elif method == "reviewkd":
        settings["kd_weight"] = REVIEWKD[row]
    return settings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", range(6))
def test_the_published_numbers(row, method):
    preset = load_preset(f"cifar100/{PAIRS[row]}/{method}")
    assert preset.settings == expected(row, method)
    assert preset.published == PUBLISHED[method][row]


@pytest.mark.parametrize("row", range(6))
def test_teachers(row):
    teacher = PAIRS[row].split("-")[0]
    preset = load_preset(f"cifar100/teacher/{teacher}")
    assert preset.published == PUBLISHED["teacher"][row]
    own = {"student": f"cifar_{teacher}", "lr": 0.1}
    assert preset.settings == expected(row, "ce") | own


def test_names():
    teachers = ["resnet56", "resnet32x4", "wrn_40_2", "resnet50"]
    wanted = [f"cifar100/teacher/{name}" for name in teachers]
    wanted += [f"cifar100/{pair}/{method}" for pair in PAIRS for method in METHODS]
    assert preset_names() == wanted


def test_all_have_their_source_and_types():
    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert preset.source
        assert any("2 x 64" in text for text in preset.conflicts)
        assert any("lr 0.05, or 0.01" in text for text in preset.conflicts)
        assert preset.settings["student"] in model_names()
        assert preset.settings["teacher"] in (None, *model_names())
        for key, value in preset.settings.items():
            if key.endswith("_weight") or key in ("alpha", "beta", "gamma", "temperature", "lr"):
                assert type(value) is float
        assert set(preset.inferred) <= set(preset.settings)


def test_inferred():
    """The learning rates of the second and fourth row, and a weight that no script has."""
    by_name = {name: set(load_preset(name).inferred) for name in preset_names()}
    for row, pair in enumerate(PAIRS):
        for method in METHODS:
            wanted = {"lr"} if row in (1, 3) else set()
            if (row, method) == (3, "reviewkd"):
                wanted.add("kd_weight")
            assert by_name[f"cifar100/{pair}/{method}"] == wanted
    assert by_name["cifar100/teacher/resnet56"] == set()


def test_a_preset_may_be_changed():
    load_preset("cifar100/resnet56-resnet20/kd").settings["lr"] = 7
    assert load_preset("cifar100/resnet56-resnet20/kd").settings["lr"] == 0.1


@pytest.mark.parametrize(
    ("pattern", "count", "some"),
    [
        ("cifar100/resnet56-resnet20/kd++", 1, "cifar100/resnet56-resnet20/kd++"),
        ("cifar100/resnet56-resnet20/{ce,kd,kd++}", 3, "cifar100/resnet56-resnet20/ce"),
        ("cifar100/*/kd", 6, "cifar100/wrn_40_2-wrn_40_1/kd"),
        ("cifar100/*/*++", 24, "cifar100/resnet56-resnet20/dist++"),
        ("cifar100/{resnet56,wrn}*/{ce,{,d}kd{,++}}", 10, "cifar100/wrn_40_2-wrn_40_1/dkd++"),
        ("cifar100/teacher/resnet5[06]", 2, "cifar100/teacher/resnet50"),
        ("cifar100/teacher/resnet5?", 2, "cifar100/teacher/resnet56"),
        ("*/*/*", 58, "cifar100/teacher/resnet56"),
        ("cifar100/teacher/{*,resnet56}", 4, "cifar100/teacher/resnet56"),
    ],
)
def test_expand(pattern, count, some):
    found = expand(pattern)
    assert len(found) == len(set(found)) == count
    assert some in found


def test_the_order_is_the_patterns():
    pair = "cifar100/resnet56-resnet20"
    assert expand(pair + "/{kd++,ce}") == [f"{pair}/kd++", f"{pair}/ce"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("cifar100/resnet56-resnet20/kdd++", r"no preset 'cifar.*kdd\+\+'; close are: .*/kd\+\+"),
        ("cifar100/resnet56-resnet20/{ce,fitnet}", "no preset 'cifar.*/fitnet'"),
        ("cifar100/*", r"no preset 'cifar100/\*'"),
        ("imagenet/*/kd", r"no preset 'imagenet/\*/kd'"),
        ("", "no preset ''. dnkd presets lists all"),
        ("cifar100/x/{ce,kd", "opens a brace that it does not close"),
        ("cifar100/x/ce}", "closes a brace that it does not open"),
        ("cifar100/{x/{ce}", "opens a brace that it does not close"),
    ],
)
def test_patterns_of_nothing(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(pattern)


def test_an_unknown_name():
    for call in (load_preset, describe, lambda name: format_presets([name])):
        with pytest.raises(ValueError, match=r"no preset 'x/y'\. dnkd presets lists all"):
            call("x/y")


def test_the_table():
    names = ["cifar100/resnet56-resnet20/dkd++", "cifar100/resnet32x4-resnet8x4/ce"]
    head, first, second, note = format_presets(names).splitlines()
    columns = "preset lr ce kd nd alpha beta gamma T ramp published"
    assert head.split() == columns.split()
    assert " ".join(first.split()) == f"{names[0]} 0.1 1 1 3.5 2.5 4 - 4 20 72.16"
    assert " ".join(second.split()) == f"{names[1]} 0.1* 1 0 0 - - - - - 72.50"
    assert note.startswith("* inferred")
    assert len(format_presets(names[:1]).splitlines()) == 2


def test_the_description():
    text = describe("cifar100/resnet50-mobilenetv2/reviewkd")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    preset = load_preset("cifar100/resnet50-mobilenetv2/reviewkd")
    for wanted in ("published: 69.89 % top-1, the best epoch's", "kd_weight 5", "flip yes"):
        assert wanted in lines
    together = " ".join(lines)
    for sentence in (preset.source, *preset.conflicts, *preset.inferred.values()):
        assert sentence in together
    assert max(map(len, text.splitlines())) <= 100


# -- the file -------------------------------------------------------------------------------------

TABLE = """
models: cifar_
settings:
  {task: cifar, epochs: 2, batch_size: 8, momentum: 0.9, nesterov: true, weight_decay: 0.1,
   milestones: [1], lr_decay: 0.1, pad: 4, flip: true, mean: [0.5], std: [0.5]}
conflicts: [They differ.]
methods:
  ce:
    source: someone
    settings: {method: ce, ce_weight: 1, kd_weight: 0, nd_weight: 0}
pairs:
  a-b:
    settings: {lr: 1}
    ce: {published: 5}
teachers:
  source: someone
  settings: {method: ce, ce_weight: 1, kd_weight: 0, nd_weight: 0}
  conflicts: [They do.]
  models:
    a: {lr: {value: 2, inferred: true, reason: Why not.}, conflicts: [This one.]}
"""


def read(text):
    return {preset.name: preset for preset in presets._File("t.yaml", "t", text).presets()}


def test_a_small_file():
    found = read(TABLE)
    assert list(found) == ["t/teacher/a", "t/a-b/ce"]
    teacher = found["t/teacher/a"]
    assert teacher.conflicts == ("This one.", "They do.", "They differ.")
    assert teacher.inferred == {"lr": "Why not."}
    assert teacher.published is None
    assert teacher.settings["lr"] == 2.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{lr: 1}", "{lr: fast}", "pairs.a-b.settings.lr must be a number, got 'fast'"),
        ("{lr: 1}", "{lr: 1e-2}", "pairs.a-b.settings.lr must be a number, got '1e-2'"),
        ("{lr: 1}", "{lr: true}", "pairs.a-b.settings.lr must be a number, got True"),
        ("{lr: 1}", "{lr: .inf}", "pairs.a-b.settings.lr must be a number, got inf"),
        ("{lr: 1}", "{lr: 1, gama: 1}", "settings.gama is no setting; did you mean gamma?"),
        ("{lr: 1}", "{lr: 1, alpha: 1}", "a-b/ce has no use for alpha"),
        ("{lr: 1}", "{lr: 1, lr: 2}", "line 13 has 'lr' a second time"),
        ("{lr: 1}", "{pad: 1}", "a-b/ce lacks lr"),
        ("{lr: 1}", "[lr]", "pairs.a-b.settings must be a mapping, got ['lr']"),
        ("epochs: 2", "epochs: 2.5", "settings.epochs must be an integer, got 2.5"),
        ("flip: true", "flip: 1", "settings.flip must be true or false, got 1"),
        ("[1]", "[1, 2.0]", "settings.milestones must be a list of integers, got [1, 2.0]"),
        ("[1]", "1", "settings.milestones must be a list of integers, got 1"),
        ("task: cifar", "task: images", "settings.task must be one of cifar, got 'images'"),
        ("{method: ce", "{method: fit", "methods.ce.settings.method must be one of ce, kd, "),
        ("    source: someone", "    sauce: someone", "methods.ce.sauce is not known; there are"),
        ("    source: someone\n", "", "methods.ce lacks source"),
        ("    source: someone", "    source: 3", "methods.ce.source must be a text, got 3"),
        ("published: 5", "published: good", "pairs.a-b.ce.published must be a number, got 'good'"),
        ("[They differ.]", "They differ.", "conflicts must be a list of sentences, got 'They"),
        ("[They differ.]", "[7]", "conflicts must be a text, got 7"),
        ("    ce: {published: 5}\n", "", "pairs.a-b lacks ce"),
        ("    ce: {published", "    kd: {}\n    ce: {published", "pairs.a-b has unknown keys: kd"),
        ("a-b", "ab", "pairs.ab must be TEACHER-STUDENT"),
        ("inferred: true", "inferred: false", "models.a.lr.inferred must be true, got False"),
        (", reason: Why not.", "", "teachers.models.a.lr lacks reason"),
        ("models: cifar_", "modells: cifar_", "t.yaml: lacks models"),
        ("models: cifar_", "models: cifar_\nmore: 1", "t.yaml: has unknown keys: more"),
        ("models: cifar_", "1: 2\nmodels: cifar_", "t.yaml: must have texts as keys, got 1"),
        ("models: cifar_", "models: [", "t.yaml is not YAML"),
        ("models: cifar_", "models: !!python/name:os.system", "t.yaml is not YAML"),
    ],
)
def test_a_file_with_a_mistake(old, new, message):
    assert old in TABLE
    with pytest.raises(ValueError, match=r"^t\.yaml") as caught:
        read(TABLE.replace(old, new, 1))
    assert message in str(caught.value)


def test_without_yaml(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"presets need PyYAML.*pip install 'dnkd_ext\[train\]'"):
        read(TABLE)
