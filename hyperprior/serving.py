"""The codec as a TensorFlow SavedModel: whole `.hyp` files in and out, in a graph.

A process that loads it needs `import tensorflow_compression`, for its range coder, and nothing of this
package. It makes the checks of `container`, which raise InvalidArgumentError, and handles whole images, not
tiles: memory grows with the image.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from hyperprior import container, entropy, model
from hyperprior.codec import Codec, integers
from hyperprior.config import DOWNSAMPLING


def save(codec: Codec, folder: Path) -> None:
    """Writes a SavedModel with the signatures `compress` (image → file) and `decompress` (file → image).

    `image`: [H, W, 3] uint8; `file`: a scalar string, the same bytes as `Codec.compress` gives for images of
    one tile.
    """
    module = tf.Module()
    module.weights = list(codec._model.named_variables().values())

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8, "image")], autograph=False)
    def compress(image: tf.Tensor) -> Any:
        height, width = tf.unstack(tf.shape(image)[:2])
        within = (tf.minimum(height, width) > 0) & (tf.maximum(height, width) <= container.MAX_SIDE)
        with tf.control_dependencies([tf.debugging.Assert(within, ["a side is not within 1 to 65535", height, width])]):
            image = tf.identity(image)
        y = codec.analyse(model.pad(image[None]))
        z = codec.hyper_analyse(y)
        y = integers(y)
        z_index = tf.broadcast_to(codec.z_index, tf.shape(z))
        handle = tfc.create_range_encoder([1], codec.tables.lookup)
        handle, z_outside = entropy.encode(handle, codec.tables, z, z_index)
        handle, y_outside = entropy.encode(handle, codec.tables, y, codec.indexes(z))
        coded = tfc.entropy_encode_finalize(handle)[0]
        escapes = tf.concat([tf.boolean_mask(z, z_outside), tf.boolean_mask(y, y_outside)], 0)
        body = tf.strings.join(
            [
                container.MAGIC + bytes([container.VERSION]) + bytes.fromhex(codec.fingerprint),
                to_bytes([height, width], 2),
                to_bytes([tf.strings.length(coded), tf.size(escapes)], 4),
                to_bytes([checksum(height, width, z, y)], 4),
                coded,
                to_bytes(escapes, 2),
            ]
        )
        return {"file": tf.strings.join([body, to_bytes([crc32(tf.io.decode_raw(body, tf.uint8))], 4)])}

    @tf.function(input_signature=[tf.TensorSpec([], tf.string, "file")], autograph=False)
    def decompress(file: tf.Tensor) -> Any:
        size = tf.strings.length(file)
        checks = [tf.debugging.Assert(size >= container.OVERHEAD, ["cut off", size])]
        data = tf.io.decode_raw(file, tf.uint8)
        start = tf.constant(list(container.MAGIC + bytes([container.VERSION])), tf.uint8)
        checks += [tf.debugging.Assert(tf.reduce_all(data[:5] == start), ["not a .hyp file of version 1"])]
        ours = tf.constant(list(bytes.fromhex(codec.fingerprint)), tf.uint8)
        checks += [tf.debugging.Assert(tf.reduce_all(data[5:13] == ours), ["written with another model"])]
        height, width = tf.unstack(from_bytes(data[13:17], 2), num=2)
        length, count, expected = tf.unstack(from_bytes(data[17:29], 4), num=3)
        total = container.OVERHEAD + length + 2 * count
        checks += [tf.debugging.Assert(total == tf.cast(size, tf.int64), ["length does not match the header"])]
        crc = from_bytes(data[-4:], 4)[0]
        checks += [tf.debugging.Assert(crc == crc32(data[:-4]), ["bytes do not match their CRC-32"])]
        within = (tf.minimum(height, width) > 0) & (height * width <= container.MAX_PIXELS)
        checks += [tf.debugging.Assert(within, ["image size not accepted", height, width])]
        with tf.control_dependencies(checks):  # nothing below begins before
            data, file, height, width = map(tf.identity, (data, file, height, width))
        end = container.HEADER.size + length
        escapes = from_bytes(data[end : end + 2 * count], 2)
        escapes = tf.cast(tf.where(escapes < 2**15, escapes, escapes - 2**16), tf.int32)

        rows, columns = (tf.cast(-(-side // DOWNSAMPLING), tf.int32) for side in (height, width))
        coded = tf.strings.substr(file, container.HEADER.size, tf.cast(length, tf.int32))
        handle = tfc.create_range_decoder([coded], codec.tables.lookup)
        z_index = tf.broadcast_to(codec.z_index, (1, rows, columns, len(codec.z_index)))
        handle, z, z_escaped = entropy.decode(handle, codec.tables, z_index)
        in_z = tf.math.count_nonzero(z_escaped, dtype=tf.int32)
        z = fill(z, z_escaped, escapes[:in_z])
        handle, y, y_escaped = entropy.decode(handle, codec.tables, codec.indexes(z))
        y = fill(y, y_escaped, escapes[in_z:])
        tf.debugging.Assert(checksum(height, width, z, y) == expected, ["decodes to other symbols than were encoded"])
        return {
            "image": codec.synthesise(tf.cast(y, tf.float32))[
                0, : tf.cast(height, tf.int32), : tf.cast(width, tf.int32)
            ]
        }

    signatures = {"compress": compress, "decompress": decompress}
    tf.saved_model.save(module, str(folder), signatures)


def fill(values: tf.Tensor, escaped: tf.Tensor, stored: tf.Tensor) -> tf.Tensor:
    where = tf.where(escaped)
    tf.debugging.Assert(tf.shape(where)[0] == tf.size(stored), ["decodes to other symbols than were encoded"])
    return tf.tensor_scatter_nd_update(values, where, stored)


def checksum(height: tf.Tensor, width: tf.Tensor, *parts: tf.Tensor) -> tf.Tensor:
    """`container.checksum` of the size and the symbols in parts, one after another: int64."""
    values = tf.cast(tf.concat([tf.reshape(part, [-1]) for part in parts], 0), tf.int64)
    weights = 2 * tf.range(tf.size(values, tf.int64)) + 1
    size = tf.cast(height, tf.int64) * 2**16 + tf.cast(width, tf.int64)
    return (size + tf.reduce_sum(values * weights % 2**32)) % 2**32


def to_bytes(values: Any, width: int) -> tf.Tensor:
    """Integers as one little-endian string, `width` bytes each."""
    values = tf.cast(values, tf.int64)[:, None]
    digits = tf.bitwise.bitwise_and(tf.bitwise.right_shift(values, tf.range(0, 8 * width, 8, tf.int64)), 255)
    letters = tf.constant([bytes([i]) for i in range(256)])
    return tf.strings.reduce_join(tf.gather(letters, tf.reshape(digits, [-1])))


def from_bytes(data: tf.Tensor, width: int) -> tf.Tensor:
    """Little-endian unsigned integers in uint8 data: [n] int64."""
    digits = tf.reshape(tf.cast(data, tf.int64), [-1, width])
    return tf.reduce_sum(digits * tf.constant([256**i for i in range(width)], tf.int64), axis=1)


def crc32(data: tf.Tensor) -> tf.Tensor:
    """zlib's CRC-32 of at least four bytes [n] uint8, as int64, in log n steps.

    A CRC is linear over bits: that of A followed by B is the CRC of A, moved past as many zero bytes as B
    has, XOR that of B. Starting from ones is inverting the first four bytes.
    """
    # The register after byte b from zero; and, digit by digit, after 2^level zero bytes.
    table = np.array([zlib.crc32(bytes([b ^ 255])) ^ 0xFF000000 for b in range(256)])
    moves = [np.stack([table, *(np.arange(256) << 8 * j for j in range(3))])]
    for _ in range(30):
        moves.append(twice(moves[-1]))
    constants = tf.constant(np.stack(moves))

    size = tf.size(data)
    ones = tf.concat([tf.fill([4], tf.constant(255, tf.uint8)), tf.zeros([size - 4], tf.uint8)], 0)
    leaves = tf.gather(table, tf.cast(tf.bitwise.bitwise_xor(data, ones), tf.int32))

    def combine(level: tf.Tensor, parts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parts = tf.concat([tf.zeros([tf.size(parts) % 2], tf.int64), parts], 0)
        pairs = tf.reshape(parts, [-1, 2])
        left, right = pairs[:, 0], pairs[:, 1]
        for j in range(4):
            digit = tf.bitwise.bitwise_and(tf.bitwise.right_shift(left, tf.constant(8 * j, tf.int64)), 255)
            right = tf.bitwise.bitwise_xor(right, tf.gather(constants[level, j], digit))
        return level + 1, right

    _, parts = tf.while_loop(
        lambda level, parts: tf.size(parts) > 1,
        combine,
        [0, leaves],
        shape_invariants=[tf.TensorShape([]), tf.TensorShape([None])],
    )
    return tf.bitwise.bitwise_xor(parts[0], 2**32 - 1)


def twice(move: np.ndarray) -> np.ndarray:
    """A move of a register, [4 digits, 256] int64, made two times."""
    result = np.zeros_like(move)
    for j in range(4):
        result ^= move[j][(move >> 8 * j) & 255]
    return result
