"""The CUDA kernels of the losses on logits, run on the CPU through the shim in tests/simt.

They are compared with the reference in float64; see test_simt.py.
"""

from __future__ import annotations

import pytest
import torch

from dnkd_ext.losses._logits import logit_loss_reference
from tests.simt import programs
from tests.simt.programs import DTYPES, REDUCTIONS, accumulate, strided

# (student, teacher): of one type, or the teacher of the type that sums are kept in.
PAIRS = [
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
]
BAD_LABELS = (-1, 2**31 - 1)  # and the number of classes


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return programs.build("logit_loss", tmp_path_factory)


def ids(options):
    return ",".join(f"{k}={v}" for k, v in options.items())


def run_logit_loss(
    harness, *, dtype, columns, kind="ce_kd", rows=5, teacher_dtype=None, temperature=4.0,
    target="int64", label_smoothing=0.0, reduction="mean", saves="gradient", standardize=False,
    scales=None, upstream=None, ignored=(), ignore_index=-100, bad=(), stride=None, shift=0,
    shared=64 << 10, multiprocessors=2, reverse=False, change=None, seed=0, weights=(0.7, 1.5),
    stand_in=None, clusters=True, cluster=0, teacher_stride=None, teacher_shift=None,
    probabilities_stride=None, probabilities_shift=None, most_cluster=8, ptx=90, late=0,
    unexpected=(),
):  # fmt: skip
    """Both sides: (losses, gradient) of the kernels, and of the reference in float64.

    clusters: whether the device has them; cluster: the blocks of one that are expected, 0 any.
    most_cluster: of how many blocks one finds room; ptx: what the kernels were compiled for. late:
    when what blocks of a cluster send each other arrives, see the shim.
    stand_in: what the reference sees instead of -inf. Strides and shifts of their own: where not
    given, those of the student. unexpected: classes whose given probability is 0.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    teacher_dtype = teacher_dtype or dtype
    student, teacher = draw(rows, columns) * 3, draw(rows, columns) * 3
    labels = torch.randint(columns, (rows,), generator=g)
    if ignore_index >= 0:
        labels[labels == ignore_index] = (ignore_index + 1) % columns
    if change is not None:
        change(student, teacher, labels)
    student, teacher = student.to(dtype), teacher.to(teacher_dtype)
    probabilities = draw(rows, columns).mul(2).softmax(-1).to(accumulate(dtype))
    probabilities[:, list(unexpected)] = 0
    with_probabilities = target == "probabilities"
    if with_probabilities:
        labels = probabilities.argmax(-1) if rows else labels
    labels[list(ignored)] = ignore_index
    good = labels.clone()
    labels[list(bad)] = torch.tensor([columns, *BAD_LABELS])[: len(bad)]
    good[list(bad)] = 0
    has_ce, decoupled = kind.startswith("ce"), kind.endswith("dkd")
    is_none, with_label = reduction == "none", target != "none"
    stride = stride or columns
    teacher_stride = teacher_stride or stride
    probabilities_stride = probabilities_stride or stride
    numbers = {
        "dtype": DTYPES.index(dtype), "teacher_is_wide": teacher_dtype != dtype,
        "label": 0 if not with_label else 32 if target == "int32" else 64,
        "probabilities": with_probabilities, "has_ce": has_ce, "decoupled": decoupled,
        "standardize": standardize, "rows": rows, "columns": columns,
        "ignore_index": ignore_index, "reduction": REDUCTIONS.index(reduction),
        "temperature": temperature, "ce_weight": weights[0], "kd_weight": weights[1],
        "alpha": 0.5, "beta": 2.0, "label_smoothing": label_smoothing, "stride": stride,
        "teacher_stride": teacher_stride, "probabilities_stride": probabilities_stride,
        "teacher_shift": shift if teacher_shift is None else teacher_shift,
        "probabilities_shift": shift if probabilities_shift is None else probabilities_shift,
        "shift": shift, "scale_tensors": scales is not None,
        "saves": {"nothing": 0, "gradient": 1, "coefficients": 2}[saves],
        "multiprocessors": multiprocessors, "reverse_blocks": reverse, "shared": shared,
        "clusters": clusters, "cluster": cluster, "most_cluster": most_cluster, "ptx": ptx,
        "late": late,
        "phantom_classes": 0,
    }  # fmt: skip
    arrays = [strided(student, stride), strided(teacher, teacher_stride)]
    if with_label:
        arrays.append(labels.int() if target == "int32" else labels)
    if with_probabilities:
        arrays.append(strided(probabilities, probabilities_stride))
    if scales is not None:
        arrays += [torch.tensor([scale], dtype=accumulate(dtype)) for scale in scales]
    up = torch.ones(()) if upstream is None else upstream
    if saves == "coefficients":
        full = up.expand(rows) if is_none else up.reshape(1).expand(max(rows, 1))
        arrays.append(full[:rows].to(accumulate(dtype)))
    outputs = [((rows,) if is_none else (), accumulate(dtype))] * 3
    if saves != "nothing":
        outputs = [*outputs, ((rows, columns), dtype)]
    *losses, gradient = [*harness("logit_loss", numbers, arrays, outputs), None][:4]

    leaf, teacher = student.double(), teacher.double()
    if stand_in is not None:
        leaf, teacher = (x.nan_to_num(nan=float("nan"), neginf=stand_in) for x in (leaf, teacher))
    leaf.requires_grad_()
    factors = scales or (1.0, 1.0)
    expected = logit_loss_reference(
        kind, leaf, teacher, probabilities.double() if with_probabilities else good,
        temperature=temperature, ce_weight=weights[0] * factors[0],
        kd_weight=weights[1] * factors[1], alpha=0.5, beta=2.0, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction, logit_standardization=standardize,
    )  # fmt: skip
    full = up.expand(expected.loss.shape).double() if saves == "coefficients" else 1.0
    (expected.loss * full).sum().backward()
    expected_losses, expected_gradient = [x.detach().clone() for x in expected], leaf.grad
    if bad:  # the reference was given good labels for them
        faulty = [True, has_ce, decoupled]
        for loss, is_faulty in zip(expected_losses, faulty, strict=True):
            if is_faulty:
                loss[list(bad) if is_none else ...] = float("nan")
        expected_gradient[list(bad)] = float("nan")
    return (losses, gradient), (expected_losses, expected_gradient)


def assert_close(result, expected, dtype):
    programs.assert_close(result[0], expected[0], result[1], expected[1], dtype)


# A warp, a block and a large block per row (at 520 the first that a warp does not take in float32,
# at 4104 and 8208 the first that a block does not take in float32 and in 16 bits), with and without
# elements beside the vectors.
@pytest.mark.parametrize("columns", [2, 7, 64, 127, 129, 512, 520, 1031, 1100, 2304, 4104, 8208])
@pytest.mark.parametrize(("dtype", "teacher_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_forms_the_gradient(harness, dtype, teacher_dtype, columns, kind):
    result = run_logit_loss(
        harness, dtype=dtype, teacher_dtype=teacher_dtype, columns=columns, kind=kind,
        rows=9 if columns < 300 else 3, ignored=(1,), label_smoothing=0.1 * (columns % 2),
    )  # fmt: skip
    assert_close(*result, dtype)


@pytest.mark.parametrize("columns", [7, 64, 520, 1031, 4104])
@pytest.mark.parametrize(("dtype", "teacher_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize("target", ["int64", "probabilities"])
def test_backward_from_row_scalars(harness, dtype, teacher_dtype, columns, kind, target):
    is_none = columns != 64
    upstream = torch.linspace(-1, 2, 5) if is_none else torch.tensor(1024.0)
    result = run_logit_loss(
        harness, dtype=dtype, teacher_dtype=teacher_dtype, columns=columns, kind=kind,
        target=target, reduction="none" if is_none else "mean", saves="coefficients",
        upstream=upstream, label_smoothing=0.2, ignored=(2,) if target == "int64" else (),
        standardize=columns == 520,
    )  # fmt: skip
    assert_close(*result, dtype)


@pytest.mark.parametrize(
    ("dtype", "saves"),
    [
        (torch.float16, "coefficients"),
        (torch.bfloat16, "gradient"),
        (torch.float32, "gradient"),
        (torch.float64, "coefficients"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["kd", "ce_kd", "dkd", "ce_dkd"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 2.5},
        {"temperature": 4.0, "standardize": True},
        {"temperature": 1.0, "standardize": True, "columns": 530},
        {"target": "int32", "scales": (0.25, 3.0), "reduction": "sum"},
        {"target": "probabilities", "label_smoothing": 0.3, "temperature": 3.0},
        {"target": "probabilities", "standardize": True, "reduction": "none"},
        {"label_smoothing": 1.0},
    ],
    ids=ids,
)
def test_settings(harness, dtype, kind, saves, options):
    result = run_logit_loss(
        harness, dtype=dtype, kind=kind, saves=saves, **{"columns": 72, **options}
    )
    assert_close(*result, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize(
    "options",
    [
        {"saves": "nothing", "reduction": "none"},
        {"stride": 72},  # rows apart, still aligned
        {"stride": 72, "columns": 61, "saves": "nothing"},  # vectors and a scalar tail
        {"stride": 528, "columns": 523, "saves": "coefficients"},
        {"stride": 8208, "columns": 8201, "saves": "nothing", "rows": 2},
        {"stride": 67},  # rows that vectors cannot read
        {"stride": 72, "columns": 61, "target": "probabilities", "saves": "nothing"},
        {"shift": 1},  # a gradient that does not lie as the logits do
        {"shift": 1, "columns": 523},
        {"shift": 1, "columns": 8201, "rows": 2, "shared": 24 << 10},
        {"shift": 1, "columns": 523, "saves": "nothing"},  # all alike, beside their vectors
        {"teacher_shift": 1, "saves": "nothing"},  # a teacher that does not lie as the student
        {"teacher_stride": 65, "saves": "nothing"},
        {"teacher_stride": 530, "columns": 523, "saves": "coefficients"},
        {"probabilities_shift": 1, "target": "probabilities", "saves": "nothing"},
        {"probabilities_stride": 65, "target": "probabilities", "saves": "nothing"},
        {"rows": 0},
        {"rows": 0, "reduction": "none", "saves": "coefficients"},
        {"rows": 1},
        {"rows": 1, "columns": 4104, "multiprocessors": 6},
        {"rows": 40, "multiprocessors": 1, "ignored": (3, 39)},
        {"ignored": (0, 1, 2, 3, 4)},
        {"ignored": (0, 1, 2, 3, 4), "saves": "coefficients"},
        {"ignored": (1, 2), "ignore_index": 3},  # a label that would name a class
        {"ignored": (1, 2), "ignore_index": 3, "saves": "coefficients", "reduction": "none"},
        {"bad": (0, 3, 4)},  # labels that name no class
        {"bad": (0, 1, 3), "ignored": (2,), "target": "int32", "reduction": "none"},
        {"bad": (2,), "reduction": "none", "saves": "coefficients", "columns": 600},
    ],
    ids=ids,
)
def test_arguments(harness, dtype, kind, options):
    result = run_logit_loss(harness, dtype=dtype, kind=kind, **{"columns": 64, **options})
    assert_close(*result, dtype)


@pytest.mark.parametrize("kind", ["kd", "dkd"])
def test_distillation_alone(harness, kind):
    """Labels are read for DKD alone; ce is 0 whatever its weight."""
    result = run_logit_loss(
        harness, dtype=torch.float32, columns=64, kind=kind, weights=(float("inf"), 1.5),
        target="none" if kind == "kd" else "int64", ignored=() if kind == "kd" else (1,),
    )  # fmt: skip
    assert result[0][0][1] == 0
    (losses, gradient), (expected, _) = result
    torch.testing.assert_close(losses[0].double(), 1.5 * expected[2], rtol=2e-5, atol=0)
    assert gradient.isfinite().all()
    finite = run_logit_loss(
        harness, dtype=torch.float32, columns=64, kind=kind,
        target="none" if kind == "kd" else "int64", ignored=() if kind == "kd" else (1,),
    )  # fmt: skip
    assert_close(*finite, torch.float32)


# Shared memory for no slot, for one to a few, and for all; 48 KiB and more has to be asked for.
@pytest.mark.parametrize("shared", [8 << 10, 24 << 10, 48 << 10, 228 << 10])
@pytest.mark.parametrize("columns", [512, 3000, 9000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_rows_beyond_shared_memory(harness, dtype, columns, shared, standardize):
    result = run_logit_loss(
        harness, dtype=dtype, teacher_dtype=torch.float32, columns=columns, kind="ce_dkd",
        shared=shared, rows=2, standardize=standardize,
    )  # fmt: skip
    assert_close(*result, dtype)


# With this much shared memory a large block keeps 6,400 float32 logits of each row (DKD: 5,120), a
# block of a cluster 3,072; with that of an H100 16,640 and 9,216. Of 16 bits twice as many.
FOR_CLUSTERS, OF_AN_H100 = 84 << 10, 228 << 10


@pytest.mark.parametrize(
    ("dtype", "shared", "columns", "cluster"),
    [
        (torch.float32, FOR_CLUSTERS, 5100, 1),
        (torch.float32, OF_AN_H100, 17_001, 2),
        (torch.float32, FOR_CLUSTERS, 10_001, 4),
        (torch.float32, FOR_CLUSTERS, 20_003, 8),
        (torch.float32, FOR_CLUSTERS, 31_000, 8),  # more than they keep
        (torch.bfloat16, OF_AN_H100, 34_000, 2),
        (torch.float16, FOR_CLUSTERS, 20_007, 4),
        (torch.bfloat16, FOR_CLUSTERS, 40_000, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_rows_shared_by_a_cluster(harness, dtype, shared, columns, cluster, kind):
    """Several rows for each cluster, among them ignored ones and labels in every block's part."""

    def change(student, teacher, labels):
        labels[:] = torch.linspace(0, columns - 1, len(labels)).long()

    result = run_logit_loss(
        harness, dtype=dtype, columns=columns, kind=kind, cluster=cluster, shared=shared,
        rows=7, ignored=(2,), change=change, multiprocessors=4, label_smoothing=0.1,
    )  # fmt: skip
    assert_close(*result, dtype)


