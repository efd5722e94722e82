"""The codec: exact symbols, checks before decoding, and the same result with any tiling."""

from __future__ import annotations

import random
import re
import signal
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from conftest import less_memory_than, photo
from fuzz import damage_hyp
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperprior import config, storage
from hyperprior.codec import codec as codecs
from hyperprior.codec import container, exact, making, tiles
from hyperprior.codec.codec import Codec
from hyperprior.codec.numpy_engine import NumPyEngine
from hyperprior.errors import BitstreamError, ConfigError, DataError
from hyperprior.model import architecture
from hyperprior.storage import Arrays, TrainedWeights

SETTINGS = config.Config(model=config.Model(num_filters=8, latent_channels=12, hyper_channels=8))


def random_weights(settings: config.Model, seed: int = 0) -> Arrays:
    """Random weights whose latents have many scales, some of them beyond the tables."""
    rng = np.random.RandomState(seed)
    weights: Arrays = {}
    for name, shape in architecture.shapes_of_weights(settings).items():
        transform, number, kind = (name.split("/") * 2)[:3]
        if kind == "kernel":
            is_up = architecture.TRANSFORMS[transform](settings)[int(number)].transpose  # type: ignore[union-attr]
            inputs = shape[3] * shape[0] ** 2 / 4 if is_up else shape[2] * shape[0] ** 2
            weights[name] = rng.randn(*shape) / inputs**0.5
        elif kind in ("beta", "gamma"):
            weights[name] = np.ones(shape) if kind == "beta" else np.sqrt(0.1 * np.eye(shape[0]) + 1e-9)
        elif number.startswith("matrix"):
            weights[name] = np.full(shape, np.log(np.expm1(1.0 / shape[1])))
        else:
            weights[name] = rng.uniform(-0.5, 0.5, shape) if number.startswith("bias") else np.zeros(shape)
    weights["g_a/6/kernel"] *= 48.0
    weights["g_s/6/kernel"] *= 0.02
    weights["g_s/6/bias"] += 0.5
    weights["h_s/2/kernel"] *= 0.3
    weights["h_s/2/bias"] += np.linspace(-2.0, 3.0, settings.latent_channels)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def random_codec(settings: config.Config, engine: str) -> Codec:
    arrays = making.make_arrays(TrainedWeights(random_weights(settings.model), settings, 0))
    return Codec(arrays, settings, {}, "a random model", engine)


def needs_tensorflow() -> Any:
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed")


@pytest.fixture(scope="module")
def floats() -> Any:
    """The model of `random_weights`, as it is trained."""
    needs_tensorflow()
    from hyperprior.model.hyperprior import ScaleHyperprior

    model = ScaleHyperprior(SETTINGS.model)
    storage.assign_arrays(model.named_variables(), random_weights(SETTINGS.model), "a random model")
    return model


@pytest.fixture(scope="module", params=["numpy", "tensorflow"])
def codec(request: pytest.FixtureRequest) -> Codec:
    if request.param == "tensorflow":
        needs_tensorflow()
    return random_codec(SETTINGS, request.param)


def picture(seed: int, width: int, height: int) -> np.ndarray:
    noise = np.random.RandomState(seed).randint(-20, 20, (height, width, 3))
    return np.clip(np.asarray(photo(seed, width, height), int) + noise, 0, 255).astype(np.uint8)


# Round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 3), (64, 64), (65, 63), (333, 500), (2000, 5)])
def test_every_size_comes_back_with_the_symbols_that_were_encoded(codec: Codec, width: int, height: int) -> None:
    image = picture(1, width, height)
    data = codec.compress(image)
    y, _ = codec.latents_of([image])
    assert np.array_equal(codec.latents(data), y[0])
    assert np.ptp(y) > 10
    decoded = codec.decompress(data)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    whole = codec.engine.synthesise(y)[0, :height, :width]
    if codec.choice == "numpy":
        assert np.array_equal(decoded, whole)
    else:
        levels = np.abs(decoded.astype(int) - whole)  # TensorFlow may add up tiles of other widths in another order
        assert levels.max() <= 1 and np.mean(levels > 0) < 1e-3


