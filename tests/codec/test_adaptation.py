"""Adapted channels: differences come back, what saves bits is found, and files of both versions are read."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import less_memory_than
from hypothesis import given
from hypothesis import strategies as st
from test_codec import SETTINGS, needs_tensorflow, picture, random_codec
from test_vectors import VECTORS

import hyperprior
from hyperprior.codec import adaptation, codec, container


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([3, 300, 2**15]))
def test_differences_are_those_from_the_mean_to_the_left_and_above(h: int, w: int, seed: int, size: int) -> None:
    y = np.random.RandomState(seed).randint(-size, size, (h, w, 2))
    d = adaptation.differences(y)
    for i, j, c in np.ndindex(*y.shape):
        near = [int(y[place]) for place in ((i, j - 1, c), (i - 1, j, c)) if min(place) >= 0]
        prediction = sum(near) // max(len(near), 1)
        assert (d[i, j, c] - (y[i, j, c] - prediction)) % 2**16 == 0 and -(2**15) <= d[i, j, c] < 2**15
    assert np.array_equal(adaptation.restore(d), y) and np.array_equal(adaptation.restore(d.astype(np.int16)), y)
    assert np.array_equal(adaptation.differences(y, 3), d[::3])


@pytest.mark.parametrize("shape", [(4096, 4, 1), (4, 4096, 1)])
def test_differences_of_long_images_take_little_memory(shape: tuple[int, int, int]) -> None:
    d = np.ones(shape, np.int16)
    with less_memory_than(8 * d.nbytes):
        adaptation.restore(d)


def test_a_shift_counts_from_the_index_that_is_within_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = hyperprior.load("q1", "numpy"), picture(2, 300, 200)
    chosen = adaptation.Adaptation(np.zeros(192, np.int32), np.full(192, 9, np.int32))
    monkeypatch.setattr(adaptation, "choose", lambda y, index, costs: chosen)
    file = model.compress(image)  # almost half of h_s's results are below the table
    assert 0.98 < model.estimated_bits(file) / 8 / (len(file) - container.OVERHEAD) < 1


def test_what_saves_bits_is_chosen() -> None:
    model = random_codec(SETTINGS, "numpy")
    rng = np.random.RandomState(0)
    y, index = np.zeros((40, 60, 5), int), np.full((40, 60, 5), 40, np.uint8)  # σ = 15
    y[..., 0] = np.rint(15 * rng.randn(40, 60))  # as predicted
    y[..., 1] = np.rint(15 * np.exp(-0.12305 * 9) * rng.randn(40, 60))  # nine steps of the table smaller
    y[..., 2] = 50 + np.arange(60) // 9 + rng.randint(-1, 2, (40, 60))  # changes slowly
    y[..., 3] = np.rint(15 * np.exp(0.12305 * 5) * rng.randn(40, 60))
    y[0, 0, 4], index[..., 4] = 1, 0  # too few bits to gain anything
    kind, shift = adaptation.choose(y, index, model.costs)
    assert kind.tolist() == [0, -1, 1, -1, 0]
    assert shift.tolist() == [0, -9, -16, 5, 0]


def test_costs_are_the_bits_that_the_range_coder_takes() -> None:
    model = random_codec(SETTINGS, "numpy")
    rng = np.random.RandomState(1)
    values, index = rng.randint(-9, 10, 4000), rng.randint(0, 64, 4000)
    values[:100] *= 500
    costs = model.costs[index - adaptation.LEAST_SHIFT, np.clip(values, -2048, 2048) + 2048]
    coder = codec.Encoder(model.engine.encoder(1), model.tables, [(1, 1)])
    coder.put(values[None], index[None])
    (stream,) = coder.finish(bytes(8))
    assert abs(costs.sum() / adaptation.UNIT / (8 * len(stream.coded) + 16 * len(stream.escapes)) - 1) < 1e-3


def test_photographs_take_fewer_bytes_and_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = hyperprior.load("q1", "numpy"), picture(2, 500, 330)
    adapted = model.compress(image)
    assert 0.99 < model.estimated_bits(adapted) / 8 / (len(adapted) - container.OVERHEAD) < 1
    monkeypatch.setattr(adaptation, "LEAST_GAIN", 1e9)
    plain = model.compress(image)
    assert len(adapted) < 0.97 * len(plain)
    assert np.array_equal(model.latents(adapted), model.latents(plain))
    assert np.array_equal(model.decompress(adapted), model.decompress(plain))


def test_files_of_both_versions_are_decoded_together() -> None:
    model = hyperprior.load(VECTORS / "model.npz", "numpy")
    files = [(VECTORS / name).read_bytes() for name in ("2.hyp", "4.hyp")]
    files.append(model.compress(picture(1, 100, 70)))
    assert [model.read(file).version for file in files] == [1, 2, 2]
    for image, file in zip(model.decompress_batch(files), files):
        assert np.array_equal(image, model.decompress(file))


@pytest.mark.parametrize("sample", [adaptation.SAMPLE, 30])  # with 30, every sixth row of q1's latents is looked at
@pytest.mark.parametrize("name", ["q1", "random"])
def test_the_served_codec_adapts_in_the_same_way(name: str, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "SAMPLE", sample)
    tf = needs_tensorflow()
    from hyperprior.codec import native, serving

    operations = native.load_operations().module
    if not operations:
        pytest.skip("needs the C++ range coder")

    model = hyperprior.load("q1", "tensorflow") if name == "q1" else random_codec(SETTINGS, "tensorflow")
    image = picture(2, 250, 165)
    file = serving.compress_in_graph(model, operations, tf.constant(image)).numpy()
    assert file == model.compress(image)
    (kind, _), *_ = model.decode_values([model.read(file)])
    assert name == "random" or set(kind.ravel()) == {-1, 0, 1}
    vectors = hyperprior.load(VECTORS / "model.npz", "tensorflow")
    for own, data in ((model, file), *((vectors, (VECTORS / f"{i}.hyp").read_bytes()) for i in (2, 4))):
        pixels = serving.decompress_in_graph(own, operations, tf.constant(data)).numpy()
        assert np.abs(pixels.astype(int) - own.decompress(data)).max() <= 1
