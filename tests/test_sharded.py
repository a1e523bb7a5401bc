"""Sharded runs: against one process, killed and gone on with, by other numbers of processes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from dnkd_ext import features
from dnkd_ext.cli import main
from dnkd_ext.train.checkpoint import load_checkpoint, save_checkpoint, shard_folders
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.distillation import STAGE_METHODS
from dnkd_ext.train.engine import merge_ranks
from dnkd_ext.train.models import create_model, model_names
from dnkd_ext.train.recompute import checkpoint_activations
from dnkd_ext.train.sharding import (
    blocks,
    read_shards,
    shapes_of_shards,
    shard_model,
    write_shards,
)
from dnkd_ext.train.teacher import cast_once
from dnkd_ext.train.world import World
from tests.runs import WEIGHTS, log, near, same, succeeded, together, weights
from tests.sharded_worker import DIES
from tests.stripes import ALONE, MISSING, of, options, refused, run
from tests.test_distributed import in_processes

pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"of the training extras {', '.join(MISSING)} cannot be imported"
    ),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="torch was built without torch.distributed"
    ),
]
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm cannot be imported"
)


ADAMW = (
    *("--optimizer", "adamw", "--lr", "0.002", "--weight-decay", "0.1", "--no-decay-vectors"),
    *("--schedule", "cosine", "--ema-decay", "0.8", "--clip-grad", "0.5", "--epochs", "2"),
)
# With dropout in the projector, so that the generator's state counts, too.
LONG = ("--student", "cifar_wrn_16_2", "--epochs", "4", "--ema-decay", "0.8")


def ways(teacher: Path) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Options of runs, those of one process, and those of two that share the step.

    DIST is over the whole batch, which one process in two parts does not see: its run is compared
    with one of two processes with copies.
    """
    two = ["--accumulate", "2"]
    short = ("--epochs", "2")
    return {
        "kd": (of(teacher, "kd", 1.0, *short), two, []),
        "dist": (of(teacher, "dist", 1.0, *short), [], ["--compile"]),
        "reviewkd": (of(teacher, "reviewkd", 1.0, *short), two, ["--fsdp-teacher"]),
        "adamw": (
            of(teacher, "kd", 1.0, *ADAMW),
            ["--accumulate", "4"],
            ["--accumulate", "2", "--fsdp-teacher"],
        ),
    }


@pytest.fixture(scope="module")
def runs(images, teacher, tmp_path_factory):
    """The folders of sharded runs of two processes.

    ``whole`` ran undisturbed, ``within`` was stopped within its second epoch and gone on with,
    ``stopped`` ended after its second epoch.
    """
    folder = tmp_path_factory.mktemp("runs")
    commands = [
        {"arguments": options(images, folder / name, *more, *own, "--fsdp")}
        for name, (more, _, own) in ways(teacher).items()
    ]
    long = [*of(teacher, "kd", 1.0, *LONG), "--fsdp", "--log-every", "1"]
    within = options(images, folder / "within", *long)
    commands += [
        {"arguments": options(images, folder / "dist-copies", *ways(teacher)["dist"][0])},
        {"arguments": options(images, folder / "whole", *long)},
        {
            "arguments": options(images, folder / "stopped", *long),
            "trouble": {"interrupted": 2},
            "status": 130,
        },
        {
            "arguments": within,
            "trouble": {"stopped": [1, 1, 2]},
            "status": 128 + signal.SIGTERM,
        },
        {"arguments": [*within, "--resume"]},
    ]
    succeeded(together(folder, commands))
    return folder


@pytest.mark.parametrize("way", ["kd", "dist", "reviewkd", "adamw"])
def test_two_sharing_processes_train_as_one(images, teacher, runs, tmp_path, double, way):
    more, alone, own = ways(teacher)[way]
    if way == "dist":
        near(runs / "dist-copies", runs / "dist")
    else:
        run(images, tmp_path / "alone", *more, *alone)
        near(tmp_path / "alone", runs / way)
    sizes = json.loads((runs / way / "sizes.json").read_text())
    held, total = sizes["step"]
    assert held < 0.6 * total
    held, total = sizes["teacher"]
    assert (0 < held < 0.6 * total) if "--fsdp-teacher" in own else held == 0
    assert json.loads((runs / way / "result.json").read_text())["processes"] == 2


