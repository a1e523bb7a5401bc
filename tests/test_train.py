"""Training runs: against a plain loop, every method, compiled and recorded."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dnkd_ext import ClassMeans
from dnkd_ext.cli import main
from dnkd_ext.train import jobs
from dnkd_ext.train.checkpoint import load_checkpoint
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import NORMALISATION, TrainConfig, flatten, replace
from dnkd_ext.train.data import sources
from dnkd_ext.train.data.memory import load_image_folder
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.distillation import Distillation
from dnkd_ext.train.evaluation import evaluate
from dnkd_ext.train.models import create_model, load_weights
from dnkd_ext.train.plan import resolve
from dnkd_ext.train.schedule import learning_rate, ramp
from dnkd_ext.train.stepper import Meter
from dnkd_ext.train.teacher import load_teacher
from dnkd_ext.train.world import World
from tests.runs import LOSS, WEIGHTS, weights
from tests.stripes import ALONE, CLASSES, SKIPPED, of, run

pytestmark = SKIPPED


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
    shutil.copytree(images / "test", tmp_path / "alone" / "test")
    command += ["--data", str(tmp_path / "alone"), "--no-progress", "--device", "cpu"]
    assert main(command) == 0
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
    long = {"lr": 0.2, "epochs": 300, "schedule": "cosine", "lr_warm_up": 20.0}
    slow = replace(TrainConfig(), long).optim
    late = replace(TrainConfig(), {**long, "cosine_after_warm_up": True}).optim
    half = 0.2 * (1 + math.cos(math.pi / 2)) / 2
    assert [learning_rate(late, t) for t in (10, 20, 160, 300)] == pytest.approx(
        [0.1, 0.2, half, 0]
    )
    assert learning_rate(slow, 150) == pytest.approx(half)
    assert learning_rate(slow, 20) < 0.2
    with pytest.raises(ValueError, match="--cosine-after-warm-up wants --schedule cosine, got mul"):
        replace(TrainConfig(), {"data": "d", "cosine_after_warm_up": True}).check()
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
        ({"milestones": 3}, "milestones must be a list of integers, got 3"),
        ({"flip": 1}, "flip must be true or false, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TrainConfig(), settings)


def test_the_device_is_prepared_before_anything_runs_on_it(images, teacher, tmp_path, monkeypatch):
    """cuBLAS asks for its workspace's settings once, at its first product of matrices."""
    order = []

    def note(own, *arguments):
        order.append(own.__name__)
        return own(*arguments)

    for name in ("prepare_device", "check_inputs"):
        monkeypatch.setattr(jobs, name, functools.partial(note, getattr(jobs, name)))
    run(images, tmp_path / "run", *of(teacher, "kd", 1.0, "--epochs", "1"))
    assert order[:2] == ["prepare_device", "check_inputs"]


class Keeping(torch.nn.Module):
    """As some of timm's transformers: what evaluation keeps of the weights goes with train()."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 3)
        self.kept, self.changes = None, 0

    def train(self, mode=True):
        self.changes += 1
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, images):
        if self.kept is None:
            self.kept = self.scale.detach().clone()
        return self.head(self.norm(images * self.kept))


def test_evaluation_leaves_what_a_model_keeps_as_training_needs_it():
    """Gone after the evaluation of what is trained; untouched in a model that is not."""
    batch = torch.randn(6, 4), torch.arange(6) % 3, torch.ones(6, dtype=torch.bool)
    model = Keeping()
    model.norm.eval()  # frozen
    for factor in (1.0, -2.0):
        with torch.no_grad():
            model.scale.fill_(factor)
        found = evaluate(model, [batch], 3, contextlib.nullcontext(), ALONE, keep=True)
        assert (model.training, model.head.training, model.norm.training) == (True, True, False)
        wanted = model.norm(batch[0] * factor)
        torch.testing.assert_close(found.features, wanted.detach())
    model.eval()
    model(batch[0])
    kept, changes = model.kept, model.changes
    evaluate(model, [batch], 3, contextlib.nullcontext(), ALONE)
    assert model.kept is kept
    assert model.changes == changes


def test_deterministic_runs_fill_nothing_for_nobody(monkeypatch):
    """Of every fresh tensor in every step; and other runs leave PyTorch's setting alone."""
    kept = SimpleNamespace(fill_uninitialized_memory=True)
    monkeypatch.setattr(torch.utils, "deterministic", kept)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gpu = World(0, 1, torch.device("cuda"))
    for wanted in (False, True):
        jobs.prepare_device(replace(TrainConfig(), {"deterministic": wanted}), gpu)
        assert kept.fill_uninitialized_memory is not wanted


def test_the_cross_entropy_alone_has_its_weight():
    model = Keeping().eval()
    batch = torch.randn(6, 4), torch.arange(6) % 3
    for weight in (1.0, 0.25):
        step = Distillation(model, None, None, None, "ce", ce_weight=weight)
        loss, ce, *_ = step(*batch, torch.ones(()))
        torch.testing.assert_close(ce, F.cross_entropy(model(batch[0]), batch[1]).detach())
        torch.testing.assert_close(loss.detach(), weight * ce)


def test_a_recorded_step_cannot_check_targets(monkeypatch):
    gpu = World(0, 1, torch.device("cuda"))
    recorded = replace(TrainConfig(), {"cuda_graph": True, "precision": "float32"}).run
    assert resolve(recorded, gpu).cuda_graph
    monkeypatch.setenv("DNKD_CHECK_TARGET", "1")
    with pytest.raises(ValueError, match="--cuda-graph cannot record the check of targets"):
        resolve(recorded, gpu)


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


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("kd", ["--cuda-graph"]),
        ("dkd", ["--cuda-graph"]),
        ("dist", ["--cuda-graph"]),
        ("reviewkd", ["--cuda-graph"]),
        ("kd", ["--compile"]),
        ("kd", ["--precision", "bfloat16"]),
        ("kd", ["--teacher-outputs", "outputs", "--cuda-graph"]),
    ],
)
def test_faster_ways_train_alike(images, teacher, tmp_path, monkeypatch, method, more):
    monkeypatch.chdir(tmp_path)
    # At a rate at which rounding does not decide where a run goes.
    base = ["--device", "cuda", "--precision", "float32", "--lr", "0.005", "--no-cuda-graph"]
    base += of(teacher, method, 1.0)
    plain = run(images, tmp_path / "plain", *base)
    other = run(images, tmp_path / "other", *base, *more)
    # Differences of rounding grow from epoch to epoch.
    nears = (0.02, 0.1, 0.1) if "bfloat16" in more else (2e-3, 5e-3, 5e-3)
    for one, two, near in zip(plain, other, nears, strict=True):
        assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=near)
