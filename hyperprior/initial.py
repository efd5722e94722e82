"""The weights that training starts from: a wavelet packet of the image, and its inverse.

With random weights the first thousands of steps go into finding out that neighbouring pixels are alike. Here each
stage of g_a starts as an orthonormal Haar transform of its input, so that y holds the bands of luma and chroma of
lowest frequency, and g_s as the inverse. y is scaled so that rounding to integers is as coarse as lambda says it
should be, and h_s starts from the spread that such bands have in photographs. What remains of the channels starts
small and random, to be learned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hyperprior import config
from hyperprior.model import ScaleHyperprior
from hyperprior.transforms import GDN_GAMMA, LATENT_GAIN

# Luma, the blue-red axis and the green-magenta axis, orthonormal.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
# Measured on ImageNet: the standard deviation of a band at frequency f (in half periods per 16 pixels), for pixels
# in [0, 1], is about STD[colour] / (f + 0.17)^0.85; DC is around 0.5.
STD, STD_OFFSET, STD_SLOPE = (0.8, 0.22, 0.12), 0.17, 0.85
MS_SSIM_LAMBDA = 1280.0  # the published lambdas of MS-SSIM, over those of MSE at about the same rate

# The taps on the two pixels that each output halves, at places 1 and 2 of a kernel of five with stride 2.
LOW, HIGH = np.array([1, 1]) / 2**0.5, np.array([1, -1]) / 2**0.5
# Random weights, relative to those of a random start: into and out of channels that hold no band, and beside the
# wavelets of those that do.
SPARE, BESIDE = 0.3, 0.03
GAMMA = 0.02  # of GDN, for its own channel: near the identity
SPREAD = 0.3  # of h_s's last layer, relative to a random start: its output starts near the bias


class Band(NamedTuple):
    """A channel: its colour, and its frequency down and across in half periods per block of the stage."""

    colour: int
    down: int = 0
    across: int = 0

    def frequency(self) -> float:
        return math.hypot(self.down, self.across)


class Child(NamedTuple):
    """A band of the next stage: which channel it comes from, by which taps."""

    band: Band
    parent: int
    down: np.ndarray
    across: np.ndarray


def halve(bands: list[Band], most: int) -> list[Child]:
    """The bands of the next stage, at most `most`: those with the most to tell, first."""
    children = []
    for parent, (colour, down, across) in enumerate(bands):
        for i in (0, 1):
            for j in (0, 1):
                # The high half of an odd band comes out mirrored.
                band = Band(colour, 2 * down + (i ^ (down & 1)), 2 * across + (j ^ (across & 1)))
                children.append(Child(band, parent, HIGH if i else LOW, HIGH if j else LOW))
    return sorted(children, key=lambda child: -spread(child.band))[:most]


def spread(band: Band) -> float:
    """The standard deviation of a band over photographs, for pixels in [0, 1]."""
    return STD[band.colour] / (band.frequency() + STD_OFFSET) ** STD_SLOPE


def latent_gain(loss: config.Loss) -> float:
    """How much larger y is than the orthonormal transform of pixels in [0, 1].

    Where loss = bits / pixels + lambda · error / (3 · pixels), with error = Σ Δ²/12 over the coefficients of a
    uniform quantiser, is least: dbits/dΔ = −1 / (Δ · ln 2), so Δ² = 18 / (ln 2 · lambda), in levels of 255.
    """
    lmbda = loss.lmbda / (MS_SSIM_LAMBDA if loss.metric == "ms-ssim" else 1.0)
    return 255.0 * math.sqrt(math.log(2.0) * lmbda / 18.0)


def start_as_wavelets(model: ScaleHyperprior, loss: config.Loss, scale_min: float = 0.11) -> None:
    """Gives a model that was just built, with random weights, those that this file describes.

    `scale_min`: the smallest standard deviation of y that the model can tell.
    """
    variables = model.named_variables()
    values = {name: variable.numpy() for name, variable in variables.items()}
    gain = latent_gain(loss)
    bands = [Band(colour) for colour in range(3)]
    for stage in range(4):
        # Both are [5, 5, finer channels, coarser channels].
        down, up = values[f"g_a/{2 * stage}/kernel"], values[f"g_s/{6 - 2 * stage}/kernel"]
        if stage == 3:
            down, up = down / LATENT_GAIN, up * LATENT_GAIN
        children = halve(bands, down.shape[3])
        beside = np.where(np.arange(down.shape[3]) < len(children), BESIDE, SPARE).astype(np.float32)
        down, up = down * beside, up * beside
        for channel, child in enumerate(children):
            finer = COLOURS[child.parent] if stage == 0 else np.eye(down.shape[2])[child.parent]
            taps = child.down[:, None, None] * child.across[:, None] * finer
            down[1:3, 1:3, :, channel] += taps
            up[1:3, 1:3, :, channel] += taps
        if stage == 0:  # around mid-gray, which the bias of g_s's last layer adds
            values["g_a/0/bias"] = -0.5 * down.sum(axis=(0, 1, 2))
        if stage == 3:
            down, up = down * gain, up / gain
        values[f"g_a/{2 * stage}/kernel"], values[f"g_s/{6 - 2 * stage}/kernel"] = down, up
        bands = [child.band for child in children]
    for name, value in values.items():
        if name.endswith("/gamma"):  # GDNParameter keeps square roots
            values[name] = value * (GAMMA / GDN_GAMMA) ** 0.5
    values["h_s/2/kernel"] = values["h_s/2/kernel"] * SPREAD
    known = [math.log(max(gain * spread(band), scale_min)) for band in bands]
    values["h_s/2/bias"][: len(known)] += np.array(known, np.float32)
    for name, variable in variables.items():
        variable.assign(values[name])


def rescale(arrays: dict[str, np.ndarray], before: config.Loss, now: config.Loss) -> dict[str, np.ndarray]:
    """The weights of the same model with y as large as another lambda wants it: quantised coarser or finer."""
    factor = latent_gain(now) / latent_gain(before)
    factors = {"g_a/6/kernel": factor, "g_a/6/bias": factor, "g_s/0/kernel": 1 / factor, "h_a/0/kernel": 1 / factor}
    found = {**arrays, **{name: np.float32(by) * arrays[name] for name, by in factors.items()}}
    found["h_s/2/bias"] = arrays["h_s/2/bias"] + np.float32(math.log(factor))
    return found