def test_a_sharded_run_stopped_within_an_epoch_goes_on_exactly(runs):
    assert log(runs / "within") == log(runs / "whole")
    for name in ("last", "best"):
        assert same(weights(runs / "within", name), weights(runs / "whole", name))


def test_two_nodes_train_as_one(images, teacher, runs, tmp_path):
    """Both have a first process of their own; one of all writes the files."""
    more = [*of(teacher, "kd", 1.0, *LONG), "--fsdp", "--log-every", "1"]
    places = [tmp_path / "0", tmp_path / "1"]
    for place in places:
        place.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port))
    command = [{"arguments": options(images, tmp_path / "run", *more)}]
    with ThreadPoolExecutor() as pool:
        nodes = [
            pool.submit(together, place, command, 1, *rendezvous, "--node-rank", place.name)
            for place in places
        ]
        for node in nodes:
            succeeded(node.result())
    assert log(tmp_path / "run") == log(runs / "whole")
    assert same(weights(tmp_path / "run"), weights(runs / "whole"))
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert names == {path.name for path in (runs / "whole").iterdir() if path.is_file()}


def test_only_named_folders_are_kept(runs):
    for name in ("whole", "stopped", "within"):
        kept = shard_folders(runs / name)
        named = [
            torch.load(runs / name / file, weights_only=True)["shards"]["folder"]
            for file in ("checkpoint.previous.pt", "checkpoint.pt")
        ]
        assert [path.name for path in kept] == sorted(named)
        assert {path.suffix for place in kept for path in place.iterdir()} == {".safetensors"}


def test_a_killed_process_is_started_again_and_ends_alike(images, teacher, runs, tmp_path):
    """By torchrun, which starts the same command: without --resume."""
    more = [*of(teacher, "kd", 1.0, *LONG), "--fsdp", "--log-every", "1"]
    killed = {
        "arguments": options(images, tmp_path / "run", *more),
        "trouble": {"killed": [1, 2, 3]},
    }
    told = succeeded(together(tmp_path, [killed], 2, "--max-restarts", "1"))
    assert told.count(DIES) == 1
    assert log(tmp_path / "run") == log(runs / "whole")
    assert same(weights(tmp_path / "run"), weights(runs / "whole"))


def test_killed_while_a_checkpoint_is_written(images, teacher, runs, tmp_path):
    """The shards are there, and no checkpoint names them. A scheduler then starts all anew."""
    out = tmp_path / "run"
    more = [*of(teacher, "kd", 1.0, *LONG), "--fsdp", "--log-every", "1"]
    command = {"arguments": options(images, out, *more), "trouble": {"killed_saving": 3}}
    assert together(tmp_path, [command]).returncode != 0
    folders = {path.name for path in shard_folders(out)}
    assert len(folders) == 3
    assert load_checkpoint(out)["epoch"] == 2
    succeeded(together(tmp_path, [{"arguments": [*command["arguments"], "--resume"]}]))
    assert log(out) == log(runs / "whole")
    assert same(weights(out), weights(runs / "whole"))
    assert len(shard_folders(out)) == 2


def test_a_damaged_folder_leaves_the_one_before(images, teacher, runs, tmp_path):
    commands, more = [], [*of(teacher, "kd", 1.0, *LONG), "--fsdp", "--log-every", "1"]
    for kind in ("cut", "changed", "missing"):
        out = tmp_path / kind
        shutil.copytree(runs / "stopped", out)
        (newest,) = out.glob("checkpoint-2-0-*")
        path = sorted(newest.iterdir())[1]
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        if kind == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-50] if kind == "cut" else content)
        if kind == "changed":
            (out / "log.csv").unlink()  # it is written again
        commands.append({"arguments": options(images, out, *more, "--resume")})
    # Of two nodes torchrun restarts what one had, and the other's is new: nobody says --resume.
    out = tmp_path / "restarted"
    shutil.copytree(runs / "stopped", out)
    commands.append({"arguments": options(images, out, *more), "trouble": {"restarted": 1}})
    told = succeeded(together(tmp_path, commands))
    assert "is missing or not whole; going on from" in told
    assert "is damaged; going on from" in told
    for kind in ("cut", "changed", "missing", "restarted"):
        assert log(tmp_path / kind) == log(runs / "whole")
        assert same(weights(tmp_path / kind), weights(runs / "whole"))


