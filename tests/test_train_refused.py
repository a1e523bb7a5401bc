"""What training commands refuse, and how they tell it."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dnkd_ext import ClassMeans, class_means
from dnkd_ext.cli import main
from dnkd_ext.train import arguments, commands, engine, gather, shared, tasks
from dnkd_ext.train.checkpoint import load_checkpoint
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import TrainConfig, flatten
from dnkd_ext.train.summary import result_line
from tests.runs import by_two, log
from tests.stripes import CLASSES, SKIPPED, contents, of, options, refused, run

pytestmark = SKIPPED


def test_weights_that_are_not_finite_are_not_kept(images, tmp_path, monkeypatch, capsys):
    """A gradient that is NaN in an epoch's last step, with a loss that is finite."""
    step = engine._Training._step

    def broken(self, batch):
        step(self, batch)
        if self.meter.step == 6 and self.epoch == 1:
            with torch.no_grad():
                self.parameters[1][0] = math.nan

    monkeypatch.setattr(engine._Training, "_step", broken)
    told = refused(options(images, tmp_path / "run"), capsys)
    assert "epoch 2: the weights student." in told
    assert "the checkpoint after 1 epochs is kept" in told
    state = load_checkpoint(tmp_path / "run")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["step"].values())


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
    # Of the other one no traceback, whether torchrun or the lost connection ends it first.
    assert "RuntimeError" not in done.stderr


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


def test_a_configuration_of_another_program_is_not_replaced(images, tmp_path, capsys):
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["Bert"]}')
    before = contents(out)
    told = refused(options(images, out, "--epochs", "1"), capsys)
    assert f"{out / 'config.json'}: " in told
    assert "architectures" in told
    assert "it would be replaced: choose another --out" in told
    assert contents(out) == before


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
        (["--lr", "inf"], "--lr must be finite, got inf"),
        (["--clip-grad", "inf"], "--clip-grad must be finite, got inf"),
        (["--trainable-layers", "9"], "--trainable-layers is for --task detection, got 9"),
        (["--mixup", "-1"], "--mixup is for --task imagenet, got -1"),
        (["--clip-grad", "0"], "--clip-grad must be greater than 0, got 0"),
        (["--momentum", "1"], "--momentum must be in [0, 1), got 1"),
        (["--drop-path", "1.5"], "--drop-path must be between 0 and 1, got 1.5"),
        (["--temperature", "nan"], "--temperature must be finite, got nan"),
        (["--weight-decay", "inf"], "--weight-decay must be finite, got inf"),
        (["--dropout", "nan"], "--dropout must be finite, got nan"),
        (["--ema-decay", "inf"], "--ema-decay must be finite, got inf"),
        (["--accumulate", "5"], "--batch-size must be a multiple"),
        (["--milestones", "3", "2"], "--milestones must be growing"),
        (["--method", "kd"], "needs a --teacher"),
        (["--teacher", "cifar_resnet32"], "has no part in --method ce"),
        (["--teacher-weights", str(teacher)], "--teacher-weights has no part in --method ce"),
        (["--class-means", str(teacher)], "--class-means has no part in --method ce"),
        (["--seeds", f"0,{2**64}"], f"--seed must be from 0 to 2^63 - 1, got {2**64}"),
        (["--method", "kd", "--teacher", "cifar_resnet32"], "--teacher-weights must name"),
        ([*kd, "--teacher", "cifar_resnet20"], "holds the weights of another network"),
        (
            [*of(teacher, "reviewkd"), "--student", "cifar_vgg8"],
            "not there for models of different numbers of stages: with the embedding, --student",
        ),
        ([*kd, "--teacher-weights", str(tmp_path)], "without best.safetensors"),
        ([*kd, "--class-means", str(tmp_path / "no.safetensors")], "no class-means file"),
        (["--pad", "17"], "pad must be at most the images' larger side, 16, got 17"),
        (["--cache", f"{tmp_path}/best.safetensors"], "is what a run calls a file of its own"),
        (["--config", f"{teacher}/result.json"], "it is a run's result; name its config.json"),
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


