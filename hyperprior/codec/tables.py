"""Range-coding tables: there is one for each of y's standard deviations, and one for each channel of z.

A table covers the likely values and ends with an escape symbol. A value outside the table is stored as an int16 beside
the coded string. So the number of decoding steps depends only on the image's size, for any bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hyperprior.codec.range_coder import Counts

# Larger integers have the dead zone of this one. In narrow tables they are rare; in wide ones there is almost none.
LARGEST = 15
INT16 = np.iinfo(np.int16)  # the type of an escape


class Tables(NamedTuple):
    """`lookup`: [L] int32, each table as (precision, cumulative counts from 0 to 2^precision), one after another;
    `first`: [tables] int32, the value of each table's symbol 0; `escape`: [tables] int32, its last symbol.

    The tables of y come first, in order of scale, then those of z, in order of channel.
    """

    lookup: np.ndarray
    first: np.ndarray
    escape: np.ndarray

    def check(self, counts: Counts, num_scales: int, channels: int) -> None:
        """Raises ValueError unless these are the tables of y's scales and z's channels; `counts`: those of `lookup`."""
        symbols = [len(cumulative) - 1 for cumulative in counts.cumulative]
        if not len(self.first) == len(self.escape) == len(symbols) == num_scales + channels:
            raise ValueError(f"{len(symbols)} tables instead of {num_scales + channels}")
        if (self.escape != np.array(symbols) - 1).any() or (np.abs(self.first.astype(np.int64)) > -INT16.min).any():
            raise ValueError("first values or escapes do not fit the tables")
        if (self.first[:num_scales] > 0).any() or (self.first + self.escape <= 0)[:num_scales].any():
            raise ValueError("a table of y does not have the value 0")

    def dead_zone(self, counts: Counts, weights: np.ndarray) -> np.ndarray:
        """The encoder rounds |y| up to k from k − ½ plus this on: [num_scales, LARGEST + 1] float32.

        An integer k costs more bits than k − 1, and is worth them if the error is smaller by as much. With a squared
        error worth w bits this is so for |y| > k − ½ + (bits(k) − bits(k − 1)) / 2w. At k + ½, k + 1 is nearer.
        `weights`: w for each of y's scales.
        """
        shifts = np.zeros((len(weights), LARGEST + 1), np.float32)
        for table, (weight, cumulative) in enumerate(zip(weights, counts.cumulative)):
            symbols = np.clip(np.arange(LARGEST + 1) - self.first[table], 0, self.escape[table])
            bits = -np.log2(np.diff(cumulative)[symbols])
            shifts[table, 1:] = np.clip(np.diff(bits) / (2.0 * weight), 0.0, 1.0)
        return shifts


def apply_dead_zone(y: np.ndarray, index: np.ndarray, dead_zone: np.ndarray) -> None:
    """Changes y so that its nearest integers are those that the encoder chooses. `index`: its tables, see `exact`."""
    nearest = np.minimum(np.rint(np.abs(y)), LARGEST).astype(np.intp)
    y -= np.copysign(dead_zone[index, nearest], y)
