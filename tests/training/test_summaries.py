"""A summary that cannot be written ends neither the training nor the other kinds of summaries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hyperprior.config import load_config
from hyperprior.data.stream import Counts
from hyperprior.terminal import Terminal
from hyperprior.training.calls import Outcome
from hyperprior.training.progress import Progress
from hyperprior.training.resume import State
from hyperprior.training.steps import SUMMED
from hyperprior.watch.pictures import Look, draw_rd_plane, draw_sheet
from hyperprior.watch.summaries import Summaries

SCALARS = {"loss": 1.0, "bpp": 0.5}


def read_events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "val"), size_guidance={"tensors": 0})
    events.Reload()
    return events


def test_a_bad_histogram_ends_nothing_else(tmp_path: Path) -> None:
    warnings: list[str] = []
    report = Summaries(tmp_path, 0, warnings.append)
    for step, value in ((1, np.nan), (2, np.inf), (3, 1.0)):
        report.write_histogram("scales", step, np.array([0.5, value]), "")
        report.write_scalars("val", step, SCALARS)
    report.close()
    events = read_events(tmp_path)
    assert [event.step for event in events.Tensors("scales")] == [3]
    assert [event.step for event in events.Tensors("1_learning/loss")] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert warnings == ["histograms: not all can be written, training goes on: scales holds values that are not finite"]


@pytest.mark.parametrize("broken", ["metrics.jsonl", "val"])
def test_each_file_of_the_summaries_fails_alone(tmp_path: Path, broken: str) -> None:
    warnings: list[str] = []
    if broken == "val":
        (tmp_path / "val").write_text("not a folder")
    report = Summaries(tmp_path, 0, warnings.append)
    if broken == "metrics.jsonl":
        (tmp_path / "metrics.jsonl").mkdir()
    for step in (1, 2):
        report.write_scalars("val", step, SCALARS)
        report.write_scalars("train", step, SCALARS)
    report.close()
    assert len(warnings) == 1 and broken in warnings[0] and "training goes on" in warnings[0]
    if broken == "val":
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(row["kind"], row["step"]) for row in rows] == [("val", 1), ("train", 1), ("val", 2), ("train", 2)]
    else:
        assert [event.step for event in read_events(tmp_path).Tensors("1_learning/loss")] == [1, 2]


@pytest.mark.parametrize(("is_validated", "kept"), [(True, [0, 1, 2]), (False, [0, 1])])
def test_a_validation_that_the_checkpoint_does_not_know_is_removed(
    tmp_path: Path, is_validated: bool, kept: list[int]
) -> None:
    rows = ['{"kind": "val", "step": 1}', '{"kind": "train", "step": 2}', '{"kind": "val", "step": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    Summaries(tmp_path, 2, pytest.fail, is_validated=is_validated).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [rows[i] for i in kept]


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    rows = ['{"kind": "train", "step": 1}', '{"kind": "tra', '{"kind": "train", "step": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    warnings: list[str] = []
    Summaries(tmp_path, 5, warnings.append).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [rows[0], rows[2]]
    assert len(warnings) == 1 and "left out from now on: 1" in warnings[0]


def text_height(strip: np.ndarray, is_text: Callable[[np.ndarray], np.ndarray]) -> int:
    """The height of the first line of text, in pixels where TensorBoard shows the picture [H, W, 3] 350 pixels wide."""
    rows = is_text(strip.astype(int)).any(axis=1)
    first = int(rows.argmax())
    return round(int(rows[first:].argmin()) * 350 / strip.shape[1])


@pytest.mark.parametrize("side", [64, 256, 768])
def test_the_texts_of_pictures_can_be_read_where_they_are_small(side: int) -> None:
    pixels, blocks = np.full((side, side, 3), 128, np.uint8), np.ones((side // 16, side // 16, 4))
    sheet = np.asarray(draw_sheet(Look(pixels, pixels, blocks, blocks, blocks, {"bpp": 0.5, "psnr_db": 30.0})))

    def is_dark(strip: np.ndarray) -> np.ndarray:
        return strip.max(axis=-1) < 100

    caption = text_height(sheet, is_dark)
    assert 10 <= caption <= 20, caption
    panel = int((sheet[:, 0] == 128).all(axis=-1).argmax())  # its first row
    assert 8 <= text_height(sheet[panel // 2 : panel], is_dark) <= caption


def test_the_rd_plane_says_the_last_validation_in_letters_that_can_be_read() -> None:
    plane = np.asarray(draw_rd_plane([(0.5, 24.0), (0.4, 25.0)], [(0.4, 24.0), (0.9, 28.0)], [(0.2, 29.0)]))
    assert text_height(plane, lambda strip: (strip[..., 0] - strip[..., 1]) > 100) >= 9


def test_speed_is_measured_from_the_resume_to_the_end_of_the_calls_that_are_reported(tmp_path: Path) -> None:
    """The call after them may have ended, too: with a skipped sample, workers meet before the report."""
    world: Any = SimpleNamespace(is_chief=True, batch_size=4, device_kind="GPU")
    optimizer: Any = SimpleNamespace(learning_rate=lambda step: 0.1)
    state, nothing = State([], step=90, sums=dict.fromkeys(SUMMED, 90.0)), SimpleNamespace()
    progress = Progress(world, load_config(None, []), tmp_path, state, nothing, Terminal(quiet=True))  # type: ignore[arg-type]
    progress.restart_clock(100.0)
    with Terminal(quiet=True).track("", 110) as track:
        progress.log_means(optimizer, track)  # a stop before the first call has ended
        state.logged_step, state.sums = 0, dict.fromkeys(SUMMED, 90.0)
        for ended in (102.0, 107.0):
            state.step += 10
            progress.add_sums(Outcome(10, False, 0, np.ones(len(SUMMED)), Counts(), 0.0, ended))
            progress.log_means(optimizer, track)
    progress.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["images_per_s"] for row in rows] == [0.0, 20.0, 8.0]


def test_pictures_that_fail_do_not_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A validation in which no held-out image could be read has NaN as its means: they cannot be drawn."""

    class NothingToShow:
        count = 1

        def show(self, report: Summaries, step: int, course: Any) -> None:
            draw_rd_plane([(math.nan, math.nan)], [], [])

    world, optimizer = SimpleNamespace(is_chief=True), SimpleNamespace(publish=lambda: None)
    pictures: Any = NothingToShow()
    progress = Progress(world, load_config(None, []), tmp_path, State([]), pictures, Terminal())  # type: ignore[arg-type]
    for _ in range(2):
        progress.show_pictures(optimizer)  # type: ignore[arg-type]
    progress.close()
    assert capsys.readouterr().err.count("pictures: not all can be written, training goes on: Axis limits") == 1
