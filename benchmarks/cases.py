"""What is measured: sizes, inputs, peers, and the bytes that must be moved at least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dnkd_ext
from benchmarks import peers

# Inputs of more bytes than this are no longer in any cache when the next call reads them.
CACHE = 64 << 20


@dataclass(frozen=True)
class NdCase:
    """Forward and backward of the ND loss with teacher features."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        """For tables and test ids."""
        return (
            f"nd_loss {self.rows}x{self.width} ({self.classes}) {str(self.dtype)[6:]} {self.device}"
        )

    @property
    def bytes(self) -> int:
        """Read both features, write the gradient, read the class means that occur once."""
        size = self.dtype.itemsize
        return (3 * self.rows + min(self.rows, self.classes)) * self.width * size

    def peers(self, *, only: set[str] | None = None) -> dict[str, Callable[[], None]]:
        """Every peer as a call without arguments, after its loss and gradient were checked.

        The loop over samples takes part up to 256 rows; beyond it would take minutes. ``noise`` is
        ours once more.
        """
        torch._dynamo.reset()  # or the sizes before this one use up the recompilations
        functions = {
            "ours": _ours,
            "loop": peers.authors_loop,
            "eager": peers.eager,
            "compile": torch.compile(peers.eager, dynamic=False),
            "reference": _reference,
            "noise": _ours,
        }
        if self.rows > 256:
            del functions["loop"]
        if only is not None:
            functions = {name: f for name, f in functions.items() if name in only}
        inputs = self._inputs()
        self._check(functions, inputs[0])
        return {name: _call(function, inputs) for name, function in functions.items()}

    def _inputs(self):
        size = 2 * self.rows * self.width * self.dtype.itemsize
        # Small inputs stay in the cache, as features that were just computed do; large ones rotate.
        sets = 1 if size < CACHE // 8 else max(2, min(4, CACHE // size + 1))
        g = torch.Generator().manual_seed(0)
        result = []
        for _ in range(sets):
            student = torch.randn(self.rows, self.width, generator=g)
            teacher = torch.randn(self.rows, self.width, generator=g)
            teacher *= 0.5 + torch.rand(self.rows, 1, generator=g)  # on both sides of the student's
            means = torch.randn(self.classes, self.width, generator=g)
            target = torch.randint(self.classes, (self.rows,), generator=g).to(self.device)
            student, means, teacher = (
                x.to(self.device, self.dtype) for x in (student, means, teacher)
            )
            result.append((student.requires_grad_(), target, means, teacher))
        return result

    def _check(self, functions, inputs) -> None:
        """A peer that computes something else is not a peer."""
        student = inputs[0]

        def evaluate(function):
            loss = function(*inputs)
            return loss.item(), torch.autograd.grad(loss, student)[0].float()

        expected, truth = evaluate(_reference)
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        for name, function in functions.items():
            loss, gradient = evaluate(function)
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise ValueError(f"{name} computes {loss} for {self.name}, expected {expected}")
            difference = ((gradient - truth).norm() / truth.norm()).item()
            if not difference <= tolerance:
                raise ValueError(
                    f"{name} gives a gradient for {self.name} that differs by {difference:.1e} "
                    f"of its norm, more than {tolerance:.0e}"
                )


def _ours(student, target, class_means, teacher):
    return dnkd_ext.nd_loss(student, target, class_means, teacher_features=teacher)


def _reference(student, target, class_means, teacher):
    return dnkd_ext.reference.nd_loss(student, target, class_means, teacher_features=teacher)


def _call(function, inputs) -> Callable[[], None]:
    turn = itertools.cycle(inputs)

    def run() -> None:
        arguments = next(turn)
        function(*arguments).backward()
        arguments[0].grad = None

    return run


def cpu_cases(dtypes=(torch.float32, torch.bfloat16)) -> list[NdCase]:
    """CIFAR, ImageNet with two widths, and detection: proposals of 16 and of 128 images."""
    sizes = [
        (64, 64, 100),
        (256, 512, 1000),
        (256, 2048, 1000),
        (8192, 1024, 81),
        (65536, 1024, 1000),
    ]
    return [NdCase(*size, dtype) for dtype in dtypes for size in sizes]


def cuda_cases(dtypes=(torch.float32, torch.bfloat16)) -> list[NdCase]:
    """Launch-bound sizes up to 512x2048, one that fills the device."""
    sizes = [(256, 512, 1000), (512, 2048, 1000), (8192, 1024, 81), (65536, 2048, 1000)]
    return [NdCase(*size, dtype, "cuda") for dtype in dtypes for size in sizes]
