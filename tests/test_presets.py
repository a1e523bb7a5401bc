"""Published experiments by name, against the tables they were taken from."""

from __future__ import annotations

import sys

import pytest

from dnkd_ext.train import presets
from dnkd_ext.train.config import TrainConfig, flatten, replace
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


# Likewise. Weights are kd and nd, or alpha, beta and nd; the first accuracy is that of the ++.
IMAGENET = {
    "resnet34-resnet18": {
        "kd++": ((2.5, 1), 71.98, 70.66),
        "dkd++": ((0.8, 0.5, 1), 72.07, 71.70),
        "reviewkd++": ((1, 3), 71.64, 71.62),
    },
    "resnet50-resnet18": {
        "kd++": ((4, 1), 72.49, 71.35),
        "dkd++": ((0.6, 0.5, 2), 72.11, 71.85),
        "reviewkd++": ((3, 2), 71.73, 71.09),
    },
    "resnet101-resnet18": {
        "kd++": ((3.5, 4), 72.54, 71.09),
        "dkd++": ((0.8, 0.5, 1), 72.29, 72.08),
        "reviewkd++": ((3, 1), 71.79, 70.95),
    },
    "resnet152-resnet18": {
        "kd++": ((4, 2), 72.59, 71.13),
        "dkd++": ((1, 1, 1), 72.47, 71.87),
        "reviewkd++": ((3, 1), 71.86, 71.39),
    },
    "resnet50-mobilenetv1": {
        "kd++": ((4, 1), 72.77, 70.50),
        "dkd++": ((0.8, 1, 1), 72.63, 72.05),
        "reviewkd++": ((8, 4), 72.96, 72.56),
    },
    "vit_small-resnet18": {
        "kd++": ((1.5, 1), 71.46, 71.32),
        "dkd++": ((1, 1, 2), 71.33, 71.21),
    },
    "vit_base-resnet18": {
        "kd++": ((2, 1), 71.84, 71.63),
        "dkd++": ((1.4, 0.5, 2), 71.69, 71.62),
    },
}
TIMM = {
    "mobilenetv1": "mobilenetv1_100",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_base": "deit_base_distilled_patch16_224",
}
IMAGENET_SHARED = {
    "task": "imagenet",
    "epochs": 100,
    "batch_size": 512,
    "optimizer": "sgd",
    "lr": 0.2,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "decay_vectors": True,
    "schedule": "multistep",
    "milestones": (30, 60, 90),
    "lr_decay": 0.1,
    "nd_ramp": False,
    "label_smoothing": 0.0,
    "image_size": 224,
    "scale": (0.08, 1.0),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "hflip": 0.5,
    "auto_augment": "",
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "zero_init_last": False,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
DEIT = "regnety_160-deit_base"
IMAGENET_CELLS = [
    (pair, method)
    for pair, row in IMAGENET.items()
    for method in ("ce", *(m for plus in row for m in (plus.removesuffix("++"), plus)))
] + [(DEIT, "kd"), (DEIT, "kd++")]


@pytest.mark.parametrize(("pair", "method"), IMAGENET_CELLS[:-2])
def test_the_published_numbers_of_imagenet(pair, method):
    teacher, student = (TIMM.get(name, name) for name in pair.split("-"))
    kind, small = method.removesuffix("++"), student == "mobilenetv1_100"
    settings = IMAGENET_SHARED | {"student": student, "teacher": teacher, "method": kind}
    settings |= {"ce_weight": 1.0, "kd_weight": 1.0, "nd_weight": 0.0}
    if method == "ce":
        settings |= {"teacher": None, "kd_weight": 0.0}
        published = 68.87 if small else 69.76
    else:
        weights, *accuracies = IMAGENET[pair][kind + "++"]
        published = accuracies[0 if method.endswith("++") else 1]
        settings["kd_warm_up"] = 5 if method.endswith("++") else 0
    if kind in ("kd", "dkd"):
        settings["temperature"] = 1.0
    if kind == "reviewkd":
        settings["mid_channels"] = 256 if small else 512
    if method == "kd":
        settings |= {"ce_weight": 0.5, "kd_weight": 0.5}
    elif method == "dkd":
        settings |= {"alpha": 1.0, "beta": 2.0 if small else 0.5}
    elif method == "reviewkd":
        settings["kd_weight"] = 8.0 if small else 1.0
    elif method == "dkd++":
        settings["alpha"], settings["beta"], settings["nd_weight"] = weights
        settings["nd_ramp"] = True
    elif method != "ce":
        settings["kd_weight"], settings["nd_weight"] = weights
    preset = load_preset(f"imagenet/{pair}/{method}")
    assert preset.settings == settings
    assert preset.published == published


@pytest.mark.parametrize(("method", "nd", "published"), [("kd", 0, 83.35), ("kd++", 1.5, 83.6)])
def test_the_published_numbers_of_deit(method, nd, published):
    preset = load_preset(f"imagenet/{DEIT}/{method}")
    wanted = IMAGENET_SHARED | {
        "student": "deit_base_distilled_patch16_224",
        "teacher": "regnety_160",
        "method": "hard_kd",
        "ce_weight": 1.0,
        "kd_weight": 0.5,
        "nd_weight": nd,
        "kd_warm_up": 5,
        "epochs": 300,
        "batch_size": 2048,
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "lr": 8e-4,  # 1e-4 * 2048 / 256
        "weight_decay": 0.3,
        "decay_vectors": False,
        "schedule": "cosine",
        "lr_warm_up": 20,
        "lr_end": 1e-6,
        "cosine_after_warm_up": True,
        "label_smoothing": 0.1,
        "interpolation": "bicubic",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "drop_path": 0.1,
    }
    for name in ("momentum", "nesterov", "milestones", "lr_decay"):
        del wanted[name]
    assert preset.settings == wanted
    assert preset.published == published


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet101-resnet18/dkd++", "README.md has an ND weight of 2"),
        ("resnet50-mobilenetv1/dkd++", "beta of 0.5"),
        ("resnet50-mobilenetv1/reviewkd++", "6 for ReviewKD and 1 for the ND loss"),
        ("vit_small-resnet18/dkd++", "alpha 1.4, beta 0.5 and 2 for the ND loss"),
        ("vit_small-resnet18/kd++", "mean and standard deviation are 0.5"),
        ("vit_base-resnet18/dkd++", "ramps the ND loss, too"),
        ("vit_base-resnet18/dkd++", "makes no projector for ViT teachers"),
        ("vit_small-resnet18/kd++", "augreg_in21k_ft_in1k"),
        ("resnet34-resnet18/dkd++", "ramps the ND loss, too"),
        ("resnet34-resnet18/reviewkd++", "eight places for seven values"),
        ("resnet101-resnet18/kd", "timm's resnet101.tv_in1k"),
        ("resnet152-resnet18/kd", "timm's resnet152.tv_in1k"),
        (f"{DEIT}/kd", "300 epochs, the table of their README 200"),
        (f"{DEIT}/kd", "the tokens and the position embedding, of three, have none either"),
        (f"{DEIT}/kd++", "mix the class means of the batch's samples, not of all classes"),
    ],
)
def test_conflicts_of_imagenet(name, text):
    assert any(text in conflict for conflict in load_preset(f"imagenet/{name}").conflicts)


