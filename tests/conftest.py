"""Fixtures of all tests."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

import dnkd_ext
from tests.cases import CASES
from tests.stripes import double, images, teacher, whole  # noqa: F401

# The folder of reference values beside the repository, unless named.
GOLDEN = Path(
    os.environ.get("DNKD_GOLDEN_DIR", Path(__file__).resolve().parents[2] / "shared" / "golden")
)


# Files that train, start processes or compile kernels, most of the time of all tests.
SLOW = (
    "test_cli", "test_detection", "test_e2e", "test_fallback", "test_gpu_check", "test_sharded",
    "test_simt", "test_simt_*", "test_train", "test_train_*", "test_training_parts",
)  # fmt: skip


def pytest_configure(config):
    """Of several processes (-n), before they are started: none spins on another's cores."""
    workers = getattr(config.option, "numprocesses", None)
    if workers:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(2, len(os.sched_getaffinity(0)) // workers))
        )


def pytest_report_header(config):
    info = dnkd_ext.build_info()
    return (
        f"dnkd_ext: torch {info['torch']}, kernels "
        f"{info['cpu_isa'] if info['loaded'] else 'NOT LOADED: ' + str(info['load_error'])}, "
        f"CUDA kernels {info['cuda']}, CUDA device {torch.cuda.is_available()}, golden {GOLDEN}"
    )


def _has_reduction(item):
    """Whether the loss of a test has the test's reduction, where it has both."""
    given = getattr(item, "callspec", None)
    given = given.params if given else {}
    case = given.get("case", given.get("one"))
    return getattr(case, "is_sum_of_rows", True) or given.get("reduction", "mean") == "mean"


def pytest_collection_modifyitems(config, items):
    without = [item for item in items if not _has_reduction(item)]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if _has_reduction(item)]
    for item in items:
        if any(fnmatch.fnmatchcase(item.path.stem, pattern) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch.cuda.is_available() is False")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions of a GPU in float32, which PyTorch otherwise lets round as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """Benchmarks of tests get their verdicts, whatever else runs; its test looks for itself."""
    harness = sys.modules.get("benchmarks.harness")
    if harness is not None:
        monkeypatch.setattr(harness, "cpu_share", lambda: 1.0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260101)


@pytest.fixture(params=["cifar100_resnet56", "cifar100_resnet32x4", "coco_r101"])
def golden(request):
    """The arrays of one golden file."""
    import numpy as np

    path = GOLDEN / f"{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors at {path} (set DNKD_GOLDEN_DIR)")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(autouse=not dnkd_ext.build_info()["loaded"])
def measures_the_reference(monkeypatch):
    """Without the compiled library the tests of the benchmarks, which would refuse, go without."""
    from benchmarks import run

    monkeypatch.setattr(run, "require_library", lambda device: None)


@pytest.fixture
def served_processes():
    """As from Python 3.14 on: processes that a server starts, unless one asks for another way."""
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(None, force=True)


@pytest.fixture(scope="session")
def needs_extension():
    """Skips tests of the compiled library where it is not built."""
    if not dnkd_ext.build_info()["loaded"]:
        pytest.skip(f"compiled library not loaded: {dnkd_ext.build_info()['load_error']}")
