"""`hyperprior.train`: training as a call in a user's process."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

import hyperprior
from hyperprior.config import Config, load_config
from hyperprior.errors import ConfigError, HyperpriorError, Stopped
from hyperprior.training import stop
from hyperprior.training.loop import Trainer


@pytest.fixture
def config(flat_tar: Path) -> Config:
    return load_config(None, [*TINY, f"data.train={flat_tar}", "train.validate_every=null", "train.steps=100"])


def test_signals_stop_the_training_and_keep_their_meaning_around_it(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    ended: list[int] = []
    make, finish = Trainer.__init__, Trainer.finish_call

    def make_after_signal(self: Trainer, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        make(self, *arguments)

    def finish_before_signal(self: Trainer, *arguments: Any) -> bool:
        stopped = finish(self, *arguments)
        if self.state.step in (2, 6):
            os.kill(os.getpid(), signal.SIGUSR1 if self.state.step == 2 else signal.SIGTERM)
        return stopped

    monkeypatch.setattr(Trainer, "__init__", make_after_signal)
    monkeypatch.setattr(Trainer, "finish_call", finish_before_signal)
    monkeypatch.setattr(stop, "exit_soon", ended.append)
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda number, frame: heard.append(number)) for number in numbers]
    own = [signal.getsignal(number) for number in (*numbers, signal.SIGINT)]
    ears = socket.socketpair()
    ears[0].setblocking(False)
    wakeup = signal.set_wakeup_fd(ears[0].fileno())
    try:
        with pytest.raises(Stopped, match=r"stopped at step [678] of 100 with a checkpoint") as error:
            hyperprior.train(config, tmp_path / "r", quiet=True)
        assert error.value.exit_code == 75
        assert [signal.getsignal(number) for number in (*numbers, signal.SIGINT)] == own
        assert signal.set_wakeup_fd(wakeup) == ears[0].fileno()
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
        for ear in ears:
            ear.close()
    assert heard == list(numbers) and ended == []  # SIGTERM before the first step, SIGUSR1 during the training
    monkeypatch.undo()
    results: list[Any] = []
    goal = ["train.steps=10"]  # in the same process, and in a thread, which receives no signals
    call = threading.Thread(target=lambda: results.append(hyperprior.train(config, tmp_path / "r", goal, quiet=True)))
    call.start()
    call.join()
    assert results[0]["trained_steps"] == 10
    assert hyperprior.load(tmp_path / "r").info["step"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet_msee", "r"), "did you mean imagenet_mse?"),
        (("photos", "gs://bucket/r?key=1"), "run is gs://bucket/r; it must be a local directory"),
        (("quickstart", "r", ["train.stepz=3"]), "did you mean `train.steps`?"),
        (("quickstart", "r", ["distribute.cpu_devices=3"]), "TensorFlow is already in use in this process"),
    ],
)
def test_bad_arguments_raise_the_errors_of_the_command(
    arguments: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf

    tf.constant(1.0)  # TensorFlow is in use
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HyperpriorError) as error:
        hyperprior.train(*arguments)
    assert type(error.value) is ConfigError and error.value.exit_code == 2 and message in str(error.value)
    assert list(tmp_path.iterdir()) == []
