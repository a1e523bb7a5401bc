"""The commands: what they print, what they write, what they say to wrong input."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import dnkd_ext
from dnkd_ext import cli
from dnkd_ext.cli import main
from tests.runs import environment


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(str(torch.__version__))}$", text, re.MULTILINE)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dnkd_ext.build_info()


def test_info_check_beside_json(capsys, needs_extension):
    assert main(["info", "--json", "--check"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == dnkd_ext.build_info()
    assert "PASS nd_loss cpu float32" in captured.err


def test_info_check(capsys, needs_extension):
    assert main(["info", "--check"]) == 0
    out = capsys.readouterr().out
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        assert f"PASS nd_loss cpu {dtype}" in out
    assert "FAIL" not in out


def test_info_check_sees_a_wrong_kernel(capsys, monkeypatch, needs_extension):
    """It fails where fused and reference differ, or where NaN comes out."""
    import dnkd_ext.selfcheck as selfcheck
    from dnkd_ext.losses import LOSSES, Loss

    right = LOSSES["nd_loss"]
    for factor in (1.0001, float("nan")):

        def scaled(*args, by=factor, **kwargs):
            return right.fused(*args, **kwargs) * by

        wrong = Loss(scaled, right.reference, right.examples)
        monkeypatch.setattr(selfcheck, "LOSSES", {"nd_loss": wrong})
        assert main(["info", "--check"]) == 1
        assert "FAIL nd_loss cpu float32" in capsys.readouterr().out


LOSS_AND_FEATURES = """
import torch, dnkd_ext
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
features, logits = dnkd_ext.features(model, torch.ones(2, 4))
dnkd_ext.nd_loss(features, torch.tensor([0, 1]), torch.ones(2, 3)).backward()
"""
ASKED = "from dnkd_ext.cli import main\nassert main({}) == {}"


@pytest.mark.parametrize(
    ("program", "heavy"),
    [
        (LOSS_AND_FEATURES, ["torch._dynamo", "torchvision", "timm", "matplotlib", "tyro"]),
        (ASKED.format(["presets"], 0), ["torch._dynamo", "torchvision", "timm", "matplotlib"]),
        (ASKED.format(["train", "--preset", "none", "--data", "x", "--out", "y"], 2), ["timm"]),
    ],
    ids=["losses", "presets", "refusal"],
)
def test_imports_no_more_than_it_needs(program, heavy):
    """Of what takes as long as to import torch."""
    if "cli" in program:
        pytest.importorskip("tyro")
        pytest.importorskip("yaml")
    told = f"import sys, torch\nbefore = {{*sys.modules}}\n{program}\n"
    told += f"assert not (found := {{*{heavy}}} & ({{*sys.modules}} - before)), found"
    command = [sys.executable, "-W", "ignore", "-c", told]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_constant_results_are_marked_as_torch_marks_them():
    """Without importing the compiler for it."""
    from dnkd_ext._export import constant_result

    def own():
        pass

    def torchs():
        pass

    assert constant_result(own) is own
    assert vars(own) == vars(torch.compiler.assume_constant_result(torchs)) != {}


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("PIL", ["train", "--student", "cifar_resnet20", "--out", "OUT"]),
        ("PIL", ["eval", "--model", "cifar_resnet20", "--weights", "WEIGHTS"]),
        ("matplotlib", ["train", "--student", "cifar_resnet20", "--out", "OUT"]),
        ("yaml", ["presets"]),
        ("yaml", ["train", "--preset", "cifar100/*/kd", "--out", "OUT"]),
        ("tyro", ["presets"]),
    ],
)
def test_a_package_that_is_missing_is_told(package, command, tmp_path):
    pytest.importorskip("tyro")
    folder = tmp_path / "data"
    for split in ("train", "test"):
        for name in ("one", "two"):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.png").touch()
    (tmp_path / "WEIGHTS").touch()
    data = [] if command == ["presets"] else ["--data", "data", "--device", "cpu"]
    program = f"import sys; sys.modules[{package!r}] = None\nfrom dnkd_ext.cli import main\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program + f"sys.exit(main({[*command, *data]}))"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"dnkd {command[0]}: error: ")
    assert "need" in done.stderr
    assert done.stderr.endswith("pip install 'dnkd_ext[train]'\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """32 x 32 crops of scikit-learn's two photographs: two classes that differ."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 90), ("test", 30)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                y, x = (random.integers(0, s - 32) for s in photograph.shape[:2])
                Image.fromarray(photograph[y : y + 32, x : x + 32]).save(
                    folder / split / name / f"{i}.png"
                )
    return folder


QUICK = ["--seeds", "2", "--teacher-epochs", "2", "--epochs", "2"]