def test_goes_on_with_other_numbers_of_processes(images, teacher, runs, tmp_path, double):
    """Three that share it are three that have copies; one that takes two parts is two."""
    more = of(teacher, "kd", 1.0, *LONG)
    commands = []
    for name, own in (("three", ["--fsdp"]), ("copies", [])):
        shutil.copytree(runs / "stopped", tmp_path / name)
        commands.append({"arguments": options(images, tmp_path / name, *more, *own, "--resume")})
    succeeded(together(tmp_path, commands, 3))
    near(tmp_path / "three", tmp_path / "copies")
    assert log(tmp_path / "three")[:2] == log(runs / "whole")[:2]
    # A run of copies goes on sharded, here from its end, and a sharded one alone.
    rows, kept = log(tmp_path / "copies"), weights(tmp_path / "copies")
    for name in ("result.json", "last.safetensors"):
        (tmp_path / "copies" / name).unlink()
    arguments = options(images, tmp_path / "copies", *more, "--fsdp", "--resume")
    succeeded(together(tmp_path, [{"arguments": arguments}]))
    assert log(tmp_path / "copies") == rows
    assert same(weights(tmp_path / "copies"), kept)
    shutil.copytree(runs / "stopped", tmp_path / "alone")
    rows = run(images, tmp_path / "alone", *more, "--resume")
    assert rows[:2] == log(runs / "whole")[:2]
    assert len(rows) == 4
    assert "step" in load_checkpoint(tmp_path / "alone")
    assert len(shard_folders(tmp_path / "alone")) == 0


@needs_timm
def test_goes_on_within_an_epoch_with_another_number_of_processes(images, tmp_path, double):
    """Where nothing depends on how a batch is divided, exactly; and it is told that others do."""
    more = ["--student", "test_vit", "--epochs", "2", "--ema-decay", "0.8", "--log-every", "1"]
    run(images, tmp_path / "whole", *more)
    commands = [
        {
            "arguments": options(images, tmp_path / name, *more, *own),
            "trouble": {"stopped": [1, 1, 2]},
            "status": 128 + signal.SIGTERM,
        }
        for name, own in (("copies", []), ("shared", ["--fsdp"]))
    ]
    succeeded(together(tmp_path, commands))
    shutil.copytree(tmp_path / "copies", tmp_path / "three")
    arguments = options(images, tmp_path / "three", *more, "--fsdp", "--resume")
    told = succeeded(together(tmp_path, [{"arguments": arguments}], 3))
    assert told.count("left within an epoch by 2 processes and is gone on with by 3") == 1
    for name in ("copies", "shared"):
        state = load_checkpoint(tmp_path / name)
        assert (state["epoch"], state["start"], len(state["ranks"])) == (1, 3, 2)
        with pytest.warns(UserWarning, match="left within an epoch by 2 processes"):
            run(images, tmp_path / name, *more, "--resume")
    for name in ("copies", "shared", "three"):
        near(tmp_path / "whole", tmp_path / name)


def test_what_processes_kept_is_that_of_all():
    def own(loss, steps, bad, mean, unreadable):
        return {
            "meter": {"sums": torch.tensor([loss, steps]), "bad": torch.tensor([bad])},
            "random": {},
            "unreadable": unreadable,
            "buffers": {
                "mean": torch.tensor([mean, 1.0]),
                "frozen": torch.tensor([0.1, 0.2]),
                "number": torch.tensor(bad),
            },
        }

    merged = merge_ranks([own(3.0, 2.0, 7, 1.0, 1), own(5.0, 2.0, 4, 2.0, 0), own(1, 2, 9, 6.0, 2)])
    assert merged["meter"]["sums"].tolist() == [3.0, 2.0]
    assert merged["meter"]["bad"].tolist() == [4]
    assert merged["unreadable"] == 3
    assert merged["buffers"]["mean"].tolist() == [3.0, 1.0]
    assert torch.equal(merged["buffers"]["frozen"], torch.tensor([0.1, 0.2]))
    assert merged["buffers"]["number"] == 7  # a count has no mean
    assert "random" not in merged


