"""The quality of decoded pictures and the loss, in NumPy: for whole 8-bit images, without TensorFlow's start.

`metrics` computes the same values in training.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Optional

import numpy as np

from hyperprior.config import MS_SSIM_MIN_SIDE

# Wang, Simoncelli, Bovik: "Multi-scale structural similarity for image quality assessment", 2003.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_WINDOW, MS_SSIM_SIGMA, MS_SSIM_K1, MS_SSIM_K2 = 11, 1.5, 0.01, 0.03
BLOCK = 64  # outputs of the Gaussian filter that are one row of a matrix product


def lagrangian(bpp: Any, distortion: Any, lmbda: float, metric: str) -> Any:
    """bpp + lambda · 255² · mse, or bpp + lambda · (1 − ms_ssim): the convention of the published lambdas."""
    return bpp + lmbda * (255.0**2 if metric == "mse" else 1.0) * distortion


def psnr_db(mse: float) -> float:
    """PSNR in dB of a mean squared error on [0, 1] images; 100 dB at most."""
    return -10.0 * math.log10(max(mse, 1e-10))


def ms_ssim_db(value: float) -> float:
    """An MS-SSIM in decibels, -10 · log10(1 - value). It is 60 dB at most, because float32 resolves no more."""
    return -10.0 * math.log10(max(1.0 - value, 1e-6))


def compare_images(original: np.ndarray, decoded: np.ndarray) -> dict[str, Optional[float]]:
    """MSE on [0, 1], PSNR, MS-SSIM (None below 161 pixels a side) and MS-SSIM in dB of two [H, W, 3] uint8 images."""
    assert original.shape == decoded.shape, (original.shape, decoded.shape)
    error = float(np.square(original.astype(np.int32) - decoded).mean() / 255.0**2)
    values: dict[str, Optional[float]] = {"mse": error, "psnr_db": psnr_db(error)}
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return {**values, "ms_ssim": None, "ms_ssim_db": None}
    similarity = ms_ssim(*(image.transpose(2, 0, 1) / np.float32(255.0) for image in (original, decoded)))
    return {**values, "ms_ssim": similarity, "ms_ssim_db": ms_ssim_db(similarity)}


def ms_ssim(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Multi-scale structural similarity of [C, H, W] float32 images in [0, 1], both sides 161 or more."""
    c1, c2 = MS_SSIM_K1**2, MS_SSIM_K2**2
    product = np.ones(len(x))
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            x, x_hat = halve(x), halve(x_hat)
        moments = blur(np.concatenate([x, x_hat, x * x, x_hat * x_hat, x * x_hat]))
        mean, mean_hat, square, square_hat, both = np.split(moments, 5)
        means = mean * mean_hat
        squares = mean * mean + mean_hat * mean_hat
        term = (2.0 * (both - means) + c2) / (square + square_hat - squares + c2)
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            term *= (2.0 * means + c1) / (squares + c1)
        product *= np.maximum(term.mean(axis=(1, 2), dtype=np.float64), 0.0) ** weight
    return float(product.mean())


def blur(x: np.ndarray) -> np.ndarray:
    """Filters [C, H, W] by a separable 11-tap Gaussian, without padding."""
    return filter_last_axis(filter_last_axis(x).swapaxes(1, 2)).swapaxes(1, 2)


def filter_last_axis(x: np.ndarray) -> np.ndarray:
    matrix = gaussian_matrix()
    length = x.shape[-1] - (MS_SSIM_WINDOW - 1)
    count = -(-length // BLOCK)
    padded = np.zeros((*x.shape[:-1], count * BLOCK + MS_SSIM_WINDOW - 1), np.float32)
    padded[..., : x.shape[-1]] = x
    blocks = np.lib.stride_tricks.sliding_window_view(padded, len(matrix), axis=-1)[..., ::BLOCK, :]
    filtered = np.ascontiguousarray(blocks).reshape(-1, len(matrix)) @ matrix
    return filtered.reshape(*x.shape[:-1], -1)[..., :length]


@functools.lru_cache
def gaussian_matrix() -> np.ndarray:
    """[BLOCK + 10, BLOCK]: each column is the window, one place further down."""
    taps = gaussian_window()
    matrix = np.zeros((BLOCK + len(taps) - 1, BLOCK), np.float32)
    for column in range(BLOCK):
        matrix[column : column + len(taps), column] = taps
    return matrix


def gaussian_window() -> np.ndarray:
    taps = np.exp(-0.5 * ((np.arange(MS_SSIM_WINDOW) - MS_SSIM_WINDOW // 2) / MS_SSIM_SIGMA) ** 2)
    return taps / taps.sum()


def halve(x: np.ndarray) -> np.ndarray:
    """The means of blocks of 2 x 2 pixels. An odd side is first padded by its mirror image, as TensorFlow does."""
    _, height, width = x.shape
    x = np.pad(x, ((0, 0), (0, height % 2), (0, width % 2)), "symmetric")
    return 0.25 * (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2])
