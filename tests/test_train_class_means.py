"""Class means of a training run: gathered, following the teacher, of other classes or teachers."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dnkd_ext import ClassMeans, features
from dnkd_ext.cli import main
from dnkd_ext.train import gather, tasks
from dnkd_ext.train.checkpoint import load_checkpoint
from dnkd_ext.train.class_names import CLASSES as NOTE
from dnkd_ext.train.class_names import class_notes, other_classes
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data import sources
from dnkd_ext.train.data.memory import load_image_folder
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.models import create_model, load_weights
from dnkd_ext.train.networks import weights_digest
from dnkd_ext.train.teacher import load_teacher
from tests.float64 import in_float64
from tests.runs import by_two_in_float64, same, weights
from tests.stripes import ALONE, CLASSES, SKIPPED, TRAIN, contents, of, options, refused, run

pytestmark = SKIPPED


KEPT = Path(__file__).parents[1] / "benchmarks" / "results" / "cifar100" / "h100" / "resnet56"


@pytest.mark.skipif(
    not (KEPT / "best.safetensors").exists(),
    reason="the results are in a checkout, not in an archive",
)
def test_the_kept_class_means_are_those_of_the_kept_teacher():
    model = create_model("cifar_resnet56", num_classes=100)
    load_weights(model, KEPT / "best.safetensors")
    means = ClassMeans.load(KEPT / "class_means.safetensors")
    assert (
        means.metadata["teacher"] == f"cifar_resnet56 {weights_digest(KEPT / 'best.safetensors')}"
    )
    assert means.counts.tolist() == [500] * 100
    # The mean of a class's features is of that class: in its order, and through this classifier.
    with torch.no_grad():
        found = model.eval().fc(means.compute()).argmax(1)
    assert torch.equal(found, torch.arange(100))


def test_class_means_command(images, teacher, tmp_path, capsys):
    out = tmp_path / "means.safetensors"
    command = ["class-means", "--model", "cifar_resnet32", "--weights", str(teacher)]
    command += ["--data", str(images), "--out", str(out), "--no-progress", "--device", "cpu"]
    assert main(command) == 0
    assert f"{CLASSES} classes x 64 features of {CLASSES * TRAIN} images" in capsys.readouterr().out
    content, means = out.read_bytes(), ClassMeans.load(out).compute()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == content
    assert main([*command, "--overwrite"]) == 0
    assert torch.equal(ClassMeans.load(out).compute(), means)
    before = contents(teacher)
    for place, message in (
        (teacher / "best.safetensors", "is the file of --weights"),
        (teacher / "checkpoint.pt", "is what a run calls another file of its own"),
        (tmp_path / "log.csv", "is what a run calls another file of its own"),
    ):
        given = [str(place) if part == str(out) else part for part in command]
        assert message in refused([*given, "--overwrite"], capsys)
    assert contents(teacher) == before
    more = of(teacher, "kd", 1.0, "--epochs", "1", "--class-means", str(out))
    run(images, tmp_path / "run", *more)
    kept = ClassMeans.load(tmp_path / "run" / "class_means.safetensors")
    assert torch.equal(kept.compute(), ClassMeans.load(out).compute())


@pytest.mark.parametrize("command", ["class-means", "train"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_class_means_stop_by_a_signal_as_training_does(
    images, teacher, tmp_path, monkeypatch, capsys, command, number
):
    def stopping(model, pixels):
        os.kill(os.getpid(), number)
        return features(model, pixels)

    out = tmp_path / "means.safetensors"
    arguments = ["class-means", "--model", "cifar_resnet32", "--weights", str(teacher)]
    arguments += ["--data", str(images), "--out", str(out), "--no-progress", "--device", "cpu"]
    if command == "train":
        arguments = options(images, tmp_path, *of(teacher, "kd", 1.0), "--epochs", "1")
        out = tmp_path / "class_means.safetensors"
    monkeypatch.setattr(gather, "features", stopping)
    assert main(arguments) == 128 + number
    told = capsys.readouterr().out
    assert f"dnkd {command}: stopped by {number.name} while class means were gathered" in told
    assert "--resume goes on" in told
    assert gather.find_parts(out)
    monkeypatch.setattr(gather, "features", features)
    assert main([*arguments, "--resume"]) == 0
    assert not gather.find_parts(out)


RUNNING = ("--class-means-momentum", "0.7", "--epochs", "2", "--log-every", "1")


def moved_by_hand(images: Path, teacher: Path, epochs: int) -> torch.Tensor:
    """The moving average over the training's own batches of 12."""
    other = create_model("cifar_resnet32", CLASSES).eval()
    load_weights(other, teacher / "best.safetensors")
    data, config = load_image_folder(images, progress=False), TrainConfig().data
    batches = sources.TrainBatches(data.train, 12, **config.normalisation, seed=0, pad=2)
    means: dict[int, torch.Tensor] = {}
    for epoch in range(epochs):
        for x, target in batches.epoch(epoch):
            with torch.no_grad():
                found = other.forward_head(other.forward_features(x), True).double()
            for c in target.unique().tolist():
                mean = found[target == c].mean(0)
                means[c] = 0.7 * means[c] + 0.3 * mean if c in means else mean
    return torch.stack([means[c] for c in range(CLASSES)])


