"""Decodes `.hyp` files with a SavedModel, without `hyperprior`: SAVED_MODEL FILE... OUT.npz."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

try:
    import tensorflow_compression  # noqa: F401  its range coder
except ImportError:
    import tensorflow_compression_ops  # noqa: F401

sys.modules["hyperprior"] = None  # type: ignore[assignment]
try:
    import hyperprior  # noqa: F401
except ImportError:
    pass
else:
    raise SystemExit("hyperprior can be imported")

folder, *paths, out = sys.argv[1:]
model = tf.saved_model.load(folder)
compress, decompress = model.signatures["compress"], model.signatures["decompress"]
results = {}
for path in map(Path, paths):
    pixels = decompress(file=tf.constant(path.read_bytes()))["image"].numpy()
    results[f"{path.name} pixels"] = pixels
    results[f"{path.name} again"] = np.frombuffer(compress(image=tf.constant(pixels))["file"].numpy(), np.uint8)
damaged = bytearray(Path(paths[0]).read_bytes())
damaged[40] ^= 1
try:
    decompress(file=tf.constant(bytes(damaged)))
except tf.errors.InvalidArgumentError as error:
    results["error"] = np.array(str(error))
np.savez(out, **results)
