"""The benchmark of images from disk: what it counts, its data, and what the report makes of it."""

from __future__ import annotations

import io
import tarfile
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import disk, parts, report, steps
from benchmarks.__main__ import main

pytest.importorskip("yaml", reason="presets need pyyaml")
pytest.importorskip("timm", reason="images from disk are read by timm")
pytest.importorskip("webdataset", reason="shards are read by webdataset")
loading = pytest.importorskip("benchmarks.loading", reason="training is not installed")

RESNET, DEIT = loading.PRESETS


class Slow:
    """A source whose batches of known size take a known time."""

    classes, channels, image_size = ["a"], 3, 8

    def train(self, config, world):
        return self

    def test(self, config, world):
        return self

    def epoch(self, epoch):
        # Workers would start in the first one, which is not to count.
        yield from self._wait(1.0 if epoch == 0 else 0.1, lambda n: (torch.zeros(n, 1), None))

    def __iter__(self):
        # Of every batch of 5 one image is a filler.
        return self._wait(0.1, lambda n: (None, None, torch.arange(n) < n - 1))

    def _wait(self, seconds, make):
        for _ in range(4):
            self.clock[0] += seconds
            yield make(5)

    def close(self):
        pass


def test_counts_images_and_leaves_out_the_first_epoch(monkeypatch):
    source = Slow()
    source.clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: source.clock[0])
    row = loading.measure(None, source, rounds=2)
    assert row["rounds"] == 2
    assert row["train_ips"] == row["low_ips"] == row["high_ips"] == 20 / 0.4
    assert row["eval_ips"] == 16 / 0.4


def test_the_same_pieces_in_every_storage(tmp_path):
    from PIL import Image

    places = loading.write_pieces(tmp_path, 10, 4, shards=4)
    files = sorted(places["folders"].glob("train/*/*.jpg"), key=lambda path: int(path.stem))
    assert len(files) == 10
    assert {path.parent.name for path in files} == {"0", "1", "2", "3"}
    assert Image.open(files[0]).size == (500, 375)
    assert len({path.read_bytes() for path in files}) == 10
    with tarfile.open(places["tar"] / "train.tar") as archive:
        held = {m.name: archive.extractfile(m).read() for m in archive}
    assert held == {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}
    dealt = {}
    for shard in places["wds"].glob("train-*.tar"):
        with tarfile.open(shard) as archive:
            dealt |= {m.name: archive.extractfile(m).read() for m in archive}
    for path in files:
        assert dealt[path.name] == path.read_bytes()
        assert dealt[f"{path.stem}.cls"].decode() == path.parent.name


@pytest.mark.slow
def test_measures_every_storage_and_augmentation(tmp_path, capsys):
    """Of a data set of one's own, too, and keeps what it measured."""
    out = tmp_path / "loading.csv"
    few = ["--images", "16", "--batch-size", "8", "--workers", "0", "--rounds", "1"]
    assert main(["loading", *few, "--out", str(out)]) == 0
    rows = disk.read_loading(out)
    assert [(row["preset"], row["storage"]) for row in rows] == [
        (preset, storage) for preset in (RESNET, DEIT) for storage in loading.STORAGE
    ]
    for row in rows:
        assert row["images"] == 16
        assert row["image"] == 224
        assert row["train_ips"] > 0
        assert row["eval_ips"] > 0
    printed = capsys.readouterr().out
    assert printed.count("| none |") == 6
    loading.write_pieces(tmp_path / "own", 8, 8, shards=2)
    own = ["--data", str(tmp_path / "own/folders"), "--preset", RESNET]
    assert main(["loading", *few, *own, "--out", str(out)]) == 0
    assert disk.read_loading(out)[-1]["storage"] == "given"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--images", "4"], "--images must be at least a batch, 64, got 4"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--data", "nowhere"], "no data folder at nowhere"),
        (["--preset", "cifar100/resnet56-resnet20/kd"], "does not read images from disk"),
    ],
)
def test_wrong_options_are_told(words, told, capsys):
    few = ["--workers", "0", "--storage", "folders"]
    assert main(["loading", *few, *(["--images", "64"] if "--images" not in words else []), *words])
    assert told in capsys.readouterr().err


def test_an_interrupted_run_prints_what_it_measured(tmp_path, monkeypatch, capsys):
    left = [{"rounds": 1, "train_ips": 123.0, "low_ips": 1.0, "high_ips": 2.0, "eval_ips": 3.0}]

    def measure(*_):
        if not left:
            raise KeyboardInterrupt
        return left.pop()

    source = SimpleNamespace(train_images=64, image_size=224, name="pieces")
    monkeypatch.setattr(loading, "open_source", lambda *_, **__: source)
    monkeypatch.setattr(loading, "write_pieces", lambda *_, **__: {"tar": tmp_path})
    monkeypatch.setattr(loading, "measure", measure)
    assert main(["loading", "--images", "64", "--storage", "tar"]) == 130
    captured = capsys.readouterr()
    assert f"| {RESNET} | tar | none | 123 (1-2) | 3 |" in captured.out
    assert captured.err.endswith("benchmarks loading: interrupted\n")


