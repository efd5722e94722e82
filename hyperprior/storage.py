"""The files of runs and models. A file is complete or absent. Arrays go into one verified file.

A new file gets a temporary name, is checked, and then renamed. So a reader sees the old file or the whole new one.
Arrays go into an `.npz` file: each array under its name, and a JSON object under `state`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, Optional

import numpy as np

from hyperprior.config import Config
from hyperprior.errors import ConfigError, StorageError

Arrays = dict[str, np.ndarray]

log = logging.getLogger(__name__)

MOST_BYTES_OF_STATE = 2**20  # where it is read alone, from a model
# Linux lets a process ask for a lock of this kind without taking it.
CAN_ASK = hasattr(fcntl, "F_OFD_GETLK")
WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
# With these errors the user must choose another place. Other errors, such as a full disk, may go away.
WRONG_PLACE = (
    *(errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS),
)
# With these, and with errors that the system did not give, a file that cannot be read is damaged or missing.
DAMAGED = (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)
NOT_SUPPORTED = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)  # of a folder, by some file systems


@dataclasses.dataclass
class TrainedWeights:
    """The weights of a trained model under the model's names, with the config and the step of the training."""

    arrays: Arrays
    settings: Config
    step: int


# Whole files ----------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], check: Optional[Callable[[Path], None]] = None) -> None:
    """Writes the whole file, or leaves `path` as it was. Raises ConfigError, StorageError.

    `check` reads the temporary file before it is renamed. It raises OSError or BadZipFile if the file is damaged.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # unlike resolve, this never raises
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # another process may write this file
    try:
        if path.exists() and not path.is_file():  # a device
            raise FileExistsError(errno.EEXIST, "it is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, zipfile.BadZipFile) as error:
        raise_cannot_write(
            error,
            path,
            retry="files that were complete before are intact: free the disk and start the same command again",
            elsewhere="choose another place",
        )
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # after an error or a signal


def sync_folder(folder: Path) -> None:
    """Makes the renames in a folder durable."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def remove_unfinished(folder: Path, names: str) -> None:
    """Removes what killed writers left of the files that `names` matches. Nobody may be writing them now."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.({names})\.\d+\.tmp", path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step. Returns False where the system or the file system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, exchange_flag = -100, 2
    return rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0


def raise_cannot_write(error: Exception, path: Path, *, retry: str, elsewhere: str) -> NoReturn:
    """Raises ConfigError with `elsewhere` if `path` cannot hold a file, else StorageError with `retry`."""
    if isinstance(error, OSError) and error.errno in WRONG_PLACE:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; {elsewhere}") from error
    raise StorageError(f"{path} cannot be written: {error}; {retry}") from error


def write_bytes(path: Path, data: bytes) -> None:
    write_whole(path, lambda file: file.write(data))


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. Bytes of a file name that are not UTF-8 become escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


# Arrays ---------------------------------------------------------------------------------------------------


def save_arrays(
    path: Path, arrays: Arrays, state: dict[str, Any], *, file_format: int | str, compressed: bool = False
) -> None:
    """Writes arrays and their `state` into one file. Raises ConfigError, StorageError."""
    text = json.dumps({"format": file_format, "arrays": list(arrays), **state}).encode()
    buffer = io.BytesIO()  # numpy does not report write errors of a file
    save = np.savez_compressed if compressed else np.savez
    members: dict[str, Any] = {"state": np.frombuffer(text, np.uint8), **arrays}
    save(buffer, **members)
    write_whole(path, lambda file: file.write(buffer.getbuffer()), check=verify_zip)


def verify_zip(path: Path, most_bytes: Optional[int] = None) -> None:
    """Checks every entry against its CRC-32. Raises BadZipFile, also if they hold more than `most_bytes` in all."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if most_bytes is not None and size > most_bytes:
            raise zipfile.BadZipFile(f"it holds {size:,} bytes; at most {most_bytes:,} are read")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def load_arrays(path: Path, file_format: int | str, most_bytes: Optional[int] = None) -> tuple[Arrays, dict[str, Any]]:
    """(arrays, state) of a file that `save_arrays` wrote, with at most `most_bytes` in all.

    Without `most_bytes` the limit is the size of the file: checkpoints are not compressed.
    Raises ValueError with the reason if the file is damaged or missing, ConfigError if it has another format or must
    not be read, and StorageError if it cannot be read now.
    """
    try:
        verify_zip(path, path.stat().st_size if most_bytes is None else most_bytes)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                raise ValueError(f"`{name}` is no array of numbers")
        state = json.loads(arrays.pop("state").tobytes())
        if list(arrays) != state.pop("arrays"):  # the directory of the zip has no checksum
            raise ValueError("entries are missing")
    except Exception as error:  # the readers raise many types for a damaged file
        raise_cannot_read(error, path)
    check_format(path, state.get("format"), file_format)
    return arrays, state