def test_a_demo_of_one_epoch_distils(tmp_path):
    """The ramp ends with the last epoch at the latest; KD was a second CE."""
    out = tmp_path / "out"
    options = ["--seeds", "1", "--teacher-epochs", "1", "--epochs", "1"]
    assert main(["demo", "--out", str(out), *options]) == 0
    students = json.loads((out / "results.json").read_text())["students"]
    assert students["KD"]["norm_ratio"] != students["CE"]["norm_ratio"]


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_demo(data, image_folder, tmp_path, capsys):
    """A short run: the table, both plots, weights and class means that belong together."""
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), *QUICK]
    if data == "folder":
        arguments += ["--data", str(image_folder), "--limit", "128"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["students"]) == ["CE", "KD", "KD++"]
    for method, student in results["students"].items():
        assert re.search(rf"^{re.escape(method)} .*±.*±.*±", printed, re.MULTILINE)
        assert len(student["accuracies"]) == 2
        assert student["accuracy"]["mean"] == pytest.approx(np.mean(student["accuracies"]))
        assert student["accuracy"]["std"] == pytest.approx(np.std(student["accuracies"], ddof=1))
    means = dnkd_ext.ClassMeans.load(out / "class_means.safetensors")
    assert (
        int(means.counts.sum()) == results["data"]["train"] == (128 if data == "folder" else 1198)
    )
    from PIL import Image

    for name in ("accuracy.png", "features.png"):
        pixels = np.asarray(Image.open(out / name).convert("RGB"))
        assert pixels.shape[0] > 300
        assert pixels.std() > 10  # not blank
    # A second run into the same folder is refused and changes nothing, unless asked for.
    before = (out / "results.json").read_bytes()
    assert main(arguments) == 2
    assert "already holds results.json" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


def test_demo_class_means_are_those_of_the_saved_teacher(tmp_path):
    """Class means recomputed by hand from the saved weights equal the saved ones."""
    from safetensors.torch import load_file

    from dnkd_ext.train.data.memory import load_digits
    from dnkd_ext.train.models import SmallConvNet

    assert (
        main(
            [
                "demo",
                "--out",
                str(tmp_path),
                "--seeds",
                "1",
                "--teacher-epochs",
                "1",
                "--epochs",
                "1",
            ]
        )
        == 0
    )
    teacher = SmallConvNet(1, (32, 64, 64), 2, 10).eval()
    teacher.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    data = load_digits()
    with torch.no_grad():
        features = teacher.pool(teacher.body(data.normalise(data.train.pixels))).flatten(1)
    expected = torch.stack([features[data.train.target == k].mean(0) for k in range(10)])
    saved = dnkd_ext.ClassMeans.load(tmp_path / "class_means.safetensors").compute()
    torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-5)


def spoil_missing(folder):
    import shutil

    shutil.rmtree(folder / "test")


def spoil_class(folder):
    (folder / "test" / "china").rename(folder / "test" / "india")


def spoil_image(folder):
    (folder / "train" / "china" / "0.png").write_bytes(b"no picture")


def spoil_empty(folder):
    for file in (folder / "train" / "flower").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, r"has neither test/ nor val/"),
        (spoil_class, r"hold different classes, for instance \['china', 'india'\]"),
        (spoil_image, r"0\.png is not a readable image"),
        (spoil_empty, r"flower holds no images"),
    ],
)
def test_demo_bad_data(spoil, message, image_folder, tmp_path, capsys):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    spoil(folder)
    assert main(["demo", "--out", str(tmp_path / "out"), "--data", str(folder), *QUICK]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()  # nothing was written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere/at/all"], "no data folder at /nowhere/at/all"),
        (["--limit", "10"], "--limit subsamples an image folder"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epochs", "-3"], "--epochs must be at least 1, got -3"),
    ],
)
def test_demo_bad_options(arguments, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys):
    for command in ("info", "demo"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "--" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["no-such-command"])
    assert stop.value.code == 2


class TestAugmentation:
    def test_reproducible_and_bounded(self):
        """The same seed gives the same batches; every pixel comes from the image or is black."""
        from dnkd_ext.train.data.memory import load_digits

        data = load_digits()
        first, second = (
            list(data.batches(data.train, 64, generator=torch.Generator().manual_seed(3)))
            for _ in range(2)
        )
        assert len(first) == len(data.train) // 64
        for (a, t), (b, u) in zip(first, second, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(t, u)

    def test_shift_and_mirror(self):
        """Each augmented image is the original shifted by at most an eighth, maybe mirrored."""
        from dnkd_ext.train.data.memory import _augment

        pixels = torch.randint(1, 255, (40, 3, 16, 12), dtype=torch.uint8)
        result = _augment(pixels, True, torch.Generator().manual_seed(0))
        seen = set()
        for image, original in zip(result, pixels, strict=True):
            matches = []
            for mirrored in (False, True):
                base = original.flip(-1) if mirrored else original
                padded = torch.nn.functional.pad(base, (2, 2, 2, 2))
                for y in range(5):
                    for x in range(5):
                        if torch.equal(image, padded[:, y : y + 16, x : x + 12]):
                            matches.append((mirrored, y, x))
            assert len(matches) == 1
            seen.update(matches)
        assert len(seen) > 15
        assert {m for m, _, _ in seen} == {False, True}


@pytest.mark.parametrize("lines", [1, 200_000], ids=["at the end", "in between"])
def test_a_reader_that_has_enough_is_no_error(lines):
    """As in ``dnkd train --help | head -1``, of less and of more than a pipe holds."""
    script = (
        "import sys; from unittest import mock; import dnkd_ext.cli as cli\n"
        "def much(arguments):\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.read()\n"
        f"    for _ in range({lines}):\n"
        "        print('a line')\n"
        "    return 0\n"
        "with mock.patch.object(cli, '_info', much):\n"
        "    sys.exit(cli.main(['info']))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-W", "ignore", "-c", script]  # of no compiled library
    process = subprocess.Popen(command, **pipes, text=True)
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    def broken(arguments):
        raise BrokenPipeError(32, "of a service")

    monkeypatch.setattr(cli, "_info", broken)
    assert main(["info"]) == 2
    assert "dnkd info: error: [Errno 32] of a service" in capsys.readouterr().err
