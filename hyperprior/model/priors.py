"""The bits that latents cost: −log2 of their probability under the model's densities (paper, section 3, appendix 6).

Each element of y has a Gaussian (or a logistic density) with its own scale. Each channel of z has a learned density.
Both are convolved with a unit box, which models rounding. The noise of training is drawn here, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hyperprior.model.architecture import PRIOR_WIDTHS
from hyperprior.model.densities import BITS_PER_SQUARE, LOGISTIC_SLOPE, MAX_BITS, STAGES

# The initial scale of the prior of z. With 10, as in tensorflow-compression, the rate of z is three times as high
# after 500 steps.
PRIOR_SCALE = 1.0
AUTO_SELECT = 3  # as in tf.random.Algorithm: the generator that suits the device
SMALLEST_MASS = 1e-30  # a smaller mass may underflow to 0 in float32, and 0 has no logarithm


class FactorizedPrior(tf.Module):
    """A learned density for each channel of z, convolved with the unit box (appendices 6.1 and 6.2).

    The cumulative density of a channel is the sigmoid of a small network that only rises: softplus keeps its
    matrices positive, and tanh keeps the slope of each step positive. `parameters`: the variables by name.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        scale = PRIOR_SCALE ** (1.0 / STAGES)
        matrices, biases, factors = [], [], []
        for inputs, outputs in zip(PRIOR_WIDTHS, PRIOR_WIDTHS[1:]):
            initial = math.log(math.expm1(1.0 / scale / outputs))
            matrices.append(tf.Variable(tf.fill((channels, outputs, inputs), initial)))
            biases.append(tf.Variable(tf.random.uniform((channels, outputs, 1), -0.5, 0.5)))
            factors.append(tf.Variable(tf.zeros((channels, outputs, 1))))
        groups = {"bias": biases, "factor": factors[:-1], "matrix": matrices}
        self.parameters = {f"{kind}_{i}": v for kind, group in groups.items() for i, v in enumerate(group)}

    def bits(self, z: tf.Tensor) -> tf.Tensor:
        """−log2 p(z), summed over all but the first axis: [B]."""
        return tf.reduce_sum(self.bits_each(z), axis=(1, 2, 3))

    def bits_each(self, z: tf.Tensor) -> tf.Tensor:
        """−log2 p of each value, in z's shape.

        A value counts at most MAX_BITS, its cost in a file. Its gradient is still that of −log2 p.
        """
        values = tf.transpose(tf.reshape(z, (-1, self.channels)))[:, None]  # [C, 1, values]
        lower, upper = tf.split(self._logits(tf.concat([values - 0.5, values + 0.5], axis=2)), 2, axis=2)
        # Both ends are mirrored to the side of the median where their sigmoids are small, and so precise.
        is_above = lower + upper > 0.0
        each = sigmoid_bits(tf.where(is_above, -upper, lower), tf.where(is_above, -lower, upper))
        return tf.reshape(tf.transpose(each[:, 0]), tf.shape(z))

    def _logits(self, x: tf.Tensor) -> tf.Tensor:
        """The network: [C, 1, values], the logit of the cumulative density of each value."""
        for i in range(STAGES):
            x = tf.linalg.matmul(tf.nn.softplus(self.parameters[f"matrix_{i}"]), x) + self.parameters[f"bias_{i}"]
            if i < STAGES - 1:
                x += tf.tanh(self.parameters[f"factor_{i}"]) * tf.tanh(x)
        return x

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters, for `densities`."""
        return {name: variable.numpy() for name, variable in self.parameters.items()}


def sigmoid_bits(lower: tf.Tensor, upper: tf.Tensor) -> tf.Tensor:
    """−log2(sigmoid(upper) − sigmoid(lower)) of each value, for lower + upper at most 0.

    A value counts at most MAX_BITS. The gradient is still that of the logarithm.
    """
    log_upper, log_lower = tf.math.log_sigmoid(upper), tf.math.log_sigmoid(lower)
    return limit_bits((log_upper + tf.math.log1p(-tf.exp(log_lower - log_upper))) * (-1.0 / math.log(2.0)))


@tf.custom_gradient
def limit_bits(bits: tf.Tensor) -> Any:
    """At most MAX_BITS, with the gradient of `bits`."""
    return tf.minimum(bits, float(MAX_BITS)), lambda d: d


@tf.custom_gradient
def gaussian_bits(y: tf.Tensor, scale: tf.Tensor) -> Any:
    """−log2 of the mass of N(0, scale²) in [y − ½, y + ½], of each value.

    A value counts at most MAX_BITS. The gradient is still that of the mass's logarithm. Where the mass underflows, it
    is that of the normal's tail.
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


def logistic_bits(y: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """`gaussian_bits` of a logistic density with the same standard deviation.

    With a = upper and b = lower, sigmoid(a) − sigmoid(b) = sigmoid(a) sigmoid(−b) (1 − exp(b − a)).
    """
    distance, slope = tf.abs(y), LOGISTIC_SLOPE / scale
    upper, lower = (0.5 - distance) * slope, (-0.5 - distance) * slope
    log_mass = tf.math.log_sigmoid(upper) + tf.math.log_sigmoid(-lower) + tf.math.log(-tf.math.expm1(-slope))
    return limit_bits(log_mass * (-1.0 / math.log(2.0)))


Bits = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (y, scale) → bits, all of one shape
BITS: dict[str, Bits] = {"gaussian": gaussian_bits, "logistic": logistic_bits}  # by config.Model.density


def round_latents(y: tf.Tensor, scale: tf.Tensor, bits: Bits) -> tf.Tensor:
    """y rounded with a dead zone: to the nearest integer, or the next one towards 0 if that saves more bits than its
    larger error costs. `codec.tables` does the same with the bits of the tables. The encoder of a model for MSE
    weighs errors by their scale, too: `Codec.bits_per_square`."""
    nearest = tf.round(y)
    smaller = nearest - tf.sign(nearest)
    saved = bits(nearest, scale) - bits(smaller, scale)
    error = tf.math.squared_difference(y, smaller) - tf.math.squared_difference(y, nearest)
    return tf.where(saved > BITS_PER_SQUARE * error, smaller, nearest)


def uniform_noise(shape: tuple, seed: int, step: tf.Tensor, lanes: tf.Tensor) -> tf.Tensor:
    """[b, *shape] in [−½, ½). It depends only on the seed, the step and the lane, not on the replica.

    `seed`: below 2⁶²; `step`: int64 scalar; `lanes`: [b] int64 with static b, places in the global batch, below 2²⁰.
    """
    size, generator = tf.constant(shape), tf.constant(AUTO_SELECT)
    with tf.device("CPU:0"):  # a GPU's random numbers take their seed from the host's memory
        states = [
            tf.raw_ops.StatelessRandomGetKeyCounter(seed=tf.stack([seed, place]))
            for place in tf.unstack(step * 2**20 + lanes)
        ]
    # tf.random.stateless_uniform has four more operations, which map [0, 1) to itself.
    draws = [
        tf.raw_ops.StatelessRandomUniformV2(shape=size, key=state.key, counter=state.counter, alg=generator)
        for state in states
    ]
    return tf.stack(draws) - 0.5
