"""Integers to range-coded strings and back: by the model's tables, with escapes and a checksum.

`Encoder` and `Decoder` mirror each other: the values of a batch go in and come out in the same parts and in the same
order. All images of a batch have one padded size. A coder is one of `range_coder` or of `native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperprior.codec import container
from hyperprior.codec.container import Stream
from hyperprior.codec.tables import Tables
from hyperprior.errors import BitstreamError


class CodedImage:
    """The values of one image that were coded so far: their number, checksum and escapes."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.checksum = container.size_checksum(height, width)
        self.count = 0
        self.escapes: list[np.ndarray] = [np.empty(0, np.int16)]

    def add(self, values: np.ndarray) -> None:
        """Adds further values to the checksum."""
        self.checksum = container.checksum(values, self.count, self.checksum)
        self.count += values.size


class Encoder:
    """Encodes the values of images of (height, width)."""

    def __init__(self, coder: Any, tables: Tables, sizes: Sequence[tuple[int, int]]):
        self.coder, self.tables, self.images = coder, tables, [CodedImage(*size) for size in sizes]

    def put(self, values: np.ndarray, index: np.ndarray) -> None:
        """Appends [B, …] integers, each by the table `index`."""
        integers = values.astype(np.int32, copy=False)
        symbols, escape = integers - self.tables.first[index], self.tables.escape[index]
        is_outside = (symbols < 0) | (symbols >= escape)
        self.coder.put(np.where(is_outside, escape, symbols), index)
        for image, own, own_outside in zip(self.images, integers, is_outside):
            if own_outside.any():
                image.escapes.append(own[own_outside].astype(np.int16))
            image.add(own)

    def finish(self, fingerprint: bytes) -> list[Stream]:
        """The stream of each image, for the model with this fingerprint."""
        return [
            Stream(fingerprint, image.height, image.width, string, np.concatenate(image.escapes), image.checksum)
            for string, image in zip(self.coder.finish(), self.images)
        ]


class Decoder:
    """Decodes the values of streams."""

    def __init__(self, coder: Any, tables: Tables, streams: Sequence[Stream]):
        self.coder, self.tables, self.streams = coder, tables, streams
        self.images = [CodedImage(stream.height, stream.width) for stream in streams]
        self.used_escapes = [0] * len(streams)

    def take(self, index: np.ndarray) -> np.ndarray:
        """The next integers, one for each table `index` [B, …]: int32. Raises BitstreamError."""
        symbols = self.coder.take(index)
        values, is_escaped = symbols + self.tables.first[index], symbols >= self.tables.escape[index]
        for i, stream in enumerate(self.streams):
            if count := int(np.count_nonzero(is_escaped[i])):
                begin = self.used_escapes[i]
                stored = stream.escapes[begin : begin + count]
                if len(stored) < count:
                    raise make_wrong_symbols_error()
                values[i][is_escaped[i]] = stored
                self.used_escapes[i] += count
            self.images[i].add(values[i])
        return values

    def finish(self) -> None:
        """Raises BitstreamError unless these are the symbols that were encoded."""
        for stream, image, used in zip(self.streams, self.images, self.used_escapes):
            if image.checksum != stream.checksum or used != len(stream.escapes):
                raise make_wrong_symbols_error()


def make_wrong_symbols_error() -> BitstreamError:
    return BitstreamError(
        "decodes to other symbols than were encoded: its bytes and its CRC-32 were changed, or this machine's "
        "arithmetic is not IEEE 754"
    )
