"""A model's transforms as TensorFlow graphs, one graph for each: whole tensors in, whole tensors out."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from hyperprior import storage
from hyperprior.codec import exact, native, range_coder, search
from hyperprior.codec.tables import INT16
from hyperprior.config import Model
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.storage import Arrays


class TensorFlowEngine:
    """The interface of `numpy_engine.NumPyEngine`, and the search. Functions `in_graph` take and return tensors.

    `weights`: by the model's names; those of h_s serve the search. `layers`: h_s as integers, see `exact`; `z_offsets`:
    see `exact.offsets`; `counts`: for the range coder in Python, if the one in C++ cannot be loaded.
    """

    def __init__(
        self, weights: Arrays, layers: exact.Layers, z_offsets: np.ndarray, counts: range_coder.Counts, settings: Model
    ):
        operations = native.load_operations().module
        coder: Any = native if operations else range_coder
        tables = (operations, counts.lookup) if operations else (counts,)
        self.encoder, self.decoder = (functools.partial(kind, *tables) for kind in (coder.Encoder, coder.Decoder))
        self.layers, self.z_offsets, self.scale_min = layers, z_offsets, settings.scale_min
        self.model = ScaleHyperprior(settings)
        storage.assign_arrays(self.model.named_variables(), weights, "the model")
        m, c = settings.latent_channels, settings.hyper_channels

        def as_graph(run: Any, channels: int, dtype: tf.DType) -> Any:
            return make_graph(run, [tf.TensorSpec([None, None, None, channels], dtype)])

        self.analyse = as_graph(self.analyse_in_graph, 3, tf.uint8)
        self.hyper_analyse = as_graph(self.hyper_analyse_in_graph, m, tf.float32)
        self.index_sums = as_graph(self.index_sums_in_graph, c, tf.int32)
        self.synthesise = as_graph(self.synthesise_in_graph, m, tf.float32)
        shapes = [[1, None, None, m], [m], *([1, None, None, channels] for channels in (m, c, 3, 1, 1))]
        signature = [*(tf.TensorSpec(shape, tf.float32) for shape in shapes)]
        signature += [tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.int32)]
        self.search = make_graph(self._search, signature)

    def analyse_in_graph(self, x: tf.Tensor) -> tf.Tensor:
        return self.model.g_a(tf.cast(x, tf.float32) / 255.0)

    def hyper_analyse_in_graph(self, y: tf.Tensor) -> tf.Tensor:
        z = self.model.h_a(tf.abs(y))
        return round_to_int16(z - exact.offset_values(self.z_offsets))

    def index_sums_in_graph(self, z: tf.Tensor) -> tf.Tensor:
        # Always on the CPU: the libraries of a GPU may transform a convolution, which adds roundings.
        with tf.device("cpu:0"):
            x = tf.cast(z, tf.float64) * 2.0**exact.ACTIVATION_BITS + self.z_offsets.astype(np.float64)
            x = tf.clip_by_value(x, -exact.LIMIT, exact.LIMIT)
            *inner, (last_kernel, last_bias) = self.layers
            for kernel, bias in inner:
                batch, height, width, _ = tf.unstack(tf.shape(x))
                shape = (batch, 2 * height, 2 * width, kernel.shape[2])
                x = tf.nn.conv2d_transpose(x, kernel.astype(np.float64), shape, 2, "SAME") + bias.astype(np.float64)
                # ReLU, and rounding to integers.
                x = tf.round(tf.clip_by_value(x * 2.0**-exact.WEIGHT_BITS, 0.0, exact.LIMIT))
            return tf.nn.conv2d(x, last_kernel.astype(np.float64), 1, "SAME") + last_bias.astype(np.float64)

    def synthesise_in_graph(self, y: tf.Tensor) -> tf.Tensor:
        x = tf.clip_by_value(self.model.g_s(y), 0.0, 1.0)
        return tf.cast(tf.round(x * 255.0), tf.uint8)

    def _search(self, predictions: tf.Tensor, factors: tf.Tensor, *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`search.search` with this model's transforms and prior; `inputs`: its arguments from `y` on.

        The bits of y are those of its difference from `predictions` [1, h, w, M], which do not change, with scales
        times `factors` [M].
        """
        offsets = exact.offset_values(self.z_offsets)

        def scales(z: tf.Tensor) -> tf.Tensor:
            return self.model.scales(self.model.h_s(z + offsets))

        def bits_of_z(z: tf.Tensor) -> tf.Tensor:
            return self.model.prior.bits_each(z + offsets)

        def bits_of_y(y: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
            return self.model.bits_of_each_y(y - predictions, tf.maximum(scales * factors, self.scale_min))

        return search.search(self.model.g_s, scales, bits_of_y, bits_of_z, *inputs)


def make_graph(run: Any, signature: list[tf.TensorSpec]) -> Any:
    """`run` as a graph that is traced at the first call, of NumPy arrays.

    A plain tf.function warns of retracing from the fifth codec on, although every codec has its own graphs.
    """
    traced = functools.lru_cache(tf.function(run, input_signature=signature, autograph=False).get_concrete_function)

    def call(*inputs: Any) -> Any:
        tensors = (tf.convert_to_tensor(value, spec.dtype) for value, spec in zip(inputs, signature))
        return tf.nest.map_structure(lambda result: result.numpy(), traced()(*tensors))

    return call


def round_to_int16(x: tf.Tensor) -> tf.Tensor:
    """The nearest integers that an escape can hold: int32."""
    return tf.cast(tf.clip_by_value(tf.round(x), float(INT16.min), float(INT16.max)), tf.int32)
