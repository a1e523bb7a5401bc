"""How images that stay on disk are read and augmented."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from dnkd_ext.train.options import at_least, between, check_ranges, flag, option

__all__ = ["ReaderOptions"]

# Options that have no part in reading class folders and tar archives.
SHARDS_ALONE = ("train_split", "val_split", "num_classes", "shuffle_buffer")


@dataclass(frozen=True)
class ReaderOptions:
    """Images that are read from disk while training, and what is done to them.

    Where they are, their normalisation and the smoothing of labels are options of the other
    groups: --data, --mean, --std and --label-smoothing.
    """

    TASKS = ("imagenet",)

    reader: str = ""
    """How timm names the reader: nothing for class folders and tar archives, wds/NAME for
    WebDataset shards."""
    train_split: str = ""
    """WebDataset: split of _info.json, or shards and their number of images, as
    'train-{0000..0009}.tar|12000'; by default train."""
    val_split: str = ""
    """WebDataset: the same of the images for evaluation; by default val, validation, valid or test,
    whichever _info.json has."""
    class_map: str = ""
    """Text file with a class per line in the order of the labels; by default the sorted names of
    the folders. Images of other classes are left out."""
    num_classes: int | None = option(None, at_least(1))
    """WebDataset: how many classes, where neither --class-map nor _info.json names them."""
    image_size: int = option(224, at_least(1))
    """Height and width of the images that the models see."""
    crop_pct: float = option(0.875, between(0, 1, open_low=True))
    """Evaluation: part of the resized image's side that the central crop keeps."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """How images are resized; random: either for training, bilinear for evaluation."""
    scale: tuple[float, ...] = (0.08, 1.0)
    """Least and greatest area of the random crop, as a part of the image's."""
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Least and greatest ratio of the random crop's width to its height."""
    hflip: float = option(0.5, between(0, 1))
    """Part of the training images that is mirrored."""
    color_jitter: float = option(0.0, at_least(0))
    """Strength of random brightness, contrast and saturation; not used beside --auto-augment."""
    auto_augment: str = ""
    """timm's name of a policy, as rand-m9-mstd0.5-inc1 (RandAugment), original or 3a."""
    random_erasing: float = option(0.0, between(0, 1))
    """Part of the training images in which a rectangle is erased; images then travel to the device
    as float32 instead of uint8."""
    erasing_mode: Literal["pixel", "const", "rand"] = "pixel"
    """What fills the rectangle: noise, the mean colour, or one random colour."""
    repeats: int = option(1, at_least(1))
    """Repeated augmentation: how often an image is in the batch, each time augmented anew, while an
    epoch keeps its length."""
    mixup: float = option(0.0, at_least(0))
    """Parameter of the beta distribution from which Mixup's share is drawn; 0 leaves it out."""
    cutmix: float = option(0.0, at_least(0))
    """Likewise of CutMix."""
    mixup_prob: float = option(1.0, between(0, 1))
    """Part of the batches that is mixed."""
    mixup_switch_prob: float = option(0.5, between(0, 1))
    """Part of the mixed batches that CutMix gets, where both are used."""
    workers: int = option(4, at_least(0), tasks=("imagenet", "detection"), free=True)
    """Processes that read images, of every training process; 0: none, it reads them itself."""
    shuffle_buffer: int = option(2048, at_least(1))
    """WebDataset: undecoded images among which a worker chooses the next."""
    on_error: Literal["raise", "skip"] = option("raise", free=True)
    """An image that cannot be read: stop and name it, or count it and go on. A shard that breaks
    off counts as the images that it should still hold, where that is known, else as one."""

    def check(self) -> None:
        """ValueError for values out of range or at odds with each other, naming the option."""
        check_ranges(self)
        for name, most in (("scale", 1.0), ("ratio", inf)):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most or values[1] == inf:
                limit = " of at most 1" if most == 1 else ""
                raise ValueError(
                    f"--{name} must be two positive, growing numbers{limit}, got {tuple(values)}"
                )
        if self.reader and not self.uses_shards:
            raise ValueError(
                "--reader must be nothing (class folders and tar archives) or wds/NAME (WebDataset "
                f"shards), got {self.reader!r}"
            )
        for name in () if self.uses_shards else SHARDS_ALONE:
            if getattr(self, name) != getattr(type(self)(), name):
                raise ValueError(
                    f"{flag(name)} is for WebDataset shards (--reader wds/NAME), got "
                    f"{getattr(self, name)!r} and class folders or tar archives"
                )
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
