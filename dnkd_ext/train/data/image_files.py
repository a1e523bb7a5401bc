"""Image data sets from disk into memory: CIFAR-100's own files or class folders, and a cache."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnkd_ext._files import replacing
from dnkd_ext.train.data.memory import (
    Images,
    ImageSet,
    folder_files,
    image_set,
    load_image_folder,
    other_images,
)
from dnkd_ext.train.files import OWN_FILES, check_place

__all__ = ["left_out", "load_images"]

CIFAR100_FOLDER = "cifar-100-python"
CIFAR100_FILES = ("train", "test", "meta")
CACHE_FORMAT = "dnkd_ext images 1"
# Of how files become pixels; a cache of another one is written anew.
DECODING = 2


def _latin1(text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


# All that a batch of CIFAR needs: arrays, their types, and bytes as Python 3 writes them for 2.
_RECONSTRUCT = np.empty(0, np.uint8).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


def load_images(
    folder: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    test_only: bool = False,
) -> ImageSet:
    """Read a data set into memory as uint8.

    Args:
        folder: one that holds CIFAR-100 as torchvision unpacks it (``cifar-100-python/train``,
            ``test`` and ``meta``), that folder itself, or one of class folders: ``train/CLASS/*``
            and ``test`` (or ``val``).
        limit: at most this many training images, the same number of every class, and a third as
            many test images, at least one of every class; chosen by ``seed``.
        seed: of that choice.
        cache: a safetensors file that is read if it holds these images, and written if it does not
            exist or holds other ones. Files that changed since are noticed by size and time.
        progress: show a progress bar while decoding.
        test_only: without ``cache``, read the test images alone; see :class:`ImageSet`. Those for
            training need not be there.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
        ValueError: a file that is not what its place says, a class folder without images, images
            outside of class folders, classes of the splits that differ, a limit below one image a
            class, or a cache file that holds something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}")
    cifar = _cifar_folder(folder)
    if cache is None:
        return _read(folder, cifar, limit, seed, progress, test_only)
    cache = Path(cache)
    if cache.name in OWN_FILES:
        raise ValueError(
            f"--cache {cache} is what a run calls a file of its own; choose another name"
        )
    files = [cifar / name for name in CIFAR100_FILES] if cifar else folder_files(folder)
    key = _fingerprint(folder, files, limit, seed)
    found = _read_cache(cache, key) if cache.exists() else None
    if found is None:
        check_place("--cache", cache, cache.parent)  # not after minutes of decoding
        found = _read(folder, cifar, limit, seed, progress)
        _write_cache(cache, key, found)
    return found


def left_out(folder: str | Path, *, test_only: bool = False) -> Counter[str]:
    """Image files of kinds that :func:`load_images` does not read, by their suffix."""
    folder = Path(folder)
    return Counter() if _cifar_folder(folder) else other_images(folder, test_only=test_only)


def _read(
    folder: Path,
    cifar: Path | None,
    limit: int | None,
    seed: int,
    progress: bool,
    test_only: bool = False,
) -> ImageSet:
    if cifar is None:
        return load_image_folder(
            folder, limit=limit, seed=seed, progress=progress, test_only=test_only
        )
    return _load_cifar100(cifar, limit, seed, test_only)


# -- CIFAR-100 ------------------------------------------------------------------------------------


def _cifar_folder(folder: Path) -> Path | None:
    """Where the three files are, or None where nothing looks like CIFAR-100's own form."""
    if (folder / CIFAR100_FOLDER).is_dir():
        return folder / CIFAR100_FOLDER
    if folder.name == CIFAR100_FOLDER or any((folder / n).is_file() for n in ("train", "test")):
        return folder
    return None


def _load_cifar100(folder: Path, limit: int | None, seed: int, test_only: bool = False) -> ImageSet:
    for name in CIFAR100_FILES:
        if test_only and name == "train":
            continue
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no file {name}, which belongs to CIFAR-100")
    classes = _unpickle(folder / "meta").get("fine_label_names")
    if (
        not isinstance(classes, list)
        or len(classes) < 2
        or not all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(f"{folder / 'meta'} holds no list fine_label_names")
    if limit is not None and limit < len(classes):
        raise ValueError(
            f"--limit must be at least one image for each of {len(classes)} classes, got {limit}"
        )
    splits = []
    for name, share in (("train", 1), ("test", 3))[test_only:]:
        split = _batch(folder / name, len(classes))
        if limit is not None:
            count = max(1, limit // len(classes) // share)
            kept = _choose_per_class(split.target.numpy(), len(classes), count, seed)
            split = Images(split.pixels[kept], split.target[kept])
        splits.append(split)
    train = None if test_only else splits[0]
    return image_set("cifar100", train, splits[-1], classes, flips=True)


def _choose_per_class(target: np.ndarray, classes: int, count: int, seed: int) -> torch.Tensor:
    """Places of at most ``count`` images of every class, in ascending order; int64."""
    random = np.random.default_rng(seed)
    chosen = []
    for label in range(classes):
        places = np.flatnonzero(target == label)
        chosen.append(places[random.permutation(len(places))[:count]])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _batch(path: Path, classes: int) -> Images:
    content = _unpickle(path)
    data, labels = content.get("data"), content.get("fine_labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        raise ValueError(f"{path} holds no array data of uint8 with a row per image")
    if data.shape[1] != 3 * 32 * 32 or len(data) == 0:
        raise ValueError(f"{path} must hold rows of 3 x 32 x 32 pixels, got {list(data.shape)}")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(label) is int and 0 <= label < classes for label in labels)
    ):
        raise ValueError(
            f"{path} must hold fine_labels, one in [0, {classes}) for each of {len(data)} images"
        )
    # A copy: the array's memory belongs to the bytes it was read from.
    pixels = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
    return Images(pixels, torch.tensor(labels))


class _Unpickler(pickle.Unpickler):
    """Arrays and plain values, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ALLOWED[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # Written by Python 2, whose strings are Latin 1 here, as torchvision reads them.
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    # A broken pickle raises whatever its bytes happen to ask for.
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"{path} is not a file of CIFAR-100: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a file of CIFAR-100: it holds no dictionary")
    return content


# -- cache ----------------------------------------------------------------------------------------


def _fingerprint(folder: Path, files: list[Path], limit: int | None, seed: int) -> str:
    digest = hashlib.sha256(
        json.dumps([CACHE_FORMAT, DECODING, limit, seed if limit else None]).encode()
    )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file.parent} has no file {file.name}")
        status = file.stat()
        entry = [file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _read_cache(path: Path, key: str) -> ImageSet | None:
    """The images, or None where the cache holds other ones."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            if notes.get("format") != CACHE_FORMAT:
                raise ValueError(
                    f"cache {path} holds something else than images; choose another name"
                )
            if notes["key"] != key:
                warnings.warn(
                    f"cache {path} holds other images (of {notes['name']}, another --limit or "
                    "seed, or files that have changed): it is replaced",
                    stacklevel=2,
                )
                return None
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if path.is_dir():
            raise ValueError(f"--cache must be a file, {path} is a folder") from error
        raise ValueError(f"cache {path} cannot be read ({error}); remove it") from error
    return image_set(
        notes["name"],
        Images(parts["train.pixels"], parts["train.target"]),
        Images(parts["test.pixels"], parts["test.target"]),
        json.loads(notes["classes"]),
        flips=True,
    )


def _write_cache(path: Path, key: str, images: ImageSet) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(
            {
                "train.pixels": images.train.pixels,
                "train.target": images.train.target,
                "test.pixels": images.test.pixels,
                "test.target": images.test.target,
            },
            temporary,
            metadata={
                "format": CACHE_FORMAT,
                "key": key,
                "name": images.name,
                "classes": json.dumps(images.classes),
            },
        )
