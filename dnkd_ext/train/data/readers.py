"""Image data sets that stay on disk, opened through timm's readers.

Class folders, tar archives of class folders and WebDataset shards; loaders.py makes batches of
their images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dnkd_ext.train.data.memory import IMAGE_SUFFIXES, KINDS, OTHER_SUFFIXES, told_kinds
from dnkd_ext.train.data.pixels import converted

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "DataError",
    "FileSplit",
    "RawImage",
    "ReaderOptions",
    "ShardSplit",
    "Splits",
    "UnreadableError",
    "decode",
    "open_splits",
]

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")
# In a WebDataset shard, where a sample's files share a stem.
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class ReaderOptions:
    """Images that are read from disk while training, and what is done to them.

    Where they are, their normalisation and the smoothing of labels are options of the other
    groups: ``data``, ``mean``, ``std`` and ``label_smoothing``.
    """

    reader: str = ""
    """How timm names the reader: nothing for class folders and tar archives, wds/NAME for
    WebDataset shards."""
    train_split: str = ""
    """WebDataset: split of _info.json, or shards and their number of images, as
    'train-{0000..0009}.tar|12000'; by default train."""
    val_split: str = ""
    """Likewise; by default val, validation, valid or test, whichever _info.json has."""
    class_map: str = ""
    """Text file with a class per line in the order of the labels; by default the sorted names of
    the folders. Images of other classes are left out."""
    num_classes: int | None = None
    """WebDataset: how many classes, where neither class_map nor _info.json names them."""
    image_size: int = 224
    """Height and width of the images that the models see."""
    crop_pct: float = 0.875
    """Evaluation: part of the resized image's side that the central crop keeps."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """How images are resized; random: either for training, bilinear for evaluation."""
    scale: tuple[float, ...] = (0.08, 1.0)
    """Least and greatest area of the random crop, as a part of the image's."""
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Least and greatest ratio of the random crop's width to its height."""
    hflip: float = 0.5
    """Part of the training images that is mirrored."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation; not used beside auto_augment."""
    auto_augment: str = ""
    """timm's name of a policy, as rand-m9-mstd0.5-inc1 (RandAugment), original or 3a."""
    random_erasing: float = 0.0
    """Part of the training images in which a rectangle is erased; images then travel to the device
    as float32 instead of uint8."""
    erasing_mode: Literal["pixel", "const", "rand"] = "pixel"
    """What fills the rectangle: noise, the mean colour, or one random colour."""
    repeats: int = 1
    """Repeated augmentation: how often an image is in the batch, each time augmented anew, while an
    epoch keeps its length."""
    mixup: float = 0.0
    """Parameter of the beta distribution from which Mixup's share is drawn; 0 leaves it out."""
    cutmix: float = 0.0
    """Likewise of CutMix."""
    mixup_prob: float = 1.0
    """Part of the batches that is mixed."""
    mixup_switch_prob: float = 0.5
    """Part of the mixed batches that CutMix gets, where both are used."""
    workers: int = 4
    """Processes that read images, of every training process; 0: none, it reads them itself."""
    shuffle_buffer: int = 2048
    """WebDataset: undecoded images among which a worker chooses the next."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read: stop and name it, or count it and go on. A shard that breaks
    off counts as the images that it should still hold, where that is known, else as one."""

    def check(self) -> None:
        """ValueError for values out of range, naming the option."""
        least = {"image_size": 1, "repeats": 1, "workers": 0, "shuffle_buffer": 1}
        least |= {"color_jitter": 0, "mixup": 0, "cutmix": 0}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise ValueError(
                    f"{_option(name)} must be at least {smallest}, got {getattr(self, name)}"
                )
        for name in ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{_option(name)} must be between 0 and 1, got {getattr(self, name)}"
                )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(
                f"--crop-pct must be greater than 0 and at most 1, got {self.crop_pct}"
            )
        for name, most in (("scale", 1.0), ("ratio", float("inf"))):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                limit = " of at most 1" if most == 1 else ""
                raise ValueError(
                    f"--{name} must be two positive, growing numbers{limit}, got {tuple(values)}"
                )
        if self.reader and not self.uses_shards:
            raise ValueError(
                "--reader must be nothing (class folders and tar archives) or wds/NAME (WebDataset "
                f"shards), got {self.reader!r}"
            )
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"--num-classes must be at least 1, got {self.num_classes}")
        if self.uses_shards and self.repeats > 1:
            raise ValueError(
                "--repeats needs class folders or tar archives, got WebDataset shards and "
                f"{self.repeats}"
            )

    @property
    def uses_shards(self) -> bool:
        """Whether the data are WebDataset shards."""
        return self.reader.lower().startswith("wds/")

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed and have soft targets."""
        return self.mixup > 0 or self.cutmix > 0


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class DataError(ValueError):
    """Data that are not what they should be; the message names them."""


class UnreadableError(DataError):
    """An image, or an archive of images, that cannot be read.

    Attributes:
        name: its path; within an archive ``ARCHIVE:MEMBER``.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


