"""A checkpoint is complete or absent, and never restored into something it does not fit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from hyperprior import checkpoint
from hyperprior.errors import ConfigError, StorageError

ARRAYS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int64(7)}


def fill(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(checkpoint.path_of(folder, step), ARRAYS, {"step": step})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    arrays, state = checkpoint.load(checkpoint.path_of(tmp_path, 3))
    assert state["step"] == 3 and arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[name], value) for name, value in ARRAYS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003.npz"]


def test_every_damage_to_the_newest_is_found_and_the_one_before_used(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    newest = checkpoint.path_of(tmp_path, 2)
    whole = newest.read_bytes()
    random = np.random.RandomState(0)
    damages = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for place in random.randint(0, len(whole), 60):
        damages.append(whole[:place] + bytes([whole[place] ^ 1 << random.randint(8)]) + whole[place + 1 :])
    found = 0
    for damage in damages:
        newest.write_bytes(damage)
        warnings: list[str] = []
        loaded = checkpoint.load_newest(tmp_path, warnings.append)
        assert loaded is not None
        if warnings:
            found += 1
            assert "step-000000002.npz is damaged" in warnings[0] and loaded[1]["step"] == 1
        else:  # a bit of the zip's own fields that no content hangs on
            assert all(np.array_equal(loaded[0][name], value) for name, value in ARRAYS.items())
    assert found >= 30


def test_only_damaged_checkpoints_are_an_error_not_a_new_start(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, print) is None
    checkpoint.path_of(tmp_path, 1).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="none of the 1 checkpoints"):
        checkpoint.load_newest(tmp_path, lambda text: None)


def test_a_disk_that_fills_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    before = checkpoint.path_of(tmp_path, 1).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for step in (1, 2):
            with pytest.raises(StorageError, match=r"step-.*npz cannot be written.*File too large.*free the disk"):
                checkpoint.save(checkpoint.path_of(tmp_path, step), {"x": np.zeros(9999)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.npz"]
    assert checkpoint.path_of(tmp_path, 1).read_bytes() == before


def test_the_last_are_kept_and_the_best_always(tmp_path: Path) -> None:
    fill(tmp_path, *range(1, 8))
    checkpoint.save(tmp_path / "best.npz", ARRAYS, {})
    checkpoint.keep_last(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.npz", *(f"step-{s:09d}.npz" for s in (5, 6, 7))]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a/kernel": (2, 4), "step": ()}, r"`a/kernel` has shape \(2, 3\); this config expects \(2, 4\)"),
        ({"a/kernel": (2, 3), "step": (), "b": (1,)}, r"has no `b` \(1,\)"),
        ({"a/kernel": (2, 3)}, "holds `step`, which"),
    ],
)
def test_another_architecture_is_refused_untouched(names: dict[str, tuple[int, ...]], message: str) -> None:
    variables = {name: tf.Variable(tf.fill(shape, 9.0)) for name, shape in names.items()}
    with pytest.raises(ConfigError, match=message):
        checkpoint.assign(variables, ARRAYS, "ckpt")
    assert all(np.all(v.numpy() == 9.0) for v in variables.values())


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    held = checkpoint.only_one(tmp_path)
    with held, pytest.raises(ConfigError, match="another process"), checkpoint.only_one(tmp_path):
        pass
    with checkpoint.only_one(tmp_path):
        pass


def test_a_directory_goes_again_if_nothing_came_to_be_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), checkpoint.only_one(run):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), checkpoint.only_one(tmp_path):
        raise ZeroDivisionError
    assert tmp_path.is_dir()  # it was there before
    with checkpoint.only_one(run):
        (run / "config.yaml").touch()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "lock"]


def test_a_lock_that_its_holder_removed_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def after_the_holder(file: Any, how: int) -> None:
        (run / "lock").unlink()  # between opening the file and holding it
        (run / "lock").touch()

    monkeypatch.setattr(checkpoint.fcntl, "flock", after_the_holder)
    with pytest.raises(ConfigError, match="another process"), checkpoint.only_one(run):
        pass


KILLED_AT_EVERY_LINE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from hyperprior import checkpoint

folder, lines = Path(sys.argv[1]), 0
checkpoint.save(checkpoint.path_of(folder, 1), {"x": np.full(9999, 1.0)}, {"step": 1})

def count(frame, event, argument):
    global lines
    if frame.f_code.co_filename == checkpoint.__file__:
        if event == "line":
            lines += 1
            if lines == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

outcomes = []
for fatal in range(1, 1000):
    if not (child := os.fork()):
        sys.settrace(count)
        checkpoint.save(checkpoint.path_of(folder, 2), {"x": np.full(9999, 2.0)}, {"step": 2})
        checkpoint.keep_last(folder, 2)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    warnings = []
    arrays, state = checkpoint.load_newest(folder, warnings.append)
    assert not warnings and (arrays["x"] == state["step"]).all(), (fatal, warnings)
    outcomes.append(state["step"])
    checkpoint.path_of(folder, 2).unlink(missing_ok=True)
    if not killed:
        break
print(len(outcomes), outcomes.count(1), outcomes.count(2))
"""


def test_a_kill_at_any_line_of_saving_leaves_the_one_before_or_the_new_one(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_LINE, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    points, before, after = map(int, result.stdout.split())
    assert points > 20 and before > 10 and after > 3, result.stdout
