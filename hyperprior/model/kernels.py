"""The computations of the layers: convolutions and GDN as pure functions, with gradients that suit a CPU's caches.

The architecture does not depend on this file. A GPU uses TensorFlow's own kernels, and GDN in one piece.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

# On a CPU, GDN processes its input in pieces of this size, two at a time, so that temporaries stay in the cache. The
# outer layers then take 0.8 of the time that they take in one piece.
PIECE_BYTES = 2**20


# Convolutions ---------------------------------------------------------------------------------------------


def down(x: tf.Tensor, kernel: tf.Tensor, stride: int = 2) -> tf.Tensor:
    """[B, H, W, in] by [k, k, in, out] → [B, H/stride, W/stride, out], zero-padded."""
    if stride == 2 and products_are_faster(x, kernel.shape):
        return down_with_products(x, kernel)
    return tf.nn.conv2d(x, kernel, stride, "SAME")


def up(x: tf.Tensor, kernel: tf.Tensor, stride: int = 2) -> tf.Tensor:
    """The transpose of `down`: [B, H, W, in] by [k, k, out, in] → [B, H·stride, W·stride, out]."""
    if stride == 2 and products_are_faster(x, kernel.shape):
        return up_with_products(x, kernel)
    return convolve_transposed(x, kernel, stride)


def convolve_transposed(x: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    batch, height, width, _ = sizes_of(x)
    y = tf.nn.conv2d_transpose(x, kernel, (batch, height * stride, width * stride, kernel.shape[2]), stride, "SAME")
    y.set_shape((*(side and side * scale for side, scale in zip(x.shape[:3], (1, stride, stride))), kernel.shape[2]))
    return y


def sizes_of(x: tf.Tensor) -> Sequence[Any]:
    """The sizes of x along its axes: numbers if all are known, which needs no operations, else scalar tensors."""
    return tuple(x.shape) if x.shape.is_fully_defined() else tf.unstack(tf.shape(x))


def products_are_faster(x: tf.Tensor, kernel_shape: tf.TensorShape) -> bool:
    """Whether `kernel_gradient` is faster than TensorFlow's own gradient.

    It is faster on a CPU without AVX-512, where oneDNN computes the gradient by a wide kernel at half the speed of the
    other operations. There it reduces the time of a training step at N=128 to 0.83.
    """
    is_known = x.dtype == tf.float32 and x.shape.is_fully_defined()
    is_wide = is_known and min(kernel_shape[2:]) >= 128 and math.prod(x.shape[1:3]) >= 32 * 32
    return is_wide and "avx512f" not in cpu_flags() and not tf.config.list_logical_devices("GPU")


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The features of this CPU by Linux's names; none where there is no /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split())
    return frozenset()


@tf.custom_gradient
def down_with_products(x: tf.Tensor, kernel: tf.Tensor) -> Any:
    """`down` by 2; its gradient by the kernel is `kernel_gradient`."""

    def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return convolve_transposed(dy, kernel, 2), kernel_gradient(x, dy, kernel.shape[0])

    return tf.nn.conv2d(x, kernel, 2, "SAME"), gradient


@tf.custom_gradient
def up_with_products(x: tf.Tensor, kernel: tf.Tensor) -> Any:
    """`up` by 2; its gradient by the kernel is `kernel_gradient`."""

    def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.nn.conv2d(dy, kernel, 2, "SAME"), kernel_gradient(dy, x, kernel.shape[0])

    return convolve_transposed(x, kernel, 2), gradient


def kernel_gradient(x: tf.Tensor, dy: tf.Tensor, size: int) -> tf.Tensor:
    """The gradient of y = down(x, kernel) by the kernel [size, size, C, K], one matrix product for each tap.

    `x`: [B, H, W, C] of even sides; `dy`: [B, H/2, W/2, K].

    The tap at row r and column c reads every second pixel of every second row of x, starting at (r, c). So x is split
    into its four phases, by odd and even rows and columns. Within a phase, a tap reads pixels side by side:

        x   a b a b a b     phases   a a a   b b b   c c c   d d d     tap (0, 0) reads phase a from its first pixel,
            c d c d c d              a a a   b b b   c c c   d d d     tap (0, 3) reads phase b from its second,
            a b a b a b                                                tap (1, 2) reads phase c from its second, …
            c d c d c d

    The rows of dy are padded to the width of a phase. Then the pixels of a tap are one run of rows of a matrix, and so
    are the pixels of dy. So the product [C, run] · [run, K] copies no pixel.
    """
    batch, height, width, channels = x.shape
    outputs, before = dy.shape[3], (size - 2) // 2
    rows, columns = height // 2 + size // 2, width // 2 + size // 2  # of a phase, with padding
    run = (height // 2 - 1) * columns + width // 2  # pixels from the first output to the last
    begins = []  # the first row of each tap's run
    for tap in range(size**2):
        r, c = divmod(tap, size)
        phase = r % 2 * 2 + c % 2
        begins.append((phase * rows + r // 2) * columns + c // 2)

    def add_image(i: tf.Tensor, total: tf.Tensor) -> Any:
        edges = [[before, 2 * rows - height - before], [before, 2 * columns - width - before], [0, 0]]
        phases = tf.transpose(tf.reshape(tf.pad(x[i], edges), (rows, 2, columns, 2, channels)), (1, 3, 0, 2, 4))
        pixels = tf.reshape(phases, (-1, channels))
        d = tf.reshape(tf.pad(dy[i], [[0, 0], [0, columns - width // 2], [0, 0]]), (-1, outputs))[:run]
        return i + 1, total + tf.map_fn(
            lambda begin: tf.linalg.matmul(pixels[begin : begin + run], d, transpose_a=True),
            tf.constant(begins),
            parallel_iterations=1,
            fn_output_signature=tf.TensorSpec((channels, outputs)),
        )

    zeros = tf.zeros((size**2, channels, outputs))
    _, total = tf.while_loop(lambda i, _: i < batch, add_image, (0, zeros), parallel_iterations=1)
    return tf.reshape(total, (size, size, channels, outputs))


# GDN ------------------------------------------------------------------------------------------------------


def gdn(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor, *, inverse: bool = False) -> tf.Tensor:
    """x / sqrt(beta + gamma · x²) over the channels of [B, H, W, C], or with `inverse` x times that root.

    `beta`: [C]; `gamma`: [C, C], from channel to channel. With bfloat16 inputs, the matrix products have bfloat16
    factors and results; all else is float32.
    """
    count = number_of_pieces(x.shape)
    flat = tf.reshape(x, (-1, x.shape[3]))
    y = gdn_in_pieces(flat, beta, gamma, inverse, count) if count > 1 else gdn_whole(flat, beta, gamma, inverse)
    y = tf.reshape(y, tf.shape(x))
    y.set_shape(x.shape)
    return y


def gdn_whole(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor, inverse: bool) -> tf.Tensor:
    """GDN of [pixels, C], with a gradient that keeps only x and the factors."""

    @tf.custom_gradient
    def run(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> Any:
        y, factor = normalise(x, beta, gamma, inverse)
        return y, lambda dy: normalise_gradient(x, factor, dy, gamma, inverse)

    return run(x, beta, gamma)


def gdn_in_pieces(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor, inverse: bool, count: int) -> tf.Tensor:
    """GDN of [pixels, C] in `count` equal pieces of the pixels."""
    size = x.shape[0] // count

    def cut_piece(rows: tf.Tensor, i: tf.Tensor) -> tf.Tensor:
        return rows[i * size : (i + 1) * size]

    @tf.custom_gradient
    def run(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor) -> Any:
        def forward(i: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return normalise(cut_piece(x, i), beta, gamma, inverse)

        (ys, factors), _ = for_each_piece(forward, count, (size, x.shape[1]), (x.dtype, tf.float32))

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
            def backward(i: tf.Tensor) -> tuple[tf.Tensor, ...]:
                return normalise_gradient(cut_piece(x, i), factors.read(i), cut_piece(dy, i), gamma, inverse)

            sums = tf.zeros_like(beta), tf.zeros_like(gamma)
            (d_xs,), (d_beta, d_gamma) = for_each_piece(backward, count, (size, x.shape[1]), (x.dtype,), sums)
            return d_xs.concat(), d_beta, d_gamma

        return ys.concat(), gradient

    return run(x, beta, gamma)


def for_each_piece(
    body: Callable[[tf.Tensor], tuple[tf.Tensor, ...]],
    count: int,
    shape: tuple[int, int],
    dtypes: Sequence[tf.DType],
    sums: Sequence[tf.Tensor] = (),
) -> tuple[list[tf.TensorArray], list[tf.Tensor]]:
    """Calls `body(i)` for each piece i. Returns its first results, of `shape` and `dtypes`, as arrays over the pieces,
    and the sums of its other results, which start from `sums`."""
    arrays = [tf.TensorArray(dtype, count, element_shape=shape) for dtype in dtypes]

    def step(i: tf.Tensor, arrays: Sequence[tf.TensorArray], sums: Sequence[tf.Tensor]) -> Any:
        results = body(i)
        collected, added = results[: len(arrays)], results[len(arrays) :]
        return (
            i + 1,
            [array.write(i, value) for array, value in zip(arrays, collected)],
            [total + value for total, value in zip(sums, added)],
        )

    _, arrays, totals = tf.while_loop(lambda i, *_: i < count, step, (0, arrays, list(sums)), parallel_iterations=2)
    return arrays, totals


def normalise(x: tf.Tensor, beta: tf.Tensor, gamma: tf.Tensor, inverse: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """(y, factor) of [pixels, C], with y = x · factor."""
    values = tf.cast(x, tf.float32)
    norm = tf.nn.bias_add(multiply(tf.square(values), gamma, x.dtype), beta)
    factor = tf.sqrt(norm) if inverse else tf.math.rsqrt(norm)
    return tf.cast(values * factor, x.dtype), factor


def normalise_gradient(
    x: tf.Tensor, factor: tf.Tensor, dy: tf.Tensor, gamma: tf.Tensor, inverse: bool
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients by x, beta and gamma, from the gradient `dy` by y and the factor of `normalise`."""
    values, d = tf.cast(x, tf.float32), tf.cast(dy, tf.float32)
    direct = d * factor
    # The derivative of norm^±½ is ±½ · norm^±½ / norm. In d_x the factor ½ cancels, because d(x²) = 2 x dx. So it is
    # applied only to the gradients by beta and gamma, which are small arrays.
    d_norm = d * values / factor if inverse else direct * values * factor * factor
    d_x = direct + values * multiply(d_norm, gamma if inverse else -gamma, x.dtype, transpose_b=True)
    d_beta, d_gamma = tf.reduce_sum(d_norm, axis=0), multiply(tf.square(values), d_norm, x.dtype, transpose_a=True)
    half = tf.constant(0.5 if inverse else -0.5)
    return tf.cast(d_x, x.dtype), half * d_beta, half * d_gamma


def multiply(a: tf.Tensor, b: tf.Tensor, dtype: tf.DType, **transpose: bool) -> tf.Tensor:
    """The matrix product in bfloat16 if `dtype` is bfloat16, else in float32: squares overflow float16."""
    factor_dtype = tf.bfloat16 if dtype == tf.bfloat16 else tf.float32
    return tf.cast(tf.linalg.matmul(*(tf.cast(v, factor_dtype) for v in (a, b)), **transpose), tf.float32)


def number_of_pieces(shape: tf.TensorShape) -> int:
    """The number of equal pieces in which GDN processes the pixels of [B, H, W, C]. A GPU gains nothing from pieces."""
    if not shape.is_fully_defined() or tf.config.list_logical_devices("GPU"):
        return 1
    pixels = math.prod(shape[:3])
    most = 4 * pixels * shape[3] // PIECE_BYTES
    return next(count for count in range(max(most, 1), 0, -1) if pixels % count == 0)
