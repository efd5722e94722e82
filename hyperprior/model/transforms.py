"""The four transforms g_a, g_s, h_a, h_s (paper, section 4 and figure 4): the architecture, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from hyperprior.model.bounds import NonNegative
from hyperprior.model.layers import GDN, Conv, Layer

# y starts this many times larger than its input, so that it is not lost in noise of unit width. After 500 steps of
# configs/quickstart.yaml on ImageNet patches, the loss is 0.85 of the loss with Glorot's initialisation. With 8 or
# more, the first steps overshoot.
LATENT_GAIN = 4.0


class Transform(tf.Module):
    """A sequence of layers, computed in `dtype`, the last one in `last_dtype`. Input and output are float32.

    With `precise`, all layers are computed in float32, as in the codec.
    """

    def __init__(self, layers: Sequence[Layer], dtype: str, last_dtype: str = "float32"):
        super().__init__()
        self.layers = list(layers)
        self.dtypes = [dtype] * (len(layers) - 1) + [last_dtype]

    def __call__(self, x: tf.Tensor, precise: bool = False) -> tf.Tensor:
        for layer, dtype in zip(self.layers, self.dtypes):
            x = layer(tf.cast(x, "float32" if precise else dtype))
        return tf.cast(x, tf.float32)


def analysis(num_filters: int, latent_channels: int, dtype: str) -> Transform:
    """g_a: [B, H, W, 3] → y [B, H/16, W/16, M]."""
    n = num_filters
    return Transform(
        [
            Conv(3, n, 5, 2),
            GDN(n),
            Conv(n, n, 5, 2),
            GDN(n),
            Conv(n, n, 5, 2),
            GDN(n),
            Conv(n, latent_channels, 5, 2, gain=LATENT_GAIN),
        ],
        dtype,
    )


def synthesis(num_filters: int, latent_channels: int, dtype: str) -> Transform:
    """g_s: ŷ [B, H/16, W/16, M] → x̂ [B, H, W, 3]."""
    n = num_filters
    return Transform(
        [
            Conv(latent_channels, n, 5, 2, transpose=True, gain=1.0 / LATENT_GAIN),
            GDN(n, inverse=True),
            Conv(n, n, 5, 2, transpose=True),
            GDN(n, inverse=True),
            Conv(n, n, 5, 2, transpose=True),
            GDN(n, inverse=True),
            Conv(n, 3, 5, 2, transpose=True, bias=0.5),  # the first images are gray
        ],
        dtype,
        last_dtype=dtype,  # in float32 a step on a CPU would take 6% longer
    )


def hyper_analysis(latent_channels: int, hyper_channels: int, dtype: str) -> Transform:
    """h_a: |y| → z [B, H/64, W/64, hyper_channels]."""
    n = hyper_channels
    return Transform(
        [
            Conv(latent_channels, n, 3, 1, activation=tf.nn.relu),
            Conv(n, n, 5, 2, activation=tf.nn.relu),
            Conv(n, n, 5, 2),
        ],
        dtype,
    )


def hyper_synthesis(latent_channels: int, hyper_channels: int, dtype: str) -> Transform:
    """h_s: ẑ → the logarithm of y's standard deviations [B, H/16, W/16, M]."""
    n = hyper_channels
    return Transform(
        [
            Conv(n, n, 5, 2, transpose=True, activation=tf.nn.relu),
            Conv(n, n, 5, 2, transpose=True, activation=tf.nn.relu),
            Conv(n, latent_channels, 3, 1),
        ],
        dtype,
    )


def named_variables(module: Any, prefix: str = "") -> Iterator[tuple[str, tf.Variable]]:
    """(path, variable) of a module of this package. Paths depend only on attribute names and the order of layers."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        path = f"{prefix}/{name}"
        if isinstance(value, NonNegative):
            yield path, value.variable
        elif isinstance(value, tf.Variable):
            yield path, value
        elif isinstance(value, tf.Module):
            yield from named_variables(value, path)
        elif name == "layers":
            for index, layer in enumerate(value):
                yield from named_variables(layer, f"{prefix}/{index}")
