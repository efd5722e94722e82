"""The four transforms g_a, g_s, h_a, h_s, layer by layer (paper, section 4 and figure 4).

`transforms` computes these layers with TensorFlow, for training; `codec.numpy_engine` with NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

from hyperprior.config import Model

# y starts this many times larger than its input, so that it is not lost in noise of unit width. After 500 steps of
# configs/quickstart.yaml on ImageNet patches, the loss is 0.85 of the loss with Glorot's initialisation. With 8 or
# more, the first steps overshoot.
LATENT_GAIN = 4.0
# GDN's parameters are stored so that they stay non-negative: as roughly their square roots, see `bounds.NonNegative`.
BETA_MINIMUM, ROOT_OFFSET = 1e-6, 2.0**-18
# The widths between the stages of the network that is the density of a channel of z (appendix 6.1).
PRIOR_WIDTHS = (1, 3, 3, 1)


class Convolution(NamedTuple):
    """A zero-padded convolution: down by `stride`, or up by `stride` with `transpose`; then ReLU with `relu`.

    `gain`, `bias`: of its first weights.
    """

    inputs: int
    outputs: int
    size: int
    stride: int
    transpose: bool = False
    relu: bool = False
    gain: float = 1.0
    bias: float = 0.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        channels = (self.outputs, self.inputs) if self.transpose else (self.inputs, self.outputs)
        return {"kernel": (self.size, self.size, *channels), "bias": (self.outputs,)}


class Normalisation(NamedTuple):
    """GDN, or with `inverse` its approximate inverse."""

    channels: int
    inverse: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"beta": (self.channels,), "gamma": (self.channels, self.channels)}


Layers = Sequence[Union[Convolution, Normalisation]]


def analysis(model: Model) -> Layers:
    """g_a: [B, H, W, 3] → y [B, H/16, W/16, M]."""
    n, m = model.num_filters, model.latent_channels
    return [
        Convolution(3, n, 5, 2),
        Normalisation(n),
        Convolution(n, n, 5, 2),
        Normalisation(n),
        Convolution(n, n, 5, 2),
        Normalisation(n),
        Convolution(n, m, 5, 2, gain=LATENT_GAIN),
    ]


def synthesis(model: Model) -> Layers:
    """g_s: ŷ [B, H/16, W/16, M] → x̂ [B, H, W, 3]."""
    n, m = model.num_filters, model.latent_channels
    return [
        Convolution(m, n, 5, 2, transpose=True, gain=1.0 / LATENT_GAIN),
        Normalisation(n, inverse=True),
        Convolution(n, n, 5, 2, transpose=True),
        Normalisation(n, inverse=True),
        Convolution(n, n, 5, 2, transpose=True),
        Normalisation(n, inverse=True),
        Convolution(n, 3, 5, 2, transpose=True, bias=0.5),  # the first images are gray
    ]


def hyper_analysis(model: Model) -> list[Convolution]:
    """h_a: |y| → z [B, H/64, W/64, hyper_channels]."""
    n, m = model.hyper_channels, model.latent_channels
    return [Convolution(m, n, 3, 1, relu=True), Convolution(n, n, 5, 2, relu=True), Convolution(n, n, 5, 2)]


def hyper_synthesis(model: Model) -> list[Convolution]:
    """h_s: ẑ → the logarithm of y's standard deviations [B, H/16, W/16, M]."""
    n, m = model.hyper_channels, model.latent_channels
    return [
        Convolution(n, n, 5, 2, transpose=True, relu=True),
        Convolution(n, n, 5, 2, transpose=True, relu=True),
        Convolution(n, m, 3, 1),
    ]


TRANSFORMS: dict[str, Callable[[Model], Layers]] = {
    "g_a": analysis,
    "g_s": synthesis,
    "h_a": hyper_analysis,
    "h_s": hyper_synthesis,
}


def shapes_of_weights(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every weight under its name, such as `g_a/0/kernel` or `prior/matrix_0`."""
    shapes = {
        f"{transform}/{number}/{name}": shape
        for transform, make_layers in TRANSFORMS.items()
        for number, layer in enumerate(make_layers(model))
        for name, shape in layer.shapes().items()
    }
    stages = list(zip(PRIOR_WIDTHS, PRIOR_WIDTHS[1:]))
    for i, (inputs, outputs) in enumerate(stages):
        shapes[f"prior/matrix_{i}"] = (model.hyper_channels, outputs, inputs)
        shapes[f"prior/bias_{i}"] = (model.hyper_channels, outputs, 1)
        if i < len(stages) - 1:
            shapes[f"prior/factor_{i}"] = (model.hyper_channels, outputs, 1)
    return shapes
