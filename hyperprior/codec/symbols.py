"""Integers to range-coded strings and back, with the model's tables, escapes and a checksum.

`Encoder` and `Decoder` mirror each other: the decoder returns the values in the parts and order in which the encoder
got them. Both process a batch of images of one padded size. `encode` and `decode` do this for one part; they also work
in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from hyperprior.codec import container
from hyperprior.codec.container import Stream
from hyperprior.codec.tables import Tables
from hyperprior.errors import BitstreamError


def encode(handle: tf.Tensor, tables: Tables, values: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Appends `values` [B, …] int32, each with the table of its `index`, to range encoders of shape [B].

    Returns the encoders, and a mask of the values that must be stored as escapes: [B, …] bool.
    """
    symbols = values - tf.gather(tables.first, index)
    escape = tf.gather(tables.escape, index)
    is_outside = (symbols < 0) | (symbols >= escape)
    handle = tfc.entropy_encode_index(handle, index, tf.where(is_outside, escape, symbols))
    return handle, is_outside


def decode(handle: tf.Tensor, tables: Tables, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The inverse of `encode`: (range decoders, values [B, …] int32, mask of the escapes [B, …] bool)."""
    handle, symbols = tfc.entropy_decode_index(handle, index, tf.shape(index)[1:], tf.int32)
    return handle, symbols + tf.gather(tables.first, index), symbols >= tf.gather(tables.escape, index)


class Coded:
    """The part of one image that was coded so far: its symbols' number and checksum, and its escapes."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.checksum = container.size_checksum(height, width)
        self.count = 0
        self.escapes: list[np.ndarray] = [np.empty(0, np.int16)]

    def add(self, values: np.ndarray) -> None:
        """Adds the next values to the checksum."""
        self.checksum = container.checksum(values, self.count, self.checksum)
        self.count += values.size


class Encoder:
    """Codes the latents of images of (height, width) with one padded size."""

    def __init__(self, tables: Tables, sizes: Sequence[tuple[int, int]]):
        self.tables, self.images = tables, [Coded(*size) for size in sizes]
        self.handle = tfc.create_range_encoder([len(sizes)], tables.lookup)

    def put(self, values: np.ndarray, index: np.ndarray | tf.Tensor) -> None:
        """Appends [B, …] integers, each with the table of its `index`."""
        integers = values.astype(np.int32, copy=False)
        self.handle, outside = encode(self.handle, self.tables, integers, index)
        for image, own, is_outside in zip(self.images, integers, outside.numpy()):
            if is_outside.any():
                image.escapes.append(own[is_outside].astype(np.int16))
            image.add(own)

    def finish(self, fingerprint: bytes) -> list[Stream]:
        """The stream of each image, for the model with this fingerprint."""
        strings = tfc.entropy_encode_finalize(self.handle).numpy()
        return [
            Stream(fingerprint, image.height, image.width, string, np.concatenate(image.escapes), image.checksum)
            for string, image in zip(strings, self.images)
        ]


class Decoder:
    """Decodes the latents of streams with one padded size."""

    def __init__(self, tables: Tables, streams: Sequence[Stream]):
        self.tables, self.streams = tables, streams
        self.images = [Coded(stream.height, stream.width) for stream in streams]
        self.used_escapes = [0] * len(streams)
        self.handle = tfc.create_range_decoder([stream.coded for stream in streams], tables.lookup)

    def take(self, index: np.ndarray | tf.Tensor) -> np.ndarray:
        """The next integers, one for each `index` [B, …] of a table: int32. Raises BitstreamError."""
        self.handle, decoded, escaped = decode(self.handle, self.tables, index)
        values, is_escaped = decoded.numpy(), escaped.numpy()
        for i, stream in enumerate(self.streams):
            if count := np.count_nonzero(is_escaped[i]):
                begin = self.used_escapes[i]
                stored = stream.escapes[begin : begin + count]
                if len(stored) < count:
                    raise wrong_symbols()
                values[i][is_escaped[i]] = stored
                self.used_escapes[i] += count
            self.images[i].add(values[i])
        return values

    def finish(self) -> None:
        """Raises BitstreamError if the decoded symbols are not the encoded ones."""
        for stream, image, used in zip(self.streams, self.images, self.used_escapes):
            if image.checksum != stream.checksum or used != len(stream.escapes):
                raise wrong_symbols()


def wrong_symbols() -> BitstreamError:
    return BitstreamError(
        "decodes to other symbols than were encoded: its bytes and its CRC-32 were changed, or this machine's "
        "arithmetic is not IEEE 754"
    )
