"""The encoder's search: latents that cost less, for the same decoder.

g_a answers in one pass what is best for images in general. The search starts from its answer and goes on, for one
image, minimising what training minimised: bits + λ · 255² · MSE, over the integers ŷ. In each round a share of
its elements may take a step d of one up or down, if that saves by

    bits(ŷ + d) − bits(ŷ) + d · gradient + ½ · curvature

with the gradient of the error taken anew each round, and its curvature estimated once. This is the rate–distortion
optimised quantisation of video encoders, with a neural decoder's derivatives. ẑ, and so σ, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from hyperprior.model import gaussian_bits_each

SHARE = 0.25  # of the elements that may step in a round: steps side by side do not know of each other
CAUTION = 1.2  # times the estimated curvature, as neighbours step at once; on photographs 1.0 and 1.35 save less
PROBES = 4  # of the curvature
EPSILON = 0.05  # of the latents, for differences
LEAST_CURVATURE = 0.2  # of its mean, where an estimate is lower
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
    """ŷ after `rounds` rounds: [1, h, w, M] float32, as `y`, whose steps depend on nothing but the arguments.

    `scales`: σ, [1, h, w, M]; `x`: [1, 16h, 16w, 3] in [0, 1]; `real`: [1, 16h, 16w, 1], 0 for pixels that are
    padding and may become anything; `inside`: [1, h, w, 1], 0 for elements that may not change; `weight`: bits that a
    squared error of 1 in one value of x̂ costs.
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
    """The second derivative of the error by each element: [1, h, w, M].

    2 · weight · the diagonal of JᵀJ, J the Jacobian of g_s, as the mean of v ⊙ JᵀJv over random signs v
    (Hutchinson's estimate); smoothed to a value of each channel times one of each place.
    """
    found = tf.zeros_like(y)
    for number in range(PROBES):
        signs = tf.random.stateless_uniform(tf.shape(y), [number, 1], 0, 2, tf.int32)
        v = tf.cast(2 * signs - 1, tf.float32)
        along = (g_s(y + EPSILON * v) - g_s(y - EPSILON * v)) * real / (2.0 * EPSILON)
        with tf.GradientTape() as tape:
            tape.watch(y)
            product = tf.reduce_sum(g_s(y) * tf.stop_gradient(along))
        found += v * tape.gradient(product, y) * (2.0 * weight / PROBES)
    of_channel = tf.reduce_mean(found, axis=(1, 2), keepdims=True)
    of_place = tf.nn.avg_pool2d(tf.reduce_mean(found, axis=3, keepdims=True), 3, 1, "SAME")
    mean = tf.reduce_mean(of_place)
    shown = tf.nn.avg_pool2d(real, 16, 16, "SAME")  # where there are no pixels nothing is lost
    of_place = tf.maximum(of_place, LEAST_CURVATURE * mean * shown)
    return CAUTION * tf.nn.relu(of_channel * of_place / mean)