@pytest.mark.parametrize("kind", ["kd", "ce_kd", "dkd", "ce_dkd"])
@pytest.mark.parametrize(
    "options",
    [
        {"saves": "nothing"},
        {"saves": "coefficients", "temperature": 3.0},
        {"reduction": "none", "saves": "gradient", "temperature": 1.0},
        {"reduction": "sum", "scales": (0.25, 3.0), "temperature": 2.0},
        {"target": "probabilities", "standardize": True},
        {"ignored": (0, 1, 2)},
        {"bad": (1, 2), "reduction": "none"},
        {"rows": 1},
        {"rows": 0},
        {"stride": 10_112, "saves": "nothing"},  # rows apart, still alike
    ],
    ids=ids,
)
def test_settings_in_clusters(harness, kind, options):
    options = {"rows": 3, "cluster": 4 if options.get("rows") != 0 else 0, **options}
    if kind == "kd":
        options.pop("bad", None)  # it reads no labels
    result = run_logit_loss(
        harness, dtype=torch.float32, columns=10_001, kind=kind, shared=FOR_CLUSTERS, **options
    )
    assert_close(*result, torch.float32)


@pytest.mark.parametrize("columns", [7000, 10_001, 31_000])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize(
    "without", [{"clusters": False}, {"ptx": 80}, {"most_cluster": 1}], ids=ids
)
def test_devices_without_clusters(harness, columns, kind, without):
    """Large blocks, and huge ones that keep a row and that do not."""
    result = run_logit_loss(
        harness, dtype=torch.float32, columns=columns, kind=kind, shared=FOR_CLUSTERS, rows=3,
        cluster=1, **without,
    )  # fmt: skip
    assert_close(*result, torch.float32)


