"""The number of floating-point operations of each layer of a model."""

from __future__ import annotations

from typing import NamedTuple

from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.layers import GDN, Layer


class LayerWork(NamedTuple):
    """One layer of a transform, the shape of its input, and its number of operations."""

    name: str
    call: Layer
    shape: tuple[int, int, int]
    dtype: str
    flop: float  # forward, of one image
    passes: int  # forward, gradient by the weights, and gradient by the input unless it is the image


def work_of_layers(model: ScaleHyperprior, side: int) -> list[LayerWork]:
    """The layers of all transforms, with their work for one patch of `side` x `side` pixels."""
    work = []
    latent, hyper = model.latent_shapes(side, side)
    starts = {"g_a": (side, side, 3), "h_a": latent, "h_s": hyper, "g_s": latent}
    for transform, shape in starts.items():
        module = getattr(model, transform)
        for index, (layer, dtype) in enumerate(zip(module.layers, module.dtypes)):
            height, width, channels = shape
            if isinstance(layer, GDN):
                after, flop = shape, 2.0 * height * width * channels**2
            else:
                size, _, a, b = layer.kernel.shape
                scale, outputs = (layer.stride, a) if layer.transpose else (1 / layer.stride, b)
                after = (int(height * scale), int(width * scale), outputs)
                places = height * width if layer.transpose else after[0] * after[1]
                flop = 2.0 * size**2 * a * b * places
            passes = 2 if (transform, index) == ("g_a", 0) else 3
            work.append(LayerWork(f"{transform}/{index} {type(layer).__name__}", layer, shape, dtype, flop, passes))
            shape = after
    return work
