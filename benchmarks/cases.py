"""What is measured: sizes, inputs, peers, and the bytes that must be moved at least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dnkd_ext
from benchmarks import peers

# Inputs of more bytes than this are no longer in any cache when the next call reads them.
CACHE = 64 << 20
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Case:
    """Forward and backward of one loss at one size."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    # How many inputs, the first ones, get a gradient.
    leaves = 1

    @property
    def name(self) -> str:
        """For tables and test ids."""
        return f"{self.label} {str(self.dtype)[6:]} {self.device}"

    @property
    def label(self) -> str:
        """The loss and its size."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """What must be read and written once at least."""
        raise NotImplementedError

    @property
    def large(self) -> bool:
        """Whether fresh gradients are dominated by page faults on a CPU."""
        return self.bytes > 16 << 20

    def functions(self) -> dict[str, Callable[..., Tensor]]:
        """Every peer by name, among them ``ours``, ``reference`` and ``eager``."""
        raise NotImplementedError

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        """Arguments of the functions in float32 on the CPU, the differentiated ones first."""
        raise NotImplementedError

    def peers(self, *, only: set[str] | None = None) -> dict[str, Callable[[], None]]:
        """Every peer as a call without arguments, after its loss and gradient were checked.

        ``noise`` is ours once more.
        """
        torch._dynamo.reset()  # or the sizes before this one use up the recompilations
        functions = self.functions()
        functions["compile"] = torch.compile(functions["eager"], dynamic=False)
        functions["noise"] = functions["ours"]
        if only is not None:
            functions = {name: f for name, f in functions.items() if name in only}
        inputs = self._inputs()
        self._check(functions, inputs[0])
        return {name: _call(function, inputs, self.leaves) for name, function in functions.items()}

    def _inputs(self) -> list[list[Tensor]]:
        g = torch.Generator().manual_seed(0)
        result = [self._prepared(self.inputs(g))]
        # Small inputs stay in the cache, as what was just computed does; large ones rotate.
        size = sum(x.nbytes for x in result[0])
        sets = 1 if size < CACHE // 8 else max(2, min(4, CACHE // size + 1))
        return result + [self._prepared(self.inputs(g)) for _ in range(sets - 1)]

    def _prepared(self, inputs: list[Tensor]) -> list[Tensor]:
        moved = [x.to(self.device, self.dtype if x.is_floating_point() else None) for x in inputs]
        for leaf in moved[: self.leaves]:
            leaf.requires_grad_()
        return moved

    def _check(self, functions, inputs) -> None:
        """A peer that computes something else is not a peer."""

        def evaluate(function):
            loss = function(*inputs)
            return loss.item(), [
                g.float() for g in torch.autograd.grad(loss, inputs[: self.leaves])
            ]

        expected, truth = evaluate(self.functions()["reference"])
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        for name, function in functions.items():
            loss, gradients = evaluate(function)
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise ValueError(f"{name} computes {loss} for {self.name}, expected {expected}")
            for gradient, right in zip(gradients, truth, strict=True):
                difference = ((gradient - right).norm() / right.norm()).item()
                if not difference <= tolerance:
                    raise ValueError(
                        f"{name} gives a gradient for {self.name} that differs by "
                        f"{difference:.1e} of its norm, more than {tolerance:.0e}"
                    )


@dataclass(frozen=True)
class NdCase(Case):
    """The ND loss with teacher features: ``rows`` of ``width`` features."""

    @property
    def label(self) -> str:
        return f"nd_loss {self.rows}x{self.width} ({self.classes})"

    @property
    def bytes(self) -> int:
        """Read both features, write the gradient, read the class means that occur once."""
        size = self.dtype.itemsize
        return (3 * self.rows + min(self.rows, self.classes)) * self.width * size

    def functions(self):
        """The loop over samples takes part up to 256 rows; beyond it would take minutes."""
        return {
            "ours": lambda s, c, t, y: dnkd_ext.nd_loss(s, y, c, teacher_features=t),
            **({"loop": peers.nd_loop} if self.rows <= 256 else {}),
            "eager": peers.nd,
            "reference": lambda s, c, t, y: dnkd_ext.reference.nd_loss(s, y, c, teacher_features=t),
        }

    def inputs(self, generator):
        student = torch.randn(self.rows, self.width, generator=generator)
        teacher = torch.randn(self.rows, self.width, generator=generator)
        # On both sides of the student's length.
        teacher *= 0.5 + torch.rand(self.rows, 1, generator=generator)
        means = torch.randn(self.classes, self.width, generator=generator)
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        return [student, means, teacher, target]


@dataclass(frozen=True)
class LogitCase(Case):
    """Cross entropy with KD or DKD, or DIST alone: ``rows`` of ``classes`` logits."""

    loss: str = "ce_kd_loss"

    @property
    def label(self) -> str:
        return f"{self.loss} {self.rows}x{self.classes}"

    @property
    def bytes(self) -> int:
        """Read both logits, for DIST's sums over columns once more, write the gradient."""
        passes = 5 if self.loss == "dist_loss" else 3
        return passes * self.rows * self.classes * self.dtype.itemsize

    def functions(self):
        if self.loss == "dist_loss":
            return {
                "ours": lambda s, t, y: dnkd_ext.dist_loss(s, t, tau=TEMPERATURE),
                "eager": peers.dist,
                "reference": lambda s, t, y: dnkd_ext.reference.dist_loss(s, t, tau=TEMPERATURE),
            }
        fused = getattr(dnkd_ext, self.loss)
        reference = getattr(dnkd_ext.reference, self.loss)
        return {
            "ours": lambda s, t, y: fused(s, t, y, temperature=TEMPERATURE).loss,
            "eager": {"ce_kd_loss": peers.ce_kd, "ce_dkd_loss": peers.ce_dkd}[self.loss],
            "reference": lambda s, t, y: reference(s, t, y, temperature=TEMPERATURE).loss,
        }

    def inputs(self, generator):
        student, teacher = (
            2 * torch.randn(self.rows, self.classes, generator=generator) for _ in range(2)
        )
        return [student, teacher, torch.randint(self.classes, (self.rows,), generator=generator)]


