"""Small images, a teacher of them, and the commands by which the tests of training run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dnkd_ext.cli import main
from dnkd_ext.train.world import World
from tests.runs import log

MISSING = [
    name for name in ("tyro", "yaml", "tensorboard") if importlib.util.find_spec(name) is None
]
SKIPPED = pytest.mark.skipif(
    bool(MISSING), reason=f"of the training extras {', '.join(MISSING)} cannot be imported"
)

CLASSES, SIZE, TRAIN, TEST = 3, 16, 24, 6
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders of noisy stripes, one direction per class."""
    from PIL import Image

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
    from tests.float64 import in_float64

    with in_float64():
        yield


@pytest.fixture(scope="module")
def whole(images, teacher, tmp_path_factory):
    """A run with dropout in its projector that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(images, out, *student_options(teacher))


def student_options(teacher: Path) -> list[str]:
    return of(teacher, "kd", 1.0, "--student", "cifar_wrn_16_2", "--epochs", "4")


def refused(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
