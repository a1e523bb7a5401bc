"""What a teacher makes of every cut of every image in memory, looked up in place of running it.

Crops of small images have few places: with a border of 4 pixels there are 81, mirrored and not 162.
So a teacher that is run in every step sees most of them several times, and students that are
trained one after another see the same.
"""

from __future__ import annotations

import json
import signal
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnkd_ext._files import replacing
from dnkd_ext.adapters import features
from dnkd_ext.progress import Progress
from dnkd_ext.train.config import TrainConfig
from dnkd_ext.train.data.batches import TrainBatches
from dnkd_ext.train.data.sources import Source
from dnkd_ext.train.gather import gathering_notes
from dnkd_ext.train.signals import Interrupted, Signals
from dnkd_ext.train.task import autocast
from dnkd_ext.train.world import World

__all__ = ["TeacherOutputs", "check_outputs", "make_outputs", "outputs_notes", "read_outputs"]

FORMAT = "dnkd_ext teacher outputs 1"
OPTION = "--teacher-outputs"
# Seconds between two looks at what would be lost.
KEEP_EVERY = 300.0


class TeacherOutputs(NamedTuple):
    """Of all cuts, of all images each, in the order of ``TrainBatches.places``.

    ``logits`` (cuts * images, classes), of the type that the teacher gives them in, and ``norms``
    (cuts * images,) of its features, at least float32.
    """

    logits: Tensor
    norms: Tensor

    def look_up(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and norms (N,) of some places (N,) int64."""
        return self.logits[places], self.norms[places]


def outputs_notes(config: TrainConfig, source: Source, digest: str) -> dict[str, str]:
    """What a file says about what its outputs are of; ``digest`` is of the teacher's weights."""
    return {
        "teacher": f"{config.model.teacher} {digest}",
        "data": source.fingerprint(),
        "pad": json.dumps(config.data.pad),
        "flip": json.dumps(config.data.flip),
        **gathering_notes(config),
    }


def check_outputs(path: Path, notes: dict[str, str]) -> bool:
    """Whether a file holds the outputs of these notes; False where it is not there.

    Raises:
        ValueError: it is damaged or something else, or its outputs are of something else.
    """
    return _read(path, notes, None) is not None


def read_outputs(path: Path, notes: dict[str, str], device: torch.device) -> TeacherOutputs | None:
    """The outputs of a file, or None where it is not there; on the CPU its pages are read as used.

    Raises:
        ValueError: it is damaged or something else, or its outputs are of something else.
    """
    found = _read(path, notes, device)
    return None if found is None else TeacherOutputs(found["logits"], found["norms"])


def _read(
    path: Path, notes: dict[str, str], device: torch.device | None
) -> dict[str, Tensor] | None:
    """The tensors, none without a device; or None where there is no file."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device=str(device or "cpu")) as file:
            found = file.metadata() or {}
            if found.get("format") != FORMAT:
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
            names = () if device is None else ("logits", "norms")
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        if path.is_dir():
            raise ValueError(f"{OPTION} must be a file, {path} is a folder") from error
        raise ValueError(f"{OPTION} {path} cannot be read ({error}); remove it") from error


def _write(path: Path, outputs: TeacherOutputs, rows: int, notes: dict[str, str]) -> None:
    """The first rows of the outputs."""
    from safetensors.torch import save_file

    tensors = {name: values[:rows].cpu() for name, values in outputs._asdict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, **notes})


def _allocate(rows: int, logits: Tensor, norms: Tensor) -> TeacherOutputs:
    """Room for all rows, like those of a batch."""
    size = rows * (logits.shape[1] * logits.element_size() + norms.element_size())
    try:
        return TeacherOutputs(logits.new_empty(rows, logits.shape[1]), norms.new_empty(rows))
    except RuntimeError as error:
        raise ValueError(
            f"{OPTION} needs {size / 1e9:.1f} GB for {rows} cut images, for which there is no "
            "room; leave it out, or choose a smaller --pad"
        ) from error


@torch.no_grad()
def make_outputs(
    model: nn.Module,
    source: Source,
    config: TrainConfig,
    world: World,
    path: Path,
    notes: dict[str, str],
) -> TeacherOutputs:
    """Run the teacher over every cut of every training image, and write the file.

    What there is when SIGINT or SIGTERM comes, and every five minutes, is kept beside the file
    (``FILE.part``), from where the next call goes on.

    Args:
        model: the teacher, in evaluation mode, on the device of ``world``, which is one process.
        source: of the images, in memory.
        config: how they are cut, and the precision.
        world: where it runs.
        path: the file.
        notes: see :func:`outputs_notes`.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
        ValueError: the outputs have no room in memory.
        OSError: the file cannot be written.
    """
    batches = source.train(config, world)
    assert isinstance(batches, TrainBatches)
    images, size = source.train_images, config.run.eval_batch_size or 500
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    begun, outputs = _begun(part, notes), None
    done = 0 if begun is None else len(begun.norms) // images
    precision = autocast(config.run, world)

    def keep() -> None:
        if outputs is not None and done:
            _write(part, outputs, done * images, notes)

    steps = -(-images // size)
    kept = time.monotonic()
    with (
        Signals() as signals,
        Progress(
            batches.cuts * steps,
            "teacher's outputs",
            initial=done * steps,
            enabled=config.run.progress and world.is_first,
        ) as bar,
    ):
        try:
            for cut in range(done, batches.cuts):
                for plan in batches.plans_of_cut(cut, size):
                    pixels, _ = batches.make(plan)
                    with precision:
                        found, logits = features(model, pixels)
                    wide = torch.promote_types(found.dtype, torch.float32)
                    norms = torch.linalg.vector_norm(found, dim=1, dtype=wide)
                    if outputs is None:
                        outputs = _allocate(batches.cuts * images, logits, norms)
                        if begun is not None:
                            for all_rows, rows in zip(outputs, begun, strict=True):
                                all_rows[: len(rows)] = rows
                    places = batches.places(plan)
                    outputs.logits[places] = logits
                    outputs.norms[places] = norms
                    bar.advance()
                    if signals.received:
                        raise _interrupted(signals.received, part)
                done = cut + 1
                if time.monotonic() - kept > KEEP_EVERY and done < batches.cuts:
                    keep()
                    kept = time.monotonic()
        except (Interrupted, KeyboardInterrupt):
            keep()
            raise
    if outputs is None:  # all of them were made before
        assert begun is not None
        outputs = TeacherOutputs(*(values.to(world.device) for values in begun))
    _write(path, outputs, len(outputs.norms), notes)
    part.unlink(missing_ok=True)
    return outputs


def _begun(part: Path, notes: dict[str, str]) -> TeacherOutputs | None:
    """What an interrupted call has made."""
    try:
        return read_outputs(part, notes, torch.device("cpu"))
    except ValueError as error:
        warnings.warn(f"the teacher's outputs begin anew: {error}", stacklevel=3)
        return None


def _interrupted(number: int, part: Path) -> Interrupted:
    return Interrupted(
        f"stopped by {signal.Signals(number).name} while the teacher's outputs were made; what "
        f"there is of them is kept in {part}, the same command with --resume goes on from there",
        number,
    )
