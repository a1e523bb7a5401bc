"""Training runs that were interrupted, and what of a folder they go on with."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from dnkd_ext import ClassMeans
from dnkd_ext.cli import main
from dnkd_ext.train import engine, files, jobs, locks
from dnkd_ext.train.checkpoint import load_checkpoint, save_checkpoint
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.engine import _Training, check_identity
from dnkd_ext.train.networks import weights_file
from tests.runs import LOSS, WEIGHTS, environment, log, same, weights
from tests.stripes import (
    ALONE,
    CLASSES,
    SKIPPED,
    contents,
    of,
    options,
    refused,
    run,
    student_options,
)

pytestmark = SKIPPED


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


@pytest.fixture
def algorithms():
    """What ``--deterministic`` changes is put back."""
    was = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.cuda
@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("more", [(), ("--cuda-graph",)])
def test_goes_on_exactly_on_a_gpu(images, teacher, tmp_path, monkeypatch, more):
    base = [*student_options(teacher), "--device", "cuda", "--deterministic", *more]
    whole, out = tmp_path / "whole", tmp_path / "run"
    rows = run(images, whole, *base)
    batches = Classification.batches

    def interrupted(self, epoch, start):
        for i, batch in enumerate(batches(self, epoch, start), start):
            if epoch == 1 and i == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Classification, "batches", interrupted)
    assert main(options(images, out, *base)) == 128 + signal.SIGTERM
    monkeypatch.setattr(Classification, "batches", batches)
    assert run(images, out, *base, "--resume") == rows
    assert same(weights(out), weights(whole))


@pytest.mark.parametrize("seeds", ["0", "0,1"])
def test_a_signal_at_the_very_end_stops_the_series(images, tmp_path, monkeypatch, capsys, seeds):
    """Behind the run's result; and of a run alone that is all there was to do."""
    batches = Classification.batches

    def interrupted(self, epoch, start):
        yield from batches(self, epoch, start)
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Classification, "batches", interrupted)
    out = tmp_path / "run"
    status = main(options(images, out, "--seeds", seeds))
    first = out / "run/seed-0" if "," in seeds else out
    assert (first / "result.json").exists()
    if seeds == "0":
        assert status == 0
        return
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at the end of a run" in capsys.readouterr().out
    assert not (out / "run/seed-1").exists()
    monkeypatch.setattr(Classification, "batches", batches)
    assert main(options(images, out, "--seeds", seeds, "--resume")) == 0
    assert (out / "run/seed-1/result.json").exists()


def test_weights_of_a_run_that_has_not_ended_are_told(tmp_path):
    for name in ("best.safetensors", "config.json"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="has not ended: its best weights so far are taken"):
        assert weights_file(str(tmp_path), ALONE) == tmp_path / "best.safetensors"
    (tmp_path / "result.json").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights_file(str(tmp_path), ALONE) == tmp_path / "best.safetensors"


def test_a_run_that_has_not_ended_is_told_once(images, teacher, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    (run / "result.json").unlink()
    command = ["eval", "--model", "cifar_resnet32", "--data", str(images), "--weights", str(run)]
    with pytest.warns(UserWarning, match="has not ended") as told:
        assert main([*command, "--no-progress", "--device", "cpu"]) == 0
    assert len([entry for entry in told if "has not ended" in str(entry.message)]) == 1
    assert json.loads(capsys.readouterr().out)["weights"] == str(run / "best.safetensors")


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
    monkeypatch.setattr(engine, "time", clock)
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
            engine._Training, "_save",
            lambda self, epoch, start, saved=saved: saved.append((epoch, start)),
        )  # fmt: skip
        run(images, tmp_path / minutes, "--checkpoint-minutes", minutes, "--log-every", "1")
        assert saved == [(1, 0), (2, 0), (3, 0)]


def test_a_damaged_checkpoint_leaves_the_one_before(images, teacher, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    finish = engine._Training._finish

    def stop(self, epoch, *rest):
        if epoch == 3:
            raise KeyboardInterrupt
        finish(self, epoch, *rest)

    monkeypatch.setattr(engine._Training, "_finish", stop)
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


@pytest.mark.parametrize("kind", ["byte", "text", "bytes", "zip"])
def test_a_checkpoint_with_a_damaged_byte_is_not_taken(tmp_path, kind):
    """torch.load looks at no checksum, and what is no zip file may raise anything."""
    for number in range(2):
        tensor = torch.full((5000,), float(number))
        save_checkpoint(tmp_path, {"number": number, "tensor": tensor})
    newest = tmp_path / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    if kind == "byte":
        content[content.index(tensor.numpy().tobytes()) + 9001] ^= 1
    elif kind == "text":
        content = b"epoch,time,lr,train_loss\n1,2.0,0.1,3.5\n"
    elif kind == "bytes":
        content[:512] = bytes(range(256)) * 2
    else:
        with zipfile.ZipFile(newest, "w") as file:
            file.writestr("something", "else")
        content = newest.read_bytes()
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint\.pt cannot be read: .*going on from"):
        state = load_checkpoint(tmp_path)
    assert state["number"] == 0
    assert state["tensor"].eq(0).all()


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
from dnkd_ext.train.locks import OwnFolders
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
    with locks.OwnFolders() as own, locks.OwnFolders() as other:
        assert own.take(folder)
        assert not own.take(folder)
        folder.rmdir()
        folder.mkdir()
        assert own.take(folder)
        with pytest.raises(BlockingIOError, match=f"another process writes to {folder}"):
            other.take(folder)


def test_a_folder_is_not_held_by_what_was_forked(tmp_path):
    """A killed run's loading processes may live on for a while."""
    with locks.OwnFolders() as own:
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
            with locks.OwnFolders() as again:
                again.take(tmp_path)
                with locks.OwnFolders() as third, pytest.raises(BlockingIOError, match="another"):
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
    finish = engine._Training._finish

    def stop(self, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        finish(self, epoch, *rest)

    monkeypatch.setattr(engine._Training, "_finish", stop)
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
