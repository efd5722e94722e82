"""How a file adapts its model: channels of y are coded as differences, with other scales, or both.

The scales of a model are right for images in general. Where one image differs, a channel gets a *shift*, which is added
to its scale indexes. And the hyperprior predicts how large an element of y is, but not its sign: channels that follow
the brightness or colour of an area are coded as the difference from the mean of the elements to the left and above,
much as JPEG codes its DC coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hyperprior.codec.range_coder import Counts
from hyperprior.codec.tables import Tables

LEAST_SHIFT, SHIFTS = -16, 32  # an encoder tries shifts of −16 to 15
VALUES = 2048  # larger values cost as much as this one
UNIT = 256  # costs are integers in units of 1/256 bit, so that sums are the same everywhere
SAMPLE = 4096  # elements of a channel, about, that an encoder looks at
LEAST_GAIN = 10 * UNIT  # about what coding a channel's kind and shift takes


class Adaptation(NamedTuple):
    """Of each channel of y: `kind` [M] int32, above 0 for differences, and `shift` [M] int32.

    The encoder's kinds are 0 if all is as the model says, −1 for another shift, and 1 for differences with any shift.
    """

    kind: np.ndarray
    shift: np.ndarray


def kind_and_shift_tables(tables: Tables, counts: Counts, num_scales: int) -> tuple[int, int]:
    """The tables of y that code the kinds of channels and their shifts: the first in which 0 has at most a probability
    of 15/16, and at most 1/16, or else the last."""

    def first(sixteenths: int) -> int:
        for table, cumulative in enumerate(counts.cumulative[: num_scales - 1]):
            zero = -int(tables.first[table])
            if 16 * (cumulative[zero + 1] - cumulative[zero]) <= sixteenths << counts.precision[table]:
                return table
        return num_scales - 1

    return first(15), first(1)


def wrap(x: np.ndarray) -> np.ndarray:
    """Integers modulo 2¹⁶, within int16: int32."""
    return x.astype(np.int16).astype(np.int32)


def differences(y: np.ndarray, step: int = 1) -> np.ndarray:
    """Elements minus their predictions, of every `step`-th row: [h, w, C] integers → [⌈h / step⌉, w, C] int32.

    The prediction is the mean of the elements to the left and above, rounded down. In the first row and column it is
    the one that exists, and 0 for the first element.
    """
    here = y[::step].astype(np.int32)
    before = np.pad(here[:1, :-1], ((0, 0), (1, 0), (0, 0)))
    above = np.concatenate([before, y[step - 1 : -1 : step].astype(np.int32)])
    left = np.concatenate([above[:, :1], here[:, :-1]], axis=1)
    return wrap(here - (left + above >> 1))


def restore(d: np.ndarray) -> np.ndarray:
    """The inverse of `differences` of every row, for values within int16: [h, w, C], in the type of d.

    Elements on one diagonal do not depend on each other. Row i moves i places to the right, so diagonals are columns.
    """
    height, width, channels = d.shape
    if height > width:  # the fewer rows, the less is moved; rows and columns have the same rule
        return restore(d.transpose(1, 0, 2)).transpose(1, 0, 2)
    padded = np.pad(d, ((0, 0), (0, height), (0, 0))).reshape(height * (width + height), channels)
    skewed = padded[:-height].reshape(height, width + height - 1, channels)
    rows, column = np.arange(height)[:, None], np.zeros((height, channels), np.int32)
    for number in range(skewed.shape[1]):
        above = np.concatenate([column[:1], column[:-1]])
        left = np.where(rows == number, above, column)
        skewed[:, number] = column = wrap(skewed[:, number] + (left + above >> 1))
    return padded.reshape(height, width + height, channels)[:, :width]


def make_costs(tables: Tables, counts: Counts, num_scales: int) -> np.ndarray:
    """What each value costs in units of 1/256 bit: [num_scales + SHIFTS − 1, 2 · VALUES + 1] int32.

    Row i − LEAST_SHIFT is that of the scale index i. Rows before and after repeat the first and last, because
    shifts may lead beyond the tables.
    """
    values = np.arange(-VALUES, VALUES + 1)
    costs = np.empty((num_scales, len(values)), np.int32)
    for table, cumulative in enumerate(counts.cumulative[:num_scales]):
        bits = counts.precision[table] - np.log2(np.diff(cumulative))
        bits[-1] += 16.0  # the escape
        symbols = values - tables.first[table]
        is_outside = (symbols < 0) | (symbols >= tables.escape[table])
        costs[table] = np.rint(UNIT * bits[np.where(is_outside, tables.escape[table], symbols)])
    return np.pad(costs, ((-LEAST_SHIFT, SHIFTS - 1 + LEAST_SHIFT), (0, 0)), "edge")


def choose(y: np.ndarray, index: np.ndarray, costs: np.ndarray) -> Adaptation:
    """The adaptation that saves bits for one image; `y`, `index`: [h, w, M] integers, `costs`: of `make_costs`."""
    step = -(-y.shape[0] * y.shape[1] // SAMPLE)
    values, d = y[::step].astype(np.int32), differences(y, step)
    # Differences pay where they are clearly smaller.
    follows = 4 * np.abs(d).sum((0, 1)) < 3 * np.abs(values).sum((0, 1))
    rows = costs.shape[1] * index[::step].astype(np.int32) + VALUES

    def cost(values: np.ndarray, shifts: Sequence[int]) -> np.ndarray:
        places = rows + np.clip(values, -VALUES, VALUES)
        return np.stack(
            [costs.ravel()[places + (shift - LEAST_SHIFT) * costs.shape[1]].sum((0, 1)) for shift in shifts]
        )

    totals = cost(np.where(follows, d, values), range(LEAST_SHIFT, LEAST_SHIFT + SHIFTS))
    pays = cost(values, [0])[0] - totals.min(axis=0) > LEAST_GAIN // step
    kind, shift = np.where(follows, 1, -1), totals.argmin(axis=0) + LEAST_SHIFT
    return Adaptation(*(np.where(pays, each, 0).astype(np.int32) for each in (kind, shift)))
