"""Memory of CPU gradients: taken from freed ones, never from living ones, and given back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import dnkd_ext

WIDTH = 1024
ROWS = 300  # 1.2 MB of float32

pytestmark = pytest.mark.skipif(
    not dnkd_ext.build_info()["loaded"], reason="the compiled library is not in use"
)


@pytest.fixture(autouse=True)
def empty():
    dnkd_ext.empty_cache()
    yield
    dnkd_ext.empty_cache()


def inputs(rows=ROWS, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, WIDTH, generator=g).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(rows=ROWS, seed=0, dtype=torch.float32):
    student, teacher = inputs(rows, seed, dtype)
    return torch.autograd.grad(dnkd_ext.kd_loss(student, teacher), student)[0]


def expected(rows=ROWS, seed=0):
    student, teacher = inputs(rows, seed)
    return torch.autograd.grad(dnkd_ext.reference.kd_loss(student, teacher), student)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_freed_memory_is_taken_again(dtype):
    """That of a gradient formed in the forward pass, and in the backward pass (float16)."""
    rows = ROWS * 4 // dtype.itemsize
    first = gradient(rows, dtype=dtype)
    address = first.data_ptr()
    assert dnkd_ext.empty_cache() == 0  # it lives
    del first
    again = gradient(rows, dtype=dtype)
    assert again.data_ptr() == address
    del again
    assert dnkd_ext.empty_cache() == rows * WIDTH * dtype.itemsize
    assert dnkd_ext.empty_cache() == 0


def test_what_lives_is_not_overwritten():
    """Gradients that are kept, as .grad or through a view, keep their numbers and their memory."""
    kept = [gradient(seed=seed)[3:] for seed in range(3)]
    for seed in range(3, 6):
        gradient(seed=seed)
    student, teacher = inputs(seed=7)
    dnkd_ext.kd_loss(student, teacher).backward()
    dnkd_ext.kd_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, 2 * expected(seed=7))
    for seed, part in enumerate(kept):
        torch.testing.assert_close(part, expected(seed=seed)[3:])


def test_a_smaller_gradient_takes_a_little_more():
    """A last batch fits into the memory of a whole one, but not of one much larger."""
    address = gradient().data_ptr()
    assert gradient(ROWS * 9 // 10).data_ptr() == address
    small = gradient(ROWS // 2)
    assert small.data_ptr() != address
    assert dnkd_ext.empty_cache() == ROWS * WIDTH * 4


def test_gradients_are_ordinary_tensors():
    """They can be resized, shared and stored, and outlive the cache."""
    resized = gradient()
    resized.resize_(2 * ROWS, WIDTH).zero_()
    torch.testing.assert_close(resized, torch.zeros(2 * ROWS, WIDTH))
    shared = gradient()
    dnkd_ext.empty_cache()
    shared.share_memory_()
    assert shared.is_shared()
    torch.testing.assert_close(shared, expected())
    array = gradient().numpy()
    gradient(seed=1)
    torch.testing.assert_close(torch.from_numpy(array), expected())


def test_idle_memory_is_freed():
    del_me = gradient(4 * ROWS)
    del del_me
    for _ in range(70):
        gradient()
    assert dnkd_ext.empty_cache() == ROWS * WIDTH * 4


def test_profilers_see_tensors():
    """A gradient counts as allocated when it is made, wherever its memory comes from."""
    gradient()  # leaves its memory in the cache
    student, teacher = inputs()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        dnkd_ext.kd_loss(student, teacher).backward()
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert ROWS * WIDTH * 4 <= most < 1.05 * ROWS * WIDTH * 4


def test_threads():
    """Losses of several threads at once do not share memory."""
    errors = []

    def work(seed):
        try:
            wanted = expected(seed=seed)
            for _ in range(20):
                torch.testing.assert_close(gradient(seed=seed), wanted)
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


PROGRAM = """
import torch, dnkd_ext
for rows in (512, 1024, 2048):  # 2, 4 and 8 MiB
    student = torch.randn(rows, 1024, requires_grad=True)
    dnkd_ext.kd_loss(student, torch.randn(rows, 1024)).backward()
    del student
print(dnkd_ext.empty_cache())
"""


@pytest.mark.parametrize(
    ("limit", "kept"), [("0", 0), ("1", 0), ("3", 2), ("12", 12), ("256", 14), ("", 14)]
)
def test_limit(limit, kept):
    """What is kept stays within it; the oldest goes first."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "DNKD_CPU_CACHE_MB": limit},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == kept << 20


@pytest.mark.parametrize("program", [PROGRAM, "import dnkd_ext; dnkd_ext.empty_cache()"])
def test_bad_limit(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DNKD_CPU_CACHE_MB": "1.5"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        "ValueError: DNKD_CPU_CACHE_MB must be a whole number of mebibytes, got '1.5'"
        in done.stderr
    )
