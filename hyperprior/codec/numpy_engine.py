"""A model's transforms in NumPy alone, for one file without the seconds of TensorFlow's start.

A convolution is one matrix product: a row of the left matrix holds all inputs that an output depends on. These rows are
copied a few at a time, so that they stay in the cache, and GDN follows on the same rows. A transposed convolution by 2
is a convolution with windows of 3 x 3, one matrix for the even rows of its output and one for the odd rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from hyperprior.codec import exact, range_coder
from hyperprior.codec.tables import INT16
from hyperprior.config import Model
from hyperprior.model import architecture
from hyperprior.model.architecture import BETA_MINIMUM, ROOT_OFFSET, Convolution
from hyperprior.storage import Arrays

PIECE = 2**20  # bytes of windows that are copied at a time
BEFORE, AFTER = 1, 2  # zeros around an image: the most that a convolution reaches over its edges

Function = Callable[[np.ndarray], np.ndarray]


class NumPyEngine:
    """The transforms of a model, and its range coder: `encoder(batch)`, `decoder(strings)`."""

    def __init__(
        self, weights: Arrays, layers: exact.Layers, z_offsets: np.ndarray, counts: range_coder.Counts, settings: Model
    ):
        self.encoder = functools.partial(range_coder.Encoder, counts)
        self.decoder = functools.partial(range_coder.Decoder, counts)
        self.z_offsets, self.offsets = z_offsets, exact.offset_values(z_offsets)
        self.g_a, self.g_s, self.h_a = (make_transform(name, weights, settings) for name in ("g_a", "g_s", "h_a"))
        steps = []  # in float64, which holds these integers and all their sums exactly
        for layer, (kernel, bias) in zip(architecture.hyper_synthesis(settings), layers):
            after = [add(bias.astype(np.float64)), *([rescale] if layer.relu else [])]
            steps.append(make_convolution(layer, kernel.astype(np.float64), after))
        self.h_s = functools.partial(run_all, steps)

    def analyse(self, x: np.ndarray) -> np.ndarray:
        """[B, H, W, 3] uint8, sides multiples of 16 → y [B, H/16, W/16, M] float32."""
        return self.g_a(x, np.float32(1.0 / 255.0))

    def hyper_analyse(self, y: np.ndarray) -> np.ndarray:
        """y → the integers of ẑ: [B, h/4, w/4, C] int32, within int16."""
        z = self.h_a(np.abs(y))
        return np.clip(np.rint(z - self.offsets), INT16.min, INT16.max).astype(np.int32)

    def index_sums(self, z: np.ndarray) -> np.ndarray:
        """The integers of ẑ → [B, 4h, 4w, M] float64: the scale index in units of 2⁻²⁸, not yet rounded."""
        return self.h_s(np.clip(z * 2.0**exact.ACTIVATION_BITS + self.z_offsets, -exact.LIMIT, exact.LIMIT))

    def synthesise(self, y: np.ndarray) -> np.ndarray:
        """ŷ [B, h, w, M] float32 → pixels [B, 16h, 16w, 3] uint8."""
        x = self.g_s(y)
        np.clip(x, 0.0, 1.0, out=x)
        x *= 255.0
        return np.rint(x, out=x).astype(np.uint8)


def make_transform(name: str, weights: Arrays, settings: Model) -> Callable[..., np.ndarray]:
    """The transform `name`: [B, h, w, C], and a factor on it → float32."""
    steps = []
    pending: tuple[Convolution, np.ndarray, list[Function]]
    for number, layer in enumerate(architecture.TRANSFORMS[name](settings)):
        own = [np.asarray(weights[f"{name}/{number}/{part}"], np.float32) for part in layer.shapes()]
        if isinstance(layer, Convolution):
            pending = (layer, own[0], [add(own[1]), *([rectify] if layer.relu else [])])
            steps.append(pending)
        else:
            pending[2].append(functools.partial(normalise, *non_negative(*own), layer.inverse))
    return functools.partial(run_all, [make_convolution(*step) for step in steps])


def run_all(steps: list[Function], x: np.ndarray, factor: Any = 1) -> np.ndarray:
    images = []
    for image in x:
        framed = make_frame(image.shape, np.result_type(x.dtype, np.float32))
        np.multiply(image, factor, out=inside(framed))
        for step in steps:
            framed = step(framed)
        images.append(inside(framed))
    return np.stack(images)


# Convolutions ---------------------------------------------------------------------------------------------


def make_convolution(layer: Convolution, kernel: np.ndarray, after: list[Function]) -> Function:
    """A function of framed images [h + 3, w + 3, C]; `after` is applied to rows [pixels, C] of its output, in place."""
    matrices = split_by_row(kernel) if layer.transpose else [kernel.reshape(-1, layer.outputs)]
    size, stride = (3, 1) if layer.transpose else (layer.size, layer.stride)
    step = len(matrices)  # rows of the output for one row of windows

    def run(framed: np.ndarray) -> np.ndarray:
        rows_of_windows = view_windows(framed, size, stride)
        height, width = rows_of_windows.shape[:2]
        result = make_frame((height * step, width * step, layer.outputs), framed.dtype)
        for piece in cut_rows(rows_of_windows):
            windows = rows_of_windows[piece].reshape(-1, size * rows_of_windows.shape[3])
            for row, matrix in enumerate(matrices):
                y = (windows[:, : len(matrix)] @ matrix).reshape(-1, layer.outputs)
                for function in after:
                    y = function(y)
                rows = slice(piece.start * step + row, piece.stop * step, step)
                inside(result)[rows] = y.reshape(-1, width * step, layer.outputs)
        return result

    return run


def make_frame(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """[h, w, C] zeros with the zeros around it."""
    height, width, channels = shape
    return np.zeros((height + BEFORE + AFTER, width + BEFORE + AFTER, channels), dtype)


def inside(framed: np.ndarray) -> np.ndarray:
    return framed[BEFORE:-AFTER, BEFORE:-AFTER]


def view_windows(framed: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[h / stride, w / stride, size, size · C]: the inputs of each place, without a copy."""
    height, width, channels = inside(framed).shape
    row, column, item = framed.strides
    shape = (height // stride, width // stride, size, size * channels)
    return as_strided(framed, shape, (stride * row, stride * column, row, item), writeable=False)


def cut_rows(windows: np.ndarray) -> Iterator[slice]:
    """Slices of the rows, each of about PIECE bytes."""
    count = max(1, PIECE // (windows[0].size * windows.itemsize))
    for start in range(0, len(windows), count):
        yield slice(start, min(start + count, len(windows)))


def split_by_row(kernel: np.ndarray) -> list[np.ndarray]:
    """The matrices of a transposed convolution by 2, [5, 5, out, in], for windows of 3 x 3 inputs.

    The windows have rows of inputs above, at and below the place. Output row 2i depends on the first two, by taps 3 and
    1; row 2i + 1 on all, by taps 4, 2 and 0. Columns are the same. Each matrix gives the outputs of two columns.
    """
    outputs, inputs = kernel.shape[2:]
    taps = [[(0, 3), (1, 1)], [(0, 4), (1, 2), (2, 0)]]  # (place in the window, tap)
    matrices = []
    for rows in taps:
        matrix = np.zeros((len(rows), 3, inputs, 2, outputs), kernel.dtype)
        for row, row_tap in rows:
            for parity, columns in enumerate(taps):
                for column, column_tap in columns:
                    matrix[row, column, :, parity] = kernel[row_tap, column_tap].T
        matrices.append(matrix.reshape(-1, 2 * outputs))
    return matrices


# What follows a convolution, on [pixels, C], in place -----------------------------------------------------


def add(bias: np.ndarray) -> Function:
    return lambda x: np.add(x, bias, out=x)


def rectify(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0, out=x)


def rescale(sums: np.ndarray) -> np.ndarray:
    """ReLU of the sums of integers, and rounding to integers of the activations' unit."""
    sums *= 2.0**-exact.WEIGHT_BITS
    np.clip(sums, 0.0, exact.LIMIT, out=sums)
    return np.rint(sums, out=sums)


def normalise(beta: np.ndarray, gamma: np.ndarray, inverse: bool, x: np.ndarray) -> np.ndarray:
    """GDN: x / sqrt(beta + gamma · x²), or with `inverse` x times that root."""
    norm = np.square(x) @ gamma
    norm += beta
    np.sqrt(norm, out=norm)
    return np.multiply(x, norm, out=x) if inverse else np.divide(x, norm, out=x)


def non_negative(beta: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GDN's parameters from the variables that hold roughly their square roots."""

    def square(variable: np.ndarray, minimum: float) -> np.ndarray:
        bound = np.float32((minimum + ROOT_OFFSET**2) ** 0.5)
        return np.square(np.maximum(variable, bound)) - np.float32(ROOT_OFFSET**2)

    return square(beta, BETA_MINIMUM), square(gamma, 0.0)