def test_sources_of_imagenet():
    """A cell's own source is not beside what is said of its method's."""
    assert "DeiT/train.sh" in load_preset(f"imagenet/{DEIT}/kd").source
    assert not any("mdistiller" in text for text in load_preset(f"imagenet/{DEIT}/kd").conflicts)
    assert "ViT/train.sh and train_kd.py" in load_preset("imagenet/vit_base-resnet18/kd++").source
    assert "mdistiller" in load_preset("imagenet/vit_base-resnet18/kd").source


def test_inferred_of_imagenet():
    """The weights of the methods that others published for two of the pairs alone."""
    weights = {"kd": {"ce_weight", "kd_weight"}, "dkd": {"beta"}, "reviewkd": {"kd_weight"}}
    known = ("resnet34-resnet18", "resnet50-mobilenetv1", DEIT)
    for pair, method in IMAGENET_CELLS:
        wanted = set() if pair in known else weights.get(method, set())
        assert set(load_preset(f"imagenet/{pair}/{method}").inferred) == wanted


def test_models_of_imagenet_are_timms():
    timm = pytest.importorskip("timm")
    for pair, _ in IMAGENET_CELLS:
        for name in pair.split("-"):
            assert timm.is_model(TIMM.get(name, name))


def test_settings_are_those_of_a_run():
    for name in preset_names():
        settings = load_preset(name).settings
        config = flatten(replace(TrainConfig(), settings))
        assert all(
            config[key] == (list(value) if isinstance(value, tuple) else value)
            for key, value in settings.items()
        )


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("cifar100/resnet56-resnet20/kd++", ["--lr", "0.05"], 72.53),
        ("cifar100/resnet56-resnet20/ce", [], 69.06),
        ("cifar100/teacher/resnet56", ["--epochs", "9"], 72.34),
        ("imagenet/resnet34-resnet18/kd++", ["--teacher", "resnet34.tv_in1k"], 71.98),
        ("imagenet/resnet34-resnet18/kd++", ["--teacher", "resnet50.tv_in1k"], None),
        ("cifar100/resnet56-resnet20/kd++", ["--student", "cifar_resnet32"], None),
        ("cifar100/resnet56-resnet20/kd++", ["--method", "dist"], None),
        ("cifar100/resnet56-resnet20/kd++", ["--nd-weight", "0"], None),
        ("cifar100/resnet56-resnet20/kd++", ["--nd-weight", "1"], 72.53),
        ("cifar100/teacher/resnet56", ["--student", "cifar_resnet110"], None),
        # A teacher that is given for those of several presets that have one.
        (
            "imagenet/resnet34-resnet18/{ce,kd++}",
            ["--teacher", "resnet34.tv_in1k", "--teacher-weights", "pretrained"],
            [69.76, 71.98],
        ),
    ],
)
def test_what_is_published_is_for_models_and_method_of_the_preset(
    monkeypatch, name, options, published
):
    pytest.importorskip("tyro")
    from dnkd_ext.cli import main
    from dnkd_ext.train import jobs

    planned = []
    monkeypatch.setattr(jobs, "run_jobs", lambda jobs, *_, **__: planned.extend(jobs))
    command = ["train", "--data", "x", "--out", "y", "--device", "cpu", "--preset", name, *options]
    assert main(command) == 0
    wanted = published if isinstance(published, list) else [published]
    assert [job.published for job in planned] == wanted


