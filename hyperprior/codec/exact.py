"""h_s in integer arithmetic: the scale indexes are equal on every machine, with any thread count and library.

If the scale index of one symbol differs by one in the decoder, all later symbols are garbage, and float convolutions
round differently on different machines. So here every number is an integer in float64: weights are multiples of 2⁻¹⁶,
activations are multiples of 2⁻¹² clamped to ±4096, and `check_bounds` proves that no partial sum can reach 2⁵³. Below
2⁵³ every sum is exact in any order. Clamping, scaling by powers of two and rounding are exact by IEEE 754.

`layers` is a list of (kernel, bias): int32 [k, k, …] in units of 2⁻¹⁶ and int64 [out] in units of 2⁻²⁸. The
last layer is scaled so that its output is the index into the table of scales. The engines compute them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hyperprior.config import Model
from hyperprior.errors import ConfigError
from hyperprior.model.architecture import hyper_synthesis
from hyperprior.storage import Arrays

WEIGHT_BITS, ACTIVATION_BITS, RANGE_BITS = 16, 12, 12
SUM_BITS = WEIGHT_BITS + ACTIVATION_BITS
LIMIT = 2.0 ** (ACTIVATION_BITS + RANGE_BITS)  # of an activation, as an integer
EXACT = 2**53  # float64 holds every integer up to here

Layers = Sequence[tuple[np.ndarray, np.ndarray]]


def integers(weights: Arrays, settings: Model) -> Layers:
    """The layers of a trained h_s, whose output is the logarithm of the scales, as integers.

    `weights`: by the model's names, such as `h_s/0/kernel`. Raises ConfigError if a partial sum could exceed the
    integers that float64 holds exactly.
    """
    low, step = log_scale_table(settings)
    layers = []
    convolutions = hyper_synthesis(settings)
    for number in range(len(convolutions)):
        kernel, bias = (weights[f"h_s/{number}/{name}"].astype(np.float64) for name in ("kernel", "bias"))
        if number == len(convolutions) - 1:
            kernel, bias = kernel / step, (bias - low) / step
        kernel, bias = np.rint(kernel * 2.0**WEIGHT_BITS), np.rint(bias * 2.0**SUM_BITS)
        layers.append((kernel, bias))
    check_bounds(layers, settings)
    return [(kernel.astype(np.int32), bias.astype(np.int64)) for kernel, bias in layers]


def weights(layers: Layers, settings: Model) -> Arrays:
    """The inverse of `integers`: the float32 weights of h_s by the model's names, to the precision of the integers."""
    low, step = log_scale_table(settings)
    arrays: Arrays = {}
    for number, (kernel, bias) in enumerate(layers):
        values = kernel / 2.0**WEIGHT_BITS, bias / 2.0**SUM_BITS
        if number == len(layers) - 1:
            values = values[0] * step, values[1] * step + low
        arrays |= {f"h_s/{number}/{name}": v.astype(np.float32) for name, v in zip(("kernel", "bias"), values)}
    return arrays


def log_scale_table(settings: Model) -> tuple[float, float]:
    """(logarithm of the smallest scale, step between logarithms): the table is log-spaced."""
    low, high = math.log(settings.scale_min), math.log(settings.scale_max)
    return low, (high - low) / (settings.num_scales - 1)


def check_bounds(layers: Layers, settings: Model) -> None:
    """Proves that |partial sums| < 2⁵³ for every input, or raises ConfigError."""
    for number, (layer, (kernel, bias)) in enumerate(zip(hyper_synthesis(settings), layers)):
        taps = np.abs(kernel.astype(np.float64)).sum(axis=(0, 1, 3) if layer.transpose else (0, 1, 2))
        bound = float(np.max(taps * LIMIT + np.abs(bias.astype(np.float64))))
        # `not <` also refuses NaN. The kernel must fit into int32, in which it is stored.
        if not bound < EXACT or not np.abs(kernel).max() < 2**31:
            raise ConfigError(
                f"h_s/{number} cannot be made exact: its partial sums may reach {bound:.3g}, but must stay below "
                f"2**53; its weights are too large: train the run again with a lower train.learning_rate"
            )


def offsets(z_offset: np.ndarray) -> np.ndarray:
    """The quantisation offsets of z as int32 in units of 2⁻¹². The decoder adds them to ẑ's integers."""
    return np.rint(z_offset.astype(np.float64) * 2**ACTIVATION_BITS).astype(np.int32)


def offset_values(z_offsets: np.ndarray) -> np.ndarray:
    """The values of `offsets` as float32."""
    return (z_offsets / 2**ACTIVATION_BITS).astype(np.float32)


def places(sums: np.ndarray, num_scales: int) -> np.ndarray:
    """Places in the table of scales, with fractions: float64; `sums`: in units of 2⁻²⁸, as h_s gives them."""
    return np.clip(sums * 2.0**-SUM_BITS, 0.0, num_scales - 1.0)


def indexes(sums: np.ndarray, num_scales: int) -> np.ndarray:
    """int32 indexes into the table of scales: the entries nearest to `places`."""
    return np.rint(places(sums, num_scales)).astype(np.int32)


def scales(places: np.ndarray, settings: Model) -> np.ndarray:
    """The standard deviations at places in the table, those beyond its ends as at its ends: float64."""
    low, step = log_scale_table(settings)
    return np.exp(low + step * np.clip(places, 0.0, settings.num_scales - 1.0))
