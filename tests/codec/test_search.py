"""The encoder's search finds the best integers where they are known, and makes files better."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import Command, encoded, photo
from PIL import Image
from scipy import special

from hyperprior.codec import codec as codecs
from hyperprior.codec import container, search
from hyperprior.errors import ConfigError
from hyperprior.model import quality
from hyperprior.model.priors import gaussian_bits

WEIGHT, CHANNELS = 60.0, 5
rng = np.random.RandomState(0)
# With this transform the best value of each integer is known: each channel paints its own part of a block.
KERNEL = np.zeros((16, 16, 3, CHANNELS), np.float32)
for c in range(CHANNELS):
    KERNEL[3 * c : 3 * c + 3, :, :, c] = rng.uniform(-0.02, 0.02, (3, 16, 3))


def blocks(y: tf.Tensor) -> tf.Tensor:
    height, width = tf.unstack(tf.shape(y)[1:3])
    return 0.5 + tf.nn.conv2d_transpose(y, KERNEL, (1, 16 * height, 16 * width, 3), 16, "VALID")


def bits_of(y: np.ndarray, scales: np.ndarray) -> np.ndarray:
    mass = special.ndtr((0.5 - np.abs(y)) / scales) - special.ndtr((-0.5 - np.abs(y)) / scales)
    return np.minimum(-np.log2(np.maximum(mass, 1e-30)), 16.0)


def test_the_search_finds_the_best_integers_and_spends_nothing_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CAUTION", 1.0)  # here neighbours do not matter
    shape = (1, 8, 8, CHANNELS)
    scales = rng.uniform(0.3, 3.0, shape).astype(np.float32)
    truth = (scales * rng.randn(*shape)).astype(np.float32)
    x = blocks(truth)
    real = np.ones((1, 128, 128, 1), np.float32)
    real[:, :, 96:] = 0.0  # the last two columns of elements are padding
    inside = np.ones((1, 2, 2, 1), np.float32)
    inside[:, 0] = 0.0
    start = np.rint(truth)
    z = tf.zeros((1, 2, 2, 1))
    arguments = (tf.constant(start), z, x, real, inside, tf.constant(WEIGHT), tf.constant(60))
    result, same_z = search.search(blocks, lambda z: scales + 0.0 * repeat(z), gaussian_bits, tf.abs, *arguments)
    assert np.array_equal(same_z, z)
    result = result.numpy()

    gain = WEIGHT * np.square(KERNEL).sum((0, 1, 2)) * (np.arange(8)[:, None] < 6)
    cost = [bits_of(v, scales) + gain * np.square(v - truth) for v in np.arange(-12.0, 13.0)]
    best = np.argmin(cost, axis=0) - 12.0
    assert np.array_equal(result[:, :4], start[:, :4])
    assert not result[:, 4:, 7].any() and start[:, 4:, 7].any()
    # Beside padding, the estimated curvature is too small.
    result, best, start = (array[:, 4:, :5] for array in (result, best, start))
    assert np.mean(result == best) > 0.97 and np.mean(start == best) < 0.85
    assert np.abs(result - best).max() <= 1


def repeat(z: tf.Tensor) -> tf.Tensor:
    """Each element of z for its 4 x 4 elements of y."""
    return tf.repeat(tf.repeat(z, 4, axis=1), 4, axis=2)


def test_the_search_finds_most_of_what_better_scales_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CAUTION", 1.0)
    truth = rng.randint(-3, 4, (1, 12, 12, 1))  # log σ of each block, in units of ½
    y = np.rint(np.exp(0.5 * truth.repeat(4, 1).repeat(4, 2)) * rng.randn(1, 48, 48, 1)).astype(np.float32)
    real, inside = np.ones((1, 768, 768, 1), np.float32), np.ones((1, 12, 12, 1), np.float32)
    inside[:, :, 0] = 0.0
    arguments = (y, tf.zeros((1, 12, 12, 1)), 0.0 * real, real, inside, tf.constant(0.0), tf.constant(60))
    same_y, z = search.search(
        blocks, lambda z: tf.exp(0.5 * repeat(z)), gaussian_bits, lambda z: 0.5 * tf.abs(z), *arguments
    )
    assert np.array_equal(same_y, y)

    each = [bits_of(y, np.exp(0.5 * v)).reshape(12, 4, 12, 4).sum((1, 3)) + 0.5 * abs(v) for v in range(-8, 9)]
    best = np.argmin(each, axis=0) - 8.0
    result = z.numpy()[0, :, :, 0]
    assert not result[:, 0].any() and best[:, 0].any()
    found = np.take_along_axis(np.array(each), (result + 8).astype(int)[None], 0)[0, :, 1:].sum()
    start, least = np.array(each)[8, :, 1:].sum(), np.min(each, axis=0)[:, 1:].sum()
    assert (found - least) < 0.1 * (start - least)  # the curvature of the start counts in every round


def test_curvature_is_that_of_the_error() -> None:
    y = tf.constant(rng.randn(1, 16, 16, CHANNELS), tf.float32)
    outer, share = np.full((1, 256, 256, 1), 2.0 * WEIGHT, np.float32), np.ones((1, 16, 16, 1), np.float32)
    estimate = search.estimate_curvature(blocks, y, outer, share).numpy() / search.CAUTION
    expected = 2 * WEIGHT * np.square(KERNEL).sum((0, 1, 2))
    assert np.abs(estimate.mean((0, 1, 2)) / expected - 1).max() < 0.02 and np.abs(estimate / expected - 1).max() < 0.1


# With a trained model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def q3() -> codecs.Codec:
    return codecs.load("q3")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    grain = np.random.RandomState(1).normal(0, 6, (150, 210, 3))
    return np.clip(np.asarray(photo(5, 210, 150)) + grain, 0, 255).astype(np.uint8)


def loss(codec: codecs.Codec, image: np.ndarray, file: bytes) -> float:
    """The loss of the whole image, in bits."""
    error = quality.compare_images(image, codec.decompress(file))["mse"]
    assert error is not None
    return 8 * len(file) + image.shape[0] * image.shape[1] * codec.config.loss.lmbda * 255.0**2 * error


def test_files_get_better_with_effort_and_are_the_same_every_time(q3: codecs.Codec, image: np.ndarray) -> None:
    files = [q3.compress(image, effort) for effort in (0, 3, 20)]
    losses = [loss(q3, image, file) for file in files]
    assert losses[2] < losses[1] < losses[0] and losses[2] < 0.96 * losses[0]
    assert len(files[2]) < 0.92 * len(files[0])
    assert q3.compress(image, 20) == files[2]
    assert 0.99 < q3.estimated_bits(files[2]) / (8 * (len(files[2]) - container.OVERHEAD)) < 1
    other = np.ascontiguousarray(image[::-1])
    assert q3.compress_batch([image, other], 3) == [files[1], q3.compress(other, 3)]


def test_tiles_see_their_surroundings(image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARES", (1.0, 1.0))
    monkeypatch.setattr(search, "estimate_curvature", lambda transform, values, outer, share: tf.ones_like(values))
    q3, image = codecs.load("q3"), np.tile(image, (3, 2, 1))[:384, :384]
    (y, z), (tiled, tiled_z) = q3.latents_of([image]), q3.latents_of([image])
    before, z_before = y.copy(), z.copy()
    q3.improve(y, z, image, 1)
    monkeypatch.setattr(codecs, "TILE", 12)
    q3.improve(tiled, tiled_z, image, 1)
    # The first tile sees what lies beyond it, but ẑ does not change there, which its last scales feel. Later tiles see
    # the changes of earlier ones.
    assert np.array_equal(tiled_z[:, :1, :1], z[:, :1, :1])
    assert np.count_nonzero(tiled[:, :4, :4] != y[:, :4, :4]) <= 2  # sums may be taken in another order
    assert np.mean(tiled[:, :8, :8] != y[:, :8, :8]) < 0.01
    assert np.count_nonzero(y[:, :8, :8] != before[:, :8, :8]) > 100
    assert np.count_nonzero(z[:, :2, :2] != z_before[:, :2, :2]) > 10
    assert all((tiled[:, i : i + 4] != before[:, i : i + 4]).any() for i in range(0, y.shape[1], 4))


def test_tiles_lose_little(q3: codecs.Codec, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, whole = (loss(q3, image, q3.compress(image, effort)) for effort in (0, 20))
    monkeypatch.setattr(codecs, "TILE", 8)
    assert abs(loss(q3, image, q3.compress(image, 20)) - whole) < 0.1 * (plain - whole)


def test_the_dead_zone_lowers_the_loss(q3: codecs.Codec, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = q3.compress(image)
    monkeypatch.setattr(q3, "dead_zone", np.zeros_like(q3.dead_zone))
    without = q3.compress(image)
    assert len(with_it) < len(without) and loss(q3, image, with_it) < loss(q3, image, without)


def test_a_model_for_ms_ssim_saves_bytes_of_the_same_image(image: np.ndarray) -> None:
    codec = codecs.load("q3-ms-ssim")
    assert (codec.bits_per_square == 32.0).all()
    plain, small = (codec.compress(image, effort) for effort in (0, 20))
    assert len(small) < 0.98 * len(plain)
    assert np.array_equal(codec.decompress(small), codec.decompress(plain))


def test_a_negative_effort_is_refused(q3: codecs.Codec, image: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="effort is -1"):
        q3.compress(image, -1)


def test_commands_and_pillow_take_an_effort(
    hyperprior: Command, q3: codecs.Codec, tmp_path: Path, image: np.ndarray
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(encoded(Image.fromarray(image), "PNG"))
    hyperprior("compress", "photos", "-o", "small", "--effort", "2")
    small = (tmp_path / "small" / "x.hyp").read_bytes()
    assert small == q3.compress(image, 2) != q3.compress(image)
    options = ["--images", "photos", "--out", "results", "--effort", "2", "--baselines", "none", "--json"]
    (point,) = json.loads(hyperprior("evaluate", "q3", *options).stdout)["points"]
    assert (point["effort"], point["bytes"]) == (2, len(small))

    importlib.import_module("hyperprior.pillow")
    file = io.BytesIO()
    Image.fromarray(image).save(file, "HYP", effort=2)
    assert abs(len(file.getvalue()) / len(small) - 1) < 0.01  # this process may round differently
