"""Training, part by part: the engine's own step between marks, its rows, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks import parts, plots, report, training
from benchmarks.__main__ import main
from dnkd_ext.progress import Progress
from dnkd_ext.train import classification, distillation, stepper
from dnkd_ext.train.classification import Classification
from dnkd_ext.train.data import batches
from dnkd_ext.train.data.sources import MemorySource
from dnkd_ext.train.engine import _Training
from dnkd_ext.train.gather import gather_class_means
from dnkd_ext.train.plan import resolve
from dnkd_ext.train.presets import expand
from dnkd_ext.train.signals import Interrupted
from dnkd_ext.train.stepper import Recorded
from dnkd_ext.train.teacher_outputs import TeacherOutputs
from dnkd_ext.train.world import World

PAIR = "cifar100/resnet56-resnet20/"
WORLD = World(0, 1, torch.device("cpu"))
LOOKED_UP = {"teacher_outputs": "random"}
SMALL = ["--limit", "24", "--batch-size", "8", "--eval-images", "10", "--rounds", "2"]


def ready(preset, **settings):
    """The engine with a preset's task, of few images."""
    config = training.configure(PAIR + preset, WORLD, {"batch_size": 4, **settings})
    data = training.synthetic(12, 4)
    teacher = None
    if config.needs_teacher:
        teacher = training.untrained_teacher(config.model.teacher, data, config, WORLD)
        source = MemorySource(data)
        means = gather_class_means(teacher.model, source, config, WORLD)
        teacher = teacher._replace(class_means=means)
        if config.model.teacher_outputs is not None:
            teacher = teacher._replace(outputs=training.random_outputs(source, config, WORLD))
    task = Classification(config, MemorySource(data), teacher, WORLD)
    task.step.train()
    return _Training(task, config.optim, config.run, None, WORLD, 0, {})


@pytest.fixture(scope="module")
def measured(tmp_path_factory, needs_extension):
    """A file with rows of two presets, and of one of them with the outputs looked up."""
    out = tmp_path_factory.mktemp("training") / "training.csv"
    command = ["training", "--preset", PAIR + "{ce,kd++,reviewkd}", *SMALL, "--teacher-outputs"]
    assert main([*command, "--out", str(out)]) == 0
    return out


