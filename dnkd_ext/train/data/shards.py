"""Images of WebDataset shards, found by timm's readers."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnkd_ext.train.data.decoding import DataError, RawImage, UnreadableError, reason_of
from dnkd_ext.train.data.reader_options import ReaderOptions

__all__ = ["TRAIN_NAMES", "VAL_NAMES", "ShardSplit", "open_shards"]

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")
# In a shard, where a sample's files share a stem.
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


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
                raise UnreadableError(url, reason_of(error)) from error
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


def open_shards(
    root: str, options: ReaderOptions, *, test_only: bool = False
) -> tuple[ShardSplit | None, ShardSplit, list[str]]:
    """Both splits of a folder or address of shards, and the names of the classes.

    With ``test_only`` the validation split alone, and None for the other.

    Raises:
        ModuleNotFoundError: webdataset is not installed.
        ValueError: a split that is not there, or of unknown size, or classes that nobody tells.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--reader {options.reader} needs the package webdataset: pip install webdataset"
        ) from error
    from timm.data.readers import create_reader

    wanted = [
        ("--train-split", options.train_split, TRAIN_NAMES),
        ("--val-split", options.val_split, VAL_NAMES),
    ]
    found, info = [], {}
    for option, given, names in wanted[1:] if test_only else wanted:
        name = given
        if not name:
            if not info:
                info = _read_info(root)
            splits = info.get("splits", {})
            if not isinstance(splits, dict):
                raise ValueError(f"{root}/_info.json: splits must be an object, got {splits!r}")
            name = next((name for name in names if name in splits), "")
            if not name:
                raise ValueError(
                    f"{root} has no _info.json with a split {', '.join(names)}; {option} must name "
                    "one, or shards and their number of images, as "
                    f"'{names[0]}-{{0000..0009}}.tar|1200'"
                )
        try:
            reader = create_reader(options.reader, root=root, split=name)
            urls, count, lengths = _shards_of(reader, root)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{option} {name} is none of {root}: {error}") from error
        except (TypeError, AttributeError) as error:  # timm takes what the file says as it is
            raise ValueError(f"{root}/_info.json is damaged: {error}") from error
        if not urls or count < 1:
            raise ValueError(
                f"{option} {name} must tell how many images the shards hold, as '{name}|1200'"
            )
        info = reader.info or info
        found.append((urls, count, lengths, reader.split_info.alt_label))
    classes = _shard_classes(root, info, options)
    *train, val = (
        ShardSplit(urls, count, lengths, len(classes), label)
        for urls, count, lengths, label in found
    )
    return train[0] if train else None, val, classes


def _shards_of(reader: Any, root: str) -> tuple[tuple[str, ...], int, tuple[int, ...] | None]:
    """Where the shards of timm's reader are, how many images they hold, and how many each.

    Raises:
        TypeError: what the reader has of ``_info.json`` is of other types.
    """
    if not isinstance(reader.info or {}, dict):
        raise TypeError(f"it holds a {type(reader.info).__name__}, not an object")
    split = reader.split_info
    urls = tuple(os.path.join(root, file) for file in split.filenames)
    lengths = tuple(split.shard_lengths)
    told = lengths if lengths and len(lengths) == len(urls) else (split.num_samples,)
    if not all(isinstance(number, int) for number in told):
        raise TypeError(f"numbers of images must be integers, got {list(told)}")
    return urls, sum(told), lengths if told is lengths else None


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
        if told is None:
            told = info.get("num_classes")
            if told is None:
                raise ValueError(
                    "--num-classes must tell how many classes there are, or --class-map name them: "
                    f"{root}/_info.json has no list classes"
                )
            if type(told) is not int or told < 1:
                raise ValueError(
                    f"{root}/_info.json: num_classes must be an integer of at least 1, got {told!r}"
                )
        return [str(number) for number in range(told)]
    if told not in (None, len(names)):
        raise ValueError(f"--num-classes is {told}, but {source} names {len(names)} classes")
    return names