def test_shards_are_read_back(tmp_path):
    tensors = {"a.b": torch.rand(3, 2), "step": torch.tensor(4.0), "n": torch.arange(3)}
    shards = write_shards(tmp_path, "1-0", tensors, ALONE)
    assert shapes_of_shards(tmp_path / shards["folder"]) == {
        name: (value.shape, value.dtype) for name, value in tensors.items()
    }
    read = {name: torch.zeros_like(value) for name, value in tensors.items()}
    read_shards(tmp_path / shards["folder"], read)
    assert same(read, tensors)
    # A folder is removed when no checkpoint names it any more, and others are left alone.
    (tmp_path / "checkpoint-mine").mkdir()
    for number in range(3):
        told = write_shards(tmp_path, f"{number}-0", tensors, ALONE)
        save_checkpoint(tmp_path, {"number": number, "shards": told})
    kept = [path.name[:14] for path in shard_folders(tmp_path)]
    assert kept == ["checkpoint-1-0", "checkpoint-2-0"]
    assert (tmp_path / "checkpoint-mine").is_dir()
    for path in (tmp_path / told["folder"]).iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="is missing or not whole; going on from"):
        assert load_checkpoint(tmp_path, ALONE)["number"] == 1


def test_overwrite_removes_shards(images, runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / "stopped", out)
    (out / "wandb").mkdir()
    run(images, out, "--epochs", "1", "--overwrite")
    assert not shard_folders(out)
    assert not (out / "wandb").exists()


# -- what is sharded ------------------------------------------------------------------------------


def check_blocks(model: nn.Module) -> None:
    found = blocks(model)
    inner = [id(module) for block in found for module in block.modules()]
    assert len(inner) == len(set(inner))  # none holds another
    sizes = [sum(p.numel() for p in block.parameters()) for block in found]
    total = sum(p.numel() for p in model.parameters())
    assert 2 * sum(sizes) >= total
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    assert not any(isinstance(block, lists) for block in found)


def test_blocks_hold_the_bulk():
    for name in model_names():
        model = create_model(name, 10)
        if "vgg" not in name:  # plain layers
            check_blocks(model)
    assert len(blocks(create_model("cifar_resnet20", 10))) == 9


@needs_timm
def test_blocks_of_timms_models_hold_the_bulk():
    import timm

    for name in (
        *("resnet50", "vit_small_patch16_224", "deit_tiny_distilled_patch16_224", "convnext_tiny"),
        *(
            "regnety_160",
            "swin_tiny_patch4_window7_224",
            "efficientnet_b0",
            "mobilenetv3_large_100",
        ),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        check_blocks(model)


def of_a_cast_teacher(rank: int, size: int) -> list:
    """Features under autocast, whole and sharded, and the types of what this process has of it."""
    torch.manual_seed(0)
    model = create_model("cifar_resnet20", 3).eval().requires_grad_(False)
    images = torch.randn(2, 3, 16, 16)
    mesh = World(rank, size, torch.device("cpu")).mesh
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found += features(model, images)
        model = cast_once(model)
        shard_model(model, mesh, methods=STAGE_METHODS)
        for _ in range(2):
            found += features(model, images)
    return [found, sorted({str(p.dtype) for p in model.parameters()})]


def test_a_teacher_is_sharded_as_bfloat16(tmp_path):
    for found, kinds in in_processes(of_a_cast_teacher, tmp_path):
        assert kinds == ["torch.bfloat16", "torch.float32"]
        for one, two, again in zip(found[:2], found[2:4], found[4:], strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, again)


# -- activations ----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A network that computes its activations again, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8, momentum=None)
        self.again = False
        self.runs = 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.again = enable

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.norm(self.body(x)).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.again:
            return torch.utils.checkpoint.checkpoint(self._features, x, use_reentrant=False)
        return self._features(x)


def test_activations_computed_again_are_the_same():
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Checkpointed().double()
        if again:
            checkpoint_activations(model, "mine")
        for _ in range(3):
            loss = model(torch.randn(6, 4, dtype=torch.float64)).square().mean()
            loss.backward()
        assert model.runs == (6 if again else 3)
        results.append({**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}})
        assert model.norm.momentum is None
        assert model.body[1].momentum == 0.1
    assert same(*results)