@pytest.mark.parametrize("density", ["gaussian", "logistic"])
def test_the_coded_string_takes_the_bits_of_the_densities(floats: Any, density: str) -> None:
    model = SETTINGS.model.model_copy(update={"density": density})
    codec = random_codec(SETTINGS.model_copy(update={"model": model}), "numpy")
    rng = np.random.RandomState(2)
    z = rng.randint(-2, 3, (1, 12, 16, 8)).astype(np.int32)
    sums = codec.engine.index_sums(z)
    scales = exact.scales(exact.places(sums, SETTINGS.model.num_scales), SETTINGS.model).astype(np.float32)
    unit = rng.randn if density == "gaussian" else lambda *shape: rng.logistic(0.0, 3**0.5 / np.pi, shape)
    y = np.rint(scales * unit(*scales.shape)).astype(np.float32)
    y[..., ::97, 0] = 6.0  # also where the scale makes this value very unlikely
    from hyperprior.model import priors

    estimate = float(np.sum(priors.BITS[density](y, scales), dtype=np.float64))
    estimate += float(floats.prior.bits(z.astype(np.float32) + exact.offset_values(codec.z_offsets))[0])
    stream = codec.encode(y, z, [(768, 1024)])[0]
    actual = 8 * len(stream.coded) + 16 * len(stream.escapes)
    assert estimate > 50_000 and -0.001 < actual / estimate - 1 < 0.005
    assert abs(codec.estimated_bits(container.write(stream)) / estimate - 1) < 1e-4
    # Training estimates the rate with the float h_s, which gives the same scales.
    floating = floats.scales(floats.h_s(z + floats.z_offset())).numpy()
    assert np.abs(np.log(floating / scales)).max() < 1e-3


def test_batches_hold_the_same_files_as_single_images(codec: Codec) -> None:
    images = [picture(i, *size) for i, size in enumerate([(100, 60), (64, 128), (90, 64), (128, 60), (100, 64)] * 2)]
    files = codec.compress_batch(images)
    assert files == [codec.compress(image) for image in images]
    for image, decoded in zip(images, codec.decompress_batch(files)):
        assert decoded.shape == image.shape
        assert np.abs(decoded.astype(int) - codec.decompress(codec.compress(image))).max() <= 1


def test_tiles_and_strips_leave_no_seams(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(3, 450, 390)
    data = codec.compress(image)
    y, z = codec.latents_of([image])
    decoded = codec.decompress(data)
    monkeypatch.setattr(codecs, "TILE", 5)  # 80 pixels
    monkeypatch.setattr(tiles, "STRIP_ROWS", 2)
    monkeypatch.setattr(tiles, "STRIP_AREA", 2)
    tiled_y, tiled_z = codec.latents_of([image])
    # In a tile, sums may be taken in another order, so a value near one half may round the other way.
    assert np.count_nonzero(tiled_y != y) <= 2 and np.count_nonzero(tiled_z != z) <= 1
    assert codec.encode(y, z, [(1, 1)])[0].coded == container.read(data).coded
    assert np.array_equal(codec.latents(data), y[0])
    assert np.abs(codec.decompress(data).astype(int) - decoded).max() <= 1


def test_arrays_that_are_not_images_are_refused(codec: Codec) -> None:
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(DataError, match="uint8"):
            codec.compress(image)
    with pytest.raises(DataError, match="65535"):
        codec.compress(np.zeros((1, 65_536, 3), np.uint8))
    with pytest.raises(DataError, match="0x1 pixels"):
        codec.compress(np.zeros((1, 0, 3), np.uint8))


def test_an_image_that_overflows_the_model_is_an_error(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    analyse = codec.engine.analyse
    monkeypatch.setattr(codec.engine, "analyse", lambda images: np.where(analyse(images) > 0, np.inf, 0.0))
    with pytest.raises(DataError, match="not finite"):
        codec.compress(picture(0, 64, 64))


# Exactness ------------------------------------------------------------------------------------------------


def reference_sums(z: np.ndarray, codec: Codec) -> np.ndarray:
    """`exact.index_sums` of one image in plain NumPy, tap by tap, in another order."""
    limit = 2.0 ** (exact.ACTIVATION_BITS + exact.RANGE_BITS)
    x = np.clip(z * 2.0**exact.ACTIVATION_BITS + codec.z_offsets, -limit, limit)
    for number, (kernel, bias) in enumerate(codec.layers):
        height, width, _ = x.shape
        taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])][::-1]
        if number < 2:  # [5, 5, out, in]: pixel (r, c) adds to (2r + i - 1, 2c + j - 1)
            padded = np.zeros((2 * height + 4, 2 * width + 4, kernel.shape[2]))
            for i, j in taps:
                part = sum(x[..., [k]] * kernel[i, j, :, k].astype(float) for k in reversed(range(x.shape[2])))
                padded[i : i + 2 * height : 2, j : j + 2 * width : 2] += part
            x = np.clip((padded[1 : 1 + 2 * height, 1 : 1 + 2 * width] + bias) * 2.0**-exact.WEIGHT_BITS, 0, limit)
            x = np.rint(x)
        else:
            padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
            x = sum(padded[i : i + height, j : j + width] @ kernel[i, j].astype(float) for i, j in taps) + bias
    return x


