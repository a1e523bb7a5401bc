"""Outputs of a teacher that steps look up: the same training, without running the teacher."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnkd_ext._files import TEMPORARY
from dnkd_ext.adapters import features
from dnkd_ext.cli import main
from dnkd_ext.train import distillation, locks, shared, teacher_outputs
from dnkd_ext.train.arguments import _read_train
from dnkd_ext.train.data.memory import load_image_folder
from dnkd_ext.train.models import create_model, load_weights
from dnkd_ext.train.signals import Signals
from tests.runs import LOSS, by_two_in_float64, environment, log, same, weights
from tests.stripes import CLASSES, SIZE, SKIPPED, TRAIN, contents, of, options, refused, run

pytestmark = SKIPPED

IMAGES = CLASSES * TRAIN
PAD = 1
CUTS, BATCH = 2 * (2 * PAD + 1) ** 2, 20
# The fewest cuts that are of all kinds, in batches that are not of one cut alone.
FEW = ("--pad", str(PAD), "--epochs", "2", "--eval-batch-size", str(BATCH))
METHODS = {
    "ce": (1.0,),
    "kd": (0.0,),
    "kd++": (1.0, "--no-flip", "--accumulate", "2"),
    "dkd": (1.0,),
    # By the usual rate its correlations come to be of outputs that hardly vary: the last bits of
    # the teacher's logits move weights by 1e-8 then, by this one by 1e-14.
    "dist": (1.0, "--lr", "0.005"),
    "hard_kd": (1.0,),
}


@pytest.fixture
def outputs(tmp_path):
    """The option, and a file that is not there yet."""
    return ("--teacher-outputs", str(tmp_path / "kept" / "outputs.safetensors"))


@pytest.fixture
def runs_of_teacher(monkeypatch):
    """How often steps run a model for its features, by the number of its parameters."""
    counts: dict[int, int] = {}

    def counted(model, images):
        size = sum(p.numel() for p in model.parameters())
        counts[size] = counts.get(size, 0) + 1
        return features(model, images)

    monkeypatch.setattr(distillation, "features", counted)
    return counts


def near(first, second, **tolerance):
    for one, two in zip(first, second, strict=True):
        for name in one:
            assert float(two[name]) == pytest.approx(float(one[name]), **tolerance), name


def test_every_output_is_the_teachers(images, teacher, tmp_path, outputs):
    """Of images that are cut here, one by one, in the order that the file's rows have."""
    run(images, tmp_path / "run", *of(teacher, "kd", 1.0, *FEW), *outputs)
    found = load_file(outputs[1])
    assert found["logits"].shape == (CUTS * IMAGES, CLASSES)
    assert found["norms"].shape == (CUTS * IMAGES,)
    model = create_model("cifar_resnet32", CLASSES).eval()
    load_weights(model, teacher / "best.safetensors")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["teacher_outputs"] == outputs[1]
    mean, std = (
        np.array(x)[:, None, None] for x in ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])
    )
    pixels = load_image_folder(images, progress=False).train.pixels.numpy()
    cut, rows = [], []
    for dy in range(3):
        for dx in range(3):
            for mirrored in range(2):
                for number in (0, 1, IMAGES - 1):
                    padded = np.pad(pixels[number], ((0, 0), (PAD, PAD), (PAD, PAD)))
                    one = padded[:, dy : dy + SIZE, dx : dx + SIZE]
                    one = one[..., ::-1] if mirrored else one
                    cut.append((one / 255 - mean) / std)
                    rows.append(((dy * 3 + dx) * 2 + mirrored) * IMAGES + number)
    with torch.no_grad():
        wanted, logits = features(model, torch.from_numpy(np.stack(cut)).float())
    torch.testing.assert_close(found["logits"][rows], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["norms"][rows], wanted.norm(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same(images, teacher, tmp_path, outputs, runs_of_teacher, double, method):
    """In float64, but for the rounding of the log; and no step runs the teacher."""
    size = sum(p.numel() for p in create_model("cifar_resnet32", CLASSES).parameters())
    more = of(teacher, method.removesuffix("++"), *METHODS[method], *FEW)
    wanted = run(images, tmp_path / "run", *more)
    assert runs_of_teacher.pop(size) == (24 if "--accumulate" in more else 12)
    runs_of_teacher.clear()
    near(wanted, run(images, tmp_path / "other", *more, *outputs), **LOSS)
    assert size not in runs_of_teacher
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [(), ("--compile",)])
def test_bfloat16(images, teacher, tmp_path, outputs, more):
    """Outputs are kept in the type that the loss had them in before, and give the same loss."""
    more = of(teacher, "kd", 1.0, *FEW, "--precision", "bfloat16", *more)
    # What rounding does to one step would be something else after some.
    more += ["--epochs", "1", "--lr", "1e-9", "--kd-warm-up", "0"]
    (row,) = run(images, tmp_path / "run", *more, *outputs)
    with safe_open(outputs[1], "pt") as file:
        assert file.metadata()["precision"] == '"bfloat16"'
        assert file.get_tensor("logits").dtype == torch.bfloat16
        assert file.get_tensor("norms").dtype == torch.float32
    (wanted,) = run(images, tmp_path / "other", *more)
    for name in ("train_loss", "train_ce", "train_kd", "train_nd"):
        assert float(row[name]) == pytest.approx(float(wanted[name]), rel=1e-2), name


def test_a_file_is_made_once(images, teacher, tmp_path, outputs, monkeypatch):
    """Several methods of a call, and those of a later one, with the same figures."""
    made = []

    def make(*arguments):
        made.append(1)
        return teacher_outputs.make_outputs(*arguments)

    monkeypatch.setattr(shared, "make_outputs", make)
    more = of(teacher, "kd", 1.0, *FEW)
    rows = run(images, tmp_path / "run", *more, *outputs)
    content = contents(tmp_path / "kept")
    assert [path.name for path in content] == ["outputs.safetensors"]
    assert run(images, tmp_path / "other", *more, *outputs) == rows
    assert same(weights(tmp_path / "run"), weights(tmp_path / "other"))
    assert main(options(images, tmp_path / "seeds", *more, *outputs, "--seeds", "0,1")) == 0
    assert log(tmp_path / "seeds" / "run" / "seed-0") == rows
    # With or without is one configuration.
    again = [*of(teacher, "kd", 1.0, *FEW), "--resume"]
    assert run(images, tmp_path / "run", *again) == rows
    assert contents(tmp_path / "kept") == content
    assert made == [1]


def test_runs_at_once_share_the_file(images, teacher, tmp_path, outputs, monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # as each of the processes has
    more = of(teacher, "kd", 1.0, *FEW, *outputs, "--seeds", "0,1")
    assert main(options(images, tmp_path / "at-once", *more, "--at-once", "2")) == 0
    content = contents(tmp_path / "kept")
    assert main(options(images, tmp_path / "alone", *more)) == 0
    for seed in ("seed-0", "seed-1"):
        assert log(tmp_path / "at-once" / "run" / seed) == log(tmp_path / "alone" / "run" / seed)
    assert contents(tmp_path / "kept") == content


@pytest.fixture
def stopped(monkeypatch):
    """Make the teacher send this process a signal in one of its batches of cut images."""
    calls = []

    def stop(number, call):
        calls.clear()

        def counted(model, pixels):
            calls.append(len(pixels))
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return features(model, pixels)

        monkeypatch.setattr(teacher_outputs, "features", counted)
        return calls

    return stop


@pytest.mark.parametrize(("number", "call"), [(signal.SIGINT, 1), (signal.SIGTERM, 10)])
def test_making_them_goes_on_after_a_signal(
    images, teacher, tmp_path, outputs, stopped, capsys, number, call
):
    more = of(teacher, "kd", 1.0, *FEW)
    rows = run(images, tmp_path / "run", *more, *outputs)
    other = ("--teacher-outputs", str(tmp_path / "other.safetensors"))
    calls = stopped(number, call)
    arguments = options(images, tmp_path / "again", *more, *other)
    assert main(arguments) == 128 + number
    told = capsys.readouterr().out
    assert f"stopped by {number.name} while the teacher's outputs were made" in told
    part = tmp_path / "other.safetensors.part"
    assert f"kept in {part}" in told
    assert len(load_file(part)["norms"]) == call * BATCH
    assert not (tmp_path / "again" / "config.json").exists()
    assert main([*arguments, "--resume"]) == 0
    assert sum(calls) == CUTS * IMAGES
    assert log(tmp_path / "again") == rows
    assert same(load_file(other[1]), load_file(outputs[1]))
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"other.safetensors"}


def test_a_signal_in_the_last_batch(images, teacher, tmp_path, outputs, stopped, capsys):
    """The file is written all the same, and what was killed while it wrote is gone."""
    (tmp_path / "kept").mkdir()
    for name in ("outputs.safetensors", "outputs.safetensors.part"):
        (tmp_path / "kept" / f".{name}.{12 * 'a'}{TEMPORARY}").write_text("half")
    calls = stopped(signal.SIGTERM, -(-CUTS * IMAGES // BATCH))
    command = options(images, tmp_path / "run", *of(teacher, "kd", 1.0, *FEW), *outputs)
    assert main(command) == 128 + signal.SIGTERM
    assert f"the teacher's outputs were made, in {outputs[1]}" in capsys.readouterr().out
    assert [path.name for path in contents(tmp_path / "kept")] == ["outputs.safetensors"]
    calls.clear()
    assert main(command) == 0
    assert not calls


def test_another_process_that_makes_the_file_is_waited_for(
    images, teacher, tmp_path, outputs, stopped, capfd, monkeypatch
):
    """What it has made is taken, and not made again; or refused, if it is of something else."""
    more = of(teacher, "kd", 1.0, *FEW)
    run(images, tmp_path / "run", *more, *outputs)
    made = Path(outputs[1]).rename(tmp_path / "made")
    calls = stopped(signal.SIGTERM, 10**9)
    script = tmp_path / "hold.py"
    script.write_text(
        "import fcntl, os, sys, time\nlock, made, path = sys.argv[1:]\n"
        "handle = open(lock, 'w')\nfcntl.flock(handle, fcntl.LOCK_EX)\nprint('held', flush=True)\n"
        "sys.stdin.read()\nos.rename(made, path)\nos.unlink(lock)\n"
    )
    lock = tmp_path / "kept" / ".outputs.safetensors.lock"
    for number, given in enumerate(((), ("--pad", "2"))):
        command = [sys.executable, str(script), str(lock), str(made), outputs[1]]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout.readline() == "held\n"
            monkeypatch.setattr(locks, "_wait", lambda end=holder.stdin.close: end())
            out = tmp_path / f"other-{number}"
            status = main(options(images, out, *more, *outputs, *given))
        told = capfd.readouterr().err
        assert f"another process makes {outputs[1]}; waiting" in told
        assert not calls
        if given:
            assert status == 2
            assert "is of other outputs: pad is 1, here 2" in told
        else:
            assert status == 0
            assert log(out) == log(tmp_path / "run")
            Path(outputs[1]).rename(made)


def test_a_part_of_something_else_is_begun_anew(images, teacher, tmp_path, outputs):
    place = tmp_path / "kept"
    place.mkdir()
    (place / "outputs.safetensors.part").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="outputs begin anew: .*part is damaged, or of another"):
        run(images, tmp_path / "run", *of(teacher, "kd", 1.0, *FEW), *outputs)
    assert [path.name for path in contents(place)] == ["outputs.safetensors"]


def test_what_is_kept_from_time_to_time(images, teacher, tmp_path, outputs, monkeypatch):
    """So that little is lost by kill -9."""
    monkeypatch.setattr(teacher_outputs, "KEEP_EVERY", 0)
    write, sizes = teacher_outputs._write, []

    def noted(path, found, notes):
        sizes.append((path.suffix, len(found.norms)))
        write(path, found, notes)

    monkeypatch.setattr(teacher_outputs, "_write", noted)
    run(images, tmp_path / "run", *of(teacher, "kd", 0.0, *FEW), *outputs)
    rows = CUTS * IMAGES
    assert sizes == [*((".part", n) for n in range(BATCH, rows, BATCH)), (".safetensors", rows)]
    # Not so often, but for the first batch, which is looked at.
    monkeypatch.setattr(teacher_outputs, "KEEP_EVERY", 3600)
    sizes.clear()
    Path(outputs[1]).unlink()
    run(images, tmp_path / "other", *of(teacher, "kd", 0.0, *FEW), *outputs)
    assert sizes == [(".part", BATCH), (".safetensors", rows)]


@pytest.mark.parametrize("bad", [1, 65])
def test_outputs_that_are_not_finite_are_not_kept(
    images, teacher, tmp_path, outputs, monkeypatch, capsys, bad
):
    """In the first batch or the last, of which every one is looked at here but the last."""
    calls = []

    def infinite(model, pixels):
        calls.append(1)
        found, logits = features(model, pixels)
        return found, logits / (0 if len(calls) == bad else 1)

    monkeypatch.setattr(teacher_outputs, "features", infinite)
    command = options(images, tmp_path / "run", *of(teacher, "kd", 1.0, *FEW), *outputs)
    told = refused(command, capsys)
    assert re.search("outputs of the teacher cifar_resnet32 [0-9a-f]+ are not finite", told)
    assert len(calls) == bad
    assert not (tmp_path / "kept" / "outputs.safetensors").exists()


def test_other_outputs_are_refused(images, teacher, tmp_path, outputs, capsys):
    """Before anything is written, by what differs."""
    more = of(teacher, "kd", 1.0, *FEW)
    run(images, tmp_path / "run", *more, *outputs)
    second = tmp_path / "second"
    run(images, second, "--student", "cifar_resnet32", "--epochs", "1")
    content = contents(tmp_path / "kept")
    for given, told in (
        (("--pad", "2"), "pad is 1, here 2"),
        (("--no-flip",), "flip is true, here false"),
        (("--precision", "bfloat16"), 'precision is "float32", here "bfloat16"'),
        (("--limit", "60"), "data is 72 [+] 18 images .*, here 60 [+]"),
        (("--teacher-weights", str(second)), "teacher is cifar_resnet32 .*, here cifar_resnet32 "),
    ):
        said = refused(options(images, tmp_path / "no", *more, *outputs, *given), capsys)
        assert re.search(f"--teacher-outputs {outputs[1]} is of other outputs: {told}", said), said
    save_file({"a": torch.ones(1)}, tmp_path / "others.safetensors")
    (tmp_path / "broken").write_bytes(b"nothing")
    (tmp_path / "file").write_text("")
    found = load_file(outputs[1])
    with safe_open(outputs[1], "pt") as file:
        notes = file.metadata()
    few = {name: values[:-1].clone() for name, values in found.items()}
    save_file(few, tmp_path / "few", metadata=notes)
    save_file({"norms": found["norms"]}, tmp_path / "one", metadata=notes)
    save_file(few, tmp_path / "part", metadata={**notes, "format": teacher_outputs.BEGUN})
    for path, told in (
        (tmp_path / "others.safetensors", "holds something else than a teacher's outputs"),
        (tmp_path / "broken", "cannot be read"),
        (tmp_path / "few", "few is damaged; remove it"),
        (tmp_path / "one", "cannot be read"),
        (tmp_path / "part", "holds something else"),
        (tmp_path / "best.safetensors", "is what a run calls a file of its own"),
        (tmp_path / "kept", "must be a file, "),
        (tmp_path / "file" / "outputs", "file is a file"),
    ):
        given = ("--teacher-outputs", str(path))
        assert told in refused(options(images, tmp_path / "no", *more, *given), capsys)
    assert contents(tmp_path / "kept") == content
    assert not (tmp_path / "no").exists()


def test_what_they_are_not_for(images, teacher, tmp_path, outputs, capsys):
    for more, told in (
        (of(teacher, "reviewkd", 1.0), "are logits, and --method reviewkd compares maps"),
        (("--method", "ce"), "--teacher-outputs has no part in --method ce with --nd-weight 0"),
        (of(teacher, "kd", 1.0, "--class-means-momentum", "0.9"), "pass one of them"),
        (of(teacher, "kd", 1.0, "--task", "imagenet", "--pad", "4"), "those of --task cifar, got"),
    ):
        assert told in refused(options(images, tmp_path / "no", *more, *outputs), capsys)
    assert not (tmp_path / "no").exists()


def test_too_many_to_keep(images, teacher, tmp_path, outputs, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    command = options(images, tmp_path / "run", *of(teacher, "kd", 1.0, *FEW), *outputs)
    told = refused(command, capsys)
    assert f"--teacher-outputs {outputs[1]} needs 0.0 GB of the disk of {tmp_path}, and" in told
    assert {path.name for path in tmp_path.iterdir()} == set()


@pytest.mark.parametrize("begun", [0, 500])
def test_the_room_that_is_wanted(tmp_path, monkeypatch, begun):
    """Of three logits and a norm for every row; and as much again for what is begun."""
    files = {tmp_path / "a" / "one": 50, tmp_path / "two": 30, tmp_path / "there": 10**9}
    notes = {
        path: {"rows": str(rows), "classes": "3", "precision": '"bfloat16"'}
        for path, rows in files.items()
    }
    (tmp_path / "there").write_text("")
    (tmp_path / "two.part").write_bytes(bytes(begun))
    wanted = (50 + 30 + 50) * (3 * 2 + 4) - begun
    free = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free[-1]))
    free.append(wanted)
    teacher_outputs.check_room(notes, torch.device("cpu"), 1)
    free.append(wanted - 1)
    with pytest.raises(ValueError, match=r"needs 0\.0 GB of the disk of"):
        teacher_outputs.check_room(notes, torch.device("cpu"), 1)
    # One file at a time in the memory of a GPU, in that of every process.
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10**10, 10**11))
    teacher_outputs.check_room(notes, torch.device("cuda"), 2)
    with pytest.raises(ValueError, match=r"needs 30\.0 GB of the GPU's memory, and 20\.0 GB"):
        teacher_outputs.check_room(notes, torch.device("cuda"), 3)