def test_what_is_published_is_every_presets_own():
    pytest.importorskip("tyro")
    from dnkd_ext.train.arguments import _published
    from dnkd_ext.train.config import TrainConfig, replace

    for name in preset_names():
        preset = load_preset(name)
        config = replace(TrainConfig(), {"preset": name, **preset.settings})
        assert _published(config) == preset.published, name


def test_options_of_the_teacher_are_for_presets_that_have_one(monkeypatch, capsys):
    pytest.importorskip("tyro")
    from dnkd_ext.cli import main
    from dnkd_ext.train import jobs

    planned = []
    monkeypatch.setattr(jobs, "run_jobs", lambda jobs, *_, **__: planned.extend(jobs))
    command = ["train", "--data", "x", "--out", "y", "--device", "cpu"]
    command += ["--teacher", "resnet34.tv_in1k", "--teacher-weights", "pretrained"]
    pair = "imagenet/resnet34-resnet18"
    assert main([*command, "--preset", f"{pair}/{{ce,kd,kd++}}", "--class-means", "z"]) == 0
    for job in planned:
        job.config.check()
    models = [job.config.model for job in planned]
    wanted = ("resnet34.tv_in1k", "pretrained", "z")
    assert [(m.teacher, m.teacher_weights, m.class_means) for m in models] == [
        (None, None, None),
        wanted,
        wanted,
    ]
    # Class means that follow the teacher are for those with the ND loss.
    planned.clear()
    pattern = f"{pair}/{{ce,kd,kd++}}"
    assert main([*command, "--preset", pattern, "--class-means-momentum", "0.9"]) == 0
    for job in planned:
        job.config.check()
    assert [job.config.model.class_means_momentum for job in planned] == [None, None, 0.9]
    # Every teacher has paths of its own, by the name that it has in the preset.
    planned.clear()
    paths = ["--teacher-weights", "runs/{teacher}/seed-0", "--class-means", "{teacher}.safetensors"]
    pattern = "cifar100/{resnet56-resnet20,wrn_40_2-wrn_40_1}/{ce,kd++}"
    assert main([*command[:-4], *paths, "--preset", pattern]) == 0
    models = [job.config.model for job in planned]
    assert [(m.teacher_weights, m.class_means) for m in models] == [
        (None, None),
        ("runs/resnet56/seed-0", "resnet56.safetensors"),
        (None, None),
        ("runs/wrn_40_2/seed-0", "wrn_40_2.safetensors"),
    ]
    # Or by the name of another that is given.
    planned.clear()
    pattern = "cifar100/resnet56-resnet20/kd"
    other = ["--teacher", "cifar_resnet110", *paths]
    assert main([*command[:-4], *other, "--preset", pattern]) == 0
    assert planned[0].config.model.teacher_weights == "runs/cifar_resnet110/seed-0"
    # Of those that have none it is a mistake.
    planned.clear()
    assert main([*command, "--preset", f"{pair}/ce"]) == 0
    with pytest.raises(ValueError, match=r"--teacher resnet34\.tv_in1k has no part in --method ce"):
        planned[0].config.check()