def test_class_means_may_follow_the_teacher(images, teacher, tmp_path, monkeypatch, double):
    """In every step, before its loss, without a pass of their own; the run goes on exactly."""

    def refuse(*_, **__):
        raise AssertionError("class means were gathered")

    monkeypatch.setattr(tasks, "gather_class_means", refuse)
    more = of(teacher, "kd", 1.0, *RUNNING)
    rows = run(images, tmp_path / "run", *more)
    kept = ClassMeans.load(tmp_path / "run" / "class_means.safetensors")
    wanted = moved_by_hand(images, teacher, 2)
    torch.testing.assert_close(kept.compute().double(), wanted, rtol=1e-6, atol=1e-7)
    assert kept.momentum == 0.7
    assert kept.counts.tolist() == [2 * TRAIN] * CLASSES
    assert kept.metadata["teacher"].startswith("cifar_resnet32 ")
    state = load_checkpoint(tmp_path / "run")["step"]
    assert torch.equal(state["running.averages"][:-1].float(), kept.compute())
    assert torch.equal(state["criterion.class_means"], kept.compute())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["config"]["class_means_momentum"] == 0.7
    assert {"cosine", "norm_ratio"} <= rows[0].keys()
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    batches = Classification.batches

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Classification, "batches", interrupted)
    assert main(options(images, tmp_path / "again", *more)) == 128 + signal.SIGTERM
    monkeypatch.setattr(Classification, "batches", batches)
    assert run(images, tmp_path / "again", *more, "--resume") == rows
    assert same(weights(tmp_path / "again"), weights(tmp_path / "run"))
    again = ClassMeans.load(tmp_path / "again" / "class_means.safetensors")
    assert torch.equal(again.compute(), kept.compute())


