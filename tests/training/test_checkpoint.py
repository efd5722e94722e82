"""A checkpoint is complete or absent, and is never loaded into a model that it does not fit."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import tensorflow as tf

from hyperprior import storage
from hyperprior.errors import ConfigError, StorageError
from hyperprior.training import checkpoint

ARRAYS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int64(7)}


def fill(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(checkpoint.path_of(folder, step), ARRAYS, {"step": step})


def test_an_error_is_one_line_whatever_the_file_says(tmp_path: Path) -> None:
    storage.save_arrays(tmp_path / "x.npz", {"a": np.zeros(1)}, {}, file_format="1\n2\u20283")
    with pytest.raises(ConfigError) as error:
        storage.load_arrays(tmp_path / "x.npz", 1)
    assert "has format 1 2 3; this version reads format 1" in str(error.value)


def test_loading_returns_the_saved_arrays_and_state(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    arrays, state = storage.load_arrays(checkpoint.path_of(tmp_path, 3), checkpoint.FORMAT)
    assert state["step"] == 3 and arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[name], value) for name, value in ARRAYS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003.npz"]


def test_compressed_arrays_hold_more_than_their_file(tmp_path: Path) -> None:
    path, zeros = tmp_path / "x.npz", np.zeros(10**6, np.float32)
    storage.save_arrays(path, {"zeros": zeros}, {}, file_format="model 1", compressed=True)
    assert path.stat().st_size < zeros.nbytes / 100
    assert np.array_equal(storage.load_arrays(path, "model 1", 2 * zeros.nbytes)[0]["zeros"], zeros)
    with pytest.raises(ValueError, match="holds 4,000,[0-9]+ bytes; at most 4,000,000 are read"):
        storage.load_arrays(path, "model 1", zeros.nbytes)


def test_damage_to_the_newest_checkpoint_is_detected_and_the_one_before_is_used(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    newest = checkpoint.path_of(tmp_path, 2)
    whole = newest.read_bytes()
    random = np.random.RandomState(0)
    damages = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for place in random.randint(0, len(whole), 60):
        damages.append(whole[:place] + bytes([whole[place] ^ 1 << random.randint(8)]) + whole[place + 1 :])
    detected = 0
    for damage in damages:
        newest.write_bytes(damage)
        warnings: list[str] = []
        loaded = checkpoint.load_newest(tmp_path, warnings.append)
        assert loaded is not None
        if warnings:
            detected += 1
            assert "step-000000002.npz is damaged" in warnings[0] and loaded[1]["step"] == 1
        else:  # a bit in a field of the zip that does not affect the content
            assert all(np.array_equal(loaded[0][name], value) for name, value in ARRAYS.items())
    assert detected >= 30


def test_only_names_that_a_run_writes_are_read_counted_and_deleted(tmp_path: Path) -> None:
    fill(tmp_path, 5, 10, 15, 20)
    whole = checkpoint.path_of(tmp_path, 15).read_bytes()
    others = ["step-good.npz", "step-000000005-good.npz", "step-000000005 (copy).npz", "step-000000030.npz.bak"]
    others += ["step-30.npz", "step-0000000030.npz", "step-+00000030.npz", "step-٠٠٠٠٠٠٠٣٠.npz", "Step-000000030.npz"]
    for name in others:
        (tmp_path / name).write_bytes(whole)
    others += ["step-000000040.npz"]
    (tmp_path / others[-1]).mkdir()
    assert checkpoint.steps_in(tmp_path) == [5, 10, 15, 20]
    loaded = checkpoint.load_newest(tmp_path, pytest.fail)
    assert loaded is not None and loaded[1]["step"] == 20
    checkpoint.keep_last(tmp_path, 20, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "step-000000015.npz", "step-000000020.npz"])


def test_a_folder_with_only_damaged_checkpoints_raises_an_error(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, print) is None
    checkpoint.path_of(tmp_path, 1).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="none of the 1 checkpoints"):
        checkpoint.load_newest(tmp_path, lambda text: None)


def test_a_full_disk_leaves_old_checkpoints_unchanged(tmp_path: Path) -> None:
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


def test_the_last_checkpoints_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, *range(1, 8))
    checkpoint.save(tmp_path / "best.npz", ARRAYS, {})
    checkpoint.keep_last(tmp_path, 7, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.npz", *(f"step-{s:09d}.npz" for s in (5, 6, 7))]
    # 6 and 7 are damaged: a run that resumes from 5 keeps what it saves from there on.
    for step in (6, 7):
        checkpoint.path_of(tmp_path, step).write_bytes(b"")
    checkpoint.save(checkpoint.path_of(tmp_path, 5), ARRAYS, {"again": True})
    checkpoint.keep_last(tmp_path, 5, 1)
    loaded = checkpoint.load_newest(tmp_path, lambda text: None)
    assert loaded is not None and loaded[1]["again"]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (OSError(errno.EACCES, "Permission denied"), ConfigError),
        (MemoryError(), ConfigError),
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), StorageError),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: Exception, kind: type[Exception]
) -> None:
    fill(tmp_path, 1, 2)

    def fail(*args: object) -> None:
        raise reason

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    for load in (lambda: checkpoint.load_newest(tmp_path, pytest.fail), lambda: storage.load_state(tmp_path / "x.npz")):
        with pytest.raises(
            kind, match=f"npz cannot be read: {getattr(reason, 'strerror', 'there is not enough memory')}"
        ):
            load()


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hyperprior import storage\n"
        "for _ in range(300): storage.write_bytes(Path('x'), sys.argv[1].encode() * 200_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, text], cwd=tmp_path) for text in "ab"]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "x").exists():
            data = (tmp_path / "x").read_bytes()
            assert len(data) == 200_000 and len(set(data)) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_write_that_a_signal_interrupts_leaves_nothing(tmp_path: Path) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        storage.write_whole(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())


def test_a_link_keeps_leading_to_its_file_and_a_device_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    (tmp_path / "loop").symlink_to("loop")
    storage.write_text(tmp_path / "loop", "text")  # this link leads nowhere, so the file takes its place
    assert (tmp_path / "loop").read_text() == "text"
    os.mkfifo(tmp_path / "device")
    for _ in range(2):
        storage.write_text(tmp_path / "link", "text")
        with pytest.raises(ConfigError, match="device cannot be written: it is no regular file"):
            storage.write_text(tmp_path / "device", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "text"
    assert (tmp_path / "device").is_fifo()


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_may_be_unable_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    sync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(StorageError) if fails else contextlib.nullcontext():
        storage.write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"


def test_only_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    others = [".download.4711.tmp", ".mine.tmp", ".step-000000001.npz.tmp", "step-000000001.npz.123.tmp"]
    for name in (".step-000000001.npz.123.tmp", *others):
        (tmp_path / name).write_bytes(b"")
    storage.remove_unfinished(tmp_path, r"step-\d+\.npz|best\.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == others


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a/kernel": (2, 4), "step": ()}, r"`a/kernel` has shape \(2, 3\); this config expects \(2, 4\)"),
        ({"a/kernel": (2, 3), "step": (), "b": (1,)}, r"has no `b` \(1,\)"),
        ({"a/kernel": (2, 3)}, "holds `step`, which"),
    ],
)
def test_arrays_of_another_architecture_are_refused(names: dict[str, tuple[int, ...]], message: str) -> None:
    variables = {name: tf.Variable(tf.fill(shape, 9.0)) for name, shape in names.items()}
    with pytest.raises(ConfigError, match=message):
        storage.assign_arrays(variables, ARRAYS, "ckpt")
    assert all(np.all(v.numpy() == 9.0) for v in variables.values())


def test_a_locked_directory_refuses_a_second_process(tmp_path: Path) -> None:
    lock = storage.lock_directory(tmp_path)
    with lock, pytest.raises(ConfigError, match="another process"), storage.lock_directory(tmp_path):
        pass
    with storage.lock_directory(tmp_path):
        pass


def test_a_new_directory_is_removed_if_it_stays_empty(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), storage.lock_directory(run):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), storage.lock_directory(tmp_path):
        raise ZeroDivisionError
    assert tmp_path.is_dir()  # it was there before
    with storage.lock_directory(run):
        (run / "config.yaml").touch()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "lock"]


def test_a_removed_lock_file_does_not_lock_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def replace_lock_file(file: Any, operation: int) -> None:
        (run / "lock").unlink()  # after the file was opened, before it is locked
        (run / "lock").touch()

    monkeypatch.setattr(storage.fcntl, "flock", replace_lock_file)
    with pytest.raises(ConfigError, match="another process"), storage.lock_directory(run):
        pass


KILLED_AT_EVERY_LINE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from hyperprior import storage
from hyperprior.training import checkpoint

folder, lines = Path(sys.argv[1]), 0
checkpoint.save(checkpoint.path_of(folder, 1), {"x": np.full(9999, 1.0)}, {"step": 1})

def count(frame, event, argument):
    global lines
    if frame.f_code.co_filename == storage.__file__:
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


def test_a_kill_at_any_line_of_saving_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_LINE, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    points, before, after = map(int, result.stdout.split())
    assert points > 20 and before > 10 and after > 3, result.stdout