def test_other_columns_are_not_added_to(tmp_path, capsys):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    assert main(["loading", "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err
    assert out.read_text() == "a,b\n1,2\n"


# -- the report -----------------------------------------------------------------------------------


def row(**columns):
    return {
        **dict.fromkeys(disk.LOADING_FIELDS, ""), "date": "2026-01-01", "hardware": "a machine",
        "torch": "9.9.0", "threads": 2.0, "preset": RESNET, "data": "pieces", "images": 64.0,
        "storage": "folders", "batch": 8.0, "image": 224.0, "workers": 2.0, "rounds": 3.0,
        "train_ips": 300.0, "low_ips": 280.0, "high_ips": 310.0, "eval_ips": 500.0, **columns,
    }  # fmt: skip


def step(**columns):
    return {
        **dict.fromkeys(steps.STEP_FIELDS, ""), "hardware": "a GPU", "device": "cuda",
        "shape": "imagenet", "models": "big -> small", "batch": 256.0, "image": 224.0,
        "method": "KD++ ours", "step_ms": 100.0, "low_ms": 99.0, "high_ms": 101.0, "loss_us": 50.0,
        "threads": 1.0, "rounds": 20.0, "loss_low_us": 49.0, "loss_high_us": 51.0, **columns,
    }  # fmt: skip


def test_the_report_shows_the_last_row_of_every_setting():
    rows = [row(train_ips=1.0), row(), row(workers=0.0, train_ips=160.0)]
    text = report.render([], [], [], rows)
    assert "### On a machine, torch 9.9.0" in text
    assert f"| {RESNET} | folders | 2 | 300 (280-310) | 500 |" in text
    assert f"| {RESNET} | folders | none | 160 (280-310) | 500 |" in text
    assert "| 1 (" not in text
    assert "Not run." in report.render([], [], [], []).split("## Images from disk")[1]


def recorded(**columns):
    return {
        **dict.fromkeys(parts.TRAINING_FIELDS, ""), "hardware": "a GPU", "device": "cuda",
        "torch": "9.9.0", "preset": "cifar100/big-small/kd++", "batch": 128.0, "cuda_graph": "yes",
        "teacher_outputs": "no", "precision": "bfloat16", "student": "small", "teacher": "big",
        "data": "synthetic", "device_ms": 3.0, **columns,
    }  # fmt: skip


def test_the_whole_run_on_paper():
    """256 images in 0.1 s: 512 in 200 ms on one, 25 on 8, 3.1 on 64 GPUs; 250,228 steps.

    46.8 MB of gradients are sent twice, but for a share: in 0.18 ms by NVLink, 1.84 by a network.
    A core reads 150 images/s.
    """
    text = report.render([], [step(method="CE", step_ms=1.0), step()], [], [row()])
    on_paper = text.split("on paper\n")[1]
    assert "| 1 | 512 | 200.0 | - | 0.0 | arithmetic | 2,560 | 13.90 | 17 |" in on_paper
    assert "| 8 | 64 | 25.0 | - | 0.2 | arithmetic | 20,480 | 1.74 | 137 |" in on_paper
    assert "| 64 | 8 | 3.1 | - | 1.8 | arithmetic | 163,840 | 0.22 | 1,092 |" in on_paper
    faster = [step(step_ms=25.0)]
    on_paper = report.render([], faster, [], [row()]).split("on paper\n")[1]
    assert "| 64 | 8 | 0.8 | - | 1.8 | exchange | 278,095 | 0.13 | 1,854 |" in on_paper
    others = [
        recorded(device_ms=9.0, hardware="another"), recorded(device_ms=8.0, cuda_graph="no"),
        recorded(device_ms=7.0, teacher_outputs="yes"),
    ]  # fmt: skip
    text = report.render([], faster, [recorded(), *others], [row()])
    on_paper = text.split("on paper\n")[1]
    assert "| 8 | 64 | 6.2 | 3.0 | 0.2 | arithmetic | 81,920 | 0.43 | 546 |" in on_paper
    assert "| 64 | 8 | 0.8 | 3.0 | 1.8 | launches | 170,667 | 0.21 | 1,138 |" in on_paper
    for walked, read in (([step()], []), ([step(device="cpu")], [row()]), ([], [row()])):
        assert "Not estimated" in report.render([], walked, [], read)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--preset", RESNET, "--preset", "imagenet/nothing"], "imagenet/nothing"),
        (["--preset", RESNET, "--preset", "cifar100/teacher/resnet56"], "does not read images"),
        (["--workers", "0", "-1"], "--workers must be at least 0, got -1"),
    ],
)
def test_all_settings_are_looked_at_before_the_first_is_measured(words, told, monkeypatch, capsys):
    monkeypatch.setattr(loading, "measure", None)
    small = ["--images", "4", "--batch-size", "4", "--rounds", "1", "--storage", "folders"]
    assert main(["loading", *small, *words]) == 2
    assert told in capsys.readouterr().err


def test_a_piece_is_a_jpeg_file():
    (content,) = loading.pieces(1, seed=0)
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        assert 30_000 < len(content) < 300_000
