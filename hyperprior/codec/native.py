"""tensorflow-compression's C++ range coder, from whichever of its packages this TensorFlow can load.

Only its library of operations is loaded: importing tensorflow_compression itself would also import Keras and
tensorflow-probability.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

# For TensorFlow 2.14, and for 2.15 to 2.17, each with the path of its library as the package itself writes it: under
# another spelling TensorFlow would load the library a second time, and find no new operations in it.
PACKAGES = {
    "tensorflow_compression": "python/ops/../../cc/libtensorflow_compression.so",
    "tensorflow_compression_ops": "cc/libtensorflow_compression.so",
}


class Operations(NamedTuple):
    """`module` has the operations, or is None; `report` tells for each package what came of it."""

    module: Optional[Any]
    report: str


@functools.lru_cache
def load_operations() -> Operations:
    reports = []
    for package, library in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        if not folders:
            reports.append(f"{package} is not installed")
            continue
        try:
            module = tf.load_op_library(f"{folders[0]}/{library}")
        except (OSError, tf.errors.OpError) as error:  # built for another TensorFlow, or damaged
            reports.append(f"{package} cannot be loaded: {' '.join(str(error).split())[:200]}")
            continue
        reports.append(f"{package} is used")
        break
    else:
        module = None
    report = "; ".join(reports)
    logging.getLogger(__name__).debug("range coder of TensorFlow %s: %s", tf.__version__, report)
    return Operations(module, report)


class Encoder:
    """`range_coder.Encoder` by the C++ operations."""

    def __init__(self, operations: Any, lookup: np.ndarray, batch: int):
        self.operations = operations
        self.handle = operations.create_range_encoder([batch], lookup)

    def put(self, symbols: np.ndarray, index: np.ndarray) -> None:
        self.handle = self.operations.entropy_encode_index(self.handle, index, symbols)

    def finish(self) -> list[bytes]:
        return self.operations.entropy_encode_finalize(self.handle).numpy().tolist()


class Decoder:
    """`range_coder.Decoder` by the C++ operations."""

    def __init__(self, operations: Any, lookup: np.ndarray, strings: Sequence[bytes]):
        self.operations = operations
        self.handle = operations.create_range_decoder(list(strings), lookup)

    def take(self, index: np.ndarray) -> np.ndarray:
        self.handle, symbols = self.operations.entropy_decode_index(self.handle, index, index.shape[1:], tf.int32)
        return symbols.numpy()
