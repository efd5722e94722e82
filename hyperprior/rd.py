"""Rate and distortion: each unit defined once, for training, validation and evaluation alike.

Images are [B, H, W, 3] float32 in [0, 1]; every quantity is per image, [B], so that a mean over the
global batch is a sum divided by the global batch size, whatever the number of replicas. At the end: how two
rate-distortion curves compare.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

from hyperprior.config import MS_SSIM_MIN_SIDE as MS_SSIM_MIN_SIDE

# Wang, Simoncelli, Bovik: "Multi-scale structural similarity for image quality assessment", 2003.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_WINDOW, MS_SSIM_SIGMA, MS_SSIM_K1, MS_SSIM_K2 = 11, 1.5, 0.01, 0.03
MS_SSIM_FLOOR = 1e-3  # below this a term's gradient is that of the floor


def bits_per_pixel(bits: tf.Tensor, height: int | tf.Tensor, width: int | tf.Tensor) -> tf.Tensor:
    return bits / tf.cast(height * width, tf.float32)


def mse(x: tf.Tensor, x_hat: tf.Tensor) -> tf.Tensor:
    """Mean squared error on [0, 1] images: [B]."""
    return tf.reduce_mean(tf.math.squared_difference(x, x_hat), axis=(1, 2, 3))


def psnr_db(mse_value: tf.Tensor) -> tf.Tensor:
    """PSNR in dB of a mean squared error on [0, 1] images; 100 dB at most."""
    return -10.0 / math.log(10.0) * tf.math.log(tf.maximum(mse_value, 1e-10))


def lagrangian(bpp: tf.Tensor, distortion: tf.Tensor, lmbda: float, metric: str) -> tf.Tensor:
    """bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim): the convention of the published lambdas."""
    return bpp + lmbda * (255.0**2 if metric == "mse" else 1.0) * distortion


def distortion(x: tf.Tensor, x_hat: tf.Tensor, metric: str) -> tf.Tensor:
    """The distortion that `lagrangian` weighs: [B]."""
    return mse(x, x_hat) if metric == "mse" else 1.0 - ms_ssim(x, x_hat)


def ms_ssim(x: tf.Tensor, x_hat: tf.Tensor) -> tf.Tensor:
    """Multi-scale structural similarity: [B] in [0, 1], for images of at least 161 pixels a side.

    The value is tf.image.ssim_multiscale's. Its gradient is finite everywhere: where a scale's contrast
    term is at or below zero, which random initial weights bring about, TensorFlow differentiates a power
    below one at zero; here the gradient is that of a term kept above a small floor.
    """
    terms = tf.stack(ms_ssim_terms(x, x_hat), axis=-1)  # [B, 3, scales]
    weights = tf.constant(MS_SSIM_WEIGHTS)
    exact = tf.reduce_prod(tf.nn.relu(terms) ** weights, axis=-1)
    floored = tf.reduce_prod(lift(terms) ** weights, axis=-1)
    return tf.reduce_mean(floored + tf.stop_gradient(exact - floored), axis=-1)


@tf.custom_gradient
def lift(x: tf.Tensor) -> tf.Tensor:
    """max(x, floor) with the identity's gradient, so that a term below the floor can rise."""
    return tf.maximum(x, MS_SSIM_FLOOR), lambda upstream: upstream


def ms_ssim_terms(x: tf.Tensor, x_hat: tf.Tensor) -> list[tf.Tensor]:
    """[B, 3] of each scale: contrast-structure, and at the last scale times luminance."""
    # One convolution over all five moments: channels are (x, x̂, x², x̂², x·x̂), three of each.
    c1, c2 = MS_SSIM_K1**2, MS_SSIM_K2**2
    terms = []
    for scale in range(len(MS_SSIM_WEIGHTS)):
        if scale:
            x, x_hat = halve(x), halve(x_hat)
        moments = blur(tf.concat([x, x_hat, x * x, x_hat * x_hat, x * x_hat], axis=-1))
        mean, mean_hat, square, square_hat, product = tf.split(moments, 5, axis=-1)
        covariance = product - mean * mean_hat
        variances = square - mean**2 + square_hat - mean_hat**2
        term = (2.0 * covariance + c2) / (variances + c2)
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            term *= (2.0 * mean * mean_hat + c1) / (mean**2 + mean_hat**2 + c1)
        terms.append(tf.reduce_mean(term, axis=(1, 2)))
    return terms