@dataclass(frozen=True)
class KdPlusPlusCase(Case):
    """The whole criterion, CE + KD + ND: ``rows`` of ``classes`` logits and ``width`` features."""

    leaves = 2

    @property
    def label(self) -> str:
        return f"KD++ {self.rows}x{self.classes}, {self.width} features"

    @property
    def bytes(self) -> int:
        """Those of both parts."""
        parts = (
            NdCase(self.rows, self.width, self.classes, self.dtype),
            LogitCase(self.rows, 0, self.classes, self.dtype),
        )
        return sum(part.bytes for part in parts)

    def functions(self):
        def criterion(logits, features, teacher_logits, teacher_features, means, target):
            # The module holds its class means; made once per size, not per call.
            key = means.data_ptr()
            if key not in modules:
                modules[key] = dnkd_ext.KDPlusPlus(means, temperature=TEMPERATURE).to(self.device)
            return modules[key](
                logits, teacher_logits, features, target, teacher_features=teacher_features
            ).loss

        def reference(logits, features, teacher_logits, teacher_features, means, target):
            ce_kd = dnkd_ext.reference.ce_kd_loss(
                logits, teacher_logits, target, temperature=TEMPERATURE
            )
            nd = dnkd_ext.reference.nd_loss(
                features, target, means, teacher_features=teacher_features
            )
            return ce_kd.loss + nd

        def eager(logits, features, teacher_logits, teacher_features, means, target):
            return peers.ce_kd(logits, teacher_logits, target) + peers.nd(
                features, means, teacher_features, target
            )

        modules: dict[int, torch.nn.Module] = {}
        return {"ours": criterion, "eager": eager, "reference": reference}

    def inputs(self, generator):
        logits, teacher_logits, target = LogitCase(self.rows, 0, self.classes).inputs(generator)
        features, means, teacher_features, _ = NdCase(self.rows, self.width, self.classes).inputs(
            generator
        )
        return [logits, features, teacher_logits, teacher_features, means, target]


def _call(function, inputs, leaves) -> Callable[[], None]:
    turn = itertools.cycle(inputs)

    def run() -> None:
        arguments = next(turn)
        function(*arguments).backward()
        for leaf in arguments[:leaves]:
            leaf.grad = None

    return run


def cpu_cases(dtypes=(torch.float32, torch.bfloat16)) -> list[Case]:
    """CIFAR, ImageNet with two widths, detection (16 and 128 images), ImageNet-21k."""
    nd = [
        (64, 64, 100),
        (256, 512, 1000),
        (256, 2048, 1000),
        (8192, 1024, 81),
        (65536, 1024, 1000),
    ]
    logits = [(128, 100), (512, 1000), (1024, 21841)]
    return _cases(nd, logits, dtypes, "cpu")


def cuda_cases(dtypes=(torch.float32, torch.bfloat16)) -> list[Case]:
    """Launch-bound sizes up to 512x2048, some that fill the device."""
    nd = [(256, 512, 1000), (512, 2048, 1000), (8192, 1024, 81), (65536, 2048, 1000)]
    logits = [(128, 100), (512, 1000), (1024, 21841), (8192, 32768)]
    return _cases(nd, logits, dtypes, "cuda")


def _cases(nd, logits, dtypes, device) -> list[Case]:
    cases: list[Case] = []
    for dtype in dtypes:
        cases += [NdCase(*size, dtype, device) for size in nd]
        for loss in ("ce_kd_loss", "ce_dkd_loss"):
            cases += [LogitCase(rows, 0, c, dtype, device, loss) for rows, c in logits]
        cases.append(LogitCase(512, 0, 1000, dtype, device, "dist_loss"))
        cases.append(KdPlusPlusCase(512, 2048, 1000, dtype, device))
    return cases
