"""Small image sets held in memory as uint8, and their augmentation in batches."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnkd_ext.progress import progress_bar
from dnkd_ext.train.data.pixels import converted

__all__ = ["ImageSet", "Images", "crop_and_flip", "load_digits", "load_image_folder"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
KINDS = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
# Images, too, but not read.
OTHER_SUFFIXES = {
    *(".apng", ".arw", ".avif", ".cr2", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif"),
    *(".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jxl", ".mpo", ".nef", ".pbm", ".pcx", ".pnm"),
    *(".psd", ".svg", ".tga"),
}
LARGEST_SIDE = 64


def told_kinds(counts: Mapping[str, int]) -> str:
    """Suffixes and how many files have them, as text."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


@dataclass
class Images:
    """One split: ``pixels`` (N, channels, height, width) uint8 and ``target`` (N,) int64."""

    pixels: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> Images:
        """The split on another device."""
        return Images(self.pixels.to(device), self.target.to(device))


@dataclass
class ImageSet:
    """A training and a test split with the names of their classes.

    ``flips`` tells whether a mirrored image is still of its class. Where only the test images were
    asked for, ``train`` has no images.
    """

    name: str
    train: Images
    test: Images
    classes: list[str]
    flips: bool

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.train.pixels.shape[1]

    def to(self, device: torch.device | str) -> ImageSet:
        """The set on another device."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (channels,) of the training pixels in [0, 1].

        Where only the test images were asked for, of theirs.
        """
        pixels = (self.train if len(self.train) else self.test).pixels
        count = pixels.numel() // self.channels
        total, squares = pixels.new_zeros(2, self.channels, dtype=torch.int64)
        # Exact sums a part at a time: all pixels as floats would take eight times their memory.
        for part in pixels.split(1024):
            values = part.int()
            total += values.sum((0, 2, 3))
            squares += values.square().sum((0, 2, 3))
        mean = total.double() / count
        variance = (squares.double() - count * mean.square()) / max(1, count - 1)
        std = variance.clamp_min(0).sqrt() / 255
        return (mean / 255).float(), std.clamp_min(1e-3).float()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (N, channels, H, W) uint8 to float32 of zero mean and unit deviation."""
        mean, std = (x.view(1, -1, 1, 1) for x in self.statistics)
        return (pixels.float() / 255 - mean) / std

    def batches(
        self, split: Images, size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, target) batches; shuffled and augmented where a generator is given.

        The generator lives on the CPU, so that every device sees the same order and crops.
        """
        count = len(split)
        order = (
            torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        )
        for start in range(0, count, size):
            chosen = order[start : start + size].to(split.pixels.device)
            pixels = split.pixels[chosen]
            if generator is not None:
                if len(chosen) < size and start > 0:
                    return  # BatchNorm of a handful of images would be noise
                pixels = _augment(pixels, self.flips, generator)
            yield self.normalise(pixels), split.target[chosen]


