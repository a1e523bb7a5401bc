"""What is measured: sizes, inputs, and the bytes that must be moved at least."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import dnkd_ext
from benchmarks import peers

# Inputs of more bytes than this are no longer in any cache when the next call reads them.
CACHE = 64 << 20
TEMPERATURE = peers.TEMPERATURE
# Of the ladder, and those that can be asked for.
DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float16, torch.float64)

Function = Callable[..., Tensor]


class WrongPeer(ValueError):
    """A peer that computes something else than the reference."""


def require_alike(
    peer: str,
    what: str,
    found: tuple[float, list[Tensor]],
    truth: tuple[float, list[Tensor]],
    dtype: torch.dtype,
    leaves: Sequence[str],
) -> None:
    """Loss and gradients of a peer are the reference's, as far as the inputs' dtype goes.

    Args:
        peer: its name.
        what: the case or the networks.
        found: loss and gradients.
        truth: those of the reference.
        dtype: of the inputs.
        leaves: what the gradients are of, in words.

    Raises:
        WrongPeer: one of them differs.
    """
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    if not abs(found[0] - truth[0]) <= tolerance * abs(truth[0]):
        raise WrongPeer(f"{peer} computes {found[0]} for {what}, expected {truth[0]}")
    for gradient, right, leaf in zip(found[1], truth[1], leaves, strict=True):
        difference, norm = (gradient - right).norm().item(), right.norm().item()
        if not difference <= tolerance * norm:
            raise WrongPeer(
                f"{peer} gives a gradient for {leaf} that differs by {difference:.1e}, more than "
                f"{tolerance:.0e} of its norm, {norm:.1e}"
            )


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
    # How many of our losses it is made of.
    losses = 1

    @property
    def name(self) -> str:
        """For tables and test ids."""
        return f"{self.label} {str(self.dtype)[6:]} {self.device}"

    @property
    def label(self) -> str:
        """The loss and its size."""
        raise NotImplementedError

    @property
    def family(self) -> str:
        """The loss."""
        return self.label.split(" ", 1)[0]

    @property
    def bytes(self) -> int:
        """What must be read and written once at least."""
        raise NotImplementedError

    @property
    def gradient_bytes(self) -> int:
        """The gradients that come back."""
        raise NotImplementedError

    @property
    def large(self) -> bool:
        """Whether fresh gradients are dominated by page faults on a CPU."""
        return self.bytes > 16 << 20

    def functions(self) -> dict[str, Function]:
        """The peers by name, among them ``ours``, ``reference`` and ``eager``.

        What all cases have in common (compiled ones, the noise, the copy) is not among them.
        ``traced`` is ours as it can be compiled where that is another function.
        """
        raise NotImplementedError

    def inputs(self, generator: torch.Generator) -> list[Tensor]:
        """Arguments of the functions in float32, the differentiated ones first.

        Drawn where the generator is.
        """
        raise NotImplementedError

    def _names(self, own: Iterable[str], only: Iterable[str] | None) -> list[str]:
        has = {*own, "noise", "compile", "compile-max", "compiled"}
        return [
            name
            for name in peers.PEERS
            if name in has and (only is None or name in only)
            if peers.unavailable(name, self.device) is None
        ]

    def peer_names(self, only: Iterable[str] | None = None) -> list[str]:
        """The peers that this loss has and that can run here, whether they are right or not."""
        return self._names(self.functions(), only)

    def peers(self, *, only: Iterable[str] | None = None) -> Peers:
        """Every peer that can run, after its loss and gradient were compared with the reference."""
        own = self.functions()
        names = self._names(own, only)
        reference, traced = own.pop("reference"), own.pop("traced", own["ours"])
        own["noise"] = own["ours"]
        checked, refused = {}, {}
        inputs = self._inputs()
        truth = self._evaluate(reference, inputs[0])
        for name in names:
            if name in ("compile", "compile-max"):
                function = compiled(self, name, own["eager"])
            elif name == "compiled":
                function = compiled(self, name, traced)
            else:
                function = own[name]
            try:
                self._check(name, function, inputs[0], truth)
            except WrongPeer as error:
                refused[name] = str(error)
            except Exception as error:  # whatever a compiler or another package may raise
                first = str(error).strip().split("\n", 1)[0]
                refused[name] = (
                    f"{name} does not run for {self.name}: {type(error).__name__}: {first}"
                )
            else:
                checked[name] = function
        return Peers(checked, refused, inputs, self.leaves)

    def _inputs(self) -> list[list[Tensor]]:
        g = torch.Generator(self.device).manual_seed(0)
        result = [self._prepared(self.inputs(g))]
        # Small inputs stay in the cache, as what was just computed does; large ones rotate.
        # As many sets of 16 bits as of 32, which are compared with each other.
        size = sum(x.numel() * max(4, x.itemsize) for x in result[0])
        sets = 1 if size < CACHE // 8 else max(2, CACHE // size + 1)
        return result + [self._prepared(self.inputs(g)) for _ in range(sets - 1)]

    def _prepared(self, inputs: list[Tensor]) -> list[Tensor]:
        moved = [x.to(self.device, self.dtype if x.is_floating_point() else None) for x in inputs]
        for leaf in moved[: self.leaves]:
            leaf.requires_grad_()
        return moved

    def _evaluate(self, function, inputs) -> tuple[float, list[Tensor]]:
        loss = function(*inputs)
        gradients = torch.autograd.grad(loss, inputs[: self.leaves], allow_unused=True)
        return loss.item(), [
            torch.zeros_like(leaf).float() if g is None else g.float()
            for g, leaf in zip(gradients, inputs, strict=False)
        ]

    def _check(self, name, function, inputs, truth) -> None:
        """A peer that computes something else is not a peer."""
        found = self._evaluate(function, inputs)
        require_alike(name, self.name, found, truth, self.dtype, [self.name] * len(found[1]))


@dataclass(frozen=True)
class Peers:
    """The peers of a case that compute what the reference does.

    Attributes:
        functions: by name.
        refused: what was wrong with the others, by name.
        inputs: sets of arguments, taken in turn.
        leaves: how many of the arguments, the first ones, get a gradient.
    """

    functions: dict[str, Function]
    refused: dict[str, str]
    inputs: list[list[Tensor]]
    leaves: int

    def calls(self) -> dict[str, Callable[[], None]]:
        """Forward and backward of every peer, as calls without arguments."""
        return {name: self._call(function) for name, function in self.functions.items()}

    def forward_calls(self, only: Iterable[str]) -> dict[str, Callable[[], None]]:
        """The forward passes as they run in training: with a graph, which is thrown away."""
        return {
            name: self._forward(function)
            for name, function in self.functions.items()
            if name in only
        }

    def probe_call(self, name: str, *, backward: bool) -> Callable[[], None]:
        """One call on always the same inputs, with an upstream gradient made before."""
        function, arguments = self.functions[name], self.inputs[0]
        leaves = arguments[: self.leaves]
        one = torch.ones_like(function(*arguments).detach())

        def run() -> None:
            loss = function(*arguments)
            if backward:
                torch.autograd.grad(loss, leaves, one)

        return run

    def _forward(self, function) -> Callable[[], None]:
        turn = itertools.cycle(self.inputs)
        return lambda: function(*next(turn))

    def _call(self, function) -> Callable[[], None]:
        turn, leaves = itertools.cycle(self.inputs), self.leaves

        def run() -> None:
            arguments = next(turn)
            function(*arguments).backward()
            for leaf in arguments[:leaves]:
                leaf.grad = None

        return run


def compiled(case: Case, peer: str, function: Function) -> Function:
    """A compiled function, made once per case, peer and function's code."""
    key = case, peer, getattr(function, "__code__", function)
    if key not in _COMPILED:
        # With a code object of its own, so that no case counts as a recompilation of another.
        own = function
        if isinstance(function, types.FunctionType):
            own = types.FunctionType(
                function.__code__.replace(co_name=f"{function.__name__}_{len(_COMPILED)}"),
                function.__globals__,
                function.__name__,
                function.__defaults__,
                function.__closure__,
            )
        mode = {"mode": "max-autotune"} if peer == "compile-max" else {}
        _COMPILED[key] = torch.compile(own, dynamic=False, **mode)
    return _COMPILED[key]


