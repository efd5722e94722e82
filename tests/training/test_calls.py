"""Two calls of the training graph are in flight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, photos, tar_bytes

from hyperprior.config import load_config
from hyperprior.errors import DivergedError, Stopped
from hyperprior.model import priors
from hyperprior.terminal import Terminal
from hyperprior.training import loop
from hyperprior.training.calls import Calls
from hyperprior.training.checkpoint import path_of
from hyperprior.training.loop import Trainer


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the loop does, in order. Calls are numbered by their first step."""
    found: list[str] = []

    def note(owner: Any, name: str, text: Any) -> None:
        original = getattr(owner, name)

        def noted(self: Any, *arguments: Any, **named: Any) -> Any:
            found.append(text(self, *arguments))
            return original(self, *arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    note(Calls, "start", lambda calls, chunk: f"start {chunk.step}")
    note(Trainer, "finish_call", lambda trainer, call, *more: f"read {call.chunk.step}")
    note(Trainer, "validate", lambda trainer, track: f"validate {trainer.state.step}")
    note(Trainer, "save_checkpoint", lambda trainer: f"save {trainer.state.step}")
    return found


def train(folder: Path, *words: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "t.tar").write_bytes(tar_bytes(photos(12)))
    fixed = [f"data.train=[{folder / 't.tar'}]", "data.val_split=0.2", "train.steps=12", "train.warmup_steps=0"]
    intervals = ["train.steps_per_call=2", "summaries.scalars_every=2", "train.validate_every=6"]
    settings = load_config(None, [*TINY, *fixed, *intervals, "train.checkpoint_every=6", *words])
    loop.train(settings, folder / "r", Terminal(quiet=True))


def test_a_call_starts_before_the_result_of_the_last_is_read_except_before_other_work(
    tmp_path: Path, events: list[str]
) -> None:
    train(tmp_path)
    half = "start {0}, start {1}, read {0}, start {2}, read {1}, read {2}, validate {3}, save {3}"
    assert ", ".join(events) == ", ".join([half.format(0, 2, 4, 6), half.format(6, 8, 10, 12)])


def test_after_a_stop_the_call_in_flight_changes_nothing(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Calls._run

    def run_with_stop(self: Calls, chunk: Any) -> Any:
        self.stop.flag.assign(float(chunk.step == 2))  # no call after it is asked to stop
        return run(self, chunk)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped at step 2 of 12"):
        patch.setattr(Calls, "_run", run_with_stop)
        train(tmp_path / "stopped")
    assert events == ["start 0", "start 2", "read 0", "start 4", "read 2", "save 2"]
    train(tmp_path / "undisturbed", "train.checkpoint_every=2", "train.keep_checkpoints=9")
    stopped, undisturbed = (
        dict(np.load(path_of(tmp_path / name / "r" / "checkpoints", 2))) for name in ("stopped", "undisturbed")
    )
    states = [json.loads(bytes(arrays.pop("state")))["run"] for arrays in (stopped, undisturbed)]
    assert states[0] == states[1]
    assert all(np.array_equal(stopped[name], undisturbed[name]) for name in undisturbed)


def test_after_divergence_the_call_in_flight_changes_nothing(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, finish, updates = priors.uniform_noise, Trainer.finish_call, []

    def noise_with_fault(shape: Any, seed: int, step: tf.Tensor, lanes: tf.Tensor) -> tf.Tensor:
        return tf.where(step == 3, float("nan"), noise(shape, seed, step, lanes))

    def finish_call(self: Trainer, call: Any, calls: Calls, track: Any) -> bool:
        try:
            return finish(self, call, calls, track)
        finally:
            calls.drain()
            updates.append(int(self.optimizer.updates))

    monkeypatch.setattr(priors, "uniform_noise", noise_with_fault)
    monkeypatch.setattr(Trainer, "finish_call", finish_call)
    with pytest.raises(DivergedError, match="at step 3"):
        train(tmp_path)
    assert events == ["start 0", "start 2", "read 0", "start 4", "read 2"]
    assert updates == [3, 3]  # the call in flight has ended, and has made no update