@pytest.mark.parametrize(("most", "cluster"), [(4, 4), (2, 2)])
def test_clusters_that_find_room(harness, most, cluster):
    """Where those that would keep a row find none."""
    result = run_logit_loss(
        harness, dtype=torch.float32, columns=20_003, shared=FOR_CLUSTERS, rows=3,
        most_cluster=most, cluster=cluster,
    )  # fmt: skip
    assert_close(*result, torch.float32)


@pytest.mark.parametrize("late", [1, 2])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize(("columns", "cluster"), [(10_001, 4), (20_003, 8), (31_000, 8)])
def test_what_a_cluster_sends_may_come_late(harness, late, kind, columns, cluster):
    """In any order, and the last row's, too, before a block ends."""
    options = {"dtype": torch.float32, "columns": columns, "kind": kind, "rows": 7}
    options |= {"shared": FOR_CLUSTERS, "cluster": cluster, "multiprocessors": 4}
    (losses, gradient), _ = run_logit_loss(harness, **options)
    (other_losses, other_gradient), _ = run_logit_loss(harness, **options, late=late)
    for one, two in zip(losses, other_losses, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(gradient, other_gradient)


def test_clusters_do_not_depend_on_their_order(harness):
    """Bitwise, and with another number of clusters only the loss' sum may differ."""
    options = {"dtype": torch.float32, "columns": 10_001, "rows": 6, "kind": "ce_kd"}
    options |= {"shared": FOR_CLUSTERS, "cluster": 4, "multiprocessors": 8}
    forward, _ = run_logit_loss(harness, **options)
    backward, _ = run_logit_loss(harness, **options, reverse=True)
    fewer, _ = run_logit_loss(harness, **options | {"multiprocessors": 1})
    for a, b in zip(forward[0], backward[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(forward[1], backward[1])
    assert torch.equal(forward[1], fewer[1])


@pytest.mark.parametrize("where", ["student", "teacher", "student label", "teacher label"])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_nan_is_seen_by_a_cluster(harness, kind, where):
    def change(student, teacher, labels):
        labels[1] = 9000
        at = 9000 if "label" in where else 100
        (student if "student" in where else teacher)[1, at] = float("nan")

    (losses, gradient), _ = run_logit_loss(
        harness, dtype=torch.float32, columns=10_001, kind=kind, change=change, rows=3,
        reduction="none", shared=FOR_CLUSTERS, cluster=4,
    )  # fmt: skip
    assert losses[0].isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def far_apart(student, teacher, labels):
    student *= 1e3
    teacher *= 1e3


def label_far_above(student, teacher, labels):
    rows = torch.arange(len(labels))
    student[rows, labels] = 1e4
    teacher[rows, labels] = 9e3


def label_far_below(student, teacher, labels):
    rows = torch.arange(len(labels))
    student[rows, labels] = -1e4
    teacher[rows, labels] = -9e3


def moved(student, teacher, labels):
    """Far from 0 together."""
    student += 2e5
    teacher[::2] -= 2e5
    student[1] += 3e6


def closed_classes(student, teacher, labels):
    """-inf in teacher and student, in the teacher alone, and no other class like the label."""
    labels[:] = 0
    student[:, 2] = teacher[:, 2:4] = -float("inf")


def impossible_class(student, teacher, labels):
    """The student excludes what the teacher does not: an infinite loss."""
    labels[:] = 0
    student[1, 2] = -float("inf")


def flat(student, teacher, labels):
    student[:2] = 0.5
    teacher[1:3] = -2.0


@pytest.mark.parametrize("columns", [2, 64, 600, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize(
    "change", [far_apart, label_far_above, label_far_below, moved], ids=lambda f: f.__name__
)
def test_large_logits(harness, dtype, columns, kind, change):
    result = run_logit_loss(harness, dtype=dtype, columns=columns, kind=kind, change=change)
    assert all(loss.isfinite() for loss in result[1][0])
    assert_close(*result, dtype)


@pytest.mark.parametrize("columns", [64, 600])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize("saves", ["gradient", "coefficients"])
def test_closed_classes(harness, columns, kind, saves):
    """Classes at -inf count as those whose probability is 0 all the same."""
    for temperature in (2.0, 3.0, 4.0):
        result = run_logit_loss(
            harness, dtype=torch.float32, columns=columns, kind=kind, change=closed_classes,
            saves=saves, temperature=temperature, reduction="none", stand_in=-1e5,
        )  # fmt: skip
        assert result[1][0][0].isfinite().all()
        assert_close(*result, torch.float32)


@pytest.mark.parametrize("columns", [7, 64, 2304])
@pytest.mark.parametrize("saves", ["gradient", "coefficients"])
@pytest.mark.parametrize("kind", ["dkd", "ce_dkd"])
def test_the_label_alone(harness, columns, kind, saves):
    """All other classes at -inf, in both, in the teacher, in the student."""

    def change(student, teacher, labels):
        for row, masked in ((1, (student, teacher)), (2, (teacher,))):
            for logits in masked:
                label = logits[row, labels[row]].item()
                logits[row] = float("-inf")
                logits[row, labels[row]] = label

    result = run_logit_loss(
        harness, dtype=torch.float32, columns=columns, kind=kind, change=change, saves=saves,
        reduction="none" if saves == "coefficients" else "mean", upstream=torch.tensor(2.0),
    )  # fmt: skip
    assert all(loss.isfinite().all() for loss in result[0][0])
    assert result[0][1][1].abs().max() == 0
    assert_close(*result, torch.float32)


@pytest.mark.parametrize("kind", ["kd", "ce_kd", "dkd", "ce_dkd"])
def test_impossible_class(harness, kind):
    (losses, _), _ = run_logit_loss(
        harness, dtype=torch.float32, columns=64, kind=kind, change=impossible_class,
        reduction="none",
    )  # fmt: skip
    for loss in (losses[0], losses[2]):
        assert (loss == float("inf")).tolist() == [False, True, False, False, False]
        assert not loss.isnan().any()
    assert losses[1].isfinite().all()


@pytest.mark.parametrize("columns", [64, 600, 4104])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_smoothing_reaches_a_class_at_minus_infinity(harness, columns, kind):
    """Whose own probability is 0, so that without smoothing it is NaN, as in PyTorch."""

    def change(student, teacher, labels):
        student[1, 2] = teacher[1, 2] = -float("inf")

    for smoothing, told in ((0.1, torch.isinf), (0.0, torch.isnan)):
        (losses, _), _ = run_logit_loss(
            harness, dtype=torch.float32, columns=columns, kind=kind, change=change,
            reduction="none", target="probabilities", label_smoothing=smoothing, unexpected=[2],
        )  # fmt: skip
        assert told(losses[1]).tolist() == [False, True, False, False, False]
        assert losses[2].isfinite().all()


@pytest.mark.parametrize("kind", ["kd", "ce_kd", "dkd", "ce_dkd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flat_rows(harness, kind, dtype):
    """Standardization of rows without spread."""
    result = run_logit_loss(
        harness, dtype=dtype, columns=64, kind=kind, change=flat, standardize=True,
        reduction="none", saves="coefficients", rows=4,
    )  # fmt: skip
    assert_close(*result, dtype)


@pytest.mark.parametrize("columns", [64, 600, 4104])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
@pytest.mark.parametrize("where", ["student", "teacher", "student label", "teacher label"])
def test_nan_is_seen(harness, columns, kind, where):
    """A NaN makes its row's loss and gradient NaN, wherever it is, and no other row's."""

    def change(student, teacher, labels):
        at = int(labels[1]) if "label" in where else (int(labels[1]) + columns // 2) % columns
        (student if "student" in where else teacher)[1, at] = float("nan")

    for standardize in (False, True):
        (losses, gradient), _ = run_logit_loss(
            harness, dtype=torch.float32, columns=columns, kind=kind, change=change, rows=3,
            reduction="none", standardize=standardize,
        )  # fmt: skip
        assert losses[0].isnan().tolist() == [False, True, False]
        assert losses[2].isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_ignored_rows_may_hold_anything(harness, kind):
    """DKD does not read them; KD counts them, and so their NaN."""

    def change(student, teacher, labels):
        student[2] = float("nan")

    for saves in ("gradient", "coefficients"):
        result = run_logit_loss(
            harness, dtype=torch.float32, columns=64, kind=kind, change=change, ignored=(2,),
            saves=saves, upstream=torch.tensor(2.0),
        )  # fmt: skip
        assert result[0][0][2].isnan() == (kind == "ce_kd")
        assert result[0][0][1].isfinite()
        assert_close(*result, torch.float32)


@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_counts_many_rows(harness, kind):
    """Several blocks of the count kernel, each block of the row kernel with many rows."""
    result = run_logit_loss(
        harness, dtype=torch.float32, columns=4, rows=1100, kind=kind,
        ignored=tuple(range(0, 1100, 3)),
    )  # fmt: skip
    assert_close(*result, torch.float32)


@pytest.mark.parametrize("columns", [64, 600, 4104])
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_does_not_depend_on_the_order_of_blocks(harness, columns, kind):
    """Bitwise: which block comes last decides who adds, not in which order."""
    options = {
        "dtype": torch.float32, "columns": columns, "rows": 50 if columns < 4000 else 16,
        "multiprocessors": 6, "kind": kind,
    }  # fmt: skip
    (forward, gradient), expected = run_logit_loss(harness, **options)
    (backward, other), _ = run_logit_loss(harness, **options, reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(gradient, other)
    assert_close((forward, gradient), expected, torch.float32)


# A warp, a block, a large block, and a huge one: with one multiprocessor every block takes several
# rows, of which each begins elsewhere in its first vector.
@pytest.mark.parametrize("columns", [61, 1031, 4103, 8201])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ce_kd", "ce_dkd"])
def test_the_next_row_takes_the_place_of_the_last(harness, columns, dtype, kind):
    """Also behind rows that are not read, and rows that name no class."""
    shared = (20 if columns == 8201 else 64) << 10
    rows = 23 if columns == 61 else 9
    (losses, gradient), (expected, wanted) = run_logit_loss(
        harness, dtype=dtype, columns=columns, rows=rows, kind=kind, multiprocessors=1,
        shared=shared, ignored=(1, 4), bad=(5,), reduction="none", saves="gradient",
        upstream=torch.ones(rows),
    )  # fmt: skip
    kept = [row for row in range(rows) if row != 5]
    assert losses[0][5].isnan()
    assert_close(
        ([one[kept] for one in losses], gradient[kept]),
        ([one[kept] for one in expected], wanted[kept]), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [64, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_a_sure_row_has_no_loss(harness, columns, temperature):
    """Exactly: neither a cross entropy nor a divergence is below 0."""

    def sure(student, teacher, labels):
        rows = torch.arange(len(labels))
        student[:], teacher[:] = -1e3, -2e3
        student[rows, labels] = torch.linspace(5.3, 40.7, len(labels), dtype=torch.float64)
        teacher[rows, labels] = torch.linspace(31.1, 3.9, len(labels), dtype=torch.float64)

    (losses, _), _ = run_logit_loss(
        harness, dtype=torch.float32, columns=columns, rows=40, change=sure, reduction="none",
        temperature=temperature,
    )  # fmt: skip
    for loss in losses:
        assert (loss == 0).all()


def test_the_shim_sees_mistakes(harness):
    """It is no use if it lets everything pass: reading behind the logits must be caught."""
    options = {"dtype": torch.float32, "columns": 8, "rows": 2, "reduction": "none"}

    def with_a_class_too_many(kernel, numbers, arrays, outputs):
        return harness(kernel, {**numbers, "phantom_classes": 1}, arrays, outputs)

    run_logit_loss(harness, **options)
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        run_logit_loss(with_a_class_too_many, **options)
