"""Training from images on disk: every layout, every preset, resumption, soft targets, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dnkd_ext import ClassMeans, features
from dnkd_ext.cli import main
from dnkd_ext.train import gather
from dnkd_ext.train.checkpoint import load_checkpoint
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data import sources
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.engine import _Training
from dnkd_ext.train.evaluation import evaluate
from dnkd_ext.train.gather import find_parts, gather_class_means, remove_parts
from dnkd_ext.train.networks import build_model, fit_image_size, load_weights_for, try_out
from dnkd_ext.train.presets import load_preset, preset_names
from dnkd_ext.train.shared import Shared
from dnkd_ext.train.teacher import Teacher, cast_once, load_teacher, normalised_otherwise
from dnkd_ext.train.world import OtherProcessFailed, World
from tests.float64 import in_float64
from tests.pictures import CLASSES, TRAIN, VAL, cut_tiles, write, write_shards
from tests.runs import by_two_in_float64, log, near, same, succeeded, together, weights
from tests.sharded_worker import DIES

MISSING = [
    name
    for name in ("timm", "sklearn", "tyro", "yaml", "webdataset")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed, needed here: {', '.join(MISSING)}"
)

ALONE = World(0, 1, torch.device("cpu"))
SIZE = 32
LAYOUTS = ("folders", "tar", "shards")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same pictures in every layout, by its name."""
    root, tiles = tmp_path_factory.mktemp("data"), cut_tiles()
    for layout in ("folders", "tar"):
        write(root / layout, tiles, layout)
    write_shards(root / "shards", tiles)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of weights of a small network of timm's for these classes."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "resnet10t.safetensors"
    model = build_model("resnet10t", len(CLASSES), 3)
    model.fc.weight.data.mul_(20)
    save_file(model.state_dict(), path)
    return path


def options(folder: Path, out: Path, *more: str) -> list[str]:
    reader = ("--reader", "wds/pictures", "--workers", "1") if folder.name == "shards" else ()
    return [
        *("train", "--task", "imagenet", "--data", str(folder), "--out", str(out)),
        *("--device", "cpu", "--no-progress", "--no-tensorboard", "--student", "cifar_resnet20"),
        *("--image-size", str(SIZE), "--epochs", "2", "--batch-size", "8", "--lr", "0.02"),
        *("--milestones", "1", "--eval-batch-size", "6", "--workers", "0", *reader, *more),
    ]


def of(teacher: Path, *more: str) -> tuple[str, ...]:
    return (
        *("--teacher", "resnet10t", "--teacher-weights", str(teacher)),
        *("--method", "kd", "--nd-weight", "1.5", "--kd-warm-up", "1", *more),
    )


def run(arguments: list[str]) -> list[dict[str, str]]:
    assert main(arguments) == 0
    return log(Path(arguments[arguments.index("--out") + 1]))


# -- every layout ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory):
    """A run of every layout that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    for layout in LAYOUTS:
        run(options(data[layout], root / layout, *of(teacher)))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_and_goes_on(data, teacher, whole, tmp_path, monkeypatch, layout):
    arguments = options(data[layout], tmp_path, *of(teacher))
    batches = Classification.batches

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Classification, "batches", interrupted)
    assert main(arguments) == 128 + signal.SIGTERM
    assert len(log(tmp_path)) == 1
    monkeypatch.setattr(Classification, "batches", batches)
    rows = run([*arguments, "--resume"])
    assert rows == log(whole / layout)
    assert same(weights(tmp_path), weights(whole / layout))
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert [float(row["kd_ramp"]) for row in rows] == [0.0, 1.0]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["train_images"], result["test_images"]) == (4 * TRAIN, 4 * VAL)


def test_residual_blocks_may_begin_as_torchvisions():
    """timm's ResNets begin as identities; what has no residual blocks takes the option as well."""
    kept = build_model("resnet18", 10, 3)
    other = build_model("resnet18", 10, 3, zero_init_last=False)
    assert kept.layer3[1].bn2.weight.abs().max() == 0
    assert other.layer3[1].bn2.weight.min() == 1
    assert build_model("vit_tiny_patch16_224", 10, 3, zero_init_last=False) is not None
    with pytest.raises(ValueError, match="--drop-path is for models that have it"):
        build_model("vgg11", 10, 3, zero_init_last=False, drop_path=0.1)


def test_shards_gone_on_with_by_more_workers_are_other_images(
    data, whole, tmp_path, monkeypatch, recwarn
):
    """Which is told within an epoch; of files it makes no difference."""
    batches = Classification.batches

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    for layout in ("shards", "folders"):
        arguments = options(data[layout], tmp_path / layout)
        monkeypatch.setattr(Classification, "batches", interrupted)
        assert main(arguments) == 128 + signal.SIGTERM
        monkeypatch.setattr(Classification, "batches", batches)
        recwarn.clear()
        assert len(run([*arguments, "--workers", "2", "--resume"])) == 2
        told = [str(w.message) for w in recwarn if "--workers is 2, was" in str(w.message)]
        assert len(told) == (layout == "shards")


def test_folders_and_archives_are_the_same_images(whole):
    assert log(whole / "folders") == log(whole / "tar")
    assert same(weights(whole / "folders"), weights(whole / "tar"))


