"""Pixels of any picture file in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["converted"]


def converted(image: Image.Image, mode: str, kind: str | None = None) -> Image.Image:
    """The picture as ``"RGB"`` or ``"L"``; of 16 bits the upper 8, where Pillow would cut at 255.

    Args:
        image: as it was opened, or turned.
        mode: to which it is converted.
        kind: the format of its file, where the picture does not know it any more.

    Raises:
        ValueError: the pixels are integers of 32 bits or floating, whose range no file tells.
    """
    from PIL import Image

    # These have 16 bits at most, whatever Pillow, depending on its version, puts them in.
    has_16 = image.mode == "I" and (kind or image.format) in ("PNG", "PPM")
    if has_16 or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, and not of 8 or 16 bits")
    return image.convert(mode)
