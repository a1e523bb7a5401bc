"""Training steps of the benchmarks: the same but for the loss, and rows that say what was run."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks import e2e, report, steps
from benchmarks.__main__ import main


def networks():
    """A teacher and a student as small as they get, with features of one width."""

    def network(hidden):
        return nn.Sequential(
            nn.Conv2d(3, hidden, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(hidden, 12), nn.ReLU(), nn.Linear(12, 5),
        )  # fmt: skip

    return network(8), network(4)


def tiny(name="cifar", dtype=torch.float32, channels_last=False):
    return e2e.Shape(name, "tiny -> tinier", 6, 8, 5, dtype, channels_last, networks)


@pytest.fixture
def no_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_the_criterion_gives_the_same_loss(dtype, no_compile):
    """bfloat16 and channels last are what a GPU gets."""
    trainer = e2e.Trainer(tiny(dtype=dtype, channels_last=dtype == torch.bfloat16), "cpu")
    logits, *_ = trainer.forward("CE")
    assert logits.dtype == dtype
    losses = trainer.losses()
    assert {*losses} == {
        "CE",
        "KD",
        *(f"KD++ {form}" for form in ("loop", "eager", "compile", "ours")),
    }
    assert losses["CE"] < losses["KD"] < losses["KD++ ours"]


def without_features(criterion):
    return lambda a, b, features, *rest: criterion(a, b, features.detach(), *rest)


def without_logits(criterion):
    def changed(logits, *rest):
        return criterion(logits.detach(), *rest) + 0 * logits.sum()

    return changed


def of_other_classes(criterion):
    return lambda a, b, c, d, means, target: criterion(a, b, c, d, means, (target + 1) % 5)


@pytest.mark.parametrize("name", ["CE", "KD", "KD++ loop", "KD++ eager", "KD++ ours"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda criterion: lambda *inputs: 1.1 * criterion(*inputs), "computes"),
        (of_other_classes, "computes"),
        (without_features, "gives a gradient for features"),
        (without_logits, "gives a gradient for logits"),
    ],
    ids=["scaled", "other classes", "no features", "no logits"],
)
def test_a_criterion_that_computes_something_else_is_not_timed(name, change, message, no_compile):
    trainer = e2e.Trainer(tiny(), "cpu")
    trainer.criteria[name] = change(trainer.criteria[name])
    if "features" in message and not name.startswith("KD++"):
        trainer.losses()  # which have no part in it
        return
    with pytest.raises(ValueError, match=re.escape(f"{name} {message}")):
        trainer.losses()


def test_a_form_that_cannot_be_compiled_is_left_out(no_compile, tmp_path, monkeypatch, capsys):
    class InductorError(RuntimeError):
        pass

    def fails(*_):
        raise InductorError("no compiler")

    made = e2e.methods
    monkeypatch.setattr(e2e, "methods", lambda means: {**made(means), "KD++ compile": fails})
    monkeypatch.setattr(e2e, "shape", lambda name, device: tiny(name))
    out = tmp_path / "steps.csv"
    assert main(["e2e", "--shape", "cifar", "--rounds", "1", "--out", str(out)]) == 0
    assert "KD++ compile is left out: no compiler" in capsys.readouterr().err
    assert [row["method"] for row in steps.read_steps(out)] == [
        "CE", "KD", "KD++ loop", "KD++ eager", "KD++ ours",
    ]  # fmt: skip


def test_a_step_trains_its_own_student_alone(no_compile):
    trainer = e2e.Trainer(tiny(), "cpu", ["KD++ ours", "KD++ eager"])
    before = {
        name: [p.detach().clone() for p in student.parameters()]
        for name, student in trainer.students.items()
    }
    teacher = [p.clone() for p in trainer.teacher.parameters()]
    first = trainer.step("KD++ ours")
    moved = [
        not torch.equal(a, b)
        for a, b in zip(
            before["KD++ ours"], trainer.students["KD++ ours"].parameters(), strict=True
        )
    ]
    assert all(moved)
    for old, now in (
        (before["KD++ eager"], trainer.students["KD++ eager"]),
        (teacher, trainer.teacher),
    ):
        assert all(torch.equal(a, b) for a, b in zip(old, now.parameters(), strict=True))
    # The other form takes the same step.
    torch.testing.assert_close(trainer.step("KD++ eager"), first)
    for a, b in zip(*(s.parameters() for s in trainer.students.values()), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_and_resumption(no_compile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(e2e, "shape", lambda name, device: tiny(name))
    monkeypatch.setattr(
        e2e, "unavailable", lambda name: "not installed" if name == "imagenet" else None
    )
    out = tmp_path / "steps.csv"
    command = ["e2e", "--rounds", "2", "--out", str(out)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "imagenet: not run, not installed" in captured.err
    assert "| KD++ loop |" in captured.out
    rows = steps.read_steps(out)
    assert [row["method"] for row in rows] == [*e2e.methods(torch.rand(5, 12))]
    assert all(row["low_ms"] <= row["step_ms"] <= row["high_ms"] for row in rows)
    assert all(row["rounds"] == 2 and row["shape"] == "cifar" for row in rows)
    assert len(steps.latest_steps([*rows, *rows])) == 1
    assert main([*command, "--resume"]) == 0
    assert "cifar: measured before" in capsys.readouterr().out
    assert len(steps.read_steps(out)) == len(rows)
    assert main(["e2e", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


def detector_shape(dtype):
    return e2e.Shape("detection", "a detector", 1, 64, 81, dtype, dtype == torch.bfloat16, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_of_the_criterion_over_proposals(dtype):
    """The same loss of the same proposals, and beside them the detector's own."""
    pytest.importorskip("torchvision")
    pytest.importorskip("yaml")
    from benchmarks.detection import DetectorTrainer

    trainer = DetectorTrainer(detector_shape(dtype), "cpu")
    assert [*trainer.criteria] == ["plain", "KD", "KD++ loop", "KD++ eager", "KD++ ours"]
    losses = trainer.losses()
    assert [*losses] == ["KD", "KD++ loop", "KD++ eager", "KD++ ours"]
    assert losses["KD"] < losses["KD++ ours"]
    assert [*trainer.criterion_calls()] == [*losses]
    logits, teacher_logits, features, teacher_features, means, labels = trainer.forward("KD")
    assert logits.shape == teacher_logits.shape == (len(labels), 81)
    assert features.shape == teacher_features.shape == (len(labels), 1024)
    assert means.shape == (81, 1024)
    assert features.dtype == dtype
    assert 0 < (labels > 0).sum() < len(labels) <= 512
    own, soft = (values.double().log_softmax(1) for values in (logits, teacher_logits))
    kd = (soft.exp() * (soft - own)).sum(1).mean().item()
    got = trainer.criteria["KD"](logits, teacher_logits, features, teacher_features, means, labels)
    assert got.item() == pytest.approx(kd, rel=1e-4)
    before = [p.clone() for p in trainer.students["plain"].parameters()]
    teacher = [p.clone() for p in trainer.teacher.parameters()]
    torch.manual_seed(5)
    loss = trainer.step("KD++ ours")
    torch.manual_seed(5)
    plain = trainer._forward("plain")[0]
    assert loss > plain > 0  # the same proposals, and KD and ND added
    assert all(map(torch.equal, before, trainer.students["plain"].parameters()))
    assert all(map(torch.equal, teacher, trainer.teacher.parameters()))
    moved = zip(before, trainer.students["KD++ ours"].parameters(), strict=True)
    assert all(torch.equal(a, b) != b.requires_grad for a, b in moved)


