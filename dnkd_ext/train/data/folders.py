"""Images of class folders, and of tar archives of class folders, opened by timm's readers."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnkd_ext.train.data.decoding import UnreadableError, decode, reason_of
from dnkd_ext.train.data.memory import (
    IMAGE_SUFFIXES,
    KINDS,
    OTHER_SUFFIXES,
    told_kinds,
)

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FileSplit", "find_split", "open_files"]


class FileSplit:
    """Images that can be read in any order, each by its number.

    The order is that of their paths, whatever order the file system lists them in.

    Args:
        reader: timm's, of class folders or tar archives.
        place: path of the folder or archive.
        mapped: whether the reader's classes come from a file that says their order.

    Attributes:
        place: the folder or archive.
        classes: names, in the order of the labels.
        target: (images,) int64, the class of every image.
        left_out: image files of kinds that are not read, by their suffix.
    """

    def __init__(self, reader: Any, place: str, *, mapped: bool = False) -> None:
        from timm.utils.misc import natural_key

        self._reader = reader
        self.place = place
        self._process = os.getpid()
        self.left_out: Counter[str] = Counter()
        numbers = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
        if mapped:
            if sorted(numbers.values()) != list(range(len(numbers))):
                raise ValueError("--class-map must name every class once, in a line of its own")
            classes = sorted(numbers, key=numbers.__getitem__)
        else:
            # timm leaves names that differ in case alone in the order of a set.
            classes = sorted(numbers, key=lambda name: (natural_key(name), name))
        ours = np.zeros(len(numbers), np.int64)
        for label, name in enumerate(classes):
            ours[numbers[name]] = label
        labels = getattr(reader, "targets", None)
        if labels is None:
            labels = [target for _, target in reader.samples]
        paths = [self._path(number) for number in range(len(reader))]
        self._order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
        self.classes = classes
        self.target = ours[np.asarray(labels, np.int64)[self._order]]
        if "" in classes:
            stray = self.path(int(np.argmax(self.target == classes.index(""))))
            raise ValueError(f"{place} holds images outside of class folders, one is {stray}")

    def __len__(self) -> int:
        return len(self._order)

    def path(self, index: int) -> str:
        """Path of an image; within an archive ``ARCHIVE:MEMBER``."""
        return self._path(int(self._order[index]))

    def _path(self, number: int) -> str:
        sample = self._reader.samples[number]
        if len(sample) == 2:
            return str(sample[0])
        member, archive, child = sample
        inside = f"{child.name}:{member.name}" if child is not None else member.name
        return f"{os.path.join(self.place, archive) if archive else self.place}:{inside}"

    def names(self) -> Iterator[str]:
        """Paths of the images within the folder or archive, in order; wherever that lies."""
        for index in range(len(self)):
            yield self.path(index).removeprefix(self.place).lstrip("/:")

    def load(self, index: int, mode: str) -> Image.Image:
        """The picture, converted to ``mode``.

        Raises:
            UnreadableError: the file is missing or broken.
        """
        if os.getpid() != self._process:
            # A forked process shares its parent's files, and with them the place in them.
            self._forget_open_archives()
        try:
            file, _ = self._reader[int(self._order[index])]
            with file:
                content = file.read()
        except MemoryError:
            raise
        except Exception as error:
            raise UnreadableError(self.path(index), reason_of(error)) from error
        return decode(self.path(index), content, mode)

    def _forget_open_archives(self) -> None:
        states = getattr(self._reader, "tar_state", {})
        left = list(states.values()) if isinstance(states, dict) else [states]
        while left:
            state = left.pop()
            state.reset()
            left += state.children.values()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        self._forget_open_archives()
        return self.__dict__


def find_split(root: Path, names: Sequence[str]) -> Path:
    """The folder or archive of a split."""
    for name in names:
        for place in (root / name, root / f"{name}.tar"):
            if place.is_dir() or (place.suffix == ".tar" and place.is_file()):
                return place
    places = ", ".join(f"{name}/ or {name}.tar" for name in names)
    raise FileNotFoundError(f"{root} has none of {places}")


@contextlib.contextmanager
def _scanned_for(suffixes: set[str]) -> Iterator[None]:
    """timm's readers find files of these kinds within the context."""
    from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions

    usual = get_img_extensions()
    set_img_extensions(sorted(suffixes))
    try:
        yield
    finally:
        set_img_extensions(usual)


def _folder_classes(place: Path, samples: Sequence[Any]) -> list[str]:
    """Class of every image: the folder of the first level, nothing for images outside of one."""
    begin = len(str(place))
    parts = (path[begin:].lstrip(os.sep).partition(os.sep) for path, _ in samples)
    return [folder if inside else "" for folder, inside, _ in parts]


