"""Training runs: against a plain loop, interrupted and gone on with, by two processes, refused."""

from __future__ import annotations

import csv
import errno
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import dnkd_ext
from dnkd_ext import ClassMeans, features
from dnkd_ext.cli import main
from dnkd_ext.train import arguments, commands, files, gather, jobs, tasks
from dnkd_ext.train.checkpoint import load_checkpoint, save_checkpoint
from dnkd_ext.train.class_names import CLASSES as NOTE
from dnkd_ext.train.class_names import class_notes, other_classes
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import NORMALISATION, TrainConfig, flatten, replace
from dnkd_ext.train.data import sources
from dnkd_ext.train.data.memory import load_image_folder
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.engine import _Training, check_identity
from dnkd_ext.train.jobs import resolve
from dnkd_ext.train.models import create_model, load_weights
from dnkd_ext.train.plots import plot_curves
from dnkd_ext.train.schedule import learning_rate, ramp
from dnkd_ext.train.stepper import Meter
from dnkd_ext.train.teacher import load_teacher
from dnkd_ext.train.world import World
from tests.float64 import in_float64
from tests.runs import LOSS, WEIGHTS, by_two, by_two_in_float64, environment, log, same, weights
from tests.test_distributed import in_processes

MISSING = [
    name for name in ("tyro", "yaml", "tensorboard") if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"of the training extras {', '.join(MISSING)} cannot be imported"
)

CLASSES, SIZE, TRAIN, TEST = 3, 16, 24, 6
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of noisy stripes, one direction per class."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                wave = np.sin((x * label + y * (CLASSES - label)) / 2 + random.uniform(0, 6))
                noise = random.normal(0, 20, (SIZE, SIZE, 3))
                pixels = 128 + 60 * wave[..., None] + noise
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def options(images: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "--data", str(images), "--out", str(out), "--no-progress", "--device", "cpu"),
        *("--student", "cifar_resnet20", "--epochs", "3", "--batch-size", "12", "--lr", "0.05"),
        *("--milestones", "2", "--eval-batch-size", "10", "--no-tensorboard", "--pad", "2"),
        *more,
    ]


def run(images: Path, out: Path, *more: str) -> list[dict[str, str]]:
    assert main(options(images, out, *more)) == 0
    return log(out)


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """The folder of a trained teacher."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run(images, out, "--student", "cifar_resnet32", "--epochs", "4")
    return out


def of(teacher: Path, method: str, nd: float = 0.0, *more: str) -> list[str]:
    return [
        *("--teacher", "cifar_resnet32", "--teacher-weights", str(teacher)),
        *("--method", method, "--nd-weight", str(nd), "--kd-warm-up", "2", *more),
    ]


@pytest.fixture
def double():
    """The test computes in float64, and so do the commands it runs."""
    with in_float64():
        yield


# -- the loop -------------------------------------------------------------------------------------


def test_a_run_equals_a_plain_loop(images, teacher, tmp_path, double):
    """KD++ by the command against PyTorch's own losses, optimiser and schedule."""
    rows = run(images, tmp_path / "run", *of(teacher, "kd", 1.5, "--seed", "3"))

    data = load_image_folder(images, progress=False)
    mean, std = (torch.tensor(v) for v in ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))
    normalise = lambda pixels: (  # noqa: E731
        (pixels.double() / 255 - mean[:, None, None]) / std[:, None, None]
    )
    other = create_model("cifar_resnet32", CLASSES).eval()
    load_weights(other, teacher / "best.safetensors")
    with torch.no_grad():
        features = other.forward_head(other.forward_features(normalise(data.train.pixels)), True)
        means = torch.stack([features[data.train.target == c].mean(0) for c in range(CLASSES)])
    kept = ClassMeans.load(tmp_path / "run" / "class_means.safetensors")
    torch.testing.assert_close(kept.compute().double(), means, rtol=1e-5, atol=1e-6)
    means = kept.compute().double()  # what was kept is float32

    torch.manual_seed(3)
    student = create_model("cifar_resnet20", CLASSES)
    sgd = torch.optim.SGD(student.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [2], 0.1)
    batches = sources.TrainBatches(
        data.train, 12, mean=mean.tolist(), std=std.tolist(), seed=3, pad=2
    )
    for epoch in range(3):
        losses = []
        assert float(rows[epoch]["lr"]) == pytest.approx(sgd.param_groups[0]["lr"])
        assert float(rows[epoch]["kd_ramp"]) == epoch / 2
        for x, target in batches.epoch(epoch):
            with torch.no_grad():
                wanted = other.forward_head(other.forward_features(x), True)
                soft = F.softmax(other.fc(wanted) / 4, 1)
            own = student.forward_head(student.forward_features(x), True)
            logits = student.fc(own)
            kd = F.kl_div(F.log_softmax(logits / 4, 1), soft, reduction="batchmean") * 16
            unit = F.normalize(means[target], dim=1)
            longest = torch.maximum(own.norm(dim=1), wanted.norm(dim=1))
            nd = (1 - (own * unit).sum(1) / longest).mean()
            loss = F.cross_entropy(logits, target) + min(1, epoch / 2) * kd + 1.5 * nd
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        schedule.step()
        assert float(rows[epoch]["train_loss"]) == pytest.approx(np.mean(losses), **LOSS)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, **WEIGHTS)