def test_names():
    teachers = ["resnet56", "resnet32x4", "wrn_40_2", "resnet50"]
    wanted = [f"cifar100/teacher/{name}" for name in teachers]
    wanted += [f"cifar100/{pair}/{method}" for pair in PAIRS for method in METHODS]
    wanted += ["coco/teacher/r101", "coco/teacher/r50"]
    wanted += [f"coco/{pair}/{method}" for pair in COCO for method in COCO_METHODS]
    wanted += [f"imagenet/{pair}/{method}" for pair, method in IMAGENET_CELLS]
    assert preset_names() == wanted


def test_all_have_their_source_and_types():
    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert preset.source
        if name.startswith("cifar100/"):
            assert any("2 x 64" in text for text in preset.conflicts)
            assert any("lr 0.05, or 0.01" in text for text in preset.conflicts)
            assert preset.settings["student"] in model_names()
            assert preset.settings["teacher"] in (None, *model_names())
        for key, value in preset.settings.items():
            if key.endswith("_weight") or key in ("alpha", "beta", "gamma", "temperature", "lr"):
                assert type(value) is float
        assert set(preset.inferred) <= set(preset.settings)


# Likewise: kd and nd of KD++ and of ReviewKD++, and kd of ReviewKD alone.
COCO = {
    "r101-r18": ((1, 1.5), (1.2, 1.5), 1.2),
    "r101-r50": ((1, 1), (1.4, 1), 1),
    "r50-mv2": ((1, 1), (2.2, 1.5), 2),
}
COCO_METHODS = ("plain", "kd", "kd++", "dkd", "reviewkd", "reviewkd++")