def test_a_model_that_cannot_compute_again_is_named(images, tmp_path, capsys):
    more = ("--activation-checkpointing",)
    told = refused(options(images, tmp_path / "run", *more), capsys)
    assert "--activation-checkpointing is not for cifar_resnet20" in told
    assert not (tmp_path / "run").exists()


@needs_timm
def test_timms_models_compute_activations_again(images, teacher, tmp_path, double):
    """Alone, and sharded."""
    more = [*of(teacher, "kd", 1.0), "--student", "test_resnet", "--epochs", "2"]
    again = ["--activation-checkpointing"]
    run(images, tmp_path / "plain", *more, "--accumulate", "2")
    run(images, tmp_path / "again", *more, "--accumulate", "2", *again)
    near(tmp_path / "plain", tmp_path / "again")
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "again")
    for name in one:  # running statistics, too
        torch.testing.assert_close(two[name], one[name], **WEIGHTS)
    # The generators of dropout differ between processes: the projector's is left out.
    arguments = options(images, tmp_path / "both", *more, "--dropout", "0", "--fsdp", *again)
    run(images, tmp_path / "still", *more, "--dropout", "0", "--accumulate", "2")
    succeeded(together(tmp_path, [{"arguments": arguments}]))
    near(tmp_path / "still", tmp_path / "both")


# -- refused, and Weights & Biases ----------------------------------------------------------------


def test_options_that_do_not_go_together(images, tmp_path, capsys):
    for more, message in (
        (["--fsdp"], "--fsdp is for several processes"),
        (["--fsdp-teacher"], "--fsdp-teacher goes with --fsdp only"),
        (["--activation-checkpointing", "--compile"], "--compile cannot follow what --activation"),
        (["--activation-checkpointing", "--cuda-graph"], "--cuda-graph cannot follow what --act"),
        (["--wandb"], "--wandb needs Weights & Biases"),
    ):
        if more == ["--wandb"] and importlib.util.find_spec("wandb"):
            continue
        assert message in refused(options(images, tmp_path / "run", *more), capsys)
        assert not (tmp_path / "run").exists()


def test_options_of_several_processes():
    base = {"data": "x", "batch_size": 4, "fsdp": True}
    replace(TrainConfig(), base).check(2)
    for more, message in (
        ({"cuda_graph": True}, "--cuda-graph cannot record"),
        ({"fsdp_teacher": True}, "has no teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TrainConfig(), {**base, **more}).check(2)


class FakeRun:
    def __init__(self, kept: list, settings: dict) -> None:
        self.kept, self.settings, self.rows, self.status = kept, settings, [], None
        kept.append(self)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps = (name, step_metric)

    def log(self, row: dict) -> None:
        self.rows.append(dict(row))

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest) -> None:
        self.status = 0 if kind is None else 1


def test_epochs_go_to_weights_and_biases(images, tmp_path, monkeypatch):
    kept: list[FakeRun] = []
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **settings: FakeRun(kept, settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    out = tmp_path / "run"
    rows = run(images, out, "--wandb", "--epochs", "2")
    (shown,) = kept
    assert [row["epoch"] for row in shown.rows] == [1, 2]
    for row, own in zip(rows, shown.rows, strict=True):
        assert float(row["train_loss"]) == own["train_loss"]
    assert shown.steps == ("*", "epoch")
    assert shown.status == 0
    assert shown.settings["config"]["lr"] == 0.05
    # The same run there when it goes on here.
    (out / "result.json").unlink()
    assert main(options(images, out, "--wandb", "--epochs", "2", "--resume")) == 0
    assert kept[1].settings["id"] == shown.settings["id"]
    assert kept[1].rows == []
