"""What a teacher makes of every cut of every image in memory, looked up in place of running it.

Crops of small images have few places: with a border of 4 pixels there are 81, mirrored and not 162
cuts. Each is seen by the teacher once, in one pass for all students that learn from it; a student
that runs it sees as many cuts in 162 epochs.
"""

from __future__ import annotations

import glob
import json
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnkd_ext._files import TEMPORARY, replacing
from dnkd_ext.adapters import features
from dnkd_ext.progress import Progress
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.sources import MemorySource
from dnkd_ext.train.gather import gathering_notes
from dnkd_ext.train.locks import alone
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


def check_room(files: Mapping[Path, dict[str, str]], device: torch.device, copies: int) -> None:
    """ValueError where outputs have no room, on the disk or in a GPU's memory.

    Args:
        files: notes of all files of a call; those that are not there will be made.
        device: which has the outputs of one file at a time,
        copies: and in so many processes.
    """
    sizes = {path: _size(notes) for path, notes in files.items()}
    missing = [path for path in files if not path.exists()]
    disks: dict[int, list[Path]] = {}
    for path in missing:
        disks.setdefault(_folder(path).stat().st_dev, []).append(path)
    rooms = []
    for paths in disks.values():
        # What was begun is there until all of it is written, in its place at the end.
        wanted = sum(map(sizes.__getitem__, paths)) + max(map(sizes.__getitem__, paths))
        parts = [_part(path).stat().st_size for path in paths if _part(path).is_file()]
        folder = _folder(paths[0])
        rooms.append((f"the disk of {folder}", wanted, shutil.disk_usage(folder).free + sum(parts)))
    if device.type == "cuda" and sizes:
        free = torch.cuda.mem_get_info(device)[0]
        rooms.append(("the GPU's memory", copies * max(sizes.values()), free))
    for where, wanted, free in rooms:
        if free < wanted:
            raise ValueError(
                f"{OPTION} {' '.join(map(str, files))} needs {wanted / 1e9:.1f} GB of {where}, and "
                f"{free / 1e9:.1f} GB are there"
            )


def _size(notes: dict[str, str]) -> int:
    """Bytes of the outputs."""
    halved = notes["precision"] == json.dumps("bfloat16")
    return int(notes["rows"]) * (int(notes["classes"]) * (2 if halved else 4) + 4)


def _folder(path: Path) -> Path:
    """Where it is, or the first above that is there."""
    return next(place for place in path.absolute().parents if place.exists())


def _part(path: Path) -> Path:
    """What is kept of a file that is being made."""
    return path.with_name(f"{path.name}.part")


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
        FloatingPointError: outputs are not finite; the file is not made.
        Interrupted: SIGINT or SIGTERM came.
        ValueError: another process has made the file, of something else.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    with Signals() as signals, alone(path, signals) as is_alone:
        outputs = read_outputs(path, notes, world.device)  # another may have made it meanwhile
        if outputs is None:
            if is_alone:
                _remove_temporaries(path)
            outputs = _make(model, source, config, world, part, notes, signals)
            _write(path, outputs, {"format": FORMAT, **notes})
        part.unlink(missing_ok=True)
        signals.stop(f"when the teacher's outputs were made, in {path}")
    return outputs


def _remove_temporaries(path: Path) -> None:
    """What a process left that was killed while it wrote the file, or a part of it."""
    for name in (path.name, _part(path).name):
        # Of a longer name the beginning stands there, which may be another file's, too.
        if len(path.name) <= 32:
            pattern = f".{glob.escape(name[:32])}.{12 * '?'}{TEMPORARY}"
            for left in path.parent.glob(pattern):
                left.unlink(missing_ok=True)


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

    def look() -> None:
        if not is_finite:
            raise FloatingPointError(f"outputs of the teacher {notes['teacher']} are not finite")

    def keep() -> None:
        if outputs is not None:
            rows = TeacherOutputs(*(values[:done] for values in outputs))
            _write(part, rows, {"format": BEGUN, "done": str(done), **notes})

    kept = -math.inf if outputs is None else time.monotonic()  # the first batch is looked at
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
                if done == count:
                    break
                if signals.received or time.monotonic() - kept > KEEP_EVERY:
                    look()
                    signals.stop(
                        "while the teacher's outputs were made; what there is of them is kept in "
                        f"{part}, the same command with --resume goes on from there",
                    )
                    keep()
                    kept = time.monotonic()
        except (Interrupted, KeyboardInterrupt):
            keep()
            raise
    look()
    assert outputs is not None
    return outputs


def _with_room(outputs: TeacherOutputs, count: int, device: torch.device) -> TeacherOutputs:
    """Room for so many rows, of which these are the first."""
    room = []
    for values in outputs:
        whole = torch.empty(count, *values.shape[1:], dtype=values.dtype, device=device)
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
