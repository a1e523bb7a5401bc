"""What training commands leave in their folders, and commands that several processes run."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch

# Columns of the log that say how long something took.
TIMES = ("images_per_second", "seconds")
# What float64 leaves of rounding. The log's terms pass through float32.
LOSS = {"rel": 1e-6}
WEIGHTS = {"rtol": 1e-6, "atol": 1e-9}


def log(out: Path) -> list[dict[str, str]]:
    """The rows of a run, but for times."""
    with (out / "log.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in TIMES}
            for row in csv.DictReader(file)
        ]


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """The last weights of a run, or the best."""
    from safetensors.torch import load_file

    return load_file(out / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether the weights are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def environment() -> dict[str, str]:
    """For processes that import this package and its tests, each with one thread."""
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def parents(processes: Iterable[multiprocessing.Process]) -> set[int]:
    """The processes that these were started by."""
    stats = [Path(f"/proc/{process.pid}/stat").read_text() for process in processes]
    return {int(stat.rpartition(")")[2].split()[1]) for stat in stats}


def by_two(*command: str, timeout: float = 560) -> subprocess.CompletedProcess[str]:
    """A program by two processes of torchrun; whether it succeeded is not checked."""
    return subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *command),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=timeout,
    )


def by_two_in_float64(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A training command by two processes of torchrun that compute in float64; not checked."""
    script = folder / "in_float64.py"
    script.write_text(
        "import sys\nfrom dnkd_ext.cli import main\nfrom tests.float64 import in_float64\n"
        "with in_float64():\n    status = main(sys.argv[1:])\nsys.exit(status)\n"
    )
    return by_two(str(script), *command)


def together(
    folder: Path, commands: list[dict], processes: int = 2, *more: str
) -> subprocess.CompletedProcess[str]:
    """Commands by several processes in float64; see tests/sharded_worker.py."""
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *(() if "--nnodes" in more else ("--standalone",)),
        *(*more, "-m", "tests.sharded_worker", str(path)),
    ]
    settings = {
        **environment(),
        # Otherwise processes that are started again may find addresses of those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.run(
        command, capture_output=True, text=True, env=settings, check=False, timeout=560
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stderr


def near(one: Path, two: Path) -> None:
    """Two runs are the same but for rounding, and for running statistics of other parts."""
    first, second = log(one), log(two)
    assert len(first) == len(second)
    for row, other in zip(first, second, strict=True):
        for name in row:
            if name.startswith("train_"):
                assert float(other[name]) == pytest.approx(float(row[name]), **LOSS), name
    own, others = weights(one), weights(two)
    assert own.keys() == others.keys()
    for name in own:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(others[name], own[name], **WEIGHTS)
