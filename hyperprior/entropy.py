"""Range coding with tables that are built once, at export, and shipped with the model.

There is one table for each of y's standard deviations and one for each channel of z. A table covers the
likely values and ends with an escape symbol; a value outside it is stored as an int16 beside the coded
string. So decoding takes a number of steps that the image's size alone decides, whatever the bytes are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc
from scipy import special

from hyperprior import exact, model
from hyperprior.config import Model

PRECISION = model.MAX_BITS  # of a probability: the most that the range coder takes
TAIL_MASS = 2.0**-14  # at most this much probability is left to the escape
# Further values on either side, for badly predicted scales: half the price of an escape. What is ten deviations off
# mostly has some deviation, so wide tables get more of them; each takes 2⁻¹⁶ from the others.
OUTLIERS, OUTLIERS_PER_SCALE, MOST_OUTLIERS = 8, 8, 40
MAX_HALF_WIDTH = 2048  # values on either side of zero


class Tables(NamedTuple):
    """`lookup`: [L] int32, each table as (precision, cumulative counts from 0 to 2¹⁶), one after another;
    `first`: [tables] int32, the value of each table's symbol 0; `escape`: [tables] int32, its last symbol.

    The tables of y come first, in order of scale, then those of z, in order of channel.
    """

    lookup: np.ndarray
    first: np.ndarray
    escape: np.ndarray


def in_float64(prior: tfc.NoisyDeepFactorized) -> tfc.UniformNoiseAdapter:
    """The prior of z as training left it, but computed so precisely that what is rounded afterwards comes out alike
    under any kernels and thread counts: the same weights give the same model wherever they are exported."""
    base = tfc.DeepFactorized(batch_shape=prior.base.batch_shape, dtype=tf.float64)
    for variable, trained in zip(base.trainable_variables, prior.base.trainable_variables):
        variable.assign(tf.cast(trained, tf.float64))
    return tfc.UniformNoiseAdapter(base)


def build(prior: tfc.UniformNoiseAdapter, z_offset: np.ndarray, settings: Model) -> Tables:
    """Tables for y, Gaussians convolved with a unit box, and for z + z_offset under `prior`, which is in float64."""
    pmfs = []  # (first value, probabilities)
    low, step = exact.log_scale_table(settings)
    for index in range(settings.num_scales):
        scale = math.exp(low + step * index)
        half = math.ceil(-special.ndtri(TAIL_MASS / 2) * scale - 0.5)
        outliers = min(OUTLIERS + math.ceil(OUTLIERS_PER_SCALE * scale), MOST_OUTLIERS)
        half = min(max(1, half) + outliers, MAX_HALF_WIDTH)
        edges = special.ndtr((np.arange(-half, half + 2) - 0.5) / scale)
        pmfs.append((-half, np.diff(edges)))

    grid = np.arange(-MAX_HALF_WIDTH, MAX_HALF_WIDTH + 1)
    edges = np.append(grid - 0.5, MAX_HALF_WIDTH + 0.5)[:, None] + z_offset.astype(np.float64)
    # Each side's tail is measured from its own end, where it is precise.
    below, above = prior.base.cdf(edges).numpy(), prior.base.survival_function(edges).numpy()
    for channel in range(len(z_offset)):
        under, over = below[:, channel], above[:, channel]
        likely = np.flatnonzero((under[1:] > TAIL_MASS / 2) & (over[:-1] > TAIL_MASS / 2))
        begin, end = (likely[0], likely[-1] + 1) if likely.size else (MAX_HALF_WIDTH, MAX_HALF_WIDTH + 1)
        mass = np.where(under[:-1] < 0.5, np.diff(under), -np.diff(over))
        pmfs.append((int(grid[begin]), np.maximum(mass[begin:end], 0.0)))

    lookup, escape = [], []
    for _, pmf in pmfs:
        pmf = np.append(pmf, max(1.0 - pmf.sum(), 0.0)).astype(np.float32)
        counts = tfc.pmf_to_quantized_cdf(pmf, precision=PRECISION).numpy()
        lookup += [[PRECISION], counts]
        escape.append(len(pmf) - 1)
    return Tables(
        np.concatenate(lookup).astype(np.int32),
        np.array([first for first, _ in pmfs], np.int32),
        np.array(escape, np.int32),
    )


def encode(handle: tf.Tensor, tables: Tables, values: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Appends `values` [B, …] int32, each by the table `index`, to encoders of shape [B].

    Returns the encoders and where the values are that must be stored as escapes: [B, …] bool.
    """
    symbols = values - tf.gather(tables.first, index)
    escape = tf.gather(tables.escape, index)
    outside = (symbols < 0) | (symbols >= escape)
    handle = tfc.entropy_encode_index(handle, index, tf.where(outside, escape, symbols))
    return handle, outside


def decode(handle: tf.Tensor, tables: Tables, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The inverse: (decoders, values [B, …] int32, where an escape stands instead)."""
    handle, symbols = tfc.entropy_decode_index(handle, index, tf.shape(index)[1:], tf.int32)
    return handle, symbols + tf.gather(tables.first, index), symbols >= tf.gather(tables.escape, index)
