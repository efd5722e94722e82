"""The test vectors of hyperprior/codec/README.md.

`python tests/codec/test_vectors.py` writes them and prints their table. Do this only if the format changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hyperprior as package
from hyperprior import storage
from hyperprior.codec import box
from hyperprior.codec.tiles import Span

VECTORS = Path(__file__).parent / "vectors"
PAGE = Path(__file__).parents[2] / "hyperprior" / "codec" / "README.md"


def row_of(path: Path, engine: str) -> str:
    """The row of a file in the table of the page."""
    codec = package.load(VECTORS / "model.npz", engine)
    stream = codec.read(path.read_bytes())
    y, z = codec.decode([stream])
    index = codec.indexes(z, Span(0, len(z[0]), 0, len(z[0])))
    cells = [f"`{path.name}`", f"{stream.width}x{stream.height}", len(stream.escapes), f"{stream.checksum:08x}"]
    return "| " + " | ".join(map(str, [*cells, y.sum(dtype=int), index.sum(dtype=int)])) + " |"


@pytest.mark.parametrize("engine", ["numpy", "tensorflow"])
@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_the_files_decode_to_what_the_page_says(name: str, engine: str) -> None:
    if engine == "tensorflow":
        pytest.importorskip("tensorflow")
    path = VECTORS / f"{name}.hyp"
    assert row_of(path, engine) in PAGE.read_text().splitlines()
    codec = package.load(VECTORS / "model.npz", engine)
    pixels = np.asarray(Image.open(path.with_suffix(".png"))).astype(int)
    assert np.abs(codec.decompress(path.read_bytes()) - pixels).max() <= 1


def write() -> None:
    from test_codec import SETTINGS, picture, random_weights

    from hyperprior.codec import making
    from hyperprior.codec.codec import Codec

    VECTORS.mkdir(exist_ok=True)
    weights = random_weights(SETTINGS.model)
    arrays = making.make_arrays(storage.TrainedWeights(weights, SETTINGS, 0))
    codec = Codec(arrays, SETTINGS, {}, "the vectors", "numpy")
    state = {"fingerprint": codec.fingerprint, "info": {"step": 0}, "config": SETTINGS.to_dict()}
    storage.save_arrays(VECTORS / "model.npz", arrays, state, file_format=box.FORMAT, compressed=True)
    for number, size in enumerate([(1, 1), (100, 70), (64, 129)], 1):
        data = codec.compress(picture(number, *size))
        (VECTORS / f"{number}.hyp").write_bytes(data)
        Image.fromarray(codec.decompress(data)).save(VECTORS / f"{number}.png")
        print(row_of(VECTORS / f"{number}.hyp", "numpy"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write()
