"""The densities of a trained model in float64 NumPy, for tables and for estimates of rates.

Errors of float64 are too small to change a table, so the same weights give the same tables everywhere. The parameters
of the prior of z have the names of `priors.FactorizedPrior`, such as `matrix_0`.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from hyperprior.model.architecture import PRIOR_WIDTHS

STAGES = len(PRIOR_WIDTHS) - 1
MOST_DOUBLINGS, BISECTIONS = 40, 100  # beyond what float64 can resolve
MAX_BITS = 16  # the most that a value costs: no probability in a file's tables is below 2⁻¹⁶
LOGISTIC_SLOPE = math.pi / math.sqrt(3.0)  # of the logistic density with a standard deviation of 1
BITS_PER_SQUARE = 32.0  # of a squared error of 1 in y; for MSE see Codec.bits_per_square, too


def cumulative_logits(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The logits of the cumulative densities: [values, C] → [values, C], in float64.

    Every sum has one order and every operation rounds alike everywhere, so tables do not depend on the library.
    """
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    values = x.astype(np.float64).T[:, None]
    for i in range(STAGES):
        matrix = np.logaddexp(0.0, arrays[f"matrix_{i}"])  # softplus
        products = (matrix[:, :, j, None] * values[:, None, j] for j in range(matrix.shape[2]))
        values = functools.reduce(np.add, products) + arrays[f"bias_{i}"]
        if i < STAGES - 1:
            values = values + np.tanh(arrays[f"factor_{i}"]) * np.tanh(values)
    return values[:, 0].T


def find_medians(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The median of each channel's density, by bisection: [C] float64."""
    high = np.ones(arrays["bias_0"].shape[0])
    for _ in range(MOST_DOUBLINGS):
        above, below = cumulative_logits(arrays, np.stack([high, -high]))
        high = np.where((above >= 0.0) & (below <= 0.0), high, 2.0 * high)
    low = -high
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        is_below = cumulative_logits(arrays, middle[None])[0] < 0.0
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return 0.5 * (low + high)


def bits_of_z(arrays: dict[str, np.ndarray], z: np.ndarray) -> float:
    """−log2 of the masses in [z − ½, z + ½], summed: z is [values, C]. A value counts at most MAX_BITS."""
    lower, upper = cumulative_logits(arrays, z - 0.5), cumulative_logits(arrays, z + 0.5)
    # Both ends are mirrored to the side of the median where their sigmoids are small, and so precise.
    is_above = lower + upper > 0.0
    lower, upper = np.where(is_above, -upper, lower), np.where(is_above, -lower, upper)
    return sum_bits(sigmoid(upper) - sigmoid(lower))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def bits_of_y(y: np.ndarray, scales: np.ndarray, density: str) -> float:
    """−log2 of the masses of the density in [y − ½, y + ½], summed. A value counts at most MAX_BITS."""
    distance = np.abs(y)
    return sum_bits(cumulative(density, (0.5 - distance) / scales) - cumulative(density, (-0.5 - distance) / scales))


def cumulative(density: str, x: np.ndarray) -> np.ndarray:
    """The cumulative density of y with a standard deviation of 1; `density`: see config.Model."""
    from scipy import special

    functions = {"gaussian": special.ndtr, "logistic": lambda x: special.expit(LOGISTIC_SLOPE * x)}
    return functions[density](x)


def quantile(density: str, mass: float) -> float:
    """The x whose `cumulative` is `mass`."""
    from scipy import special

    functions = {"gaussian": special.ndtri, "logistic": lambda mass: special.logit(mass) / LOGISTIC_SLOPE}
    return float(functions[density](mass))


def sum_bits(masses: np.ndarray) -> float:
    return float(-np.log2(np.maximum(masses, 2.0**-MAX_BITS)).sum())
