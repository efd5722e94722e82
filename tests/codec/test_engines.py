"""The NumPy and the TensorFlow engine read each other's files; commands need TensorFlow only where they say so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import photo, photos, tar_bytes
from PIL import Image
from test_codec import needs_tensorflow, picture

import hyperprior as package
from hyperprior import config
from hyperprior.codec import box, making
from hyperprior.codec.codec import Codec
from hyperprior.storage import TrainedWeights

LARGE = config.Config(model=config.Model(num_filters=128, latent_channels=192, hyper_channels=128))
# Installed, this makes a package appear not to be.
HIDE = """
import importlib.machinery
original = importlib.machinery.PathFinder.find_spec.__func__
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden} else original(cls, name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def compare_engines(codecs: Sequence[Codec], images: Sequence[np.ndarray]) -> int:
    """Checks that each codec reads the files of all. Returns the number of images whose files are equal."""
    equal = 0
    for image in images:
        files = [codec.compress(image) for codec in codecs]
        equal += len(set(files)) == 1
        for file in files:
            latents = [codec.latents(file) for codec in codecs]
            assert all(np.array_equal(each, latents[0]) for each in latents)
            pixels = [codec.decompress(file).astype(int) for codec in codecs]
            assert pixels[0].shape == image.shape
            assert all(np.abs(each - pixels[0]).max() <= 1 for each in pixels)
        sums = [codec.engine.index_sums(codecs[0].latents_of([image])[1]) for codec in codecs]
        assert all(np.array_equal(each, sums[0]) for each in sums)
    return equal


def both_engines(name: str) -> list[Codec]:
    needs_tensorflow()
    if (
        name == "large"
    ):  # before training; random weights would make pixels of millions, of which float32 keeps no levels
        from hyperprior.model import initial
        from hyperprior.model.hyperprior import ScaleHyperprior

        model = ScaleHyperprior(LARGE.model)
        initial.start_as_wavelets(model, LARGE.loss, LARGE.model.scale_min)
        weights = {name: variable.numpy() for name, variable in model.named_variables().items()}
        arrays = making.make_arrays(TrainedWeights(weights, LARGE, 0))
        return [Codec(arrays, LARGE, {}, "a large model", engine) for engine in ("numpy", "tensorflow")]
    return [package.load(name, engine) for engine in ("numpy", "tensorflow")]


@pytest.mark.parametrize("name", [*box.in_the_box(), "large"])
def test_each_engine_reads_the_files_of_both(name: str) -> None:
    sizes = [(130, 70), (1, 1), (64, 200)]
    compare_engines(both_engines(name), [picture(i, *size) for i, size in enumerate(sizes)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*box.in_the_box(), "large"])
def test_each_engine_reads_the_files_of_both_on_kodak_and_odd_sizes(name: str, samples: Path) -> None:
    kodak = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((samples / "kodak").glob("*.png"))]
    rng = np.random.RandomState(0)
    odd = [kodak[i % 24][: rng.randint(1, 300), : rng.randint(1, 300)] for i in range(40)]
    equal = compare_engines(both_engines(name), [*kodak, *odd])
    print(f"{name}: the files of {equal} of 64 images are byte-identical")
    assert equal > 0


def test_auto_changes_to_tensorflow_when_that_pays() -> None:
    needs_tensorflow()
    code = """
import sys
import numpy as np
import hyperprior
from hyperprior.codec import codec as codecs
image = np.zeros((64, 64, 3), np.uint8)
def engine(codec):
    return type(codec.engine).__name__, "tensorflow" in sys.modules
codecs.TENSORFLOW_PAYS = 2.5 * 64**2
codec, other = hyperprior.load("q1"), hyperprior.load("q1", "numpy")
file = codec.compress(image)
print(engine(codec), codec.decompress(file).shape, engine(codec), codec.compress(image) == file, engine(codec))
[other.compress(image) for _ in range(4)]
print(engine(other), engine(hyperprior.load("q1")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "('NumPyEngine', False) (64, 64, 3) ('NumPyEngine', False) True ('TensorFlowEngine', True)",
        "('NumPyEngine', True) ('TensorFlowEngine', True)",
    ]


def run_without(hidden: set[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "hidden").mkdir(exist_ok=True)
    (folder / "hidden" / "sitecustomize.py").write_text(HIDE.replace("{hidden}", repr(hidden)))
    path = os.pathsep.join([str(folder / "hidden"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment)


def test_files_are_written_and_read_where_there_is_no_tensorflow(tmp_path: Path) -> None:
    photo(1, 200, 170).save(tmp_path / "a.png")
    commands = [
        "compress a.png --verify",
        "decompress a.hyp -o b.png",
        "info a.hyp",
        "evaluate q1 --images photos --out results --baselines jpeg --quiet",
    ]
    (tmp_path / "photos").mkdir()
    photo(2, 170, 200).save(tmp_path / "photos" / "c.png")
    for command in commands:
        done = run_without({"tensorflow"}, tmp_path, "-m", "hyperprior", *command.split())
        assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "b.png")).shape == (170, 200, 3)
    assert "MS-SSIM" in (tmp_path / "results" / "summary.md").read_text()
    code = "import hyperprior.pillow; from PIL import Image; i = Image.open('a.hyp'); i.save('c.hyp'); print(i.size)"
    assert run_without({"tensorflow"}, tmp_path, "-c", code).stdout == "(200, 170)\n"


def test_commands_say_in_one_line_what_is_not_installed(tmp_path: Path) -> None:
    photo(1).save(tmp_path / "a.png")
    (tmp_path / "photos.tar").write_bytes(tar_bytes(photos(3)))
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    needed = "this needs TensorFlow, which is not installed; 2.14.1 and newer versions work: `pip install"
    for command in (
        "train c.yaml data.train=[photos.tar]",
        "compress a.png --effort 2",
        "inspect photos.tar",
        "doctor",
    ):
        done = run_without({"tensorflow"}, tmp_path, "-m", "hyperprior", *command.split())
        assert done.returncode == 2 and needed in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run_without(
        {"tensorflow", "matplotlib"}, tmp_path, "-m", "hyperprior", *["evaluate", "q1", "--images", ".", "--out", "o"]
    )
    assert (
        done.stderr == "hyperprior: this command needs matplotlib, which is not installed: `pip install matplotlib`\n"
    )
    assert done.returncode == 2
