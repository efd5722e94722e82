"""Runs, models and files pass between all stacks: the TensorFlow and the range coder that each Python gets.

Makes a virtual environment for each stack whose Python is on the PATH or below pyenv's folder, and says which is not.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workers
from conftest import TINY, photo, photos, tar_bytes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STACKS = {  # the Pythons that get each TensorFlow, and the package of its C++ range coder
    "2.14": (("3.11", "3.10", "3.9"), "tensorflow_compression"),
    "2.17": (("3.12",), "tensorflow_compression_ops"),
    "newest": (("3.13",), None),
}


@functools.cache
def environment(stack: str) -> Path | None:
    """The folder of commands in an environment with this stack; None if the machine has no Python for it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in STACKS[stack][0]:
        for python in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))):
            if python and subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0:
                script = "set -e; source launch/environment.sh; make_environment dev; echo $PWD/$venv"
                variables = {**os.environ, "PYTHON": str(python)}
                made = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
                assert made.returncode == 0, made.stderr
                return Path(made.stdout.splitlines()[-1]) / "bin"
    return None


def environments() -> dict[str, Path]:
    present = {stack: folder for stack in STACKS if (folder := environment(stack))}
    if len(present) < 2:
        pytest.skip(f"this machine has Pythons for one stack only: {list(present)}")
    return present


def run(folder: Path, *command: object, with_stderr: bool = False) -> str:
    """Runs a command and returns what it printed."""
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + (done.stderr if with_stderr else "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty.yaml").write_text("seed: 0\n")
    (tmp_path / "photos.tar").write_bytes(tar_bytes(photos(24)))
    return tmp_path


TRAIN = ["train", "empty.yaml", *TINY, "data.train=[photos.tar]", "data.val_split=0.2"]


@pytest.mark.parametrize("stack", STACKS)
def test_each_python_gets_its_stack(stack: str, tmp_path: Path) -> None:
    folder = environment(stack)
    if not folder:
        pytest.skip(f"no Python {' or '.join(STACKS[stack][0])} on the PATH or below pyenv's folder")
    findings = {
        row["name"]: row["text"] for row in json.loads(run(tmp_path, folder / "hyperprior", "doctor", "--json"))
    }
    version = re.search(r"TensorFlow (\d+)\.(\d+)", findings["software"])
    assert version
    coder = STACKS[stack][1]
    if coder:
        assert ".".join(version.groups()) == stack and findings["range coder"].endswith(f"{coder} is used")
    else:
        assert tuple(map(int, version.groups())) >= (2, 18) and findings["range coder"].startswith("Python")
    served = run(tmp_path, folder / "tensorboard", "--version", with_stderr=True)
    assert re.search(r"^\d+\.\d+\.\d+$", served, re.MULTILINE)