_COMPILED: dict[tuple, Function] = {}


class _PerMeans:
    """A module per set of inputs: modules hold their class means."""

    def __init__(self, make: Callable[[Tensor], torch.nn.Module]) -> None:
        self.make = make
        self.modules: dict[int, torch.nn.Module] = {}

    def __call__(self, means: Tensor) -> torch.nn.Module:
        key = means.data_ptr()
        if key not in self.modules:
            self.modules[key] = self.make(means).to(means.device)
        return self.modules[key]


@dataclass(frozen=True)
class NdCase(Case):
    """The ND loss with teacher features: ``rows`` of ``width`` features."""

    @property
    def label(self) -> str:
        return f"nd_loss {self.rows}x{self.width} ({self.classes})"

    @property
    def bytes(self) -> int:
        """Read both features, write the gradient, read once the class means that occur: of classes
        drawn at random so many as can be expected."""
        occurring = self.classes * (1 - (1 - 1 / self.classes) ** self.rows)
        return round(3 * self.rows + occurring) * self.width * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize

    def functions(self):
        """The loop over samples takes part up to 256 rows; beyond it would take minutes."""
        module = _PerMeans(dnkd_ext.NDLoss)
        return {
            "ours": lambda s, c, t, y: dnkd_ext.nd_loss(s, y, c, teacher_features=t),
            "module": lambda s, c, t, y: module(c)(s, y, teacher_features=t),
            **({"loop": peers.nd_loop} if self.rows <= 256 else {}),
            "eager": peers.nd,
            "reference": lambda s, c, t, y: dnkd_ext.reference.nd_loss(s, y, c, teacher_features=t),
        }

    def inputs(self, generator):
        drawn = {"generator": generator, "device": generator.device}
        student = torch.randn(self.rows, self.width, **drawn)
        teacher = torch.randn(self.rows, self.width, **drawn)
        # On both sides of the student's length.
        teacher *= 0.5 + torch.rand(self.rows, 1, **drawn)
        means = torch.randn(self.classes, self.width, **drawn)
        target = torch.randint(self.classes, (self.rows,), **drawn)
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
        return passes * self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        return self.rows * self.classes * self.dtype.itemsize

    def functions(self):
        if self.loss == "dist_loss":
            return {
                "ours": lambda s, t, y: dnkd_ext.dist_loss(s, t, tau=TEMPERATURE),
                "eager": peers.dist,
                "reference": lambda s, t, y: dnkd_ext.reference.dist_loss(s, t, tau=TEMPERATURE),
            }
        fused = getattr(dnkd_ext, self.loss)
        reference = getattr(dnkd_ext.reference, self.loss)
        # The criteria without the ND loss are the modules of these losses.
        if self.loss == "ce_kd_loss":
            module = dnkd_ext.KDPlusPlus(None, nd_weight=0.0, temperature=TEMPERATURE)
        else:
            module = dnkd_ext.DKDPlusPlus(
                None, nd_weight=0.0, temperature=TEMPERATURE, alpha=peers.ALPHA, beta=peers.BETA
            )
        functions = {
            "ours": lambda s, t, y: fused(s, t, y, temperature=TEMPERATURE).loss,
            "module": lambda s, t, y: module(s, t, None, y).loss,
            "eager": {"ce_kd_loss": peers.ce_kd, "ce_dkd_loss": peers.ce_dkd}[self.loss],
            "reference": lambda s, t, y: reference(s, t, y, temperature=TEMPERATURE).loss,
        }
        if self.loss == "ce_kd_loss" and peers.unavailable("liger", self.device) is None:
            functions["liger"] = peers.liger_ce_kd()
        return functions

    def inputs(self, generator):
        drawn = {"generator": generator, "device": generator.device}
        student, teacher = (2 * torch.randn(self.rows, self.classes, **drawn) for _ in range(2))
        return [student, teacher, torch.randint(self.classes, (self.rows,), **drawn)]


