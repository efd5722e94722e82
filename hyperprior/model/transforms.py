"""The transforms of `architecture`, computed with TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from hyperprior.model import architecture
from hyperprior.model.architecture import Convolution
from hyperprior.model.bounds import NonNegative
from hyperprior.model.layers import GDN, Conv


class Transform(tf.Module):
    """A sequence of layers, computed in `dtype`, the last one in `last_dtype`. Input and output are float32.

    With `precise`, all layers are computed in float32, as in the codec.
    """

    def __init__(self, layers: architecture.Layers, dtype: str, last_dtype: str = "float32"):
        super().__init__()
        self.layers = [Conv(layer) if isinstance(layer, Convolution) else GDN(layer) for layer in layers]
        self.dtypes = [dtype] * (len(layers) - 1) + [last_dtype]

    def __call__(self, x: tf.Tensor, precise: bool = False) -> tf.Tensor:
        for layer, dtype in zip(self.layers, self.dtypes):
            x = layer(tf.cast(x, "float32" if precise else dtype))
        return tf.cast(x, tf.float32)


class Place(NamedTuple):
    """Where a module holds a variable: `owner[key]`, such as the `kernel` among a layer's attributes."""

    owner: dict[str, Any]
    key: str


def places_of_variables(module: Any, prefix: str = "") -> Iterator[tuple[str, Place]]:
    """(path, place) of each variable. Paths depend only on attribute names and the order of layers."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        path = f"{prefix}/{name}"
        if isinstance(value, NonNegative):
            yield path, Place(value.__dict__, "variable")
        elif isinstance(value, tf.Variable):
            yield path, Place(vars(module), name)
        elif isinstance(value, tf.Module):
            yield from places_of_variables(value, path)
        elif name == "layers":
            for index, layer in enumerate(value):
                yield from places_of_variables(layer, f"{prefix}/{index}")