def test_a_lock_is_that_of_the_file_that_is_there(tmp_path, monkeypatch):
    """One that its owner removed while another waited is nobody's."""
    path = tmp_path / "outputs"
    signals = Signals()
    flock, opened = fcntl.flock, []

    def removed_first(handle, how):
        if not opened:
            (tmp_path / ".outputs.lock").unlink()
        opened.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locks.alone(path, signals) as is_alone:
        assert is_alone
        assert len(opened) == 2
        with (tmp_path / ".outputs.lock").open() as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not [*tmp_path.iterdir()]

    def none_here(handle, how):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with locks.alone(path, signals) as is_alone:
        assert not is_alone
    assert not [*tmp_path.iterdir()]


PRESETS = "cifar100/resnet56-resnet20/{ce,kd,reviewkd++}"


def test_presets_that_have_no_use_for_them_do_without(tmp_path):
    """Cross entropy has no teacher, and ReviewKD compares maps; the others look them up."""
    call = ["--preset", PRESETS, "--data", "images", "--out", str(tmp_path)]
    call += ["--teacher-weights", "w", "--teacher-outputs", "{teacher}.safetensors"]
    configs = [config for config, _ in _read_train(call)[1]]
    found = [config.model.teacher_outputs for config in configs]
    assert found == [None, "resnet56.safetensors", None]


