"""The scale hyperprior: four transforms and two densities.

Ballé, Minnen, Singh, Hwang, Johnston: "Variational image compression with a scale hyperprior", ICLR 2018.

        x ──g_a──► y ──────────quantise──► ŷ ──g_s──► x̂
                   │                       ▲
                  |·|                      │ density of scale σ ∗ U(−½, ½)
                   │                       │
                  h_a──► z ──quantise──► ẑ ──h_s──► log σ
                                         ▲
                                         │ deep factorised prior ∗ U(−½, ½)

In training, "quantise" adds uniform noise. Elsewhere it rounds: y to integers with a dead zone, and z to integers plus
the median of its prior.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from hyperprior import config
from hyperprior.config import DOWNSAMPLING
from hyperprior.model import architecture, densities, priors
from hyperprior.model.bounds import lower_bound, upper_bound
from hyperprior.model.transforms import Place, Transform, places_of_variables


class Forward(NamedTuple):
    """`x_hat`: [B, H, W, 3], not clipped; `bits_y`, `bits_z`: [B]; `y`, the latents that `bits_y` counts, and
    `log_scales`: [B, H/16, W/16, M]."""

    x_hat: tf.Tensor
    bits_y: tf.Tensor
    bits_z: tf.Tensor
    y: tf.Tensor
    log_scales: tf.Tensor


class ScaleHyperprior(tf.Module):
    """The model. Build it inside the strategy's scope, after `tf.random.set_seed`, which fixes its weights.

    `precision`: the type of the transforms in training: float32, mixed_bfloat16 or mixed_float16.
    """

    def __init__(self, settings: config.Model, precision: str = "float32"):
        super().__init__()
        dtype = precision.removeprefix("mixed_")
        self.g_a = Transform(architecture.analysis(settings), dtype)
        # With a last layer in float32 a step on a CPU would take 6% longer.
        self.g_s = Transform(architecture.synthesis(settings), dtype, last_dtype=dtype)
        self.h_a = Transform(architecture.hyper_analysis(settings), dtype)
        self.h_s = Transform(architecture.hyper_synthesis(settings), dtype)
        self.prior = priors.FactorizedPrior(settings.hyper_channels)
        self.bits_of_each_y = priors.BITS[settings.density]
        self._settings = settings

    def named_variables(self) -> dict[str, tf.Variable]:
        """Every variable under a stable name such as `g_a/0/kernel` or `prior/matrix_0`."""
        return {name: owner[key] for name, (owner, key) in self._places().items()}

    @contextlib.contextmanager
    def computing_with(self, values: dict[str, tf.Tensor]) -> Iterator[None]:
        """Inside this context the model computes with these tensors in place of its variables."""
        places, variables = self._places(), self.named_variables()
        try:
            for name, (owner, key) in places.items():
                owner[key] = values[name]
            yield
        finally:
            for name, (owner, key) in places.items():
                owner[key] = variables[name]

    def _places(self) -> dict[str, Place]:
        places = {path.lstrip("/"): place for path, place in places_of_variables(self)}
        return {**places, **{f"prior/{name}": Place(self.prior.parameters, name) for name in self.prior.parameters}}

    def latent_shapes(self, height: int | tf.Tensor, width: int | tf.Tensor) -> tuple[tuple, tuple]:
        """The shapes of one image's y and z, for sides that are multiples of 64."""
        return (
            (height // 16, width // 16, self._settings.latent_channels),
            (height // 64, width // 64, self._settings.hyper_channels),
        )

    def train(self, x: tf.Tensor, noise_y: tf.Tensor, noise_z: tf.Tensor, proxy: str = "noise") -> Forward:
        """The differentiable forward pass, where noise in [−½, ½) of the latents' shapes replaces quantisation.

        With `proxy` "rounded", g_s gets y as the encoder rounds it, and the rate is that of these integers. The
        gradient by y ignores the rounding in g_s, and in the rate it is that of y with noise.
        """
        y = self.g_a(x)
        z = self.h_a(tf.abs(y)) + noise_z
        log_scales = self.h_s(z)
        scales = self.scales(log_scales)
        y_hat = y + noise_y
        if proxy == "noise":
            bits_y = self.bits_of_y(y_hat, scales)
        else:
            by_noise = self.bits_of_y(y_hat, tf.stop_gradient(scales))
            integers = tf.stop_gradient(priors.round_latents(y, scales, self.bits_of_each_y))
            bits_y = self.bits_of_y(integers, scales) + by_noise - tf.stop_gradient(by_noise)
            y_hat = y + tf.stop_gradient(integers - y)
        return Forward(self.g_s(y_hat), bits_y, self.prior.bits(z), y_hat, log_scales)

    def round(self, x: tf.Tensor, z_offset: tf.Tensor) -> Forward:
        """The forward pass as the codec computes it, in float32. `z_offset`: the result of `z_offset()`."""
        y = self.g_a(x, precise=True)
        z = tf.round(self.h_a(tf.abs(y), precise=True) - z_offset) + z_offset
        log_scales = self.h_s(z, precise=True)
        scales = self.scales(log_scales)
        y_hat = priors.round_latents(y, scales, self.bits_of_each_y)
        bits_y = self.bits_of_y(y_hat, scales)
        return Forward(self.g_s(y_hat, precise=True), bits_y, self.prior.bits(z), y_hat, log_scales)

    def reconstruct(self, x: tf.Tensor, z_offset: tf.Tensor) -> tuple[tf.Tensor, Forward]:
        """(x̂, forward pass) of [B, H, W, 3] images of any size. x̂ has the values of 8-bit pixels, in [0, 1]."""
        height, width = tf.unstack(tf.shape(x)[1:3])
        out = self.round(pad(x), z_offset)
        x_hat = tf.clip_by_value(out.x_hat[:, :height, :width], 0.0, 1.0)
        return tf.round(x_hat * 255.0) / 255.0, out

    def z_offset(self) -> tf.Tensor:
        """The median of each channel's prior, modulo 1: [hyper_channels] float32. Call it rarely: it bisects."""
        medians = densities.find_medians(self.prior.arrays())
        return tf.constant(medians - np.rint(medians), tf.float32)

    def bits_of_y(self, y: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        """−log2 of the masses of y's density in [y − ½, y + ½], summed over all but the first axis: [B]."""
        return tf.reduce_sum(self.bits_of_each_y(y, scales), axis=(1, 2, 3))

    def scales(self, log_scales: tf.Tensor) -> tf.Tensor:
        """Standard deviations, clipped to the table's range. Outside it, only gradients that lead back into it pass."""
        low, high = math.log(self._settings.scale_min), math.log(self._settings.scale_max)
        return tf.exp(upper_bound(lower_bound(log_scales, low), high))


def pad(x: tf.Tensor) -> tf.Tensor:
    """[B, H, W, C] with the last row and column repeated until both sides are multiples of 64."""
    for axis in (1, 2):
        size = tf.shape(x)[axis]
        padded = -(-size // DOWNSAMPLING) * DOWNSAMPLING
        x = tf.gather(x, tf.minimum(tf.range(padded), size - 1), axis=axis)
    return x
