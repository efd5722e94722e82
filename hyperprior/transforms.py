"""The four transforms g_a, g_s, h_a, h_s and their layers (paper, section 4 and figure 4)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import tensorflow as tf
import tensorflow_compression as tfc

Layer = Callable[[tf.Tensor], tf.Tensor]

# y starts this much larger than its input, so that noise of unit width does not drown it: after 500 steps of
# configs/quickstart.yaml on ImageNet patches the loss is 0.85 of that with Glorot's initialisation. From 8 on the
# first steps overshoot.
LATENT_GAIN = 4.0

GDN_GAMMA = 0.1  # of each channel for itself, at first

# GDN takes its input in pieces of this size, two at a time, so that temporaries stay in cache: outer layers take 0.8 of
# the time that they take in one piece.
PIECE_BYTES = 2**20


class Conv(tf.Module):
    """A convolution by `stride` down, or with `transpose` up, zero-padded, in the input's precision.

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
        # Each output is a sum of this many products: with `gain` 1 its variance is the input's.
        terms = kernel_size**2 * inputs / (stride**2 if transpose else 1)
        self.kernel = tf.Variable(tf.random.normal(shape, stddev=gain / terms**0.5), name="kernel")
        self.bias = tf.Variable(tf.fill([outputs], bias), name="bias")
        self.stride, self.transpose, self.activation = stride, transpose, activation

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        kernel, bias = tf.cast(self.kernel, x.dtype), tf.cast(self.bias, x.dtype)
        if self.stride == 2 and products_pay(x, kernel.shape):
            x = up_by_products(x, kernel) if self.transpose else down_by_products(x, kernel)
        else:
            x = up(x, kernel, self.stride) if self.transpose else down(x, kernel, self.stride)
        x = tf.nn.bias_add(x, bias)
        return self.activation(x) if self.activation else x


def down(x: tf.Tensor, kernel: tf.Tensor, stride: int = 2) -> tf.Tensor:
    return tf.nn.conv2d(x, kernel, stride, "SAME")


def up(x: tf.Tensor, kernel: tf.Tensor, stride: int = 2) -> tf.Tensor:
    """The transpose of `down`."""
    batch, height, width, _ = tf.unstack(tf.shape(x))
    y = tf.nn.conv2d_transpose(x, kernel, (batch, height * stride, width * stride, kernel.shape[2]), stride, "SAME")
    y.set_shape((*(side and side * scale for side, scale in zip(x.shape[:3], (1, stride, stride))), kernel.shape[2]))
    return y


def products_pay(x: tf.Tensor, kernel_shape: tf.TensorShape) -> bool:
    """Whether `kernel_gradient` is faster than what it stands for: where oneDNN has no kernel for AVX-512, its
    gradient by a wide kernel runs at half the rate of the rest. At N=128 a step takes 0.83 of the time."""
    known = x.dtype == tf.float32 and x.shape.is_fully_defined()
    wide = known and min(kernel_shape[2:]) >= 128 and math.prod(x.shape[1:3]) >= 32 * 32
    return wide and "avx512f" not in cpu_flags() and not tf.config.list_logical_devices("GPU")


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, as Linux names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split())
    return frozenset()


@tf.custom_gradient
def down_by_products(x: tf.Tensor, kernel: tf.Tensor) -> Any:
    """`down` by 2."""
    return down(x, kernel), lambda dy: (up(dy, kernel), kernel_gradient(x, dy, kernel.shape[0]))


@tf.custom_gradient
def up_by_products(x: tf.Tensor, kernel: tf.Tensor) -> Any:
    """`up` by 2."""
    return up(x, kernel), lambda dy: (down(dy, kernel), kernel_gradient(dy, x, kernel.shape[0]))