def test_finished_runs_do_without_the_file(images, teacher, tmp_path, outputs, capsys):
    more = of(teacher, "kd", 1.0, *FEW)
    rows = run(images, tmp_path / "run", *more, *outputs)
    Path(outputs[1]).write_text("something else")
    assert run(images, tmp_path / "run", *more, *outputs, "--resume") == rows
    assert "cannot be read" in refused(options(images, tmp_path / "b", *more, *outputs), capsys)


def test_one_file_of_two_teachers(images, tmp_path, capsys):
    """Told before the first run, where only the first would find its own."""
    for name in ("resnet56", "wrn_40_2"):
        model = create_model(f"cifar_{name}", num_classes=CLASSES)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    call = [
        *options(images, tmp_path / "no", *FEW, "--student", "cifar_resnet20"),
        *("--preset", "cifar100/{resnet56-resnet20,wrn_40_2-wrn_40_1}/kd"),
        *("--teacher-weights", str(tmp_path / "{teacher}.safetensors")),
    ]
    path = tmp_path / "outputs.safetensors"
    told = refused([*call, "--teacher-outputs", str(path)], capsys)
    assert f"--teacher-outputs {path} would be of runs that differ: teacher is cifar_resnet" in told
    assert "in its path {teacher} stands for the teacher's name" in told
    assert not (tmp_path / "no").exists()
    assert not path.exists()


def test_two_processes_want_a_file_that_is_there(images, teacher, tmp_path, outputs, double):
    more = of(teacher, "kd", 1.0, *FEW)
    command = options(images, tmp_path / "both", *more, *outputs)
    done = by_two_in_float64(tmp_path, command)
    assert done.returncode != 0
    assert "is made by a run of one process, got 2" in done.stderr
    assert not (tmp_path / "both").exists()
    alone = run(images, tmp_path / "alone", *more, *outputs, "--accumulate", "2")
    done = by_two_in_float64(tmp_path, command)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(alone, log(tmp_path / "both"), strict=True):
        for name in ("train_loss", "train_ce", "train_kd", "train_nd", "train_top1"):
            assert float(two[name]) == pytest.approx(float(one[name]), **LOSS), name
