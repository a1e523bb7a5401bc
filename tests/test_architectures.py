"""Which GPUs the compiled CUDA kernels run on, and what happens on others.

A GPU is pretended, so that this runs everywhere.
"""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from dnkd_ext import _extension


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # later ones of the same major version
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),  # which the driver compiles for what is newer
        ("8.0+PTX", (7, 5), False),
        ("7.5;8.0;9.0", (9, 0), True),
        ("7.5 8.0 12.0+PTX", (11, 0), False),
        ("7.5 8.0 12.0+PTX", (12, 1), True),
        ("7.5;8.0;9.0;10.0;12.0+PTX", (7, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("Hopper", (9, 0), True),  # torch knows these names
    ],
)
def test_which_gpus_run_the_kernels(architectures, capability, runs):
    assert _extension._covers(architectures, capability) is runs


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a library for some architectures, and one GPU; returns a tensor on it."""

    def pretend(architectures, capability):
        library = types.SimpleNamespace(
            build_info=lambda: {"cuda": "13.0", "cuda_architectures": architectures}
        )
        monkeypatch.setattr(_extension, "_library", library)
        monkeypatch.setattr(_extension, "_has_cuda", True)
        monkeypatch.setattr(_extension, "_runs_on_gpu", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        device = types.SimpleNamespace(index=3)
        return types.SimpleNamespace(is_cpu=False, is_cuda=True, device=device)

    monkeypatch.delenv("DNKD_REQUIRE_EXT", raising=False)
    return pretend


def test_a_gpu_of_the_build_has_kernels(gpu):
    tensor = gpu("8.0;9.0", (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension.has_kernel_for(tensor)


def test_another_gpu_takes_the_reference_and_is_told_once(gpu):
    tensor = gpu("8.0;9.0", (12, 0))
    wanted = (
        r"compiled for GPUs of 8\.0;9\.0 and do not run on cuda:3, which is of 12\.0.*"
        r"TORCH_CUDA_ARCH_LIST=12\.0 DNKD_CUDA=1 pip install .*the slower PyTorch reference"
    )
    with pytest.warns(UserWarning, match=wanted):
        assert not _extension.has_kernel_for(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _extension.has_kernel_for(tensor)


def test_required_kernels(gpu, monkeypatch):
    tensor = gpu("8.0", (7, 0))
    monkeypatch.setenv("DNKD_REQUIRE_EXT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"do not run on cuda:3.*DNKD_REQUIRE_EXT is set"):
            _extension.has_kernel_for(tensor)


def test_a_gpu_that_is_not_there(gpu, monkeypatch):
    """As a fake tensor's may be."""
    tensor = gpu("8.0", (9, 0))

    def fail(index):
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert _extension.has_kernel_for(tensor)


@pytest.mark.parametrize(("capability", "runs"), [((9, 0), True), ((7, 0), False)])
def test_traced_as_a_constant(gpu, capability, runs):
    gpu("8.0;9.0", capability)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        return x + 1 if _extension._runs_on(x.device.index or 0) else x - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert step(torch.zeros(())) == (1 if runs else -1)
