"""A trainer for learned image compression with a scale hyperprior, and the codec that comes out of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperprior.codec import Codec

__version__ = "0.1.0"


def load(path: str | Path) -> Codec:
    """The codec of a model in the box (q1, q2, …), of what `hyperprior export` wrote, or of a run that was exported.

    `codec.compress(image)` gives the bytes of a `.hyp` file for an [H, W, 3] uint8 image,
    `codec.decompress(data)` the image. Raises errors.ConfigError if there is no model, errors.DataError if it
    is damaged.
    """
    prefer_onednn()
    from hyperprior import codec  # TensorFlow takes seconds to import

    return codec.load(path)


def prefer_onednn() -> None:
    """Imports TensorFlow with its oneDNN kernels on, unless it is imported or the environment decides.

    By itself TensorFlow does so only where a CPU has AVX512-VNNI or AMX. With AVX2 alone they halve the time of
    the codec's transforms, and a training step with N=64 takes 0.77 of the time (as long with N=128).
    """
    if "tensorflow" not in sys.modules and "TF_ENABLE_ONEDNN_OPTS" not in os.environ:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
        try:
            import tensorflow  # noqa: F401  reads it once
        finally:
            del os.environ["TF_ENABLE_ONEDNN_OPTS"]  # not for the processes that this one starts