@pytest.mark.parametrize(
    ("method", "nd"),
    [("ce", 2.0), ("kd", 0.0), ("dkd", 0.5), ("dist", 1.0), ("reviewkd", 0.0), ("reviewkd", 1.0)],
)
def test_every_method_trains(images, teacher, tmp_path, method, nd):
    rows = run(images, tmp_path / "run", *of(teacher, method, nd, "--epochs", "2"))
    assert len(rows) == 2
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert (float(rows[1]["train_nd"]) > 0) == (nd > 0)
    # Without a distillation nothing of the kind is shown, though there is a teacher.
    assert all((float(row["train_kd"]) > 0) == (method != "ce") for row in rows)
    first, second = (float(row["train_loss"]) for row in rows)
    ce, kd, nd_term = (float(rows[1][f"train_{name}"]) for name in ("ce", "kd", "nd"))
    assert second == pytest.approx(ce + 0.5 * kd + nd * nd_term, rel=1e-4)
    assert first != second
    for name in ("config.json", "result.json", "curves.png", "features.png", "best.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_unequal_widths_get_a_projector(images, teacher, tmp_path):
    more = ("--student", "cifar_wrn_16_2", "--epochs", "1")  # 128 features, the teacher's are 64
    rows = run(images, tmp_path / "run", *of(teacher, "kd", 1.0, *more))
    assert float(rows[0]["train_nd"]) > 0
    state = load_checkpoint(tmp_path / "run")
    assert state is not None
    assert state["step"]["projector.linear.weight"].shape == (64, 128)
    assert not any("projector" in name for name in weights(tmp_path / "run"))


def test_the_log_and_the_result_say_the_same(images, tmp_path, capsys):
    rows = run(images, tmp_path / "run", "--tensorboard")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    accuracies = [float(row["test_top1"]) for row in rows]
    assert result["best_top1"] == max(accuracies)
    assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert result["last_top1"] == accuracies[-1]
    assert result["metric"] == "test_top1"
    assert result["published_top1"] is None
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    # The accuracy, independently, of both weights.
    data = load_image_folder(images, progress=False)
    values = NORMALISATION["cifar"]
    mean, std = (torch.tensor(value)[:, None, None] for value in values)
    for name, wanted in (("best", max(accuracies)), ("last", accuracies[-1])):
        model = create_model("cifar_resnet20", CLASSES).eval()
        load_weights(model, tmp_path / "run" / f"{name}.safetensors")
        with torch.no_grad():
            hits = model((data.test.pixels / 255 - mean) / std).argmax(1) == data.test.target
        assert 100 * hits.double().mean().item() == pytest.approx(wanted, abs=1e-3)
    capsys.readouterr()
    command = ["eval", "--model", "cifar_resnet20", "--weights", str(tmp_path / "run")]
    assert main([*command, "--data", str(images), "--no-progress", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["test_top1"] == pytest.approx(max(accuracies))


def test_diagnostics_are_those_of_the_features(images, teacher, tmp_path, capsys):
    capsys.readouterr()
    rows = run(images, tmp_path / "run", *of(teacher, "kd", 1.0, "--epochs", "1"))
    data = load_image_folder(images, progress=False)
    config = TrainConfig()
    mean, std = (torch.tensor(v)[:, None, None] for v in config.data.normalisation.values())
    x = (data.test.pixels / 255 - mean) / std
    taken = {}
    for name, file in (
        ("cifar_resnet32", teacher / "best.safetensors"),
        ("cifar_resnet20", tmp_path / "run" / "last.safetensors"),
    ):
        model = create_model(name, CLASSES).eval()
        load_weights(model, file)
        with torch.no_grad():
            taken[name] = model.forward_head(model.forward_features(x), True)
    own, wanted = taken["cifar_resnet20"], taken["cifar_resnet32"]
    means = ClassMeans.load(tmp_path / "run" / "class_means.safetensors").compute()
    near = {"rel": 1e-4}
    ratio = (own.norm(dim=1).sum() / wanted.norm(dim=1).sum()).item()
    assert float(rows[0]["norm_ratio"]) == pytest.approx(ratio, **near)
    cosine = F.cosine_similarity(own, means[data.test.target]).mean().item()
    assert float(rows[0]["cosine"]) == pytest.approx(cosine, **near)
    reached = (own.norm(dim=1) >= wanted.norm(dim=1)).double().mean().item()
    assert float(rows[0]["reached"]) == pytest.approx(reached, abs=1e-6)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    of_teacher = json.loads((teacher / "result.json").read_text())
    assert result["teacher_top1"] == of_teacher["best_top1"]
    assert "teacher_top1" not in of_teacher
    told = capsys.readouterr().out
    assert f", the teacher's {result['teacher_top1']:.2f}; " in told
    assert " \n" not in told


def test_learning_rate_and_ramp():
    optim = replace(TrainConfig(), {"lr": 0.1, "milestones": [2, 4], "epochs": 6}).optim
    assert [learning_rate(optim, t) for t in (0, 1.9, 2, 3.5, 4)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )
    cosine = replace(TrainConfig(), {"lr": 0.2, "epochs": 4, "schedule": "cosine"}).optim
    assert [learning_rate(cosine, t) for t in (0, 2, 4)] == pytest.approx([0.2, 0.1, 0])
    assert [ramp(4, epoch) for epoch in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramp(0, 0) == 1


def test_adamw_warm_up_clipping_and_average_equal_a_plain_loop(images, tmp_path, double, capsys):
    more = ("--optimizer", "adamw", "--lr", "0.002", "--betas", "0.9", "0.95", "--epochs", "2")
    more += ("--weight-decay", "0.3", "--no-decay-vectors", "--clip-grad", "0.5", "--schedule")
    more += ("cosine", "--lr-warm-up", "1", "--lr-start", "0.0001", "--lr-end", "0.0005")
    more += ("--ema-decay", "0.8", "--label-smoothing", "0.1")
    rows = run(images, tmp_path / "run", *more)

    data = load_image_folder(images, progress=False)
    torch.manual_seed(0)
    student = create_model("cifar_resnet20", CLASSES)
    average = {name: value.clone() for name, value in student.state_dict().items()}
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    config = TrainConfig().data
    batches = sources.TrainBatches(data.train, 12, **config.normalisation, seed=0, pad=2)
    for epoch in range(2):
        losses = []
        for step, (x, target) in enumerate(batches.epoch(epoch)):
            time_ = epoch + step / 6
            rate = 0.0005 + 0.0015 * 0.5 * (1 + math.cos(math.pi * time_ / 2))
            if epoch == 0:
                rate = 0.0001 + 0.0019 * time_
            for group in adam.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(student(x), target, label_smoothing=0.1)
            adam.zero_grad()
            loss.backward()
            norm = sum(p.grad.square().sum() for p in student.parameters()).sqrt()
            for p in student.parameters():
                p.grad *= min(1.0, 0.5 / norm.item())
            adam.step()
            losses.append(loss.item())
            for name, value in student.state_dict().items():
                share = 0.8 if epoch or step else 0.0  # the first step is taken as it is
                average[name] = share * average[name] + (1 - share) * value
        assert float(rows[epoch]["train_loss"]) == pytest.approx(np.mean(losses), **LOSS)
    found = weights(tmp_path / "run")
    for name in found:
        if "num_batches" not in name:
            torch.testing.assert_close(found[name], average[name], **WEIGHTS)
    assert {"test_top1", "ema_test_top1"} <= rows[0].keys()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best_top1"] == max(float(row["ema_test_top1"]) for row in rows)
    assert result["metric"] == "ema_test_top1"
    told = f"best top-1 of the average (ema_test_top1) {result['best_top1']:.2f} in epoch "
    assert told in capsys.readouterr().out


def test_accumulated_parts_are_one_batch(images, tmp_path):
    """The gradients of parts add up to that of the batch; BatchNorm alone sees the parts."""
    config = replace(
        TrainConfig(), {"data": str(images), "student": "cifar_resnet20", "batch_size": 12}
    )
    task = Classification(config, open_source(config, ALONE, progress=False), None, ALONE)
    task.step.eval()  # BatchNorm by its running statistics: samples do not see each other
    batch = next(iter(task.batches(0, 0)))
    gradients = []
    for parts in (1, 3):
        task.step.zero_grad()
        for part in task.split(batch, parts):
            (task.step(*part, torch.tensor(1.0))[0] / parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.step.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "momentum"),
    [("ce", None), ("kd", None), ("dkd", None), ("dist", None), ("reviewkd", None), ("kd", 0.5)],
)
def test_the_step_compiles_as_one_graph(images, teacher, tmp_path, method, momentum):
    from dnkd_ext.train.gather import gather_class_means

    config = replace(
        TrainConfig(),
        {
            "data": str(images),
            "student": "cifar_resnet20",
            "batch_size": 12,
            "method": method,
            "nd_weight": 1.0,
            "teacher": "cifar_resnet32",
            "class_means_momentum": momentum,
            "progress": False,
        },
    )
    source = open_source(config, ALONE, progress=False)
    other = load_teacher("cifar_resnet32", str(teacher), source, torch.device("cpu"))
    means = gather_class_means(other.model, source, config, ALONE)
    task = Classification(config, source, other._replace(class_means=means), ALONE)
    batch = next(iter(task.batches(0, 0)))
    task.step.eval()
    wanted = [value.item() for value in task.step(*batch, torch.tensor(0.5))]
    torch._dynamo.reset()
    compiled = torch.compile(task.step, fullgraph=True, dynamic=False, backend="aot_eager")
    if momentum is not None:
        moved = {name: value.clone() for name, value in task.step.running.state_dict().items()}
        for value in task.step.running.state_dict().values():
            value.zero_()
        task.class_means.zero_()
    got = [value.item() for value in compiled(*batch, torch.tensor(0.5))]
    assert got == pytest.approx(wanted, rel=1e-4)
    if momentum is not None:
        for name, value in task.step.running.state_dict().items():
            torch.testing.assert_close(value, moved[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(task.class_means, task.step.running.means.compute())


# -- interrupted ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(images, teacher, tmp_path_factory):
    """A run with dropout in its projector that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(images, out, *student_options(teacher))


def student_options(teacher: Path) -> list[str]:
    return of(teacher, "kd", 1.0, "--student", "cifar_wrn_16_2", "--epochs", "4")


def test_goes_on_exactly_after_kill(images, teacher, whole, tmp_path):
    out = tmp_path / "run"
    # Slow, so that there is time to kill it.
    script = """
import sys, time
from dnkd_ext.cli import main
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.teacher import load_teacher
batches = Classification.batches
def slow(self, epoch, start):
    for batch in batches(self, epoch, start):
        time.sleep(0.2 if epoch > 1 else 0)
        yield batch
Classification.batches = slow
sys.exit(main(sys.argv[1:]))
"""
    arguments = options(images, out, *student_options(teacher))
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        limit = time.monotonic() + 300
        while not ((out / "log.csv").exists() and len(log(out)) >= 2):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < limit
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "result.json").exists()
    rows = run(images, out, *student_options(teacher), "--resume")
    assert rows == whole[1]
    assert same(weights(out), weights(whole[0]))
    assert same(weights(out, "best"), weights(whole[0], "best"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, 6])
def test_goes_on_exactly_within_an_epoch(
    images, teacher, whole, tmp_path, monkeypatch, capsys, number, step
):
    out = tmp_path / "run"
    batches = Classification.batches

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if epoch == 1 and i == step - 1:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(Classification, "batches", interrupted)
    status = main(options(images, out, *student_options(teacher)))
    assert status == 128 + number
    where = "in epoch 2 after step 3" if step == 3 else "after epoch 2"  # step 6 is the last
    assert f"stopped by {number.name} {where}" in capsys.readouterr().out
    assert len(log(out)) == (1 if step == 3 else 2)
    monkeypatch.setattr(Classification, "batches", batches)
    assert run(images, out, *student_options(teacher), "--resume") == whole[1]
    assert same(weights(out), weights(whole[0]))


def test_a_long_epoch_has_checkpoints_of_its_own(images, teacher, whole, tmp_path, monkeypatch):
    """By time, of a step at which the loss is looked at; what was killed goes on exactly there."""
    out = tmp_path / "run"
    more = [*student_options(teacher), "--log-every", "2", "--checkpoint-minutes", "1e-9"]
    batches = Classification.batches

    def killed(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 5):
                raise KeyboardInterrupt  # nothing is written any more
            yield batch

    # Writing them takes no time of the training's.
    passed, save = [0.0], _Training._save

    def slow(self, epoch, start):
        save(self, epoch, start)
        passed[0] += 1000
        steps = f" and {start} steps" if start else ""
        assert f"after {epoch} epochs{steps} is kept" in self._advice()

    clock = types.SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + passed[0], monotonic=time.monotonic
    )
    monkeypatch.setattr(_Training, "_save", slow)
    monkeypatch.setattr(dnkd_ext.train.engine, "time", clock)
    monkeypatch.setattr(Classification, "batches", killed)
    assert main(options(images, out, *more)) == 130
    state = load_checkpoint(out)
    assert (state["epoch"], state["start"]) == (1, 4)
    assert state["seconds"] < 1000 < passed[0]
    monkeypatch.setattr(_Training, "_save", save)
    monkeypatch.setattr(Classification, "batches", batches)
    assert run(images, out, *more, "--resume") == whole[1]
    assert same(weights(out), weights(whole[0]))
    # Without, and long before it is time, there are those of the epochs alone.
    for minutes in ("0", "30"):
        saved = []
        monkeypatch.setattr(
            dnkd_ext.train.engine._Training, "_save",
            lambda self, epoch, start, saved=saved: saved.append((epoch, start)),
        )  # fmt: skip
        run(images, tmp_path / minutes, "--checkpoint-minutes", minutes, "--log-every", "1")
        assert saved == [(1, 0), (2, 0), (3, 0)]


def test_a_damaged_checkpoint_leaves_the_one_before(images, teacher, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    finish = dnkd_ext.train.engine._Training._finish

    def stop(self, epoch, *rest):
        if epoch == 3:
            raise KeyboardInterrupt
        finish(self, epoch, *rest)

    monkeypatch.setattr(dnkd_ext.train.engine._Training, "_finish", stop)
    assert main(options(images, out, *student_options(teacher))) == 130
    monkeypatch.undo()
    newest = out / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-2000])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert run(images, out, *student_options(teacher), "--resume") == whole[1]
    assert same(weights(out), weights(whole[0]))


def test_checkpoints_keep_the_one_before_and_run_nothing(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for number in range(3):
        save_checkpoint(tmp_path, {"number": number})
    assert load_checkpoint(tmp_path)["number"] == 2
    (tmp_path / "checkpoint.pt").unlink()  # killed between the two renames
    assert load_checkpoint(tmp_path)["number"] == 1
    torch.save({"format": "dnkd_ext checkpoint 1", "x": Path("a")}, tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read.*previous"):
        load_checkpoint(tmp_path)


@pytest.fixture
def full_disk():
    """A limit of 64 KiB on what is written to a file, where it stands for a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint.pt", "log.csv"])
def test_a_full_disk_is_told_with_the_files_name(tmp_path, full_disk, name):
    numbers = torch.arange(40_000)
    writes = {
        "weights.safetensors": lambda path, n: files.write_tensors(path, {"n": numbers[:n]}, {}),
        "checkpoint.pt": lambda path, n: save_checkpoint(path.parent, {"n": numbers[:n].clone()}),
        "log.csv": lambda path, n: files.write_csv(path, [{"n": i} for i in range(n)]),
    }
    path = tmp_path / name
    writes[name](path, 10)
    before = path.read_bytes()
    with pytest.raises(OSError, match=re.escape(str(path))):
        writes[name](path, 40_000)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_files_are_for_those_whom_the_umask_lets_read_them(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "weights", {"n": torch.zeros(3)}, {})
        files.write_json(tmp_path / "other", {})
    finally:
        os.umask(before)
    for name in ("weights", "other"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_a_finished_run_is_not_run_again(images, whole, teacher, monkeypatch, capsys):
    monkeypatch.setattr(Classification, "batches", None)
    before = (whole[0] / "result.json").stat().st_mtime_ns
    run(images, whole[0], *student_options(teacher), "--resume")
    assert (whole[0] / "result.json").stat().st_mtime_ns == before
    result = json.loads((whole[0] / "result.json").read_text())
    told = capsys.readouterr().out
    assert "finished before" in told
    assert f"best top-1 {result['best_top1']:.2f} in epoch {result['best_epoch']}, last" in told


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_a_folder_has_one_writer(images, tmp_path, capsys, more):
    """Whether the other has begun its run, or the folder alone is there yet."""
    out = tmp_path / "run"
    run(images, out, "--epochs", "1")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    holding = """
import sys, time
from pathlib import Path
from dnkd_ext.train.files import OwnFolders
with OwnFolders() as own:
    own.take(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", holding, str(out)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "taken\n"
        told = refused(options(images, out, "--epochs", "1", *more), capsys)
        assert f"another process writes to {out}" in told
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    finally:
        other.kill()
        other.communicate()
    assert len(run(images, out, "--epochs", "1", *(more or ["--overwrite"]))) == 1


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_what_another_process_did_meanwhile_is_not_touched(
    images, tmp_path, monkeypatch, capsys, more
):
    """Of several runs, folders that were not there yet when all were looked at."""
    seeds = ["--epochs", "1", "--seeds", "0,1,2", *more]
    folders = [tmp_path / "run" / f"seed-{seed}" for seed in (0, 1, 2)]
    train, before = jobs.train, {}

    def busy(*arguments, **options_):
        log = train(*arguments, **options_)
        if not before:
            before["none"] = None
            run(images, folders[1], "--epochs", "2", "--seed", "1")
            before.update({path: path.stat().st_mtime_ns for path in folders[1].iterdir()})
        return log

    monkeypatch.setattr(jobs, "train", busy)
    told = refused(options(images, tmp_path, *seeds), capsys)
    wrong = "holds a run of another configuration" if "--resume" in more else "already holds a run"
    assert f"1 of 3 runs failed: run, seed 1, in {folders[1]}: {folders[1]} {wrong}" in told
    assert {path: path.stat().st_mtime_ns for path in folders[1].iterdir()} | {
        "none": None
    } == before
    for folder, epochs in zip(folders, (1, 2, 1), strict=True):
        assert len(log(folder)) == epochs


def test_what_another_process_finished_meanwhile_is_taken(images, tmp_path, monkeypatch, capsys):
    folder, train = tmp_path / "run" / "seed-1", jobs.train

    def busy(*arguments, **options_):
        found = train(*arguments, **options_)
        monkeypatch.setattr(jobs, "train", train)
        run(images, folder, "--epochs", "1", "--seed", "1")
        return found

    monkeypatch.setattr(jobs, "train", busy)
    more = ["--epochs", "1", "--seeds", "0,1", "--resume"]
    assert main(options(images, tmp_path, *more)) == 0
    assert "finished meanwhile: run, seed 1" in capsys.readouterr().out
    with (tmp_path / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["seeds"] == "2"


def test_a_folder_that_was_made_anew_is_taken_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with files.OwnFolders() as own, files.OwnFolders() as other:
        assert own.take(folder)
        assert not own.take(folder)
        folder.rmdir()
        folder.mkdir()
        assert own.take(folder)
        with pytest.raises(BlockingIOError, match=f"another process writes to {folder}"):
            other.take(folder)


def test_a_folder_is_not_held_by_what_was_forked(tmp_path):
    """A killed run's loading processes may live on for a while."""
    with files.OwnFolders() as own:
        own.take(tmp_path)
        own.take(tmp_path)  # it is its own already
        (reading, writing), (told, telling) = os.pipe(), os.pipe()
        child = os.fork()
        if child:
            os.close(telling)
        if not child:
            os.close(writing)
            os.write(telling, b"x")
            os.read(reading, 1)  # until the other end is closed
            os._exit(0)
        assert os.read(told, 1) == b"x"
        own.release(tmp_path)
        try:
            with files.OwnFolders() as again:
                again.take(tmp_path)
                with files.OwnFolders() as third, pytest.raises(BlockingIOError, match="another"):
                    third.take(tmp_path)
        finally:
            os.close(writing)
            os.waitpid(child, 0)
            for end in (reading, told):
                os.close(end)


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_a_start_that_failed_leaves_no_run(images, teacher, tmp_path, monkeypatch, capsys, more):
    """Neither while class means were gathered nor when the task was made."""
    out, begin = tmp_path / "run", Classification.__init__
    arguments = options(images, out, *of(teacher, "kd", 1.0))

    def fail(self, *_):
        raise ValueError("no")

    monkeypatch.setattr(Classification, "__init__", fail)
    assert "no" in refused(arguments, capsys)
    assert not (out / "config.json").exists()
    monkeypatch.setattr(Classification, "__init__", begin)
    (out / "config.json").write_text('{"lr": 7.0}')  # as earlier versions left it
    rows = run(images, out, *of(teacher, "kd", 1.0, *more), "--epochs", "1")
    assert len(rows) == 1
    assert json.loads((out / "config.json").read_text())["lr"] == 0.05


# -- several processes, several runs --------------------------------------------------------------


def test_two_processes_train_as_one(images, teacher, tmp_path, double):
    """Two processes with half of each batch against one that takes it in two parts."""
    more = of(teacher, "kd", 1.0, "--epochs", "2")
    alone = run(images, tmp_path / "alone", *more, "--accumulate", "2")
    done = by_two_in_float64(tmp_path, options(images, tmp_path / "both", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    both = log(tmp_path / "both")
    for one, two in zip(alone, both, strict=True):
        for name in ("train_loss", "train_ce", "train_kd", "train_nd", "train_top1"):
            assert float(two[name]) == pytest.approx(float(one[name]), **LOSS), name
    # The same parameters; running statistics are averaged in one and follow in the other.
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "both")
    for name in one:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(two[name], one[name], **WEIGHTS)
    # Twice as many updates from 0 have brought the one nearer to the same mean.
    name = "bn1.running_mean"
    found = [one[name] / (1 - 0.9**24), two[name] / (1 - 0.9**12)]
    assert (found[0] - found[1]).abs().max() <= 0.2 * found[0].abs().max()
    result = json.loads((tmp_path / "both" / "result.json").read_text())
    assert result["processes"] == 2
    means = [ClassMeans.load(tmp_path / n / "class_means.safetensors") for n in ("alone", "both")]
    torch.testing.assert_close(means[0].compute(), means[1].compute(), rtol=1e-5, atol=1e-6)
    assert means[0].counts.tolist() == means[1].counts.tolist() == [TRAIN] * CLASSES


def test_several_seeds_get_folders_and_a_summary(images, tmp_path, capsys):
    assert main(options(images, tmp_path, "--epochs", "1", "--seeds", "0,4")) == 0
    results = [
        json.loads((tmp_path / "run" / f"seed-{seed}" / "result.json").read_text())
        for seed in (0, 4)
    ]
    assert [result["seed"] for result in results] == [0, 4]
    assert not same(*(weights(tmp_path / "run" / f"seed-{seed}") for seed in (0, 4)))
    with (tmp_path / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    best = [result["best_top1"] for result in results]
    assert float(row["best_top1"]) == pytest.approx(np.mean(best), abs=1e-3)
    assert float(row["best_top1_std"]) == pytest.approx(np.std(best, ddof=1), abs=1e-3)
    assert "± " in capsys.readouterr().out
    out = tmp_path / "picture"
    folders = [str(tmp_path / "run" / f"seed-{seed}") for seed in (0, 4)]
    assert main(["plot", *folders, "--out", str(out)]) == 0
    assert (out / "curves.png").stat().st_size > 10_000
    for option, value in (("--teacher-weights", "x"), ("--count", "2"), ("--device", "cpu")):
        told = refused(["plot", *folders, "--out", str(out), option, value], capsys)
        assert f"{option} is for the boxes of --task detection, got {value}" in told


def test_runs_in_a_picture_are_told_apart(tmp_path, monkeypatch):
    """By preset, or student and method; by their folders where all that is the same."""
    base = {"preset": "", "student": "cifar_shufflenetv2", "seed": 0, "nd_weight": 0.0}
    preset = {**base, "preset": "cifar100/resnet56-resnet20/kd++"}
    runs = {
        "ce": {**base, "method": "ce"},
        "kd": {**base, "method": "kd"},
        "kd++": {**base, "method": "kd", "nd_weight": 1.5},
        "first": {**base, "method": "dkd"},
        "second": {**base, "method": "dkd", "lr": 1.0},
        "third": {**base, "method": "dkd", "lr": 2.0},
        "preset": {**preset, "method": "kd", "nd_weight": 2.0},
        "weight": {**preset, "method": "kd", "nd_weight": 1.5},
        "other": {**preset, "method": "dkd"},
        "teacher": {**base, "preset": "cifar100/teacher/resnet56", "method": "ce"},
        "gone": {**base, "preset": "cifar100/no-more/kd", "method": "kd"},
        "old": {"student": "cifar_resnet20", "seed": 1},
    }
    for name, settings in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        (tmp_path / name / "log.csv").write_text("epoch,test_top1\n1,50.0\n")
    drawn: list[str] = []
    monkeypatch.setattr(commands, "plot_curves", lambda rows, path: drawn.extend(rows))
    # A folder that is named twice is one run.
    commands.run_plot([tmp_path / name for name in (*runs, "ce", "second")], tmp_path / "out")
    assert drawn == [
        "cifar_shufflenetv2, ce, seed 0",
        "cifar_shufflenetv2, kd, seed 0",
        "cifar_shufflenetv2, kd, nd 1.5, seed 0",
        *(
            f"cifar_shufflenetv2, dkd, seed 0 ({tmp_path / name})"
            for name in ("first", "second", "third")
        ),
        "cifar100/resnet56-resnet20/kd++, seed 0",
        "cifar100/resnet56-resnet20/kd++, kd, nd 1.5, seed 0",
        "cifar100/resnet56-resnet20/kd++, dkd, seed 0",
        "cifar100/teacher/resnet56, seed 0",
        "cifar100/no-more/kd, kd, seed 0",
        "cifar_resnet20, seed 1",
    ]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"the old one")
    rows = {"run": [{"epoch": 1, "test_top1": 3.0}]}

    def full(self, place, **_):
        Path(place).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        plot_curves(rows, path)
    assert path.read_bytes() == b"the old one"
    assert [one.name for one in tmp_path.iterdir()] == ["curves.png"]
    monkeypatch.undo()
    plot_curves(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_summary_keeps_runs_of_other_options_apart(images, tmp_path, capsys):
    more = ("--resume", "--log-every", "3")
    assert main(options(images, tmp_path, "--epochs", "1", "--seeds", "0,1")) == 0
    assert main(options(images, tmp_path, "--epochs", "1", "--seeds", "1,2", *more)) == 0
    with (tmp_path / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["seeds"], row["differing"]) == ("3", "")
    capsys.readouterr()
    assert main(options(images, tmp_path, "--epochs", "2", "--seeds", "3,4", "--pad", "1")) == 0
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seeds"] for row in rows] == ["3", "2"]
    assert [row["differing"] for row in rows] == ["pad 2, epochs 1", "pad 1, epochs 2"]
    for row, seeds in zip(rows, ((0, 1, 2), (3, 4)), strict=True):
        results = [tmp_path / "run" / f"seed-{seed}" / "result.json" for seed in seeds]
        best = [json.loads(result.read_text())["best_top1"] for result in results]
        assert float(row["best_top1"]) == pytest.approx(np.mean(best), abs=1e-3)
    told = capsys.readouterr().out
    assert "  with pad 1, epochs 2\n" in told
    assert "\nrun         3 " in told


def test_a_series_goes_on_after_a_run_that_failed(images, tmp_path, monkeypatch, capsys):
    batches = Classification.batches

    def broken(self, epoch, start):
        spoilt = self.step.student.conv1.weight.sum() == self.weights
        for pixels, target in batches(self, epoch, start):
            yield pixels * (math.nan if spoilt else 1), target

    torch.manual_seed(1)
    first = create_model("cifar_resnet20", CLASSES).conv1.weight.sum()
    monkeypatch.setattr(Classification, "weights", first.detach(), raising=False)
    monkeypatch.setattr(Classification, "batches", broken)
    arguments = options(images, tmp_path, "--epochs", "1")
    assert main([*arguments, "--seeds", "1,2"]) == 2
    told = capsys.readouterr()
    folder = tmp_path / "run" / "seed-1"
    failed = f"run, seed 1, in {folder}: epoch 1, step 1 of 6: ce is not finite"
    assert f"failed: {failed}" in told.out
    assert "1 of 2 runs failed" in told.err
    assert failed in told.err
    assert json.loads((tmp_path / "run" / "seed-2" / "result.json").read_text())["seed"] == 2
    with (tmp_path / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["seeds"] == "1"
    assert main([*arguments, "--seed", "1", "--out", str(tmp_path / "one")]) == 2
    assert f"run, seed 1, in {tmp_path / 'one'}: epoch 1" in capsys.readouterr().err


def test_runs_at_once_are_those_one_after_another(
    images, teacher, tmp_path, capfd, monkeypatch, request
):
    """The same figures; class means are gathered and images decoded once, for all of them."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # as each of the processes has; sums are added in another order else
    more = of(teacher, "kd", 1.0, "--epochs", "1", "--kd-warm-up", "0", "--seeds", "0,4")
    run_all = lambda name, *own: main(options(images, tmp_path / name, *more, *own))  # noqa: E731
    assert run_all("alone") == 0
    assert run_all("both", "--at-once", "2") == 0
    for seed in ("seed-0", "seed-4"):
        one, two = (tmp_path / name / "run" / seed for name in ("alone", "both"))
        assert log(one) == log(two)
        assert same(weights(one), weights(two))
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        assert json.loads((two / "config.json").read_text())["cache"] is None
        assert json.loads((two / "result.json").read_text())["config"]["cache"] is None
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"run", "summary.csv"}
    assert capfd.readouterr().out.count("accuracies in percent") == 2
    # One that fails leaves the others alone, and is named.
    (tmp_path / "both" / "run" / "seed-0" / "result.json").unlink()
    (tmp_path / "both" / "run" / "seed-4" / "result.json").unlink()
    (tmp_path / "both" / "run" / "seed-4" / "last.safetensors").unlink()
    (tmp_path / "both" / "run" / "seed-4" / "last.safetensors").mkdir()
    assert run_all("both", "--at-once", "2", "--resume") == 2
    told = capfd.readouterr().err
    assert "1 of 2 runs failed" in told
    assert "seed-4 (exit status 2)" in told
    assert (tmp_path / "both" / "run" / "seed-0" / "result.json").exists()
    assert "--at-once must be at least 1" in refused(
        options(images, tmp_path / "none", *more, "--at-once", "0"), capfd
    )


def test_images_that_a_killed_call_decoded_are_removed(tmp_path):
    (tmp_path / ".images.0.unfinished").write_bytes(b"images")
    (tmp_path / "other").write_bytes(b"something")
    with jobs._decoded_once([], tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_before_runs_at_once_all_is_read_once_and_given_back(
    images, teacher, tmp_path, monkeypatch
):
    seen, jobs_seen = [], []
    opened = tasks.open_data
    loaded = tasks.load_teacher

    def counted(function, *arguments, **given):
        result = function(*arguments, **given)
        seen.append(weakref.ref(result if function is opened else result.model))
        return result

    def begin(jobs, number, hand_over):
        jobs_seen.extend(jobs)
        assert number == 2
        for job in jobs:  # each is this process's until another's run begins
            with files.OwnFolders() as other:
                with pytest.raises(BlockingIOError, match="another process writes to"):
                    other.take(job.out)
                hand_over(job.out)
                other.take(job.out)
        assert [one() for one in seen] == [None, None]
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "open_data", functools.partial(counted, opened))
    monkeypatch.setattr(tasks, "load_teacher", functools.partial(counted, loaded))
    monkeypatch.setattr("dnkd_ext.train.jobs.train_at_once", begin)
    more = [*of(teacher, "kd", 1.0, "--seeds", "0,1"), "--at-once", "5"]
    out = tmp_path / "run"
    assert main(options(images, out, *more)) == 130
    assert {path.name for path in out.iterdir()} == {"run"}
    assert {job.config.data.cache for job in jobs_seen} != {None}
    assert {job.settings["cache"] for job in jobs_seen} == {None}
    # A file of the user's stays, whatever its name.
    seen.clear()
    cache = tmp_path / "images.safetensors"
    assert main(options(images, tmp_path, *more, "--cache", str(cache))) == 130
    assert cache.exists()
    assert jobs_seen[-1].settings["cache"] == str(cache)
    # Nor does anything stay where class means were interrupted, or something was refused.
    monkeypatch.setattr(tasks, "gather_class_means", begin_nothing)
    assert main(options(images, tmp_path / "other", *more)) == 130
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"run"}
    assert main(options(images, tmp_path / "no" / "other", *more, "--batch-size", "999")) == 2
    assert not (tmp_path / "no").exists()


def begin_nothing(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_runs_at_once_stop_together_and_go_on(images, tmp_path, number):
    """A signal to the one process, of which the others know nothing."""
    more = ("--epochs", "40", "--seeds", "0,1", "--at-once", "2")
    command = [sys.executable, "-m", "dnkd_ext", *options(images, tmp_path, *more)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    folders = [tmp_path / "run" / f"seed-{seed}" for seed in (0, 1)]
    try:
        end = time.monotonic() + 120
        while not all((folder / "checkpoint.pt").exists() for folder in folders):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)  # until all of them have ended
    finally:
        process.kill()
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert told.count("the checkpoint is in") == 2
    assert ("--resume goes on with all runs" in told) == (number == signal.SIGTERM)
    for folder in folders:
        assert load_checkpoint(folder)["epoch"] < 40
        assert not (folder / "result.json").exists()


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


# -- class means while training -------------------------------------------------------------------

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


def figures_of(rank: int, size: int, images: str, teacher: str) -> list:
    """What is drawn of the features, and the teacher's accuracy."""
    settings = {"data": images, "student": "cifar_resnet20", "nd_weight": 1.0, "method": "kd"}
    settings |= {"teacher": "cifar_resnet32", "batch_size": 12, "eval_batch_size": 10}
    config = replace(TrainConfig(), {**settings, "progress": False})
    world = World(rank, size, torch.device("cpu"))
    source = open_source(config, world, progress=False)
    given = load_teacher("cifar_resnet32", teacher, source, world.device)
    means = ClassMeans(CLASSES, 64)
    generator = torch.Generator().manual_seed(0)
    means.update(torch.rand(CLASSES, 64, generator=generator), torch.arange(CLASSES))
    task = Classification(config, source, given._replace(class_means=means), world)
    norms, cosines = task.feature_figures(*task.evaluated)
    figures = [
        {name: np.sort(values).tolist() for name, values in one.items()} for one in (norms, cosines)
    ]
    return [*figures, task.teacher_top1]


def test_features_of_all_processes_are_drawn(images, teacher, tmp_path):
    """The same on both of them as on one alone, whose test images they share."""
    wanted = figures_of(0, 1, str(images), str(teacher))
    assert {len(values) for one in wanted[:2] for values in one.values()} == {CLASSES * TEST}
    for norms, cosines, top1 in in_processes(figures_of, tmp_path, str(images), str(teacher)):
        for found, known in zip((norms, cosines), wanted, strict=False):
            assert found.keys() == known.keys() == {"teacher", "student"}
            for name, values in known.items():
                assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5)
        assert top1 == wanted[2]


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


# -- refused --------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_left_alone(images, teacher, whole, capsys):
    out, _ = whole
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    arguments = options(images, out, *student_options(teacher))
    assert "--resume" in refused(arguments, capsys)
    told = refused([*arguments, "--resume", "--lr", "0.5", "--nd-weight", "3"], capsys)
    assert "lr is 0.5, was 0.05" in told
    assert "nd_weight is 3.0, was 1.0" in told
    assert "pass one" in refused([*arguments, "--resume", "--overwrite"], capsys)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_its_own_data_teacher_and_class_means_only(
    images, teacher, tmp_path, capsys, monkeypatch
):
    out, batches = tmp_path / "run", Classification.batches
    means = ClassMeans(CLASSES, 64)
    means.update(torch.rand(CLASSES, 64), torch.arange(CLASSES))
    means.save(tmp_path / "means.safetensors")
    again = ClassMeans(CLASSES, 64)
    again.update(torch.rand(CLASSES, 64), torch.arange(CLASSES))
    again.save(tmp_path / "again.safetensors")
    other = tmp_path / "other"
    run(images, other, "--student", "cifar_resnet32", "--epochs", "1", "--seed", "5")
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    (fewer / "train" / "class0" / "0.png").unlink()

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    given = ("--class-means", str(tmp_path / "means.safetensors"))
    arguments = options(images, out, *of(teacher, "kd", 1.0, *given))
    monkeypatch.setattr(Classification, "batches", interrupted)
    assert main(arguments) == 128 + signal.SIGTERM
    monkeypatch.setattr(Classification, "batches", batches)
    before = contents(out)
    capsys.readouterr()
    for more, message in (
        (["--teacher-weights", str(other)], "teacher is cifar_resnet32"),
        (["--data", str(fewer)], "data is 71 + 18 images"),
        (["--class-means", str(tmp_path / "again.safetensors")], "class_means is "),
    ):
        told = refused([*arguments, "--resume", *more], capsys)
        assert "holds another training" in told
        assert message in told
        assert contents(out) == before
    assert main([*arguments, "--resume", "--no-tensorboard"]) == 0


def test_what_one_of_two_trainings_has_makes_them_differ(tmp_path):
    before, now = {"data": "x"}, {"data": "x", "backbone": "y"}
    check_identity(tmp_path, {"identity": before}, before)
    with pytest.raises(ValueError, match="backbone is y, in the checkpoint none"):
        check_identity(tmp_path, {"identity": before}, now)
    with pytest.raises(ValueError, match="backbone is none, in the checkpoint y"):
        check_identity(tmp_path, {"identity": now}, before)


def test_goes_on_in_another_memory_format(images, teacher, tmp_path, monkeypatch, double):
    """The momentum is then laid out anew; a fused optimiser goes by its memory alone."""
    more = of(teacher, "kd", 1.0)
    wanted = run(images, tmp_path / "whole", *more, "--no-channels-last")
    finish = dnkd_ext.train.engine._Training._finish

    def stop(self, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        finish(self, epoch, *rest)

    monkeypatch.setattr(dnkd_ext.train.engine._Training, "_finish", stop)
    assert main(options(images, tmp_path / "run", *more, "--no-channels-last")) == 130
    monkeypatch.undo()
    rows = run(images, tmp_path / "run", *more, "--resume", "--channels-last")
    for one, two in zip(wanted, rows, strict=True):
        assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), **LOSS)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "run")
    for name in one:
        if "num_batches" not in name:
            torch.testing.assert_close(two[name], one[name], **WEIGHTS)


def test_a_run_of_an_older_version_goes_on(images, tmp_path):
    out = tmp_path / "run"
    rows = run(images, out)
    config = json.loads((out / "config.json").read_text())
    del config["logit_standardization"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "result.json").unlink()
    assert run(images, out, "--resume") == rows


def test_weights_that_are_not_finite_are_not_kept(images, tmp_path, monkeypatch, capsys):
    """A gradient that is NaN in an epoch's last step, with a loss that is finite."""
    step = dnkd_ext.train.engine._Training._step

    def broken(self, batch):
        step(self, batch)
        if self.meter.step == 6 and self.epoch == 1:
            with torch.no_grad():
                self.parameters[1][0] = math.nan

    monkeypatch.setattr(dnkd_ext.train.engine._Training, "_step", broken)
    told = refused(options(images, tmp_path / "run"), capsys)
    assert "epoch 2: the weights student." in told
    assert "the checkpoint after 1 epochs is kept" in told
    state = load_checkpoint(tmp_path / "run")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["step"].values())


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


def test_overwriting_ones_teacher_is_refused(images, teacher, capsys):
    before = contents(teacher)
    told = refused(options(images, teacher, *of(teacher, "kd", 1.0), "--overwrite"), capsys)
    assert "would remove --teacher-weights" in told
    assert contents(teacher) == before


def test_overwriting_what_another_run_reads_is_refused(images, teacher, tmp_path, capsys):
    """A file that any of the runs reads, in a folder that any of them has."""
    out = tmp_path / "run" / "seed-1"
    shutil.copytree(teacher, out)
    ClassMeans(CLASSES, 64).save(out / "class_means.safetensors")
    before = contents(out)
    for given, more in (
        ("--teacher-weights", of(out, "kd")),
        (
            "--class-means",
            of(teacher, "kd", 1.0, "--class-means", f"{out}/class_means.safetensors"),
        ),
    ):
        arguments = options(images, tmp_path, *more, "--seeds", "0,1", "--overwrite")
        assert f"would remove {given}" in refused(arguments, capsys)
        assert contents(out) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_all(images, tmp_path, rank):
    """Nobody waits for ever for one that writes a file, or has read something else."""
    script = f"""
import os, sys
from dnkd_ext.cli import main
import dnkd_ext.train.engine as engine
def broken(*arguments, **options):
    raise OSError("no space left")
if os.environ["RANK"] == "{rank}":
    name = "write_csv" if {rank} == 0 else "learning_rate"
    setattr(engine, name, broken)
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "script.py").write_text(script)
    own = options(images, tmp_path / "run", "--epochs", "2")
    done = by_two(str(tmp_path / "script.py"), *own, timeout=120)
    assert done.returncode != 0
    assert "no space left" in done.stderr


def test_of_several_processes_one_tells_what_is_wrong(images, tmp_path):
    """Whatever is found before or after they meet; each process ends with the same status."""
    wrong = [
        options(images, tmp_path / "run", *more)
        for more in (
            ["--seeds", "1,1"],
            ["--no-such-option"],
            ["--lr", "0"],
            ["--data", str(tmp_path / "none")],
            ["--student", "cifar_resnet21"],
        )
    ]
    means = ["class-means", "--model", "x", "--weights", "y", "--out", str(tmp_path / "m")]
    wrong += [[*means, "--data", str(images), "--device", "cpu", "--eval-batch-size", "0"]]
    wrong += [["eval", "--model", "x", "--weights", "y", "--data", str(images), "--device", "cpu"]]
    script = f"""
import os, sys
from dnkd_ext.cli import main
for command in {wrong!r}:
    print("command", file=sys.stderr)
    try:
        status = main(command)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2, status
sys.stderr.flush()
os._exit(0)  # with the process group of the commands that failed
"""
    (tmp_path / "script.py").write_text(script)
    done = by_two(str(tmp_path / "script.py"), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for message in (
        "--seeds must be different",
        "--no-such-option",
        "--lr must be greater than 0",
        "no data folder at",
        "no model 'cifar_resnet21'",
        "--eval-batch-size must be at least 1",
        "no weights at y",
    ):
        lines = [line for line in done.stderr.splitlines() if message in line]
        assert len(lines) == 1, (message, done.stderr)


def test_an_error_of_several_processes_is_no_abort(images, tmp_path):
    """Their group stands when they end."""
    wrong = options(images, tmp_path / "run", "--data", str(tmp_path / "none"))
    done = by_two("-m", "dnkd_ext", *wrong, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("no data folder at") == 1
    assert "terminate called" not in done.stderr
    found = re.findall(r"exitcode +: (-?\d+)", done.stderr)
    # torchrun ends the other one where it is not first.
    assert found
    assert {*found} <= {"2", str(-signal.SIGTERM)}


def test_overwrite_replaces_a_run_but_nothing_else(images, tmp_path):
    out = tmp_path / "run"
    run(images, out, "--epochs", "2")
    (out / "notes.txt").write_text("mine")
    rows = run(images, out, "--epochs", "1", "--overwrite")
    assert len(rows) == 1
    assert not (out / "checkpoint.previous.pt").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_wrong_inputs_are_told_before_anything_is_written(images, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    kd = of(teacher, "kd", 1.0)
    cases = [
        (["--data", str(tmp_path / "none")], "no data folder at"),
        (["--data", ""], "--data must name"),
        (["--student", "cifar_resnet21"], "no model 'cifar_resnet21'"),
        (["--batch-size", "1000"], "--batch-size must be at most the 72 training images"),
        (["--lr", "0"], "--lr must be greater than 0, got 0"),
        (["--accumulate", "5"], "--batch-size must be a multiple"),
        (["--milestones", "3", "2"], "--milestones must be growing"),
        (["--method", "kd"], "needs a --teacher"),
        (["--teacher", "cifar_resnet32"], "has no part in --method ce"),
        (["--method", "kd", "--teacher", "cifar_resnet32"], "--teacher-weights must name"),
        ([*kd, "--teacher", "cifar_resnet20"], "holds the weights of another network"),
        (
            [*of(teacher, "reviewkd"), "--student", "cifar_vgg8"],
            "not there for models of different numbers of stages: with the embedding, --student",
        ),
        ([*kd, "--teacher-weights", str(tmp_path)], "without best.safetensors"),
        ([*kd, "--class-means", str(tmp_path / "no.safetensors")], "no class-means file"),
        (["--seeds", "1,1"], "--seeds must be different"),
        (["--seed", "3", "--seeds", "1,2"], "--seed 3 is for one run and --seeds 1,2 for several"),
        (["--limit", "2"], "--limit must be at least one image for each of 3 classes, got 2"),
        (["--mean", "0.5"], "--mean must have a value for each of 3 channels"),
        (["--mean", "0.5", "nan", "0.5"], "--mean must be finite numbers, got (0.5, nan, 0.5)"),
        (["--std", "1", "1", "nan"], "--std must be finite numbers, got (1.0, 1.0, nan)"),
        (
            [*of(teacher, "dist"), "--logit-standardization"],
            "--logit-standardization is for --method kd and dkd, got --method dist",
        ),
        (
            [*kd, "--mid-channels", "64"],
            "--mid-channels is for --method reviewkd, got --method kd",
        ),
    ]
    for more, message in cases:
        assert message in refused(options(images, out, *more), capsys), more
        assert not out.exists(), more
    means = ClassMeans(CLASSES + 1, 64)
    means.update(torch.rand(4, 64), torch.arange(4))
    means.save(tmp_path / "four.safetensors")
    more = [*kd, "--class-means", f"{tmp_path}/four.safetensors"]
    told = refused(options(images, out, *more), capsys)
    assert "has 4 classes, but the data have 3" in told
    assert not out.exists()


def test_weights_of_images_normalised_otherwise(images, tmp_path, capsys):
    """Told wherever they are used, by the options with which they are used rightly."""
    as_they_were = ("--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.5", "0.5")
    network = ("--student", "cifar_resnet20", "--epochs", "1")
    out, student = tmp_path / "teacher", tmp_path / "student"
    rows = run(images, out, *network, *as_they_were)
    message = "was trained on images normalised by --mean 0.1 0.2 0.3 --std 0.5 0.5 0.5, and this "
    seen = ["--model", "cifar_resnet20", "--data", str(images), "--no-progress", "--device", "cpu"]
    distil = ("--teacher", "cifar_resnet20", "--teacher-weights", str(out), "--method", "kd")
    means = str(tmp_path / "means.safetensors")
    for command in (
        ["eval", *seen, "--weights", str(out)],
        ["class-means", *seen, "--weights", str(out), "--out", means],
        options(images, student, *network, *distil),
    ):
        assert message in refused(command, capsys)
        if command[0] == "eval":
            capsys.readouterr()
            assert main([*command, *as_they_were]) == 0
            found = json.loads(capsys.readouterr().out)["test_top1"]
            assert found == pytest.approx(float(rows[-1]["test_top1"]))
    assert not student.exists()
    assert not Path(means).exists()
    half = ("--mean", "0.1", "0.2", "0.3")
    told = refused(options(images, student, *network, *distil, *half), capsys)
    assert "was trained on images normalised by --std 0.5 0.5 0.5, and this is with --std 0" in told


def test_weights_and_features_that_are_not_finite(images, teacher, tmp_path, capsys, monkeypatch):
    """Said of the teacher, before a loss could be blamed."""
    state = load_file(teacher / "best.safetensors")
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = math.nan
    broken = tmp_path / "broken.safetensors"
    save_file(state, broken)
    message = "broken.safetensors holds values that are not finite, the first in layer1.0.conv1"
    seen = ["--model", "cifar_resnet32", "--data", str(images), "--no-progress", "--device", "cpu"]
    assert message in refused(["eval", *seen, "--weights", str(broken)], capsys)
    kd = of(teacher, "kd", 1.0, "--teacher-weights", str(broken))
    assert message in refused(options(images, tmp_path / "run", *kd), capsys)

    def overflowing(model, x):
        features, logits = given(model, x)
        return features * math.inf, logits * math.nan

    given = gather.features
    monkeypatch.setattr(gather, "features", overflowing)
    means = tmp_path / "means.safetensors"
    command = ["class-means", *seen, "--weights", str(teacher), "--out", str(means)]
    message = "the teacher's features are not finite, in the classes 'class0', 'class1', 'class2'"
    for more in ([], ["--resume"]):  # nothing of the pass is left
        assert message in refused([*command, *more], capsys)
        assert [*tmp_path.glob("means*")] == []
    both = options(images, tmp_path / "both", *of(teacher, "kd", 1.0, "--seeds", "0,1"))
    for more in ([], ["--at-once", "2"]):
        assert f"2 of 2 runs failed: run, seed 0, in {tmp_path}" in refused([*both, *more], capsys)
    table = ClassMeans(CLASSES, 64)
    table.update(torch.full((CLASSES, 64), math.nan), torch.arange(CLASSES))
    table.save(means)
    named = of(teacher, "kd", 1.0, "--class-means", str(means))
    told = refused(options(images, tmp_path / "run", *named), capsys)
    assert f"{means} holds class means that are not finite" in told
    monkeypatch.setattr("dnkd_ext.train.evaluation.features", overflowing)
    capsys.readouterr()
    assert main(["eval", *seen, "--weights", str(teacher)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["test_top1"], found["test_top5"]) == (0, 0)


def test_the_table_leaves_out_what_is_no_result(images, tmp_path, capsys):
    """By a warning that names it; what failed is told all the same."""
    for name, content in (("a", "[1, 2]"), ("b", '{"acc": 1'), ("c", '{"preset": null}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content)
    with pytest.warns(UserWarning, match="left out of the table") as caught:
        assert main(options(images, tmp_path, "--epochs", "1", "--seeds", "0,1")) == 0
    told = [str(w.message) for w in caught if "left out of the table" in str(w.message)]
    assert [Path(one.split()[0]).parent.name for one in told] == ["a", "b", "c"]
    (row,) = csv.DictReader((tmp_path / "summary.csv").open())
    assert row["seeds"] == "2"
    assert "± " in capsys.readouterr().out


def test_several_runs_are_not_put_below_one(images, tmp_path, capsys):
    """Else a seed would count twice in the table."""
    run(images, tmp_path / "run", "--epochs", "1")
    arguments = options(images, tmp_path / "run", "--epochs", "1", "--seeds", "0,1", "--resume")
    told = refused(arguments, capsys)
    assert f"--out {tmp_path / 'run'} is the folder of a run" in told
    assert not (tmp_path / "run" / "run").exists()
    # What was stopped before it had a log is none.
    for path in (tmp_path / "run").iterdir():
        if path.is_file() and path.name != "config.json":
            path.unlink()
    assert main(arguments) == 0


def test_a_result_that_is_none_is_no_finished_run(images, tmp_path, capsys):
    out = tmp_path / "run"
    run(images, out, "--epochs", "1")
    (out / "result.json").write_text("[1]")
    told = refused(options(images, out, "--epochs", "1", "--resume"), capsys)
    assert f"{out} holds a damaged config.json or result.json: it is no result of a run" in told


def test_options_of_other_methods(images, teacher, tmp_path, capsys):
    """A preset's own, and those for another preset of the call, are left out."""

    def read(*more):
        given = ["--data", str(images), "--out", str(tmp_path / "run"), *more]
        return [config.method for config, _ in arguments._read_train(given)[1]]

    (method,) = read("--preset", "coco/r101-r18/reviewkd", "--method", "kd")
    assert (method.method, method.mid_channels) == ("kd", None)
    (method,) = read("--preset", "coco/r101-r18/reviewkd")
    assert method.mid_channels == 256
    found = read("--preset", "cifar100/resnet56-resnet20/{ce,kd,kd++}", "--logit-standardization")
    assert [method.logit_standardization for method in found] == [False, True, True]
    with pytest.raises(ValueError, match="--mid-channels is for --method reviewkd, got --method k"):
        read("--preset", "cifar100/resnet56-resnet20/{kd,dkd}", "--mid-channels", "64")
    # A run of before, whose configuration has such an option, goes on.
    out = tmp_path / "old"
    rows = run(images, out, *of(teacher, "dist", 0.0, "--epochs", "1"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "logit_standardization": True}))
    (out / "result.json").unlink()
    assert run(images, out, *of(teacher, "dist", 0.0, "--epochs", "1", "--resume")) == rows


def test_that_a_students_tag_has_no_part_is_told(images, tmp_path, capsys):
    pytest.importorskip("timm")
    run(images, tmp_path / "run", "--student", "test_resnet.r160_in1k", "--epochs", "1")
    told = capsys.readouterr().out
    assert "note: a student begins with fresh weights, not with test_resnet's .r160_in1k" in told


def test_an_epoch_that_a_signal_ended_is_in_tensorboard(images, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluate, count = Classification.evaluate, 0

    def interrupted(self, *arguments):
        nonlocal count
        count += 1
        if count == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    arguments = options(images, tmp_path / "run", "--tensorboard")
    monkeypatch.setattr(Classification, "evaluate", interrupted)
    assert main(arguments) == 128 + signal.SIGTERM
    assert main([*arguments, "--resume"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("test_top1")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("test_top1")] == pytest.approx(
        [float(row["test_top1"]) for row in log(tmp_path / "run")]
    )


def test_the_bar_of_runs_at_once_follows_their_logs(tmp_path):
    from dnkd_ext.train import at_once

    class Bar:
        def __init__(self):
            self.epochs, self.said = 0, ""

        def advance(self, steps):
            self.epochs += steps

        def say(self, stage):
            self.said = stage

    jobs = [types.SimpleNamespace(out=tmp_path / name) for name in "ab"]
    bar, seen = Bar(), {job.out: at_once._epochs(job.out)[0] for job in jobs}
    assert set(seen.values()) == {0}
    for job, speeds in zip(jobs, ([90, 100], [250]), strict=True):
        job.out.mkdir()
        rows = [{"epoch": i, "images_per_second": speed} for i, speed in enumerate(speeds)]
        files.write_csv(job.out / "log.csv", rows)
    at_once._show(bar, jobs, jobs, seen)
    assert (bar.epochs, bar.said) == (3, "runs at once: 2, 350 img/s")
    bar.said = ""
    at_once._show(bar, jobs, jobs, seen)
    assert (bar.epochs, bar.said) == (3, "")  # without a bar it would be a line every time
    files.write_csv(jobs[0].out / "log.csv", 3 * [{"epoch": 1, "images_per_second": 110}])
    at_once._show(bar, jobs, jobs[:1], seen)
    assert (bar.epochs, bar.said) == (4, "runs at once: 1, 110 img/s")


def test_a_loss_that_is_not_finite_is_named(images, teacher, tmp_path, capsys, monkeypatch):
    batches = Classification.batches

    def broken(self, epoch, start):
        for i, (pixels, target) in enumerate(batches(self, epoch, start), start):
            yield (pixels * math.nan if (epoch, i) == (1, 2) else pixels), target

    monkeypatch.setattr(Classification, "batches", broken)
    told = refused(options(images, tmp_path / "run", *of(teacher, "kd", 1.0)), capsys)
    assert "epoch 2, step 3 of 6: ce and kd and nd are not finite" in told
    assert "the checkpoint after 1 epochs is kept" in told
    assert load_checkpoint(tmp_path / "run")["epoch"] == 1
    assert len(log(tmp_path / "run")) == 1


def test_the_meter_names_the_first_step():
    meter = Meter(2, torch.device("cpu"))
    for values in ((1.0, 2.0), (3.0, math.inf), (5.0, math.nan)):
        meter.add(torch.tensor(values))
    means, bad = meter.read(ALONE)
    assert means[0] == 3.0
    assert bad == [None, 1]
    meter.reset(7)
    meter.add(torch.tensor([math.nan, 0.0]))
    assert meter.read(ALONE)[1] == [7, None]


def test_configurations_survive_json():
    config = replace(TrainConfig(), {"milestones": [1, 2], "limit": 5, "lr": 1})
    flat = json.loads(json.dumps(flatten(config)))
    assert replace(TrainConfig(), flat) == config
    assert isinstance(config.optim.lr, float)
    for settings, message in (
        ({"learning_rate": 1}, "no such option of a training run: learning_rate"),
        ({"epochs": 1.5}, "epochs must be an integer, got 1.5"),
        ({"method": "nothing"}, "method must be one of ce, kd"),
        ({"milestones": 3}, "milestones must be a list, got 3"),
        ({"flip": 1}, "flip must be true or false, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TrainConfig(), settings)


@pytest.mark.parametrize("command", ["eval", "class-means"])
def test_commands_that_do_not_train_have_the_options_they_use(images, tmp_path, capsys, command):
    out = [] if command == "eval" else ["--out", str(tmp_path / "means")]
    own = [command, "--model", "cifar_resnet20", "--weights", "x", "--data", str(images), *out]
    for more in (
        ["--compile"],
        ["--fsdp"],
        ["--wandb"],
        ["--cuda-graph"],
        ["--checkpoint-every", "2"],
        ["--hflip", "0.3"],
        ["--pad", "2"],
        ["--epoch-steps", "2"],
        ["--trainable-layers", "2"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*own, *more])
        assert stopped.value.code == 2
        assert more[0] in capsys.readouterr().err
    for more, message in (
        (["--eval-batch-size", "0"], "--eval-batch-size must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--std", "1", "0", "1"], "--std must be positive"),
    ):
        assert message in refused([*own, *more], capsys)
    if command == "class-means":
        assert "--seed is for --task detection" in refused([*own, "--seed", "1"], capsys)


def test_help_tells_every_option(capsys):
    for command in ("train", "presets", "class-means", "eval", "plot"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name in flatten(TrainConfig()):
        assert f"--{name.replace('_', '-')}" in text, name
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", "x", "--preset"])
    assert stopped.value.code == 2
    assert "dnkd train: error: argument --preset: expected one argument" in capsys.readouterr().err


def test_the_device_is_prepared_before_anything_runs_on_it(images, teacher, tmp_path, monkeypatch):
    """cuBLAS asks for its workspace's settings once, at its first product of matrices."""
    order = []

    def note(own, *arguments):
        order.append(own.__name__)
        return own(*arguments)

    for name in ("prepare_device", "_check_inputs"):
        monkeypatch.setattr(jobs, name, functools.partial(note, getattr(jobs, name)))
    run(images, tmp_path / "run", *of(teacher, "kd", 1.0, "--epochs", "1"))
    assert order[:2] == ["prepare_device", "_check_inputs"]


def test_defaults_are_those_of_the_device_and_the_task():
    gpu, two = World(0, 1, torch.device("cuda")), World(0, 2, torch.device("cuda", 0))
    for place, task, more, wanted in (
        (ALONE, "cifar", {}, (500, 1)),
        (gpu, "cifar", {}, (2000, 10)),
        (two, "cifar", {}, (2000, 10)),
        (gpu, "imagenet", {}, (500, 1)),
        (gpu, "detection", {}, (500, 1)),
        (gpu, "cifar", {"eval_batch_size": 7}, (7, 10)),
        (two, "imagenet", {"checkpoint_every": 3, "eval_batch_size": 7}, (8, 3)),
    ):
        run_options = replace(TrainConfig(), {"precision": "float32", **more}).run
        found = resolve(run_options, place, task)
        assert (found.eval_batch_size, found.checkpoint_every) == wanted
        assert (found.cuda_graph, found.compile) == (False, False)
        assert resolve(found, place, task) == found


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("more", [["--cuda-graph"], ["--compile"], ["--precision", "bfloat16"]])
def test_faster_ways_train_alike(images, teacher, tmp_path, more):
    # At a rate at which rounding does not decide where a run goes.
    base = ["--device", "cuda", "--precision", "float32", *of(teacher, "kd", 1.0), "--lr", "0.005"]
    base.append("--no-cuda-graph")
    plain = run(images, tmp_path / "plain", *base)
    other = run(images, tmp_path / "other", *base, *more)
    # Differences of rounding grow from epoch to epoch.
    nears = (0.02, 0.1, 0.1) if "bfloat16" in more else (2e-3, 5e-3, 5e-3)
    for one, two, near in zip(plain, other, nears, strict=True):
        assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=near)
