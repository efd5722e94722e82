"""The test vectors of hyperprior/codec/README.md.

`PYTHONPATH=tests python tests/codec/test_vectors.py` writes those that are missing, in the
newest version of the format, and prints the table. 1 to 3 have version 1.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from test_codec import picture, random_weights

import hyperprior as package
from hyperprior import config, storage
from hyperprior.codec import adaptation, box, container, making
from hyperprior.codec.adaptation import Adaptation
from hyperprior.codec.codec import Codec
from hyperprior.codec.tiles import Span

VECTORS = Path(__file__).parent / "vectors"
PAGE = Path(__file__).parents[2] / "hyperprior" / "codec" / "README.md"


def row_of(path: Path, engine: str) -> str:
    """The row of a file in the table of the page."""
    codec = package.load(VECTORS / "model.npz", engine)
    stream = codec.read(path.read_bytes())
    (y,), (_, _, z) = codec.decode([stream]), codec.decode_values([stream])
    index = codec.indexes(z, Span(0, len(z[0]), 0, len(z[0])))
    cells = [f"`{path.name}`", stream.version, f"{stream.width}x{stream.height}", len(stream.escapes)]
    cells += [f"{stream.checksum:08x}"]
    return "| " + " | ".join(map(str, [*cells, y.sum(dtype=int), index.sum(dtype=int)])) + " |"


@pytest.mark.parametrize("engine", ["numpy", "tensorflow"])
@pytest.mark.parametrize("name", ["1", "2", "3", "4"])
def test_the_files_decode_to_what_the_page_says(name: str, engine: str) -> None:
    if engine == "tensorflow":
        pytest.importorskip("tensorflow")
    path = VECTORS / f"{name}.hyp"
    assert row_of(path, engine) in PAGE.read_text().splitlines()
    codec = package.load(VECTORS / "model.npz", engine)
    pixels = np.asarray(Image.open(path.with_suffix(".png"))).astype(int)
    assert np.abs(codec.decompress(path.read_bytes()) - pixels).max() <= 1


def make_model() -> tuple[storage.Arrays, config.Config]:
    """A model whose pixels are pictures, and whose integers show wrong roundings and bounds of a decoder."""
    from hyperprior.model.hyperprior import ScaleHyperprior
    from hyperprior.model.initial import start_as_wavelets

    settings = config.Config(model=config.Model(num_filters=12, latent_channels=12, hyper_channels=8))
    model = ScaleHyperprior(settings.model)
    start_as_wavelets(model, settings.loss, settings.model.scale_min)
    weights = {name: variable.numpy() for name, variable in model.named_variables().items()}
    rng = np.random.RandomState(0)
    for name, array in random_weights(settings.model).items():
        if name.startswith(("h_a", "h_s", "prior")):
            weights[name] = array
        elif name.endswith("gamma"):  # not symmetric, and some below the minimum
            weights[name] = weights[name] + 0.05 * rng.rand(*array.shape).astype(np.float32) - 0.01
        elif name.endswith(("beta", "bias")):
            weights[name] = weights[name] + 0.1 * rng.rand(*array.shape).astype(np.float32)
    for name in ("g_a/1/beta", "g_s/3/beta"):
        weights[name][0] = -1.0
    arrays = making.make_arrays(storage.TrainedWeights(weights, settings, 0))
    kernel, bias = arrays["h_s/2/kernel"], arrays["h_s/2/bias"]
    inner_kernel, inner_bias = arrays["h_s/1/kernel"], arrays["h_s/1/bias"]
    kernel[..., :5], inner_kernel[:, :, :3] = 0, 0
    bias[:2] = 5 * 2**27, 5 * 2**27 + 1  # 2.5 and a little more: 2 and 3
    inner_bias[:3] = 9 * 2**15, 22 * 2**16 // 5, 1.2 * 2**40  # activations of 4.5, 4.4, and one beyond the range
    for channel, weight in enumerate((3 * 2**26, 5 * 2**26, 5 * 2**4)):
        kernel[1, 1, channel, 2 + channel], bias[2 + channel] = weight, 0
    return arrays, settings


def write_file(codec: Codec, number: int, width: int, height: int) -> None:
    y, z = codec.latents_of([picture(number, width, height)])
    if number == 3:
        z[0, 0, 0, :2] = 5000, -5000  # beyond the range of activations
    y[0, 1, 1:3, 6] = 32767, -32768  # differences beyond int16
    kind, shift = np.zeros((2, 12), np.int32)
    kind[[0, 1, 5, 6, 7, 11]] = 1, -1, 2, 1, -3, -300
    shift[[1, 3, 6, 7, 11]] = 1, 2, -3, 15, -1000  # some reach beyond the scales
    with mock.patch.object(adaptation, "choose", lambda y, index, costs: Adaptation(kind, shift)):
        (stream,) = codec.encode(y, z, [(height, width)])
    data = container.write(stream)
    (VECTORS / f"{number}.hyp").write_bytes(data)
    Image.fromarray(codec.decompress(data)).save(VECTORS / f"{number}.png")


def write() -> None:
    VECTORS.mkdir(exist_ok=True)
    if not (VECTORS / "model.npz").exists():
        arrays, settings = make_model()
        fingerprint = Codec(arrays, settings, {}, "the vectors", "numpy").fingerprint
        state = {"fingerprint": fingerprint, "info": {"step": 0}, "config": settings.to_dict()}
        storage.save_arrays(VECTORS / "model.npz", arrays, state, file_format=box.FORMAT, compressed=True)
    codec = package.load(VECTORS / "model.npz", "numpy")
    for number, (width, height) in enumerate([(1, 1), (100, 70), (64, 129), (130, 100)], 1):
        if not (VECTORS / f"{number}.hyp").exists():
            write_file(codec, number, width, height)
        print(row_of(VECTORS / f"{number}.hyp", "numpy"))


if __name__ == "__main__":
    write()
