"""The scripts of examples/ run, learn, and go on from their checkpoints."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
TERMS = r"epoch (\d+): loss (\S+)  ce (\S+)  kd (\S+)  nd (\S+)"


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


def run(name, folder, *arguments, launcher=()):
    """Epoch and terms of every line that the script prints about one."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [tuple(map(float, groups)) for groups in re.findall(TERMS, result.stdout)]


def assert_learns(epochs, count=3):
    """The terms that are there from the start fall; the first epoch's loss has no KD."""
    assert [epoch[0] for epoch in epochs] == list(range(1, count + 1))
    first, last = epochs[0], epochs[-1]
    for term in (1, 2, 4):
        assert last[term] < 0.95 * first[term]
    for epoch, loss, ce, kd, nd in epochs:
        expected = ce + min(1, (epoch - 1) / 2) * kd + 2 * nd
        assert loss == pytest.approx(expected, abs=3e-3)  # printed with three digits


@pytest.mark.slow
@needs("lightning")
def test_lightning(tmp_path):
    assert_learns(run("lightning_kd.py", tmp_path))
    assert list(tmp_path.iterdir()) == []


@needs("lightning")
def test_the_teacher_of_the_lightning_module():
    """It is never in training mode, and in no checkpoint, which loads all the same."""
    example = runpy.run_path(str(ROOT / "examples" / "lightning_kd.py"), run_name="example")
    network = example["network"]
    data = TensorDataset(torch.randn(20, 3, 16, 16), torch.arange(20) % 10)
    module = example["KDPlusPlus"](network(16), network(64), DataLoader(data, batch_size=10))
    module.train()
    assert module.student.training
    assert not any(part.training for part in module.teacher.modules())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    state = module.state_dict()
    assert {name.split(".")[0] for name in state} == {"student", "projector", "criterion"}
    module.load_state_dict(state, strict=module.strict_loading)
    trained = {
        id(p) for group in module.configure_optimizers().param_groups for p in group["params"]
    }
    assert trained == {
        id(p) for p in (*module.student.parameters(), *module.projector.parameters())
    }


@pytest.mark.slow
@needs("accelerate")
def test_accelerate_goes_on_from_its_checkpoint(tmp_path):
    whole = run("accelerate_kd.py", tmp_path)
    assert_learns(whole)
    out = str(tmp_path / "out")
    first = run("accelerate_kd.py", tmp_path, "--out", out, "--epochs", "2")
    assert first + run("accelerate_kd.py", tmp_path, "--out", out) == whole


@pytest.mark.slow
@needs("accelerate")
def test_accelerate_in_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert_learns(run("accelerate_kd.py", tmp_path, launcher=launcher))