def kernel_gradient(x: tf.Tensor, dy: tf.Tensor, size: int) -> tf.Tensor:
    """The gradient of y = down(x, kernel) by its kernel [size, size, C, K], a matrix product for each of its taps.

    The pixels that a tap meets are every second one of each second row: with x apart by odd and even places, and
    rows of dy padded to its width, they are one run of pixels, which need not be copied. `x`: [B, H, W, C] of even
    sides, `dy`: [B, H/2, W/2, K].
    """
    batch, height, width, channels = x.shape
    outputs, before = dy.shape[3], (size - 2) // 2
    rows, columns = height // 2 + size // 2, width // 2 + size // 2
    run = (height // 2 - 1) * columns + width // 2  # pixels from the first output to the last
    taps = [divmod(tap, size) for tap in range(size**2)]
    first = [((r % 2 * 2 + c % 2) * rows + r // 2) * columns + c // 2 for r, c in taps]  # where each one's run begins

    def add_image(i: tf.Tensor, total: tf.Tensor) -> Any:
        edges = [[before, 2 * rows - height - before], [before, 2 * columns - width - before], [0, 0]]
        apart = tf.transpose(tf.reshape(tf.pad(x[i], edges), (rows, 2, columns, 2, channels)), (1, 3, 0, 2, 4))
        pixels = tf.reshape(apart, (-1, channels))
        d = tf.reshape(tf.pad(dy[i], [[0, 0], [0, columns - width // 2], [0, 0]]), (-1, outputs))[:run]
        return i + 1, total + tf.map_fn(
            lambda begin: tf.linalg.matmul(pixels[begin : begin + run], d, transpose_a=True),
            tf.constant(first),
            parallel_iterations=1,
            fn_output_signature=tf.TensorSpec((channels, outputs)),
        )

    nothing = tf.zeros((size**2, channels, outputs))
    _, total = tf.while_loop(lambda i, _: i < batch, add_image, (0, nothing), parallel_iterations=1)
    return tf.reshape(total, (size, size, channels, outputs))


class GDN(tf.Module):
    """Generalised divisive normalisation, x / sqrt(beta + gamma · x²), or its approximate inverse (times).

    Ballé, Laparra, Simoncelli, ICLR 2016. beta and gamma are stored so that they stay non-negative
    (tfc.GDNParameter). With bfloat16 inputs matrix products take and give bfloat16; all else is float32.
    """

    def __init__(self, channels: int, *, inverse: bool = False):
        super().__init__()
        self.beta = tfc.GDNParameter(tf.ones(channels), name="beta", minimum=1e-6)
        self.gamma = tfc.GDNParameter(GDN_GAMMA * tf.eye(channels), name="gamma")
        self.inverse = inverse

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        y = self._in_pieces(x, self.beta(), self.gamma())
        y.set_shape(x.shape)
        return y

    def _normalise(self, x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Of [pixels, C]: (y, factor), with y = x · factor."""
        values = tf.cast(x, tf.float32)
        norm = tf.nn.bias_add(product(tf.square(values), gamma, x.dtype), beta)
        factor = tf.sqrt(norm) if self.inverse else tf.math.rsqrt(norm)
        return tf.cast(values * factor, x.dtype), factor

    def _gradient(self, x: tf.Tensor, factor: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The gradients by x, beta and gamma, from that by y and from what `_normalise` gave."""
        values, d, sign = tf.cast(x, tf.float32), tf.cast(dy, tf.float32), 1.0 if self.inverse else -1.0
        direct = d * factor
        # norm^±½: its derivative is ±½ · norm^±½ / norm. The ½ is left to the small sums and to d(x²) = 2 x dx.
        d_norm = d * values / factor if self.inverse else direct * values * factor * factor
        d_x = direct + values * product(d_norm, sign * gamma, x.dtype, transpose_b=True)
        d_beta, d_gamma = tf.reduce_sum(d_norm, axis=0), product(tf.square(values), d_norm, x.dtype, transpose_a=True)
        return tf.cast(d_x, x.dtype), 0.5 * sign * d_beta, 0.5 * sign * d_gamma

    def _in_pieces(self, x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
        """Pieces of pixels one after another, with a gradient that keeps only x and the factors."""
        channels, count = x.shape[3], pieces(x.shape)
        size = math.prod(x.shape[:3]) // count if count > 1 else None

        def piece(values: tf.Tensor, i: tf.Tensor) -> tf.Tensor:
            return values[i * size : (i + 1) * size]

        def results(dtype: tf.DType) -> tf.TensorArray:
            return tf.TensorArray(dtype, count, element_shape=(size, channels))

        def each(body: Callable[..., Any], *so_far: Any) -> tuple[Any, ...]:
            def next_piece(i: tf.Tensor, *so_far: Any) -> Any:
                return i + 1, *body(i, *so_far)

            _, *found = tf.while_loop(lambda i, *_: i < count, next_piece, (0, *so_far), parallel_iterations=2)
            return tuple(found)

        @tf.custom_gradient
        def whole(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> Any:
            flat = tf.reshape(x, (-1, channels))
            y, factor = self._normalise(flat, beta, gamma)

            def gradient(dy: tf.Tensor) -> Any:
                d_x, d_beta, d_gamma = self._gradient(flat, factor, tf.reshape(dy, (-1, channels)), gamma)
                return tf.reshape(d_x, tf.shape(x)), d_beta, d_gamma

            return tf.reshape(y, tf.shape(x)), gradient

        @tf.custom_gradient
        def pieced(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> Any:
            flat = tf.reshape(x, (-1, channels))

            def forward(i: tf.Tensor, ys: tf.TensorArray, factors: tf.TensorArray) -> Any:
                y, factor = self._normalise(piece(flat, i), beta, gamma)
                return ys.write(i, y), factors.write(i, factor)

            ys, factors = each(forward, results(x.dtype), results(tf.float32))

            def gradient(dy: tf.Tensor) -> Any:
                flat_dy = tf.reshape(dy, (-1, channels))

                def backward(i: tf.Tensor, d_xs: tf.TensorArray, d_beta: tf.Tensor, d_gamma: tf.Tensor) -> Any:
                    found = self._gradient(piece(flat, i), factors.read(i), piece(flat_dy, i), gamma)
                    return d_xs.write(i, found[0]), d_beta + found[1], d_gamma + found[2]

                d_xs, d_beta, d_gamma = each(backward, results(x.dtype), tf.zeros_like(beta), tf.zeros_like(gamma))
                return tf.reshape(d_xs.concat(), tf.shape(x)), d_beta, d_gamma

            return tf.reshape(ys.concat(), tf.shape(x)), gradient

        return pieced(x, beta, gamma) if count > 1 else whole(x, beta, gamma)


def product(a: tf.Tensor, b: tf.Tensor, dtype: tf.DType, **transpose: bool) -> tf.Tensor:
    """The matrix product in float32, or in bfloat16 where `dtype` is that; float16 does not hold squares."""
    factor_dtype = tf.bfloat16 if dtype == tf.bfloat16 else tf.float32
    return tf.cast(tf.linalg.matmul(*(tf.cast(v, factor_dtype) for v in (a, b)), **transpose), tf.float32)


def pieces(shape: tf.TensorShape) -> int:
    """Into how many equal parts of pixels GDN cuts [B, H, W, C] on a CPU; a GPU gains nothing from it."""
    if not shape.is_fully_defined() or tf.config.list_logical_devices("GPU"):
        return 1
    pixels = math.prod(shape[:3])
    most = 4 * pixels * shape[3] // PIECE_BYTES
    return next(count for count in range(max(most, 1), 0, -1) if pixels % count == 0)


class Transform(tf.Module):
    """Layers one after another, computed in `dtype`, the last in `last_dtype`; input and output are float32.

    With `precise` all are computed in float32, as the codec does.
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
            Conv(n, 3, 5, 2, transpose=True, bias=0.5),  # images start out gray
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
    """(path, variable) of a module of this package: names that stay the same whatever built it."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        path = f"{prefix}/{name}"
        if isinstance(value, tfc.GDNParameter):
            yield path, value.variable
        elif isinstance(value, tf.Variable):
            yield path, value
        elif isinstance(value, tf.Module):
            yield from named_variables(value, path)
        elif name == "layers":
            for index, layer in enumerate(value):
                yield from named_variables(layer, f"{prefix}/{index}")
