"""The names of classes, by which weights and class means tell whether data have the same labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnkd_ext.train.models.weights import read_notes

__all__ = ["CLASSES", "check_classes", "class_notes", "classes_of_weights", "other_classes"]

# The name of the note in the files' metadata.
CLASSES = "classes"
# Characters of a list that is written down as it is; of a longer one there is a digest.
LONGEST = 1 << 16
DIGEST = "sha256 "


def class_notes(classes: Sequence[str]) -> dict[str, str]:
    """What a file's metadata says of the classes, in the order of their labels.

    Nothing of classes whose names are their numbers: WebDataset shards without a list of names have
    such, and they tell nothing.
    """
    if list(classes) == [str(number) for number in range(len(classes))]:
        return {}
    text = json.dumps(list(classes))
    if len(text) > LONGEST:
        text = DIGEST + hashlib.sha256(text.encode()).hexdigest()
    return {CLASSES: text}


def classes_of_weights(path: Path) -> str | None:
    """The note in a file of weights; None in one that says nothing, or is no safetensors file."""
    return read_notes(path).get(CLASSES)


def other_classes(noted: str | None, classes: Sequence[str]) -> str | None:
    """How classes differ from those of a note; None where they do not, or where one is unknown.

    Unknown are classes without names, see :func:`class_notes`, and notes that are not ours. Of
    another number of classes nothing is said here.
    """
    own = class_notes(classes).get(CLASSES)
    if noted is None or own is None or noted == own:
        return None
    if noted.startswith(DIGEST):
        return "the digest of their names is another"
    names = _names(noted)
    if names is None or len(names) != len(classes):
        return None
    for label, (there, here) in enumerate(zip(names, classes, strict=True)):
        if there != here:
            return f"class {label} is {there!r} there and {here!r} in the data"
    return None


def _names(noted: str) -> list[str] | None:
    try:
        names: Any = json.loads(noted)
    except ValueError:
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


def check_classes(what: str, noted: str | None, classes: Sequence[str]) -> None:
    """ValueError where ``what`` notes other classes than the data's, or another order of them."""
    differs = other_classes(noted, classes)
    if differs is not None:
        raise ValueError(
            f"{what} is of other classes than the data, or of another order: {differs}; where they "
            "are the same by other names pass --any-classes"
        )