def test_integer_h_s_is_the_same_in_any_order_of_summation(codec: Codec) -> None:
    z = np.random.RandomState(0).randint(-30, 30, (7, 9, 8)).astype(np.int32)
    z[0, 0, 0], z[3, 3, 3] = 32767, -32768  # clamped
    sums = codec.engine.index_sums(z[None])[0]
    assert np.array_equal(sums, reference_sums(z, codec))
    assert np.array_equal(sums, np.rint(sums)) and np.abs(sums).max() < exact.EXACT
    assert len(np.unique(exact.indexes(sums, 64))) > 20
    beside_another = np.stack([np.roll(z, 1, axis=0), z])
    assert np.array_equal(codec.engine.index_sums(beside_another)[1], sums)


def test_float_h_s_would_give_other_indexes_in_another_order_and_ruin_later_symbols(codec: Codec) -> None:
    """The reason for integers in h_s: float32 sums depend on their order, which depends on the machine."""
    tf = needs_tensorflow()
    from hyperprior.model.transforms import Transform

    tf.random.set_seed(1)
    h_s = architecture.hyper_synthesis(config.Model(latent_channels=96, hyper_channels=64))
    first, second, last = Transform(h_s, "float32").layers
    z = tf.constant(np.random.RandomState(1).randint(-1, 2, (6, 30, 30, 64)).astype(np.float32))
    low, step = exact.log_scale_table(SETTINGS.model)

    def float_indexes(order: list[int]) -> np.ndarray:
        x = tf.gather(first(z), order, axis=-1)  # the inner channels in another order: the same function
        x = tf.nn.conv2d_transpose(x, tf.gather(second.kernel, order, axis=3), (6, 120, 120, 64), 2, "SAME")
        x = tf.gather(tf.nn.relu(x + second.bias), order, axis=-1)
        x = tf.nn.conv2d(x, tf.gather(last.kernel, order, axis=2), 1, "SAME") + last.bias
        return tf.cast(tf.round(tf.clip_by_value((x - low) / step, 0.0, 63.0)), tf.int32).numpy()

    one, other = float_indexes(list(range(64))), float_indexes(list(range(64))[::-1])
    images, *_ = np.nonzero(one != other)
    assert 0 < len(images) < 1e-4 * one.size and np.abs(one - other).max() == 1

    one, other = one[images[:1]], other[images[:1]]
    wrong = np.flatnonzero(one != other)
    y = np.rint(np.random.RandomState(2).randn(*one.shape) * np.exp(low + step * one)).astype(np.int32)
    y = np.clip(y - codec.tables.first[one], 0, codec.tables.escape[one])  # as symbols
    encoder = codec.engine.encoder(len(y))
    encoder.put(y, one)
    coded = encoder.finish()
    right, garbage = (codec.engine.decoder(coded).take(index) for index in (one, other))
    after = slice(wrong[0] + 1, None)
    assert np.array_equal(right, y)
    assert np.mean(garbage.ravel()[after] != y.ravel()[after]) > 0.1


def test_indexes_are_those_of_the_nearest_scale() -> None:
    sums = np.array([-3.0, 0.49, 0.51, 1.49, 61.6, 99.0]) * 2.0**exact.SUM_BITS
    assert exact.indexes(sums, 64).tolist() == [0, 0, 1, 1, 62, 63]


def test_models_whose_sums_may_round_are_refused() -> None:
    weights = random_weights(SETTINGS.model)
    exact.integers(weights, SETTINGS.model)
    kernel = weights["h_s/1/kernel"]
    kernel *= 1.01 * 2.0**13 / np.abs(kernel).sum((0, 1, 3)).max()
    with pytest.raises(ConfigError, match=r"h_s/1 cannot be made exact: its partial sums may reach .*2\*\*53"):
        exact.integers(weights, SETTINGS.model)
    kernel[:] = np.nan
    with pytest.raises(ConfigError, match="cannot be made exact"):
        exact.integers(weights, SETTINGS.model)


