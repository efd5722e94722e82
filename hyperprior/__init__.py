"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperprior.codec import Codec

__version__ = "0.1.0"

# TensorFlow reads this when it is first imported. By itself it turns its oneDNN kernels on only where a CPU has
# AVX512-VNNI or AMX; with AVX2 alone they halve the time of the codec's transforms (not of a training step).
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def load(path: str | Path) -> Codec:
    """The codec of a model directory, or of a run that was exported.

    `codec.compress(image)` gives the bytes of a `.hyp` file for an [H, W, 3] uint8 image,
    `codec.decompress(data)` the image. Raises errors.ConfigError if there is no model, errors.DataError if it
    is damaged.
    """
    from hyperprior import codec  # TensorFlow takes seconds to import

    return codec.load(path)
