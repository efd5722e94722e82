"""The checkpoints of a run: the last few steps, each in one file, and the best weights.

A checkpoint holds every variable under its stable name. The rest of the run's state (step, cursors, best validation,
config, environment) is JSON.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np

from hyperprior import config
from hyperprior.errors import ConfigError, LostWorker, StorageError
from hyperprior.storage import Arrays, TrainedWeights, load_arrays, save_arrays, with_prefix

FORMAT = 1
STATE = {"config": dict, "run": dict, "data": str, "environment": dict}  # with their types
VISIBLE_AFTER = 60  # seconds until all workers must see a file that the chief sees


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.npz"


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, in ascending order. Copies, folders and so on are not counted."""
    names = {path.name for path in folder.glob("step-*.npz") if path.is_file()}
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"step-([0-9]+)\.npz", name))]
    return sorted(step for step in numbers if path_of(folder, step).name in names)


def best_path(folder: Path) -> Path:
    return folder / "best.npz"


def save(path: Path, arrays: Arrays, state: dict[str, Any]) -> None:
    """Writes a checkpoint. Raises ConfigError, StorageError; `path` then keeps its old content."""
    save_arrays(path, arrays, state, file_format=FORMAT)


def keep_last(folder: Path, newest: int, count: int) -> None:
    """Deletes checkpoints up to step `newest` but the last `count`, not the best weights. Later ones are damaged."""
    for step in [step for step in steps_in(folder) if step <= newest][:-count]:
        with contextlib.suppress(OSError):
            path_of(folder, step).unlink()


def load_newest(folder: Path, warn: Callable[[str], None]) -> Optional[tuple[Arrays, dict[str, Any]]]:
    """Loads (arrays, state) of the newest intact checkpoint. Warns about damaged ones. None if there is no checkpoint.

    Raises ConfigError if all checkpoints are damaged, because a new start would hide the loss. Raises ConfigError or
    StorageError if one cannot be read, because it may be intact.
    """
    steps = steps_in(folder)
    for step in reversed(steps):
        try:
            return load_arrays(path_of(folder, step), FORMAT)
        except ValueError as error:
            warn(f"{error}; using the checkpoint before it")
    if steps:
        raise ConfigError(f"none of the {len(steps)} checkpoints in {folder} is intact; move them away for a new run")
    return None


def wait_for(folder: Path, step: int) -> tuple[Arrays, dict[str, Any]]:
    """Loads the checkpoint of this step, which another worker sees. A shared file system may show it late.

    Raises LostWorker if it stays unreadable.
    """
    deadline = time.monotonic() + VISIBLE_AFTER
    while True:
        try:
            return load_arrays(path_of(folder, step), FORMAT)
        except (ValueError, StorageError) as error:
            if time.monotonic() > deadline:
                raise LostWorker(
                    f"the chief resumes from step {step}, but here {error}; all workers must see the same run directory"
                ) from error
        time.sleep(1)


def check_state(run: Path, state: dict[str, Any]) -> None:
    """Raises ConfigError if a checkpoint's state lacks an entry that is read later, or has one of another type."""
    numbers = state["run"] if isinstance(state.get("run"), dict) else {}
    is_whole = {
        **{name: isinstance(state.get(name), kind) for name, kind in STATE.items()},
        **{f"run.{name}": type(numbers.get(name)) is int for name in ("step", "best_step")},
        "run.best_loss": type(numbers.get("best_loss", "missing")) in (int, float, type(None)),
    }
    if bad := [name for name, fits in is_whole.items() if not fits]:
        raise ConfigError(f"the newest checkpoint of {run} has no valid `{bad[0]}`; move it away to use the one before")


def load_best(folder: Path, step: int) -> Arrays:
    """Loads the best weights. Raises ValueError with the reason if they are damaged or not of `step`."""
    arrays, state = load_arrays(best_path(folder), FORMAT)
    if state.get("step") != step:
        raise ValueError(f"{best_path(folder)} is of step {state.get('step')}, but the run's best step is {step}")
    return arrays


def to_float32(arrays: Arrays) -> Arrays:
    with np.errstate(over="ignore"):  # export refuses what is not finite
        return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}


def best_weights(run: Path, warn: Callable[[str], None]) -> TrainedWeights:
    """Loads the weights with the best validation loss, or else the last ones, averaged if the run keeps an average."""
    newest = load_newest(run / "checkpoints", warn) if run.is_dir() else None
    if newest is None:
        raise ConfigError(f"{run} holds no run with a checkpoint; `hyperprior train CONFIG --run {run}` makes one")
    arrays, state = newest
    check_state(run, state)
    settings = config.validate(state["config"], str(run))
    if state["run"]["best_loss"] is not None:
        step = state["run"]["best_step"]
        try:
            best = load_best(run / "checkpoints", step)
        except ValueError as error:
            warn(f"{error}; the last weights are used instead of the best")
        else:
            return TrainedWeights(to_float32(with_prefix("model/", best)), settings, step)
    last = {**with_prefix("model/", arrays), **with_prefix("optimizer/average/", arrays)}
    return TrainedWeights(to_float32(last), settings, state["run"]["step"])
