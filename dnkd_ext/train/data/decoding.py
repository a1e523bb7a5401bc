"""A picture from the bytes of its file, and the errors of those from which there is none."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from dnkd_ext.train.data.pixels import converted

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DataError", "RawImage", "UnreadableError", "decode", "reason_of"]


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
        raise UnreadableError(name, reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What is wrong, in words for a message."""
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    if "cannot identify image file" in text:
        return "no image format that is known"
    return f"{type(error).__name__}: {text}"
