"""Pixels of any picture file in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["converted"]


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The picture as ``"RGB"`` or ``"L"``; of 16 bits the upper 8, where Pillow would cut at 255.

    Raises:
        ValueError: the pixels are integers of 32 bits or floating, whose range no file tells.
    """
    from PIL import Image

    # A PNG has 16 bits at most, whatever Pillow, depending on its version, puts them in.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, and not of 8 or 16 bits")
    return image.convert(mode)