def test_a_method_without_a_loss_part_has_an_empty_cell(no_compile, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision", reason="the command refuses detectors without torchvision")
    trainer = e2e.Trainer(tiny("detection"), "cpu")
    plain = trainer.criteria.pop("CE")
    criteria, step = trainer.criteria, trainer.step
    trainer.criteria = {"plain": None, **criteria}
    trainer.students["plain"], trainer.optimizers["plain"] = (
        values["CE"] for values in (trainer.students, trainer.optimizers)
    )

    def step_(name):
        trainer.criteria = {"plain": plain, **criteria}
        try:
            return step(name)
        finally:
            trainer.criteria = {"plain": None, **criteria}

    monkeypatch.setattr(trainer, "step", step_)
    monkeypatch.setattr(e2e, "make_trainer", lambda shape, device: trainer)
    monkeypatch.setattr(e2e, "shape", lambda name, device: tiny(name))
    out = tmp_path / "steps.csv"
    assert main(["e2e", "--shape", "detection", "--rounds", "1", "--out", str(out)]) == 0
    assert re.search(
        r"\| plain \| [\d.]+ \([\d.-]+\) \| [\d,]+ \| - \| - \|", capsys.readouterr().out
    )
    rows = steps.read_steps(out)
    assert [row["method"] for row in rows][:2] == ["plain", "KD"]
    assert [rows[0][name] for name in ("loss_us", "loss_low_us", "loss_high_us")] == [None] * 3
    assert all(row["loss_us"] > 0 for row in rows[1:])
    # Its images are wide.
    text = report.render([], rows)
    assert "batch 6, 8x13, float32" in text
    assert "kinder than the published one" in text
    assert "e2e --shape detection --rounds 1 --out" in text


def test_the_shapes_are_those_of_the_claims():
    full, reduced = e2e.shape("detection", "cuda"), e2e.shape("detection", "cpu")
    assert (full.batch, full.image, steps.image_width("detection", 800)) == (8, 800, 1333)
    assert (full.dtype, full.channels_last, full.classes) == (torch.bfloat16, True, 81)
    assert (reduced.batch, reduced.image, reduced.dtype) == (2, 128, torch.float32)
    full, reduced = e2e.shape("imagenet", "cuda"), e2e.shape("imagenet", "cpu")
    assert (full.batch, full.image, full.dtype, full.channels_last) == (
        256,
        224,
        torch.bfloat16,
        True,
    )
    assert (reduced.batch, reduced.image, reduced.dtype) == (16, 64, torch.float32)
    cifar = e2e.shape("cifar", "cpu")
    assert (cifar.batch, cifar.image, cifar.models) == (128, 32, "resnet56 -> resnet20")
    teacher, student = cifar.make()
    assert sum(p.numel() for p in teacher.parameters()) == 861_620
    assert sum(p.numel() for p in student.parameters()) == 278_324
