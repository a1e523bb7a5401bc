"""Several processes, several runs, in one call or at once, and what is told of them together."""

from __future__ import annotations

import csv
import errno
import functools
import json
import math
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

from dnkd_ext import ClassMeans
from dnkd_ext.cli import main
from dnkd_ext.train import commands, files, jobs, locks, tasks
from dnkd_ext.train.checkpoint import load_checkpoint
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.models import create_model
from dnkd_ext.train.plots import plot_curves
from dnkd_ext.train.summary import summary
from dnkd_ext.train.teacher import load_teacher
from dnkd_ext.train.world import World
from tests.runs import LOSS, WEIGHTS, by_two_in_float64, environment, log, same, weights
from tests.stripes import CLASSES, SKIPPED, TEST, TRAIN, of, options, refused, run
from tests.test_distributed import in_processes

pytestmark = SKIPPED


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


def test_a_table_is_in_the_order_of_the_presets():
    pair = "cifar100/resnet56-resnet20"
    names = [f"{pair}/dist", None, f"{pair}/kd++", "mine", f"{pair}/ce", f"{pair}/kd"]
    same = {"best_top1": 1.0, "last_top1": 1.0, "published_top1": None, "training_seconds": 1.0}
    rows = summary([{"preset": name, "config": {}, **same} for name in names])
    wanted = [f"{pair}/{method}" for method in ("ce", "kd", "kd++", "dist")]
    assert [row["preset"] for row in rows] == [*wanted, None, "mine"]


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
    assert main(["plot", folders[0], "--out", str(out)]) == 0  # in the place of the other
    for option, value in (("--teacher-weights", "x"), ("--count", "2"), ("--device", "cpu")):
        told = refused(["plot", *folders, "--out", str(out), option, value], capsys)
        assert f"{option} is for the boxes of --task detection, got {value}" in told
    own = (tmp_path / "run" / "seed-0" / "curves.png").read_bytes()
    told = refused(["plot", *folders, "--out", folders[0]], capsys)
    assert "is the folder of a run, whose own curves.png would be replaced" in told
    assert refused(["plot", folders[1], "--out", folders[0]], capsys) == told
    assert (tmp_path / "run" / "seed-0" / "curves.png").read_bytes() == own
    assert main(["plot", folders[0], "--out", folders[0]]) == 0
    # Nothing is written before all is looked at, nor into the current folder by an empty name.
    (out / "curves.png").write_bytes(b"the old one")
    told = refused(["plot", folders[0], "--out", str(out), "--task", "detection"], capsys)
    assert "is a run of --task cifar, not of detection" in told
    assert (out / "curves.png").read_bytes() == b"the old one"
    for command in (["plot", folders[0]], options(images, tmp_path)[:3]):
        assert "--out must name where to write to" in refused([*command, "--out", ""], capsys)
    for name, content, message in (
        ("config.json", "[1, 2]", "config.json is damaged, or no configuration of a run: it holds"),
        ("log.csv", "epoch\n1,2\n", "a damaged log.csv"),
    ):
        kept = (tmp_path / "run" / "seed-0" / name).read_text()
        (tmp_path / "run" / "seed-0" / name).write_text(content)
        told = refused(["plot", folders[0], "--out", str(out)], capsys)
        assert message in told
        (tmp_path / "run" / "seed-0" / name).write_text(kept)


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
        "own": {**preset, "method": "kd", "nd_weight": 2.0, "student": "cifar_resnet20"},
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
        "cifar100/resnet56-resnet20/kd++, cifar_shufflenetv2, seed 0",
        "cifar100/resnet56-resnet20/kd++, seed 0",
        "cifar100/resnet56-resnet20/kd++, cifar_shufflenetv2, kd, nd 1.5, seed 0",
        "cifar100/resnet56-resnet20/kd++, cifar_shufflenetv2, dkd, seed 0",
        "cifar100/teacher/resnet56, cifar_shufflenetv2, seed 0",
        "cifar100/no-more/kd, cifar_shufflenetv2, kd, seed 0",
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
        for name in ("config.json", "result.json"):
            settings = [json.loads((folder / name).read_text()) for folder in (one, two)]
            settings = [found.get("config", found) for found in settings]
            assert settings[0] == settings[1]
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
            with locks.OwnFolders() as other:
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


def test_the_last_of_several_at_once_has_its_share_of_the_cores(images, tmp_path, monkeypatch):
    """Resumed alone, too: what it computes depends on the number of threads."""
    seen = []

    def train(jobs, number, hand_over):
        seen.append(([job.out.name for job in jobs], number))
        raise KeyboardInterrupt

    more = ("--epochs", "1", "--seeds", "0,1,2")
    assert main(options(images, tmp_path, *more)) == 0
    shutil.rmtree(tmp_path / "run" / "seed-2")
    monkeypatch.setattr("dnkd_ext.train.jobs.train_at_once", train)
    assert main(options(images, tmp_path, *more, "--at-once", "2", "--resume")) == 130
    assert seen == [(["seed-2"], 2)]
    assert main(options(images, tmp_path, *more, "--at-once", "9", "--resume")) == 130
    assert seen[1:] == [(["seed-2"], 3)]


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
