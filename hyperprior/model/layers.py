"""The layers of the transforms: convolutions, and generalised divisive normalisation (GDN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import tensorflow as tf

from hyperprior.model import kernels
from hyperprior.model.bounds import NonNegative

Layer = Callable[[tf.Tensor], tf.Tensor]

GDN_GAMMA = 0.1  # GDN's initial weight of a channel for itself


class Conv(tf.Module):
    """A zero-padded convolution in the input's precision: down by `stride`, or up by `stride` with `transpose`.

    `kernel`: [k, k, in, out], or [k, k, out, in] with `transpose`; `bias`: [out].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        stride: int,
        *,
        transpose: bool = False,
        activation: Optional[Layer] = None,
        gain: float = 1.0,
        bias: float = 0.0,
    ):
        super().__init__()
        shape = (kernel_size, kernel_size, *((outputs, inputs) if transpose else (inputs, outputs)))
        # Each output is a sum of this many products, so with `gain` 1 it has the variance of the input.
        terms = kernel_size**2 * inputs / (stride**2 if transpose else 1)
        self.kernel = tf.Variable(tf.random.normal(shape, stddev=gain / terms**0.5), name="kernel")
        self.bias = tf.Variable(tf.fill([outputs], bias), name="bias")
        self.stride, self.transpose, self.activation = stride, transpose, activation

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        convolve = kernels.up if self.transpose else kernels.down
        x = convolve(x, tf.cast(self.kernel, x.dtype), self.stride)
        x = tf.nn.bias_add(x, tf.cast(self.bias, x.dtype))
        return self.activation(x) if self.activation else x


class GDN(tf.Module):
    """x / sqrt(beta + gamma · x²), or its approximate inverse, x · sqrt(beta + gamma · x²); see `kernels.gdn`.

    Ballé, Laparra, Simoncelli, ICLR 2016. beta and gamma are stored so that they stay non-negative
    (`bounds.NonNegative`).
    """

    def __init__(self, channels: int, *, inverse: bool = False):
        super().__init__()
        self.beta = NonNegative(tf.ones(channels), minimum=1e-6)
        self.gamma = NonNegative(GDN_GAMMA * tf.eye(channels))
        self.inverse = inverse

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return kernels.gdn(x, self.beta(), self.gamma(), inverse=self.inverse)
