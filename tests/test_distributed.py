"""Training in two processes that average their gradients."""

from __future__ import annotations

import datetime
import gc
import os
from typing import Any

import pytest
import torch
from torch import distributed, nn

import dnkd_ext

STEPS = 3
ROWS, INPUTS, WIDTH, CLASSES = 12, 6, 16, 5


def _process(rank: int, world_size: int, folder: str, work: Any, arguments: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(work(rank, world_size, *arguments), f"{folder}/result{rank}.pt")
        distributed.barrier()
    finally:
        # A DistributedDataParallel that is still to be collected holds the group, whose threads
        # would then abort the interpreter's end.
        gc.collect()
        distributed.destroy_process_group()


def in_processes(work, folder, *arguments, world_size=2):
    """What `work(rank, world_size, *arguments)` returns in every process of a gloo group."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo backend")
    torch.multiprocessing.spawn(
        _process, (world_size, str(folder), work, arguments), nprocs=world_size
    )
    return [torch.load(f"{folder}/result{rank}.pt") for rank in range(world_size)]


def student() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, 10), nn.Tanh(), nn.Linear(10, WIDTH)).double()


def train(model, batches, class_means, loss) -> dict[str, Any]:
    """Gradients of every step, and the parameters after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, gradients = [], []
    for images, target, teacher in batches:
        optimizer.zero_grad()
        value = loss(model(images), target, class_means, teacher_features=teacher)
        value.backward()
        losses.append(value.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "parameters": [p.detach().clone() for p in model.parameters()],
    }


def train_half(rank, world_size, batches, class_means):
    halves = [[t.chunk(world_size)[rank] for t in batch] for batch in batches]
    model = nn.parallel.DistributedDataParallel(student())
    return train(model, halves, class_means, dnkd_ext.nd_loss)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_two_halves_equal_the_whole_batch(soft, tmp_path, generator):
    """The mean over halves of equal size, averaged, is the mean over the batch."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batches = []
    for _ in range(STEPS):
        target = torch.randint(CLASSES, (ROWS,), generator=generator)
        if soft:
            target = draw(ROWS, CLASSES).softmax(-1)
        # Norms on both sides of the student's, so that both branches of the loss are met.
        batches.append([draw(ROWS, INPUTS), target, draw(ROWS, WIDTH) * 0.25])
    class_means = draw(CLASSES, WIDTH)
    branches = set()

    def reference(features, target, class_means, *, teacher_features):
        branches.update((features.norm(dim=1) < teacher_features.norm(dim=1)).tolist())
        return dnkd_ext.reference.nd_loss(
            features, target, class_means, teacher_features=teacher_features
        )

    whole = train(student(), batches, class_means, reference)
    assert branches == {False, True}
    first, second = in_processes(train_half, tmp_path, batches, class_means)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(first["gradients"], whole["gradients"], **exact)
    torch.testing.assert_close(first["parameters"], whole["parameters"], **exact)
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, whole["losses"], **exact)
    # Each half alone would have given something else, and the ranks agree to the bit.
    assert (first["losses"] - whole["losses"]).abs().min() > 1e-6
    torch.testing.assert_close(first["gradients"], second["gradients"], rtol=0, atol=0)
    assert max(g.abs().max() for g in whole["gradients"][0]) > 1e-3
