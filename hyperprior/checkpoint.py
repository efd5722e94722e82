"""Run state on disk: a checkpoint is one file, complete or absent.

A checkpoint is an `.npz`: every variable under its stable name, and the rest of the run's
state (step, cursors, best, patience, config, environment) as JSON under `state`. It is written aside, read
back against the zip format's CRC-32 of every entry, and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np

from hyperprior import config
from hyperprior.errors import ConfigError, StorageError

FORMAT = 1
NOT_FOR_WRITING = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EROFS,
)
PATTERN = "step-*.npz"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.npz"


def save(path: Path, arrays: dict[str, np.ndarray], state: dict[str, Any], *, compressed: bool = False) -> None:
    """Writes a checkpoint. Raises StorageError; `path` then holds what it held before."""
    text = json.dumps({"format": FORMAT, "arrays": list(arrays), **state}).encode()
    buffer = io.BytesIO()  # numpy complains later, from nowhere, about a file that fails under it
    (np.savez_compressed if compressed else np.savez)(buffer, state=np.frombuffer(text, np.uint8), **arrays)
    write_whole(path, lambda file: file.write(buffer.getbuffer()), check=verify)


def write_whole(
    path: Path, write: Callable[[IO[bytes]], object], check: Optional[Callable[[Path], None]] = None
) -> None:
    """`path` gets what `write` writes, all of it or none. Raises StorageError."""
    aside = path.with_name(f".{path.name}.tmp")  # what a kill leaves of it, the next write replaces
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(aside)
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, zipfile.BadZipFile) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError) and error.errno in NOT_FOR_WRITING:
            raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another place") from error
        raise StorageError(
            f"{path} cannot be written: {error}; what was complete before is intact: "
            f"free the disk and start the same command again"
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    write_whole(path, lambda file: file.write(data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode(errors="backslashreplace"))  # names of files may be no UTF-8


def verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise zipfile.BadZipFile(f"{bad} does not match its checksum")


def load(path: Path, expected: int | str = FORMAT) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, state) of a checkpoint; raises ValueError with the reason if it is damaged."""
    try:
        verify(path)
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        state = json.loads(arrays.pop("state").tobytes())
        if list(arrays) != state.pop("arrays"):  # the zip's own table of contents has no checksum
            raise ValueError("entries are missing")
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{path} is damaged: {error}") from error
    if state.get("format") != expected:
        what = f"{path} has format {state.get('format')}; this version reads format {expected}"
        raise ConfigError(f"{what}: give what `hyperprior export` wrote, or use the version that wrote it")
    return arrays, state


def load_newest(folder: Path, warn: Callable[[str], None]) -> Optional[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """The newest checkpoint that is whole, or None where there is none; `warn` hears of damaged ones.

    Raises ConfigError if there are checkpoints but none is whole: starting anew would hide the loss.
    """
    paths = sorted(folder.glob(PATTERN), reverse=True)
    for path in paths:
        try:
            return load(path)
        except ValueError as error:
            warn(f"{error}; using the one before")
    if paths:
        raise ConfigError(f"none of the {len(paths)} checkpoints in {folder} is whole; move them away to start anew")
    return None


def best_path(folder: Path) -> Path:
    return folder / "best.npz"


def load_best(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of the best weights; raises ValueError with the reason if they are damaged or not of `step`."""
    arrays, state = load(best_path(folder))
    if state["step"] != step:
        raise ValueError(f"{best_path(folder)} is of step {state['step']}, the run's best is of step {step}")
    return arrays


@dataclasses.dataclass
class Trained:
    """The weights that a run ends with, by the model's names."""

    arrays: dict[str, np.ndarray]
    settings: config.Config
    step: int


def best_weights(run: Path, warn: Callable[[str], None]) -> Trained:
    """The best weights by validation loss; without one the last, averaged if the run keeps an average."""
    newest = load_newest(run / "checkpoints", warn) if run.is_dir() else None
    if newest is None:
        raise ConfigError(f"{run} holds no run with a checkpoint; `hyperprior train CONFIG --run {run}` makes one")
    arrays, state = newest
    settings = config.validate(state["config"], str(run))
    if state["run"]["best_loss"] is not None:
        step = state["run"]["best_step"]
        try:
            return Trained(strip("model/", load_best(run / "checkpoints", step)), settings, step)
        except ValueError as error:
            warn(f"{error}; the last weights are used instead of the best")
    last = {**strip("model/", arrays), **strip("optimizer/average/", arrays)}
    return Trained(last, settings, state["run"]["step"])


def strip(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def keep_last(folder: Path, count: int) -> None:
    for path in sorted(folder.glob(PATTERN))[:-count]:
        with contextlib.suppress(OSError):
            path.unlink()


def assign(variables: dict[str, Any], arrays: dict[str, np.ndarray], origin: str) -> None:
    """Puts arrays into the variables of the same names.

    Raises ConfigError, before anything is assigned, naming the first entry that is missing, left over or of
    another shape, with the shape expected and the shape found.
    """
    for name, variable in variables.items():
        if name not in arrays:
            raise ConfigError(
                f"{origin} has no `{name}` {tuple(variable.shape)}; it holds another model or optimizer: "
                f"give this config its keys of `model` and `train`"
            )
        if tuple(variable.shape) != arrays[name].shape:
            raise ConfigError(
                f"{origin}: `{name}` has shape {arrays[name].shape}; this config expects "
                f"{tuple(variable.shape)}: give it that run's keys of `model`"
            )
    if extra := sorted(arrays.keys() - variables.keys()):
        raise ConfigError(
            f"{origin} holds `{extra[0]}`, which this config's model or optimizer does not have: "
            f"give it that run's keys of `model` and `train`"
        )
    for name, variable in variables.items():
        variable.assign(arrays[name])


@contextlib.contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Holds the run directory against a second process; raises ConfigError if one holds it already.

    A directory that it made goes again if nothing else came to be in it.
    """
    lock, made = run / "lock", not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise ConfigError(f"run directory {run} cannot be used: {error.strerror}; choose another --run") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError("its holder removed it")
        except OSError as error:
            raise ConfigError(
                f"another process is working in {run}; wait for it or choose another directory"
            ) from error
        try:
            yield
        finally:
            if made and list(run.iterdir()) == [lock]:
                lock.unlink()
                run.rmdir()