def test_evaluation_counts_every_image_once(data, whole, capsys):
    """With a last batch that is not full, against a plain loop over the files."""
    from dnkd_ext.train.data.loaders import EvalLoader
    from dnkd_ext.train.data.reader_options import ReaderOptions
    from dnkd_ext.train.data.readers import open_splits

    model = build_model("cifar_resnet20", len(CLASSES), 3)
    load_weights_for(model, whole / "folders" / "last.safetensors", SIZE)
    reader = ReaderOptions(image_size=SIZE, workers=0)
    options = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    hits = []
    splits = open_splits(str(data["folders"]), reader)
    with torch.no_grad():
        for images, target, mask in EvalLoader(splits.val, 1, reader, **options):
            assert mask.all()
            hits.append((model.eval()(images).argmax(1) == target).item())
    wanted = 100 * sum(hits) / len(hits)
    assert len(hits) == 4 * VAL
    assert float(log(whole / "folders")[-1]["test_top1"]) == pytest.approx(wanted, abs=1e-3)
    command = ["eval", "--task", "imagenet", "--data", str(data["folders"]), "--device", "cpu"]
    command += ["--model", "cifar_resnet20", "--weights", str(whole / "folders/last.safetensors")]
    command += ["--image-size", str(SIZE), "--workers", "0", "--eval-batch-size", "6"]
    assert main([*command, "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out)["test_top1"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_needs_the_validation_images_alone(data, layout, teacher, tmp_path, capsys):
    reader = ["--reader", "wds/pictures"] if layout == "shards" else []
    command = ["eval", "--task", "imagenet", "--model", "resnet10t", "--weights", str(teacher)]
    command += ["--image-size", str(SIZE), "--workers", "1", "--no-progress", "--device", "cpu"]
    assert main([*command, *reader, "--data", str(data[layout])]) == 0
    wanted = json.loads(capsys.readouterr().out)
    copy = tmp_path / "copy"
    shutil.copytree(data[layout], copy)
    training = list(copy.glob("*train*"))
    assert training
    for place in training:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    if layout == "shards":
        info = json.loads((copy / "_info.json").read_text())
        del info["splits"]["train"]
        (copy / "_info.json").write_text(json.dumps(info))
    assert main([*command, *reader, "--data", str(copy)]) == 0
    assert json.loads(capsys.readouterr().out) == wanted
    assert wanted["test_images"] == len(CLASSES) * VAL


def test_two_processes_train_as_one(data, teacher, tmp_path):
    """With mixed images and soft targets, in float64."""
    mixed = ("--mixup", "0.8", "--cutmix", "1", "--label-smoothing", "0.1")
    # Without dropout in the projector, which every process draws for itself.
    more = of(teacher, *mixed, "--epochs", "1", "--milestones", "5", "--dropout", "0")
    done = by_two_in_float64(tmp_path, options(data["folders"], tmp_path / "both", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    both, source = log(tmp_path / "both"), None
    # One process that sees the halves one after another, as BatchNorm does there: of each batch
    # the two halves of the first half, and of the second, are what the processes have.
    with in_float64():
        config = settings(data["folders"], "kd", method="kd", batch_size=8)
        mixed = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "dropout": 0.0}
        config = replace(config, mixed)
        source = open_source(config, ALONE)
        means = ClassMeans.load(tmp_path / "both" / "class_means.safetensors")
        model = build_model("resnet10t", len(CLASSES), 3).eval().requires_grad_(False)
        load_weights_for(model, teacher, SIZE)
        model.double()
        task = Classification(config, source, Teacher(model, "", means), ALONE)
        parts = [source.train(config, World(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
        optimizer = torch.optim.SGD(
            task.step.parameters(), 0.02, 0.9, nesterov=True, weight_decay=5e-4
        )
        losses = []
        for batches in zip(*(part.epoch(0) for part in parts), strict=True):
            optimizer.zero_grad()
            for images, target in batches:
                loss = task.step(images, target, torch.tensor(0.0))[0]
                (loss / 2).backward()
                losses.append(loss.item())
            optimizer.step()
    assert float(both[0]["train_loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    trained = task.model.state_dict()
    for name, value in weights(tmp_path / "both").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, trained[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", ["tar", "shards"])
def test_a_killed_process_is_started_again_and_ends_alike(data, teacher, tmp_path, layout):
    """By torchrun, which starts the same command; with copies, and sharded."""
    own = {"tar": [], "shards": ["--fsdp", "--fsdp-teacher"]}[layout]
    commands = [
        {
            "arguments": options(data[layout], tmp_path / name, *of(teacher, *own)),
            "trouble": trouble,
        }
        for name, trouble in (("whole", {}), ("killed", {"killed": [1, 1, 1]}))
    ]
    succeeded(together(tmp_path, commands[:1]))
    told = succeeded(together(tmp_path, commands[1:], 2, "--max-restarts", "1"))
    assert told.count(DIES) == 1
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_two_sharing_processes_train_as_two_with_copies(data, teacher, tmp_path, layout):
    more = of(teacher, "--dropout", "0", "--ema-decay", "0.8")
    commands = [
        {"arguments": options(data[layout], tmp_path / name, *more, *own)}
        for name, own in (("copies", []), ("shared", ["--fsdp", "--fsdp-teacher"]))
    ]
    succeeded(together(tmp_path, commands))
    near(tmp_path / "copies", tmp_path / "shared")
    for name in ("copies", "shared"):
        assert json.loads((tmp_path / name / "result.json").read_text())["processes"] == 2


# -- every preset ---------------------------------------------------------------------------------


def settings(folder: Path, preset: str = "", **more) -> TrainConfig:
    """A run of few small images."""
    config = TrainConfig()
    if "/" in preset:
        config = replace(config, {"preset": preset, **load_preset(preset).settings})
    few = {
        "task": "imagenet",
        "data": str(folder),
        "device": "cpu",
        "progress": False,
        "tensorboard": False,
        "image_size": SIZE,
        "workers": 0,
        "batch_size": 4,
        "eval_batch_size": 4,
        "precision": "float32",
        **({} if "/" in preset else {"student": "cifar_resnet20", "teacher": "resnet10t"}),
        **({} if "/" in preset else {"nd_weight": 1.5}),
    }
    return replace(config, {**few, **more})


def untrained(config: TrainConfig, source) -> Teacher | None:
    """The teacher with fresh weights and class means of a few of its features."""
    if not config.needs_teacher:
        return None
    torch.manual_seed(2)
    model = build_model(config.model.teacher, len(source.classes), 3)
    fit_image_size(model, source.image_size)
    model.eval().requires_grad_(False)
    images, _ = next(source.train(config, ALONE).epoch(0))
    with torch.no_grad():
        found, _ = features(model, images)
    means = ClassMeans(len(source.classes), found.shape[1])
    means.update(torch.randn(len(CLASSES), found.shape[1]), torch.arange(len(CLASSES)))
    return Teacher(model, "", means)


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("imagenet")]
                         if not MISSING else [])  # fmt: skip
def test_every_preset_trains_a_step(data, preset, tmp_path):
    """All parameters of the student get a finite gradient, and a step changes them."""
    config = settings(data["folders"], preset)
    assert config.model.student == load_preset(preset).settings["student"]
    dataclasses.replace(
        config, model=dataclasses.replace(config.model, teacher_weights="x")
    ).check()
    source = open_source(config, ALONE)
    given = untrained(config, source)
    Classification.check(config, source, given)
    task = Classification(config, source, given, ALONE)
    engine = _Training(task, config.optim, config.run, tmp_path, ALONE, 0, {})
    before = {name: p.detach().clone() for name, p in task.step.named_parameters()}
    engine._step(next(iter(task.batches(0, 0))))
    terms = dict(zip(task.terms, engine.meter.read(ALONE)[0], strict=True))
    assert all(math.isfinite(value) for value in terms.values())
    method = config.method
    wanted = method.ce_weight * terms["ce"] + method.nd_weight * terms["nd"]
    wanted += (method.method != "ce") * method.kd_weight * terms["kd"]
    assert terms["loss"] == pytest.approx(wanted, rel=1e-4)
    assert (terms["nd"] > 0) == (method.nd_weight > 0)
    for name, parameter in task.step.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    moved = [not torch.equal(before[name], p) for name, p in task.step.named_parameters()]
    # timm's residual branches end in weights of 0, before which nothing gets a gradient at first.
    assert sum(moved) > 0.8 * len(moved)
    projects = getattr(task.model, "num_features", 0) != getattr(given.model, "num_features", 0) \
        if given else False  # fmt: skip
    assert (task.step.projector is not None) == (projects and method.nd_weight > 0)


def test_data_are_known_by_the_names_of_their_images(data, tmp_path):
    """Wherever they lie, in folders or in an archive; a file of another name makes others."""

    def fingerprint(folder, **more):
        return open_source(settings(folder, **more), ALONE).fingerprint()

    copied = tmp_path / "elsewhere"
    shutil.copytree(data["folders"], copied)
    assert fingerprint(copied) == fingerprint(data["folders"]) == fingerprint(data["tar"])
    (copied / "val" / "sky" / "0.png").rename(copied / "val" / "sky" / "9.png")
    assert fingerprint(copied) != fingerprint(data["folders"])
    shards = {"reader": "wds/x", "num_classes": 4, "val_split": "val-{0000..0003}.tar|20"}
    seen = {fingerprint(data["shards"], **shards)}
    for split in ("0000..0003}.tar|28", "0000..0002}.tar|28", "0000..0002}.tar|27"):
        seen.add(fingerprint(data["shards"], **shards, train_split=f"train-{{{split}"))
    assert len(seen) == 4


def test_teachers_are_known_by_their_tensors(data, teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    def digest(path):
        return load_teacher("resnet10t", str(path), source, torch.device("cpu")).digest

    source = open_source(settings(data["folders"]), ALONE)
    state = load_file(teacher)
    save_file(state, tmp_path / "noted.safetensors", metadata={"epoch": "3"})
    torch.save({"model": dict(reversed(state.items()))}, tmp_path / "same.pt")
    assert digest(tmp_path / "noted.safetensors") == digest(tmp_path / "same.pt") == digest(teacher)
    state["fc.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    assert digest(tmp_path / "other.safetensors") != digest(teacher)


# -- targets, teachers, sizes ---------------------------------------------------------------------


def test_mixed_images_have_soft_targets_in_every_term(data):
    """Smoothed once, where they are mixed; the ND loss reads the mixture of class means."""
    more = {"mixup": 1.0, "label_smoothing": 0.2, "method": "kd", "temperature": 2.0}
    more["dropout"] = 0.0  # of the projector, which is run a second time below
    config = settings(data["folders"], **more)
    source = open_source(config, ALONE)
    given = untrained(config, source)
    task = Classification(config, source, given, ALONE)
    images, target = next(iter(task.batches(0, 0)))
    assert target.shape == (4, len(CLASSES))
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    assert target.min().item() == pytest.approx(0.2 / len(CLASSES))
    loss, ce, kd, nd, top1 = task.step(images, target, torch.tensor(0.5))
    own, logits = features(task.model, images)
    wanted, soft = features(given.model, images)
    means = given.class_means.compute()
    own = task.step.projector(own)
    assert ce.item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    divergence = F.kl_div(
        F.log_softmax(logits / 2, 1), F.log_softmax(soft / 2, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    assert kd.item() == pytest.approx(4 * divergence.item(), rel=1e-4)
    assert top1.item() == pytest.approx(
        100 * (logits.argmax(1) == target.argmax(1)).double().mean().item()
    )
    assert loss.item() == pytest.approx((ce + 0.5 * kd + 1.5 * nd).item(), rel=1e-5)
    unit = F.normalize(target @ means, dim=1)
    longest = torch.maximum(own.norm(dim=1), wanted.norm(dim=1))
    direction = (own * unit).sum(1) / longest
    assert nd.item() == pytest.approx((1 - direction).mean().item(), rel=1e-5)


def test_hard_labels_go_to_the_distillation_token(data):
    """There the teacher's class, ND on both tokens' mean; ND with the ramp on demand."""
    more = {"method": "hard_kd", "student": "deit_tiny_distilled_patch16_224", "nd_ramp": True}
    config = settings(data["folders"], **more)
    source = open_source(config, ALONE)
    given = untrained(config, source)
    task = Classification(config, source, given, ALONE)
    task.step.eval()
    images, target = next(iter(task.batches(0, 0)))
    loss, ce, kd, nd, _ = task.step(images, target, torch.tensor(0.25))
    tokens = task.model.forward_features(images)
    of_class, of_teacher = tokens[:, 0], tokens[:, 1]
    found = given.model(images).argmax(1)
    hard = F.cross_entropy(task.model.head_dist(of_teacher), found)
    assert ce.item() == pytest.approx(F.cross_entropy(task.model.head(of_class), target).item())
    assert kd.item() == pytest.approx(hard.item(), rel=1e-5)
    own = task.step.projector((of_class + of_teacher) / 2)
    means = given.class_means.compute()
    longest = torch.maximum(own.norm(dim=1), features(given.model, images)[0].norm(dim=1))
    direction = (own * F.normalize(means[target], dim=1)).sum(1) / longest
    assert nd.item() == pytest.approx((1 - direction).mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx((ce + 0.25 * (kd + 1.5 * nd)).item(), rel=1e-5)
    first = task.step(images, target, torch.tensor(0.0))[0]
    assert first.item() == pytest.approx(ce.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "test_convnext"])
def test_weightscast_once_are_those_that_autocast_makes(name):
    """The same features to the bit, without a cast in every step."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    fit_image_size(model, SIZE)
    cast, images = cast_once(model), torch.randn(2, 3, SIZE, SIZE)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in cast.parameters()} == {torch.float32, torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(features(model, images), features(cast, images), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("decays", [False, True])
def test_tokens_have_no_weight_decay_where_vectors_have_none(data, tmp_path, decays):
    more = {"method": "hard_kd", "student": "deit_tiny_distilled_patch16_224"}
    more |= {"optimizer": "adamw", "decay_vectors": decays}
    config = settings(data["folders"], **more)
    source = open_source(config, ALONE)
    task = Classification(config, source, untrained(config, source), ALONE)
    engine = _Training(task, config.optim, config.run, tmp_path, ALONE, 0, {})
    names = {id(p): name for name, p in task.step.named_parameters()}
    found = {
        names[id(p)]: group["weight_decay"]
        for group in engine.optimizer.param_groups
        for p in group["params"]
    }
    assert len(found) == len(names)
    wanted = {
        name: config.optim.weight_decay * (decays or (name.endswith("weight") and p.dim() > 1))
        for name, p in task.step.named_parameters()
    }
    assert found == wanted
    tokens = ("cls_token", "dist_token", "pos_embed")
    assert all((found[f"student.{name}"] > 0) == decays for name in tokens)


def test_a_transformer_fits_other_sizes(tmp_path):
    """Weights of its own size, and of the size it was trained at here."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", 5, 3).eval()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    fitted = build_model("vit_tiny_patch16_224", 5, 3).eval()
    load_weights_for(fitted, tmp_path / "own.safetensors", 224)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(fitted(images), model(images))
    load_weights_for(fitted, tmp_path / "own.safetensors", 64)
    small = torch.randn(1, 3, 64, 64)
    save_file(fitted.state_dict(), tmp_path / "small.safetensors")
    again = build_model("vit_tiny_patch16_224", 5, 3).eval()
    load_weights_for(again, tmp_path / "small.safetensors", 64)
    assert torch.equal(again(small), fitted(small))
    with pytest.raises(ValueError, match="another network"):
        load_weights_for(build_model("resnet10t", 5, 3), tmp_path / "own.safetensors", 64)


# -- class means ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_means_are_the_mean_of_the_features(data, layout):
    more = {"reader": "wds/pictures", "workers": 1} if layout == "shards" else {}
    config = settings(data[layout], **more)
    source = open_source(config, ALONE)
    model = untrained(config, source).model
    means = gather_class_means(model, source, config, ALONE)
    found, targets = [], []
    with torch.no_grad():
        for images, target, mask in source.clean(config, ALONE):
            found.append(features(model, images[mask])[0].double())
            targets.append(target[mask])
    found, target = torch.cat(found), torch.cat(targets)
    assert means.counts.tolist() == [TRAIN] * len(CLASSES)
    wanted = torch.stack([found[target == c].mean(0) for c in range(len(CLASSES))])
    torch.testing.assert_close(means.compute().double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_means_go_on_where_they_stopped(data, teacher, tmp_path, monkeypatch, layout, capsys):
    out = tmp_path / "means.safetensors"
    command = ["class-means", "--task", "imagenet", "--data", str(data[layout]), "--device", "cpu"]
    command += ["--model", "resnet10t", "--weights", str(teacher), "--image-size", str(SIZE)]
    command += ["--eval-batch-size", "4", "--workers", "0", "--no-progress"]
    if layout == "shards":
        command += ["--reader", "wds/pictures", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "whole.safetensors")]) == 0
    seen = []

    def stopping(model, images):
        seen.append(len(images))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return features(model, images)

    monkeypatch.setattr(gather, "features", stopping)
    command += ["--out", str(out)]
    assert main(command) == 130
    assert not out.exists()
    part = tmp_path / "means.safetensors.part-0-of-1"
    assert part.exists()
    capsys.readouterr()
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    seen[:] = [0] * 10
    assert main([*command, "--resume"]) == 0
    assert len(seen) - 10 == 7 - 3  # three of the seven batches were kept
    assert not part.exists()
    wanted = ClassMeans.load(tmp_path / "whole.safetensors")
    assert torch.equal(ClassMeans.load(out).compute(), wanted.compute())
    assert ClassMeans.load(out).counts.tolist() == [TRAIN] * len(CLASSES)
    before = out.read_bytes()
    assert main([*command, "--resume"]) == 0  # there is nothing left to do
    assert out.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_class_means_are_kept_at_a_signal(data, teacher, tmp_path, monkeypatch, number):
    seen = []

    def stopped(model, images):
        seen.append(len(images))
        if len(seen) == 4:
            os.kill(os.getpid(), number)
        return features(model, images)

    monkeypatch.setattr(gather, "features", stopped)
    out = tmp_path / "means.safetensors"
    command = ["class-means", "--task", "imagenet", "--data", str(data["folders"])]
    command += ["--model", "resnet10t", "--weights", str(teacher), "--image-size", str(SIZE)]
    command += ["--eval-batch-size", "4", "--workers", "0", "--no-progress", "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 128 + number
    assert len(seen) == 4
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert len(seen) == 7  # no batch a second time
    assert ClassMeans.load(out).counts.tolist() == [TRAIN] * len(CLASSES)


def test_class_means_of_images_seen_otherwise_are_told(data, teacher, tmp_path):
    out = tmp_path / "means.safetensors"
    command = ["class-means", "--task", "imagenet", "--data", str(data["folders"])]
    command += ["--model", "resnet10t", "--weights", str(teacher), "--image-size", "40"]
    command += ["--workers", "0", "--no-progress", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--mean", "0.5", "0.5", "0.5"]) == 0
    told = "--image-size 40, and this is with --mean 0.485 0.456 0.406 --image-size 32"
    arguments = options(data["folders"], tmp_path / "run", *of(teacher, "--class-means", str(out)))
    with pytest.warns(UserWarning, match="were gathered with --mean 0.5 0.5 0.5") as warned:
        assert main([*arguments, "--epochs", "1"]) == 0
    (one,) = [warning for warning in warned if "gathered with" in str(warning.message)]
    assert str(one.message).endswith(told)


def test_class_means_by_autocast(data, tmp_path):
    """As the step sees features; means of other options are not taken for these."""
    config = settings(data["folders"], precision="bfloat16")
    source = open_source(config, ALONE)
    model = untrained(config, source).model
    means = gather_class_means(model, source, config, ALONE)
    wanted = ClassMeans(len(CLASSES), means.num_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for images, target, mask in source.clean(config, ALONE):
            found, _ = features(model, images)
            assert found.dtype == torch.bfloat16
            wanted.update(found, target.where(mask, -100))
    assert torch.equal(means.compute(), wanted.compute())
    plain = gather_class_means(model, source, settings(data["folders"]), ALONE)
    assert not torch.equal(plain.compute(), means.compute())


def test_class_means_that_another_run_gathered_are_not_those_of_a_run_without(
    data, teacher, tmp_path
):
    """Which has none when it is resumed, and could not read its checkpoint."""
    shared = Shared(ALONE)
    config = settings(data["folders"], teacher_weights=str(teacher), method="kd")
    plain = replace(config, {"nd_weight": 0.0})
    gathered = []
    for number, one in enumerate((config, plain, config)):
        (tmp_path / str(number)).mkdir()
        found = shared.complete_teacher(one, tmp_path / str(number))
        gathered.append(found.class_means is not None)
        assert (tmp_path / str(number) / "class_means.safetensors").exists() == gathered[-1]
    assert gathered == [True, False, True]


def test_class_means_of_other_options_are_gathered_anew(data, teacher, tmp_path):
    command = ["class-means", "--task", "imagenet", "--data", str(data["folders"])]
    command += ["--model", "resnet10t", "--weights", str(teacher), "--workers", "0"]
    command += ["--out", str(tmp_path / "means.safetensors"), "--no-progress", "--device", "cpu"]
    assert main([*command, "--image-size", str(SIZE)]) == 0
    assert main([*command, "--image-size", str(SIZE), "--resume"]) == 0
    for more in (["--image-size", "48"], ["--image-size", str(SIZE), "--precision", "bfloat16"]):
        assert main([*command, *more, "--resume"]) == 2


def test_a_refused_pass_leaves_what_an_interrupted_one_kept(data, teacher, tmp_path, capsys):
    out, part = tmp_path / "means.safetensors", tmp_path / "means.safetensors.part-0-of-1"
    part.write_bytes(b"kept")
    command = ["class-means", "--task", "imagenet", "--data", str(data["folders"])]
    command += ["--model", "resnet10t", "--weights", str(teacher), "--workers", "0"]
    command += ["--out", str(out), "--overwrite", "--no-progress", "--device", "cpu"]
    large = tmp_path / "inception.pt"
    torch.save(build_model("inception_v3", len(CLASSES), 3).state_dict(), large)
    for more, message in (
        (["--weights", str(tmp_path / "nowhere")], "no weights at"),
        (["--eval-batch-size", "0"], "--eval-batch-size must be"),
        (
            ["--model", "inception_v3", "--weights", str(large), "--image-size", "32"],
            "--image-size",
        ),
    ):
        assert message in refused([*command, *more], capsys)
        assert part.read_bytes() == b"kept"
    assert main([*command, "--image-size", str(SIZE)]) == 0
    assert not part.exists()


def test_parts_are_found_by_any_name(tmp_path):
    """Names are no patterns."""
    for name in ("m[kd].safetensors", "m*.safetensors", "m?.safetensors"):
        (tmp_path / f"{name}.part-0-of-1").touch()
        assert find_parts(tmp_path / name) == [tmp_path / f"{name}.part-0-of-1"]
    remove_parts(tmp_path / "m*.safetensors")
    assert len(list(tmp_path.iterdir())) == 2


def test_parts_of_other_data_or_damaged_ones_are_not_used(data, tmp_path):
    config = settings(data["folders"])
    source = open_source(config, ALONE)
    model, path = untrained(config, source).model, tmp_path / "means.safetensors"
    one = gather_class_means(model, source, config, ALONE, path=path, metadata={"teacher": "a"})
    part = tmp_path / "means.safetensors.part-0-of-1"
    with pytest.warns(UserWarning, match="of another teacher"):
        gather_class_means(
            model, source, config, ALONE, path=path, resume=True, metadata={"teacher": "b"}
        )
    part.write_bytes(part.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is no use"):
        two = gather_class_means(
            model, source, config, ALONE, path=path, resume=True, metadata={"teacher": "b"}
        )
    assert torch.equal(one.compute(), two.compute())
    kept = torch.load(part)
    # Of a version whose batches were in another order.
    torch.save({**kept, "origin": json.dumps(json.loads(kept["origin"])[1:])}, part)
    with pytest.warns(UserWarning, match="of another teacher"):
        gather_class_means(
            model, source, config, ALONE, path=path, resume=True, metadata={"teacher": "b"}
        )
    for other in (0, 1):
        part.with_name(f"means.safetensors.part-{other}-of-2").write_bytes(part.read_bytes())
    part.unlink()
    with pytest.warns(UserWarning, match="are parts of 2 processes, and there is 1"):
        two = gather_class_means(model, source, config, ALONE, path=path, resume=True)
    assert torch.equal(one.compute(), two.compute())


# -- the host -------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Values that are read back from tensors, by who reads them.

    Not those that losses and class means look at for class indices out of range, as they do on a
    CPU alone.
    """

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @staticmethod
    def _of_the_losses() -> bool:
        places = [frame.filename for frame in traceback.extract_stack()]
        own = [Path(place) for place in places if "dnkd_ext" in Path(place).parts]
        return own[-1].parent.name == "losses" or own[-1].name in ("_checks.py", "class_means.py")

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in self.NAMES and not self._of_the_losses():
            self.found.append(name)
        return function(*arguments, **(named or {}))


class _Moves(TorchFunctionMode):
    """Calls that may send a tensor between host and GPU, which here are one.

    Not those of clip_grad_norm_, which collects norms from all GPUs that there are.
    """

    NAMES = ("cpu", "cuda", "numpy", "tolist", "item", "tensor", "as_tensor", "from_numpy")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, kinds, arguments=(), named=None):
        name, named = getattr(function, "__name__", ""), named or {}
        given = (*arguments[1:], *named.values())
        moves = name == "to" and any(
            isinstance(x, str | torch.device | torch.Tensor) for x in given
        )
        places = {frame.name for frame in traceback.extract_stack()}
        is_own = not _Reads._of_the_losses() and "clip_grad_norm_" not in places
        if is_own and (moves or name in self.NAMES):
            self.found.append(name)
        return function(*arguments, **named)


@pytest.mark.parametrize("method", ["ce", "kd", "dkd", "dist", "reviewkd", "hard_kd"])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize(
    "more",
    [{}, {"ema_decay": 0.9, "accumulate": 2, "class_means_momentum": 0.9}],
    ids=["", "averages"],
)
def test_a_step_reads_nothing_back(data, method, mixup, more, tmp_path):
    """What would make the host wait for a GPU in every step. One value that is read is found."""
    student = "cifar_resnet20" if method != "reviewkd" else "resnet18"
    more = {**more, "method": method, "mixup": mixup, "clip_grad": 5.0, "student": student}
    if method == "reviewkd":
        more["teacher"] = "resnet34"
    config = settings(data["folders"], **more)
    source = open_source(config, ALONE)
    task = Classification(config, source, untrained(config, source), ALONE)
    engine = _Training(task, config.optim, config.run, tmp_path, ALONE, 0, {})
    batch = next(iter(task.batches(0, 0)))
    engine._step(batch)
    with _Reads() as reads, _Moves() as moves:
        engine._step(batch)
    assert reads.found == moves.found == []
    engine.meter.add, add = lambda terms: add(terms * terms[0].item()), engine.meter.add
    with _Reads() as reads, _Moves() as moves:
        engine._step(batch)
    assert reads.found == ["_local_scalar_dense"]
    assert moves.found == ["item"]


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["ce", "kd", "dkd", "dist", "reviewkd", "hard_kd"])
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_a_step_on_a_gpu_waits_for_nothing(data, method, mixup, tmp_path):
    """From the moment a batch is asked for to the optimiser's step and the counted terms."""
    more = {"method": method, "mixup": mixup, "ema_decay": 0.9, "clip_grad": 5.0, "device": "cuda"}
    if method == "reviewkd":
        more |= {"student": "resnet18", "teacher": "resnet34"}
    config = settings(data["folders"], precision="bfloat16", **more)
    world = World(0, 1, torch.device("cuda"))
    source = open_source(config, world)
    teacher = untrained(config, source)
    if teacher is not None:
        teacher = teacher._replace(model=teacher.model.cuda())
    task = Classification(config, source, teacher, world)
    engine = _Training(task, config.optim, config.run, tmp_path, world, 0, {})
    batches = iter(task.batches(0, 0))
    for _ in range(2):  # what is allocated and chosen once
        engine._step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(value) for value in engine.meter.read(world)[0])


# -- refused --------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(arguments) != 0
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused(data, teacher, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    other = ClassMeans(7, 512)
    other.update(torch.randn(7, 512), torch.arange(7))
    other.save(tmp_path / "other.safetensors")
    fewer = tmp_path / "fewer"
    shutil.copytree(data["folders"], fewer)
    for split in ("train", "val"):
        shutil.rmtree(fewer / split / "sky")
    missing = tmp_path / "missing"
    shutil.copytree(data["folders"], missing)
    shutil.rmtree(missing / "val" / "sky")
    folder = data["folders"]
    cases = [
        (fewer, of(teacher), "holds weights for 4 classes, and not for the 3 that are wanted"),
        (folder, of(teacher, "--class-means", str(tmp_path / "other.safetensors")), "7 classes"),
        (missing, of(teacher), "sky"),
        (folder, of(tmp_path / "nowhere.safetensors"), "no weights at"),
        (folder, of(teacher, "--drop-path", "0.1"), "--drop-path is for models that have it"),
        (folder, of(teacher, "--limit", "3"), "--limit is for --task cifar"),
        (folder, of(teacher, "--pad", "2"), "--pad is for --task cifar"),
        (folder, of(teacher, "--student", "resnet99"), "no model 'resnet99'"),
        (folder, of(teacher, "--student", "resnet18.foo"), "no weights 'foo' of resnet18, as"),
        (folder, of(teacher, "--teacher", "resnet10t.foo"), "no weights 'foo' of resnet10t, as"),
    ]
    for place, more, message in cases:
        assert message in refused(options(place, out, *more), capsys), message
        assert not out.exists()
    told = refused(["train", "--data", str(folder), "--out", str(out), "--mixup", "0.5"], capsys)
    assert "--mixup is for --task imagenet" in told


def test_weights_are_for_the_classes_they_tell(data, whole, tmp_path, capsys):
    others = tmp_path / "others"
    shutil.copytree(data["folders"], others)
    for split in ("train", "val"):
        (others / split / "sky").rename(others / split / "air")
    command = ["eval", "--task", "imagenet", "--model", "cifar_resnet20", "--device", "cpu"]
    command += ["--image-size", str(SIZE), "--workers", "0", "--no-progress"]
    for layout in ("folders", "shards"):
        own = [*command, "--weights", str(whole / layout), "--data"]
        assert main([*own, str(data["folders"])]) == 0
        told = refused([*own, str(others)], capsys)
        assert "class 0 is 'petal2' there and 'air' in the data" in told
        assert main([*own, str(others), "--any-classes"]) == 0


def test_a_refused_command_leaves_the_run_that_is_there(data, teacher, whole, tmp_path, capsys):
    """Options that only the loaders or the models can judge, told before anything is removed."""
    out = tmp_path / "run"
    shutil.copytree(whole / "folders", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more, *messages in (
        (("--auto-augment", "foo"), "--auto-augment must name one of timm's policies"),
        (("--mixup", "0.8", "--batch-size", "7"), "--batch-size must give every process an even"),
        (("--student", "inception_v3"), "--student inception_v3", "32 pixels (--image-size)"),
        (("--reader", "wds/x", "--num-classes", "4"), "--train-split must name"),
    ):
        arguments = options(data["folders"], out, *of(teacher), "--overwrite", *more)
        told = refused(arguments, capsys)
        assert all(message in told for message in messages), told
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_trying_models_out_changes_nothing(data):
    config = settings(data["folders"], method="kd")
    source = open_source(config, ALONE)
    given = untrained(config, source)
    given.model.train()  # running statistics would move
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    student = build_model("cifar_resnet20", len(CLASSES), 3)
    state = torch.get_rng_state()
    try_out(student, "--student", config, source)
    try_out(given.model, "--teacher", config, source)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(given.model.state_dict(), before)
    assert given.model.training


def test_the_evaluation_of_published_weights(data, capsys, monkeypatch):
    """Those that timm would download, by their name."""
    import timm

    create, made = timm.create_model, []

    def published(name, pretrained=False, **more):
        torch.manual_seed(5)
        made.append(pretrained)
        return create(name, **{"num_classes": len(CLASSES), **more})

    monkeypatch.setattr(timm, "create_model", published)
    command = ["eval", "--task", "imagenet", "--data", str(data["folders"]), "--device", "cpu"]
    command += ["--image-size", str(SIZE), "--workers", "0", "--no-progress"]
    assert main([*command, "--model", "resnet10t", "--weights", "pretrained"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert made == [True]
    assert result["weights"] == "pretrained"
    model, hits = published("resnet10t").eval(), []
    with torch.no_grad():
        for images, target, _ in open_source(settings(data["folders"]), ALONE).test(
            settings(data["folders"]), ALONE
        ):
            hits += (model(images).argmax(1) == target).tolist()
    assert result["test_top1"] == pytest.approx(100 * sum(hits) / len(hits))


def test_images_normalised_otherwise_for_timms_own_weights_are_told(data, tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    name, tag = "vit_tiny_patch16_224", "augreg_in21k_ft_in1k"
    model = timm.create_model(name, num_classes=len(CLASSES), img_size=SIZE)
    plain, ours = tmp_path / "plain.safetensors", tmp_path / "ours.safetensors"
    save_file(model.state_dict(), plain)
    save_file(model.state_dict(), ours, metadata={"model": name, "dataset": "x"})
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    command = ["eval", "--task", "imagenet", "--data", str(data["folders"]), "--device", "cpu"]
    command += ["--image-size", str(SIZE), "--workers", "0", "--no-progress"]
    half = ("0.5", "0.5", "0.5")
    for called, weights_of in ((name, "pretrained"), (f"{name}.{tag}", plain)):
        arguments = [*command, "--model", called, "--weights", str(weights_of)]
        told = f"of {called} are for images normalised by --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5, and"
        with pytest.warns(UserWarning, match=re.escape(told)) as warned:
            assert main(arguments) == 0
        assert "this is with --mean 0.485 0.456 0.406 --std 0.229" in str(warned[-1].message)
        # A warning would be an error.
        assert main([*arguments, "--mean", *half, "--std", *half]) == 0
    for called, weights_of in ((name, plain), (f"{name}.{tag}", ours)):
        assert main([*command, "--model", called, "--weights", str(weights_of)]) == 0


def test_a_preset_may_mean_to_normalise_otherwise():
    name = "imagenet/vit_small-resnet18/kd++"
    config = replace(TrainConfig(), {"preset": name, **load_preset(name).settings})
    model = types.SimpleNamespace(pretrained_cfg={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    teacher = config.model.teacher
    assert normalised_otherwise(teacher, "pretrained", model, config) is None
    other = replace(config, {"std": (0.2, 0.2, 0.2)})
    for called, chosen in (
        ("vit_base_patch32_224", config),
        (teacher, other),
        (teacher, replace(config, {"preset": ""})),
    ):
        assert "are for images" in normalised_otherwise(called, "pretrained", model, chosen)


def test_weights_that_cannot_be_downloaded(data, tmp_path, capsys, monkeypatch):
    import timm

    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(timm, "create_model", offline)
    more = ("--teacher", "resnet18", "--teacher-weights", "pretrained", "--method", "kd")
    told = refused(options(data["folders"], tmp_path / "run", *more), capsys)
    assert "Network is unreachable" in told
    assert "without a network, name a file of them" in told


def test_an_unreadable_image_stops_or_is_skipped(data, teacher, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(data["folders"], folder)
    (folder / "train" / "roof" / "3.png").write_bytes(b"nothing")
    arguments = options(folder, tmp_path / "run", *of(teacher))
    assert "roof/3.png cannot be read" in refused(arguments, capsys)
    (folder / "val" / "sky" / "1.png").write_bytes(b"nothing")
    arguments += ["--on-error", "skip", "--batch-size", "7"]  # an epoch has every image
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(pytest.warns(UserWarning, match=r"roof/3\.png"))
        rows = run([*arguments, "--epochs", "2"])
    assert told
    assert [row["train_unreadable"] for row in rows] == ["1", "1"]
    assert [row["test_unreadable"] for row in rows] == ["1", "1"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["train_unreadable"], result["test_unreadable"]) == (1, 1)
    assert result["test_images"] == 4 * VAL - 1
    hits = float(rows[-1]["test_top1"]) / 100 * result["test_images"]
    assert hits == pytest.approx(round(hits), abs=1e-3)
    command = ["eval", "--task", "imagenet", "--data", str(folder), "--image-size", str(SIZE)]
    command += ["--model", "cifar_resnet20", "--weights", str(tmp_path / "run"), "--workers", "0"]
    capsys.readouterr()
    with pytest.warns(UserWarning, match=r"sky/1\.png"):
        assert main([*command, "--device", "cpu", "--no-progress", "--on-error", "skip"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["test_images"], told["test_unreadable"]) == (4 * VAL - 1, 1)


# torch raises its error at whatever the program is doing when a worker dies: not in pytest.
DYING = """
import multiprocessing, os, signal, sys, time
from dnkd_ext import cli
from dnkd_ext.train import classification

batches = classification.Classification.batches
how, count = sys.argv[1], int(sys.argv[2])

def dying(self, epoch, start):
    for number, batch in enumerate(batches(self, epoch, start), start):
        if (epoch, number) == (1, 1):
            if how == "quiet":
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for worker in multiprocessing.active_children()[:count]:
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(1)
        yield batch

classification.Classification.batches = dying
sys.argv[1:3] = []
cli.entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("loud", 1), ("loud", 2), ("quiet", 2)])
def test_the_death_of_a_worker_is_one_line(data, tmp_path, how, count):
    """Wherever torch raises it, and --resume goes on."""
    arguments = options(data["folders"], tmp_path / "run", "--workers", "2", "--batch-size", "2")
    command = [sys.executable, "-W", "ignore", "-c", DYING, how, str(count), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    told = (
        r"dnkd train: error: a worker process that reads images died: .*; too little memory, or "
        r"shared memory \(/dev/shm\), is the usual reason: fewer .*; --resume goes on where .*\n"
    )
    assert re.fullmatch(told, done.stderr), done.stderr
    assert len(run([*arguments, "--resume"])) == 2


def test_torchs_own_error_of_a_dead_worker(capsys, monkeypatch):
    """It comes from a signal handler, in the midst of anything."""
    text = (
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise it.\n more"
    )

    def fail(*_):
        raise RuntimeError(text)

    from dnkd_ext.train.arguments import COMMANDS

    handler = signal.getsignal(signal.SIGCHLD)
    for name, more in (("train", "; --resume goes on where the run was last kept"), ("eval", "")):
        monkeypatch.setitem(COMMANDS, name, fail)
        assert main([name]) == 2
        signal.signal(signal.SIGCHLD, handler)
        assert capsys.readouterr().err == (
            f"dnkd {name}: error: a worker process that reads images died: DataLoader worker (pid "
            "12) is killed by signal: Bus error; too little memory, or shared memory (/dev/shm), "
            f"is the usual reason: fewer --workers need less{more}\n"
        )
    text = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        main(["train"])


class Second(World):
    """The other of two processes, without a first one."""

    def sum(self, values):
        return values

    def gather(self, value):
        return [(0, ""), value]


@pytest.mark.filterwarnings("ignore:.*could not be read")
@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_an_evaluation_of_nothing_is_an_error(data, tmp_path, layout, capsys):
    folder = tmp_path / layout
    shutil.copytree(data[layout], folder)
    for path in folder.glob("val/*/*.png"):
        path.write_bytes(b"nothing")
    for path in folder.glob("val-*.tar"):
        path.write_bytes(b"nothing" * 200)
    skips = ["--on-error", "skip", "--epochs", "1"]
    told = refused(options(folder, tmp_path / "run", *skips), capsys)
    place, one = r"\S*/val", r"\S*val/\w+/0\.png"
    if layout == "shards":
        place, one = r"\S*val-0000\.tar to \S*val-0003\.tar", r"\S*val-0000\.tar"
    wanted = (
        rf"nothing can be evaluated: none of the 20 images of {place} could be read; one is {one}"
    )
    assert re.fullmatch(rf"dnkd train: error: {wanted}\n", told)
    torch.manual_seed(0)
    torch.save(build_model("cifar_resnet20", 4, 3).state_dict(), tmp_path / "model.pt")
    command = ["eval", *options(folder, tmp_path)[1:]]
    for name in ("--out", "--epochs", "--batch-size", "--lr", "--milestones", "--student"):
        place = command.index(name)
        del command[place : place + 2]
    command.remove("--no-tensorboard")
    command += ["--model", "cifar_resnet20", "--weights", str(tmp_path / "model.pt")]
    told = refused([*command, "--on-error", "skip"], capsys)
    assert re.fullmatch(rf"dnkd eval: error: {wanted}\n", told)
    if layout == "folders":
        config = settings(folder, on_error="skip")
        batches = open_source(config, ALONE).test(config, ALONE)
        model, second = build_model("cifar_resnet20", 4, 3), Second(1, 2, torch.device("cpu"))
        with pytest.raises(OtherProcessFailed):
            evaluate(model, batches, 4, contextlib.nullcontext(), second)


@pytest.mark.parametrize("task", ["imagenet", "cifar"])
def test_images_that_are_left_out_are_told_by_the_first_process(data, tmp_path, task):
    folder = tmp_path / "more"
    shutil.copytree(data["folders"], folder)
    for number, kind in enumerate(("avif", "heic", "heic")):
        (folder / "train" / "roof" / f"{number}.{kind}").write_bytes(b"unread")
    config = settings(folder, task=task)
    with pytest.warns(UserWarning, match="image files") as told:
        open_source(config, ALONE, progress=False)
    (message,) = [str(warning.message) for warning in told]
    assert message.startswith("3 image files of ")
    assert "were left out (1 .avif, 2 .heic): the kinds that are read are bmp, gif," in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources._open(config, World(1, 2, torch.device("cpu")), False)


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_unreadable_images_are_counted_over_a_stop(data, tmp_path, monkeypatch):
    folder, batches = tmp_path / "broken", Classification.batches
    shutil.copytree(data["folders"], folder)
    for name in ("roof/3.png", "sky/0.png", "petal2/4.png"):
        (folder / "train" / name).write_bytes(b"nothing")
    arguments = options(folder, tmp_path / "run", "--on-error", "skip", "--batch-size", "4")

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Classification, "batches", interrupted)
    assert main(arguments) == 128 + signal.SIGTERM
    monkeypatch.setattr(Classification, "batches", batches)
    assert 0 < load_checkpoint(tmp_path / "run")["ranks"][0]["unreadable"] < 3
    rows = run([*arguments, "--resume"])
    assert [row["train_unreadable"] for row in rows] == ["3", "3"]
