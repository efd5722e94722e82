"""Rate and distortion, with one definition for training, validation and evaluation.

Images are [B, H, W, 3] float32 in [0, 1]. Every metric is per image, [B], so that its mean over the
global batch is a sum divided by the global batch size, for any number of replicas.
"""

from __future__ import annotations

import math

import tensorflow as tf

from hyperprior.config import MS_SSIM_MIN_SIDE, Loss
from hyperprior.model.quality import MS_SSIM_K1, MS_SSIM_K2, MS_SSIM_WEIGHTS, gaussian_window, lagrangian

MS_SSIM_FLOOR = 1e-3  # a term below this has the gradient of the floor


def measure(
    x: tf.Tensor, x_hat: tf.Tensor, bits_y: tf.Tensor, bits_z: tf.Tensor, loss: Loss, *, with_ms_ssim: bool = False
) -> dict[str, tf.Tensor]:
    """The metrics of images and their reconstructions, by the names of `hyperprior.metric_table`: [B] each.

    ms_ssim is measured only `with_ms_ssim` or if it is the distortion; ms_ssim_images is 1 for images that are large
    enough for it.
    """
    pixels = x.shape[1:3].num_elements() or tf.cast(tf.reduce_prod(tf.shape(x)[1:3]), tf.float32)
    error = mse(x, x_hat)
    values = {"bpp_y": bits_y * (1.0 / pixels), "bpp_z": bits_z * (1.0 / pixels), "psnr_db": psnr_db(error)}
    if with_ms_ssim or loss.metric == "ms-ssim":
        values["ms_ssim"], values["ms_ssim_images"] = ms_ssim_if_large(x, x_hat)
    values["distortion"] = error if loss.metric == "mse" else 1.0 - values["ms_ssim"]
    values["loss"] = lagrangian(values["bpp_y"] + values["bpp_z"], values["distortion"], loss.lmbda, loss.metric)
    return values


def mse(x: tf.Tensor, x_hat: tf.Tensor) -> tf.Tensor:
    """Mean squared error on [0, 1] images: [B]."""
    return tf.reduce_mean(tf.math.squared_difference(x, x_hat), axis=(1, 2, 3))


def psnr_db(mse_value: tf.Tensor) -> tf.Tensor:
    """PSNR in dB of a mean squared error on [0, 1] images; 100 dB at most."""
    return -10.0 / math.log(10.0) * tf.math.log(tf.maximum(mse_value, 1e-10))


def ms_ssim_if_large(x: tf.Tensor, x_hat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(MS-SSIM, 1) of images that are large enough for it, else (0, 0): [B] each."""
    zeros = tf.zeros(tf.shape(x)[0])

    def measure_large() -> tuple[tf.Tensor, tf.Tensor]:
        return ms_ssim(x, x_hat), tf.ones(tf.shape(x)[0])

    # tf.cond traces both branches, and MS-SSIM cannot be traced for a size that is known to be too small.
    if x.shape[1:3].is_fully_defined():
        return measure_large() if min(x.shape[1:3]) >= MS_SSIM_MIN_SIDE else (zeros, zeros)
    return tf.cond(tf.reduce_min(tf.shape(x)[1:3]) >= MS_SSIM_MIN_SIDE, measure_large, lambda: (zeros, zeros))


def ms_ssim(x: tf.Tensor, x_hat: tf.Tensor) -> tf.Tensor:
    """Multi-scale structural similarity: [B] in [0, 1], for images of at least 161 pixels a side.

    The value equals tf.image.ssim_multiscale, but the gradient is finite everywhere. With random initial
    weights, the contrast term of a scale can be zero or negative. There TensorFlow differentiates x**p with
    p < 1 at zero. Here the gradient is that of a term kept above a small floor.
    """
    terms = tf.stack(ms_ssim_terms(x, x_hat), axis=-1)  # [B, 3, scales]
    weights = tf.constant(MS_SSIM_WEIGHTS)
    exact = tf.reduce_prod(tf.nn.relu(terms) ** weights, axis=-1)
    floored = tf.reduce_prod(keep_above_floor(terms) ** weights, axis=-1)
    return tf.reduce_mean(floored + tf.stop_gradient(exact - floored), axis=-1)


@tf.custom_gradient
def keep_above_floor(x: tf.Tensor) -> tf.Tensor:
    """max(x, floor) with the identity's gradient, so that a term below the floor can rise."""
    return tf.maximum(x, MS_SSIM_FLOOR), lambda upstream: upstream


def ms_ssim_terms(x: tf.Tensor, x_hat: tf.Tensor) -> list[tf.Tensor]:
    """[B, 3] for each scale: contrast-structure, times luminance at the last scale."""
    c1, c2 = MS_SSIM_K1**2, MS_SSIM_K2**2
    terms = []
    for scale in range(len(MS_SSIM_WEIGHTS)):
        if scale:
            x, x_hat = halve(x), halve(x_hat)
        # One convolution blurs all five moments: the channels are (x, x̂, x², x̂², x·x̂), three of each.
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
    """Filters each channel by a separable 11-tap Gaussian, without padding."""
    kernel = tf.tile(tf.constant(gaussian_window(), tf.float32)[:, None, None, None], (1, 1, x.shape[-1], 1))
    x = tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "VALID")
    return tf.nn.depthwise_conv2d(x, tf.transpose(kernel, (1, 0, 2, 3)), (1, 1, 1, 1), "VALID")


def halve(x: tf.Tensor) -> tf.Tensor:
    """The means of blocks of 2 x 2 pixels. An odd side is first padded by its mirror image, as TensorFlow does."""
    height, width = tf.unstack(tf.shape(x)[1:3])
    x = tf.pad(x, [[0, 0], [0, height % 2], [0, width % 2], [0, 0]], "SYMMETRIC")
    return tf.nn.avg_pool2d(x, 2, 2, "VALID")
