"""The bits that latents cost: −log2 of their probability under the model's densities (paper, section 3, appendix 6).

Each element of y has a Gaussian with its own scale. Each channel of z has a learned density. Both are convolved with a
unit box, which models rounding. The noise of training is drawn here, too.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf
import tensorflow_compression as tfc

# The initial scale of the prior of z. With tfc's default of 10, the rate of z is three times as high after 500 steps.
PRIOR_SCALE = 1.0
MAX_BITS = 16  # the most that a value costs: no probability in a file's tables is below 2⁻¹⁶
SMALLEST_MASS = 1e-30  # a smaller mass may underflow to 0 in float32, and 0 has no logarithm


def factorized_prior(channels: int) -> tfc.NoisyDeepFactorized:
    """A learned density for each channel of z (appendix 6.1), convolved with the unit box (6.2)."""
    return tfc.NoisyDeepFactorized(batch_shape=(channels,), init_scale=PRIOR_SCALE)


def factorized_bits(prior: tfc.UniformNoiseAdapter, z: tf.Tensor) -> tf.Tensor:
    """−log2 p(z), summed over all but the first axis: [B].

    A value counts at most MAX_BITS, its cost in a file. Its gradient is still that of −log2 p.
    """
    each = prior.log_prob(z) / -math.log(2.0)
    return tf.reduce_sum(tfc.upper_bound(each, MAX_BITS, gradient="identity"), axis=(1, 2, 3))


def gaussian_bits(y: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """−log2 of the mass of N(0, scale²) in [y − ½, y + ½], summed over all but the first axis: [B]."""
    return tf.reduce_sum(gaussian_bits_each(y, scale), axis=(1, 2, 3))


@tf.custom_gradient
def gaussian_bits_each(y: tf.Tensor, scale: tf.Tensor) -> Any:
    """`gaussian_bits` of each value, in y's shape.

    The bits are those of tfc.NoisyNormal(0, scale) to 1e-5, in fewer operations, and at most MAX_BITS for a value. The
    gradient is still that of the mass's logarithm. Where the mass underflows, it is that of the normal's tail.
    """
    inverse = 1.0 / scale
    distance = tf.abs(y)
    upper, lower = (0.5 - distance) * inverse, (-0.5 - distance) * inverse
    # erfc is precise however small it is. Where both are large, their difference is large enough to be precise, too.
    mass = 0.5 * (tf.math.erfc(upper * -(0.5**0.5)) - tf.math.erfc(lower * -(0.5**0.5)))

    def gradient(d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        d = d * inverse / -math.log(2.0)
        upper_density, lower_density = (tf.exp(-0.5 * tf.square(x)) for x in (upper, lower))
        far = mass < SMALLEST_MASS
        share = (2.0 * math.pi) ** -0.5 / tf.where(far, 1.0, mass)
        by_distance = tf.where(far, upper, (lower_density - upper_density) * share)
        by_scale = tf.where(far, tf.square(upper), (lower * lower_density - upper * upper_density) * share)
        return d * by_distance * tf.sign(y), d * by_scale

    bits = tf.math.log(tf.maximum(mass, SMALLEST_MASS)) / -math.log(2.0)
    return tf.minimum(bits, float(MAX_BITS)), gradient


def uniform_noise(shape: tuple, seed: int, step: tf.Tensor, lanes: tf.Tensor) -> tf.Tensor:
    """[b, *shape] in [−½, ½). It depends only on the seed, the step and the lane, not on the replica.

    `seed`: below 2⁶²; `step`: int64 scalar; `lanes`: [b] int64 with static b, places in the global batch, below
    2²⁰.
    """
    places = tf.unstack(step * 2**20 + lanes)
    return tf.stack([tf.random.stateless_uniform(shape, tf.stack([seed, p]), -0.5, 0.5) for p in places])
