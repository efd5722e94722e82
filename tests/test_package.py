"""The wheel and the sdist are whole: installed elsewhere, without the checkout, the commands work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import TINY, photo
from test_readme import blocks, stand_in

import hyperprior

ROOT = Path(__file__).parents[1]
CONFIGS = [path.stem for path in ROOT.glob("configs/*.yaml")]


def run(*command: object, folder: Path, **environment: str) -> str:
    """Runs a command and returns what it printed."""
    words, variables = list(map(str, command)), {**os.environ, **environment}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the checkout, and the wheel made from the sdist alone."""
    folder = tmp_path_factory.mktemp("packages")
    copy = folder / "checkout"
    for name in ("hyperprior", "configs"):  # a build leaves folders beside them
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run(sys.executable, "-W", "ignore", "-c", code, folder=copy)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    run(*pip, sdist, folder=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_sdist_and_wheel_hold_every_file_of_the_package(packages: tuple[Path, Path]) -> None:
    sdist, wheel = packages
    assert wheel.stat().st_size < 30_000_000
    paths = [path for path in (ROOT / "hyperprior").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = {str(path.relative_to(ROOT)) for path in paths}
    files |= {f"hyperprior/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    kinds = ("codec/box/q3.npz", "evaluation/report.html", "reference/kodak_rd.csv", "data/README.md")
    assert {f"hyperprior/{name}" for name in (*kinds, "configs/photos.yaml")} <= files
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in in_wheel if ".dist-info/" not in name} == files
    with tarfile.open(sdist) as tar:
        in_sdist = {member.name.partition("/")[2] for member in tar if member.isfile()}
    assert files <= in_sdist and {"pyproject.toml", "README.md", "LICENSE"} <= in_sdist


def test_the_version_stands_in_one_place(packages: tuple[Path, Path]) -> None:
    name = f"hyperprior-{hyperprior.__version__}"
    assert [path.name for path in packages] == [f"{name}.tar.gz", f"{name}-py3-none-any.whl"]
    newest = re.search("^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == hyperprior.__version__
    others = ["README.md", "pyproject.toml", *(f"launch/{path.name}" for path in (ROOT / "launch").iterdir())]
    for other in others:
        assert not re.search(r"hyperprior:\d|^version[:=]", (ROOT / other).read_text(), re.MULTILINE), other


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_checkout(packages: tuple[Path, Path], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(*pip, "--target", tmp_path / "installed", packages[1], folder=tmp_path)

    def call(*words: object) -> str:
        return run(sys.executable, *words, folder=tmp_path, PYTHONPATH=str(tmp_path / "installed"))

    def command(*words: object) -> str:
        return call("installed/bin/hyperprior", *words)

    where = call("-c", "import hyperprior; print(hyperprior.__file__)")
    assert where == f"{tmp_path / 'installed/hyperprior/__init__.py'}\n"
    assert command("--version") == f"hyperprior {hyperprior.__version__}\n"
    (tmp_path / "photos").mkdir()
    for i in range(16):
        photo(i, 220 + i, 200).save(tmp_path / "photos" / f"{i}.png")
    command("compress", "photos/0.png", "-o", "0.hyp")
    command("decompress", "0.hyp", "-o", "back.png")
    assert json.loads(command("info", "0.hyp", "--json"))["width"] == 220
    for name in CONFIGS:
        command("config", name)
    assert "num_filters: 128" in command("config", "imagenet_mse")
    small = [word for word in TINY if not word.startswith("data.val_split")]
    words = [*small, "data.train=photos", "data.val=[]", "data.test=[]", "data.val_split=0.2", "train.steps=3"]
    command("train", "quickstart", *words, "--run", "run")
    command("evaluate", "q1", "run", "--images", "photos", "--out", "results", "--baselines", "jpeg")
    assert (tmp_path / "results/report.html").stat().st_size > 10_000

    (example,) = [block for block in blocks("python") if "hyperprior.train(" in block]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/photos.yaml").write_text(stand_in("photos.yaml"))
    before = "import numpy as np; image = np.zeros((64, 64, 3), np.uint8)\n"
    printed = call("-c", before + example + "print(len(losses), len(data))").splitlines()
    assert re.fullmatch(r"[1-9] \d+", printed[-1])
    assert any(re.fullmatch(r"\d\.\d+ \d+\.\d+", line) for line in printed), printed