def _augment(pixels: Tensor, flips: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, black behind, and mirror every second."""
    count, height = len(pixels), pixels.shape[2]
    pad = max(1, height // 8)
    device = pixels.device
    dy, dx = torch.randint(2 * pad + 1, (2, count, 1), generator=generator).squeeze(2).to(device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).squeeze(1).to(device) & flips
    return crop_and_flip(pixels, dy, dx, mirrored, pad)


def crop_and_flip(pixels: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor, pad: int) -> Tensor:
    """Cut every image out of its padded form at its own place, and mirror some.

    Args:
        pixels: (N, C, H, W).
        dy: (N,) int64, rows from the top of the padded image, in [0, 2 pad].
        dx: (N,) int64, columns from its left.
        mirrored: (N,) bool, whether the cut image is mirrored left to right.
        pad: width of the black border.

    Returns:
        (N, C, H, W) of the same type.
    """
    _, channels, height, width = pixels.shape
    wide = width + 2 * pad
    rows = torch.arange(height, device=pixels.device) + dy[:, None]
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + dx[:, None]
    # One gather over flat places measured five times as fast as indexing by four tensors.
    places = (rows[:, :, None] * wide + columns[:, None, :]).flatten(1)[:, None]
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, places.expand(-1, channels, -1)).view(pixels.shape)


def image_set(
    name: str, train: Images | None, test: Images, classes: list[str], flips: bool
) -> ImageSet:
    """The set of two splits, or of the test split alone."""
    if train is None:
        train = Images(test.pixels[:0], test.target[:0])
    return ImageSet(name, train, test, classes, flips)


def load_digits() -> ImageSet:
    """scikit-learn's bundled handwritten digits: 1,797 real 8 x 8 grey images of 10 classes.

    A third of every class, chosen by a fixed seed, is the test split.
    """
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    digits = bundled()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test, train_target, test_target = train_test_split(
        pixels, digits.target, test_size=1 / 3, random_state=0, stratify=digits.target
    )
    return image_set(
        "digits",
        Images(torch.from_numpy(train), torch.from_numpy(train_target).long()),
        Images(torch.from_numpy(test), torch.from_numpy(test_target).long()),
        [str(k) for k in range(10)],
        flips=False,
    )


def load_image_folder(
    folder: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
    test_only: bool = False,
) -> ImageSet:
    """An image-folder data set: ``folder/train/CLASS/*.png`` and ``folder/test`` (or ``val``).

    Images of any size: they are brought to the size of the first one, at most 64 pixels a side, by
    scaling the shorter side and cropping the centre. Hidden files and folders are left out.

    Args:
        folder: the data set.
        limit: at most this many training images, the same number of every class, and a third as
            many test images; chosen by ``seed``.
        seed: of that choice.
        progress: show a progress bar while decoding.
        test_only: the test images alone. They have the classes of ``train`` and the size of its
            first image, as when both are read; where it has no images, or is missing, their own
            classes and the size of their own first image, with a warning if theirs differ.

    Raises:
        FileNotFoundError: ``folder``, its ``train``, or both ``test`` and ``val`` are missing.
        ValueError: no classes or images, images outside of class folders, classes of the splits
            differ, an unreadable image, or a limit below one image a class.
    """
    folder = Path(folder)
    train_folder, test_folder = _split_folders(folder, test_only)
    classes = _class_names(test_folder if train_folder is None else train_folder)
    others = _class_names(test_folder)
    if classes != others:
        differing = sorted(set(classes) ^ set(others))
        raise ValueError(
            f"{train_folder} and {test_folder} hold different classes, for instance {differing[:5]}"
        )
    if limit is not None and limit < len(classes):
        raise ValueError(
            f"--limit must be at least one image for each of {len(classes)} classes, got {limit}"
        )
    per_class = None if limit is None else limit // len(classes)
    training = []
    if train_folder is not None:  # of which, for the test images alone, the first is enough
        wanted = classes[:1] if test_only else classes
        training = _chosen_files(train_folder, wanted, per_class, seed)
    test = _chosen_files(
        test_folder, classes, None if per_class is None else max(1, per_class // 3), seed
    )
    size = _target_size((training or test)[0][0])
    if not training and len(sizes := _sizes(test)) > 1:
        warnings.warn(
            f"images of {len(sizes)} sizes in {test_folder} are brought to {size[0]} x {size[1]} "
            f"pixels by the first, {test[0][0].name}, for want of training images",
            stacklevel=2,
        )
    train = None if test_only else _decode(training, size, progress)
    return image_set(
        folder.resolve().name, train, _decode(test, size, progress), classes, flips=True
    )


def folder_files(folder: Path) -> list[Path]:
    """All images that :func:`load_image_folder` may read, in a fixed order.

    Raises:
        FileNotFoundError: ``folder``, its ``train``, or both ``test`` and ``val`` are missing.
    """
    splits = _split_folders(folder)
    return sorted(path for split in splits if split is not None for path in _images(split))


def other_images(folder: Path, *, test_only: bool = False) -> Counter[str]:
    """Image files there of kinds that :func:`load_image_folder` leaves out, by their suffix."""
    splits = _split_folders(folder, test_only)[test_only:]
    files = (path for split in splits if split is not None for path in _shown_files(split))
    suffixes = (path.suffix.lower() for path in files)
    return Counter(suffix for suffix in suffixes if suffix in OTHER_SUFFIXES)


def _split_folders(folder: Path, test_only: bool = False) -> tuple[Path | None, Path]:
    """Those of training and of test; with ``test_only`` the first may be missing, or without
    images, and is None.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}")
    train_folder = folder / "train"
    test_folder = next((folder / n for n in ("test", "val") if (folder / n).is_dir()), None)
    if not train_folder.is_dir() and not test_only:
        raise FileNotFoundError(f"{folder} has no folder train/ with one folder per class")
    if test_folder is None:
        raise FileNotFoundError(f"{folder} has neither test/ nor val/ with one folder per class")
    if test_only and not any(map(_is_image, _shown_files(train_folder))):
        return None, test_folder
    return train_folder, test_folder


def _shown_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, but what is hidden: other programs' and of macOS's copies."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _images(folder: Path) -> list[Path]:
    return sorted(filter(_is_image, _shown_files(folder)))


def _class_names(folder: Path) -> list[str]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in inside if path.is_dir()]
    if len(folders) < 2:
        raise ValueError(f"{folder} must hold at least two class folders, found {len(folders)}")
    for path in inside:
        if _is_image(path) and not path.is_dir():
            raise ValueError(f"{folder} holds images outside of class folders, one is {path}")
    return [path.name for path in folders]


def _chosen_files(
    folder: Path, classes: list[str], per_class: int | None, seed: int
) -> list[tuple[Path, int]]:
    random = np.random.default_rng(seed)
    chosen: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = _images(folder / name)
        if not files:
            raise ValueError(f"{folder / name} holds no images of a kind that is read ({KINDS})")
        if per_class is not None and per_class < len(files):
            files = [files[i] for i in sorted(random.permutation(len(files))[:per_class])]
        chosen.extend((file, label) for file in files)
    return chosen


def _open(path: Path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return converted(image, "RGB")
    # An image that no decoder knows is an OSError, too.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def _sizes(files: list[tuple[Path, int]]) -> set[tuple[int, int]]:
    """Those in the images' headers; one that cannot be read is told when it is decoded."""
    from PIL import Image

    sizes = set()
    for path, _ in files:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
    return sizes


def _target_size(path: Path) -> tuple[int, int]:
    width, height = _open(path).size
    scale = min(1.0, LARGEST_SIDE / max(width, height))
    return max(8, round(width * scale)), max(8, round(height * scale))


def _decode(files: list[tuple[Path, int]], size: tuple[int, int], progress: bool) -> Images:
    from PIL import ImageOps

    pixels = np.empty((len(files), 3, size[1], size[0]), dtype=np.uint8)

    def read(number: int) -> None:
        image = _open(files[number][0])
        if image.size != size:
            image = ImageOps.fit(image, size)
        pixels[number] = np.asarray(image).transpose(2, 0, 1)

    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        done = pool.map(read, range(len(files)))
        for _ in progress_bar(done, "decoding", enabled=progress, total=len(files)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # an unreadable image ends it at once
    return Images(torch.from_numpy(pixels), torch.tensor([label for _, label in files]))
