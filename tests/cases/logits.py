"""The losses on logits: their definitions in NumPy, inputs of every kind, and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dnkd_ext
from tests.cases.base import (
    BAD_REDUCTION,
    Arguments,
    BadInput,
    Build,
    LossCase,
    Rows,
    Truth,
    bad_weight,
    only_loss,
    option,
    put,
)

# Added to a standard deviation by logit standardization.
STANDARD_EPS = 1e-7

# 2 (the fewest that DKD takes), 7 (scalar tails), 33 (odd rows: no vector loads), 64 (whole
# vectors), 136 (whole vectors of each instruction set and a remainder of most), 1100 (a block per
# row).
WIDTHS = (2, 7, 33, 64, 136, 1100)

# -- definitions ----------------------------------------------------------------------------------


def _log_sum_exp(x: np.ndarray) -> float:
    largest = x.max()
    return float(largest + np.log(np.exp(x - largest).sum()))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - _log_sum_exp(x)


def _divergence(log_q: np.ndarray, log_p: np.ndarray) -> tuple[float, float]:
    """KL(q || p) and the size of what it is a sum of; where q is 0 it counts nothing."""
    counts = np.exp(log_q) > 0
    log_q, log_p = log_q[counts], log_p[counts]
    q = np.exp(log_q)
    return float(q @ (log_q - log_p)), float(q @ (np.abs(log_q) + np.abs(log_p)))


Pullback = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _standardized(z: np.ndarray) -> tuple[np.ndarray, Pullback]:
    """(z - mean) / (deviation + eps), and what brings a gradient and its size back to z."""
    centred = z - z.mean()
    degrees = max(len(z) - 1, 1)
    deviation = math.sqrt(float(centred @ centred) / degrees)
    scale = 1 / (deviation + STANDARD_EPS)

    def pullback(gradient: np.ndarray, magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        result = (gradient - gradient.mean()) * scale
        size = (magnitude + magnitude.mean()) * scale
        if deviation > 0:
            along = centred * scale**2 / (degrees * deviation)
            result = result - (gradient @ centred) * along
            size = size + (magnitude @ np.abs(centred)) * np.abs(along)
        return result, size

    return centred * scale, pullback


Row = tuple[float, float, np.ndarray, np.ndarray]  # loss, its size, gradient, its size


def _kd_row(u: np.ndarray, v: np.ndarray) -> Row:
    """KL of the softmaxes, and its gradient with respect to u."""
    log_p, log_q = _log_softmax(u), _log_softmax(v)
    p, q = np.exp(log_p), np.exp(log_q)
    return *_divergence(log_q, log_p), p - q, p + q


def _dkd_row(u: np.ndarray, v: np.ndarray, label: int, alpha: float, beta: float) -> Row:
    """alpha TCKD + beta NCKD from the distributions they are defined by."""
    others = np.arange(len(u)) != label
    # (label, everything else), and the classes of everything else
    log_p, log_q = _log_softmax(u), _log_softmax(v)
    log_b, log_d = (np.array([x[label], _log_sum_exp(x[others])]) for x in (log_p, log_q))
    log_p, log_q = _log_softmax(u[others]), _log_softmax(v[others])
    (b, d), p, q = (np.exp(log_b), np.exp(log_d)), np.exp(log_p), np.exp(log_q)
    tckd, tckd_size = _divergence(log_d, log_b)
    nckd, nckd_size = _divergence(log_q, log_p)
    gradient, magnitude = np.empty_like(u), np.empty_like(u)
    # Of two numbers near 1 the difference is taken of what they lack.
    delta = d[1] - b[1] if d[0] > 0.5 else b[0] - d[0]
    gradient[label], magnitude[label] = alpha * delta, abs(alpha) * (b[0] + d[0])
    gradient[others] = -alpha * delta * p + beta * (p - q)
    magnitude[others] = abs(alpha) * (b[1] + d[1]) * p + abs(beta) * (p + q)
    size = abs(alpha) * tckd_size + abs(beta) * nckd_size
    return alpha * tckd + beta * nckd, size, gradient, magnitude


def _ce_row(z: np.ndarray, target: np.ndarray) -> Row:
    """Cross entropy against probabilities, which need not sum to 1."""
    log_p = _log_softmax(z)
    terms = np.where(target == 0, 0, target * np.where(target == 0, 0, log_p))
    p, mass = np.exp(log_p), target.sum()
    gradient, magnitude = mass * p - target, np.abs(mass) * p + np.abs(target)
    return float(-terms.sum()), float(np.abs(terms).sum()), gradient, magnitude


def _oracle(has_ce: bool, decoupled: bool) -> Callable[..., Truth]:
    """The definition of one of the four losses."""

    def oracle(
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        temperature: float = 4.0,
        ce_weight: float | Tensor = 1.0,
        kd_weight: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        loss_weight: float | Tensor = 1.0,
        logit_standardization: bool = False,
        reduction: str = "mean",
    ) -> Truth:
        classes = student.shape[-1]
        kd, ce = Rows(student), Rows(student)
        soft = target is not None and target.is_floating_point()
        if target is not None:
            target = target.reshape(-1, classes) if soft else target.reshape(-1)
        pairs = zip(
            student.reshape(-1, classes).numpy(), teacher.reshape(-1, classes).numpy(), strict=True
        )
        for i, (z, t) in enumerate(pairs):
            label, wanted = None, None
            if soft:
                wanted = target[i].numpy()
                label = int(wanted.argmax())
            elif target is not None and int(target[i]) != ignore_index:
                label = int(target[i])
                wanted = np.eye(1, classes, label)[0]
            if decoupled and label is None:
                kd.add(None, 1)
            else:
                u, v, pullback = z, t, lambda *both: both
                if logit_standardization:
                    (u, pullback), (v, _) = _standardized(z), _standardized(t)
                u, v = u / temperature, v / temperature
                row = _dkd_row(u, v, label, alpha, beta) if decoupled else _kd_row(u, v)
                loss, size, gradient, magnitude = row
                gradient, magnitude = pullback(gradient * temperature, magnitude * temperature)
                # A divergence may vanish by cancellation.
                kd.add(temperature**2 * loss, temperature**2 * (1 + size), gradient, magnitude)
            if has_ce and wanted is None:
                ce.add(None, 1)
            elif has_ce:
                wanted = (1 - label_smoothing) * wanted + label_smoothing / classes
                loss, size, gradient, magnitude = _ce_row(z, wanted)
                ce.add(loss, 1 + size, gradient, magnitude)
        whole = kd.reduced(reduction)
        if not has_ce:
            return whole.times(float(loss_weight))
        terms = (ce.reduced(reduction), whole)
        weights = [float(loss_weight) * float(weight) for weight in (ce_weight, kd_weight)]
        total = terms[0].times(weights[0]).plus(terms[1].times(weights[1]))
        return Truth(total.loss, total.loss_magnitude, total.gradient, total.magnitude, terms=terms)

    return oracle


# -- the mean loss in the inputs' own dtype -------------------------------------------------------


def _kd_same_dtype(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    log_p, q = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return temperature**2 * F.kl_div(log_p, q, reduction="batchmean")


def _ce_kd_same_dtype(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, ce_weight: float
) -> Tensor:
    ce = F.cross_entropy(student, target)
    return ce_weight * ce + _kd_same_dtype(student, teacher, temperature=temperature)


def _dkd_same_dtype(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    is_label = F.one_hot(target, student.shape[-1]).bool()
    parts = []
    for logits in (student / temperature, teacher / temperature):
        label = logits.softmax(-1)[is_label]
        binary = torch.stack([label, 1 - label], -1)
        parts.append((binary.log(), binary, logits[~is_label].view(len(logits), -1)))
    (log_b, _, u), (_, d, v) = parts
    tckd = F.kl_div(log_b, d, reduction="batchmean")
    nckd = F.kl_div(u.log_softmax(-1), v.softmax(-1), reduction="batchmean")
    return temperature**2 * (alpha * tckd + beta * nckd)


def _ce_dkd_same_dtype(
    student: Tensor, teacher: Tensor, target: Tensor, *, ce_weight: float, **options: Any
) -> Tensor:
    ce = F.cross_entropy(student, target)
    return ce_weight * ce + _dkd_same_dtype(student, teacher, target, **options)


# -- inputs ---------------------------------------------------------------------------------------


def _variants(has_ce: bool, decoupled: bool) -> dict[str, Build]:
    has_target = has_ce or decoupled

    def plain(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        # Spread enough that some classes are all but excluded at T = 1.
        student, teacher = (
            3 * torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(2)
        )
        target = [torch.randint(width, (rows,), generator=g)] if has_target else []
        return [student, teacher, *target], {}

    def with_options(**options: Any) -> Build:
        def build(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
            return plain(g, rows, width, classes)[0], dict(options)

        return build

    def standardized(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        args, _ = plain(g, rows, width, classes)
        # No student's row of equal logits: its gradient would be 1e7 times the usual.
        args[0][:, 0] += 8
        return args, {"logit_standardization": True, "temperature": 2.0}

    def large(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        # u = z / 4 is exact, so that ±1e4 need no wider tolerance: what matters of u is its
        # distance from the largest.
        args, _ = plain(g, rows, width, classes)
        for logits in args[:2]:
            logits.copy_(2e4 * torch.rand(rows, width, generator=g, dtype=torch.float64) - 1e4)
            if rows:
                logits[0] = torch.where(torch.arange(width) % 2 == 0, 1e4, -1e4)
        return args, {}

    def excluded(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        # Classes ruled out by the teacher, and most of them by the student, too; never the label
        # nor the class after it, without which DKD is not defined.
        args, _ = plain(g, rows, width, classes)
        label = (args[2] if has_target else torch.zeros(rows)).long()
        ruled_out = torch.rand(rows, width, generator=g) < 0.5
        for kept in (label, (label + 1) % width):
            ruled_out.scatter_(1, kept[:, None], False)
        args[1][ruled_out] = -math.inf
        args[0][ruled_out & (torch.rand(rows, width, generator=g) < 0.7)] = -math.inf
        return args, {}

    def ignored(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        args, _ = plain(g, rows, width, classes)
        is_ignored = torch.rand(rows, generator=g) < 0.4
        args[2] = torch.where(is_ignored, 25555, args[2]).int()
        if decoupled:  # whatever such a row holds; KD counts it
            args[0][is_ignored] = math.nan
            args[1][is_ignored] = math.inf
        return args, {"ignore_index": 25555}

    def probabilities(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        args, _ = plain(g, rows, width, classes)
        args[2] = torch.rand(rows, width, generator=g, dtype=torch.float64).mul_(3).softmax(-1)
        if decoupled and rows:
            args[2][0] = 1 / width  # the first of several maxima is the label
        # They need not sum to 1, and ignore_index has no meaning.
        args[2] *= 0.5 + torch.rand(rows, 1, generator=g, dtype=torch.float64)
        return args, {"ignore_index": 0, **({"label_smoothing": 0.2} if has_ce else {})}

    def weights(g: torch.Generator, rows: int, width: int, classes: int) -> Arguments:
        args, _ = plain(g, rows, width, classes)
        named = {"loss_weight": 2.5, **({"ce_weight": 0.5, "kd_weight": 1.5} if has_ce else {})}
        return args, {
            name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()
        }

    terms = {"alpha": 0.5, "beta": 2.0} if decoupled else {}
    factors = {"ce_weight": 0.25, "kd_weight": 3.0} if has_ce else {}
    variants = {
        "plain": plain,
        "T=1": with_options(temperature=1.0, **terms),
        "T=2": with_options(temperature=2.0, loss_weight=0.5, **factors),
        "T=3.5": with_options(temperature=3.5),
        "standardized": standardized,
        "large": large,
        "excluded": excluded,
        "weight_tensors": weights,
    }
    if has_target:
        variants["ignored"] = ignored
        variants["probabilities"] = probabilities
    if has_ce:
        variants["label_smoothing"] = with_options(label_smoothing=0.1)
    return variants


def _golden(has_ce: bool, decoupled: bool):
    """The golden files hold KD and DKD; beside a cross entropy, one of weight 0."""

    def golden(arrays: dict[str, np.ndarray]) -> Iterator[tuple[Arguments, float, np.ndarray]]:
        names = ["student_logits", "teacher_logits"]
        args = [torch.from_numpy(arrays[name]).double() for name in names]
        if has_ce or decoupled:
            args.append(torch.from_numpy(arrays["labels"]))
        for temperature in (1, 4):
            name = f"dkd_a0.5_b8_T{temperature}" if decoupled else f"kd_T{temperature}"
            options: dict[str, Any] = {"temperature": float(temperature)}
            if has_ce:
                options["ce_weight"] = 0.0
            if decoupled:
                options |= {"alpha": 0.5, "beta": 8.0}
            yield (args, options), float(arrays[f"{name}_loss"]), arrays[f"{name}_grad"]

    return golden


def _to_classes(count: int):
    def apply(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[0], args[1] = args[0][:, :count], args[1][:, :count]

    return apply


def bad_logits(temperature: str, *, least: int) -> tuple[BadInput, ...]:
    """Wrong logits of student or teacher and wrong temperatures, by the name these have."""
    return (
        BadInput(
            "student is a list",
            put(0, lambda x: [1.0]),
            TypeError,
            "student_logits must be a torch.Tensor, got list",
            is_traceable=False,
        ),
        BadInput(
            "student is integer",
            put(0, lambda x: x.long()),
            TypeError,
            "student_logits must be float16, bfloat16, float32 or float64, got",
        ),
        BadInput(
            "student is 0-dim",
            put(0, lambda x: x.sum()),
            ValueError,
            r"student_logits must be \(\.\.\., C\), got a 0-dim tensor",
        ),
        BadInput(
            "no classes",
            _to_classes(0),
            ValueError,
            r"student_logits must have at least "
            + ("1 class, got 0" if least == 1 else f"{least} classes, got 0"),
        ),
        BadInput(
            "teacher is a list",
            put(1, lambda x: x.tolist()),
            TypeError,
            "teacher_logits must be a torch.Tensor, got list",
            is_traceable=False,
        ),
        BadInput(
            "teacher is integer",
            put(1, lambda x: x.long()),
            TypeError,
            "teacher_logits must be float16, bfloat16, float32 or float64, got",
        ),
        BadInput(
            "teacher of fewer classes",
            put(1, lambda x: x[:, 1:]),
            ValueError,
            r"teacher_logits must have the shape of student_logits \[6, 8\], got shape \[6, 7\]",
        ),
        BadInput(
            "teacher of one row",
            put(1, lambda x: x[:1]),
            ValueError,
            r"teacher_logits must have the shape of student_logits \[6, 8\], got shape \[1, 8\]",
        ),
        *(
            BadInput(
                f"{temperature} {value}",
                option(**{temperature: value}),
                ValueError,
                f"{temperature} must be finite and greater than 0, got {value:g}",
            )
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
    )


def _bad_inputs(has_ce: bool, decoupled: bool) -> tuple[BadInput, ...]:
    either = (TypeError, RuntimeError)
    found = [
        *bad_logits("temperature", least=2 if decoupled else 1),
        BAD_REDUCTION,
        *bad_weight("loss_weight"),
    ]
    if decoupled:
        found += [
            BadInput(
                "one class",
                _to_classes(1),
                ValueError,
                "student_logits must have at least 2 classes, got 1",
            ),
            *(
                BadInput(
                    f"{name} {value}",
                    option(**{name: value}),
                    ValueError,
                    f"{name} must be finite, got ",
                )
                for name in ("alpha", "beta")
                for value in (math.nan, -math.inf)
            ),
        ]
    if has_ce:
        found += [
            *(
                BadInput(
                    f"label smoothing {value}",
                    option(label_smoothing=value),
                    ValueError,
                    f"label_smoothing must be between 0 and 1, got {value}",
                )
                for value in (1.5, -0.1, math.nan)
            ),
            *bad_weight("ce_weight"),
            *bad_weight("kd_weight"),
        ]
    if has_ce or decoupled:
        found += [
            BadInput("target is None", put(2, lambda x: None), TypeError, "target must be"),
            BadInput(
                "target is a list",
                put(2, lambda x: x.tolist()),
                either,
                "target",
                is_traceable=False,
            ),
            *(
                BadInput(
                    f"target is {dtype}",
                    put(2, lambda x, dtype=dtype: x.to(dtype)),
                    TypeError,
                    "target must hold int64 or int32 class indices or floating class "
                    "probabilities, got",
                )
                for dtype in (torch.bool, torch.int16)
            ),
            BadInput(
                "target too long",
                put(2, lambda x: torch.cat([x, x])),
                ValueError,
                r"target of class indices must have the leading shape of student_logits \[6, 8\], "
                r"got shape \[12\]",
            ),
            BadInput(
                "target is an integer one-hot",
                put(2, lambda x: torch.eye(8, dtype=torch.long)[x]),
                ValueError,
                r"target of class indices must have the leading shape of student_logits \[6, 8\], "
                r"got shape \[6, 8\]; classes come last, and class probabilities are floating",
            ),
            BadInput(
                "target is sparse",
                put(2, lambda x: x.to_sparse()),
                TypeError,
                "target must be a dense tensor, got layout",
                is_traceable=False,
            ),
            BadInput(
                "target of too few probabilities",
                put(2, lambda x: torch.rand(len(x), 2)),
                ValueError,
                "target of class probabilities must have the shape of student_logits "
                r"\[6, 8\], got shape \[6, 2\]",
            ),
            BadInput(
                "target above",
                put(2, lambda x: x.index_fill(0, torch.tensor([3]), 9)),
                IndexError,
                r"target\[3\] = 9 is out of range for 8 classes",
                is_traceable=False,
            ),
            BadInput(
                "target negative",
                put(2, lambda x: x.index_fill(0, torch.tensor([2]), -1)),
                IndexError,
                r"target\[2\] = -1 is out of range for 8 classes",
                is_traceable=False,
            ),
        ]
    return tuple(found)


# -- operators ------------------------------------------------------------------------------------


def _operator_arguments(kind: str):
    def arguments(student, teacher, target=None, **options):
        scales, factors = [], []
        for name in ("ce_weight", "kd_weight"):
            scale, factor = None, 1.0
            for weight in (options.get(name, 1.0), options.get("loss_weight", 1.0)):
                if isinstance(weight, Tensor):
                    scale = weight if scale is None else scale * weight
                else:
                    factor *= weight
            scales.append(scale)
            factors.append(factor)
        return (
            student,
            teacher,
            target,
            *scales,
            kind,
            options.get("temperature", 4.0),
            *factors,
            options.get("alpha", 1.0),
            options.get("beta", 8.0),
            options.get("label_smoothing", 0.0),
            options.get("ignore_index", -100),
            options.get("reduction", "mean"),
            options.get("logit_standardization", False),
        )

    return arguments


def _inner_operators(kind: str, has_ce: bool, decoupled: bool):
    def calls(
        g: torch.Generator, device: str | torch.device
    ) -> Iterator[tuple[str, tuple[Any, ...]]]:
        student, teacher = (torch.randn(6, 16, generator=g).to(device) for _ in range(2))
        labels, probabilities = torch.arange(6, device=device), teacher.softmax(-1)
        scale = torch.tensor(2.0, device=device)
        targets = [(None, None)]
        if has_ce or decoupled:
            # DKD takes probabilities beside the labels that were read from them.
            targets = [(labels, None), (labels if decoupled else None, probabilities)]
        for target in targets:
            inputs = (student, teacher, *target)
            numbers = (4.0, 0.5, 2.0, 1.0, 8.0, 0.1 if has_ce else 0.0, -100)
            for needs_gradient in (False, True):
                for reduction in ("mean", "none"):
                    options = (None, scale, kind, *numbers, reduction, False, needs_gradient)
                    yield "_logit_loss_forward", (*inputs, *options)
            forward = torch.ops.dnkd_ext._logit_loss_forward.default
            saved = forward(*inputs, *options)[3]
            upstream = torch.ones(6, device=device)
            yield "_logit_loss_backward", (upstream, *inputs, saved, kind, 4.0, False)

    return calls


def _case(
    kind: str,
    same_dtype: Callable[..., Tensor],
    smooth: tuple[str, ...],
    compiled: tuple[str, ...],
) -> LossCase:
    name = f"{kind}_loss"
    has_ce, decoupled = kind.startswith("ce_"), kind.endswith("dkd")
    fused, reference = getattr(dnkd_ext, name), getattr(dnkd_ext.reference, name)
    variants = _variants(has_ce, decoupled)

    def underflowing(g: torch.Generator) -> Arguments:
        # 1024 x 1000 under a weight as small as a mean over 64 or, for the label's large element
        # of the cross entropy, 4096 times as many rows makes it: elements of about 1e-8.
        args, kwargs = variants["plain"](g, 1024, 1000, 0)
        weight = 2.0**-12 if has_ce else 2.0**-6
        return [args[0] / 3, args[1] / 3, *args[2:]], {**kwargs, "loss_weight": weight}

    return LossCase(
        name=name,
        fused=only_loss(fused) if has_ce else fused,
        reference=only_loss(reference) if has_ce else reference,
        oracle=_oracle(has_ce, decoupled),
        widths=WIDTHS if decoupled else (1, *WIDTHS),
        variants=variants,
        main="plain",
        smooth=smooth,
        compiled=compiled,
        per_row=(0, 1, 2),
        teacher=1,
        golden=_golden(has_ce, decoupled),
        same_dtype=same_dtype,
        # A logit of minus infinity excludes a class and is none.
        faults={
            "nan in student": (0, math.nan),
            "inf in student": (0, math.inf),
            "nan in teacher": (1, math.nan),
            "inf in teacher": (1, math.inf),
        },
        bad_inputs=_bad_inputs(has_ce, decoupled),
        underflowing=underflowing,
        operator="logit_loss",
        operator_arguments=_operator_arguments(kind),
        inner_operators=_inner_operators(kind, has_ce, decoupled),
        # Others are converted once.
        teachers_without_copy=(
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ),
        target=2 if has_ce or decoupled else None,
        drops_ignored=decoupled,
        forms_gradient_from_teacher=True,
    )


KD_LOSS = _case("kd", _kd_same_dtype, ("plain", "standardized"), ("plain",))
CE_KD_LOSS = _case(
    "ce_kd",
    _ce_kd_same_dtype,
    ("plain", "ignored", "probabilities"),
    ("probabilities", "weight_tensors"),
)
DKD_LOSS = _case("dkd", _dkd_same_dtype, ("plain", "ignored", "standardized"), ("ignored",))
CE_DKD_LOSS = _case(
    "ce_dkd",
    _ce_dkd_same_dtype,
    ("plain", "ignored", "probabilities"),
    ("ignored", "probabilities", "weight_tensors"),
)
LOGIT_CASES = (KD_LOSS, CE_KD_LOSS, DKD_LOSS, CE_DKD_LOSS)
