"""Adapted channels: differences come back, shifts are found, and a wrong list is an error."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_codec import SETTINGS, needs_tensorflow, picture, random_codec, sealed

import hyperprior
from hyperprior.codec import adaptation, codec, container, native
from hyperprior.codec.adaptation import Adaptation
from hyperprior.errors import BitstreamError


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([3, 300, 2**15]))
def test_differences_are_those_from_the_mean_to_the_left_and_above(h: int, w: int, seed: int, size: int) -> None:
    y = np.random.RandomState(seed).randint(-size, size, (h, w, 2))
    d = adaptation.differences(y)
    for i, j, c in np.ndindex(*y.shape):
        near = [int(y[place]) for place in ((i, j - 1, c), (i - 1, j, c)) if min(place) >= 0]
        prediction = sum(near) // max(len(near), 1)
        assert (d[i, j, c] - (y[i, j, c] - prediction)) % 2**16 == 0 and -(2**15) <= d[i, j, c] < 2**15
    assert np.array_equal(adaptation.restore(d), y)
    assert np.array_equal(adaptation.differences(y, 3), d[::3])


def test_words_name_the_channels_that_change() -> None:
    chosen = Adaptation(np.array([True, False, False, True]), np.array([0, 0, 15, -16], np.int32))
    words = adaptation.to_words(chosen)
    assert words.tolist() == [0 * 64 + 32 + 16, 2 * 64 + 31, 3 * 64 + 32]
    for one, other in zip(adaptation.from_words(words, 4), chosen):
        assert np.array_equal(one, other)
    for wrong, channels in ((words[::-1], 4), (words[[1, 1]], 4), (words, 3)):
        with pytest.raises(BitstreamError, match="not in order, or names channels that the model lacks"):
            adaptation.from_words(wrong, channels)


def test_what_saves_bits_is_chosen() -> None:
    model = random_codec(SETTINGS, "numpy")
    rng = np.random.RandomState(0)
    y, index = np.zeros((40, 60, 5), int), np.full((40, 60, 5), 40, np.uint8)  # σ = 15
    y[..., 0] = np.rint(15 * rng.randn(40, 60))  # as predicted
    y[..., 1] = np.rint(15 * np.exp(-0.12305 * 9) * rng.randn(40, 60))  # nine steps of the table smaller
    y[..., 2] = 50 + np.arange(60) // 9 + rng.randint(-1, 2, (40, 60))  # changes slowly
    y[..., 3] = np.rint(15 * np.exp(0.12305 * 5) * rng.randn(40, 60))
    y[:2, :2, 4], index[..., 4] = 1, 0  # too few bits to gain anything
    is_difference, shift = adaptation.choose(y, index, model.costs)
    assert is_difference.tolist() == [False, False, True, False, False]
    assert shift.tolist() == [0, -9, -16, 5, 0]


def test_costs_are_the_bits_that_the_range_coder_takes() -> None:
    model = random_codec(SETTINGS, "numpy")
    rng = np.random.RandomState(1)
    values, index = rng.randint(-9, 10, 4000), rng.randint(0, 64, 4000)
    values[:100] *= 500
    costs = model.costs[index - adaptation.LEAST_SHIFT, np.clip(values, -2048, 2048) + 2048]
    coder = codec.Encoder(model.engine.encoder(1), model.tables, [codec.CodedImage(1, 1, np.empty(0, np.uint16))])
    coder.put(values[None], index[None])
    (stream,) = coder.finish(bytes(8))
    assert abs(costs.sum() / adaptation.UNIT / (8 * len(stream.coded) + 16 * len(stream.escapes)) - 1) < 1e-3


def test_photographs_take_fewer_bytes_and_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = hyperprior.load("q1", "numpy"), picture(2, 500, 330)
    adapted = model.compress(image)
    stream = model.read(adapted)
    assert stream.version == 2 and 0.99 < model.estimated_bits(adapted) / 8 / (len(adapted) - stream.overhead) < 1
    monkeypatch.setattr(adaptation, "LEAST_GAIN", 1e9)
    plain = model.compress(image)
    assert model.read(plain).version == 1 and model.read(plain).adapted.size == 0
    assert len(adapted) < 0.97 * len(plain)
    assert np.array_equal(model.latents(adapted), model.latents(plain))
    assert np.array_equal(model.decompress_batch([adapted, plain]), [model.decompress(plain)] * 2)


@pytest.fixture(scope="module", params=["numpy", "tensorflow", "served"])
def decompress(request: pytest.FixtureRequest) -> Any:
    if request.param == "numpy":
        return random_codec(SETTINGS, "numpy").decompress
    tf = needs_tensorflow()
    model = random_codec(SETTINGS, "tensorflow")
    if request.param == "tensorflow":
        return model.decompress
    operations = native.load_operations().module
    if not operations:
        pytest.skip("needs the C++ range coder")
    from hyperprior.codec import serving

    def run(data: bytes) -> np.ndarray:
        try:
            return tf.function(lambda file: serving.decompress_in_graph(model, operations, file), autograph=False)(
                tf.constant(data)
            ).numpy()
        except tf.errors.InvalidArgumentError as error:
            raise BitstreamError(error.message) from error

    return run


@pytest.mark.parametrize("sample", [adaptation.SAMPLE, 30])  # of the second every tenth row
def test_the_served_codec_adapts_in_the_same_way(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "SAMPLE", sample)
    tf = needs_tensorflow()
    model, operations = random_codec(SETTINGS, "tensorflow"), native.load_operations().module
    if not operations:
        pytest.skip("needs the C++ range coder")
    from hyperprior.codec import serving

    image = picture(6, 300, 200)
    file = serving.compress_in_graph(model, operations, tf.constant(image)).numpy()
    assert model.read(file).version == 2 and file == model.compress(image)


def test_a_wrong_list_is_an_error(decompress: Any) -> None:
    model = random_codec(SETTINGS, "numpy")
    data = model.compress(picture(5, 100, 70))
    stream = model.read(data)
    words = stream.adapted.copy()
    assert len(words) > 2

    def with_words(changed: np.ndarray) -> bytes:
        return container.write(stream._replace(adapted=changed))

    assert np.array_equal(decompress(with_words(words)), model.decompress(data))
    for channel, bit in ((0, 1), (1, 32), (-1, 16)):  # another shift, or differences where there were none
        changed = words.copy()
        changed[channel] ^= bit
        with pytest.raises(BitstreamError, match="decodes to other symbols"):
            decompress(with_words(changed))
    with pytest.raises(BitstreamError, match="decodes to other symbols"):
        decompress(with_words(words[:-1]))
    for changed in (words[::-1], np.append(words, np.uint16(12 * 64))):
        with pytest.raises(BitstreamError, match="adapted channels"):
            decompress(with_words(changed))
    empty = sealed(data[:29] + struct.pack("<H", 0) + data[31 + 2 * len(words) :])
    with pytest.raises(BitstreamError, match="version 2 without adapted channels"):
        decompress(empty)
    for count in (len(words) + 1, 2**16 - 1):
        with pytest.raises(BitstreamError, match="cut off|does not match the header"):
            decompress(sealed(data[:29] + struct.pack("<H", count) + data[31:]))
