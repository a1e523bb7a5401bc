"""A process of tests/test_sharded.py: runs commands one after another, and breaks off where told.

``torchrun -m tests.sharded_worker FILE``: the file holds a JSON list of commands, each with its
``arguments``, the exit ``status`` that is due and the ``trouble`` to make. One group of processes
serves them all, as starting one takes longer than a run.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dnkd_ext.cli import main
from dnkd_ext.train import engine
from dnkd_ext.train.classification import Classification
from tests.float64 import in_float64

DIES = "this process kills itself"


def die() -> None:
    """Not told by torchrun where the others' broken connection is noticed before."""
    print(DIES, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class Trouble:
    """Patches for the time of a command."""

    def __init__(self, **told: Any) -> None:
        self.told = told
        self.first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.rank = dist.get_rank()
        self.tasks: list[Classification] = []

    def __enter__(self) -> Trouble:
        batches, finish = Classification.batches, engine._Training._finish
        save, begin = engine.save_checkpoint, Classification.__init__
        compiled = torch.nn.Module.compile
        told = self.told

        def own_batches(task, epoch, start):
            for step, batch in enumerate(batches(task, epoch, start), start):
                at = [self.rank, epoch, step]
                if told.get("killed") == at and self.first_time:
                    die()
                if told.get("stopped") == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        def own_finish(training, epoch, *rest):
            if told.get("interrupted") == epoch:
                raise KeyboardInterrupt
            finish(training, epoch, *rest)

        def own_save(out, state):
            if told.get("killed_saving") == state["epoch"]:
                die()
            save(out, state)

        def own_begin(task, *arguments):
            self.tasks.append(task)
            begin(task, *arguments)

        # The compiler proper takes a minute, and is torch's matter.
        own_compile = lambda module, **more: compiled(module, backend="aot_eager", **more)  # noqa: E731
        restarted = told.get("restarted") == self.rank
        self.patches = [
            mock.patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": "1"} if restarted else {}),
            mock.patch.object(Classification, "batches", own_batches),
            mock.patch.object(Classification, "__init__", own_begin),
            mock.patch.object(engine._Training, "_finish", own_finish),
            mock.patch.object(engine, "save_checkpoint", own_save),
            mock.patch.object(torch.nn.Module, "compile", own_compile),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for patch in self.patches:
            patch.stop()

    def sizes(self) -> dict[str, list[int]]:
        """Of step and teacher: numbers that this process has, and numbers that there are."""
        modules = {"step": self.tasks[-1].step}
        if self.tasks[-1]._teacher is not None:
            modules["teacher"] = self.tasks[-1]._teacher.model
        result = {}
        for name, module in modules.items():
            values = module.state_dict().values()  # which puts shards in their place
            sharded = [value for value in values if isinstance(value, DTensor)]
            plain = [value for value in module.parameters() if not isinstance(value, DTensor)]
            result[name] = [
                sum(value.to_local().numel() for value in sharded),
                sum(value.numel() for value in (*sharded, *plain)),
            ]
        return result


def run(commands: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo")
    for command in commands:
        arguments = command["arguments"]
        with in_float64(), Trouble(**command.get("trouble", {})) as trouble:
            status = main(arguments)
            if status != command.get("status", 0):
                raise SystemExit(f"{arguments} ended with {status}")
            if status == 0 and trouble.rank == 0 and trouble.tasks:
                out = Path(arguments[arguments.index("--out") + 1])
                (out / "sizes.json").write_text(json.dumps(trouble.sizes()))
        # What still holds the group: its threads may abort the process once the group is gone.
        del trouble
        gc.collect()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
