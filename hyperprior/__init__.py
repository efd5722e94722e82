"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperprior.codec import Codec

__version__ = "0.1.0"


def load(path: str | Path) -> Codec:
    """The codec of a model directory, or of a run that was exported.

    `codec.compress(image)` gives the bytes of a `.hyp` file for an [H, W, 3] uint8 image,
    `codec.decompress(data)` the image. Raises errors.ConfigError if there is no model, errors.DataError if it
    is damaged.
    """
    from hyperprior import codec  # TensorFlow takes seconds to import

    return codec.load(path)
