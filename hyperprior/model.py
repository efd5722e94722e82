"""The scale hyperprior: transforms, entropy models, and the bits they cost.

Ballé, Minnen, Singh, Hwang, Johnston: "Variational image compression with a scale hyperprior", ICLR 2018.

        x ──g_a──► y ──────────quantise──► ŷ ──g_s──► x̂
                   │                       ▲
                  |·|                      │ N(0, σ²) ∗ U(−½, ½)
                   │                       │
                  h_a──► z ──quantise──► ẑ ──h_s──► log σ
                                         ▲
                                         │ deep factorised prior ∗ U(−½, ½)

In training "quantise" adds uniform noise, drawn statelessly; elsewhere it rounds: y to integers, z to
integers plus the median of its prior.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_compression as tfc

from hyperprior import config, transforms
from hyperprior.config import DOWNSAMPLING

# The spread of the prior of z at first. With tfc's 10 the rate of z is three times as high after 500 steps.
PRIOR_SCALE = 1.0
MAX_BITS = 16  # that a value costs: no probability in a file's tables is below 2⁻¹⁶


class Forward(NamedTuple):
    """`x_hat`: [B, H, W, 3], not clipped; `bits_y`, `bits_z`: [B]; `y`, whose bits they are, and `log_scales`:
    [B, H/16, W/16, M]."""

    x_hat: tf.Tensor
    bits_y: tf.Tensor
    bits_z: tf.Tensor
    y: tf.Tensor
    log_scales: tf.Tensor


class ScaleHyperprior(tf.Module):
    """The model. Build it inside the strategy's scope, after `tf.random.set_seed`, which fixes its weights."""

    def __init__(self, settings: config.Model, dtype: str = "float32"):
        super().__init__()
        n, m, h = settings.num_filters, settings.latent_channels, settings.hyper_channels
        self.g_a = transforms.analysis(n, m, dtype)
        self.g_s = transforms.synthesis(n, m, dtype)
        self.h_a = transforms.hyper_analysis(m, h, dtype)
        self.h_s = transforms.hyper_synthesis(m, h, dtype)
        self.prior = tfc.NoisyDeepFactorized(batch_shape=(h,), init_scale=PRIOR_SCALE)
        self._settings = settings

    def named_variables(self) -> dict[str, tf.Variable]:
        """Every variable under a stable name such as `g_a/0/kernel` or `prior/matrix_0`."""
        named = {path.lstrip("/"): variable for path, variable in transforms.named_variables(self)}
        for variable in self.prior.base.trainable_variables:
            named["prior/" + variable.name.split("/")[-1].split(":")[0]] = variable
        return named

    def latent_shapes(self, height: int | tf.Tensor, width: int | tf.Tensor) -> tuple[tuple, tuple]:
        """The shapes of one image's y and z, for sides that are multiples of 64."""
        return (
            (height // 16, width // 16, self._settings.latent_channels),
            (height // 64, width // 64, self._settings.hyper_channels),
        )

    def train(self, x: tf.Tensor, noise_y: tf.Tensor, noise_z: tf.Tensor, proxy: str = "noise") -> Forward:
        """The differentiable forward pass: noise in [−½, ½) of the latents' shapes stands for quantisation.

        With `proxy` "rounded" g_s gets y rounded, and its gradient goes through as if it had not been; the rates
        are those of y and z with noise all the same.
        """
        y = self.g_a(x)
        z = self.h_a(tf.abs(y))
        y_hat = y + tf.stop_gradient(tf.round(y) - y) if proxy == "rounded" else y + noise_y
        return self._decode(y + noise_y, z + noise_z, y_hat)

    def round(self, x: tf.Tensor, z_offset: tf.Tensor) -> Forward:
        """The forward pass as the codec does it, in float32; `z_offset` is what `z_offset()` returns."""
        y = self.g_a(x, precise=True)
        z = self.h_a(tf.abs(y), precise=True)
        y_hat = tf.round(y)
        return self._decode(y_hat, tf.round(z - z_offset) + z_offset, y_hat, precise=True)

    @tf.function(autograph=False)
    def z_offset(self) -> tf.Tensor:
        """The median of each channel's prior, modulo 1: [hyper_channels]. Found by iteration: call it rarely."""
        return tfc.quantization_offset(self.prior)

    def _decode(self, y: tf.Tensor, z: tf.Tensor, y_hat: tf.Tensor, precise: bool = False) -> Forward:
        """Rates of y and z, pixels from y_hat."""
        log_scales = self.h_s(z, precise)
        return Forward(
            x_hat=self.g_s(y_hat, precise),
            bits_y=gaussian_bits(y, self.scales(log_scales)),
            bits_z=bits(self.prior, z),
            y=y,
            log_scales=log_scales,
        )

    def scales(self, log_scales: tf.Tensor) -> tf.Tensor:
        """Standard deviations within the table's range; outside it the gradient only leads back."""
        low, high = math.log(self._settings.scale_min), math.log(self._settings.scale_max)
        return tf.exp(tfc.upper_bound(tfc.lower_bound(log_scales, low), high))


def gaussian_bits(y: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """−log2 of the mass of N(0, scale²) in [y − ½, y + ½], summed over all but the first axis: [B].

    What `bits` gives for tfc.NoisyNormal(0, scale), to 1e-5, in fewer operations. A value counts for at
    most MAX_BITS; the gradient is that of the mass's logarithm all the same, far out that of the normal's tail.
    """
    return tf.reduce_sum(gaussian_bits_each(y, scale), axis=(1, 2, 3))


@tf.custom_gradient
def gaussian_bits_each(y: tf.Tensor, scale: tf.Tensor) -> Any:
    """The same, value by value."""
    inverse = 1.0 / scale
    distance = tf.abs(y)
    upper, lower = (0.5 - distance) * inverse, (-0.5 - distance) * inverse
    # Both complementary error functions are precise however small they are, and here never close to each other
    # where they are large.
    mass = 0.5 * (tf.math.erfc(upper * -(0.5**0.5)) - tf.math.erfc(lower * -(0.5**0.5)))

    def gradient(d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        d = d * inverse / -math.log(2.0)
        upper_density, lower_density = (tf.exp(-0.5 * tf.square(x)) for x in (upper, lower))
        far = mass < 1e-30
        share = (2.0 * math.pi) ** -0.5 / tf.where(far, 1.0, mass)
        by_distance = tf.where(far, upper, (lower_density - upper_density) * share)
        by_scale = tf.where(far, tf.square(upper), (lower * lower_density - upper * upper_density) * share)
        return d * by_distance * tf.sign(y), d * by_scale

    return tf.minimum(tf.math.log(tf.maximum(mass, 1e-30)) / -math.log(2.0), float(MAX_BITS)), gradient


def bits(prior: tfc.UniformNoiseAdapter, latent: tf.Tensor) -> tf.Tensor:
    """−log2 p(latent), summed over all but the first axis: [B].

    A value counts for at most MAX_BITS, what a file pays for it; its gradient is that of −log2 p all the same.
    """
    each = prior.log_prob(latent) / -math.log(2.0)
    return tf.reduce_sum(tfc.upper_bound(each, MAX_BITS, gradient="identity"), axis=(1, 2, 3))


def uniform_noise(shape: tuple, seed: int, step: tf.Tensor, lanes: tf.Tensor) -> tf.Tensor:
    """[b, *shape] in [−½, ½): a function of the seed, the step and each lane alone.

    `seed`: below 2⁶²; `step`: int64 scalar; `lanes`: [b] int64, b static: places in the global batch, below
    2²⁰. The same lane draws the same noise on whichever replica it lives.
    """
    places = tf.unstack(step * 2**20 + lanes)
    return tf.stack([tf.random.stateless_uniform(shape, tf.stack([seed, p]), -0.5, 0.5) for p in places])


def pad(x: tf.Tensor) -> tf.Tensor:
    """[B, H, W, C] with the last row and column repeated until both sides are multiples of 64."""
    for axis in (1, 2):
        size = tf.shape(x)[axis]
        padded = -(-size // DOWNSAMPLING) * DOWNSAMPLING
        x = tf.gather(x, tf.minimum(tf.range(padded), size - 1), axis=axis)
    return x