@pytest.mark.parametrize("pair", COCO)
@pytest.mark.parametrize("method", COCO_METHODS)
def test_the_published_numbers_of_coco(pair, method):
    preset = load_preset(f"coco/{pair}/{method}")
    found = preset.settings
    plus, review, review_alone = COCO[pair]
    weights = {
        "plain": (0, 0),
        "kd": (1, 0),
        "kd++": plus,
        "dkd": (1, 0),
        "reviewkd": (review_alone, 0),
        "reviewkd++": review,
    }
    assert (found["kd_weight"], found["nd_weight"]) == weights[method]
    names = {"r18": "resnet18", "r50": "resnet50", "r101": "resnet101", "mv2": "mobilenet_v2"}
    teacher, student = (f"fasterrcnn_{names[name]}" for name in pair.split("-"))
    assert found["student"] == student
    assert found["teacher"] == (None if method == "plain" else teacher)
    # 180,000 steps of 8 images, milestones at 120,000 and 160,000, 1,000 steps of warm-up.
    epoch = found["epoch_steps"]
    assert [epoch * n for n in (found["epochs"], *found["milestones"])] == [180e3, 120e3, 160e3]
    assert epoch * found["lr_warm_up"] == 1000
    assert (found["batch_size"], found["lr"]) == (8, 0.01)
    if method not in ("plain", "reviewkd", "reviewkd++"):
        assert found["temperature"] == 1
    assert found.get("kd_warm_up", 0) == 0
    config = replace(TrainConfig(), found | {"data": "coco", "teacher_weights": "weights"})
    if method == "plain":
        config = replace(config, {"teacher_weights": None})
    config.check(2)
    assert any("Detectron2" in conflict for conflict in preset.conflicts)


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
        ("*/*/*", 125, "cifar100/teacher/resnet56"),
        ("imagenet/*/kd", 8, "imagenet/regnety_160-deit_base/kd"),
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
        ("imagenet/*/dist", r"no preset 'imagenet/\*/dist'"),
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


def test_the_description_of_imagenet():
    """Whose best epoch is not known; an empty text is shown as nothing."""
    lines = [" ".join(line.split()) for line in describe(f"imagenet/{DEIT}/kd").splitlines()]
    assert "published: 83.35 % top-1" in lines
    assert "betas 0.9 0.95" in lines
    assert "auto_augment -" in [
        " ".join(line.split()) for line in describe("imagenet/resnet34-resnet18/ce").splitlines()
    ]


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


NAMED = """
models: {a: alpha_net, b: beta_net}
settings:
  {task: imagenet, epochs: 2, batch_size: 8, optimizer: sgd, momentum: 0.9, nesterov: true,
   weight_decay: 0.1, decay_vectors: true, schedule: multistep, milestones: [1], lr_decay: 0.1,
   kd_warm_up: 1, temperature: 1, nd_ramp: false, label_smoothing: 0, image_size: 8,
   scale: [0.1, 1], crop_pct: 0.9, interpolation: bicubic, hflip: 0.5, auto_augment: "",
   random_erasing: 0, mixup: 0, cutmix: 0, drop_path: 0, zero_init_last: true, mean: [0.5],
   std: [0.5],
   betas: {value: [0.9, 0.99], inferred: true, reason: Usual.}}
conflicts: [They differ.]
methods:
  ce:
    source: someone
    settings: {method: ce, ce_weight: 1, kd_weight: 0, nd_weight: 0}
    conflicts: [Of the method.]
  kd:
    source: another
    settings: {method: kd, ce_weight: 1, kd_weight: 1, nd_weight: 0}
pairs:
  a-b:
    settings: {lr: 1}
    conflicts: [Of the pair.]
    ce: {published: 5}
    kd: {published: 6}
  b-a:
    settings: {lr: 1, optimizer: adamw, schedule: cosine, lr_warm_up: 1, lr_end: 0,
       cosine_after_warm_up: false}
    without: [kd]
    ce: {source: a third, conflicts: [Of the cell.]}
"""


