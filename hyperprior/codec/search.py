"""The encoder's search: latents that cost less, for the same decoder.

In one pass, g_a and h_a give latents that are good for images in general. The search starts from them. For one image,
it minimises the loss of training, bits + λ · 255² · MSE, over the integers of ŷ and ẑ. In each round, a random share of
the elements may take a step d of +1 or −1, if this cost is below zero:

    bits(v + d) − bits(v) + d · gradient + ½ · curvature

For an element of ŷ, the derivatives are those of the error. For an element of ẑ, they are those of the bits of ŷ, whose
scales h_s computes from ẑ. The gradients are computed in every round; the curvatures are estimated once. Video encoders
call this method rate–distortion optimised quantisation; here the derivatives are those of a neural decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

from hyperprior.codec.tiles import Z_ELEMENTS
from hyperprior.model.priors import Bits

# Only a share of the elements may step in a round, because the cost of a step assumes that the others stay. The share
# falls from the first of these towards the second. 0.25 in all rounds saves less.
SHARES = (0.35, 0.1)
CAUTION = 1.2  # factor on the curvatures, because neighbours step at once; on photographs 1.0 and 1.35 save less
PROBES = 4  # random directions, to estimate a curvature
EPSILON = 0.05  # step of the finite differences, in latents and in logarithms of scales
LEAST_CURVATURE = 0.2  # the lowest curvature of a place, in units of the mean
LEAST_CURVATURE_OF_BITS = 0.05  # by the logarithm of a scale: where it is negative, a step would seem free
LIMIT = 2.0**15 - 1  # files hold int16

Transform = Callable[[tf.Tensor], tf.Tensor]


def search(
    g_s: Transform,
    scales: Transform,
    bits_of_y: Bits,
    bits_of_z: Transform,
    y: tf.Tensor,
    z: tf.Tensor,
    x: tf.Tensor,
    real: tf.Tensor,
    inside: tf.Tensor,
    weight: tf.Tensor,
    rounds: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """(ŷ, integers of ẑ) after `rounds` rounds: float32, as `y` [1, h, w, M] and `z` [1, h/4, w/4, C].

    They depend only on the arguments. `scales`: z → σ, [1, h, w, M]; `bits_of_y`: (y, σ) → the bits
    of each element; `bits_of_z`: z → the same; `x`: [1, 16h, 16w, 3] in [0, 1]; `real`: [1, 16h, 16w, 1], 0 for pixels
    of padding, whose errors do not count; `inside`: [1, h/4, w/4, 1], 0 for blocks that must not change; `weight`: the
    cost in bits of a squared error of 1 in one value of x̂, or 0 if ŷ must not change.
    """
    inside_y = tf.repeat(tf.repeat(inside, Z_ELEMENTS, axis=1), Z_ELEMENTS, axis=2)

    def draw(number: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        done = tf.cast(number, tf.float32) / tf.cast(rounds, tf.float32)
        share = SHARES[0] + done * (SHARES[1] - SHARES[0])
        return tf.cast(tf.random.stateless_uniform(tf.shape(values), tf.stack([number, 0])) < share, tf.float32)

    def step_y(number: tf.Tensor, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        scales_now = scales(z)
        with tf.GradientTape() as tape:
            tape.watch(y)
            error = weight * tf.reduce_sum(real * tf.square(x - tf.clip_by_value(g_s(y), 0.0, 1.0)))
        gradient = tape.gradient(error, y)
        return step(y, lambda y: bits_of_y(y, scales_now), gradient, curvature_y, draw(number, y) * inside_y)

    def step_z(number: tf.Tensor, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(z)
            bits = tf.reduce_sum(bits_of_y(y, scales(z)))
        return step(z, bits_of_z, tape.gradient(bits, z), curvature_z, draw(number, z) * inside)

    def run_round(number: tf.Tensor, y: tf.Tensor, z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        z = step_z(number, y, z)
        return number + 1, tf.cond(weight > 0.0, lambda: step_y(number, y, z), lambda: y), z

    curvature_y = tf.cond(
        weight > 0.0,
        lambda: estimate_curvature(g_s, y, 2.0 * weight * real, tf.nn.avg_pool2d(real, 16, 16, "SAME")),
        lambda: tf.zeros_like(y),
    )
    outer = curvature_of_bits(bits_of_y, y, scales(z))
    curvature_z = estimate_curvature(lambda z: tf.math.log(scales(z)), z, outer, tf.ones_like(inside))
    shapes = (tf.TensorShape([]), *(tf.TensorShape([1, None, None, values.shape[-1]]) for values in (y, z)))
    loop = (tf.constant(0), y, z)
    return tf.while_loop(
        lambda number, y, z: number < rounds, run_round, loop, shape_invariants=shapes, parallel_iterations=1
    )[1:]


def step(values: tf.Tensor, bits_of: Transform, gradient: tf.Tensor, curvature: tf.Tensor, may: tf.Tensor) -> tf.Tensor:
    """The integers after the cheapest of the steps −1, 0 and 1, where `may` is 1."""
    bits, least, best = bits_of(values), tf.zeros_like(values), tf.zeros_like(values)
    for d in (-1.0, 1.0):
        cost = bits_of(values + d) - bits + d * gradient + 0.5 * curvature
        best = tf.where(cost < least, d, best)
        least = tf.minimum(cost, least)
    return tf.clip_by_value(values + best * may, -LIMIT, LIMIT)


def curvature_of_bits(bits_of_y: Bits, y: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
    """The second derivative of each element's bits by the logarithm of its scale, and at least a small one."""
    low, middle, high = (bits_of_y(y, scales * math.exp(d)) for d in (-EPSILON, 0.0, EPSILON))
    return tf.maximum((low + high - 2.0 * middle) / EPSILON**2, LEAST_CURVATURE_OF_BITS)


def estimate_curvature(transform: Transform, values: tf.Tensor, outer: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """The second derivative of the cost by each of the `values`, times CAUTION: [1, h, w, channels].

    `outer`: that of the cost by each output of `transform`. With J the Jacobian of `transform`, the result is the
    diagonal of Jᵀ · outer · J. It is estimated as the mean of v ⊙ Jᵀ(outer ⊙ Jv) over random signs v (Hutchinson), and
    smoothed to a value of the channel times a value of the place. `share`: [1, h, w, 1], of the outputs that cost.
    """
    diagonal = tf.zeros_like(values)
    for number in range(PROBES):
        signs = tf.random.stateless_uniform(tf.shape(values), [number, 1], 0, 2, tf.int32)
        v = tf.cast(2 * signs - 1, tf.float32)
        along = (transform(values + EPSILON * v) - transform(values - EPSILON * v)) * outer / (2.0 * EPSILON)
        with tf.GradientTape() as tape:
            tape.watch(values)
            product = tf.reduce_sum(transform(values) * tf.stop_gradient(along))
        diagonal += v * tape.gradient(product, values) / PROBES
    of_channel = tf.reduce_mean(diagonal, axis=(1, 2), keepdims=True)
    of_place = tf.nn.avg_pool2d(tf.reduce_mean(diagonal, axis=3, keepdims=True), 3, 1, "SAME")
    mean = tf.reduce_mean(of_place)
    of_place = tf.maximum(of_place, LEAST_CURVATURE * mean * share)
    return CAUTION * tf.nn.relu(of_channel * of_place / mean)
