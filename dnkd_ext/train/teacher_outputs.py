"""What a teacher makes of every cut of every image in memory, looked up in place of running it.

Crops of small images have few places: with a border of 4 pixels there are 81, mirrored and not 162
cuts. Each is seen by the teacher once, in one pass for all students that learn from it; a student
that runs it sees as many cuts in 162 epochs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

import torch
from torch import Tensor, nn

from dnkd_ext._files import TEMPORARY, replacing
from dnkd_ext.adapters import features
from dnkd_ext.progress import Progress
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import MemorySource
from dnkd_ext.train.gather import gathering_notes
from dnkd_ext.train.signals import Interrupted, Signals
from dnkd_ext.train.task import autocast
from dnkd_ext.train.world import World

__all__ = [
    "TeacherOutputs",
    "check_outputs",
    "check_room",
    "make_outputs",
    "outputs_notes",
    "read_outputs",
]

FORMAT = "dnkd_ext teacher outputs 1"
BEGUN = "dnkd_ext teacher outputs 1, begun"
OPTION = "--teacher-outputs"
# Seconds between two looks at what would be lost.
KEEP_EVERY = 300.0


class TeacherOutputs(NamedTuple):
    """Of all cuts, of all images each: row by row in the order of ``TrainBatches.rows``.

    ``logits`` (rows, classes), of the type that the teacher gives them in, and ``norms`` (rows,) of
    its features, at least float32.
    """

    logits: Tensor
    norms: Tensor

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and norms (N,) of some rows (N,) int64."""
        return self.logits[rows], self.norms[rows]


def outputs_notes(config: TrainConfig, source: MemorySource, digest: str) -> dict[str, str]:
    """What a file says about what its outputs are of; ``digest`` is of the teacher's weights."""
    cuts = (2 * config.data.pad + 1) ** 2 * (1 + config.data.flip)
    return {
        "teacher": f"{config.model.teacher} {digest}",
        "data": source.fingerprint(),
        "pad": json.dumps(config.data.pad),
        "flip": json.dumps(config.data.flip),
        **gathering_notes(config),
        "rows": json.dumps(cuts * source.train_images),
        "classes": json.dumps(len(source.classes)),
    }


def check_outputs(path: Path, notes: dict[str, str]) -> bool:
    """Whether a file holds the outputs of these notes; False where it is not there.

    Raises:
        ValueError: it is damaged or something else, or its outputs are of something else.
    """
    if not path.exists():
        return False
    _read(path, FORMAT, notes, None)
    return True


def read_outputs(path: Path, notes: dict[str, str], device: torch.device) -> TeacherOutputs | None:
    """The outputs of a file, or None where it is not there; on the CPU its pages are read as used.

    Raises:
        ValueError: it is damaged or something else, or its outputs are of something else.
    """
    return _read(path, FORMAT, notes, device) if path.exists() else None


def check_room(path: Path, notes: dict[str, str], device: torch.device) -> None:
    """ValueError where the outputs of these notes have no room, on the disk or in a GPU's memory.

    Where the file is there it is the memory that counts.
    """
    halved = notes["precision"] == json.dumps("bfloat16")
    size = int(notes["rows"]) * (int(notes["classes"]) * (2 if halved else 4) + 4)
    there = next(place for place in path.absolute().parents if place.exists())
    rooms = []
    if not path.exists():  # what is begun is kept until all of it is written
        rooms.append((f"the disk of {there}", 2 * size, shutil.disk_usage(there).free))
    if device.type == "cuda":
        rooms.append(("the GPU's memory", size, torch.cuda.mem_get_info(device)[0]))
    for where, wanted, free in rooms:
        if free < wanted:
            raise ValueError(
                f"{OPTION} {path} needs {wanted / 1e9:.1f} GB of {where} for the outputs of "
                f"{notes['rows']} cut images, and {free / 1e9:.1f} are free"
            )


