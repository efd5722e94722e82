"""A model's transforms as TensorFlow graphs, one graph for each: whole tensors in, whole tensors out."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from hyperprior import config, storage
from hyperprior.codec import exact, search
from hyperprior.model import metrics, priors
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.storage import Arrays

INT16 = np.iinfo(np.int16)  # the type of an escape


class TensorFlowEngine:
    """`weights`: of all transforms except h_s, by the model's names; `layers`: h_s as integers, see `exact`;
    `z_offsets`: the quantisation offsets of z, see `exact.offsets`."""

    def __init__(
        self, weights: Arrays, layers: exact.Layers, z_offsets: np.ndarray, settings: config.Config, origin: str
    ):
        self.layers, self.z_offsets, self.settings = layers, z_offsets, settings
        self.model = ScaleHyperprior(settings.model)
        del self.model.h_s  # `layers` replaces it
        storage.assign_arrays(self.model.named_variables(), weights, origin)
        m, c = settings.model.latent_channels, settings.model.hyper_channels

        def as_graph(run: Any, channels: int, dtype: tf.DType) -> Any:
            return make_graph(run, [tf.TensorSpec([None, None, None, channels], dtype)])

        self.analyse = as_graph(self._analyse, 3, tf.uint8)
        self.hyper_analyse = as_graph(self._hyper_analyse, m, tf.float32)
        self.index_sums = as_graph(self._index_sums, c, tf.int32)
        self.indexes = as_graph(self._indexes, c, tf.int32)
        self.synthesise = as_graph(self._synthesise, m, tf.float32)
        shapes = [[1, None, None, channels] for channels in (m, m, 3, 1, 1)]
        signature = [*(tf.TensorSpec(shape, tf.float32) for shape in shapes), tf.TensorSpec([], tf.int32)]
        self.search = make_graph(self._search, signature)

    def weights(self) -> Arrays:
        """The weights of all transforms, by the model's names. Those of h_s have the precision of its integers."""
        arrays = {name: variable.numpy() for name, variable in self.model.named_variables().items()}
        return {**arrays, **exact.weights(self.layers, self.settings.model)}

    def bits_of_z(self, z: np.ndarray) -> float:
        """−log2 p of the integers of ẑ [1, h, w, C] under the model's own density."""
        z_hat = z.astype(np.float32) + exact.offset_values(self.z_offsets)
        return float(self.model.prior.bits(z_hat)[0])

    def bits_of_y(self, y: np.ndarray, sums: tf.Tensor) -> float:
        """−log2 p of ŷ [1, h, w, M] under the model's own densities; `sums`: the result of `index_sums`."""
        scales = exact.scales(sums, self.settings.model)
        return float(priors.gaussian_bits(y.astype(np.float32), scales)[0])

    def _analyse(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, 3] uint8, sides multiples of 16 → y [B, H/16, W/16, M] float32."""
        return self.model.g_a(tf.cast(x, tf.float32) / 255.0)

    def _hyper_analyse(self, y: tf.Tensor) -> tf.Tensor:
        """y → the integers of ẑ: [B, h/4, w/4, C] int32, within int16."""
        z = self.model.h_a(tf.abs(y))
        return round_to_int16(z - exact.offset_values(self.z_offsets))

    def _index_sums(self, z: tf.Tensor) -> tf.Tensor:
        """The integers of ẑ → `exact.index_sums` [B, 4h, 4w, M] float64."""
        return exact.index_sums(z, self.z_offsets, self.layers)

    def _indexes(self, z: tf.Tensor) -> tf.Tensor:
        """The integers of ẑ → indexes into the table of scales: [B, 4h, 4w, M] int32."""
        return exact.indexes(self._index_sums(z), self.settings.model.num_scales)

    def _synthesise(self, y: tf.Tensor) -> tf.Tensor:
        """ŷ [B, h, w, M] float32 → pixels [B, 16h, 16w, 3] uint8."""
        x = tf.clip_by_value(self.model.g_s(y), 0.0, 1.0)
        return tf.cast(tf.round(x * 255.0), tf.uint8)

    def _search(
        self, y: tf.Tensor, scales: tf.Tensor, x: tf.Tensor, real: tf.Tensor, inside: tf.Tensor, rounds: tf.Tensor
    ) -> tf.Tensor:
        """`search.search` with this model's g_s, at its lambda."""
        weight = metrics.lagrangian(0.0, 1.0 / 3.0, self.settings.loss.lmbda, "mse")  # MSE averages over channels
        return search.search(self.model.g_s, y, scales, x, real, inside, weight, rounds)


def make_graph(run: Any, signature: list[tf.TensorSpec]) -> Any:
    """`run` as a graph that is traced at the first call.

    A plain tf.function warns of retracing from the fifth codec on, although every codec has its own graphs.
    """
    traced = functools.lru_cache(tf.function(run, input_signature=signature, autograph=False).get_concrete_function)
    return lambda *inputs: traced()(*map(tf.convert_to_tensor, inputs))


def round_to_int16(x: tf.Tensor) -> tf.Tensor:
    """The nearest integers that an escape can hold: int32."""
    return tf.cast(tf.clip_by_value(tf.round(x), float(INT16.min), float(INT16.max)), tf.int32)