def test_the_bound_is_the_sum_for_the_worst_input() -> None:
    """A kernel just below it is taken, one just above it is refused."""
    rng = np.random.RandomState(3)
    model = config.Model(latent_channels=2, hyper_channels=4)
    inner = [(np.zeros((5, 5, 4, 4)), np.zeros(4))] * 2
    kernel, bias = np.rint(rng.randn(3, 3, 4, 2) * 2**16), np.rint(rng.randn(2) * 2**28)
    limit = 2.0 ** (exact.ACTIVATION_BITS + exact.RANGE_BITS)
    worst = max(abs((np.sign(kernel[..., k]) * limit * kernel[..., k]).sum()) + abs(bias[k]) for k in range(2))
    scale = exact.EXACT / worst
    exact.check_bounds([*inner, (np.floor(kernel * scale * 0.999), bias)], model)
    with pytest.raises(ConfigError, match="h_s/2"):
        exact.check_bounds([*inner, (np.ceil(kernel * scale * 1.001), bias)], model)


# Tables ---------------------------------------------------------------------------------------------------


def test_tables_are_distributions_with_room_for_every_symbol(codec: Codec) -> None:
    at = 0
    for escape in codec.tables.escape:
        assert codec.tables.lookup[at] == making.PRECISION
        counts = np.diff(codec.tables.lookup[at + 1 : at + escape + 3])
        assert counts.min() >= 1 and counts.sum() == 2**making.PRECISION
        at += escape + 3
    assert at == len(codec.tables.lookup)
    assert len(codec.tables.escape) == SETTINGS.model.num_scales + SETTINGS.model.hyper_channels


def test_the_dead_zone_ends_where_an_integer_is_worth_its_bits(codec: Codec) -> None:
    low, step = exact.log_scale_table(SETTINGS.model)
    for table, (shifts, cumulative) in enumerate(zip(codec.dead_zone, codec.counts.cumulative)):
        bits = -np.log2(np.diff(cumulative) / 2.0**16)
        first, weight = codec.tables.first[table], codec.bits_per_square[table]
        scale = np.exp(low + step * table)
        assert abs(weight / (40.0 * scale / (scale + 0.3)) - 1) < 1e-9
        assert shifts[0] == 0.0 and shifts.min() >= 0.0 and shifts.max() <= 1.0
        for k in (1, 2, 3) if low + step * table > 0.0 else (1,):  # for small scales the tables end at 1
            y = k - 0.5 + shifts[k]  # from here on y is rounded to k
            costs = [bits[value - first] + weight * (y - value) ** 2 for value in (k - 1, k)]
            assert abs(costs[0] - costs[1]) < 1e-4, (table, k)


def test_values_outside_the_tables_survive(codec: Codec) -> None:
    rng = np.random.RandomState(4)
    y = rng.randint(-32768, 32768, (2, 8, 8, 12)).astype(np.float32)
    z = rng.randint(-32768, 32768, (2, 2, 2, 8)).astype(np.int32)
    y[0] = np.clip(y[0], -1, 1)  # the first image has few escapes, the second has almost nothing else
    streams = codec.encode(y, z, [(128, 128)] * 2)
    assert len(streams[1].escapes) > 500 > len(streams[0].escapes)
    assert np.array_equal(codec.decode(streams), y) and np.array_equal(codec.decode_values(streams)[2], z)


# Untrusted bytes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(codec: Codec) -> bytes:
    return codec.compress(picture(5, 100, 70))