def test_files_and_models_pass_between_all_stacks(folder: Path) -> None:
    pictures = [folder / f"{i}.png" for i in range(4)]
    for i, path in enumerate(pictures):
        photo(i, *[(333, 500), (64, 64), (1, 1), (200, 90)][i]).save(path)
    bins = environments()
    for stack, commands in bins.items():
        settings = [*TRAIN, "train.steps=40", "train.validate_every=20", "--run", stack]
        process = subprocess.Popen([commands / "hyperprior", *settings], cwd=folder, stdout=subprocess.PIPE, text=True)
        workers.wait_for(folder / stack, 20, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 75
        text = run(folder, commands / "hyperprior", *settings)
        assert ("without a SavedModel" in text) == (STACKS[stack][1] is None)
        assert (folder / stack / "model" / "saved_model").is_dir() == (STACKS[stack][1] is not None)
        run(folder, commands / "python", ROOT / "tests/settings.py", stack, 2, "write", *pictures, f"files-{stack}")

    for origin in bins:  # the weights, and the files, of each under every stack
        fingerprints, read = {}, []
        files = sorted((folder / f"files-{origin}").iterdir())
        for stack, commands in bins.items():
            export = ["export", origin, "--out", f"{origin}-under-{stack}", "--json"]
            fingerprints[stack] = json.loads(run(folder, commands / "hyperprior", *export))["fingerprint"]
            run(folder, commands / "python", ROOT / "tests/settings.py", origin, 2, "read", *files, "read.npz")
            read.append(dict(np.load(folder / "read.npz")))
        assert len(set(fingerprints.values())) == 1
        assert len(read[0]) == 2 * 4 * 2 + 2 * 4
        for other in read[1:]:
            for name, values in read[0].items():
                difference = np.abs(other[name].astype(int) - values).max()
                assert difference <= ("pixels" in name), name


def test_a_run_goes_on_under_every_other_stack_with_the_same_samples(folder: Path) -> None:
    bins = environments()
    # So that each stack is followed by every other one.
    order = [stack for stack in ("2.14", "2.17", "newest", "2.14", "newest", "2.17", "2.14") if stack in bins]
    train(folder, bins[order[0]], "alone", 6 * len(order))
    for i, stack in enumerate(order):
        text = train(folder, bins[stack], "passed on", 6 * (i + 1))
        warned = "may not be bit-identical" in text and "tensorflow was" in text
        assert warned == (i > 0 and stack != order[i - 1]), text
    assert workers.keys_of(folder / "keys of alone", 1) == workers.keys_of(folder / "keys of passed on", 1)
    (alone, state), (passed_on, other) = (workers.newest(folder / name) for name in ("alone", "passed on"))
    assert state["run"]["cursors"] == other["run"]["cursors"] and alone.keys() == passed_on.keys()
    losses = [[row["loss"] for row in workers.lines(folder / name, "train")] for name in ("alone", "passed on")]
    np.testing.assert_allclose(*losses, rtol=0.01)


def test_the_codec_works_without_tensorflow(tmp_path: Path) -> None:
    """The two lines of the README, and then what the codec's tests need."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    lines = re.search("^pip install (numpy .*)\npip install (--no-deps -e .)$", (clone / "README.md").read_text(), re.M)
    assert lines
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "light"], check=True)
    python, command = tmp_path / "light/bin/python", tmp_path / "light/bin/hyperprior"
    for words in (*lines.groups(), "pytest hypothesis scipy matplotlib bjontegaard"):
        run(clone, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words.split())
    run(tmp_path, python, "-c", "import importlib.util as u; assert not u.find_spec('tensorflow')")
    (tmp_path / "photos").mkdir()
    for i in range(4):
        photo(i, 200, 150).save(tmp_path / "photos" / f"{i}.png")
    run(tmp_path, command, "compress", "photos/0.png", "--quality", 3, "-o", "0.hyp")
    run(tmp_path, command, "decompress", "0.hyp", "-o", "back.png")
    assert json.loads(run(tmp_path, command, "info", "0.hyp", "--json"))["width"] == 200
    run(tmp_path, python, "-c", "import hyperprior.pillow; from PIL import Image; Image.open('0.hyp').load()")
    evaluate = ["evaluate", "q1", "q3", "--images", "photos", "--out", "results", "--baselines", "jpeg,webp"]
    run(tmp_path, command, *evaluate)
    assert (tmp_path / "results/report.html").is_file()
    (tmp_path / "empty.yaml").write_text("seed: 0\n")
    refused = subprocess.run([command, *TRAIN], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "this needs TensorFlow, which is not installed" in refused.stderr
    tests = run(clone, python, "-m", "pytest", "tests/codec")
    assert "without TensorFlow, so without codec/test_files.py and codec/test_search.py" in tests and " passed" in tests


def train(folder: Path, commands: Path, name: str, steps: int) -> str:
    (folder / f"keys of {name}").mkdir(exist_ok=True)
    probe: Sequence[Any] = [ROOT / "tests/faulty.py", f"keys={folder}/keys of {name}"]
    return run(folder, commands / "python", *probe, *TRAIN, f"train.steps={steps}", "--run", name, with_stderr=True)
