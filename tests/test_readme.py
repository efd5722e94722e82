"""The pages: every `hyperprior` command in them runs, in their order; links lead somewhere; the README stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Command, encoded, photo, tar_bytes
from PIL import Image

from hyperprior.codec import box

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(f"hyperprior/{room}/README.md" for room in ("training", "data", "codec", "evaluation", "machine")),
    *("configs/README.md", "launch/README.md", "hyperprior/README.md", "hyperprior/codec/box/README.md"),
]
# Commands that other tests run, and commands that make the installation of the tests.
ELSEWHERE = ("python3", "pip", "sbatch", "kubectl")


def blocks(kind: str) -> list[str]:
    texts = [(ROOT / page).read_text() for page in PAGES]
    return [block for text in texts for block in re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def stand_in(name: str) -> str:
    """A config of the README that takes seconds: few steps, small patches, and a small model without start_from."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / name).read_text())
    side = 192 if tree["loss"].get("metric") == "ms-ssim" else 64
    tree["data"] |= {"patch_size": side, "eval_crop": 192, "train": ["data/ILSVRC2012_img_train.tar"]}
    tree["data"] |= {"val_split": 0.2, "test_split": 0.2, "val": [], "test": []}
    if "start_from" not in tree["train"]:
        tree["model"] = {"num_filters": 8, "latent_channels": 8, "hyper_channels": 8}
    tree["train"] |= {"steps": 4, "validate_every": 2, "checkpoint_every": 2, "batch_size": 2, "warmup_steps": 0}
    tree["train"].pop("epochs", None)
    return yaml.safe_dump(tree)


@pytest.mark.slow
def test_the_commands_of_the_pages_work_in_their_order(
    hyperprior: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, count in (("photos", 16), ("some-photos", 2), ("kodak", 2), ("configs", 0), ("data", 0)):
        Path(folder).mkdir()
        for index in range(count):
            photo(index, 220 + index, 200).save(Path(folder, f"{index}.png"))
    for name in ("imagenet_mse.yaml", "imagenet_ms_ssim.yaml", "photos.yaml", "quickstart.yaml"):
        Path("configs", name).write_text(stand_in(name))
    Path("photo.jpg").write_bytes(encoded(photo(1, 300, 200)))
    members = [(f"n{i}.JPEG", encoded(photo(i, 230, 220))) for i in range(20)]
    Path("data/ILSVRC2012_img_val.tar").write_bytes(tar_bytes(members))
    classes = [(f"n{i}.tar", tar_bytes([(f"n{i}_{name}", data) for name, data in members])) for i in range(2)]
    Path("data/ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    ran = 0
    for command in commands():
        if command[0] == "hyperprior":
            words = [name for word in command[1:] for name in (sorted(Path().glob(word)) if "*" in word else [word])]
            hyperprior(*words, *(["--repeats", "1"] if words[0] == "bench" else []))
            ran += 1
        elif command[0].startswith("./launch/"):
            assert (ROOT / command[0]).stat().st_mode & 0o100
        else:
            assert command[0] in ELSEWHERE, command
        for word in command:
            if word.startswith(("launch/", "./launch/")):
                assert (ROOT / word).is_file()
    assert ran > 20
    assert {path.name for path in Path("compressed").iterdir()} == {f"{i}.hyp" for i in range(16)}
    assert Path("results", "report.html").stat().st_size > 10_000
    image = np.asarray(Image.open("photo.jpg"))
    for block in blocks("python"):
        names: dict[str, Any] = {"image": image}
        exec(block, names)  # with the files that the commands made
        assert names["image"].shape == image.shape and len(names["data"]) < image.nbytes


@pytest.mark.slow
def test_docstrings_become_pages(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pdoc", "hyperprior", "-o", tmp_path], check=True, cwd=ROOT)
    pages = {path.stem: path.read_text() for path in (tmp_path / "hyperprior").glob("**/*.html")}
    assert {"codec", "hyperprior", "loop", "stream"} <= pages.keys()
    assert "A whole <code>.hyp</code> file of an [H, W, 3] uint8 image" in pages["codec"]
    assert "How data is read" in pages["data"]  # a room's page includes its README


def test_the_readme_is_read_in_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text) <= 11_000 and text.count("\n") <= 220
    assert all(f"]({page})" in text for page in PAGES[1:-1])  # the card is linked from the codec's page


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_file_of_a_page_exists(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "hyperprior" / name).exists(), name


def test_the_config_for_photographs_fits_the_model_it_starts_from() -> None:
    tree = yaml.safe_load((ROOT / "configs" / "photos.yaml").read_text())
    described = box.read_description(tree["train"]["start_from"])
    assert tree["model"] == {key: described[key] for key in tree["model"]}
    assert tree["loss"]["lambda"] == described["lambda"]