def sealed(body: bytes) -> bytes:
    """The file with the correct CRC-32 of its other bytes."""
    return body[:-4] + struct.pack("<I", zlib.crc32(body[:-4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "not a .hyp file: it starts with nothing"),
        (lambda d: b"\x89PNG" + d[4:], "not a .hyp file: it starts with 89 50 4e 47"),
        (lambda d: d[:4] + b"\x03" + d[5:], "format version 3; this release reads versions 1 to 2"),
        (lambda d: sealed(d[:4] + b"\x01" + d[5:]), "decodes to other symbols than were encoded"),
        (lambda d: sealed(d[:5] + b"12345678" + d[13:]), "written with model 3132333435363738"),
        (lambda d: d[:20], "cut off: 20 bytes"),
        (lambda d: d[:-1], "cut off"),
        (lambda d: d + b"\0", "bytes follow its end"),
        (lambda d: d[:60] + bytes([d[60] ^ 1]) + d[61:], "damaged: its bytes do not match their CRC-32"),
        (lambda d: sealed(d[:13] + b"\0\0" + d[15:]), "an image of 100x0 pixels"),
        (lambda d: sealed(d[:13] + b"\xff\xff\xff\xff" + d[17:]), "65535x65535 pixels; at most 178,956,970"),
        (lambda d: sealed(d[:60] + bytes([d[60] ^ 1]) + d[61:]), "decodes to other symbols than were encoded"),
        (lambda d: sealed(d[:13] + b"\x81\0" + d[15:]), "decodes to other symbols"),  # 129 rows instead of 70
        (lambda d: sealed(d[:13] + b"\x47\0" + d[15:]), "decodes to other symbols"),  # 71 rows, equal padding
    ],
)
def test_each_defect_of_a_file_is_one_typed_error(codec: Codec, data: bytes, change: object, message: str) -> None:
    with pytest.raises(BitstreamError, match=message.replace("(", r"\(")) as error:
        codec.decompress(change(data))  # type: ignore[operator]
    assert error.value.exit_code == 3
    codec.decompress(data)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_errors_or_images_of_the_declared_size(codec: Codec, data: bytes, count: int) -> None:
    files = [data, codec.compress(picture(6, 30, 200))]
    other = None if isinstance(codec.engine, NumPyEngine) else random_codec(SETTINGS, "numpy")
    with less_memory_than(2**30):
        for number in range(count):
            mutant = damage_hyp(random.Random(number), files)
            signal.alarm(20)  # a hang ends the tests
            try:
                image = codec.decompress(mutant.data, max_pixels=2**20)
            except BitstreamError as error:
                if other:  # both engines find the same fault
                    with pytest.raises(BitstreamError, match=f"^{re.escape(str(error))}$"):
                        other.decompress(mutant.data, max_pixels=2**20)
                continue
            finally:
                signal.alarm(0)
            assert image.shape == (*struct.unpack_from("<HH", mutant.data, 13), 3)
            assert mutant.sealed or mutant.data in files


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x89HYP\x01", b"\x89HYP\x02" + bytes(8)]))
def test_any_bytes_are_one_error(tail: bytes, head: bytes) -> None:
    for candidate in (head + tail, sealed(head + tail)):
        with pytest.raises(BitstreamError):
            container.read(candidate)


@given(
    st.binary(min_size=8, max_size=8),
    st.tuples(st.integers(1, 65_535), st.integers(1, 65_535)).filter(lambda s: s[0] * s[1] <= container.MAX_PIXELS),
    st.binary(max_size=50),
    st.lists(st.integers(-(2**15), 2**15 - 1), max_size=9),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2),
)
def test_streams_survive_being_written(
    fingerprint: bytes, size: tuple[int, int], coded: bytes, escapes: list[int], checksum: int, version: int
) -> None:
    stream = container.Stream(fingerprint, *size, coded, np.array(escapes, np.int16), checksum, version)
    back = container.read(container.write(stream))
    assert np.array_equal(back.escapes, stream.escapes)
    assert back._replace(escapes=stream.escapes) == stream


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(0, 2**31))
def test_any_image_comes_back_with_its_symbols(codec: Codec, width: int, height: int, seed: int) -> None:
    rng = np.random.RandomState(seed)
    image = rng.randint(0, 256, (height, width, 3)).astype(np.uint8) // rng.randint(1, 200)
    data = codec.compress(image)
    assert np.array_equal(codec.latents(data), codec.latents_of([image])[0][0])
    assert codec.decompress(data).shape == image.shape


def test_a_changed_symbol_changes_the_checksum() -> None:
    values = np.random.RandomState(7).randint(-32768, 32768, 1000)
    whole = container.checksum(values, 0, 5)
    assert container.checksum(values[400:], 400, container.checksum(values[:400], 0, 5)) == whole
    far = sum((2 * i + 1) * int(value) for i, value in enumerate(values, 2**33 - 7))
    assert container.checksum(values, 2**33 - 7, 5) == (5 + far) % 2**32
    for place, delta in ((0, 1), (999, -3), (500, 2**15)):
        changed = values.copy()
        changed[place] += delta
        assert container.checksum(changed, 0, 5) != whole
    assert container.checksum(values[::-1], 0, 5) != whole