def _archive_classes(samples: Sequence[Any]) -> list[str]:
    """Class of every image: its first folder within the archive, else the archive.

    Folders that all images have in common are none, nor are those within an archive that holds
    images outside of folders: it is one of a class.
    """
    places, folders = [], []
    for member, archive, child in samples:
        places.append((archive or "", child.name if child is not None else ""))
        above = os.path.dirname(member.name).split("/")
        folders.append([name for name in above if name not in ("", ".")])
    least, most = min(folders), max(folders)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    common = [name for name, _ in same]
    if least == most and places[0] == ("", ""):
        common = common[:-1]  # one class: its folder has no other beside it
    single = {place for place, names in zip(places, folders, strict=True) if names == common}
    single.discard(("", ""))  # whose name is that of the split
    classes = []
    for place, names in zip(places, folders, strict=True):
        if place in single:
            classes.append(os.path.splitext(os.path.basename(place[1] or place[0]))[0])
        else:
            classes.append(names[len(common)] if names != common else "")
    return classes


def _suffix(path: str) -> str:
    """By which it is told what a file is; nothing of what is hidden in the data's folder.

    ``path``: below that folder, or within an archive.
    """
    folders, name = os.path.split(path)
    if any(part.startswith(".") and part != "." for part in (*folders.split("/"), name)):
        return ""
    return os.path.splitext(name)[1].lower()


def open_files(place: Path, class_map: str) -> FileSplit:
    """The images of a split, whose classes are its folders of the first level.

    Hidden files and folders are left out.

    Args:
        place: a folder of class folders or of tar archives, or an archive.
        class_map: text file with the classes, or nothing.

    Raises:
        ValueError: no images, a class without any, a broken archive, or a single class.
    """
    from timm.data.readers import create_reader
    from timm.data.readers.class_map import load_class_map
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    archives = place.is_dir() and any(place.glob("*.tar"))
    none = f"{place} holds no images in {'archives' if archives else 'class folders'}" + (
        f" of the classes in {class_map}" if class_map else ""
    )
    try:
        with _scanned_for(IMAGE_SUFFIXES | OTHER_SUFFIXES):
            if archives:
                reader = ReaderImageInTar(str(place))
            else:
                reader = create_reader("", root=str(place))
    except tarfile.TarError as error:
        raise ValueError(f"{place} is not a readable tar archive: {error}") from error
    except (AssertionError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        # timm adds every kind that was looked for, among them those that are not read.
        told = str(error).partition("Supported image extensions")[0].strip()
        raise ValueError(f"{none} ({told})" if told else none) from error
    # timm's classes are the last folders, whatever lies above them.
    if isinstance(reader, ReaderImageInTar):
        shown = [n for n, (member, _, _) in enumerate(reader.samples) if _suffix(member.name)]
        reader.samples = reader.samples[shown]
        if not shown:
            raise ValueError(none)
        names = _archive_classes(reader.samples)
        suffixes = [_suffix(member.name) for member, _, _ in reader.samples]
        found = set(names)
    else:
        within = len(str(place)) + 1
        reader.samples = [sample for sample in reader.samples if _suffix(sample[0][within:])]
        names = _folder_classes(place, reader.samples)
        suffixes = [_suffix(path[within:]) for path, _ in reader.samples]
        found = {entry.name for entry in os.scandir(place) if entry.is_dir()} | set(names)
    read = [number for number, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES]
    numbers = {name: number for number, name in enumerate({names[number] for number in read})}
    empty = {name for name in found - set(numbers) if not name.startswith(".")} - {""}
    if class_map:
        numbers = load_class_map(class_map)
        numbers.pop("", None)  # empty lines at the end
        read = [number for number in read if names[number] in numbers]
        empty &= set(numbers)
    if empty:
        name = min(empty)
        others = Counter(s for n, s in zip(names, suffixes, strict=True) if n == name)
        raise ValueError(
            f"class {name} of {place} holds no images of a kind that is read ({KINDS})"
            + (f", only {told_kinds(others)}" if others else "")
        )
    if not read:
        raise ValueError(none)
    labels = [numbers[names[number]] for number in read]
    if isinstance(reader, ReaderImageInTar):
        reader.samples, reader.targets = reader.samples[read], np.array(labels)
        reader.class_name_to_idx = numbers
    else:
        reader.samples = [(reader.samples[i][0], k) for i, k in zip(read, labels, strict=True)]
        reader.class_to_idx = numbers
    split = FileSplit(reader, str(place), mapped=bool(class_map))
    if len(split.classes) < 2 and not class_map:
        raise ValueError(f"{place} must hold at least two classes, found {split.classes[0]} alone")
    split.left_out = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    return split
