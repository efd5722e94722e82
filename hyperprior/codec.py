"""An exported model as a codec: images to self-describing bytes and back.

The symbols of a file depend on integers and on tables alone (`exact`, `entropy`), so every machine decodes
those that were encoded; pixels come from a float transform and may differ by one level between machines.

Images are processed in tiles and strips, each with as much of its surroundings as its result depends on, so
memory beyond the image and its latents stays constant and there are no seams: the transforms give in a tile
what they would give in the whole image. The file does not tell how it was tiled.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from hyperprior import checkpoint, config, container, entropy, exact, model, models, rd, search
from hyperprior.config import DOWNSAMPLING
from hyperprior.errors import BitstreamError, ConfigError, DataError

# One element of y stands for 16 x 16 pixels, one of z for 4 x 4 elements of y.
Y_PIXELS, Z_ELEMENTS = 16, 4
TILE = 64  # elements of y along a side: 1024 pixels
STRIP_AREA = 4096  # elements of z, so that images below 16 megapixels take a single strip
# How far the transforms reach: g_a 30 pixels, g_s 2 elements of y, h_a 7 of y, h_s 2 of z.
G_A_MARGIN, G_S_MARGIN, H_A_MARGIN, H_S_MARGIN = 2, 2, 2, 2  # in elements of y, y, z, z
SEARCH_MARGIN = 2  # in elements of z: the error's gradient reaches 4 elements of y, h_s 2 of z
BATCH_PIXELS = 2**20  # images are batched up to this many pixels


class Span(NamedTuple):
    """Elements [start, stop) of an axis, to be computed from [begin, end)."""

    start: int
    stop: int
    begin: int
    end: int

    def inside(self, factor: int = 1) -> slice:
        """Where [start, stop) lies in a result computed from [begin, end)."""
        return slice((self.start - self.begin) * factor, (self.stop - self.begin) * factor)


def spans(length: int, size: int, margin: int) -> Iterator[Span]:
    """[0, length) in pieces of at most `size`, as even as can be."""
    count = -(-length // size)
    edges = [length * i // count for i in range(count + 1)]
    for start, stop in zip(edges, edges[1:]):
        yield Span(start, stop, max(0, start - margin), min(length, stop + margin))


class Codec:
    """A model that compresses and decompresses.

    `fingerprint`: 16 hexadecimal digits, in every file it writes; `config`: of the run that trained it;
    `info`: what export noted (step, losses, the cost of exactness).
    """

    def __init__(self, arrays: dict[str, np.ndarray], settings: config.Config, info: dict[str, Any], origin: str):
        self.config, self.info, self.origin = settings, info, origin
        self.fingerprint = fingerprint(arrays)
        self._model = model.ScaleHyperprior(settings.model)
        del self._model.h_s  # the integers stand for it
        arrays = dict(arrays)
        self.layers = [(arrays.pop(f"h_s/{i}/kernel"), arrays.pop(f"h_s/{i}/bias")) for i in range(3)]
        self.z_offsets = arrays.pop("z_offsets")
        self.tables = entropy.Tables(*(arrays.pop(f"tables/{name}") for name in entropy.Tables._fields))
        checkpoint.assign(self._model.named_variables(), arrays, origin)
        m, c = settings.model.latent_channels, settings.model.hyper_channels
        self.z_index = np.arange(settings.model.num_scales, settings.model.num_scales + c, dtype=np.int32)

        def function(run: Any, channels: int, dtype: tf.DType) -> Any:
            return graph(run, [tf.TensorSpec([None, None, None, channels], dtype)])

        self.analyse = function(self._analyse, 3, tf.uint8)
        self.hyper_analyse = function(self._hyper_analyse, m, tf.float32)
        self.index_sums = function(lambda z: exact.index_sums(z, self.z_offsets, self.layers), c, tf.int32)
        self.indexes = function(self._indexes, c, tf.int32)
        self.synthesise = function(self._synthesise, m, tf.float32)
        shapes = [[1, None, None, channels] for channels in (m, m, 3, 1, 1)]
        signature = [*(tf.TensorSpec(shape, tf.float32) for shape in shapes), tf.TensorSpec([], tf.int32)]
        self.search = graph(self._search, signature)

    def trained(self) -> checkpoint.Trained:
        """The weights, for a run to start from; those of h_s to the precision of its integers."""
        arrays = {name: variable.numpy() for name, variable in self._model.named_variables().items()}
        arrays |= exact.weights(self.layers, self.config.model)
        return checkpoint.Trained(arrays, self.config, self.info["step"])

    # The transforms, on whole tensors ---------------------------------------------------------------------

    def _analyse(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, 3] uint8, sides multiples of 16 → y [B, H/16, W/16, M] float32."""
        return self._model.g_a(tf.cast(x, tf.float32) / 255.0)

    def _hyper_analyse(self, y: tf.Tensor) -> tf.Tensor:
        """y → the integers of ẑ: int32, within int16."""
        z = self._model.h_a(tf.abs(y))
        return integers(z - exact.offset_values(self.z_offsets))

    def _indexes(self, z: tf.Tensor) -> tf.Tensor:
        return exact.indexes(exact.index_sums(z, self.z_offsets, self.layers), self.config.model.num_scales)

    def _synthesise(self, y: tf.Tensor) -> tf.Tensor:
        """ŷ [B, h, w, M] float32 → pixels [B, 16h, 16w, 3] uint8."""
        x = tf.clip_by_value(self._model.g_s(y), 0.0, 1.0)
        return tf.cast(tf.round(x * 255.0), tf.uint8)

    def _search(
        self, y: tf.Tensor, scales: tf.Tensor, x: tf.Tensor, real: tf.Tensor, inside: tf.Tensor, rounds: tf.Tensor
    ) -> tf.Tensor:
        weight = rd.lagrangian(0.0, 1.0 / 3.0, self.config.loss.lmbda, "mse")  # an MSE is over three channels
        return search.search(self._model.g_s, y, scales, x, real, inside, weight, rounds)

    # Images -----------------------------------------------------------------------------------------------

    def compress(self, image: np.ndarray, effort: int = 0) -> bytes:
        """A whole `.hyp` file of an [H, W, 3] uint8 image, sides 1 to 65,535. Raises DataError.

        `effort`: rounds of `search` for cheaper latents. Raises ConfigError as `check_effort` does.
        """
        return self.compress_batch([image], effort)[0]

    def compress_batch(self, images: Sequence[np.ndarray], effort: int = 0) -> list[bytes]:
        """The files of several images: small ones of one size are faster together."""
        self.check_effort(effort)
        images = [np.asarray(image) for image in images]
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise DataError(f"an image is [H, W, 3] uint8; found {list(image.shape)} {image.dtype}")
            container.check_size(*image.shape[:2])
        files: list[bytes] = [b""] * len(images)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        for group in batches(sizes):
            y, z = self._latents([images[i] for i in group])
            if effort:
                for place, i in enumerate(group):
                    self._improve(y[place : place + 1], z[place : place + 1], images[i], effort)
            for i, coded in zip(group, self._encode(y, z, [sizes[i] for i in group])):
                height, width = sizes[i]
                files[i] = container.write(container.Stream(bytes.fromhex(self.fingerprint), height, width, *coded))
        return files

    def decompress(self, data: bytes, max_pixels: int = container.MAX_PIXELS) -> np.ndarray:
        """The [H, W, 3] uint8 image of a `.hyp` file of this model. Raises BitstreamError."""
        return self.decompress_batch([data], max_pixels)[0]

    def decompress_batch(self, files: Sequence[bytes], max_pixels: int = container.MAX_PIXELS) -> list[np.ndarray]:
        """The images of several files. Raises BitstreamError if any of them cannot be decoded."""
        streams = [self.read(data, max_pixels) for data in files]
        images: list[Optional[np.ndarray]] = [None] * len(files)
        sizes = [(s.height, s.width) for s in streams]
        for group in batches(sizes):
            y, _ = self._decode([streams[i] for i in group])
            for i, image in zip(group, self._pixels(y, [sizes[i] for i in group])):
                images[i] = image
        return images  # type: ignore[return-value]

    def check_effort(self, effort: int) -> None:
        """Raises ConfigError for an effort below 0, or above it with a model that was trained for MS-SSIM."""
        if effort < 0:
            raise ConfigError(f"effort is {effort}; it is a number of rounds, 0 or more")
        if effort and self.config.loss.metric != "mse":
            raise ConfigError(
                f"effort {effort} searches for smaller squared errors; {self.origin} was trained for "
                f"{self.config.loss.metric}: leave effort at 0"
            )

    def read(self, data: bytes, max_pixels: int = container.MAX_PIXELS) -> container.Stream:
        """The checked contents of a file. Raises BitstreamError, also for a file of another model."""
        stream = container.read(bytes(data), max_pixels)
        if stream.fingerprint.hex() != self.fingerprint:
            raise BitstreamError(
                f"written with model {stream.fingerprint.hex()}; {self.origin} is model {self.fingerprint}: "
                f"give the one that wrote it"
            )
        return stream

    def latents(self, data: bytes) -> np.ndarray:
        """ŷ of a file: [H/16, W/16, M] int16 (H, W rounded up to multiples of 64). Raises BitstreamError."""
        return self._decode([self.read(data)])[0][0]

    def estimated_bits(self, data: bytes) -> float:
        """−log2 p of a file's latents under the model's own densities: y and z together. Raises BitstreamError."""
        y, z = self._decode([self.read(data)])
        y = y.astype(np.float32)
        z_hat = z.astype(np.float32) + exact.offset_values(self.z_offsets)
        total = float(model.bits(self._model.prior, z_hat)[0])
        for rows in self._strips(z):
            sums = self.index_sums(z[:, rows.begin : rows.end])[:, rows.inside(Z_ELEMENTS)]
            scales = exact.scales(sums, self.config.model)
            total += float(model.gaussian_bits(y[:, rows.start * Z_ELEMENTS : rows.stop * Z_ELEMENTS], scales)[0])
        return total

    # Latents and symbols ----------------------------------------------------------------------------------

    def _latents(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """ŷ [B, h, w, M] float32 and the integers of ẑ [B, h/4, w/4, C] of images with one padded size."""
        height, width = (container.blocks(side) * Z_ELEMENTS for side in images[0].shape[:2])
        y = np.empty((len(images), height, width, self.config.model.latent_channels), np.float32)
        for rows in spans(height, TILE, G_A_MARGIN):
            for columns in spans(width, TILE, G_A_MARGIN):
                tile = self.analyse(np.stack([cut(image, rows, columns) for image in images])).numpy()
                y[:, rows.start : rows.stop, columns.start : columns.stop] = tile[:, rows.inside(), columns.inside()]
        shape = (height // Z_ELEMENTS, width // Z_ELEMENTS, self.config.model.hyper_channels)
        z = np.empty((len(images), *shape), np.int32)
        for rows in spans(z.shape[1], strip_rows(z.shape[2]), H_A_MARGIN):
            strip = self.hyper_analyse(y[:, rows.begin * Z_ELEMENTS : rows.end * Z_ELEMENTS]).numpy()
            z[:, rows.start : rows.stop] = strip[:, rows.inside()]
        limits = np.iinfo(np.int16)
        return np.clip(np.rint(y, out=y), limits.min, limits.max, out=y), z

    def _improve(self, y: np.ndarray, z: np.ndarray, image: np.ndarray, effort: int) -> None:
        """Puts cheaper latents into `y` [1, h, w, M], tile by tile, each beside the others as they then are."""
        for rows in spans(z.shape[1], TILE // Z_ELEMENTS, SEARCH_MARGIN):
            for columns in spans(z.shape[2], TILE // Z_ELEMENTS, SEARCH_MARGIN):
                sums = self.index_sums(z[:, rows.begin : rows.end, columns.begin : columns.end])
                place = (slice(None), *(slice(s.begin * Z_ELEMENTS, s.end * Z_ELEMENTS) for s in (rows, columns)))
                tile = y[place]
                x = cut(image, *(Span(*(Z_ELEMENTS * edge for edge in span)) for span in (rows, columns)))
                real = np.zeros((1, *x.shape[:2], 1), np.float32)
                height, width = (side - s.begin * DOWNSAMPLING for side, s in zip(image.shape, (rows, columns)))
                real[:, :height, :width] = 1.0
                inside = np.zeros((1, *tile.shape[1:3], 1), np.float32)
                inside[:, rows.inside(Z_ELEMENTS), columns.inside(Z_ELEMENTS)] = 1.0
                scales = exact.scales(sums, self.config.model)
                y[place] = self.search(tile, scales, x[None] / np.float32(255.0), real, inside, effort)

    def _strips(self, z: np.ndarray) -> Iterator[Span]:
        return spans(z.shape[1], strip_rows(z.shape[2]), H_S_MARGIN)

    def _encode(
        self, y: np.ndarray, z: np.ndarray, sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[bytes, np.ndarray, int]]:
        """(range-coded string, escapes, checksum) of the latents of images of (height, width)."""
        count = len(y)
        handle = tfc.create_range_encoder([count], self.tables.lookup)
        escapes: list[list[np.ndarray]] = [[np.empty(0, np.int16)] for _ in range(count)]
        checksums, done = [container.size_checksum(*size) for size in sizes], 0

        def put(values: np.ndarray, index: Any) -> None:
            nonlocal handle, done
            handle, outside = entropy.encode(handle, self.tables, values.astype(np.int32, copy=False), index)
            outside = outside.numpy()
            for i in range(count):
                if outside[i].any():
                    escapes[i].append(values[i][outside[i]].astype(np.int16))
                checksums[i] = container.checksum(values[i], done, checksums[i])
            done += values[0].size

        put(z, np.broadcast_to(self.z_index, z.shape))
        for rows in self._strips(z):
            index = self.indexes(z[:, rows.begin : rows.end])[:, rows.inside(Z_ELEMENTS)]
            put(y[:, rows.start * Z_ELEMENTS : rows.stop * Z_ELEMENTS], index)
        coded = tfc.entropy_encode_finalize(handle).numpy()
        return [(coded[i], np.concatenate(escapes[i]), checksums[i]) for i in range(count)]

    def _decode(self, streams: Sequence[container.Stream]) -> tuple[np.ndarray, np.ndarray]:
        """ŷ [B, h, w, M] int16 and the integers of ẑ of streams with one padded size. Raises BitstreamError."""
        count = len(streams)
        height, width = container.blocks(streams[0].height), container.blocks(streams[0].width)
        handle = tfc.create_range_decoder([stream.coded for stream in streams], self.tables.lookup)
        checksums, done, used = [container.size_checksum(s.height, s.width) for s in streams], 0, [0] * count

        def take(index: Any) -> np.ndarray:
            nonlocal handle, done
            handle, decoded, escaped = entropy.decode(handle, self.tables, index)
            values, escaped = decoded.numpy(), escaped.numpy()
            for i, stream in enumerate(streams):
                if number := np.count_nonzero(escaped[i]):
                    stored = stream.escapes[used[i] : used[i] + number]
                    if len(stored) < number:
                        raise wrong_symbols()
                    values[i][escaped[i]] = stored
                    used[i] += number
                checksums[i] = container.checksum(values[i], done, checksums[i])
            done += values[0].size
            return values

        z = take(np.broadcast_to(self.z_index, (count, height, width, len(self.z_index))))
        y = np.empty((count, height * Z_ELEMENTS, width * Z_ELEMENTS, self.config.model.latent_channels), np.int16)
        for rows in self._strips(z):
            index = self.indexes(z[:, rows.begin : rows.end])[:, rows.inside(Z_ELEMENTS)]
            y[:, rows.start * Z_ELEMENTS : rows.stop * Z_ELEMENTS] = take(index)
        for i, stream in enumerate(streams):
            if checksums[i] != stream.checksum or used[i] != len(stream.escapes):
                raise wrong_symbols()
        return y, z

    def _pixels(self, y: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The images of ŷ [B, h, w, M], cropped to (height, width) each."""
        images = [np.empty((height, width, 3), np.uint8) for height, width in sizes]
        for rows in spans(y.shape[1], TILE, G_S_MARGIN):
            for columns in spans(y.shape[2], TILE, G_S_MARGIN):
                part = y[:, rows.begin : rows.end, columns.begin : columns.end].astype(np.float32)
                tile = self.synthesise(part).numpy()[:, rows.inside(Y_PIXELS), columns.inside(Y_PIXELS)]
                for image, pixels in zip(images, tile):
                    place = image[
                        rows.start * Y_PIXELS : rows.stop * Y_PIXELS, columns.start * Y_PIXELS : columns.stop * Y_PIXELS
                    ]
                    place[:] = pixels[: place.shape[0], : place.shape[1]]
        return images


def wrong_symbols() -> BitstreamError:
    return BitstreamError(
        "decodes to other symbols than were encoded: its bytes were changed and its CRC-32 with them, or this "
        "machine's arithmetic is not IEEE 754"
    )


def graph(run: Any, signature: list[tf.TensorSpec]) -> Any:
    """`run` as a graph that is traced at the first call. tf.function itself warns of retracing from the fifth codec on,
    though each has graphs of its own."""
    traced = functools.lru_cache(tf.function(run, input_signature=signature, autograph=False).get_concrete_function)
    return lambda *inputs: traced()(*map(tf.convert_to_tensor, inputs))


def integers(x: tf.Tensor) -> tf.Tensor:
    """Rounded to int32, within int16, as escapes are stored."""
    return tf.cast(tf.clip_by_value(tf.round(x), -(2.0**15), 2.0**15 - 1), tf.int32)


def cut(image: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
    """The pixels of a tile; beyond the image its last row and column repeat."""
    part = image[rows.begin * Y_PIXELS : rows.end * Y_PIXELS, columns.begin * Y_PIXELS : columns.end * Y_PIXELS]
    below = (rows.end - rows.begin) * Y_PIXELS - part.shape[0]
    right = (columns.end - columns.begin) * Y_PIXELS - part.shape[1]
    return np.pad(part, ((0, below), (0, right), (0, 0)), "edge") if below or right else part


def strip_rows(columns: int) -> int:
    return max(4, STRIP_AREA // columns)


def batches(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Places of images that are processed together: one padded size, and not too many pixels."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (height, width) in enumerate(sizes):
        groups.setdefault((container.blocks(height), container.blocks(width)), []).append(i)
    for (rows, columns), places in groups.items():
        most = max(1, BATCH_PIXELS // (rows * columns * DOWNSAMPLING**2))
        yield from (places[i : i + most] for i in range(0, len(places), most))


# On disk --------------------------------------------------------------------------------------------------


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """The first 8 bytes of a SHA-256 over names, types, shapes and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def load(path: str | Path) -> Codec:
    """The codec of a model as `models.find` finds it.

    Raises ConfigError if there is none, DataError if it is damaged.
    """
    file = models.find(path)
    folder = file.parent if file.name == models.WEIGHTS else file
    try:
        arrays, state = checkpoint.load(file, expected=models.FORMAT)
        codec = Codec(arrays, config.validate(state["config"], str(folder)), state["info"], str(folder))
    except ValueError as error:
        raise DataError(f"model {error}; export it again") from error
    except KeyError as error:
        raise DataError(f"model {folder} is damaged: it has no {error}; export it again") from error
    if codec.fingerprint != state["fingerprint"]:
        raise DataError(
            f"model {folder} is damaged: its weights and tables have fingerprint {codec.fingerprint}, its "
            f"description says {state['fingerprint']}; export it again"
        )
    return codec
