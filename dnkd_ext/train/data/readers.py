"""Image data sets that stay on disk, whichever way they lie there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dnkd_ext.train.data.folders import FileSplit, find_split, open_files
from dnkd_ext.train.data.reader_options import ReaderOptions
from dnkd_ext.train.data.shards import TRAIN_NAMES, VAL_NAMES, ShardSplit, open_shards

__all__ = ["Splits", "open_splits"]


@dataclass(frozen=True)
class Splits:
    """Training and validation images, and the names of the classes in the order of the labels.

    ``train`` is None where only the validation images were asked for.
    """

    train: FileSplit | ShardSplit | None
    val: FileSplit | ShardSplit
    classes: list[str]


def open_splits(data: str | Path, options: ReaderOptions, *, test_only: bool = False) -> Splits:
    """Find both splits of a data set; no image is read.

    Args:
        data: a folder with, for training, ``train/CLASS/*``, ``train.tar`` (of class folders) or
            ``train/*.tar`` (of class folders, or one per class), and likewise ``val``,
            ``validation``, ``valid`` or ``test``; or with WebDataset shards and timm's
            ``_info.json``, which may have a list ``classes``.
        options: which of these, and more about it.
        test_only: the validation images alone, with their classes. Those for training need not be
            there, and are not listed; where they lie in class folders that can be read, the
            folders' names are compared.

    A class is a folder of the first level, with all that lies in folders below it; in archives of
    the first level at which there are several.

    An archive is scanned from beginning to end. timm keeps the result of more than 10 GB beside
    it, in ``_*_tarinfos.pickle``: of several processes one should come first then. A list that timm
    itself made has png, jpg and jpeg files alone; where there are others, remove it.

    Raises:
        FileNotFoundError: the folder, or a split, is missing.
        ModuleNotFoundError: timm, or for shards webdataset, is not installed.
        ValueError: a split without images, a class folder without any of a kind that is read,
            images outside of class folders, fewer than two classes without ``class_map``, classes
            that differ between the splits, or options out of range.
    """
    options.check()
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "--task imagenet reads images from disk, which needs timm: pip install timm"
        ) from error
    root = Path(data)
    if not root.is_dir() and "://" not in str(data):
        raise FileNotFoundError(f"no data folder at {data}")
    if options.class_map:
        if not Path(options.class_map).is_file():
            raise FileNotFoundError(f"--class-map {options.class_map} is no file")
        if Path(options.class_map).suffix != ".txt":
            raise ValueError(f"--class-map must be a .txt file, got {options.class_map}")
    if options.uses_shards:
        return Splits(*open_shards(str(data), options, test_only=test_only))
    if test_only:
        val = open_files(find_split(root, VAL_NAMES), options.class_map)
        train_place, classes = _class_folders(root)
        if classes and not options.class_map:
            _require_equal(train_place, classes, val.place, val.classes)
        return Splits(None, val, val.classes)
    places = [find_split(root, names) for names in (TRAIN_NAMES, VAL_NAMES)]
    train, val = (open_files(place, options.class_map) for place in places)
    _require_equal(train.place, train.classes, val.place, val.classes)
    return Splits(train, val, train.classes)


def _class_folders(root: Path) -> tuple[str, list[str]]:
    """The training images' folder, and the classes in it; none where there are no such folders.

    Hidden ones, which may be other programs', are left out.
    """
    try:
        place = find_split(root, TRAIN_NAMES)
    except FileNotFoundError:
        return "", []
    if not place.is_dir() or any(place.glob("*.tar")):
        return str(place), []
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except PermissionError:
        return str(place), []
    return str(place), [name for name in names if not name.startswith(".")]


def _require_equal(
    train_place: str, train: Sequence[str], val_place: str, val: Sequence[str]
) -> None:
    """ValueError where the classes of the splits differ."""
    told = [
        f"{place} has {', '.join(more[:3])}{' ...' if len(more) > 3 else ''} alone"
        for place, own, other in ((train_place, train, val), (val_place, val, train))
        if (more := sorted(set(own) - set(other)))
    ]
    if told:
        raise ValueError(f"both splits must have the same classes, but {' and '.join(told)}")
