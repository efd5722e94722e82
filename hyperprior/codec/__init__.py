"""A trained model as a codec: images to `.hyp` files and back, with equal symbols on every machine.

Read in this order:

    container           the file, and the checks of its bytes
    exact               h_s in integer arithmetic, and the proof of its bound
    tables              range-coding tables
    range_coder         a range coder in Python
    native              the same by tensorflow-compression's C++ operations, where they can be loaded
    adaptation          how a file may code channels of y in another way than its model
    symbols             integers ↔ range-coded strings, with the tables
    tiles               images of any size, cut into tiles and strips
    numpy_engine        a model's transforms in NumPy alone
    tensorflow_engine   the same as TensorFlow graphs: for large images, batches, GPUs
    codec               images ↔ latents ↔ bytes
    making              all arrays of a codec, from trained weights
    search              the encoder's search for latents that cost less
    serving             the codec as a SavedModel
    box                 the search for a model by its name, and the models that ship with the package
    files               the commands on files: compress, decompress

Only tensorflow_engine, native, search and serving need TensorFlow. This package knows the model, not its training.

.. include:: README.md
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperprior.codec.codec import Codec


def load(path: str | Path, engine: str = "auto") -> Codec:
    """The codec of a model: one in the box (q1, q2, …), one that `hyperprior export` wrote, or that of an exported run.

    `codec.compress(image)` returns the bytes of a `.hyp` file for an [H, W, 3] uint8 image;
    `codec.decompress(data)` returns the image. `engine`: "numpy" needs nothing else; "tensorflow" takes seconds to
    start and is faster then; "auto" is NumPy until TensorFlow saves time. Both read each other's files.

    Raises errors.ConfigError if there is no such model or engine, and errors.DataError if the model is damaged.
    """
    from hyperprior.codec import codec  # `import hyperprior` stays fast

    return codec.load(path, engine)