def test_a_file_without_teachers_and_with_named_models():
    found = read(NAMED)
    assert list(found) == ["t/a-b/ce", "t/a-b/kd", "t/b-a/ce"]
    ce, kd, other = found.values()
    assert (kd.settings["teacher"], kd.settings["student"]) == ("alpha_net", "beta_net")
    assert (ce.settings["teacher"], other.settings["student"]) == (None, "alpha_net")
    assert ce.conflicts == ("Of the pair.", "Of the method.", "They differ.")
    assert (other.source, other.conflicts) == ("a third", ("Of the cell.", "They differ."))
    # Of what stands first everyone has what it needs.
    assert "temperature" in kd.settings
    assert "temperature" not in ce.settings
    assert "betas" not in ce.settings
    assert "momentum" not in other.settings
    assert other.settings["betas"] == (0.9, 0.99)
    assert (ce.inferred, other.inferred) == ({}, {"betas": "Usual."})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a-b:", "c-b:", "pairs.c-b has c, which models lacks"),
        ("b: beta_net", "b: 3", "models.b must be a text, got 3"),
        ("without: [kd]", "without: [dkd]", "b-a.without must be a list of methods, got ['dkd']"),
        ("without: [kd]", "without: kd", "pairs.b-a.without must be a list of methods, got 'kd'"),
        ("without: [kd]\n", "without: [ce]\n    kd: {}\n", "pairs.b-a has unknown keys: ce"),
        ("    without: [kd]\n", "", "pairs.b-a lacks kd"),
        ("lr_warm_up: 1, ", "", "b-a/ce lacks lr_warm_up"),
        ("lr_warm_up: 1", "lr_warm_up: 1, lr_decay: 1", "b-a/ce has no use for lr_decay"),
        ("{lr: 1}", "{lr: 1, lr_end: 1}", "a-b/ce has no use for lr_end"),
        ("{lr: 1}", "{lr: 1, pad: 1}", "a-b/ce has no use for pad"),
        ("drop_path: 0, ", "", "a-b/ce lacks drop_path"),
        ("adamw", "adam", "optimizer must be one of sgd, adamw, got 'adam'"),
        ("[0.1, 1]", "[0.1]", "settings.scale must be a list of two numbers, got [0.1]"),
        ('auto_augment: ""', "auto_augment: 9", "settings.auto_augment must be a text, got 9"),
        ("a third", "", "pairs.b-a.ce.source must be a text, got None"),
    ],
)
def test_such_a_file_with_a_mistake(old, new, message):
    assert old in NAMED
    with pytest.raises(ValueError, match=r"^t\.yaml") as caught:
        read(NAMED.replace(old, new, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{lr: 1}", "{lr: fast}", "pairs.a-b.settings.lr must be a number, got 'fast'"),
        ("{lr: 1}", "{lr: 1e-2}", "pairs.a-b.settings.lr must be a number, got '1e-2'"),
        ("{lr: 1}", "{lr: true}", "pairs.a-b.settings.lr must be a number, got True"),
        ("{lr: 1}", "{lr: .inf}", "pairs.a-b.settings.lr must be a number, got inf"),
        ("{lr: 1}", f"{{lr: {10**400}}}", "pairs.a-b.settings.lr must be a number, got 1000"),
        ("{lr: 1}", "{lr: null}", "pairs.a-b.settings.lr must be a number, got None"),
        ("mean: [0.5]", "mean: null", "settings.mean must be a list of numbers, got None"),
        ("mean: [0.5]", "mean: [.nan]", "settings.mean must be a list of numbers, got [nan]"),
        ("mean: [0.5]", "mean: []", "settings.mean must be a list of numbers, got []"),
        ("{lr: 1}", "{lr: 1, gama: 1}", "settings.gama is no setting; did you mean gamma?"),
        ("{lr: 1}", "{lr: 1, alpha: 1}", "a-b/ce has no use for alpha"),
        ("{lr: 1}", "{lr: 1, lr: 2}", "line 13 has 'lr' a second time"),
        ("{lr: 1}", "{pad: 1}", "a-b/ce lacks lr"),
        ("{lr: 1}", "[lr]", "pairs.a-b.settings must be a mapping, got ['lr']"),
        ("epochs: 2", "epochs: 2.5", "settings.epochs must be an integer, got 2.5"),
        ("flip: true", "flip: 1", "settings.flip must be true or false, got 1"),
        ("[1]", "[1, 2.0]", "settings.milestones must be a list of integers, got [1, 2.0]"),
        ("[1]", "1", "settings.milestones must be a list of integers, got 1"),
        (
            "task: cifar",
            "task: images",
            "settings.task must be one of cifar, imagenet, det",
        ),
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