@dataclass(frozen=True)
class KdPlusPlusCase(Case):
    """The whole criterion, CE + KD + ND: ``rows`` of ``classes`` logits and ``width`` features."""

    leaves = 2
    losses = 2

    @property
    def label(self) -> str:
        return f"KD++ {self.rows}x{self.classes}, {self.width} features"

    @property
    def bytes(self) -> int:
        """Those of both parts."""
        return sum(part.bytes for part in self._parts())

    @property
    def gradient_bytes(self) -> int:
        return sum(part.gradient_bytes for part in self._parts())

    def _parts(self) -> tuple[Case, Case]:
        return (
            NdCase(self.rows, self.width, self.classes, self.dtype),
            LogitCase(self.rows, 0, self.classes, self.dtype),
        )

    def functions(self):
        module = _PerMeans(lambda means: dnkd_ext.KDPlusPlus(means, temperature=TEMPERATURE))

        def criterion(logits, features, teacher_logits, teacher_features, means, target):
            return module(means)(
                logits, teacher_logits, features, target, teacher_features=teacher_features
            ).loss

        def of_parts(ce_kd, nd):
            def loss(logits, features, teacher_logits, teacher_features, means, target):
                first = ce_kd(logits, teacher_logits, target, temperature=TEMPERATURE).loss
                return first + nd(features, target, means, teacher_features=teacher_features)

            return loss

        def eager(logits, features, teacher_logits, teacher_features, means, target):
            return peers.ce_kd(logits, teacher_logits, target) + peers.nd(
                features, means, teacher_features, target
            )

        def loop(logits, features, teacher_logits, teacher_features, means, target):
            return peers.ce_kd(logits, teacher_logits, target) + peers.nd_loop(
                features, means, teacher_features, target
            )

        return {
            "ours": criterion,  # which is the module
            **({"loop": loop} if self.rows <= 256 else {}),
            "eager": eager,
            "traced": of_parts(dnkd_ext.ce_kd_loss, dnkd_ext.nd_loss),
            "reference": of_parts(dnkd_ext.reference.ce_kd_loss, dnkd_ext.reference.nd_loss),
        }

    def inputs(self, generator):
        logits, teacher_logits, target = LogitCase(self.rows, 0, self.classes).inputs(generator)
        features, means, teacher_features, _ = NdCase(self.rows, self.width, self.classes).inputs(
            generator
        )
        return [logits, features, teacher_logits, teacher_features, means, target]