class RawImage(NamedTuple):
    """An image as it lies in a shard: its path, its bytes, and the number of its class."""

    name: str
    content: bytes
    target: int


def decode(name: str, content: bytes, mode: str) -> Image.Image:
    """The picture in a file's bytes.

    Args:
        name: the file's path, for the error.
        content: the bytes.
        mode: ``"RGB"`` or ``"L"``, to which it is converted.

    Raises:
        UnreadableError: the bytes are not a whole image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return converted(image, mode)
    except MemoryError:
        raise
    # Broken files make the decoders raise whatever their bytes happen to lead to.
    except Exception as error:
        raise UnreadableError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    if "cannot identify image file" in text:
        return "no image format that is known"
    return f"{type(error).__name__}: {text}"


# -- class folders and tar archives ---------------------------------------------------------------


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
            raise UnreadableError(self.path(index), _reason(error)) from error
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


def _find(root: Path, names: Sequence[str]) -> Path:
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
    return os.path.splitext(path)[1].lower()


def _open_files(place: Path, class_map: str) -> FileSplit:
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
        raise ValueError(f"{none} ({error})" if str(error) else none) from error
    # timm's classes are the last folders, whatever lies above them.
    if isinstance(reader, ReaderImageInTar):
        names = _archive_classes(reader.samples)
        suffixes = [_suffix(member.name) for member, _, _ in reader.samples]
        found = set(names)
    else:
        names = _folder_classes(place, reader.samples)
        suffixes = [_suffix(path) for path, _ in reader.samples]
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


# -- WebDataset shards ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSplit:
    """Images in tar archives that are read from beginning to end.

    Attributes:
        urls: the shards, as webdataset opens them.
        count: how many images they hold together, as announced.
        lengths: how many each holds, where that is known.
        num_classes: labels are below it.
        label: field of a sample's JSON that holds its class; without one that is its file .cls.
    """

    urls: tuple[str, ...]
    count: int
    lengths: tuple[int, ...] | None
    num_classes: int
    label: str = ""

    def __len__(self) -> int:
        return self.count

    @property
    def place(self) -> str:
        """The first shard, and the last."""
        ends = dict.fromkeys((self.urls[0], self.urls[-1]))
        return " to ".join(ends)

    def names(self) -> Iterator[str]:
        """Names of the shards, and how many images are in each, or in all, in order."""
        for place, url in enumerate(self.urls):
            count = self.lengths[place] if self.lengths else self.count
            yield f"{url.rpartition('/')[2]} {count}"

    def read(self, url: str) -> Iterator[RawImage]:
        """The images of a shard, undecoded.

        Raises:
            UnreadableError: the shard cannot be opened, or breaks off, within its last sample, too.
            DataError: a sample without an image or a class, or with one out of range.
        """
        from webdataset.tariterators import tarfile_samples

        samples = iter(tarfile_samples([{"url": url}]))
        while True:
            try:
                sample = next(samples)
            except StopIteration:
                return
            except MemoryError:
                raise
            except Exception as error:
                raise UnreadableError(url, _reason(error)) from error
            try:
                raw = self._raw(url, sample)
            except DataError as error:
                if self._is_whole(sample) or not _ended(samples):
                    raise
                # An archive that ends between two files looks like a whole one.
                raise UnreadableError(url, f"{error}; there it ends") from error
            yield raw

    def _is_whole(self, sample: dict[str, Any]) -> bool:
        """Whether it has an image and a class, of whatever content."""
        return ("json" if self.label else "cls") in sample and any(k in sample for k in IMAGE_KEYS)

    def _raw(self, url: str, sample: dict[str, Any]) -> RawImage:
        name = f"{url}:{sample.get('__key__')}"
        key = next((key for key in IMAGE_KEYS if key in sample), None)
        if key is None:
            kept = sorted(key for key in sample if not key.startswith("__"))
            raise DataError(f"{name} has no image ({', '.join(IMAGE_KEYS)}), only {kept}")
        source = "json" if self.label else "cls"
        try:
            value = json.loads(sample[source])[self.label] if self.label else sample[source]
            target = int(value)
        except (KeyError, TypeError, ValueError) as error:
            wanted = f"an integer {self.label} in its JSON" if self.label else "an integer .cls"
            raise DataError(f"{name} must have {wanted} as its class") from error
        if not 0 <= target < self.num_classes:
            raise DataError(
                f"{name} is of class {target}, but there are {self.num_classes} classes, from 0 on"
            )
        return RawImage(f"{name}.{key}", sample[key], target)

    def measured(self) -> ShardSplit:
        """The split with the length of every shard, counted where that was not told.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard is no tar archive, is no local file, or all together hold another
                number of images than was announced.
        """
        return self if self.lengths is not None else self._counted

    @functools.cached_property
    def _counted(self) -> ShardSplit:
        lengths = []
        for url in self.urls:
            if not os.path.isfile(url):
                raise FileNotFoundError(
                    f"no shard at {url}; only local files can be counted: for others _info.json "
                    "must give shard_lengths"
                )
            try:
                with tarfile.open(url, "r:") as archive:
                    suffixes = (member.name.rpartition(".")[2].lower() for member in archive)
                    lengths.append(sum(suffix in IMAGE_KEYS for suffix in suffixes))
            except tarfile.TarError as error:
                raise ValueError(f"{url} is not a readable tar archive: {error}") from error
        if sum(lengths) != self.count:
            raise ValueError(
                f"the shards {self.urls[0]} to {self.urls[-1]} hold {sum(lengths)} images, but "
                f"{self.count} were announced"
            )
        return dataclasses.replace(self, lengths=tuple(lengths))


def _ended(samples: Iterator[Any]) -> bool:
    try:
        return next(samples, None) is None
    except MemoryError:
        raise
    except Exception:
        return True


def _open_shards(root: str, options: ReaderOptions) -> Splits:
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--reader {options.reader} needs the package webdataset: pip install webdataset"
        ) from error
    from timm.data.readers import create_reader

    found, info = [], {}
    for option, given, names in (
        ("--train-split", options.train_split, TRAIN_NAMES),
        ("--val-split", options.val_split, VAL_NAMES),
    ):
        name = given
        if not name:
            if not info:
                info = _read_info(root)
            name = next((name for name in names if name in info.get("splits", {})), "")
            if not name:
                raise ValueError(
                    f"{root} has no _info.json with a split {', '.join(names)}; {option} must name "
                    "one, or shards and their number of images, as "
                    f"'{names[0]}-{{0000..0009}}.tar|1200'"
                )
        try:
            reader = create_reader(options.reader, root=root, split=name)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{option} {name} is none of {root}: {error}") from error
        info = reader.info or info
        split = reader.split_info
        lengths = tuple(split.shard_lengths)
        if len(lengths) != len(split.filenames):
            lengths = None
        count = sum(lengths) if lengths else split.num_samples
        if not split.filenames or count < 1:
            raise ValueError(
                f"{option} {name} must tell how many images the shards hold, as '{name}|1200'"
            )
        urls = tuple(os.path.join(root, file) for file in split.filenames)
        found.append((urls, count, lengths, split.alt_label))
    classes = _shard_classes(root, info, options)
    train, val = (
        ShardSplit(urls, count, lengths, len(classes), label)
        for urls, count, lengths, label in found
    )
    return Splits(train, val, classes)


def _read_info(root: str) -> dict[str, Any]:
    for name in ("_info.json", "info.json"):
        path = Path(root, name)
        if path.is_file():
            try:
                info = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
            return info if isinstance(info, dict) else {}
    return {}


def _shard_classes(root: str, info: dict[str, Any], options: ReaderOptions) -> list[str]:
    """Names of the classes, their numbers where nothing names them."""
    told = options.num_classes
    if options.class_map:
        lines = Path(options.class_map).read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        source = f"--class-map {options.class_map}"
    elif isinstance(info.get("classes"), list):
        names, source = [str(name) for name in info["classes"]], f"{root}/_info.json"
    else:
        told = told or info.get("num_classes")
        if told is None:
            raise ValueError(
                "--num-classes must tell how many classes there are, or --class-map name them: "
                f"{root}/_info.json has no list classes"
            )
        return [str(number) for number in range(told)]
    if told not in (None, len(names)):
        raise ValueError(f"--num-classes is {told}, but {source} names {len(names)} classes")
    return names


# -- both splits ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Training and validation images, and the names of the classes in the order of the labels."""

    train: FileSplit | ShardSplit
    val: FileSplit | ShardSplit
    classes: list[str]


def open_splits(data: str | Path, options: ReaderOptions) -> Splits:
    """Find both splits of a data set; no image is read.

    Args:
        data: a folder with, for training, ``train/CLASS/*``, ``train.tar`` (of class folders) or
            ``train/*.tar`` (of class folders, or one per class), and likewise ``val``,
            ``validation``, ``valid`` or ``test``; or with WebDataset shards and timm's
            ``_info.json``, which may have a list ``classes``.
        options: which of these, and more about it.

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
            "reading images from disk while training needs timm: pip install timm"
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
        return _open_shards(str(data), options)
    places = [_find(root, names) for names in (TRAIN_NAMES, VAL_NAMES)]
    train, val = (_open_files(place, options.class_map) for place in places)
    if train.classes != val.classes:
        told = [
            f"{name} has {', '.join(more[:3])}{' ...' if len(more) > 3 else ''} alone"
            for name, own, other in (
                (places[0], train.classes, val.classes),
                (places[1], val.classes, train.classes),
            )
            if (more := sorted(set(own) - set(other)))
        ]
        raise ValueError(f"both splits must have the same classes, but {' and '.join(told)}")
    return Splits(train, val, train.classes)
