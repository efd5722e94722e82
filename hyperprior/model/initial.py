"""The weights that training starts from: a wavelet packet of the image, and its inverse.

With random weights, training needs thousands of steps to learn that neighbouring pixels are similar. Here each stage
of g_a starts as an orthonormal Haar transform of its input, and g_s starts as the inverse. So y holds the bands of luma
and chroma with the lowest frequencies. y is scaled so that rounding to integers is as coarse as lambda asks for. h_s
starts from the standard deviations that such bands have in photographs. The remaining channels start with small random
weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hyperprior import config
from hyperprior.model.architecture import LATENT_GAIN, ROOT_OFFSET
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.layers import GDN_GAMMA

# Luma, the blue-red axis and the green-magenta axis, orthonormal.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
# Measured on ImageNet: the standard deviation of a band at frequency f (in half periods per 16 pixels), for pixels
# in [0, 1], is about STD[colour] / (f + 0.17)^0.85. At frequency 0 it is the deviation from mid-gray, 0.5.
STD, STD_OFFSET, STD_SLOPE = (0.8, 0.22, 0.12), 0.17, 0.85
MS_SSIM_LAMBDA = 1280.0  # a published lambda for MS-SSIM, divided by the one for MSE at about the same rate

# The taps on the two pixels that become one output: places 1 and 2 of a kernel of five with stride 2.
LOW, HIGH = np.array([1, 1]) / 2**0.5, np.array([1, -1]) / 2**0.5
# Factors on random weights: SPARE for channels that hold no band, BESIDE for those that hold one, where the wavelet is
# added.
SPARE, BESIDE = 0.3, 0.03
GAMMA = 0.02  # GDN's weight of a channel for itself: GDN starts near the identity
H_S_GAIN = 0.3  # factor on the random weights of h_s's last layer: its output starts near the bias


class Band(NamedTuple):
    """A channel: its colour, and its frequencies down and across, in half periods per block of the stage."""

    colour: int
    down: int = 0
    across: int = 0


class Child(NamedTuple):
    """A band of the next stage, the channel that it comes from, and the taps that make it."""

    band: Band
    parent: int
    down: np.ndarray
    across: np.ndarray


def split_bands(bands: list[Band], most: int) -> list[Child]:
    """The bands of the next stage: the `most` bands with the largest standard deviations, largest first."""
    children = []
    for parent, (colour, down, across) in enumerate(bands):
        for i in (0, 1):
            for j in (0, 1):
                # In an odd band the frequencies are in reverse order, so the low taps give the higher half.
                band = Band(colour, 2 * down + (i ^ (down & 1)), 2 * across + (j ^ (across & 1)))
                children.append(Child(band, parent, HIGH if i else LOW, HIGH if j else LOW))
    return sorted(children, key=lambda child: -standard_deviation(child.band))[:most]


def standard_deviation(band: Band) -> float:
    """The standard deviation of a band over photographs, for pixels in [0, 1]."""
    return STD[band.colour] / (math.hypot(band.down, band.across) + STD_OFFSET) ** STD_SLOPE


def latent_gain(loss: config.Loss) -> float:
    """The factor from the orthonormal transform of pixels in [0, 1] to y.

    It is 255 / Δ, with the quantiser step Δ, in levels of 255, that minimises
    loss = bits / pixels + lambda · error / (3 · pixels). The error of a uniform quantiser is Σ Δ²/12 over the
    coefficients, and dbits/dΔ is −1 / (Δ · ln 2) for each coefficient, so Δ² = 18 / (ln 2 · lambda).
    """
    lmbda = loss.lmbda / (MS_SSIM_LAMBDA if loss.metric == "ms-ssim" else 1.0)
    return 255.0 * math.sqrt(math.log(2.0) * lmbda / 18.0)


def start_as_wavelets(model: ScaleHyperprior, loss: config.Loss, scale_min: float = 0.11) -> None:
    """Replaces the random weights of a new model with the weights that this file describes.

    `scale_min`: the smallest standard deviation of y that the model can represent.
    """
    variables = model.named_variables()
    values = {name: variable.numpy() for name, variable in variables.items()}
    gain = latent_gain(loss)
    bands = [Band(colour) for colour in range(3)]
    for stage in range(4):
        # Both kernels are [5, 5, finer channels, coarser channels].
        down, up = values[f"g_a/{2 * stage}/kernel"], values[f"g_s/{6 - 2 * stage}/kernel"]
        if stage == 3:
            down, up = down / LATENT_GAIN, up * LATENT_GAIN
        children = split_bands(bands, down.shape[3])
        beside = np.where(np.arange(down.shape[3]) < len(children), BESIDE, SPARE).astype(np.float32)
        down, up = down * beside, up * beside
        for channel, child in enumerate(children):
            finer = COLOURS[child.parent] if stage == 0 else np.eye(down.shape[2])[child.parent]
            taps = child.down[:, None, None] * child.across[:, None] * finer
            down[1:3, 1:3, :, channel] += taps
            up[1:3, 1:3, :, channel] += taps
        if stage == 0:  # subtracts mid-gray; the bias of g_s's last layer adds it again
            values["g_a/0/bias"] = -0.5 * down.sum(axis=(0, 1, 2))
        if stage == 3:
            down, up = down * gain, up / gain
        values[f"g_a/{2 * stage}/kernel"], values[f"g_s/{6 - 2 * stage}/kernel"] = down, up
        bands = [child.band for child in children]
    for name, value in values.items():
        if name.endswith("/gamma"):  # stored as square roots
            values[name] = value * (GAMMA / GDN_GAMMA) ** 0.5
    values["h_s/2/kernel"] = values["h_s/2/kernel"] * H_S_GAIN
    log_scales = [math.log(max(gain * standard_deviation(band), scale_min)) for band in bands]
    values["h_s/2/bias"][: len(log_scales)] += np.array(log_scales, np.float32)
    for name, variable in variables.items():
        variable.assign(values[name])


def widen(narrow: dict[str, np.ndarray], wide: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a model with fewer filters, placed into a wider one so that it computes the same.

    No new channel feeds an old one, as in Net2Net (Chen, Goodfellow, Shlens, ICLR 2016). The weights that feed the new
    channels are those of `wide`.
    """
    widened = dict(narrow)
    for name, old in narrow.items():
        new = wide[name]
        if name.startswith("g_") and new.shape > old.shape:
            widened[name] = new = new.copy()
            if old.ndim == 1:
                new[: len(old)] = old
                continue
            if name.startswith("g_s") and name.endswith("kernel"):  # of a transposed convolution: outputs, then inputs
                new, old = new.swapaxes(-1, -2), old.swapaxes(-1, -2)
            inputs, outputs = old.shape[-2:]
            new[..., inputs:, :outputs] = ROOT_OFFSET if name.endswith("gamma") else 0.0
            new[..., :inputs, :outputs] = old
    return widened


def rescale(arrays: dict[str, np.ndarray], before: config.Loss, now: config.Loss) -> dict[str, np.ndarray]:
    """The weights of the same model with y scaled for another lambda, so that rounding is coarser or finer."""
    factor = latent_gain(now) / latent_gain(before)
    factors = {"g_a/6/kernel": factor, "g_a/6/bias": factor, "g_s/0/kernel": 1 / factor, "h_a/0/kernel": 1 / factor}
    rescaled = {**arrays, **{name: np.float32(by) * arrays[name] for name, by in factors.items()}}
    rescaled["h_s/2/bias"] = arrays["h_s/2/bias"] + np.float32(math.log(factor))
    return rescaled