def test_missing_weights_are_told_before_images_are_read(
    images, teacher, tmp_path, monkeypatch, capsys
):
    """Which may take minutes."""
    read = []
    monkeypatch.setattr(tasks, "open_data", lambda *_: read.append("train"))
    monkeypatch.setattr(commands, "open_source", lambda *_, **__: read.append("eval"))
    out, empty = str(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    train = [*options(images, out), *of(teacher, "kd", 1.0)]
    given = ["--data", str(images), "--device", "cpu", "--model", "cifar_resnet20", "--weights"]
    for command, message in (
        ([*train, "--teacher-weights", str(empty)], "is a folder without best.safetensors"),
        ([*train, "--teacher-weights", str(empty / "no")], "no weights at"),
        ([*train, "--class-means", str(empty / "no")], "no class-means file at"),
        (["class-means", "--out", out, *given, str(empty)], "is a folder without best.safetensors"),
        (["eval", *given, str(empty / "no")], "no weights at"),
    ):
        assert message in refused(command, capsys), command
        assert not read, command
        assert not Path(out).exists()


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
    with monkeypatch.context() as patch:  # save() refuses
        patch.setattr(class_means, "rows_not_finite", lambda _: [])
        table.save(means)
    named = of(teacher, "kd", 1.0, "--class-means", str(means))
    told = refused(options(images, tmp_path / "run", *named), capsys)
    assert f"{means} holds class means that are not finite" in told
    monkeypatch.setattr("dnkd_ext.train.evaluation.features", overflowing)
    capsys.readouterr()
    assert main(["eval", *seen, "--weights", str(teacher)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["test_top1"], found["test_top5"]) == (0, 0)


def test_a_result_that_is_none_is_no_finished_run(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(images, out, "--epochs", "1")
    with monkeypatch.context() as changed:  # of a finished run nothing is written
        changed.setattr("dnkd_ext.train.files.os.access", lambda *_: False)
        run(images, out, "--epochs", "1", "--resume")
        assert "finished before" in capsys.readouterr().out
    config = (out / "config.json").read_text()
    (out / "config.json").write_text("[1]")
    told = refused(options(images, out, "--epochs", "1", "--resume"), capsys)
    assert f"{out / 'config.json'} is damaged, or no configuration of a run: it holds a l" in told
    for name, value, wanted in (
        ("workers", "4", "an integer, got '4'"),
        ("preset", 5, "a text, got 5"),
    ):
        (out / "config.json").write_text(json.dumps({**json.loads(config), name: value}))
        told = refused(options(images, out, "--epochs", "1", "--resume"), capsys)
        assert f"{out / 'config.json'}: {name} must be {wanted}" in told
    (out / "config.json").write_text(config)
    result = json.loads((out / "result.json").read_text())
    without = {name: value for name, value in result.items() if name != "best_epoch"}
    assert "best top-1" in result_line({**result, "metric": None}, out)
    wrong = [{"best_top1": None}, {"metric": 5}, {"training_seconds": "x"}, {"preset": ["a"]}]
    for damaged in ([1], without, *({**result, **changes} for changes in wrong)):
        (out / "result.json").write_text(json.dumps(damaged))
        told = refused(options(images, out, "--epochs", "1", "--resume"), capsys)
        assert f"{out} holds a damaged result.json: it is no result of a run" in told


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


@pytest.mark.parametrize("command", ["train", "class-means", "eval"])
def test_places_that_cannot_be_written_to_are_told_before_images_are_read(
    command, images, tmp_path, monkeypatch, capsys
):
    """Images decoded for minutes would be lost."""

    def read(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setattr(tasks, "open_data", read)
    monkeypatch.setattr(shared.Shared, "source", read)
    monkeypatch.setattr(commands, "open_source", read)
    (tmp_path / "file").write_text("")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    seen = ["--model", "cifar_resnet20", "--weights", str(tmp_path / "weights.safetensors")]
    given = {
        "train": (options(images, tmp_path)[:3], "--out"),
        "class-means": (["class-means", "--data", str(images), *seen], "--out"),
        "eval": (["eval", "--task", "detection", "--data", str(images), *seen], "--detections"),
    }
    words, option = given[command]
    out = tmp_path / "file" / "run" / "x"
    told = refused([*words, option, str(out)], capsys)
    assert f"{option} {out}: {tmp_path / 'file'} is a file" in told
    out = tmp_path / "run" / "x"
    monkeypatch.setattr("dnkd_ext.train.files.os.access", lambda path, _: path != tmp_path)
    told = refused([*words, option, str(out)], capsys)
    assert f"{option} {out}: {tmp_path} cannot be written to" in told
    assert not (tmp_path / "run").exists()