def _read(
    path: Path, kind: str, notes: dict[str, str], device: torch.device | None
) -> TeacherOutputs | None:
    """The outputs; without a device it is only looked at."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device or "cpu")) as file:
            found = file.metadata() or {}
            if found.get("format") != kind:
                raise ValueError(
                    f"{OPTION} {path} holds something else than a teacher's outputs; choose "
                    "another name"
                )
            for name, wanted in notes.items():
                if found.get(name) != wanted:
                    raise ValueError(
                        f"{OPTION} {path} is of other outputs: {name} is {found.get(name)}, here "
                        f"{wanted}; choose another name"
                    )
            rows, classes = int(found.get("done", notes["rows"])), int(notes["classes"])
            shapes = [file.get_slice(name).get_shape() for name in TeacherOutputs._fields]
            if shapes != [[rows, classes], [rows]]:
                raise ValueError(f"{OPTION} {path} is damaged; remove it")
            if device is None:
                return None
            return TeacherOutputs(*(file.get_tensor(name) for name in TeacherOutputs._fields))
    except (SafetensorError, OSError) as error:
        if path.is_dir():
            raise ValueError(f"{OPTION} must be a file, {path} is a folder") from error
        raise ValueError(f"{OPTION} {path} cannot be read ({error}); remove it") from error


def _write(path: Path, outputs: TeacherOutputs, notes: dict[str, str]) -> None:
    from safetensors.torch import save_file

    tensors = {name: values.cpu() for name, values in outputs._asdict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=notes)


@contextlib.contextmanager
def _alone(path: Path, signals: Signals) -> Iterator[None]:
    """Others that would make the same file wait until the context ends; this process for others.

    Raises:
        Interrupted: a signal came while it waited.
    """
    if fcntl is None:
        yield
        return
    lock, told = path.with_name(f".{path.name}.lock"), False
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it before removes it at the end.
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                break
        except BlockingIOError:
            if not told:
                print(f"another process makes {path}; waiting", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        except OSError:  # no locks here
            break
        os.close(handle)
        if signals.received:
            name = signal.Signals(signals.received).name
            raise Interrupted(f"stopped by {name} while another process made {path}",
                              signals.received)  # fmt: skip
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def make_outputs(
    model: nn.Module,
    source: MemorySource,
    config: TrainConfig,
    world: World,
    path: Path,
    notes: dict[str, str],
) -> TeacherOutputs:
    """Run the teacher over every cut of every training image, and write the file.

    Every five minutes, and when SIGINT or SIGTERM comes, what there is is kept beside the file
    (``FILE.part``), from where the next call goes on. Where another process makes the file it is
    waited for.

    Args:
        model: the teacher, in evaluation mode, on the device of ``world``, which is one process.
        source: of the images.
        config: how they are cut, how many are seen at once (--eval-batch-size), and the precision.
        world: where it runs.
        path: the file.
        notes: see :func:`outputs_notes`.

    Raises:
        FloatingPointError: outputs are not finite; nothing is kept.
        Interrupted: SIGINT or SIGTERM came.
        ValueError: another process has made the file, of something else.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with Signals() as signals, _alone(path, signals):
        found = read_outputs(path, notes, world.device)
        if found is not None:  # another process has made it meanwhile
            return found
        for name in (path.name, part.name):  # of what was killed while it wrote
            if len(name) <= 32:
                for left in path.parent.glob(f".{name}.????????????{TEMPORARY}"):
                    left.unlink(missing_ok=True)
        outputs = _make(model, source, config, world, part, notes, signals)
        _write(path, outputs, {"format": FORMAT, **notes})
        part.unlink(missing_ok=True)
        if signals.received:
            name = signal.Signals(signals.received).name
            raise Interrupted(
                f"stopped by {name} when the teacher's outputs were made, in {path}",
                signals.received,
            )
    return outputs


@torch.no_grad()
def _make(
    model: nn.Module,
    source: MemorySource,
    config: TrainConfig,
    world: World,
    part: Path,
    notes: dict[str, str],
    signals: Signals,
) -> TeacherOutputs:
    """The outputs of all rows, of which ``part`` may have the first."""
    batches, precision = source.train(config, world), autocast(config.run, world)
    size, count = config.run.eval_batch_size, int(notes["rows"])
    assert size is not None
    outputs = _begun(part, notes)
    done = 0 if outputs is None else len(outputs.norms)
    if outputs is not None:
        outputs = _with_room(outputs, count, world.device)
    is_finite = torch.ones((), dtype=torch.bool, device=world.device)

    def keep() -> None:
        if outputs is not None and is_finite:
            rows = TeacherOutputs(*(values[:done] for values in outputs))
            _write(part, rows, {"format": BEGUN, "done": str(done), **notes})

    kept = time.monotonic()
    with Progress(
        -(-count // size),
        "teacher's outputs",
        initial=-(-done // size),
        enabled=config.run.progress and world.is_first,
    ) as bar:
        try:
            for rows in torch.arange(done, count, device=world.device).split(size):
                pixels, _ = batches.make(batches.plan_of(rows))
                with precision:
                    found, logits = features(model, pixels)
                wide = torch.promote_types(found.dtype, torch.float32)
                own = TeacherOutputs(logits, torch.linalg.vector_norm(found, dim=1, dtype=wide))
                if outputs is None:
                    outputs = _with_room(own, count, world.device)
                for values, new in zip(outputs, own, strict=True):
                    values[done : done + len(rows)] = new
                    is_finite &= new.isfinite().all()
                done += len(rows)
                bar.advance()
                if signals.received and done < count:
                    name = signal.Signals(signals.received).name
                    raise Interrupted(
                        f"stopped by {name} while the teacher's outputs were made; what there is "
                        f"of them is kept in {part}, the same command with --resume goes on there",
                        signals.received,
                    )
                if time.monotonic() - kept > KEEP_EVERY and done < count:
                    keep()
                    kept = time.monotonic()
        except (Interrupted, KeyboardInterrupt):
            keep()
            raise
    if not is_finite:
        part.unlink(missing_ok=True)
        raise FloatingPointError(f"the outputs of the teacher {notes['teacher']} are not finite")
    assert outputs is not None
    return outputs


def _with_room(outputs: TeacherOutputs, count: int, device: torch.device) -> TeacherOutputs:
    """Room for so many rows, of which these are the first."""
    room = []
    for values in outputs:
        values = values.to(device)
        whole = values.new_empty(count, *values.shape[1:])
        whole[: len(values)] = values
        room.append(whole)
    return TeacherOutputs(*room)


def _begun(part: Path, notes: dict[str, str]) -> TeacherOutputs | None:
    """What an interrupted call has made."""
    if not part.exists():
        return None
    try:
        return _read(part, BEGUN, notes, torch.device("cpu"))
    except ValueError:
        warnings.warn(
            f"the teacher's outputs begin anew: {part} is damaged, or of another teacher, other "
            "data or other options",
            stacklevel=3,
        )
        return None
