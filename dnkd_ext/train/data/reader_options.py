"""How images that stay on disk are read and augmented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ReaderOptions"]


@dataclass(frozen=True)
class ReaderOptions:
    """Images that are read from disk while training, and what is done to them.

    Where they are, their normalisation and the smoothing of labels are options of the other
    groups: --data, --mean, --std and --label-smoothing.
    """

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
    num_classes: int | None = None
    """WebDataset: how many classes, where neither --class-map nor _info.json names them."""
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
    """Strength of random brightness, contrast and saturation; not used beside --auto-augment."""
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
