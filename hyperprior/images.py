"""Encoded bytes to 8-bit RGB. All image files are decoded here, so the whole package sees the same pixels.

Grayscale and palettes become RGB. 16 bits are scaled to 8. CMYK is converted without a profile. Transparency is
flattened onto white, as a viewer shows it. Photographs to compress are turned upright; training images stay as stored.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
from PIL import Image

from hyperprior import stack

TRAINING_FORMATS = ("PNG", "BMP", "TIFF", "JPEG")  # Pillow's names
MAX_PIXELS = 178_956_970  # Pillow refuses larger images too, as decompression bombs
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits, not compressed
TRANSPARENT_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
LARGEST_TILE = 2**22  # pixels of a tile of a TIFF, whatever the size of the image
EXIF_ORIENTATION, BITS_PER_SAMPLE, TILE_WIDTH, TILE_LENGTH = 0x0112, 258, 322, 323
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
JPEG_SCAN, JPEG_METADATA = 0xDA, (*range(0xE0, 0xF0), 0xFE)  # markers; the last is a comment
JPEG_KEPT = ((b"JFIF\0", 16), (b"Adobe", 14), (b"Exif\0\0", 8))  # with their least sizes
PPM_WITH_MAXIMUM = (b"P2", b"P3", b"P5", b"P6")


class Unusable(Exception):
    """An image that cannot be used. The text gives the reason."""


class TooSmall(Unusable):
    """An image with a side below the patch size. The file is not defective."""


def describe_too_large(num_bytes: int) -> str:
    """Why a file of more than MAX_BYTES is not read."""
    return f"a file of {num_bytes:,} bytes; at most {MAX_BYTES:,} are read as an image"


# Whole images ---------------------------------------------------------------------------------------------


def decode(data: bytes) -> np.ndarray:
    """The whole image as it is stored: [H, W, 3] uint8. Raises Unusable."""
    if is_jpeg(data):
        read_jpeg_size(data)
        return decode_jpeg(data)
    return to_rgb(open_image(data))


def decode_photo(data: bytes) -> tuple[np.ndarray, list[str]]:
    """The whole image, and notes on dropped information and on Pillow's warnings. Raises Unusable.

    The image may have any format. It is turned upright by its EXIF tag: [H, W, 3] uint8.
    """
    notes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = open_image(data, formats=None)
        if has_transparency(image):
            notes.append("transparency is flattened onto white")
        if image.mode == "CMYK":
            notes.append("CMYK is converted without a colour profile")
        elif image.info.get("icc_profile"):
            notes.append("its colour profile is dropped")
        if (depth := find_bits_per_channel(data, image)) > 8:
            notes.append(f"{depth} bits are reduced to 8")
        with contextlib.suppress(Exception):  # Pillow raises many types for broken later frames
            if (frames := getattr(image, "n_frames", 1)) > 1:
                notes.append(f"only the first of {frames} frames is kept")
        pixels = to_rgb(image)
        pixels = np.ascontiguousarray(turn_upright(pixels, read_orientation(image)))
    texts = (" ".join(str(warning.message).split()) for warning in caught)
    return pixels, notes + [f"Pillow warns: {text}" for text in dict.fromkeys(texts)]


def open_image(data: bytes, formats: Optional[tuple[str, ...]] = TRAINING_FORMATS) -> Image.Image:
    """Reads the header, but does not decode. `formats` None allows every format of Pillow. Raises Unusable."""
    try:
        with warnings.catch_warnings():  # the size is checked below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(io.BytesIO(without_png_metadata(data)), formats=formats)
            except Exception:  # Pillow raises many types, too, for a segment of a JPEG that libjpeg would ignore
                if not is_jpeg(data):
                    raise
                image = Image.open(io.BytesIO(without_jpeg_metadata(data)), formats=formats)
    except Exception as error:  # Pillow raises many types for broken headers
        names = "an image that Pillow opens" if formats is None else "a PNG, BMP, TIFF or JPEG"
        raise Unusable(f"not {names}" if isinstance(error, OSError) else str(error)) from error
    if image.format == "PNG" and b"iCCP" in data[: data.find(b"IDAT")]:
        image.info["icc_profile"] = b"left out"
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise Unusable(f"an image of {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
    if image.format == "TIFF":
        check_tiles(image)
    if image.format == "EPS":
        raise Unusable("an EPS file, which is a program that Ghostscript would run")
    return image


def check_tiles(image: Image.Image) -> None:
    """Raises Unusable if a tile of a TIFF, which is decoded as a whole, is much larger than the image."""
    sides = [image.tag_v2.get(tag, 1) for tag in (TILE_WIDTH, TILE_LENGTH)]  # type: ignore[attr-defined]
    sides = [side if isinstance(side, int) else MAX_PIXELS for side in sides]
    if sides[0] * sides[1] > max(4 * image.width * image.height, LARGEST_TILE):
        raise Unusable(f"an image of {image.width}x{image.height} pixels in tiles of {sides[0]}x{sides[1]}")


def without_png_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that do not change its pixels. Pillow refuses an image for a fault in one of them.

    EXIF stays, because it has the orientation, and animation stays. Other bytes than a PNG are returned as they are.
    """
    if data[:8] != PNG_SIGNATURE:
        return data
    kept, position = [PNG_SIGNATURE], 8
    while position + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + 12 + size]
        is_critical = not kind[0] & 0x20  # a capital letter
        if is_critical or (kind in PNG_KEPT and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")):
            kept.append(chunk)
        position += len(chunk)
        if kind == b"IEND":
            break
    return b"".join(kept)


def without_jpeg_metadata(data: bytes) -> bytes:
    """A JPEG with only those application segments that change its pixels or orientation, and are long enough.

    Libjpeg ignores a segment that is too short, but Pillow refuses the image.
    """
    kept, position = [data[:2]], 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        marker, size = struct.unpack_from(">xBH", data, position)
        segment = data[position : position + 2 + size]
        if marker == JPEG_SCAN:
            break
        is_needed = any(segment[4:].startswith(name) and size >= least for name, least in JPEG_KEPT)
        if is_needed or marker not in JPEG_METADATA:
            kept.append(segment)
        position += 2 + size
    return b"".join(kept) + data[position:]


def find_bits_per_channel(data: bytes, image: Image.Image) -> int:
    """Bits per channel in the file, where its format can have more than 8. Pillow reduces most of them to 8 itself."""
    with contextlib.suppress(IndexError, ValueError):
        if image.format == "PNG":
            return data[24]
        if image.format == "TIFF":
            bits = image.tag_v2.get(BITS_PER_SAMPLE, 8)  # type: ignore[attr-defined]
            return max(bits) if isinstance(bits, tuple) else bits
        if image.format == "JPEG2000":
            return (data[data.index(b"\xff\x51") + 40] & 0x7F) + 1
        if image.format == "AVIF":
            flags = data[data.index(b"av1C") + 6]
            return (12 if flags & 0x20 else 10) if flags & 0x40 else 8
        if image.format == "PPM":
            header = re.sub(rb"#[^\n]*", b"", data[:1000]).split(None, 4)
            return int(header[3]).bit_length() if header[0] in PPM_WITH_MAXIMUM else 8
    return 16 if image.mode.startswith("I") else 8


def has_transparency(image: Image.Image) -> bool:
    if image.format == "BMP" and image.mode == "RGBA":
        with contextlib.suppress(Exception):  # a truncated file; decoding reports it
            return tuple(image.getextrema())[-1] != (0, 0)  # viewers ignore an alpha channel that nobody wrote
    return image.mode in TRANSPARENT_MODES or "transparency" in image.info


def to_rgb(image: Image.Image) -> np.ndarray:
    """Decodes an opened image: [H, W, 3] uint8. Raises Unusable."""
    try:
        if image.mode.startswith("I"):  # 16-bit grayscale; Pillow would clip it instead of scaling it
            gray = np.asarray(image)
            if gray.min() < 0 or gray.max() > 65535:
                raise Unusable(f"gray levels from {gray.min()} to {gray.max()}; at most 16 bits can be scaled to 8")
            gray = gray.astype(np.uint32)
            return np.repeat(((gray * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=-1)
        if image.mode == "F":
            raise Unusable("floating-point pixels of unknown range")
        if has_transparency(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except Unusable:
        raise
    except Exception as error:
        raise Unusable(f"a corrupt or truncated {image.format}: {error}") from error


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation. Decode first: Pillow turns a TIFF upright while it decodes, and drops the tag."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises many types for broken EXIF data; viewers ignore such data
        return 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns [H, W, 3] as EXIF's orientation 1 to 8 says. Other values change nothing.

    ImageOps.exif_transpose is not used: it writes all EXIF tags again, and fails on photographs where it cannot.
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


# JPEG with TensorFlow, which can decode only a window -----------------------------------------------------
#
# A call takes many images: it runs in the calling thread, one operation an image, without Python's lock.

Window = tuple[int, int, int, int]  # top, left, height, width
Encoded = Any  # a list of bytes, or a tensor of them from `to_tensor`


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def read_jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the frame header, without decoding. Raises Unusable."""
    height, width = read_jpeg_sizes([data])[0]
    if not 0 < height * width <= MAX_PIXELS:
        raise Unusable(f"a JPEG of {width}x{height} pixels; at most {MAX_PIXELS:,} are read")
    return height, width


def read_jpeg_sizes(encoded: Encoded) -> list[tuple[int, int]]:
    """(height, width) of each image from its frame header, unchecked. Raises Unusable if one is corrupt."""
    return [(height, width) for height, width, _ in _call_jpeg_operation("sizes", encoded)[0].tolist()]


def decode_jpeg(data: bytes) -> np.ndarray:
    """The whole image: [H, W, 3] uint8. Raises Unusable."""
    return _call_jpeg_operation("decode", [data])[0]


def decode_jpeg_windows(encoded: Encoded, windows: Sequence[Window]) -> list[np.ndarray]:
    """Of each image its window: [height, width, 3] uint8. Raises Unusable if one is corrupt as far as it is read."""
    return _call_jpeg_operation("crop", encoded, windows)


def to_tensor(encoded: Sequence[bytes]) -> Encoded:
    """The images copied into TensorFlow's memory, for several calls."""
    import tensorflow as tf

    with tf.device("cpu:0"):
        return tf.constant(encoded)


def _call_jpeg_operation(name: str, encoded: Encoded, *more: Sequence[Window]) -> list[np.ndarray]:
    """Applies an operation to each image. Raises Unusable if it fails for one of them."""
    import tensorflow as tf

    function = _make_jpeg_function(name, len(encoded))
    try:
        with tf.device("cpu:0"), stack.run_in_this_thread():
            return list(map(np.asarray, function(*map(tf.convert_to_tensor, (encoded, *more)))))
    except tf.errors.InvalidArgumentError as error:
        raise Unusable("a corrupt or truncated JPEG") from error


@functools.cache
def _make_jpeg_function(name: str, count: int) -> Callable[..., Any]:
    """A graph that applies the operation `name` to each of `count` images."""
    import tensorflow as tf

    # Pillow and other decoders that use libjpeg have the same default, INTEGER_ACCURATE.
    decoding = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}
    operation = {
        "sizes": tf.image.extract_jpeg_shape,
        "decode": functools.partial(tf.io.decode_jpeg, **decoding),
        "crop": functools.partial(tf.io.decode_and_crop_jpeg, **decoding),
    }[name]

    @tf.function(autograph=False)
    def apply(*inputs: tf.Tensor) -> list[tf.Tensor]:
        results = [operation(*image) for image in zip(*map(tf.unstack, inputs))]
        return [tf.stack(results)] if name == "sizes" else results

    inputs = [tf.TensorSpec([count], tf.string)] + [tf.TensorSpec([count, 4], tf.int32)] * (name == "crop")
    with tf.device("cpu:0"):
        return apply.get_concrete_function(*inputs)


atexit.register(_make_jpeg_function.cache_clear)  # graphs cannot be freed after TensorFlow
