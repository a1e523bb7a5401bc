"""The performance targets, evaluated on the measurements of one machine: PASS, FAIL, not measured.

All are ratios of what was measured in one run; nothing here is a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.cases import CACHE, Case, KdPlusPlusCase, LogitCase, NdCase, all_cases, cases
from benchmarks.results import FORWARD, Latest, Measurement, Row

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "not measured"


@dataclass(frozen=True)
class Verdict:
    """One target on one machine.

    Attributes:
        text: the target in words.
        status: PASS, FAIL or "not measured".
        figure: the worst figure, with its unit; empty where nothing was measured.
        bound: what it must keep to.
        where: the case of the worst figure, or what is missing.
    """

    text: str
    status: str
    figure: str = ""
    bound: str = ""
    where: str = ""

    def __str__(self) -> str:
        line = f"{self.status:12} {self.text}"
        if self.figure:
            line += f": {self.figure} ({self.bound})"
        return line + (f" [{self.where}]" if self.where else "")


@dataclass(frozen=True)
class Target:
    """A bound on a figure of several cases, of which the worst counts.

    Attributes:
        text: the target in words.
        device: "cpu" or "cuda".
        cases: names of cases, each with its allocator.
        figure: of one case, from all that was measured; None where something is missing.
        bound: the limit.
        least: whether the figure must be at least the bound, else at most.
        unit: behind the figure.
        of_all: whether the cases are those of all losses by size or type, and not of named ones.
    """

    text: str
    device: str
    cases: tuple[tuple[str, str], ...]
    figure: Callable[[Latest, Measurement], float | None]
    bound: float
    least: bool = True
    unit: str = "x"
    of_all: bool = False

    def evaluate(self, found: Latest) -> Verdict:
        """The verdict; FAIL where any case fails, "not measured" where one is missing."""
        word = "at least" if self.least else "at most"
        bound = f"{word} {self._number(self.bound)}"
        worst: tuple[float, str] | None = None
        missing = []
        for key in self.cases:
            name = key[0] + (", warm allocator" if key[1] == "warm" and self.is_cpu else "")
            value = self.figure(found, found[key]) if key in found else None
            if value is None:
                missing.append(name)
            elif worst is None or (value < worst[0] if self.least else value > worst[0]):
                worst = value, name
        if worst is None:
            return Verdict(self.text, NOT_MEASURED, bound=bound)
        holds = worst[0] >= self.bound if self.least else worst[0] <= self.bound
        status = FAIL if not holds else NOT_MEASURED if missing else PASS
        where = worst[1] + (f"; not measured: {', '.join(missing)}" if missing and holds else "")
        figure = self._number(worst[0])
        if not holds and figure == self._number(self.bound):  # rounded, it would read as if it held
            figure = f"{worst[0]:g}{self.unit}"
        return Verdict(self.text, status, figure, bound, where)

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """The cases that it needs."""
        return self.cases

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"

    def _number(self, value: float) -> str:
        return f"{value:.2f}x" if self.unit == "x" else f"{value:g}{self.unit}"


# -- figures --------------------------------------------------------------------------------------


def _faster_than(peer: str):
    return lambda _, one: one.ratio(peer)


def _of_the_copy(_: Latest, one: Measurement) -> float | None:
    return one.ratio("ours", to="copy")


def _bandwidth(_: Latest, one: Measurement) -> float | None:
    return one.ratio("copy")


def _of_float32(_: Latest, one: Measurement) -> float | None:
    return one.ratio("ours", to="float32")


def _forward_launches(_: Latest, one: Measurement) -> float | None:
    count = one.value("launches", which=FORWARD)
    return None if count is None else count / all_cases()[one.case].losses


def _backward_launches(_: Latest, one: Measurement) -> float | None:
    both, forward = one.value("launches"), one.value("launches", which=FORWARD)
    if both is None or forward is None:
        return None
    return (both - forward) / all_cases()[one.case].losses


def _syncs(_: Latest, one: Measurement) -> float | None:
    return one.value("syncs")


def _graph(_: Latest, one: Measurement) -> float | None:
    row = one.rows.get(("forward+backward", "ours"), {})
    return {"yes": 1.0, "no": 0.0}.get(str(row.get("graph", "")))


# Scalars of a row (its label's weight, norms, partial sums) and of a block, in bytes.
ROW_SCALARS, BLOCK_SCALARS = 64, 64 << 10


def _memory(_: Latest, one: Measurement) -> float | None:
    """Peak extra memory relative to the gradients and a few scalars per row."""
    peak, case = one.value("peak_bytes"), all_cases()[one.case]
    if peak is None:
        return None
    return peak / (case.gradient_bytes + ROW_SCALARS * case.rows * case.losses + BLOCK_SCALARS)


# -- the table ------------------------------------------------------------------------------------


def _keys(chosen: Iterable[Case], allocator: str) -> tuple[tuple[str, str], ...]:
    return tuple((case.name, allocator) for case in chosen)


def _cpu() -> list[Target]:
    everything = cases("cpu")
    plain = [case for case in everything if str(case.dtype) == "torch.float32"]
    nd = [case for case in plain if isinstance(case, NdCase)]
    logits = [case for case in plain if isinstance(case, LogitCase)]

    def target(text, chosen, figure, bound, *, least=True, allocator="default", of_all=False):
        keys = _keys(chosen, allocator)
        return Target(text, "cpu", keys, figure, bound, least, of_all=of_all)

    def of(rows, width):
        return [case for case in nd if (case.rows, case.width) == (rows, width)]

    def logit(loss, *sizes):
        return [c for c in logits if c.loss == loss and (c.rows, c.classes) in sizes]

    small, middle, wide = of(64, 64), of(256, 512), of(256, 2048)
    larger = [case for case in nd if case.rows * case.width > 256 * 2048]
    imagenet, imagenet21k = (512, 1000), (1024, 21841)
    both = imagenet, imagenet21k
    eager, compiled = _faster_than("eager"), _faster_than("compile")
    return [
        target("ND at 64x64: at least 4x eager", small, eager, 4),
        target("ND at 256x512 and 256x2048: at least 7x eager", middle + wide, eager, 7),
        target("ND at 64x64 and 256x512: at least 3x torch.compile", small + middle, compiled, 3),
        target("ND at 256x2048: at least 2.5x torch.compile", wide, compiled, 2.5),
        target("ND above: at least 5x eager", larger, eager, 5),
        target("ND above: at least 1.6x torch.compile", larger, compiled, 1.6),
        target(
            "ND above: at most 1.3x the bytes floor with a warm allocator",
            larger, _of_the_copy, 1.3, least=False, allocator="warm",
        ),
        target("CE+KD at 512x1000: at least 8x eager", logit("ce_kd_loss", imagenet), eager, 8),
        target(
            "CE+KD at 1024x21841: at least 15x eager", logit("ce_kd_loss", imagenet21k), eager, 15
        ),
        target(
            "CE+KD at 512x1000 and 1024x21841: at least 5x torch.compile",
            logit("ce_kd_loss", *both), compiled, 5,
        ),
        target(
            "CE+KD at 1024x21841: at most 2x the bytes floor with a warm allocator",
            logit("ce_kd_loss", imagenet21k), _of_the_copy, 2, least=False, allocator="warm",
        ),
        target(
            "CE+DKD at 512x1000 and 1024x21841: at least 15x eager",
            logit("ce_dkd_loss", *both), eager, 15,
        ),
        target(
            "CE+DKD at 512x1000 and 1024x21841: at least 10x torch.compile",
            logit("ce_dkd_loss", *both), compiled, 10,
        ),
        target(
            "KD++ at 512x1000 with 2048 features: at least 6x eager",
            [case for case in plain if isinstance(case, KdPlusPlusCase)], eager, 6,
        ),
        target(
            "KD++ at 512x1000 with 2048 features: at least 3x torch.compile",
            [case for case in plain if isinstance(case, KdPlusPlusCase)], compiled, 3,
        ),
        target(
            "CE+KD and CE+DKD at 128x100: at least 4x eager",
            [c for c in logits if (c.rows, c.classes) == (128, 100)], eager, 4,
        ),
        target(
            f"peak extra memory: the gradients, {ROW_SCALARS} bytes per row and 64 KiB",
            [case for case in everything if case.bytes <= CACHE], _memory, 1, least=False,
            of_all=True,
        ),
        target(
            "bfloat16 within 5% of float32 inputs of the same shape, or faster",
            [case for case in everything if str(case.dtype) == "torch.bfloat16"],
            _of_float32, 1.05, least=False, of_all=True,
        ),
    ]  # fmt: skip


def _cuda() -> list[Target]:
    everything = cases("cuda")
    filling = [
        case
        for case in everything
        if (isinstance(case, NdCase) and (case.rows, case.width) == (65536, 2048))
        or (
            isinstance(case, LogitCase)
            and case.loss == "ce_kd_loss"
            and (case.rows, case.classes) == (8192, 32768)
        )
    ]
    # 256x512 to 512x2048, by the elements of the features or logits.
    bound_by_host = [
        case
        for case in everything
        if 256 * 512 <= case.gradient_bytes // case.dtype.itemsize // case.losses <= 512 * 2048
    ]
    # Apart, because DIST needs its sums over columns, too, and would hide the others.
    dist = [case for case in bound_by_host if case.family == "dist_loss"]
    rowwise = [case for case in bound_by_host if case not in dist]

    def target(text, chosen, figure, bound, *, least=True, unit="x"):
        of_all = chosen not in (filling, dist)
        return Target(text, "cuda", _keys(chosen, "warm"), figure, bound, least, unit, of_all)

    return [
        target(
            "ND at 65536x2048 and CE+KD at 8192x32768: at least 90% of a copy's bandwidth",
            filling, _bandwidth, 0.9,
        ),
        *(
            target(
                f"{name}: at most {count} {which} per loss",
                chosen, figure, bound, least=False, unit=" launches",
            )
            for name, chosen in (("256x512 to 512x2048", rowwise), ("DIST at 512x1000", dist))
            for count, which, figure, bound in (
                ("two launches", "forward", _forward_launches, 2),
                ("one launch", "backward", _backward_launches, 1),
            )
        ),
        target("256x512 to 512x2048: at least 4x eager", bound_by_host, _faster_than("eager"), 4),
        target(
            "256x512 to 512x2048: at least 2x torch.compile",
            bound_by_host, _faster_than("compile"), 2,
        ),
        target("no host synchronisation", everything, _syncs, 0, least=False, unit=" waits"),
        target("capturable in a CUDA graph", everything, _graph, 1, unit=" of 1"),
        target(
            f"peak extra memory: the gradients, {ROW_SCALARS} bytes per row and 64 KiB",
            everything, _memory, 1, least=False,
        ),
    ]  # fmt: skip


def targets(device: str) -> list[Target]:
    """The targets of a device that the ladder answers."""
    return _cpu() if device == "cpu" else _cuda()


def first_measured(rows: Iterable[Row]) -> dict[str, str]:
    """By family of cases the date of its first row."""
    first: dict[str, str] = {}
    for row in rows:
        family, date = _family(str(row["case"])), str(row["date"])
        first[family] = min(date, first.get(family, date))
    return first


def evaluate(found: Latest, device: str, first: Mapping[str, str] | None = None) -> list[Verdict]:
    """The verdicts of a ladder.

    ``first``: of first_measured() over all that was recorded. A loss that nobody had measured when
    this ladder was, because it came later, is left out of the targets of all losses and named
    there.
    """
    date = max((str(one.common["date"]) for one in found.values()), default="")
    verdicts = []
    for target in targets(device):
        asked_for = dict.fromkeys(_family(name) for name, _ in target.cases)
        new = []
        if first is not None and target.of_all:
            new = [family for family in asked_for if first.get(family, "9999") > date]
        if len(new) == len(asked_for):
            new = []
        asked = tuple(key for key in target.cases if _family(key[0]) not in new)
        verdict = replace(target, cases=asked).evaluate(found)
        if new:
            where = "; ".join([verdict.where, f"without {', '.join(new)}"])
            verdict = replace(verdict, where=where.removeprefix("; "))
        verdicts.append(verdict)
    return verdicts


def _family(name: str) -> str:
    case = all_cases().get(name)
    return name if case is None else case.family


def missed_before(verdicts: Sequence[Verdict], older: Sequence[Latest], device: str) -> list[str]:
    """Lines of what failed when it was last measured, by targets that were not measured since.

    ``older``: what earlier versions measured, the last in front.
    """
    lines = []
    for target, verdict in zip(targets(device), verdicts, strict=False):
        if verdict.status != NOT_MEASURED:
            continue
        for found in older:
            before = target.evaluate(found)
            if before.status == FAIL:
                common = next(iter(found.values())).common
                lines.append(f"{before}, at {common['commit']}, {common['kernels']} kernels")
            if before.figure:
                break
    return lines


# Per shape the targets of a step: in words, the methods and the column of a ratio, its bound, and
# whether that is the least it must be, else the most.
STEPS = {
    "imagenet": (
        ("ImageNet-shape step with KD++: at most 1% more than cross entropy and a teacher",
         "KD++ ours", "CE", "step_ms", 1.01, False),
        ("ImageNet-shape step: the loss part at least 50x cheaper than the authors' loop",
         "KD++ loop", "KD++ ours", "loss_us", 50, True),
    ),
    "detection": (
        ("COCO-shape step: the loss part at least 50x cheaper than the authors' loop",
         "KD++ loop", "KD++ ours", "loss_us", 50, True),
    ),
}  # fmt: skip


def evaluate_steps(steps: Sequence[Row], shapes: Iterable[str] = tuple(STEPS)) -> list[Verdict]:
    """The targets of end-to-end steps of some shapes, measured together on one GPU."""
    verdicts = []
    for shape in shapes:
        rows = {str(row["method"]): row for row in steps if str(row["shape"]) == shape}
        for text, above, below, column, bound, least in STEPS[shape]:
            verdicts.append(
                _step(text, rows.get(above), rows.get(below), column, bound, least=least)
            )
    return verdicts


def _step(text, above: Row | None, below: Row | None, column, bound, *, least) -> Verdict:
    words = f"{'at least' if least else 'at most'} {bound:g}x"
    first, second = (None if row is None else row.get(column) for row in (above, below))
    if first is None or not second:
        return Verdict(text, NOT_MEASURED, bound=words)
    value = float(str(first)) / float(str(second))
    holds = value >= bound if least else value <= bound
    figure = f"{value:.3f}x"
    if not holds and float(figure[:-1]) == bound:
        figure = f"{value:g}x"
    return Verdict(text, PASS if holds else FAIL, figure, words)


def lines(verdicts: Iterable[Verdict]) -> list[str]:
    """A line per target, and how many hold."""
    verdicts = list(verdicts)
    counts = {word: sum(v.status == word for v in verdicts) for word in (PASS, FAIL, NOT_MEASURED)}
    total = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return [*map(str, verdicts), f"targets: {total}"]
