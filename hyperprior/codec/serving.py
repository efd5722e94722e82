"""The codec as a TensorFlow SavedModel: whole `.hyp` files in and out, in a graph.

A process that loads the SavedModel imports tensorflow_compression or tensorflow_compression_ops, for its
range coder, and nothing of this package. The graph makes the checks of `container`; they raise InvalidArgumentError. It
processes whole images, not tiles, so its memory grows with the image.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hyperprior.codec import adaptation, container
from hyperprior.codec.adaptation import LEAST_SHIFT, SHIFTS, VALUES
from hyperprior.codec.codec import Codec
from hyperprior.codec.exact import SUM_BITS
from hyperprior.codec.tables import LARGEST, Tables
from hyperprior.codec.tensorflow_engine import round_to_int16
from hyperprior.config import DOWNSAMPLING
from hyperprior.model.hyperprior import pad


def save(codec: Codec, operations: Any, folder: Path) -> None:
    """Writes a SavedModel with the signatures `compress` (image → file) and `decompress` (file → image).

    `operations`: of `native.load_operations`; `image`: [H, W, 3] uint8; `file`: a scalar string, the same bytes as
    `Codec.compress` gives for images of one tile.
    """
    module, engine = tf.Module(), codec.tensorflow_engine
    module.weights = [v for name, v in engine.model.named_variables().items() if not name.startswith("h_s/")]

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8, "image")], autograph=False)
    def compress(image: tf.Tensor) -> Any:
        return {"file": compress_in_graph(codec, operations, image)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.string, "file")], autograph=False)
    def decompress(file: tf.Tensor) -> Any:
        return {"image": decompress_in_graph(codec, operations, file)}

    tf.saved_model.save(module, str(folder), {"compress": compress, "decompress": decompress})


def compress_in_graph(codec: Codec, operations: Any, image: tf.Tensor) -> tf.Tensor:
    height, width = tf.unstack(tf.shape(image)[:2])
    is_allowed = (tf.minimum(height, width) > 0) & (tf.maximum(height, width) <= container.MAX_SIDE)
    is_allowed &= tf.cast(height, tf.int64) * tf.cast(width, tf.int64) <= container.MAX_PIXELS
    check = tf.debugging.Assert(is_allowed, ["image size not accepted", height, width])
    with tf.control_dependencies([check]):
        image = tf.identity(image)
    engine = codec.tensorflow_engine
    y = engine.analyse_in_graph(pad(image[None]))
    z = engine.hyper_analyse_in_graph(y)
    index = indexes(codec, z)
    nearest = tf.cast(tf.minimum(tf.round(tf.abs(y)), float(LARGEST)), tf.int32)
    y = round_to_int16(y - tf.sign(y) * tf.gather_nd(codec.dead_zone, tf.stack([index, nearest], -1)))
    d = differences(y[0])
    kind, shift = choose(codec, y[0], d, index[0])
    y, index = tf.where(kind > 0, d[None], y), add_shift(codec, index, shift)
    kind_table, shift_table = codec.adaptation_tables
    parts = [  # values, and their tables
        (kind[None], tf.fill(tf.shape(kind[None]), kind_table)),
        (shift[None], tf.where(kind != 0, shift_table, 0)[None]),
        (z, tf.broadcast_to(codec.z_index, tf.shape(z))),
        (y, index),
    ]
    handle, escapes = operations.create_range_encoder([1], codec.tables.lookup), tf.zeros([0], tf.int32)
    for values, tables in parts:
        handle, is_outside = encode(operations, handle, codec.tables, values, tables)
        escapes = tf.concat([escapes, tf.boolean_mask(values, is_outside)], 0)
    coded = operations.entropy_encode_finalize(handle)[0]
    body = tf.strings.join(
        [
            container.MAGIC + bytes([container.VERSION]) + bytes.fromhex(codec.fingerprint),
            to_bytes([height, width], 2),
            to_bytes([tf.strings.length(coded), tf.size(escapes)], 4),
            to_bytes([checksum(height, width, *(values for values, _ in parts))], 4),
            coded,
            to_bytes(escapes, 2),
        ]
    )
    return tf.strings.join([body, to_bytes([crc32(tf.io.decode_raw(body, tf.uint8))], 4)])


def decompress_in_graph(codec: Codec, operations: Any, file: tf.Tensor) -> tf.Tensor:
    version, height, width, coded, escapes, stored_checksum = read(file, codec.fingerprint)
    rows, columns = (-(-side // DOWNSAMPLING) for side in (height, width))
    handle, values = operations.create_range_decoder([coded], codec.tables.lookup), []

    def take(index: tf.Tensor) -> tf.Tensor:
        nonlocal handle, escapes
        handle, part, is_escaped = decode(operations, handle, codec.tables, index)
        count = tf.math.count_nonzero(is_escaped, dtype=tf.int32)
        values.append(fill_escapes(part, is_escaped, escapes[:count]))
        escapes = escapes[count:]
        return values[-1]

    channels, (kind_table, shift_table) = codec.config.model.latent_channels, codec.adaptation_tables
    adapted = tf.where(version > 1, channels, 0)
    kind = take(tf.fill([1, adapted], kind_table))
    shift = take(tf.where(kind != 0, shift_table, 0))
    kind, shift = (tf.ensure_shape(tf.pad(x[0], [[0, channels - adapted]]), [channels]) for x in (kind, shift))
    z = take(tf.broadcast_to(codec.z_index, (1, rows, columns, len(codec.z_index))))
    y = take(add_shift(codec, indexes(codec, z), shift))
    is_same = (checksum(height, width, *values) == stored_checksum) & (tf.size(escapes) == 0)
    tf.debugging.Assert(is_same, ["decodes to other symbols than were encoded"])
    y = tf.where(kind > 0, restore(y[0])[None], y)
    return codec.tensorflow_engine.synthesise_in_graph(tf.cast(y, tf.float32))[0, :height, :width]


def indexes(codec: Codec, z: tf.Tensor) -> tf.Tensor:
    """`exact.indexes` of the integers of ẑ, in a graph."""
    sums = codec.tensorflow_engine.index_sums_in_graph(z) * 2.0**-SUM_BITS
    return tf.cast(tf.round(tf.clip_by_value(sums, 0.0, codec.config.model.num_scales - 1.0)), tf.int32)


def encode(
    operations: Any, handle: tf.Tensor, tables: Tables, values: tf.Tensor, index: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """`symbols.Encoder.put` in a graph: (range encoders, where the values [B, …] int32 are stored as escapes)."""
    symbols = values - tf.gather(tables.first, index)
    escape = tf.gather(tables.escape, index)
    is_outside = (symbols < 0) | (symbols >= escape)
    return operations.entropy_encode_index(handle, index, tf.where(is_outside, escape, symbols)), is_outside


def decode(operations: Any, handle: tf.Tensor, tables: Tables, index: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """`symbols.Decoder.take` in a graph: (range decoders, values [B, …] int32, where an escape replaces a value)."""
    handle, symbols = operations.entropy_decode_index(handle, index, tf.shape(index)[1:], tf.int32)
    return handle, symbols + tf.gather(tables.first, index), symbols >= tf.gather(tables.escape, index)


def read(file: tf.Tensor, fingerprint: str) -> tuple[tf.Tensor, ...]:
    """`container.read` in a graph: int32 version, height, width, the coded string, int32 escapes [E], int64 checksum.

    Every check passes before any part of the result is computed.
    """
    size = tf.strings.length(file)
    checks = [tf.debugging.Assert(size >= container.OVERHEAD, ["cut off", size])]
    data = tf.io.decode_raw(file, tf.uint8)
    version = tf.cast(data[4], tf.int32)
    is_known = tf.reduce_all(data[:4] == list(container.MAGIC)) & (version >= 1) & (version <= container.VERSION)
    checks += [tf.debugging.Assert(is_known, ["not a .hyp file of a version up to", container.VERSION])]
    own_fingerprint = tf.constant(list(bytes.fromhex(fingerprint)), tf.uint8)
    checks += [tf.debugging.Assert(tf.reduce_all(data[5:13] == own_fingerprint), ["written with another model"])]
    height, width = tf.unstack(from_bytes(data[13:17], 2), num=2)
    length, count, stored_checksum = tf.unstack(from_bytes(data[17:29], 4), num=3)
    total = container.OVERHEAD + length + 2 * count
    checks += [tf.debugging.Assert(total == tf.cast(size, tf.int64), ["length does not match the header"])]
    crc = from_bytes(data[-4:], 4)[0]
    checks += [tf.debugging.Assert(crc == crc32(data[:-4]), ["bytes do not match their CRC-32"])]
    is_allowed = (tf.minimum(height, width) > 0) & (height * width <= container.MAX_PIXELS)
    checks += [tf.debugging.Assert(is_allowed, ["image size not accepted", height, width])]
    with tf.control_dependencies(checks):
        data, file, version, height, width = map(tf.identity, (data, file, version, height, width))
    end = container.HEADER.size + length
    escapes = from_bytes(data[end : end + 2 * count], 2)
    return (
        version,
        tf.cast(height, tf.int32),
        tf.cast(width, tf.int32),
        tf.strings.substr(file, container.HEADER.size, tf.cast(length, tf.int32)),
        tf.cast(tf.where(escapes < 2**15, escapes, escapes - 2**16), tf.int32),
        stored_checksum,
    )


# The functions of `adaptation`, in a graph -----------------------------------------------------------------


def choose(codec: Codec, y: tf.Tensor, d: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    step = -(-tf.shape(y)[0] * tf.shape(y)[1] // adaptation.SAMPLE)
    values, d, index = (tf.ensure_shape(x[::step], [None, None, x.shape[2]]) for x in (y, d, index))
    follows = 4 * tf.reduce_sum(tf.abs(d), [0, 1]) < 3 * tf.reduce_sum(tf.abs(values), [0, 1])
    costs = tf.constant(codec.costs)
    rows = costs.shape[1] * index + VALUES

    def cost(values: tf.Tensor, row: Any) -> tf.Tensor:
        places = rows + tf.clip_by_value(values, -VALUES, VALUES) + row * costs.shape[1]
        return tf.reduce_sum(tf.gather(tf.reshape(costs, [-1]), places), [0, 1])

    coded = tf.where(follows, d, values)
    totals = tf.map_fn(lambda row: cost(coded, row), tf.range(SHIFTS))
    pays = cost(values, -LEAST_SHIFT) - tf.reduce_min(totals, 0) > adaptation.LEAST_GAIN // step
    kind, shift = tf.where(follows, 1, -1), tf.argmin(totals, 0, tf.int32) + LEAST_SHIFT
    return tf.where(pays, kind, 0), tf.where(pays, shift, 0)


def add_shift(codec: Codec, index: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(index + shift, 0, codec.config.model.num_scales - 1)


def wrap(x: tf.Tensor) -> tf.Tensor:
    return (x + 2**15) % 2**16 - 2**15


def differences(y: tf.Tensor) -> tf.Tensor:
    above = tf.concat([tf.pad(y[:1, :-1], [[0, 0], [1, 0], [0, 0]]), y[:-1]], 0)
    left = tf.concat([above[:, :1], y[:, :-1]], 1)
    return wrap(y - (left + above) // 2)


def restore(d: tf.Tensor) -> tf.Tensor:
    order = tf.where(tf.shape(d)[0] > tf.shape(d)[1], [1, 0, 2], [0, 1, 2])
    d = tf.transpose(d, order)
    height, width, channels = tf.unstack(tf.shape(d))
    rows = tf.range(height)[:, None]
    padded = tf.reshape(tf.pad(d, [[0, 0], [0, height], [0, 0]]), [-1, channels])
    skewed = tf.reshape(padded[:-height], [height, width + height - 1, channels])

    def next_diagonal(column: tf.Tensor, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        number, d = inputs
        above = tf.concat([column[:1], column[:-1]], 0)
        left = tf.where(rows == number, above, column)
        return wrap(d + (left + above) // 2)

    inputs = tf.range(width + height - 1), tf.transpose(skewed, [1, 0, 2])
    diagonals = tf.scan(next_diagonal, inputs, tf.zeros([height, channels], tf.int32))
    flat = tf.pad(tf.reshape(tf.transpose(diagonals, [1, 0, 2]), [-1, channels]), [[0, height], [0, 0]])
    return tf.transpose(tf.reshape(flat, [height, width + height, channels])[:, :width], order)


def fill_escapes(values: tf.Tensor, is_escaped: tf.Tensor, stored: tf.Tensor) -> tf.Tensor:
    """`values`, with the stored values in the places of the escapes."""
    places = tf.where(is_escaped)
    is_same = tf.shape(places)[0] == tf.size(stored)
    with tf.control_dependencies([tf.debugging.Assert(is_same, ["decodes to other symbols than were encoded"])]):
        return tf.tensor_scatter_nd_update(values, places, stored)


def checksum(height: tf.Tensor, width: tf.Tensor, *parts: tf.Tensor) -> tf.Tensor:
    """`container.checksum` of the size and the symbols in `parts`, in this order: int64."""
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


# CRC-32 ---------------------------------------------------------------------------------------------------


def crc32(data: tf.Tensor) -> tf.Tensor:
    """zlib's CRC-32 of at least four bytes [n] uint8, as int64, computed by a tree of log n levels.

    zlib's `crc32_combine` joins the CRCs of two parts by the same rule. A CRC is linear over bits. So the register
    after A followed by B is the XOR of two registers: the one after B, and the one after A, advanced over as many zero
    bytes as B has. The leaves of the tree are single bytes. Each level joins neighbours of equal length, so one table
    of advances serves a whole level. Zeros in front do not change a register that starts from zero, so a level of odd
    length gets a zero in front. zlib's register starts from ones, which has the same effect as inverting the first four
    bytes.
    """
    after_byte, advances = crc_tables()
    size = tf.size(data)
    ones = tf.concat([tf.fill([4], tf.constant(255, tf.uint8)), tf.zeros([size - 4], tf.uint8)], 0)
    registers = tf.gather(after_byte, tf.cast(tf.bitwise.bitwise_xor(data, ones), tf.int32))
    tables = tf.constant(advances)

    def join_neighbours(level: tf.Tensor, registers: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        registers = tf.concat([tf.zeros([tf.size(registers) % 2], tf.int64), registers], 0)
        pairs = tf.reshape(registers, [-1, 2])
        left, joined = pairs[:, 0], pairs[:, 1]
        for place in range(4):
            digit = tf.bitwise.bitwise_and(tf.bitwise.right_shift(left, tf.constant(8 * place, tf.int64)), 255)
            joined = tf.bitwise.bitwise_xor(joined, tf.gather(tables[level, place], digit))
        return level + 1, joined

    _, registers = tf.while_loop(
        lambda level, registers: tf.size(registers) > 1,
        join_neighbours,
        [0, registers],
        shape_invariants=[tf.TensorShape([]), tf.TensorShape([None])],
    )
    return tf.bitwise.bitwise_xor(registers[0], 2**32 - 1)


def crc_tables() -> tuple[np.ndarray, np.ndarray]:
    """(`after_byte`: [256] int64, the register after each byte, from zero; `advances`: [31, 4, 256] int64, for each
    level, place and digit of a register, the register that this digit becomes over 2^level zero bytes)."""
    after_byte = np.array([zlib.crc32(bytes([byte ^ 255])) ^ 0xFF000000 for byte in range(256)])
    # One zero byte shifts a register by a place. The digit that falls out is replaced like a byte, by `after_byte`.
    advances = [np.stack([after_byte, *(np.arange(256) << 8 * place for place in range(3))])]
    for _ in range(30):
        advances.append(advance_twice(advances[-1]))
    return after_byte, np.stack(advances)


def advance_twice(advance: np.ndarray) -> np.ndarray:
    """The table [4, 256] of two advances, one after the other."""
    result = np.zeros_like(advance)
    for place in range(4):
        result ^= advance[place][(advance >> 8 * place) & 255]
    return result
