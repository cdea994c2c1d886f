"""JPEG files, of which no more is decoded than is asked for."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from mixer_jax.data.declared import check_size
from mixer_jax.data.formats import (
    SCAN,
    ImageError,
    kind_of_file,
    orientation,
    whole_jpeg,
)
from mixer_jax.data.sizes import Size


class Jpeg(NamedTuple):
    """A JPEG file that is whole, of which no more is decoded than is asked for.

    Attributes:
      shape: (height, width, 3) of the image that `decode` returns.
      data: the file's contents.
      turn: the EXIF orientation that it is turned by.
      height_at: where its height stands; None if it must be decoded as a whole.
      end: where the compressed pixels end.
    """

    shape: tuple[int, int, int]
    data: bytes
    turn: int
    height_at: int | None
    end: int

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Returns uint8 [height, width, 3], a part of what `decode` returns.

        The rows below it are not decoded. Those above it and the columns beside it
        must be, since each pixel is stored as a difference.

        Raises:
          ImageError: OpenCV cannot decode it.
        """
        image = self._rows(top + height)
        if image is None:
            image = self.shrunk()
        return image[top : top + height, left : left + width]

    def _rows(self, count: int) -> np.ndarray | None:
        """Decodes rows from the top, at least `count`; None if it cannot be done so.

        The file is given another height, so OpenCV reads no more rows. The marker of
        its end is left out, or libjpeg would warn of the rows that are left.
        """
        count += 2  # the colours of a row depend on those of the next, half as many
        if self.height_at is None or count >= self.shape[0]:
            return None
        data = bytearray(memoryview(self.data)[: self.end])
        data[self.height_at : self.height_at + 2] = count.to_bytes(2, "big")
        with contextlib.suppress(ImageError):
            return imdecode(data, _FLAGS[1] | cv2.IMREAD_IGNORE_ORIENTATION)
        return None

    def shrunk(self, factor: int = 1) -> np.ndarray:
        """Returns uint8 [height / factor, width / factor, 3].

        libjpeg makes a smaller image of the low frequencies alone. That takes a third
        to two thirds of the time, and gives nearly the means of squares of pixels.

        Args:
          factor: 1, 2, 4 or 8; it divides both sides.

        Raises:
          ImageError: OpenCV cannot decode it.
        """
        flags = _FLAGS[factor] | cv2.IMREAD_IGNORE_ORIENTATION
        image = imdecode(self.data, flags)
        if factor > 1:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return image if self.turn == 1 else turned(image, self.turn)


Pixels = np.ndarray | Jpeg

# How OpenCV decodes at 1/1 to 1/8 of the size; there is no flag for a reduced RGB.
_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def open_jpeg(data: bytes, upright: bool) -> Jpeg:
    """Checks a JPEG file, and returns it.

    Args:
      data: the file's contents.
      upright: see `mixer_jax.data.decode.decode`.

    Raises:
      ImageError: it is cut off, damaged or too large.
    """
    segments = whole_jpeg(data)
    width, height, _cost = check_size(data, segments)
    turn = orientation(data, segments) if upright else 1
    shape = (height, width, 3) if turn < 5 else (width, height, 3)
    # Rows can be left out if all channels of a pixel are in one place (a baseline
    # JPEG with one scan), and there are no marks on the way (restarts).
    *head, scan, end = [marker for marker, _ in segments]
    starts = dict(segments)
    frame = starts.get(0xC0, starts.get(0xC1))
    plain = scan == SCAN and SCAN not in head and 0xDD not in head and turn == 1
    height_at = frame + 3 if frame and plain else None
    return Jpeg(shape, data, turn, height_at, starts[end] - 2)


def whole(image: Pixels) -> np.ndarray:
    """Returns all of an image, uint8 [height, width, 3].

    Raises:
      ImageError: it is a JPEG file that cannot be decoded.
    """
    return image.shrunk() if isinstance(image, Jpeg) else image


def part_of(image: Pixels, window: tuple[int, int, int, int]) -> np.ndarray:
    """Returns a part of an image: the window (top, left, height, width) in pixels."""
    if isinstance(image, Jpeg):
        return image.window(*window)
    top, left, height, width = window
    return image[top : top + height, left : left + width]


def reduction(shape: Sequence[int], size: Size) -> int:
    """Returns by how much a JPEG may be reduced when it is decoded: 1, 2, 4 or 8.

    The reduced image has at least twice as many pixels along each side as are wanted,
    so that it is still averaged, and pixels stay in their places: the result changes
    little, as docs/data.md says.

    Args:
      shape: (height, width, ...) of the image in pixels.
      size: (height, width) that it is resized to.
    """
    sides = list(zip(shape, size, strict=False))
    return max(
        factor
        for factor in (1, 2, 4, 8)
        if factor == 1 or all(a % factor == 0 and a >= 2 * factor * b for a, b in sides)
    )


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors [h, w, 3] as an EXIF orientation from 2 to 8 says."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def imdecode(data: bytes | bytearray, flags: int) -> np.ndarray:
    """Returns what OpenCV does, with the flags IMREAD_*.

    Raises:
      ImageError: it cannot decode it, and what the file is.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # more pixels than OpenCV accepts
        raise ImageError(f"OpenCV cannot read it: {error.err}") from error
    if image is None:
        raise ImageError(kind_of_file(bytes(data)))
    return image
