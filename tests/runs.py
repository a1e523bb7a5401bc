"""What training commands leave in their folders, and commands that several processes run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Columns of the log that say how long something took.
TIMES = ("images_per_second", "seconds")


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
