"""A whole training run on paper: what each number of GPUs would be bound by.

From the measured step, images from disk and launches; what links carry is from data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

# ImageNet's images, and the paper's recipe.
IMAGES, EPOCHS, BATCH = 1_281_167, 100, 512
# ResNet-18's, of which every process sends and receives the gradients in float32.
PARAMETERS = 11_689_512
# GPUs that NVLink 4 joins, and bytes per second that each sends while it receives as many: by
# NVLink, and by an adapter of 400 Gbit/s to other nodes.
NODE, NVLINK, NETWORK = 8, 450e9, 50e9


@dataclass(frozen=True)
class WholeRun:
    """A run of ``EPOCHS`` epochs whose ``BATCH`` images are shared by GPUs.

    Attributes:
        gpus: how many.
        rate: images per second of one whose batch fills it.
        launched: seconds of a recorded step with hardly any arithmetic; None where none is known.
    """

    gpus: int
    rate: float
    launched: float | None = None

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that every part of a step takes at least; they overlap."""
        sent = 2 * (self.gpus - 1) / self.gpus * 4 * PARAMETERS
        parts = {
            "arithmetic": BATCH / self.gpus / self.rate,
            "exchange": sent / (NVLINK if self.gpus <= NODE else NETWORK),
        }
        if self.launched is not None:
            parts["launches"] = self.launched
        return parts

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def images_per_second(self) -> float:
        return BATCH / self.parts[self.bound]

    @property
    def hours(self) -> float:
        return EPOCHS * IMAGES / self.images_per_second / 3600
