"""Range-coding tables: built once, at export, and shipped with the model.

There is one table for each of y's standard deviations and one for each channel of z. A table covers the likely values
and ends with an escape symbol. A value outside the table is stored as an int16 beside the coded string. So the number
of decoding steps depends only on the image's size, for any bytes.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np
from scipy import special

from hyperprior.codec import exact
from hyperprior.config import Model
from hyperprior.model.priors import MAX_BITS, cumulative_logits
from hyperprior.storage import Arrays

PRECISION = MAX_BITS  # bits of a probability: the most that the range coder accepts
TAIL_MASS = 2.0**-14  # the escape has at most this probability
# Additional values on either side, for badly predicted scales: in the table, such a value costs half as much as an
# escape. A value at ten deviations mostly has a larger deviation than its table assumes, so wide tables get more of
# them. Each takes a probability of 2⁻¹⁶ from the others.
OUTLIERS, OUTLIERS_PER_SCALE, MAX_OUTLIERS = 8, 8, 40
MAX_HALF_WIDTH = 2048  # values on either side of zero


class Tables(NamedTuple):
    """`lookup`: [L] int32, each table as (precision, cumulative counts from 0 to 2¹⁶), one after another;
    `first`: [tables] int32, the value of each table's symbol 0; `escape`: [tables] int32, its last symbol.

    The tables of y come first, in order of scale, then those of z, in order of channel.
    """

    lookup: np.ndarray
    first: np.ndarray
    escape: np.ndarray


class Masses(NamedTuple):
    """The probabilities of `first`, `first` + 1, …; the escape has the rest of 1."""

    first: int
    probabilities: np.ndarray


def build(prior: Arrays, z_offset: np.ndarray, settings: Model) -> Tables:
    """Tables for y, Gaussians convolved with a unit box, and for z + z_offset under `prior`.

    `prior`: of `priors.FactorizedPrior.arrays`. All is computed in float64 with NumPy, whose errors are too small to
    change how a table rounds: the same weights give the same model everywhere.
    """
    low, step = exact.log_scale_table(settings)
    scales = [math.exp(low + step * index) for index in range(settings.num_scales)]
    masses = [*map(gaussian_masses, scales), *factorized_masses(prior, z_offset)]
    lookup, escape = [], []
    for _, probabilities in masses:
        pmf = np.append(probabilities, max(1.0 - probabilities.sum(), 0.0)).astype(np.float32)
        lookup += [[PRECISION, 0], np.cumsum(quantise(pmf))]
        escape.append(len(pmf) - 1)
    return Tables(
        np.concatenate(lookup).astype(np.int32),
        np.array([first for first, _ in masses], np.int32),
        np.array(escape, np.int32),
    )


def quantise(pmf: np.ndarray, precision: int = PRECISION) -> np.ndarray:
    """Counts of at least 1 that sum to 2^precision, close to a float32 pmf times that: int64.

    Rounding leaves too many or too few counts. They are taken from, or given to, the symbols whose code length then
    changes the expected length least, one after another; among equal symbols the first.
    """
    counts = np.maximum(np.rint(pmf * np.float32(1 << precision)).astype(np.int64), 1)
    excess = int(counts.sum()) - (1 << precision)
    step = -1 if excess > 0 else 1

    def cost(symbol: int) -> float:
        count = int(counts[symbol])
        if count + step < 1:
            return math.inf
        return float(pmf[symbol]) * (math.log2(count) - math.log2(count + step))

    queue = [(cost(symbol), symbol) for symbol in range(len(pmf))]
    heapq.heapify(queue)
    for _ in range(abs(excess)):
        _, symbol = queue[0]
        counts[symbol] += step
        heapq.heapreplace(queue, (cost(symbol), symbol))
    return counts


def gaussian_masses(scale: float) -> Masses:
    """The masses of the values of y with one standard deviation."""
    half = math.ceil(-special.ndtri(TAIL_MASS / 2) * scale - 0.5)
    outliers = min(OUTLIERS + math.ceil(OUTLIERS_PER_SCALE * scale), MAX_OUTLIERS)
    half = min(max(1, half) + outliers, MAX_HALF_WIDTH)
    return Masses(-half, np.diff(special.ndtr((np.arange(-half, half + 2) - 0.5) / scale)))


def factorized_masses(prior: Arrays, z_offset: np.ndarray) -> list[Masses]:
    """The masses of the values of z, for each channel."""
    grid = np.arange(-MAX_HALF_WIDTH, MAX_HALF_WIDTH + 1)
    edges = np.append(grid - 0.5, MAX_HALF_WIDTH + 0.5)[:, None] + z_offset.astype(np.float64)
    # Each tail is computed from its own end, where it is precise.
    logits = cumulative_logits(prior, edges)
    below, above = special.expit(logits), special.expit(-logits)
    masses = []
    for channel in range(len(z_offset)):
        under, over = below[:, channel], above[:, channel]
        likely = np.flatnonzero((under[1:] > TAIL_MASS / 2) & (over[:-1] > TAIL_MASS / 2))
        begin, end = (likely[0], likely[-1] + 1) if likely.size else (MAX_HALF_WIDTH, MAX_HALF_WIDTH + 1)
        mass = np.where(under[:-1] < 0.5, np.diff(under), -np.diff(over))
        masses.append(Masses(int(grid[begin]), np.maximum(mass[begin:end], 0.0)))
    return masses