def blur(x: tf.Tensor) -> tf.Tensor:
    """A separable 11-tap Gaussian on each channel, without padding."""
    taps = np.exp(-0.5 * ((np.arange(MS_SSIM_WINDOW) - MS_SSIM_WINDOW // 2) / MS_SSIM_SIGMA) ** 2)
    kernel = tf.tile(tf.constant(taps / taps.sum(), tf.float32)[:, None, None, None], (1, 1, x.shape[-1], 1))
    x = tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "VALID")
    return tf.nn.depthwise_conv2d(x, tf.transpose(kernel, (1, 0, 2, 3)), (1, 1, 1, 1), "VALID")


def halve(x: tf.Tensor) -> tf.Tensor:
    """2 x 2 means; an odd side is padded by its mirror image, as TensorFlow does."""
    height, width = tf.unstack(tf.shape(x)[1:3])
    x = tf.pad(x, [[0, 0], [0, height % 2], [0, width % 2], [0, 0]], "SYMMETRIC")
    return tf.nn.avg_pool2d(x, 2, 2, "VALID")


def ms_ssim_db(value: float) -> float:
    """An MS-SSIM in decibels, -10 · log10(1 - value); 60 dB at most, as float32 resolves no more."""
    return -10.0 * math.log10(max(1.0 - value, 1e-6))


def distortions(original: np.ndarray, decoded: np.ndarray) -> dict[str, Optional[float]]:
    """Of two [H, W, 3] uint8: MSE on [0, 1], PSNR, MS-SSIM (None below 161 pixels a side), MS-SSIM in dB.

    float32 moves them by less than 0.001 dB.
    """
    assert original.shape == decoded.shape, (original.shape, decoded.shape)
    x, x_hat = (tf.constant(image[None], tf.float32) / 255.0 for image in (original, decoded))
    error = mse(x, x_hat)[0]
    found: dict[str, Optional[float]] = {"mse": float(error), "psnr_db": float(psnr_db(error))}
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return {**found, "ms_ssim": None, "ms_ssim_db": None}
    similarity = float(ms_ssim_graph()(x, x_hat)[0])
    return {**found, "ms_ssim": similarity, "ms_ssim_db": ms_ssim_db(similarity)}


@functools.lru_cache
def ms_ssim_graph() -> Callable[..., tf.Tensor]:
    """`ms_ssim` as one graph for all sizes, which takes 0.6 of the time."""
    signature = [tf.TensorSpec([1, None, None, 3], tf.float32)] * 2
    return tf.function(ms_ssim, input_signature=signature, autograph=False)


# Curves -----------------------------------------------------------------------------------------------------

BD_MIN_POINTS = 4  # Bjøntegaard: "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001
BD_MIN_OVERLAP = 0.25  # of the shorter curve's range, in quality and in log rate


class NotComparable(Exception):
    """Two curves have no BD value; the text says why."""


def bd(anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(BD-rate in percent, BD-quality in dB) of `test` against `anchor`: points (bpp, quality in dB), in any order.

    A negative BD-rate, and a positive BD-quality, say that `test` is better: the average difference in log rate at
    equal quality, and in quality at equal log rate, over what the curves share. Between points they are
    piecewise cubic (PCHIP), as in the common test conditions of JVET: unlike the single cubic of 2001 and unlike
    Akima's, that passes through any number of points without overshoot. Raises NotComparable.
    """
    import bjontegaard

    curves = []
    for name, points in (("the anchor", anchor), ("the curve", test)):
        points = sorted(points)
        if len(points) < BD_MIN_POINTS:
            raise NotComparable(f"{name} has {len(points)} of the {BD_MIN_POINTS} points needed")
        for (bpp, db), (next_bpp, next_db) in zip(points, points[1:]):
            if not (0 < bpp < next_bpp and db < next_db):
                raise NotComparable(
                    f"{name} does not rise: {db:.2f} dB at {bpp:.3f} bpp, {next_db:.2f} dB at {next_bpp:.3f} bpp"
                )
        curves.append(np.array(points, np.float64))
    (rates, qualities), (test_rates, test_qualities) = curves[0].T, curves[1].T
    for a, b, unit in ((qualities, test_qualities, "dB"), (np.log10(rates), np.log10(test_rates), "decades of rate")):
        shared, shorter = min(a[-1], b[-1]) - max(a[0], b[0]), min(np.ptp(a), np.ptp(b))
        if shared < BD_MIN_OVERLAP * shorter:
            raise NotComparable(f"the curves share {max(shared, 0.0):.2f} of {shorter:.2f} {unit}")
    arguments = (rates, qualities, test_rates, test_qualities)
    settings = {"method": "pchip", "require_matching_points": False, "min_overlap": 0.0}
    return float(bjontegaard.bd_rate(*arguments, **settings)), float(bjontegaard.bd_psnr(*arguments, **settings))
