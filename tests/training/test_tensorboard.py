"""TensorBoard shows a run in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, browser_tab, encoded, photo, tar_bytes

from hyperprior.metric_table import METRICS
from hyperprior.watch.summaries import CHARTS

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.slow
def test_tensorboard_shows_charts_pictures_latents_and_the_run(hyperprior: Command, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes((f"{i}.jpg", encoded(photo(i, 300, 280))) for i in range(16)))
    small = ["model.num_filters=8", "model.latent_channels=8", "model.hyper_channels=8", "data.eval_crop=192"]
    often = ["train.validate_every=10", "summaries.scalars_every=5", "summaries.images_every=10", "train.steps=20"]
    sources = [f"data.{split}=[t.tar]" for split in ("train", "val", "test")]
    hyperprior("train", QUICKSTART, *sources, *small, *often, "--run", "runs/a")

    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            address = next(match[0] for line in server.stderr if (match := re.search(r"http://\S+", line)))
            with browser_tab(viewport={"width": 1400, "height": 1000}) as (tab, errors):

                def open_page(page: str, *texts: str) -> None:
                    tab.goto("about:blank")
                    tab.goto(f"{address}?#{page}")
                    for text in texts:
                        tab.get_by_text(text, exact=True).first.wait_for(timeout=60_000)

                open_page("custom_scalars", *CHARTS, *(METRICS[name].title for name in CHARTS["Is it learning?"]))
                open_page("timeseries", "1_learning/loss", "1_learning/bpp")
                groups = re.findall(r"^(\d_[a-z]+)\d+ cards$", tab.inner_text("body"), re.MULTILINE)
                assert groups[:4] == ["1_learning", "2_speed", "3_data", "4_pictures"] and groups[-1] == "7_gdn"
                open_page("histograms", "6_latents/y")
                open_page("hparams", "loss.lambda", "train.proxy", "val.1_learning/psnr_db")
                open_page("text", "config", "costliest_channels")
                open_page("images", "4_pictures/reconstruction_0", "4_pictures/reconstruction_1", "4_pictures/rd_plane")
                pictures = tab.locator("img")
                pictures.nth(2).wait_for()
                for index in range(3):
                    pictures.nth(index).evaluate("picture => picture.decode()")  # fails if there is no picture
                    assert pictures.nth(index).evaluate("picture => picture.naturalWidth") > 300
                assert not [text for text in errors if "Failed to load" in text or "Error" in text]
        finally:
            server.terminate()