# -- what is timed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "looks_up"),
    [("ce", False), ("kd++", False), ("reviewkd++", False), ("kd++", True)],
)
def test_a_marked_step_is_the_engines_step(preset, looks_up):
    """The same weights after it, every part of it marked once, and nothing left behind."""
    plain, seen = (ready(preset, **LOOKED_UP if looks_up else {}) for _ in range(2))
    marks = training.Marks("cpu")
    of_modules = batches.crop_and_flip, distillation.features, torch.Tensor.backward
    look_up = TeacherOutputs.look_up
    training.block(plain, training.endless(plain.task), 2, None)
    training.block(seen, training.endless(seen.task), 2, marks)
    for a, b in zip(plain.parameters, seen.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(plain.meter.sums, seen.meter.sums, rtol=0, atol=0)
    found = marks.read()
    wanted = {*parts.PARTS} - {"forward", "graph"} - ({"teacher"} if preset == "ce" else set())
    assert {*found} == wanted
    assert min(found.values()) > 0
    assert marks.read() == {}
    assert (batches.crop_and_flip, distillation.features, torch.Tensor.backward) == of_modules
    assert TeacherOutputs.look_up is look_up
    assert not seen.task.model._forward_hooks
    assert not seen.task.model._forward_pre_hooks
    assert {"step", "zero_grad"}.isdisjoint(vars(seen.optimizer))
    assert "add" not in vars(seen.meter)


def test_the_parts_are_in_the_order_of_the_step(monkeypatch):
    """With accumulated gradients twice per step, but for data and optimiser."""
    order = []
    monkeypatch.setattr(training.Marks, "mark", lambda self, part: order.append(part))
    engine = ready("kd++", accumulate=2)
    training.block(engine, training.endless(engine.task), 1, training.Marks("cpu"))
    named = [part for part in order if part is not None]
    half = ["teacher", "student", "criterion", "metering", "backward"]
    assert named == [
        "index", "crop", "normalise", "optimiser", *half, *half, "metering", "optimiser", "metering"
    ]  # fmt: skip


def test_a_slow_part_is_found(monkeypatch):
    """Time that the teacher spends is the teacher's; only it moves this clock."""
    now = [5.0]

    def head(x):
        now[0] += 0.3
        return torch.zeros(len(x), 100)

    engine = ready("kd++")
    (teacher,) = engine.task.step._teacher
    monkeypatch.setattr(teacher.get_classifier(), "forward", head)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    marks = training.Marks("cpu")
    wall = training.block(engine, training.endless(engine.task), 1, marks).wall
    found = marks.read()
    assert wall == found.pop("teacher") == pytest.approx(0.3)
    assert set(found.values()) == {0.0}


def test_what_is_compiled_is_one_part(monkeypatch):
    """And none of it is replaced, which would be compiled instead."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    engine = ready("kd++", compile=True)
    marks = training.Marks("cpu")
    training.block(engine, training.endless(engine.task), 1, marks)
    assert {*marks.read()} == {
        *parts.DATA, "forward", "backward", "optimiser", "metering"
    }  # fmt: skip


def test_a_recorded_step(monkeypatch):
    """Three steps are run, one recorded beside other threads' work, and all after that replayed."""
    calls, seen = [], []

    class Graph:
        def replay(self):
            calls.append("replay")

    def record(graph, *, stream, capture_error_mode):
        calls.append(capture_error_mode)
        return contextlib.nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    made = []
    monkeypatch.setattr(
        stepper, "_recording_stream", functools.cache(stepper._recording_stream.__wrapped__)
    )
    for name, value in (
        ("Stream", lambda: made.append(stream) or stream),
        ("current_stream", lambda: stream), ("CUDAGraph", Graph),
        ("stream", lambda stream: contextlib.nullcontext()), ("graph", record),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def body(batch):
        seen.append(batch[0])
        warnings.warn("This instance was constructed with capturable=True or some", stacklevel=1)

    recorded = Recorded(body)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(3):
            recorded((torch.tensor(number),))
    assert told == []
    with pytest.warns(UserWarning, match="constructed"):
        recorded((torch.tensor(3),))
    recorded((torch.tensor(4),))
    assert calls == ["thread_local", "replay", "replay"]
    assert len(seen) == 4
    assert seen[3] == 4  # what was recorded is given every batch
    with pytest.raises(RuntimeError, match=r"recorded for a batch of \(\) was given \(2,\)"):
        recorded((torch.zeros(2),))
    assert len(made) == 1
    Recorded(body)
    assert len(made) == 1  # one stream for all, whose memory cuBLAS keeps


def test_runs_one_after_another_are_all_compiled(monkeypatch):
    """Dynamo gives a function up, silently, when it has compiled it so many times."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile",
        lambda module, **named: compiled(module, backend="eager", **named),
    )  # fmt: skip
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            counted.clear()
            engine = ready("kd", student="cifar_resnet8x4" if number % 2 else "cifar_resnet20",
                           teacher="cifar_resnet20", compile=True)  # fmt: skip
            engine.do_step(next(engine.task.batches(0, 0)))
            assert counted["stats"]["unique_graphs"] == 1, number
            assert not counted["graph_break"]
            engine.release()


def test_a_step_that_looks_the_teacher_up_is_one_graph(monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile",
        lambda module, **named: compiled(module, backend="eager", fullgraph=True, **named),
    )  # fmt: skip
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    engine = ready("kd++", **LOOKED_UP, compile=True)
    for batch in engine.task.batches(0, 0):
        engine.do_step(batch)
    assert counted["stats"]["unique_graphs"] == 1
    engine.release()


def test_marks_on_a_gpu_are_events(monkeypatch):
    """Read as milliseconds; nothing is waited for when a mark is made."""
    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    marks = training.Marks("cuda")
    for part in (None, "student", None, "student", "backward"):
        marks.mark(part)
    assert marks.read() == {"student": 2.0, "backward": 1.0}


def test_untrained_teachers_stay_finite():
    config = training.configure(PAIR + "kd", WORLD, {})
    data = training.synthetic(64, 1)
    teacher = training.untrained_teacher("cifar_resnet56", data, config, WORLD).model
    logits = teacher(data.normalise(data.train.pixels))
    assert logits.std() < 100
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("preset", "kept"), [("ce", [None]), ("kd++", [64, 64])])
def test_features_of_test_images_are_kept_for_class_means_alone(preset, kept, monkeypatch):
    found, evaluate = [], classification.evaluate

    def seen(*arguments, **named):
        result = evaluate(*arguments, **named)
        found.append(None if result.features is None else result.features.shape[1])
        return result

    monkeypatch.setattr(classification, "evaluate", seen)
    task = ready(preset).task
    assert "test_top1" in task.evaluate(*task.evaluated)
    assert found == kept


def test_the_average_is_that_of_student_and_projector():
    """Updated by hand; what is evaluated for it has nothing of the weights as they are."""
    engine = ready("kd++", student="cifar_wrn_16_2", ema_decay=0.75)
    student, projector = engine.task.evaluated
    kept: dict[str, torch.Tensor] = {}
    for batch in itertools.islice(engine.task.batches(0, 0), 3):
        engine.do_step(batch)
        for place, module in enumerate((student, projector)):
            for name, value in module.state_dict().items():
                key = f"{place}.{name}"
                whole = key not in kept or not value.is_floating_point()
                kept[key] = value.clone() if whole else 0.75 * kept[key] + 0.25 * value
    found = engine.average.state_dict()
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        torch.testing.assert_close(found[name], value)
    assert {found[name].item() for name in found if "num_batches" in name} == {3}
    wanted = engine.task.evaluate(*engine.average)
    with torch.no_grad():
        projector.linear.weight.zero_()
    assert engine.task.evaluate(*engine.average) == wanted
    assert engine.task.evaluate(*engine.task.evaluated) != wanted
    assert engine.task.feature_figures(*engine.average)[1]["student"].any()


# -- presets and settings -------------------------------------------------------------------------


def test_the_usual_presets_exist_and_resolve_as_the_command_does():
    names = [name for pattern in training.PRESETS for name in expand(pattern)]
    assert [name.split("/", 1)[1] for name in names] == [
        "resnet56-resnet20/ce", "resnet56-resnet20/kd", "resnet56-resnet20/kd++",
        "resnet32x4-resnet8x4/kd++",
    ]  # fmt: skip
    for name in names:
        config = training.configure(name, WORLD, {})
        assert config.optim.batch_size == 128
        assert config.run == resolve(config.run, WORLD)
    given = {"precision": "bfloat16", "channels_last": True, "compile": True}
    run = training.configure(names[0], WORLD, given).run
    assert {name: getattr(run, name) for name in given} == given


def test_synthetic_images_are_cifars():
    data = training.synthetic(300, 20)
    assert data.train.pixels.shape == (300, 3, 32, 32)
    assert data.train.pixels.dtype == torch.uint8
    assert data.train.target.bincount().tolist() == [3] * 100
    assert data.train.pixels.float().std() == pytest.approx(73.9, abs=0.5)
    few = training.some(data.train, 100)
    assert few.target.tolist() == (torch.arange(0, 300, 3) % 100).tolist()
    assert training.some(few, 200) is few


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "cifar100/nothing"], "cifar100/nothing"),
        (["--preset", "imagenet/resnet34-resnet18/kd++"], "is of --task imagenet, and only cifar"),
        (["--preset", "coco/r101-r18/kd"], "is of --task detection, and only cifar"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--eval-images", "-1"], "--eval-images must be at least 1, got -1"),
        (["--limit", "100"], "the batch of 128 must be at most the 100 training images"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--cuda-graph"], "--cuda-graph needs a GPU"),
        (["--resume"], "--resume needs --out"),
        (["--data", "no-such-folder"], "no-such-folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_choice_is_refused_before_anything_is_measured(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "measure_preset", None)
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "a.csv")]
    assert main(["training", *arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks training: error: ")
    assert words in error
    assert not (tmp_path / "a.csv").exists()


def test_another_file_is_found_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "measure_preset", None)
    out = tmp_path / "a.csv"
    out.write_text("something else\n")
    assert main(["training", "--out", str(out)]) == 2
    assert "other columns" in capsys.readouterr().err
    assert out.read_text() == "something else\n"


def test_a_loss_that_is_not_finite_is_no_measurement(monkeypatch):
    monkeypatch.setattr(distillation, "_top1", lambda *_: torch.tensor(float("nan")))
    config = training.configure(PAIR + "ce", WORLD, {"batch_size": 4})
    size = training.Extent(1, 1, 4, 1)
    with Progress(1, "", enabled=False) as bar, pytest.raises(FloatingPointError, match="top1"):
        training.measure_preset(config, training.synthetic(8, 4), WORLD, size, bar)


# -- rows -----------------------------------------------------------------------------------------


def test_rows_are_whole_and_add_up(measured):
    rows = ce, kd, looked_up, review = parts.read_training(measured)
    methods = [row["preset"].rsplit("/", 1)[1] for row in rows]
    assert methods == ["ce", "kd++", "kd++", "reviewkd"]
    assert [row["teacher_outputs"] for row in rows] == ["no", "no", "yes", "no"]
    assert min(row["teacher_ms"] for row in (kd, looked_up, review)) > 0
    for row in rows:
        assert row["low_ms"] <= row["step_ms"] <= row["high_ms"]
        assert row["step_ips"] == pytest.approx(8e3 / row["step_ms"], rel=0.01)
        named = sum(row[f"{part}_ms"] or 0 for part in parts.PARTS)
        assert named + row["unexplained_ms"] == pytest.approx(row["step_ms"], abs=1e-2)
        assert (row["images"], row["batch"], row["rounds"], row["data"]) == (24, 8, 2, "synthetic")
        assert (row["precision"], row["channels_last"], row["compile"]) == ("float32", "yes", "no")
        assert row["data_ips"] > row["step_ips"]
        assert row["eval_ips"] > 0
        assert row["forward_ms"] is row["graph_ms"] is row["host_ms"] is None
    assert (ce["teacher"], kd["teacher"]) == ("", "cifar_resnet56")
    assert ce["teacher_ms"] is ce["means_ips"] is None
    assert kd["means_ips"] > 0


def test_resumption_leaves_out_what_is_there(measured, tmp_path, capsys):
    out = tmp_path / "training.csv"
    out.write_text(measured.read_text())
    command = ["training", "--preset", PAIR + "{ce,kd++}", *SMALL, "--out", str(out), "--resume"]
    assert main([*command, "--teacher-outputs"]) == 0
    assert capsys.readouterr().out.count("measured before") == 3
    assert out.read_text() == measured.read_text()
    # Another setting is another measurement.
    assert main([*command[:2], PAIR + "ce", *command[3:], "--no-channels-last"]) == 0
    rows = parts.read_training(out)
    assert [row["channels_last"] for row in rows] == [*["yes"] * 4, "no"]
    ((machine, kept),) = parts.latest_training([*rows, *rows]).items()
    assert machine[1] == "cpu"
    assert kept == rows


def test_an_interrupted_run_prints_what_it_measured(measured, monkeypatch, capsys):
    """As the signal comes, and as the gathering of class means tells of it."""
    row = parts.read_training(measured)[0]
    for stop in (KeyboardInterrupt(), Interrupted("stopped by SIGINT", signal.SIGINT)):
        left = [row]

        def measure(*_, left=left, stop=stop):
            if not left:
                raise stop
            return left.pop()

        monkeypatch.setattr(training, "measure_preset", measure)
        command = ["training", "--preset", "cifar100/resnet56-resnet20/{ce,kd}", "--limit", "128"]
        assert main(command) == 130
        captured = capsys.readouterr()
        assert row["preset"] in captured.out
        assert captured.err.endswith("benchmarks training: interrupted\n")


# -- the report -----------------------------------------------------------------------------------


def row(**columns):
    """A row that was never measured."""
    return {
        **dict.fromkeys(parts.TRAINING_FIELDS, ""), "date": "2026-01-01", "commit": "abc",
        "hardware": "a machine", "torch": "9.9.0", "version": "0.0", "device": "cpu",
        "preset": "a/b", "data": "synthetic", "images": 50000.0, "batch": 128.0,
        "precision": "float32", "channels_last": "no", "compile": "no", "cuda_graph": "no",
        "teacher_outputs": "no",
        "step_ms": 100.0, "low_ms": 99.0, "high_ms": 101.5, "step_ips": 1280.0,
        "index_ms": 1.0, "crop_ms": 2.0, "normalise_ms": 0.5, "teacher_ms": 40.0,
        "student_ms": 20.0, "criterion_ms": 0.25, "backward_ms": 33.0, "optimiser_ms": 1.0,
        "metering_ms": 0.25, "unexplained_ms": 2.0, "data_ips": 30000.0, "eval_images": 1000.0,
        "eval_ips": 4000.0, "means_ips": 1500.0, "plan_ms": 2.5, **columns,
    }  # fmt: skip


def test_the_report_tells_what_is_looked_up():
    """Beside the same preset's step that runs the teacher."""
    text = report.render([], [], [row(), row(teacher_outputs="yes")])
    assert "| a/b, float32 | 1,280 |" in text
    assert "| a/b, float32, the teacher's outputs looked up | 1,280 |" in text


GRAPH = {
    "device": "cuda", "hardware": "a GPU", "cuda_graph": "yes", "channels_last": "yes",
    "precision": "bfloat16", "graph_ms": 96.5, "host_ms": 0.25, "device_ms": 95.0,
    "launches": 900.0, "syncs": 0.0, "peak_bytes": 2.0**31, "unexplained_ms": 0.0,
    **{f"{part}_ms": None for part in ("teacher", "student", "criterion", "backward", "optimiser",
                                       "metering")},
}  # fmt: skip


def test_the_report_shows_shares_and_the_command():
    text = report.render([], [], [row(step_ips=1.0), row()])
    part = text[text.index("## Training, part by part") :]
    assert "python -m benchmarks training --device cpu --out FILE.csv" in part
    assert "### On a GPU\n\nNot run: there is no result of a GPU" in part
    assert (
        "| a/b, float32 | 1,280 | 100.0 (99.00-101.5) | 3.5 % | 40.0 % | 20.0 % | 0.2 % | 33.0 % "
        "| 1.0 % | 0.2 % | 2.0 % | 30,000 | 4,000 | 1,500 |"
    ) in part
    assert "| a/b, float32 | 1.00 | 2.00 | 0.500 | 2.50 |" in part
    assert "1.0 images/s" not in part  # the last measurement replaces the one before
    assert "### On a CPU\n\nNot run" in report.render([], [], [])


def test_the_report_of_a_recorded_step_on_a_gpu():
    text = report.render([], [], [row(**GRAPH), row(device="cuda", hardware="a GPU")])
    part = text[text.index("## Training, part by part") :]
    assert "make gpu-check STAGE=e2e" in part
    assert "| a/b, bfloat16, channels last, recorded | 1,280 |" in part
    assert "| graph | unexplained |" in part
    assert "| 0.250 | 95.00 | 900 | 0 | 2.0 GiB |" in part
    assert "### On a CPU\n\nNot run.\n" in part


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.plot(
        [], tmp_path, [row(), row(preset="c/d", unexplained_ms=-3.0), row(**GRAPH)]
    )
    assert {path.name for path in written} == {"cpu-training.png", "cuda-training.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
