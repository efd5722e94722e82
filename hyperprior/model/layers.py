"""The layers of the transforms: convolutions, and generalised divisive normalisation (GDN)."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from hyperprior.model import kernels
from hyperprior.model.architecture import BETA_MINIMUM, Convolution, Normalisation
from hyperprior.model.bounds import NonNegative

Layer = Callable[[tf.Tensor], tf.Tensor]

GDN_GAMMA = 0.1  # GDN's initial weight of a channel for itself


class Conv(tf.Module):
    """A convolution in the input's precision.

    `kernel`: [k, k, in, out], or [k, k, out, in] with `transpose`; `bias`: [out].
    """

    def __init__(self, layer: Convolution):
        super().__init__()
        self.stride, self.transpose, self.relu = layer.stride, layer.transpose, layer.relu
        shapes = layer.shapes()
        # Each output is a sum of this many products, so with `gain` 1 it has the variance of the input.
        terms = layer.size**2 * layer.inputs / (layer.stride**2 if layer.transpose else 1)
        self.kernel = tf.Variable(tf.random.normal(shapes["kernel"], stddev=layer.gain / terms**0.5), name="kernel")
        self.bias = tf.Variable(tf.fill(shapes["bias"], layer.bias), name="bias")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        convolve = kernels.up if self.transpose else kernels.down
        x = convolve(x, tf.cast(self.kernel, x.dtype), self.stride)
        x = tf.nn.bias_add(x, tf.cast(self.bias, x.dtype))
        return tf.nn.relu(x) if self.relu else x


class GDN(tf.Module):
    """x / sqrt(beta + gamma · x²), or its approximate inverse, x · sqrt(beta + gamma · x²); see `kernels.gdn`.

    Ballé, Laparra, Simoncelli, ICLR 2016. beta and gamma are stored so that they stay non-negative
    (`bounds.NonNegative`).
    """

    def __init__(self, layer: Normalisation):
        super().__init__()
        self.beta = NonNegative(tf.ones(layer.channels), minimum=BETA_MINIMUM)
        self.gamma = NonNegative(GDN_GAMMA * tf.eye(layer.channels))
        self.inverse = layer.inverse

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return kernels.gdn(x, self.beta(), self.gamma(), inverse=self.inverse)
