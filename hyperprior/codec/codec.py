"""An exported model as a codec: images to self-describing bytes and back.

The symbols of a file depend only on integers and tables (`exact`, `tables`), so every machine decodes the symbols that
were encoded. Pixels come from a float transform, and may differ by one level between machines.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperprior import config, stack, storage
from hyperprior.codec import adaptation, box, container, exact, range_coder, tiles
from hyperprior.codec.adaptation import Adaptation
from hyperprior.codec.numpy_engine import NumPyEngine
from hyperprior.codec.symbols import Decoder, Encoder
from hyperprior.codec.tables import INT16, Tables, apply_dead_zone
from hyperprior.codec.tiles import TILE, Y_PIXELS, Z_ELEMENTS, Span, blocks, strips
from hyperprior.config import DOWNSAMPLING
from hyperprior.errors import BitstreamError, ConfigError, DataError
from hyperprior.model import architecture, densities
from hyperprior.model.quality import lagrangian
from hyperprior.storage import Arrays, TrainedWeights

ENGINES = ("auto", "numpy", "tensorflow")
TENSORFLOW_PAYS = 6 * 2**20  # pixels from which on TensorFlow's start takes less time than it saves
MOST_BYTES = 2**29  # of a model's arrays; N=192, M=320 takes a tenth of it


class Codec:
    """A model that compresses and decompresses.

    `fingerprint`: 16 hexadecimal digits, in every file that it writes; `config`: of the run that trained it;
    `info`: the notes of export (step, weights, version, cost of exactness). `engine` computes the transforms: "numpy",
    "tensorflow", or "auto", which is TensorFlow once it pays (`TENSORFLOW_PAYS`).

    Raises KeyError for an array that is missing, ValueError for shapes or values that a model cannot have, and
    ConfigError for weights that are too large for an integer h_s.
    """

    def __init__(
        self, arrays: Arrays, settings: config.Config, info: dict[str, Any], origin: str, engine: str = "auto"
    ):
        if engine not in ENGINES:
            raise ConfigError(f"engine is {engine}; choose one of {', '.join(ENGINES)}")
        self.config, self.info, self.origin = settings, info, origin
        self.fingerprint = storage.fingerprint(arrays)
        model = settings.model
        check_arrays(arrays, model)
        weights = dict(arrays)
        number_of_layers = len(architecture.hyper_synthesis(model))
        self.layers = [(weights.pop(f"h_s/{i}/kernel"), weights.pop(f"h_s/{i}/bias")) for i in range(number_of_layers)]
        exact.check_bounds(self.layers, model)
        self.tables = Tables(*(weights.pop(f"tables/{name}") for name in Tables._fields))
        self.counts = range_coder.Counts(self.tables.lookup)
        self.tables.check(self.counts, model.num_scales, model.hyper_channels)
        self.z_offsets = weights.pop("z_offsets")
        self.z_index = np.arange(model.num_scales, model.num_scales + model.hyper_channels, dtype=np.int32)
        self.weights = {name: array.astype(np.float32) for name, array in weights.items()}
        self.choice, self.pixels, self.process = engine, 0, os.getpid()
        self.engine: Any = self.tensorflow_engine if engine == "tensorflow" else None
        if engine == "auto" and "tensorflow" in sys.modules and not stack.is_forked:
            self.try_tensorflow()
        self.engine = self.engine or self.numpy_engine

    @functools.cached_property
    def dead_zone(self) -> np.ndarray:
        """Of `Tables.dead_zone`."""
        return self.tables.dead_zone(self.counts, self.bits_per_square)

    @functools.cached_property
    def bits_per_square(self) -> np.ndarray:
        """The bits that a squared error of 1 in y is worth to the encoder, for each scale: [num_scales].

        The formula for MSE was fitted on photographs, see README.md.
        """
        model = self.config.model
        scales = exact.scales(np.arange(model.num_scales), model)
        return np.where(self.config.loss.metric == "mse", 40.0 * scales / (scales + 0.3), densities.BITS_PER_SQUARE)

    @functools.cached_property
    def costs(self) -> np.ndarray:
        """Of `adaptation.make_costs`."""
        return adaptation.make_costs(self.tables, self.counts, self.config.model.num_scales)

    @functools.cached_property
    def adaptation_tables(self) -> tuple[int, int]:
        """The tables of kinds and of shifts."""
        return adaptation.kind_and_shift_tables(self.tables, self.counts, self.config.model.num_scales)

    @functools.cached_property
    def error_weight(self) -> float:
        """The cost in bits of a squared error of 1 in one value of x̂. If it is 0, the search leaves ŷ as it is."""
        loss = self.config.loss
        return lagrangian(0.0, 1.0 / 3.0, loss.lmbda, "mse") if loss.metric == "mse" else 0.0  # MSE averages channels

    @functools.cached_property
    def numpy_engine(self) -> NumPyEngine:
        return NumPyEngine(self.weights, self.layers, self.z_offsets, self.counts, self.config.model)

    @functools.cached_property
    def tensorflow_engine(self) -> Any:
        """Raises ConfigError if there is no TensorFlow."""
        stack.start_tensorflow()
        from hyperprior.codec.tensorflow_engine import TensorFlowEngine

        weights = self.trained_weights().arrays
        return TensorFlowEngine(weights, self.layers, self.z_offsets, self.counts, self.config.model)

    def choose_engine(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Counts the pixels of images of (height, width), and changes to TensorFlow if it will save time.

        Changes to NumPy in a process that was forked from one with TensorFlow, which would wait for threads that a fork
        does not copy. Raises ConfigError if TensorFlow was asked for.
        """
        self.pixels += sum(height * width for height, width in sizes)
        if self.choice == "tensorflow":
            self.check_fork()
        elif self.was_forked():
            self.engine = self.numpy_engine
        elif self.choice == "auto" and self.pixels > TENSORFLOW_PAYS and stack.is_installed():
            self.try_tensorflow()

    def try_tensorflow(self) -> None:
        with contextlib.suppress(ConfigError):  # one that does not work
            self.engine = self.tensorflow_engine

    def was_forked(self) -> bool:
        """Whether this process was forked from the one that loaded the model, and that one had TensorFlow."""
        return stack.is_forked and self.process != os.getpid()

    def check_fork(self) -> None:
        """Raises ConfigError if `was_forked`."""
        if self.was_forked():
            raise ConfigError(
                "TensorFlow does not work in a process that was forked after its start: load the model in that process "
                "with engine='numpy' and compress without effort, or start the process with spawn or forkserver"
            )

    def trained_weights(self) -> TrainedWeights:
        """All weights, as the start of another run. Those of h_s have the precision of its integers."""
        weights = {**self.weights, **exact.weights(self.layers, self.config.model)}
        return TrainedWeights(weights, self.config, self.info.get("step", 0))

    def compress(self, image: np.ndarray, effort: int = 0, max_pixels: int = container.MAX_PIXELS) -> bytes:
        """A whole `.hyp` file of an [H, W, 3] uint8 image, sides 1 to 65,535. Raises DataError.

        `effort`: rounds of `search` for cheaper latents; `check_effort` raises ConfigError for it. An image with more
        pixels than MAX_PIXELS needs its `max_pixels` in `decompress`, too.
        """
        return self.compress_batch([image], effort, max_pixels)[0]

    def compress_batch(
        self, images: Sequence[np.ndarray], effort: int = 0, max_pixels: int = container.MAX_PIXELS
    ) -> list[bytes]:
        """The files of several images. Small images of one size are faster together."""
        self.check_effort(effort)
        images = [np.asarray(image) for image in images]
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise DataError(f"an image must be [H, W, 3] uint8; found {list(image.shape)} {image.dtype}")
            container.check_size(image.shape[0], image.shape[1], max_pixels)
        files: list[bytes] = [b""] * len(images)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        self.choose_engine(sizes)
        search_y = effort > 0 and self.error_weight > 0.0
        for group in tiles.group_by_size(sizes):
            y, z = self.latents_of([images[i] for i in group], dead_zone=not search_y)
            if effort:
                for place, i in enumerate(group):
                    # Slices are views: this changes y and z.
                    self.improve(y[place : place + 1], z[place : place + 1], images[i], effort)
            for i, stream in zip(group, self.encode(y, z, [sizes[i] for i in group])):
                files[i] = container.write(stream)
        return files

    def decompress(self, data: bytes, max_pixels: int = container.MAX_PIXELS) -> np.ndarray:
        """The [H, W, 3] uint8 image of a `.hyp` file that this model wrote. Raises BitstreamError."""
        return self.decompress_batch([data], max_pixels)[0]

    def decompress_batch(self, files: Sequence[bytes], max_pixels: int = container.MAX_PIXELS) -> list[np.ndarray]:
        """The images of several files. Raises BitstreamError if one of them cannot be decoded."""
        streams = [self.read(data, max_pixels) for data in files]
        images: list[np.ndarray] = [np.empty(0)] * len(files)
        sizes = [(stream.height, stream.width) for stream in streams]
        self.choose_engine(sizes)
        for group in tiles.group_by_size([(stream.height, stream.width, stream.version) for stream in streams]):
            y = self.decode([streams[i] for i in group])
            for i, image in zip(group, self.pixels_of(y, [sizes[i] for i in group])):
                images[i] = image
        return images

    def check_effort(self, effort: int) -> None:
        """Raises ConfigError for an effort below 0, and for one above 0 if TensorFlow, whose gradients the search
        needs, is missing or does not work here."""
        if effort < 0:
            raise ConfigError(f"effort is {effort}; it must be a number of rounds, 0 or more")
        if effort:
            self.check_fork()
            stack.start_tensorflow()

    def read(self, data: bytes, max_pixels: int = container.MAX_PIXELS) -> container.Stream:
        """The checked contents of a file. Raises BitstreamError, also for a file of another model."""
        stream = container.read(bytes(data), max_pixels)
        if stream.fingerprint.hex() != self.fingerprint:
            raise BitstreamError(
                f"written with model {stream.fingerprint.hex()}; {self.origin} is model {self.fingerprint}: "
                f"use the model that wrote it"
            )
        return stream

    def latents(self, data: bytes) -> np.ndarray:
        """ŷ of a file: [H/16, W/16, M] int16 (H, W rounded up to multiples of 64). Raises BitstreamError."""
        return self.decode([self.read(data)])[0]

    def estimated_bits(self, data: bytes) -> float:
        """−log2 p of a file's values under the model's own densities. Raises BitstreamError."""
        stream = self.read(data)
        (kind, shift), y, z = self.decode_values([stream])
        model = self.config.model
        total = self.bits_of_latents(y, z, shift[0])
        for values, index in zip((kind, shift), self.adaptation_indexes(kind) if stream.version > 1 else ()):
            total += densities.bits_of_y(values, exact.scales(index, model), model.density)
        return total

    def bits_of_latents(self, y: np.ndarray, z: np.ndarray, shift: Any = 0) -> float:
        """−log2 p of integers [B, h, w, M] and [B, h/4, w/4, C]; `shift`: of y's scale indexes, for each channel."""
        prior = storage.with_prefix("prior/", self.weights)
        z_hat = z.reshape(-1, z.shape[-1]) + exact.offset_values(self.z_offsets)
        total = densities.bits_of_z(prior, z_hat)
        model = self.config.model
        for rows in strips(z.shape, tiles.H_S_MARGIN):
            sums = self.engine.index_sums(z[:, rows.source()])[:, rows.inside(Z_ELEMENTS)]
            scales = exact.scales(exact.places(sums, model.num_scales) + shift, model)
            total += densities.bits_of_y(y[:, rows.target(Z_ELEMENTS)], scales, model.density)
        return total

    # The steps of compression and decompression: images ↔ latents ↔ strings -------------------------------

    def latents_of(self, images: Sequence[np.ndarray], dead_zone: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """ŷ [B, h, w, M] float32 and the integers of ẑ [B, h/4, w/4, C] of images with one padded size.

        Without `dead_zone`, ŷ are the nearest integers, from which the search for better ones starts.
        """
        rows_of_z, columns_of_z = (blocks(side) for side in images[0].shape[:2])
        model = self.config.model
        y_shape = (len(images), rows_of_z * Z_ELEMENTS, columns_of_z * Z_ELEMENTS, model.latent_channels)
        y = np.empty(y_shape, np.float32)
        for rows, columns in tiles.tiles(y.shape, TILE, tiles.G_A_MARGIN):
            tile = self.engine.analyse(np.stack([tiles.cut_pixels(image, rows, columns) for image in images]))
            y[:, rows.target(), columns.target()] = tile[:, rows.inside(), columns.inside()]
        if not np.isfinite(y).all():
            raise DataError("the model's transforms give values that are not finite for this image")
        z = np.empty((len(images), rows_of_z, columns_of_z, model.hyper_channels), np.int32)
        for rows in strips(z.shape, tiles.H_A_MARGIN):
            strip = self.engine.hyper_analyse(y[:, rows.source(Z_ELEMENTS)])
            z[:, rows.target()] = strip[:, rows.inside()]
        if dead_zone:
            for rows in strips(z.shape, tiles.H_S_MARGIN):
                apply_dead_zone(y[:, rows.target(Z_ELEMENTS)], self.indexes(z, rows), self.dead_zone)
        np.rint(y, out=y)
        return np.clip(y, INT16.min, INT16.max, out=y), z

    def improve(self, y: np.ndarray, z: np.ndarray, image: np.ndarray, effort: int) -> None:
        """Changes `y` [1, h, w, M] and `z` [1, h/4, w/4, C] to cheaper latents of `image` [H, W, 3], tile by tile. A
        tile sees the changes of earlier tiles.

        Bits are counted with the adaptation that suits the first latents; `encode` chooses that of the last ones.
        For a model trained for MS-SSIM, only `z` changes, so the decoded image stays the same.
        """
        kind, shift = adaptation.choose(y[0], self.all_indexes(z)[0], self.costs)
        predictions = np.zeros_like(y)
        followed = y[0][..., kind > 0]
        predictions[0][..., kind > 0] = followed - adaptation.differences(followed)
        factors = np.exp(exact.log_scale_table(self.config.model)[1] * shift).astype(np.float32)
        for rows, columns in tiles.tiles(z.shape, TILE // Z_ELEMENTS, tiles.SEARCH_MARGIN):
            place = (slice(None), rows.source(), columns.source())
            y_place = (slice(None), rows.source(Z_ELEMENTS), columns.source(Z_ELEMENTS))
            x = tiles.cut_pixels(image, rows.scaled(Z_ELEMENTS), columns.scaled(Z_ELEMENTS))
            is_image = np.zeros((1, *x.shape[:2], 1), np.float32)  # the rest is padding
            height, width = image.shape[0] - rows.begin * DOWNSAMPLING, image.shape[1] - columns.begin * DOWNSAMPLING
            is_image[:, :height, :width] = 1.0
            may_change = np.zeros((1, *z[place].shape[1:3], 1), np.float32)
            may_change[:, rows.inside(), columns.inside()] = 1.0
            x = x[None] / np.float32(255.0)
            y[y_place], z[place] = self.tensorflow_engine.search(
                predictions[y_place], factors, y[y_place], z[place], x, is_image, may_change, self.error_weight, effort
            )

    def indexes(self, z: np.ndarray, rows: Span) -> np.ndarray:
        """The table of each element of y in a strip of rows of z: [B, 4h, w, M] int32."""
        sums = self.engine.index_sums(z[:, rows.source()])
        return exact.indexes(sums[:, rows.inside(Z_ELEMENTS)], self.config.model.num_scales)

    def encode(self, y: np.ndarray, z: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[container.Stream]:
        """The streams of latents; `sizes`: (height, width) of each image."""
        index = self.all_indexes(z)
        chosen = [adaptation.choose(*image, self.costs) for image in zip(y, index)]
        kind, shift = (np.stack(each) for each in zip(*chosen))
        encoder = Encoder(self.engine.encoder(len(sizes)), self.tables, sizes)
        for values, tables in zip((kind, shift), self.adaptation_indexes(kind)):
            encoder.put(values, tables)
        encoder.put(z, np.broadcast_to(self.z_index, z.shape))
        y = y.astype(np.int16)
        for own, own_kind in zip(y, kind):
            own[..., own_kind > 0] = adaptation.differences(own[..., own_kind > 0])
        for rows in strips(z.shape, tiles.H_S_MARGIN):
            part = rows.target(Z_ELEMENTS)
            encoder.put(y[:, part], self.add_shift(index[:, part], shift))
        return encoder.finish(bytes.fromhex(self.fingerprint))

    def decode(self, streams: Sequence[container.Stream]) -> np.ndarray:
        """ŷ [B, h, w, M] int16 of streams that are processed together, see `tiles.group_by_size`.

        Raises BitstreamError.
        """
        (kind, _), y, _ = self.decode_values(streams)
        for own, own_kind in zip(y, kind):
            own[..., own_kind > 0] = adaptation.restore(own[..., own_kind > 0])
        return y

    def decode_values(self, streams: Sequence[container.Stream]) -> tuple[Adaptation, np.ndarray, np.ndarray]:
        """The adaptations, [B, M] each, y [B, h, w, M] int16 with differences as they are, and the integers of ẑ."""
        decoder = Decoder(self.engine.decoder([stream.coded for stream in streams]), self.tables, streams)
        count, rows_of_z, columns_of_z = len(streams), blocks(streams[0].height), blocks(streams[0].width)
        channels = self.config.model.latent_channels
        kind = shift = np.zeros((count, channels), np.int32)
        if streams[0].version > 1:
            kind = decoder.take(self.adaptation_indexes(kind)[0])
            shift = decoder.take(self.adaptation_indexes(kind)[1])
        z = decoder.take(np.broadcast_to(self.z_index, (count, rows_of_z, columns_of_z, len(self.z_index))))
        y = np.empty((count, rows_of_z * Z_ELEMENTS, columns_of_z * Z_ELEMENTS, channels), np.int16)
        for rows in strips(z.shape, tiles.H_S_MARGIN):
            y[:, rows.target(Z_ELEMENTS)] = decoder.take(self.add_shift(self.indexes(z, rows), shift))
        decoder.finish()
        return Adaptation(kind, shift), y, z

    def adaptation_indexes(self, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tables that code kinds, all the same, and those that code the shifts of channels of these kinds."""
        of_kind, of_shift = self.adaptation_tables
        return np.full_like(kind, of_kind), np.where(kind != 0, of_shift, 0).astype(np.int32)

    def add_shift(self, index: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """The tables of y [B, h, w, M] with the shifts [B, M] of its channels."""
        return np.clip(index + shift[:, None, None], 0, self.config.model.num_scales - 1)

    def all_indexes(self, z: np.ndarray) -> np.ndarray:
        """`indexes` of all rows, in the smallest type that holds them."""
        smallest = np.min_scalar_type(self.config.model.num_scales - 1)
        parts = [self.indexes(z, rows).astype(smallest) for rows in strips(z.shape, tiles.H_S_MARGIN)]
        return np.concatenate(parts, axis=1)

    def pixels_of(self, y: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The images of ŷ [B, h, w, M], each cropped to its (height, width)."""
        images = [np.empty((height, width, 3), np.uint8) for height, width in sizes]
        for rows, columns in tiles.tiles(y.shape, TILE, tiles.G_S_MARGIN):
            tile = self.engine.synthesise(y[:, rows.source(), columns.source()].astype(np.float32))
            for image, pixels in zip(images, tile[:, rows.inside(Y_PIXELS), columns.inside(Y_PIXELS)]):
                place = image[rows.target(Y_PIXELS), columns.target(Y_PIXELS)]
                place[:] = pixels[: place.shape[0], : place.shape[1]]
        return images


def check_arrays(arrays: Arrays, model: config.Model) -> None:
    """Raises KeyError for an array that is missing, ValueError for shapes, types or values that a model cannot have."""
    count = model.num_scales + model.hyper_channels
    others = {"z_offsets": (model.hyper_channels,), "tables/first": (count,), "tables/escape": (count,)}
    shapes = {**architecture.shapes_of_weights(model), **others, "tables/lookup": (arrays["tables/lookup"].size,)}
    for name, shape in shapes.items():
        array = arrays[name]
        is_table, is_integer = name.startswith("tables/"), name in others or name.startswith("h_s/")
        largest = np.int32 if is_table else np.int64 if is_integer else np.float32
        if (
            array.shape != shape
            or array.dtype.kind != np.dtype(largest).kind
            or array.dtype.itemsize > largest().itemsize
        ):
            raise ValueError(f"`{name}` is {list(array.shape)} {array.dtype}, and should be {list(shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` is not finite")
    if extra := sorted(arrays.keys() - shapes.keys()):
        raise ValueError(f"`{extra[0]}` belongs to no part of it")


def load(path: str | Path, engine: str = "auto") -> Codec:
    """The codec of the model that `box.find` finds.

    Raises ConfigError if there is no such model, and DataError if the model is damaged.
    """
    file = box.find(path)
    origin = str(file.parent if file.name == box.WEIGHTS else file)
    try:
        arrays, state = storage.load_arrays(file, box.FORMAT, MOST_BYTES)
    except ValueError as error:
        raise DataError(f"model {error}; export it again") from error
    try:
        info, fingerprint = dict(state["info"]), state["fingerprint"]
        codec = Codec(arrays, config.validate(state["config"], origin), info, origin, engine)
    except KeyError as error:
        raise DataError(f"model {origin} is damaged: it has no {error}; export it again") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"model {origin} is damaged: {error}; export it again") from error
    if codec.fingerprint != fingerprint:
        raise DataError(
            f"model {origin} is damaged: its weights and tables have fingerprint {codec.fingerprint}, its "
            f"description says {fingerprint}; export it again"
        )
    return codec
