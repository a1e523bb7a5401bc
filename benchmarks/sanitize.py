"""What compute-sanitizer watches: few rows, but every variant of every CUDA kernel.

``python -m benchmarks.sanitize --loss nd_loss`` runs a loss in every dtype, with and without vector
accesses, a warp and a block per row, rows that fit into registers and such that do not, indices and
probabilities as targets, and compares with the reference on the CPU. Exit status 1 where they
differ, so that a fault that a tool misses may still show.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dnkd_ext
from dnkd_ext._checks import LOSS_DTYPES, accumulate_dtype
from dnkd_ext.losses.nd_loss import add_nd_loss

# Elements of a row that reach, for every dtype (8, 4 or 2 elements per 16-byte vector), without and
# with vectors: a warp, a block, and a block whose registers do not hold the row. Odd rows are
# misaligned, hence read without vectors.
ND_WIDTHS = (3, 64, 201, 256, 1101, 1104, 2304)
# A warp, a block, a large block, clusters of 2, 4 and 8 blocks that keep a row (in float32, and the
# next larger number in 16 bits) and of 8 that do not; with a teacher in float32 beside 16 bits huge
# blocks that keep a row and that do not. Odd rows begin and end beside their vectors.
LOGIT_WIDTHS = (
    *(3, 64, 1001, 2048, 1101, 4096, 4097, 9000, 9001),
    *(19_999, 20_000, 32_767, 32_768, 36_000, 36_001, 65_536, 65_537),
    *(90_000, 90_001, 170_000, 170_001),
)
# Where the student's rows lie otherwise than the teacher's, hence without vectors: a warp, a block.
UNLIKE_WIDTHS = (64, 1001)
# Rows and classes. The last but one splits the rows of a column among many blocks, the last reads
# columns as vectors, too (of up to 150 multiprocessors).
DIST_SIZES = (
    (5, 3),
    (6, 64),
    (5, 201),
    (5, 256),
    (5, 1101),
    (5, 1104),
    (5, 2304),
    (3, 9000),
    (1100, 16),
    (520, 9728),
)
# More rows than one block counts.
MANY_ROWS = 2100


@dataclass(frozen=True)
class Run:
    """One call of a loss and of its reference: arguments in float64, to be brought to a dtype."""

    what: str
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True
    upstream: float = 1.0


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR, dtype=torch.float64)


_GENERATOR = torch.Generator()


def nd_runs(device: str) -> Iterator[Run]:
    """The ND loss."""
    for width in ND_WIDTHS:
        yield from _nd_of_width(width)
    student, means, target = _draw(MANY_ROWS, 16), _draw(7, 16), torch.arange(MANY_ROWS) % 7
    # The upstream gradient is such that a mean over many rows is not too small for float16.
    yield _nd("many rows", [student, target, means], {"ignore_index": 3}, upstream=MANY_ROWS)
    for width, rows in ((61, _rows(4 * 6, device)), (520, _rows(6, device))):
        student, means, target = _draw(rows, width), _draw(7, width), torch.arange(rows) % 7
        arguments = [student, target, means]
        what, options = f"{rows} rows, {width} wide", {"teacher_features": student * 2}
        yield _nd(what, arguments, options | {"ignore_index": 3}, upstream=rows)
        for weight in (0.5, torch.tensor(0.5, dtype=torch.float64)):
            yield Run(
                f"{what}, added to a loss", _added, _added_by_reference, arguments,
                options | {"loss_weight": weight}, upstream=rows,
            )  # fmt: skip


def _rows(resident: float, device: str) -> int:
    """So many rows that every block takes several, of which a multiprocessor has this many."""
    multiprocessors = 2
    if device == "cuda":
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return math.ceil(2 * resident * multiprocessors)


def _base(student: Tensor, loss_weight: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """A loss to add to, and the weight where the student is."""
    dtype = accumulate_dtype(student.dtype)
    if isinstance(loss_weight, Tensor):
        loss_weight = loss_weight.to(student.device, dtype)
    return torch.full((), 2.0, dtype=dtype, device=student.device), loss_weight


def _added(student, target, means, *, loss_weight, teacher_features) -> Tensor:
    """The sum; beside it the ND loss has no gradient."""
    base, loss_weight = _base(student, loss_weight)
    loss, nd = add_nd_loss(
        base, student, target, means, teacher_features=teacher_features, teacher_norms=None,
        ignore_index=-100, loss_weight=loss_weight, eps=1e-12,
    )  # fmt: skip
    return loss + nd


def _added_by_reference(student, target, means, *, loss_weight, teacher_features) -> Tensor:
    base, loss_weight = _base(student, loss_weight)
    nd = dnkd_ext.reference.nd_loss(student, target, means, teacher_features=teacher_features)
    return base + loss_weight * nd + nd.detach()


def _nd(what: str, arguments, options, *, upstream: float = 1.0) -> Run:
    return Run(
        what, dnkd_ext.nd_loss, dnkd_ext.reference.nd_loss, arguments, options, upstream=upstream
    )


def _nd_of_width(width: int) -> Iterator[Run]:
    rows, classes = 6, 4
    student, means = _draw(rows, width), _draw(classes, width)
    # Clearly longer or shorter than the student, so that rounding does not decide which.
    teacher = student.flip(0) * torch.where(torch.arange(rows) % 2 == 0, 4.0, 0.25)[:, None]
    target = torch.arange(rows) % classes
    soft = 0.9 * F.one_hot(target, classes) + 0.1 / classes
    for table, kind in ((means, "own"), (means.float(), "float32")):
        what = f"{width} wide, class means in {kind}"
        yield _nd(f"{what}, mean", [student, target, table], {"teacher_features": teacher})
        yield _nd(
            f"{what}, none, scaled", [student, target.int(), table],
            {"teacher_norms": teacher.norm(dim=1), "reduction": "none"}, upstream=3.0,
        )  # fmt: skip
        yield _nd(
            f"{what}, sum, ignored rows, scaled", [student, target, table],
            {"ignore_index": 1, "reduction": "sum"}, upstream=3.0,
        )  # fmt: skip
        yield _nd(f"{what}, probabilities", [student, soft, table], {"teacher_features": teacher})


def _labels(rows: int, classes: int) -> torch.Tensor:
    """In all parts of a row, so that threads, warps and blocks of all kinds have one in turn."""
    return torch.arange(rows) * 7919 % classes


def logit_runs(name: str, device: str) -> Iterator[Run]:
    """CE + KD or CE + DKD."""
    fused, reference = getattr(dnkd_ext, name), getattr(dnkd_ext.reference, name)

    def run(what, arguments, options, upstream=1.0) -> Run:
        return Run(what, fused, reference, arguments, options, upstream=upstream)

    for classes in LOGIT_WIDTHS:
        rows = 5 if classes < 10_000 else 2
        student, teacher = 2 * _draw(rows, classes), 2 * _draw(rows, classes)
        target = _labels(rows, classes)
        for other, kind in ((teacher, "own"), (teacher.float(), "float32")):
            what = f"{classes} classes, teacher in {kind}"
            yield run(f"{what}, mean", [student, other, target], {"temperature": 4.0})
            yield run(
                f"{what}, none, scaled", [student, other, target.int()],
                {"temperature": 3.5, "reduction": "none"}, 3.0,
            )  # fmt: skip
        yield run(
            f"{classes} classes, probabilities, standardized",
            [student, teacher, _draw(rows, classes).softmax(-1)],
            {"temperature": 2.0, "logit_standardization": True, "label_smoothing": 0.1}, 3.0,
        )  # fmt: skip

    def shifted(rows):
        return F.pad(rows, (1, 0))[:, 1:]

    def unlike(student, *arguments, **options):
        return fused(shifted(student), *arguments, **options)

    def unlike_target(student, teacher, target, **options):
        return fused(student, teacher, shifted(target), **options)

    for classes in UNLIKE_WIDTHS:
        student, teacher = 2 * _draw(5, classes), 2 * _draw(5, classes)
        given = [student, teacher, _draw(5, classes).softmax(-1)]
        what = f"{classes} classes, probabilities that do not lie alike"
        yield Run(what, unlike_target, reference, given, {}, upstream=3.0)
        arguments = [student, teacher, _labels(5, classes)]
        for reduction in ("mean", "none"):
            what, options = f"{classes} classes, not alike, {reduction}", {"reduction": reduction}
            yield Run(what, unlike, reference, arguments, options, upstream=3.0)
    # Of every kind of block: warps, blocks, large blocks and clusters of 2, 4 and 8.
    for classes, rows in (
        (61, _rows(4 * 6, device)),
        (1001, _rows(6, device)),
        (9001, _rows(2, device)),
        (19_999, _rows(1.5, device)),
        (32_767, _rows(0.75, device)),
        (65_537, _rows(0.375, device)),
    ):
        target = _labels(rows, classes)
        target[::7] = 3
        arguments = [_draw(rows, classes), _draw(rows, classes), target]
        yield run(f"{rows} rows, {classes} classes", arguments, {"ignore_index": 3})
    student, teacher = _draw(MANY_ROWS, 5), _draw(MANY_ROWS, 5)
    target = torch.arange(MANY_ROWS) % 5
    yield run("many rows", [student, teacher, target], {"ignore_index": 3, "temperature": 1.0})


def dist_runs(device: str) -> Iterator[Run]:
    """DIST."""
    for rows, classes in (*DIST_SIZES, (_rows(4 * 6, device), 64)):
        student, teacher = 2 * _draw(rows, classes), 2 * _draw(rows, classes)
        for other, kind in ((teacher, "own"), (teacher.float(), "float32")):
            yield Run(
                f"{rows}x{classes}, teacher in {kind}", dnkd_ext.dist_loss,
                dnkd_ext.reference.dist_loss, [student, other],
                {"beta": 2.0, "gamma": 0.5, "tau": 4.0}, upstream=3.0,
            )  # fmt: skip


def diagnostics_runs(device: str) -> Iterator[Run]:
    """The diagnostics of features, and the class means, which are made of PyTorch operations."""
    for width in ND_WIDTHS:
        rows, classes = 6, 4
        student, means = _draw(rows, width), _draw(classes, width)
        target = torch.arange(rows) % classes
        soft = 0.9 * F.one_hot(target, classes) + 0.1 / classes
        for table, kind in ((means, "own"), (means.float(), "float32")):
            for labels, word in ((target, "indices"), (soft, "probabilities")):
                yield Run(
                    f"{width} wide, class means in {kind}, {word}", dnkd_ext.feature_diagnostics,
                    dnkd_ext.reference.feature_diagnostics, [student, labels, table, 2 * student],
                    differentiable=False,
                )  # fmt: skip

        def means_of(features, labels, classes=classes, width=width):
            accumulator = dnkd_ext.ClassMeans(classes, width, device=features.device)
            accumulator.update(features, labels)
            return accumulator.compute()

        yield Run(
            f"{width} wide, class means", means_of, means_of, [student, target],
            differentiable=False,
        )  # fmt: skip


def scale_runs(device: str) -> Iterator[Run]:
    """The kernel that multiplies a gradient by the upstream one, aligned and not."""
    for count in (1, 1024, 1031):
        for offset in (0, 1):

            def fused(gradient, upstream, offset=offset):
                result = gradient.clone()
                torch.ops.dnkd_ext._scale_(result[offset:], upstream)
                return result[offset:]

            def reference(gradient, upstream, offset=offset):
                return gradient[offset:] * upstream

            for factor in (1.0, 3.0):
                upstream = torch.tensor(factor, dtype=torch.float64)
                yield Run(
                    f"{count} elements from {offset}, times {factor:g}", fused, reference,
                    [_draw(count + offset), upstream], differentiable=False,
                )  # fmt: skip


LOSSES: dict[str, Callable[[str], Iterator[Run]]] = {
    "nd_loss": nd_runs,
    "ce_kd_loss": lambda device: logit_runs("ce_kd_loss", device),
    "ce_dkd_loss": lambda device: logit_runs("ce_dkd_loss", device),
    "dist_loss": dist_runs,
    "diagnostics": diagnostics_runs,
    "scale": scale_runs,
}


DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in LOSS_DTYPES}


def error(run: Run, dtype: torch.dtype, device: str) -> float:
    """The largest difference of outputs and gradient from the reference, relative."""

    def evaluate(function, to, where) -> list[Tensor]:
        def prepare(value, position):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value.to(where) if isinstance(value, Tensor) else value
            seen = value.to(dtype) if value.dtype == torch.float64 else value
            if function is run.fused and run.what.endswith(("times 1", "times 3")) and position:
                # The upstream gradient of the scaling kernel is in the accumulator's dtype.
                return seen.to(where, torch.float64 if dtype == torch.float64 else torch.float32)
            return seen.to(where, to or seen.dtype)

        values = [prepare(value, position) for position, value in enumerate(run.arguments)]
        options = {key: prepare(value, 0) for key, value in run.options.items()}
        if run.differentiable:
            values[0].requires_grad_()
        result = function(*values, **options)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if run.differentiable:
            outputs = [outputs[0]]  # the terms beside the loss are parts of it
            outputs += torch.autograd.grad(run.upstream * outputs[0].sum(), values[0])
        return [output.detach().double().cpu() for output in outputs]

    pairs = zip(
        evaluate(run.fused, None, device),
        evaluate(run.reference, torch.float64, "cpu"),
        strict=True,
    )
    worst = 0.0
    for got, wanted in pairs:
        difference = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        worst = max(worst, difference.item()) if difference == difference else float("nan")
    return worst


def check(name: str, device: str, dtypes: Sequence[torch.dtype] = LOSS_DTYPES) -> int:
    """Run a loss in all dtypes; how many runs differ from the reference."""
    failed = 0
    _GENERATOR.manual_seed(0)
    for run in LOSSES[name](device):
        for dtype in dtypes:
            bound = 1e-5 if dtype == torch.float32 else 1e-10
            if dtype.itemsize == 2:
                bound = 4 * torch.finfo(dtype).eps
            if "float32" in run.what or name == "diagnostics":
                bound = max(bound, 1e-5)  # a float32 table's rounding is not the reference's
            found = error(run, dtype, device)
            if not found <= bound:
                failed += 1
                print(f"FAIL {name} {str(dtype)[6:]}, {run.what}: error {found:.1e} > {bound:.0e}")
    print(f"{name} on {device}: {failed} runs differ from the reference")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where something differs, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--loss", action="append", choices=LOSSES, help="only this (repeatable)")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPE_NAMES, help="only this (repeatable)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("sanitize needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    dtypes = [DTYPE_NAMES[name] for name in arguments.dtype or DTYPE_NAMES]
    failed = sum(check(name, arguments.device, dtypes) for name in arguments.loss or LOSSES)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