def test_class_means_follow_the_whole_batch_of_two_processes(images, teacher, tmp_path):
    more = of(teacher, "kd", 1.0, *RUNNING)
    done = by_two_in_float64(tmp_path, options(images, tmp_path / "both", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    kept = ClassMeans.load(tmp_path / "both" / "class_means.safetensors")
    with in_float64():
        wanted = moved_by_hand(images, teacher, 2)
    torch.testing.assert_close(kept.compute().double(), wanted, rtol=1e-6, atol=1e-7)
    assert kept.counts.tolist() == [2 * TRAIN] * CLASSES


def test_classes_not_seen_yet_are_no_trouble(images, teacher, tmp_path):
    """A class without a mean has a loss of 1 and no gradient, and its diagnostics are finite."""
    settings = {
        "data": str(images),
        "student": "cifar_resnet20",
        "batch_size": 12,
        "nd_weight": 1.0,
    }
    settings |= {"teacher": "cifar_resnet32", "class_means_momentum": 0.5, "progress": False}
    config = replace(TrainConfig(), settings)
    source = open_source(config, ALONE, progress=False)
    given = load_teacher("cifar_resnet32", str(teacher), source, torch.device("cpu"))
    task = Classification(config, source, given, ALONE)
    images, _ = next(task.batches(0, 0))
    target = torch.zeros(len(images), dtype=torch.int64)
    loss = task.step(images, target, torch.tensor(1.0))[0]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in task.step.parameters())
    assert task.class_means[0].any()
    assert not task.class_means[1:].any()
    assert all(math.isfinite(value) for value in task.evaluate(*task.evaluated).values())
    norms, cosines = task.feature_figures(*task.evaluated)
    assert all(np.isfinite(values).all() for values in (*norms.values(), *cosines.values()))
    # Of soft targets the larger share; rows of another class alone find no mean to point at.
    soft = torch.tensor([[0.3, 0.7, 0.0]]).expand(len(images), -1)
    assert task.step(images, soft, torch.tensor(1.0))[3].isfinite()
    assert task.step.running.counts.tolist() == [12, 12, 0, 0]


def test_class_means_that_follow_are_refused_where_they_have_no_part():
    base = {"data": "x", "teacher": "y", "teacher_weights": "z", "nd_weight": 1.0, "method": "kd"}
    replace(TrainConfig(), {**base, "class_means_momentum": 0.9}).check()
    for more, message in (
        ({"class_means_momentum": 1.0}, "must be between 0 and 1"),
        ({"class_means": "file"}, "pass one of them"),
        ({"nd_weight": 0.0}, "has no part in --nd-weight 0"),
        ({"task": "detection"}, "is not there for --task detection"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TrainConfig(), {**base, "class_means_momentum": 0.9, **more}).check()


def test_class_means_that_follow_are_for_presets_with_the_nd_loss(images, tmp_path, capsys):
    """Of several presets for those that have it; where none has it is an error, as for one run."""
    from dnkd_ext.train.arguments import _read_train

    pair = "cifar100/resnet56-resnet20"
    given = ["--data", str(images), "--out", str(tmp_path), "--teacher-weights", "x"]
    given += ["--class-means-momentum", "0.9"]
    _, configs, _ = _read_train(["--preset", f"{pair}/{{ce,kd,kd++}}", *given])
    found = {config.preset: config.model.class_means_momentum for config, _ in configs}
    assert found == {f"{pair}/ce": None, f"{pair}/kd": None, f"{pair}/kd++": 0.9}
    message = "--class-means-momentum has no part in --nd-weight 0"
    for preset in ("kd", "{ce,kd}"):
        assert message in refused(["train", "--preset", f"{pair}/{preset}", *given], capsys)


def test_class_means_of_another_teacher_are_refused(images, teacher, tmp_path, capsys):
    means = ClassMeans(CLASSES, 64)
    means.update(torch.rand(CLASSES, 64), torch.arange(CLASSES))
    means.metadata = {"teacher": "cifar_resnet32 0123456789abcdef"}
    means.save(tmp_path / "means.safetensors")
    more = of(teacher, "kd", 1.0, "--class-means", str(tmp_path / "means.safetensors"))
    told = refused(options(images, tmp_path / "run", *more), capsys)
    assert "is of cifar_resnet32 0123456789abcdef, but the teacher is cifar_resnet32" in told
    assert not (tmp_path / "run").exists()


def rename_first(folder: Path) -> None:
    """Give the first class a name by which it is the last."""
    for split in ("train", "test"):
        (folder / split / "class0").rename(folder / split / "zebra")


def test_weights_and_class_means_are_for_the_classes_they_tell(images, teacher, tmp_path, capsys):
    same_ones, others = tmp_path / "copied", tmp_path / "others" / images.name
    for place in (same_ones, others):
        shutil.copytree(images, place)
    rename_first(others)
    plain, means = tmp_path / "plain.pth", tmp_path / "means.safetensors"
    torch.save(weights(teacher, "best"), plain)
    common = ["--no-progress", "--device", "cpu", "--model", "cifar_resnet32", "--weights"]
    gather_them = ["class-means", *common, str(teacher), "--out"]
    assert main([*gather_them, str(means), "--data", str(images)]) == 0
    out, gathered = tmp_path / "run", tmp_path / "gathered.safetensors"
    of_plain = of(plain, "kd", 1.0, "--class-means", str(means), "--epochs", "1")
    for command, what in (
        (["eval", *common, str(teacher)], "best.safetensors is of other classes"),
        ([*gather_them, str(gathered)], "best.safetensors is of other classes"),
        (options(images, out, *of(teacher, "kd")), "best.safetensors is of other classes"),
        (options(images, out, *of_plain), f"--class-means {means} is of other classes"),
    ):
        told = refused([*command, "--data", str(others)], capsys)
        assert what in told
        assert "class 0 is 'class0' there and 'class1' in the data; where they are the same" in told
        assert "--any-classes" in told
        assert not out.exists()
        assert not gathered.exists()
    # As the labels are; the same classes elsewhere; weights that say nothing.
    for more in (
        [str(teacher), "--data", str(others), "--any-classes"],
        [str(teacher), "--data", str(same_ones)],
        [str(plain), "--data", str(others)],
    ):
        assert main(["eval", *common, *more]) == 0
    assert main(options(others, out, *of_plain, "--any-classes")) == 0


def test_class_means_that_were_kept_are_for_the_classes_they_tell(
    images, teacher, tmp_path, capsys
):
    plain, data, out = tmp_path / "plain.pth", tmp_path / "data", tmp_path / "run"
    kept = out / "class_means.safetensors"
    torch.save(weights(teacher, "best"), plain)
    shutil.copytree(images, data)
    command = ["class-means", "--model", "cifar_resnet32", "--weights", str(plain), "--no-progress"]
    command += ["--device", "cpu", "--data", str(data), "--out", str(kept)]
    assert main(command) == 0
    before = ClassMeans.load(kept).compute()
    rename_first(data)
    assert "is of other data, other classes" in refused([*command, "--resume"], capsys)
    assert main([*command, "--resume", "--any-classes"]) == 0
    assert torch.equal(ClassMeans.load(kept).compute(), before)
    run(data, out, *of(plain, "kd", 1.0, "--epochs", "1"))
    torch.testing.assert_close(ClassMeans.load(kept).compute(), before[[1, 2, 0]])


def test_classes_without_a_mean_are_told(images, teacher, tmp_path, monkeypatch):
    means = ClassMeans(CLASSES, 64)
    means.update(torch.rand(1, 64), torch.tensor([1]))
    means.save(tmp_path / "means.safetensors")
    more = of(teacher, "kd", 1.0, "--class-means", str(tmp_path / "means.safetensors"))
    told = "2 of 3 classes have no class mean ('class0', 'class2'): the ND loss of their images"
    with pytest.warns(UserWarning, match=re.escape(told)) as warned:
        run(images, tmp_path / "read", *more, "--epochs", "1")
    assert sum("no class mean" in str(one.message) for one in warned) == 1
    # Without the ND loss they have no part in it.
    run(images, tmp_path / "without", *more, "--nd-weight", "0", "--epochs", "1")
    monkeypatch.setattr(tasks.gather, "gather_class_means", lambda *_, **__: means)
    with pytest.warns(UserWarning, match=re.escape(told)) as warned:
        run(images, tmp_path / "gathered", *of(teacher, "kd", 1.0), "--epochs", "1")
    assert sum("no class mean" in str(one.message) for one in warned) == 1


def test_classes_are_compared_where_both_are_known():
    many = [f"class {number}" for number in range(9000)]
    assert class_notes(["0", "1", "2"]) == {}
    for noted, classes, told in (
        (["a", "b"], ["a", "b"], None),
        (["a", "b"], ["b", "a"], "class 0 is 'a' there and 'b' in the data"),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "b"], ["0", "1"], None),
        (["0", "1"], ["a", "b"], None),
        (many, many, None),
        (many, many[::-1], "the digest of their names is another"),
    ):
        assert other_classes(class_notes(noted).get(NOTE), classes) == told
    assert len(class_notes(many)[NOTE]) < 80
    for foreign in (None, "100", "cats", '{"a": 1}', "[1, 2]"):
        assert other_classes(foreign, ["a", "b"]) is None