# -- the registry ---------------------------------------------------------------------------------

# CIFAR, ImageNet with two widths, detection (16 and 128 images), ImageNet-21k; on a GPU
# launch-bound sizes up to 512x2048 and some that fill the device.
ND_SIZES = {
    "cpu": [
        (64, 64, 100),
        (256, 512, 1000),
        (256, 2048, 1000),
        (8192, 1024, 81),
        (65536, 1024, 1000),
    ],
    "cuda": [(256, 512, 1000), (512, 2048, 1000), (8192, 1024, 81), (65536, 2048, 1000)],
}
LOGIT_SIZES = {
    "cpu": [(128, 100), (512, 1000), (1024, 21841)],
    "cuda": [(128, 100), (512, 1000), (1024, 21841), (8192, 32768)],
}


def cases(device: str, dtypes: Iterable[torch.dtype] = DTYPES) -> list[Case]:
    """The ladder of a device."""
    result: list[Case] = []
    for dtype in dtypes:
        result += [NdCase(*size, dtype, device) for size in ND_SIZES[device]]
        for loss in ("ce_kd_loss", "ce_dkd_loss"):
            result += [
                LogitCase(rows, 0, c, dtype, device, loss) for rows, c in LOGIT_SIZES[device]
            ]
        result.append(LogitCase(512, 0, 1000, dtype, device, "dist_loss"))
        result.append(KdPlusPlusCase(512, 2048, 1000, dtype, device))
    return result


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case of every device by name."""
    return {case.name: case for device in ND_SIZES for case in cases(device, ALL_DTYPES)}


def select(available: list[Case], patterns: Iterable[str]) -> list[Case]:
    """The cases whose name contains or matches one of the patterns; all without patterns.

    Raises:
        ValueError: a pattern that no case has, or an empty one.
    """
    chosen: set[str] = set()
    patterns = list(patterns)
    for pattern in patterns:
        if not pattern.strip():
            raise ValueError(f"a pattern of cases must not be empty, got {pattern!r}")
        low = pattern.lower()
        found = [
            case.name
            for case in available
            if low in case.name.lower() or fnmatch.fnmatchcase(case.name.lower(), low)
        ]
        if not found:
            names = "\n  ".join(case.name for case in available)
            raise ValueError(f"no case matches {pattern!r}; there are\n  {names}")
        chosen.update(found)
    return [case for case in available if not patterns or case.name in chosen]
