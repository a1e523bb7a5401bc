"""Builds the programs that run CUDA launchers on the CPU, and speaks to them."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]  # as in common/dtype.h
REDUCTIONS = ["none", "mean", "sum"]


@contextlib.contextmanager
def alone(path: Path):
    """One process at a time within it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(name: str, folders):
    """Compiles tests/simt/<name>.cpp with the sanitizers; a function that runs one case with it.

    It takes the launcher's name, its numbers, its arrays, and (shape, dtype) of its outputs.
    Processes among which the tests are shared (xdist's) compile it once; `folders` is pytest's
    tmp_path_factory, which has a folder of theirs.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the shim with")
    folder = folders.getbasetemp()
    if folder.name.startswith("popen-"):  # one of xdist's processes
        folder = folder.parent
    program, unfinished = folder / f"simt_{name}", folder / f"simt_{name}.new"
    with alone(folder / f"simt_{name}.lock"):
        if not program.exists():
            subprocess.run(
                [
                    compiler, "-std=c++20", "-O0", "-fno-strict-aliasing",
                    "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
                    f"-I{ROOT}/tests/simt/include", f"-I{ROOT}/csrc",
                    str(ROOT / f"tests/simt/{name}.cpp"), "-o", str(unfinished),
                ],
                check=True,
            )  # fmt: skip
            unfinished.rename(program)

    def run(kernel, numbers, arrays, outputs):
        device = {"shared": 64 << 10, "clusters": True, "most_cluster": 8, "ptx": 90, "late": 0}
        numbers = {**device, "cluster": 0, **numbers}
        line = " ".join([kernel, *(f"{k}={float(v)!r}" for k, v in numbers.items())]) + "\n"
        payload = b"".join(
            a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays if a.numel()
        )
        done = subprocess.run([program], input=line.encode() + payload, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[:2000]
        results, at = [], 0
        for shape, dtype in outputs:
            size = torch.Size(shape).numel() * dtype.itemsize
            data = torch.frombuffer(
                bytearray(done.stdout[at : at + size]) or bytearray(1), dtype=torch.uint8
            )
            results.append(data[:size].view(dtype).reshape(shape))
            at += size
        assert at == len(done.stdout)
        return results

    return run


def accumulate(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def strided(table, stride):
    """The memory of rows `stride` elements apart: NaN between them, nothing behind the last."""
    rows, width = table.shape
    wide = table.new_full((rows, stride), float("nan"))
    wide[:, :width] = table
    return wide.flatten()[: (rows - 1) * stride + width] if rows else wide.flatten()


def assert_close(losses, expected_losses, gradient, expected_gradient, dtype):
    """Losses as float32 or float64 can; gradients besides rounded once to their own type."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for loss, truth in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(
            loss.double(), truth, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    if gradient is not None:
        unit = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
        scale = max(expected_gradient.nan_to_num().abs().flatten().tolist(), default=0.0) or 1.0
        torch.testing.assert_close(
            gradient.double(),
            expected_gradient,
            rtol=unit,
            atol=(tolerance + unit) * scale,
            equal_nan=True,
        )
