"""The encoder's search: latents that cost less, for the same decoder.

In one pass, g_a gives latents that are good for images in general. The search starts from them. For one image, it
minimises the loss of training, bits + λ · 255² · MSE, over the integers ŷ. In each round, a random share of the
elements may take a step d of +1 or −1, if this cost is below zero:

    bits(ŷ + d) − bits(ŷ) + d · gradient + ½ · curvature

The gradient of the error is computed in every round; its curvature is estimated once. Video encoders call this method
rate–distortion optimised quantisation; here the derivatives are those of a neural decoder. ẑ and σ do not change.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from hyperprior.model.priors import gaussian_bits_each

SHARE = 0.25  # of the elements may step in a round, because the cost of a step assumes that its neighbours stay
CAUTION = 1.2  # factor on the curvature, because neighbours step at once; on photographs 1.0 and 1.35 save less
PROBES = 4  # random directions, to estimate the curvature
EPSILON = 0.05  # step of the finite differences, in latents
LEAST_CURVATURE = 0.2  # the lowest curvature of a place, in units of the mean
LIMIT = 2.0**15 - 1  # files hold int16

Transform = Callable[[tf.Tensor], tf.Tensor]


def search(
    g_s: Transform,
    y: tf.Tensor,
    scales: tf.Tensor,
    x: tf.Tensor,
    real: tf.Tensor,
    inside: tf.Tensor,
    weight: float,
    rounds: tf.Tensor,
) -> tf.Tensor:
    """ŷ after `rounds` rounds: [1, h, w, M] float32, as `y`. It depends only on the arguments.

    `scales`: σ, [1, h, w, M]; `x`: [1, 16h, 16w, 3] in [0, 1]; `real`: [1, 16h, 16w, 1], 0 for pixels of padding,
    whose errors do not count; `inside`: [1, h, w, 1], 0 for elements that must not change; `weight`: the cost in bits
    of a squared error of 1 in one value of x̂.
    """
    curvature = estimate_curvature(g_s, y, real, weight)

    def step(number: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(y)
            error = weight * tf.reduce_sum(real * tf.square(x - tf.clip_by_value(g_s(y), 0.0, 1.0)))
        gradient = tape.gradient(error, y)
        drawn = tf.random.stateless_uniform(tf.shape(y), tf.stack([number, 0])) < SHARE
        bits, least, best = gaussian_bits_each(y, scales), tf.zeros_like(y), tf.zeros_like(y)
        for d in (-1.0, 1.0):
            cost = gaussian_bits_each(y + d, scales) - bits + d * gradient + 0.5 * curvature
            best = tf.where(cost < least, d, best)
            least = tf.minimum(cost, least)
        return number + 1, tf.clip_by_value(tf.where(drawn, y + best * inside, y), -LIMIT, LIMIT)

    shapes = (tf.TensorShape([]), tf.TensorShape([1, None, None, y.shape[-1]]))
    return tf.while_loop(
        lambda number, y: number < rounds, step, (tf.constant(0), y), shape_invariants=shapes, parallel_iterations=1
    )[1]


def estimate_curvature(g_s: Transform, y: tf.Tensor, real: tf.Tensor, weight: float) -> tf.Tensor:
    """The second derivative of the error by each element, times CAUTION: [1, h, w, M].

    The derivative is 2 · weight · diag(JᵀJ), with J the Jacobian of g_s. The diagonal is estimated as the mean of
    v ⊙ JᵀJv over random signs v (Hutchinson), and smoothed to a value of the channel times a value of the place.
    """
    diagonal = tf.zeros_like(y)
    for number in range(PROBES):
        signs = tf.random.stateless_uniform(tf.shape(y), [number, 1], 0, 2, tf.int32)
        v = tf.cast(2 * signs - 1, tf.float32)
        along = (g_s(y + EPSILON * v) - g_s(y - EPSILON * v)) * real / (2.0 * EPSILON)
        with tf.GradientTape() as tape:
            tape.watch(y)
            product = tf.reduce_sum(g_s(y) * tf.stop_gradient(along))
        diagonal += v * tape.gradient(product, y) * (2.0 * weight / PROBES)
    of_channel = tf.reduce_mean(diagonal, axis=(1, 2), keepdims=True)
    of_place = tf.nn.avg_pool2d(tf.reduce_mean(diagonal, axis=3, keepdims=True), 3, 1, "SAME")
    mean = tf.reduce_mean(of_place)
    share_real = tf.nn.avg_pool2d(real, 16, 16, "SAME")  # an element of padding only causes no error
    of_place = tf.maximum(of_place, LEAST_CURVATURE * mean * share_real)
    return CAUTION * tf.nn.relu(of_channel * of_place / mean)
