"""Other ways to compute the losses, with mean reduction; temperature 4, DKD's weights 1 and 8."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 4.0
ALPHA, BETA = 1.0, 8.0

# Every peer by name, in the order of tables and plots.
PEERS = {
    "ours": "this package, through the function",
    "noise": "ours once more, which shows the noise (again)",
    "module": "ours through the nn.Module",
    "float32": "ours with float32 inputs of the same shape, where they have 16 bits",
    "compiled": "ours in a function compiled by torch.compile",
    "loop": "a Python loop over samples, as published; up to 256 rows",
    "eager": "vectorised PyTorch, as a good engineer writes it",
    "compile": "eager compiled by torch.compile",
    "compile-max": "eager compiled by torch.compile(mode='max-autotune')",
    "liger": "Liger-Kernel's cross entropy and KL divergence",
    "copy": "a copy of as many bytes as must be moved",
}


def unavailable(peer: str, device: str) -> str | None:
    """Why a peer cannot run on a device here; None where it can."""
    if peer == "compile-max" and device == "cpu":
        return (
            "on a CPU max-autotune chooses among matrix multiplications only, of which these "
            "losses have none"
        )
    if peer == "liger":
        if device == "cpu":
            return "Liger-Kernel has Triton kernels only, for GPUs"
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        try:
            liger_ce_kd()
        except Exception as error:  # it imports much, of versions of its own
            return f"liger_kernel does not load: {type(error).__name__}: {error}"
    return None


def liger_ce_kd():
    """Cross entropy and KD out of Liger-Kernel's two losses.

    Its cross entropy overwrites its input with the gradient, hence the copy, which the divergence
    and the next call need; the softmaxes of the divergence are left to PyTorch, as there.
    """
    from liger_kernel.transformers import LigerCrossEntropyLoss
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    cross_entropy, kl_div = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean")

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        divergence = kl_div(
            F.log_softmax(student / TEMPERATURE, dim=-1, dtype=torch.float32),
            F.softmax(teacher / TEMPERATURE, dim=-1, dtype=torch.float32),
        )
        return cross_entropy(student.clone(), target) + TEMPERATURE**2 * divergence

    return loss


def nd_loop(student: Tensor, class_means: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """A Python loop over samples with the host's maximum of two norms, as it was published.

    Written anew from the description of the published code: for every sample one gather of its
    class mean, both norms brought to the host, and their larger one uploaded again.
    """
    losses = []
    for f_s, f_t, label in zip(student, teacher, target, strict=True):
        center = class_means[label.item()]
        unit = center / center.norm()
        norm = f_s.norm()
        own, teachers = norm.item(), f_t.norm().item()
        longest = max(own, teachers)
        if own >= longest:  # the student's norm is part of the graph
            losses.append(1 - torch.dot(f_s, unit) / norm)
        else:
            losses.append(1 - torch.dot(f_s, unit) / torch.tensor(longest, device=f_s.device))
    return torch.stack(losses).mean()


def nd(student: Tensor, class_means: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """As a good engineer writes it in PyTorch."""
    unit = F.normalize(class_means[target], dim=-1)
    with torch.no_grad():
        teacher_norm = teacher.norm(dim=-1)
    norm = torch.maximum(student.norm(dim=-1), teacher_norm)
    return (1 - (student * unit).sum(-1) / norm).mean()


def ce_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Cross entropy and KD as every repository has them; in float32, as autocast computes them."""
    student, teacher = student.float(), teacher.float()
    divergence = F.kl_div(
        F.log_softmax(student / TEMPERATURE, dim=-1),
        F.softmax(teacher / TEMPERATURE, dim=-1),
        reduction="batchmean",
    )
    return F.cross_entropy(student, target) + TEMPERATURE**2 * divergence


def ce_dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Cross entropy and DKD as published: binary probabilities, and -1000 at the label."""
    student, teacher = student.float(), teacher.float()
    label = target.unsqueeze(-1)
    mask = torch.zeros_like(student, dtype=torch.bool).scatter_(-1, label, True)
    u, v = student / TEMPERATURE, teacher / TEMPERATURE
    p = F.softmax(u, dim=-1).gather(-1, label)
    q = F.softmax(v, dim=-1).gather(-1, label)
    binary = F.kl_div(
        torch.cat([p, 1 - p], dim=-1).log(), torch.cat([q, 1 - q], dim=-1), reduction="batchmean"
    )
    rest = F.kl_div(
        F.log_softmax(u.masked_fill(mask, -1000.0), dim=-1),
        F.softmax(v.masked_fill(mask, -1000.0), dim=-1),
        reduction="batchmean",
    )
    return F.cross_entropy(student, target) + TEMPERATURE**2 * (ALPHA * binary + BETA * rest)


def dist(student: Tensor, teacher: Tensor, _target: Tensor) -> Tensor:
    """DIST: correlations as cosines of centred probabilities, over rows and over columns."""
    y_s = F.softmax(student.float() / TEMPERATURE, dim=-1)
    y_t = F.softmax(teacher.float() / TEMPERATURE, dim=-1)

    def distance(dim: int) -> Tensor:
        a, b = (y - y.mean(dim, keepdim=True) for y in (y_s, y_t))
        cosine = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
        return 1 - cosine.mean()

    return TEMPERATURE**2 * (distance(1) + distance(0))
