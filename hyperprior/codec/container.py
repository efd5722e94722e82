"""The `.hyp` file, whose layout is in README.md beside this module. All its bytes are checked here, before the range
decoder reads them."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from hyperprior.errors import BitstreamError, DataError
from hyperprior.images import MAX_PIXELS as MAX_PIXELS

MAGIC, VERSION = b"\x89HYP", 2
HEADER = struct.Struct("<4sB8sHHIII")
OVERHEAD = HEADER.size + 4  # bytes that are not payload
MAX_SIDE = 65_535


class Stream(NamedTuple):
    """One compressed image. `fingerprint`: 8 bytes; `escapes`: [E] int16; `checksum`: see `checksum`."""

    fingerprint: bytes
    height: int
    width: int
    coded: bytes
    escapes: np.ndarray
    checksum: int
    version: int = VERSION


def write(stream: Stream) -> bytes:
    counts = len(stream.coded), len(stream.escapes)
    header = HEADER.pack(
        MAGIC, stream.version, stream.fingerprint, stream.height, stream.width, *counts, stream.checksum
    )
    body = header + stream.coded + stream.escapes.astype("<i2").tobytes()
    return body + struct.pack("<I", zlib.crc32(body))


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> Stream:
    """The stream in a file's bytes. Raises BitstreamError that names the defect."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise BitstreamError(f"not a .hyp file: it starts with {data[:4].hex(' ') or 'nothing'}")
    if len(data) > len(MAGIC) and not 1 <= data[len(MAGIC)] <= VERSION:
        raise BitstreamError(
            f"format version {data[len(MAGIC)]}; this release reads versions 1 to {VERSION}: "
            f"use the release that wrote it"
        )
    if len(data) < OVERHEAD:
        raise BitstreamError(f"cut off: {len(data)} bytes, fewer than the {OVERHEAD} of an empty file; copy it again")
    _, version, fingerprint, height, width, coded, escapes, checksum = HEADER.unpack_from(data)
    expected = OVERHEAD + coded + 2 * escapes
    if len(data) != expected:
        defect = "cut off" if len(data) < expected else "bytes follow its end"
        raise BitstreamError(f"{defect}: {len(data)} bytes; its header says {expected}; copy it again")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise BitstreamError("damaged: its bytes do not match their CRC-32; copy it again")
    if not height or not width:
        raise BitstreamError(f"an image of {width}x{height} pixels; each side must be at least 1")
    if height * width > max_pixels:
        raise BitstreamError(f"an image of {width}x{height} pixels; at most {max_pixels:,} are decoded (--max-pixels)")
    at = HEADER.size + coded
    stored = np.frombuffer(data, "<i2", escapes, at)
    return Stream(fingerprint, height, width, data[HEADER.size : at], stored, checksum, version)


def check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises DataError for an image that the header cannot describe, or that `read` would refuse."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise DataError(f"an image of {width}x{height} pixels; each side must be 1 to {MAX_SIDE}")
    if height * width > max_pixels:
        raise DataError(f"an image of {width}x{height} pixels; at most {max_pixels:,} are compressed (max_pixels)")


def size_checksum(height: int, width: int) -> int:
    """The checksum of an image's size, before any symbol."""
    return height << 16 | width


def checksum(values: np.ndarray, start: int, before: int) -> int:
    """`before` + Σ (2i + 1) · value_i modulo 2³² over symbols i = start, … in coding order.

    A file's checksum starts from `size_checksum` and covers all symbols. Any single wrong symbol changes it.
    """
    start %= 2**31  # 2i + 1 modulo 2³² needs no more
    values = values.ravel().astype(np.uint32)
    weights = np.arange(start, start + values.size, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return int((before + int((values * weights).sum(dtype=np.uint64))) % 2**32)
