"""Makes the arrays of a codec from trained weights: once, at export. A decoder never makes tables itself."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np
from scipy import special

from hyperprior import storage
from hyperprior.codec import exact
from hyperprior.codec.tables import Tables
from hyperprior.config import Model
from hyperprior.errors import ConfigError
from hyperprior.model.densities import MAX_BITS, cumulative, cumulative_logits, find_medians, quantile
from hyperprior.storage import Arrays, TrainedWeights

PRECISION = MAX_BITS  # bits of a probability: the most that the range coder accepts
TAIL_MASS = 2.0**-14  # the escape has at most this probability
# Additional values on either side, for badly predicted scales: in the table, such a value costs half as much as an
# escape. A value at ten deviations mostly has a larger deviation than its table assumes, so wide tables get more of
# them. Each takes a probability of 2⁻¹⁶ from the others.
OUTLIERS, OUTLIERS_PER_SCALE, MAX_OUTLIERS = 8, 8, 40
MAX_HALF_WIDTH = 2048  # values on either side of zero


class Masses(NamedTuple):
    """The probabilities of `first`, `first` + 1, …; the escape has the rest of 1."""

    first: int
    probabilities: np.ndarray


def make_arrays(trained: TrainedWeights) -> Arrays:
    """All arrays of a `Codec`. Raises ConfigError if weights are not finite, or too large for an integer h_s."""
    for name, array in trained.arrays.items():
        if not np.isfinite(array).all():
            raise ConfigError(
                f"`{name}` of step {trained.step} is not finite: the run diverged; "
                f"train it again with a lower train.learning_rate"
            )
    settings = trained.settings.model
    prior = storage.with_prefix("prior/", trained.arrays)
    medians = find_medians(prior)
    z_offsets = exact.offsets(medians - np.rint(medians))
    tables = make_tables(prior, exact.offset_values(z_offsets), settings)
    arrays = {name: array for name, array in trained.arrays.items() if not name.startswith("h_s/")}
    for i, (kernel, bias) in enumerate(exact.integers(trained.arrays, settings)):
        arrays |= {f"h_s/{i}/kernel": kernel, f"h_s/{i}/bias": bias}
    return {**arrays, "z_offsets": z_offsets, **{f"tables/{name}": array for name, array in tables._asdict().items()}}


def make_tables(prior: Arrays, z_offset: np.ndarray, settings: Model) -> Tables:
    """Tables for y, its density convolved with a unit box, and for z + z_offset under `prior`, see `densities`.

    All is computed in float64 with NumPy, whose errors are too small to change how a table rounds: the same weights
    give the same model everywhere.
    """
    low, step = exact.log_scale_table(settings)
    scales = [math.exp(low + step * index) for index in range(settings.num_scales)]
    masses = [masses_of_y(scale, settings.density) for scale in scales] + factorized_masses(prior, z_offset)
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


def masses_of_y(scale: float, density: str) -> Masses:
    """The masses of the values of y with one standard deviation."""
    half = math.ceil(-quantile(density, TAIL_MASS / 2) * scale - 0.5)
    outliers = min(OUTLIERS + math.ceil(OUTLIERS_PER_SCALE * scale), MAX_OUTLIERS)
    half = min(max(1, half) + outliers, MAX_HALF_WIDTH)
    return Masses(-half, np.diff(cumulative(density, (np.arange(-half, half + 2) - 0.5) / scale)))


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