def check_format(path: Path, found: Any, expected: int | str) -> None:
    """Raises ConfigError for a file of another format. Checkpoints have a number, models have a name."""
    if isinstance(found, int) and isinstance(expected, str):
        folder = path.absolute().parent
        run = folder.parent if folder.name == "checkpoints" else "RUN"
        raise ConfigError(
            f"{path} is a checkpoint of a run, not a model: `hyperprior export {run}` makes a model of the run's best "
            f"weights"
        )
    if found != expected:
        raise ConfigError(
            f"{path} has format {found}; this version reads format {expected}: give a file from `hyperprior export`, "
            f"or use the version that wrote this file"
        )


def load_state(path: Path) -> dict[str, Any]:
    """The state of a file that `save_arrays` wrote. Its arrays are not read. Raises the errors of `load_arrays`."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("state.npy") as entry:
            if (size := archive.getinfo("state.npy").file_size) > MOST_BYTES_OF_STATE:
                raise ValueError(f"its state holds {size:,} bytes; at most {MOST_BYTES_OF_STATE:,} are read")
            state = json.loads(np.lib.format.read_array(entry, allow_pickle=False).tobytes())
        if not isinstance(state, dict):
            raise ValueError("its state is no JSON object")
    except Exception as error:  # the readers raise many types for a damaged file
        raise_cannot_read(error, path)
    return state


def raise_cannot_read(error: Exception, path: Path) -> NoReturn:
    """Raises ValueError if the file is damaged or missing, else ConfigError or StorageError."""
    if isinstance(error, MemoryError):
        raise ConfigError(f"{path} cannot be read: there is not enough memory") from error
    if isinstance(error, OSError) and error.errno not in DAMAGED:
        if error.errno in WRONG_PLACE:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        raise StorageError(f"{path} cannot be read: {error.strerror}; start the same command again") from error
    raise ValueError(f"{path} is damaged: {error}") from error


def with_prefix(prefix: str, arrays: Arrays) -> Arrays:
    """The arrays whose names begin with `prefix`, under their names without the prefix."""
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def assign_arrays(variables: dict[str, Any], arrays: Arrays, origin: str) -> None:
    """Assigns each array to the TensorFlow variable of the same name, after `check_arrays`."""
    check_arrays({name: tuple(variable.shape) for name, variable in variables.items()}, arrays, origin)
    for name, variable in variables.items():
        variable.assign(arrays[name])


def check_arrays(shapes: dict[str, tuple[int, ...]], arrays: Arrays, origin: str) -> None:
    """Raises ConfigError unless the arrays have these names and shapes. The error names the first one that is missing,
    unexpected or of another shape, with the expected shape and the array's shape."""
    for name, shape in shapes.items():
        if name not in arrays:
            raise ConfigError(
                f"{origin} has no `{name}` {shape}; it holds another model or optimizer: "
                f"copy its keys of `model` and `train` into this config"
            )
        if shape != arrays[name].shape:
            raise ConfigError(
                f"{origin}: `{name}` has shape {arrays[name].shape}; this config expects {shape}: "
                f"copy that run's keys of `model` into this config"
            )
    if extra := sorted(arrays.keys() - shapes.keys()):
        raise ConfigError(
            f"{origin} holds `{extra[0]}`, which this config's model or optimizer does not have: "
            f"copy that run's keys of `model` and `train` into this config"
        )


def fingerprint(arrays: Arrays) -> str:
    """The first 8 bytes of a SHA-256 over names, types, shapes and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


# One process in a directory -------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Locks a directory for this process. Raises ConfigError if another process holds the lock.

    Makes the directory if it is missing. At the end it removes a directory that it made if only the lock is in it.
    """
    lock = folder / "lock"
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise ConfigError(f"run directory {folder} cannot be used: {error.strerror}; choose another --run") from error
    with file:
        try:
            take_lock(file)
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError("the process that held the lock file removed it")
        except (BlockingIOError, FileNotFoundError) as error:
            raise ConfigError(f"another process is working in {folder}; wait, or choose another directory") from error
        except OSError as error:
            raise ConfigError(f"{folder} cannot be locked: {error.strerror}; choose another directory") from error
        try:
            yield
        finally:
            if is_new and list(folder.iterdir()) == [lock]:
                lock.unlink()
                folder.rmdir()


def take_lock(file: IO[str]) -> None:
    """Raises BlockingIOError if another process has the lock. On a file system without locks nothing is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if CAN_ASK:  # `is_locked` asks for this lock
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, WHOLE_FILE)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        log.warning("%s: %s; another process could work there at the same time", file.name, error.strerror)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of the directory now. On Linux this takes no lock, so it disturbs no process."""
    try:
        with (folder / "lock").open("rb") as file:
            if CAN_ASK:
                holder = fcntl.fcntl(file, fcntl.F_OFD_GETLK, WHOLE_FILE)
                return struct.unpack_from("h", holder)[0] != fcntl.F_UNLCK
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
