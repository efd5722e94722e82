"""Encoded bytes to 8-bit RGB: the one place that decides what an image file means.

JPEG is decoded by TensorFlow, only the patch where that is enough; everything else by Pillow. Grayscale and
palettes become RGB, 16 bits are scaled to 8, CMYK is converted without a profile, and transparency is
flattened onto white, as a viewer shows it. Photographs to compress are turned upright; to training it does
not matter.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

TRAINED_ON = ("PNG", "BMP", "TIFF", "JPEG")  # formats as Pillow names them
MAX_PIXELS = 178_956_970  # a larger image is taken for a decompression bomb, here as in Pillow


class Unusable(Exception):
    """An image that cannot be used; the text says why."""


class TooSmall(Unusable):
    """An image with a side below the patch size: no defect of the file."""


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def decode(data: bytes) -> np.ndarray:
    """The whole image: [H, W, 3] uint8. Raises Unusable."""
    if is_jpeg(data):
        jpeg_size(data)
        return decode_jpeg(data)
    return to_rgb(open_image(data))


class Place(NamedTuple):
    """Where a patch is cut: `top` and `left` are random integers, taken modulo the number of possible positions.

    A window larger by 1 / `scale`, at most as large as the image, is scaled down to the patch, and mirrored if `flip`.
    """

    top: int
    left: int
    scale: float = 1.0
    flip: bool = False

    def window(self, height: int, width: int, size: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the pixels that become the patch."""
        side = min(round(size / self.scale), height, width)
        return self.top % (height - side + 1), self.left % (width - side + 1), side, side

    def finish(self, pixels: np.ndarray, size: int) -> np.ndarray:
        if len(pixels) != size:
            pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))
        return pixels[:, ::-1] if self.flip else pixels


def cut_patches(data: bytes, size: int, places: Sequence[Place], *, upscale: bool = False) -> np.ndarray:
    """Random patches: [P, size, size, 3] uint8, one for each of `places`.

    With `upscale` a smaller image is enlarged until its shorter side fits, else it is TooSmall. Raises Unusable.
    """
    if is_jpeg(data):
        height, width = jpeg_size(data)
        # The fused operation reads no further than it must, so it cannot know that a file is cut off.
        if len(places) == 1 and min(height, width) >= size and data.rstrip(b"\0").endswith(b"\xff\xd9"):
            return places[0].finish(decode_jpeg(data, places[0].window(height, width, size)), size)[None]
        check_size(height, width, size, upscale)
        image = decode_jpeg(data)
    else:
        opened = open_image(data)
        check_size(opened.height, opened.width, size, upscale)
        image = to_rgb(opened)
    if min(image.shape[:2]) < size:
        image = enlarge(image, size)
    height, width = image.shape[:2]
    windows = [place.window(height, width, size) for place in places]
    cut = [image[top : top + rows, left : left + columns] for top, left, rows, columns in windows]
    return np.stack([place.finish(pixels, size) for place, pixels in zip(places, cut)])


def centre_crop(data: bytes, size: int) -> np.ndarray:
    """The middle [size, size, 3] uint8 of an image. Raises Unusable, TooSmall."""
    image = decode(data)
    height, width = image.shape[:2]
    check_size(height, width, size, upscale=False)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def check_size(height: int, width: int, size: int, upscale: bool) -> None:
    if min(height, width) < size and not upscale:
        raise TooSmall(f"{width}x{height} is smaller than {size}x{size}")


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """The image enlarged until its shorter side is `size`. Raises Unusable for a strip."""
    height, width = image.shape[:2]
    if max(height, width) > 16 * min(height, width):
        raise Unusable(f"{width}x{height} is too narrow to be enlarged")
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def photograph(data: bytes) -> tuple[np.ndarray, list[str]]:
    """The whole image of any format, upright by its EXIF tag, [H, W, 3] uint8, and notes on what was dropped.

    Raises Unusable.
    """
    opened = open_image(data, formats=None)
    notes = []
    if opened.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in opened.info:
        notes.append("transparency is flattened onto white")
    if opened.mode == "CMYK":
        notes.append("CMYK is converted without a colour profile")
    elif opened.info.get("icc_profile"):
        notes.append("its colour profile is dropped")
    if opened.mode.startswith("I"):
        notes.append("16 bits are reduced to 8")
    with contextlib.suppress(Exception):  # Pillow raises many types for broken later frames
        if (frames := getattr(opened, "n_frames", 1)) > 1:
            notes.append(f"only the first of {frames} frames is kept")
    pixels = decode(data) if is_jpeg(data) else to_rgb(opened)
    return np.ascontiguousarray(upright(pixels, orientation_of(opened))), notes


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation tag. Ask after the pixels: Pillow turns a TIFF upright itself, and then drops the tag."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises many types for broken EXIF data; other viewers ignore it
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as EXIF's orientation tag, 1 to 8, says that it is meant; other values mean nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


# JPEG -----------------------------------------------------------------------------------------------------


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the frame header, without decoding. Raises Unusable."""
    at = 2
    while at + 9 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF:
            break
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # fill bytes, markers without a segment
            at += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big"))
            if not 0 < height * width <= MAX_PIXELS:
                raise Unusable(f"a JPEG of {width}x{height} pixels")
            return height, width
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise Unusable("a JPEG without a frame header")


def decode_jpeg(data: bytes, window: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """[H, W, 3] uint8, of the (top, left, height, width) `window` where given. Raises Unusable."""
    import tensorflow as tf

    try:
        with tf.device("cpu:0"):
            if window:
                # INTEGER_ACCURATE is what Pillow and other decoders of libjpeg do by default.
                image = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE")
            else:
                image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    except tf.errors.InvalidArgumentError as error:
        raise Unusable("a corrupt or truncated JPEG") from error
    return image.numpy()


# Everything else ------------------------------------------------------------------------------------------


def open_image(data: bytes, formats: Optional[tuple[str, ...]] = TRAINED_ON) -> Image.Image:
    """The image with its header read, not yet decoded; `formats` None: whatever Pillow opens. Raises Unusable."""
    try:
        with warnings.catch_warnings():  # the size is checked below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
    except Exception as error:  # Pillow raises a dozen types for broken headers
        names = "an image that Pillow opens" if formats is None else "a PNG, BMP, TIFF or JPEG"
        raise Unusable(f"not {names}" if isinstance(error, OSError) else str(error)) from error
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise Unusable(f"an image of {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
    return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8 of an opened image. Raises Unusable."""
    try:
        if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip instead of scale
            gray = np.asarray(image)
            if gray.min() < 0 or gray.max() > 65535:
                raise Unusable(f"gray levels from {gray.min()} to {gray.max()}; at most 16 bits can be scaled to 8")
            gray = gray.astype(np.uint32)
            return np.repeat(((gray * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=-1)
        if image.mode == "F":
            raise Unusable("floating-point pixels of unknown range")
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except Unusable:
        raise
    except Exception as error:
        raise Unusable(f"a corrupt or truncated {image.format}: {error}") from error
