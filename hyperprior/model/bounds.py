"""Bounds whose gradient only leads back: beyond a bound, a step away from it has no gradient.

With tf.minimum and tf.maximum a value beyond its bound has no gradient at all, and could never return.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hyperprior.model.architecture import ROOT_OFFSET


def lower_bound(x: tf.Tensor, limit: float) -> tf.Tensor:
    """max(x, limit). Below the limit the gradient passes only where descent along it raises x."""

    @tf.custom_gradient
    def run(x: tf.Tensor) -> Any:
        bound, zero = tf.constant(limit, x.dtype), tf.zeros((), x.dtype)
        return tf.maximum(x, bound), lambda d: tf.where((x < bound) & (d > zero), zero, d)

    return run(x)


def upper_bound(x: tf.Tensor, limit: float) -> tf.Tensor:
    """min(x, limit). Above the limit the gradient passes only where descent along it lowers x."""

    @tf.custom_gradient
    def run(x: tf.Tensor) -> Any:
        bound, zero = tf.constant(limit, x.dtype), tf.zeros((), x.dtype)
        return tf.minimum(x, bound), lambda d: tf.where((x > bound) & (d < zero), zero, d)

    return run(x)


class NonNegative(tf.Module):
    """A parameter that stays at or above `minimum`, 0 or more. `variable` holds roughly its square root, so steps get
    smaller near 0 (Ballé, Laparra, Simoncelli, ICLR 2016)."""

    def __init__(self, initial: tf.Tensor, minimum: float = 0.0):
        super().__init__()
        self.variable = tf.Variable(tf.sqrt(initial + ROOT_OFFSET**2))
        self.bound = (minimum + ROOT_OFFSET**2) ** 0.5

    def __call__(self) -> tf.Tensor:
        return tf.square(lower_bound(self.variable, self.bound)) - ROOT_OFFSET**2
