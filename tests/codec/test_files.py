"""Models and files as people use them: export, compress, decompress, info, Pillow, serving, other settings."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, Command, encoded, less_memory_than, photo
from PIL import Image

import hyperprior as package
from hyperprior import config, images, pillow, storage
from hyperprior.codec import box, codec, container, files, native, serving
from hyperprior.codec.codec import Codec
from hyperprior.codec.numpy_engine import NumPyEngine
from hyperprior.errors import BitstreamError, ConfigError, DataError, StorageError
from hyperprior.evaluation.photos import find_photos
from hyperprior.terminal import Terminal
from hyperprior.training import checkpoint, export
from hyperprior.training.info import info

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, exported at its end."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "photos").mkdir()
    for i in range(24):
        photo(i).save(folder / "photos" / f"{i}.png")
    (folder / "empty.yaml").write_text("seed: 0\n")
    sources = ["data.train=[photos]", "data.val_split=0.2", "data.test_split=0.1"]
    command = ["train", "empty.yaml", *TINY, *sources, "train.steps=30", "train.validate_every=15", "--run", "run"]
    done = forked.run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "integer h_s costs" in done.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> Codec:
    return package.load(run)


@pytest.fixture(autouse=True)
def use_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERPRIOR_MODEL", str(run))


# Export ---------------------------------------------------------------------------------------------------


def test_a_model_holds_the_best_weights_and_says_what_it_is(run: Path, model: Codec) -> None:
    arrays, state = storage.load_arrays(run / "checkpoints" / "best.npz", checkpoint.FORMAT)
    for name in ("g_a/0/kernel", "g_s/6/bias", "h_a/2/kernel"):
        assert np.array_equal(export.shorten(arrays[f"model/{name}"]).astype(np.float32), model.weights[name])
    description = json.loads((run / "model" / "model.json").read_text())
    assert description["fingerprint"] == model.fingerprint
    assert description["info"]["step"] == state["step"] == model.info["step"]
    assert config.validate(description["config"], "test") == model.config
    cost = description["info"]["exactness"]
    assert cost["images"] > 0 and abs(cost["bpp_exact"] / cost["bpp_float"] - 1) < 1e-3


def test_a_second_export_gives_the_same_model_and_writes_only_if_files_are_missing(
    run: Path, model: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.export(run, tmp_path / "other", Terminal())
    assert package.load(tmp_path / "other").fingerprint == model.fingerprint
    before = (tmp_path / "other" / "model.npz").stat().st_mtime_ns
    export.export(run, tmp_path / "other", Terminal())
    assert "exported already" in capsys.readouterr().out
    assert (tmp_path / "other" / "model.npz").stat().st_mtime_ns == before
    (tmp_path / "other" / "model.json").unlink()
    export.export(run, tmp_path / "other", Terminal())
    assert (tmp_path / "other" / "model.json").exists() and [p.name for p in tmp_path.iterdir()] == ["other"]


def test_another_model_replaces_a_model_only_with_force(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    arrays, state = checkpoint.load_newest(run / "checkpoints", print) or pytest.fail()
    arrays["model/g_s/6/bias"] += 1.0
    state["run"]["best_loss"] = None
    checkpoint.save(other / "checkpoints" / "step-000000001.npz", arrays, state)
    for out in (tmp_path / "keep", tmp_path / "keep.npz"):
        export.export(run, out, Terminal())
        kept = codec.load(out).fingerprint
        export.export(run, out, Terminal())
        with pytest.raises(ConfigError, match=f"holds model {kept}, which its .hyp files need"):
            export.export(other, out, Terminal())
        assert codec.load(out).fingerprint == kept
        export.export(other, out, Terminal(), force=True)
        assert codec.load(out).fingerprint != kept
    arrays, state = storage.load_arrays(tmp_path / "keep.npz", box.FORMAT, codec.MOST_BYTES)
    state["fingerprint"] = 16 * "0"  # an older version made other tables from the same weights
    (tmp_path / "keep" / "model.json").unlink()
    for out in (tmp_path / "keep", tmp_path / "keep.npz"):
        export.save_exported(out / "model.npz" if out.is_dir() else out, arrays, state)
        with pytest.raises(ConfigError, match=f"holds model {16 * '0'}, which its .hyp files need"):
            export.export(other, out, Terminal())
    (tmp_path / "notes.npz").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        export.export(run, tmp_path / "notes.npz", Terminal())
    assert (tmp_path / "notes.npz").read_text() == "mine"


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]], ids=["one", "three"]
)
def test_a_stopped_export_leaves_no_files(run: Path, tmp_path: Path, signals: list[signal.Signals]) -> None:
    """Further signals, of users and of programs that end their children, do not interrupt the removal."""
    command = [sys.executable, "-m", "hyperprior", "export", str(run), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    ) as process:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.01)
    assert process.returncode == 128 + signals[0] and not list(tmp_path.iterdir())


def test_many_models_in_one_process_do_not_warn_of_retracing(model: Codec, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(6):
        again = codec.load(model.origin)
        assert again.decompress(again.compress(np.asarray(photo(1)))).shape == (80, 96, 3)
    assert "retracing" not in caplog.text


def test_the_last_average_is_exported_if_there_is_no_best(tmp_path: Path, run: Path) -> None:
    arrays, state = checkpoint.load_newest(run / "checkpoints", print) or pytest.fail()
    name = "model/g_a/0/bias"
    arrays["optimizer/average/g_a/0/bias"] = arrays[name] + 1.0
    state["run"]["best_loss"] = None
    checkpoint.save(tmp_path / "checkpoints" / "step-000000001.npz", arrays, state)
    assert np.array_equal(checkpoint.best_weights(tmp_path, Terminal().warn).arrays["g_a/0/bias"], arrays[name] + 1.0)
    arrays.pop("optimizer/average/g_a/0/bias")
    checkpoint.save(tmp_path / "checkpoints" / "step-000000002.npz", arrays, state)
    assert np.array_equal(checkpoint.best_weights(tmp_path, Terminal().warn).arrays["g_a/0/bias"], arrays[name])


def test_an_impossible_export_is_refused_and_changes_nothing(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run with a checkpoint"):
        export.export(tmp_path / "none", None, Terminal())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    shutil.copy(run / "model" / "model.npz", tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which is no part of an exported model"):
        export.export(run, tmp_path / "mine", Terminal())
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    arrays, state = checkpoint.load_newest(run / "checkpoints", print) or pytest.fail()
    arrays["model/h_a/0/bias"][0] = np.nan
    state["run"]["best_loss"] = None
    checkpoint.save(tmp_path / "nan" / "checkpoints" / "step-000000001.npz", arrays, state)
    with pytest.raises(ConfigError, match="`h_a/0/bias` of step 30 is not finite"):
        export.export(tmp_path / "nan", None, Terminal())
    assert not (tmp_path / "nan" / "model").exists()


def test_an_export_never_replaces_what_others_put_beside_or_into_a_model(tmp_path: Path, run: Path) -> None:
    (tmp_path / "theirs" / "saved_model").mkdir(parents=True)
    (tmp_path / "theirs" / "saved_model" / "saved_model.pb").write_bytes(b"of another tool")
    shutil.copytree(run, tmp_path / "run")
    extra = tmp_path / "run" / "model" / "saved_model" / "assets.extra" / "tf_serving_warmup_requests"
    extra.parent.mkdir()
    extra.write_bytes(b"requests")
    for out, found in ((tmp_path / "theirs", "something else than"), (None, r"saved_model/assets\.extra, which is no")):
        with pytest.raises(ConfigError, match=f"holds {found}.* an exported model; move it away"):
            export.export(tmp_path / "run", out, Terminal(), force=True)
    assert (tmp_path / "theirs" / "saved_model" / "saved_model.pb").read_bytes() == b"of another tool"
    assert extra.read_bytes() == b"requests"
    shutil.rmtree(extra.parent)
    export.export(tmp_path / "run", None, Terminal())


def test_a_model_that_cannot_be_replaced_stays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "model" / "model.json").unlink()  # so that it is exported again
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    monkeypatch.setattr(storage, "exchange", lambda a, b: False)
    with pytest.raises(StorageError, match="No space left"):
        export.export(run, tmp_path / "model", Terminal())
    assert codec.load(tmp_path).fingerprint == package.load(run).fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


KILLED_EXPORT = """
import os, shutil, signal, sys
from pathlib import Path
from hyperprior import stack, storage
stack.start_tensorflow()
from hyperprior.terminal import Terminal
from hyperprior.training import export

run, out, point, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def end_around(owner, name):
    original = getattr(owner, name)
    def noted(*arguments, **named):
        if f"before {name}" == point: os.kill(os.getpid(), number)
        result = original(*arguments, **named)
        if f"after {name}" == point:
            setattr(owner, name, original)
            os.kill(os.getpid(), number)
        return result
    setattr(owner, name, noted)

def stop(number, frame):
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
end_around(storage, "exchange")
end_around(shutil, "rmtree")
if number == signal.SIGTERM:
    storage.exchange = lambda a, b: False  # as on NFS
    end_around(Path, "rename")
export.export(run, out, Terminal(quiet=True), force=True)
"""


@pytest.mark.parametrize(
    "number, point",
    [
        *((signal.SIGKILL, point) for point in ("before exchange", "after exchange", "before rmtree")),
        (signal.SIGTERM, "after rename"),
    ],
    ids=str,
)
def test_a_model_is_under_its_name_at_every_moment_of_an_export(
    run: Path, tmp_path: Path, number: signal.Signals, point: str
) -> None:
    out = tmp_path / "model"
    shutil.copytree(run / "model", out)
    (out / "model.json").unlink()  # so that it is exported again
    arguments = [str(run), str(out), point, str(int(number))]
    ended = subprocess.run([sys.executable, "-c", KILLED_EXPORT, *arguments], check=False, capture_output=True)
    assert ended.returncode == (-9 if number == signal.SIGKILL else 143), ended.stderr[-500:]
    assert codec.load(out).fingerprint == package.load(run).fingerprint
    if number == signal.SIGTERM:
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_models_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no model"):
        codec.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=f"holds no exported model; `hyperprior export {tmp_path}` makes one"):
        codec.load(tmp_path)
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="is damaged"):
        codec.load(tmp_path)
    path.write_bytes(whole)
    arrays, state = storage.load_arrays(path, box.FORMAT, codec.MOST_BYTES)
    arrays["g_s/0/bias"][0] += 1e-6
    checkpoint.save(path, arrays, state)
    with pytest.raises(DataError, match="its weights and tables have fingerprint"):
        codec.load(tmp_path)


def set_nan(arrays: storage.Arrays) -> None:
    arrays["g_s/0/bias"][3] = np.nan


def set_table(values: list[int], at: int = 0) -> Callable[[storage.Arrays], None]:
    def change(arrays: storage.Arrays) -> None:
        arrays["tables/lookup"][at : at + len(values)] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "`g_s/0/bias` is not finite"),
        (lambda a: a.pop("g_a/2/kernel"), "it has no 'g_a/2/kernel'"),
        (lambda a: a.update({"g_s/0/bias": np.zeros(9, np.float32)}), "is .9. float32, and should be .8."),
        (lambda a: a.update({"z_offsets": np.zeros(8, np.float32)}), "`z_offsets` is .8. float32"),
        (lambda a: a.update({"g_s/0/bias": np.full(8, "x")}), "`g_s/0/bias` is no array of numbers"),
        (lambda a: a.update({"another": np.zeros(2)}), "`another` belongs to no part of it"),
        (set_table([0]), "table 0 has a precision of 0 bits"),
        (set_table([17]), "table 0 has a precision of 17 bits"),
        (set_table([5], at=2), "table 0 is not a distribution"),
        (lambda a: a.update({"tables/lookup": a["tables/lookup"][:-1]}), "is not a distribution"),
        (lambda a: a["tables/escape"].__iadd__(1), "first values or escapes do not fit"),
        (lambda a: a["tables/first"].__iadd__(2**30), "first values or escapes do not fit"),
        (lambda a: a["tables/first"][:1].__iadd__(200), "a table of y does not have the value 0"),
        (lambda a: a["h_s/1/kernel"].__imul__(2**24), "h_s/1 cannot be made exact"),
        pytest.param(
            lambda a: a.update({"g_s/6/kernel": np.zeros(2**27, np.float64)}),
            "it holds 1,07.* bytes; at most 536,870,912",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_impossible_models_are_named_in_one_line(
    run: Path, tmp_path: Path, change: Callable[[storage.Arrays], None], message: str
) -> None:
    """Also models whose fingerprint is right."""
    arrays, state = storage.load_arrays(run / "model" / "model.npz", box.FORMAT, codec.MOST_BYTES)
    change(arrays)
    state["fingerprint"] = storage.fingerprint(arrays)
    path = tmp_path / "x.npz"
    storage.save_arrays(path, arrays, state, file_format=box.FORMAT, compressed=True)
    for engine in ("numpy", "tensorflow"):
        with less_memory_than(2**28), pytest.raises((DataError, ConfigError), match=message) as error:
            codec.load(path, engine)
        assert "\n" not in str(error.value)


# Files ----------------------------------------------------------------------------------------------------


def test_a_folder_is_compressed_and_decompressed_from_the_command_line(
    hyperprior: Command, tmp_path: Path, model: Codec
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    photo(1, 200, 170).save(tmp_path / "in" / "a.png")
    photo(2).save(tmp_path / "in" / "deep" / "b.c.JPG")
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    done = hyperprior("compress", "in", "-o", "out", "--verify", check=3)
    assert "warning: in/broken.png: not an image that Pillow opens" in done.stderr
    assert "1 of 3 files failed" in done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("in/a.png → out/a.hyp"))
    size = (tmp_path / "out" / "a.hyp").stat().st_size
    assert f"200x170  {size:,} bytes  {8 * size / 34000:.3f} bpp" in line and "MS-SSIM 0." in line and "dB" in line
    total = size + (tmp_path / "out" / "deep" / "b.c.hyp").stat().st_size
    before = sum((tmp_path / "in" / name).stat().st_size for name in ("a.png", "deep/b.c.JPG"))
    last = done.stdout.splitlines()[-1]
    rate = f"{total:,} bytes ({total / before:.1%})  {8 * total / (34000 + 96 * 80):.3f} bpp"
    assert last.startswith(f"2 files  {before:,} → {rate}  ")
    each = [float(value) for value in re.findall(r"PSNR (\S+) dB", done.stdout)]
    assert each[2] == pytest.approx((each[0] + each[1]) / 2, abs=0.011) and "mean PSNR" in last
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == ["a.hyp", "b.c.hyp"]
    hyperprior("decompress", "out", "-o", "back", "--format", "webp")
    with Image.open(tmp_path / "back" / "deep" / "b.c.webp") as image:
        assert image.size == (96, 80) and image.format == "WEBP"
    # Pipes work, and an existing file is not overwritten.
    data = (tmp_path / "out" / "a.hyp").read_bytes()
    command = [sys.executable, "-m", "hyperprior", "decompress", "-"]
    piped = subprocess.run(command, input=data, capture_output=True, check=True)
    pixels = np.asarray(Image.open(io.BytesIO(piped.stdout)), int)  # of another process, maybe with other kernels
    assert np.abs(pixels - model.decompress(data)).max() <= 1
    assert "exists; --force overwrites it" in hyperprior("compress", "in/a.png", "-o", "out/a.hyp", check=2).stderr


def test_plans_are_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.hyp").mkdir()
    for name in ("a.png", "a.jpg", "b.png", "b.jpg", "c.png", "d/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    Path("b.hyp").write_bytes(b"")
    Path("link").symlink_to("d")
    (tmp_path / "empty").mkdir()

    def plan(*sources: str, out: str | None = None, existing: files.Existing = "refuse") -> list[tuple[str, str]]:
        return [tuple(job) for job in files.plan(sources, out, (".png", ".jpg"), ".hyp", existing)]

    assert plan("a.png") == [("a.png", "a.hyp")]
    assert plan("a.png", out="x.bin") == [("a.png", "x.bin")]
    assert plan("a.png", out="d") == [("a.png", "d/a.hyp")]
    assert plan("a.png", out="new/") == [("a.png", "new/a.hyp")]
    assert plan("-") == [("-", "-")]
    assert plan("-", out="d") == [("-", "d/stdin.hyp")]
    assert plan("d") == [("d/a.png", "d/a.hyp")]
    Path("d/z.png").symlink_to("nowhere")  # this source fails later, and is not left out in silence
    Path("e").mkdir()
    Path("e/linked").symlink_to("../d")
    assert plan("e") == [(f"e/linked/{name}.png", f"e/linked/{name}.hyp") for name in "az"]
    assert plan("a.png", "b.png", out="new") == [("a.png", "new/a.hyp"), ("b.png", "new/b.hyp")]
    assert plan("b.png", existing="replace") == [("b.png", "b.hyp")]
    assert plan("a.png", "b.png", existing="skip") == [("a.png", "a.hyp")]
    assert plan("b.png", existing="skip") == []
    for arguments, message in [
        ({"sources": ["none.png"]}, "none.png does not exist"),
        ({"sources": ["empty"]}, "empty holds no file with one of .png, .jpg"),
        ({"sources": ["a.png", "a.jpg"]}, "a.png and a.jpg would both become a.hyp"),
        ({"sources": ["a.png", str(tmp_path / "a.jpg")]}, f"would both become {tmp_path / 'a.hyp'}"),
        ({"sources": ["d/a.png", "link/a.png"]}, "d/a.png and link/a.png would both become link/a.hyp"),
        ({"sources": ["a.png", "d/a.png"], "out": "x"}, "a.png and d/a.png would both become x/a.hyp"),
        ({"sources": ["b.png"]}, "b.hyp exists; --force overwrites it, --skip-existing leaves it alone"),
        ({"sources": ["b.hyp"], "existing": "replace"}, "b.hyp would overwrite itself"),
        ({"sources": ["b.png"], "out": "./b.png", "existing": "replace"}, "b.png would overwrite itself"),
        ({"sources": ["b.png"], "out": "/dev/null", "existing": "replace"}, "/dev/null exists and is no file"),
        ({"sources": ["c.png"], "existing": "skip"}, "c.hyp exists and is no file"),
        ({"sources": ["b.png", "b.jpg"], "existing": "skip"}, "b.png and b.jpg would both become b.hyp"),
        ({"sources": ["x" * 300 + ".png"]}, "File name too long"),
        ({"sources": ["a.png", "b.png"], "out": "-"}, "2 files cannot all go to standard output"),
        ({"sources": ["a.png", "b.png"], "out": "b.hyp"}, "b.hyp is a file; 2 files need a directory"),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan(*arguments.pop("sources"), **arguments)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d" / "closed").mkdir(parents=True)
    photo(1).save(tmp_path / "d" / "a.png")
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"d/closed: Permission denied"):
        files.plan([str(tmp_path / "d")], None, (".png",), ".hyp", "refuse")
    with pytest.raises(DataError, match=r"d/closed cannot be read: Permission denied"):
        find_photos(tmp_path / "d", print)


def test_a_file_of_an_unknown_model_does_not_end_a_batch(
    tmp_path: Path, model: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYPERPRIOR_MODEL")
    data = package.load("q1").compress(np.asarray(photo(1)))
    (tmp_path / "d").mkdir()
    for name, content in (("a", data), ("b", model.compress(np.asarray(photo(1)))), ("c", data)):
        (tmp_path / "d" / f"{name}.hyp").write_bytes(content)
    with pytest.raises(DataError, match="1 of 3 files failed"):
        files.decompress([str(tmp_path / "d")], None, None, ".png", "refuse", None, Terminal())
    assert sorted(path.name for path in (tmp_path / "d").glob("*.png")) == ["a.png", "c.png"]
    with pytest.raises(ConfigError, match=rf"b\.hyp: written with model {model.fingerprint}, which is not in the box"):
        files.decompress([str(tmp_path / "d" / "b.hyp")], None, None, ".png", "refuse", None, Terminal())


def test_a_failed_decompression_leaves_no_file(tmp_path: Path, model: Codec) -> None:
    data = model.compress(np.asarray(photo(3)))
    (tmp_path / "x.hyp").write_bytes(data[:-1])
    with pytest.raises(BitstreamError, match=r"x\.hyp: cut off"):
        files.decompress([str(tmp_path / "x.hyp")], None, None, ".png", "refuse", 10**6, Terminal())
    (tmp_path / "x.hyp").write_bytes(model.compress(np.zeros((1, 20_000, 3), np.uint8)))
    with pytest.raises(DataError, match=r"x\.hyp: cannot be written as WEBP"):
        files.decompress([str(tmp_path / "x.hyp")], None, None, ".webp", "refuse", 10**6, Terminal())
    with pytest.raises(ConfigError, match=r"Pillow writes no photograph as `\.xyz`"):
        files.decompress([str(tmp_path / "x.hyp")], None, None, ".xyz", "refuse", 10**6, Terminal())
    with pytest.raises(ConfigError, match=r"Pillow writes no photograph as `\.ico`"):  # it would be 256 pixels wide
        files.decompress([str(tmp_path / "x.hyp")], None, None, ".ico", "refuse", 10**6, Terminal())
    (tmp_path / "x.hyp").write_bytes(data)
    with pytest.raises(DataError, match="at most 100 are decoded"):
        files.decompress([str(tmp_path / "x.hyp")], None, None, ".png", "refuse", 100, Terminal())
    assert [p.name for p in tmp_path.iterdir()] == ["x.hyp"]


@pytest.fixture
def small_box(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A box with the model of `run` as q2, in one file, and no HYPERPRIOR_MODEL."""
    folder = tmp_path / "box"
    export.export(run, folder / "q2.npz", Terminal())
    monkeypatch.setattr(box, "BOX", folder)
    monkeypatch.delenv("HYPERPRIOR_MODEL")
    box.in_the_box.cache_clear()
    yield folder
    box.in_the_box.cache_clear()


def test_a_model_in_one_file_is_the_model_of_the_run_with_its_weights_rounded(
    small_box: Path, run: Path, model: Codec
) -> None:
    small = package.load(small_box / "q2.npz")
    assert small.fingerprint == model.fingerprint
    trained = checkpoint.best_weights(run, print).arrays
    for name, value in small.weights.items():
        if name.endswith("kernel"):
            assert not np.any(value.astype(np.float16).view(np.uint16) & 0b111), name
            np.testing.assert_allclose(value, trained[name], rtol=2**-8 + 2**-11, atol=2**-22)
        else:
            assert np.array_equal(value, trained[name].astype(np.float16).astype(np.float32)), name


@pytest.mark.parametrize("beside", ["nothing", "a folder", "another model"])
def test_models_in_the_box_are_chosen_by_quality_and_by_their_own_files(
    small_box: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """Also beside something with the name of a model in the box."""
    monkeypatch.chdir(tmp_path)
    if beside != "nothing":
        (tmp_path / "q2").mkdir()
    small = package.load("q2")
    if beside == "another model":
        shutil.copy(HERE / "codec" / "vectors" / "model.npz", tmp_path / "q2")
        assert package.load("q2").fingerprint != small.fingerprint
    (tmp_path / "x.png").write_bytes(encoded(photo(4), "PNG"))
    files.compress([str(tmp_path / "x.png")], box.choose(None, 2), None, 0, "refuse", False, Terminal())
    files.decompress([str(tmp_path / "x.hyp")], None, str(tmp_path / "y.png"), ".png", "refuse", None, Terminal())
    data = (tmp_path / "x.hyp").read_bytes()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png")), small.decompress(data))
    assert info(tmp_path / "x.hyp", None)["given_model"] == f"q2, {small.fingerprint}"
    with pytest.raises(ConfigError, match="--quality 9 is not in the box; q2 are"):
        box.choose(None, 9)
    with pytest.raises(ConfigError, match="both given"):
        box.choose("runs/a", 2)
    assert box.choose("runs/a") == "runs/a"
    (tmp_path / "x.hyp").write_bytes(
        package.load(HERE / "codec" / "vectors" / "model.npz").compress(np.asarray(photo(4)))
    )
    with pytest.raises(ConfigError, match="not in the box: name its run"):
        files.decompress([str(tmp_path / "x.hyp")], None, str(tmp_path / "z.png"), ".png", "refuse", None, Terminal())
    assert not (tmp_path / "z.png").exists()


def test_json_output_lists_every_file_and_nothing_else(
    hyperprior: Command, run: Path, model: Codec, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    photo(4, 200, 180).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    photo(4, 30, 20).save(tmp_path / "in" / "c.png")
    done = hyperprior("compress", "in", "--model", run, "-o", "out", "--verify", "--json", check=3)
    a, b, c = json.loads(done.stdout)
    assert (a["source"], a["target"], a["width"], a["height"]) == ("in/a.png", "out/a.hyp", 200, 180)
    assert a["bytes"] == (tmp_path / "out" / "a.hyp").stat().st_size and a["psnr_db"] > 10 and a["ms_ssim"] > 0
    assert b["source"] == "in/b.png" and "error" in b and c["ms_ssim"] is None
    decoded = json.loads(hyperprior("decompress", "out", "--model", run, "--json").stdout)
    assert [(row["target"], row["width"]) for row in decoded] == [("out/a.png", 200), ("out/c.png", 30)]
    exported = json.loads(hyperprior("export", run, "--out", "m", "--json").stdout)
    assert exported["fingerprint"] == model.fingerprint and exported == json.loads(
        hyperprior("export", run, "--out", "m", "--json").stdout
    )
    packed = json.loads(hyperprior("pack", "in", "--out", "shards", "--json").stdout)
    assert packed == {"shards": ["shards/shards-000000.tar"], "images": 2, "left_out": 1}


def test_info_distinguishes_files_models_and_runs(hyperprior: Command, run: Path, model: Codec, tmp_path: Path) -> None:
    data = model.compress(np.asarray(photo(4)))
    (tmp_path / "x.hyp").write_bytes(data)
    facts = json.loads(hyperprior("info", "x.hyp", "--json").stdout)
    assert (facts["width"], facts["height"], facts["bytes"]) == (96, 80, len(data))
    assert facts["model"] == model.fingerprint and facts["fits"] is True
    other = data[:5] + bytes(8) + data[13:]
    (tmp_path / "y.hyp").write_bytes(other)
    assert "CRC-32" in hyperprior("info", "y.hyp", check=3).stderr
    assert info(run / "model", None)["fingerprint"] == model.fingerprint
    shutil.copytree(run / "checkpoints", tmp_path / "damaged" / "checkpoints")
    (tmp_path / "damaged" / "checkpoints" / "step-000000030.npz").write_bytes(b"torn")
    of_damaged = info(tmp_path / "damaged", None)
    assert of_damaged["step"] == 15 and "step-000000030.npz is damaged" in of_damaged["problem"]
    of_run = info(run, None)
    assert of_run["step"] == 30 and of_run["exported"]["fingerprint"] == model.fingerprint
    with pytest.raises(ConfigError, match="is no model"):
        info(tmp_path / "z", None)


@pytest.mark.parametrize("name", ["step-000000030.npz", "best.npz"])
def test_a_checkpoint_given_as_a_model_is_named_with_the_way_out(
    hyperprior: Command, run: Path, tmp_path: Path, name: str
) -> None:
    photo(1).save(tmp_path / "a.png")
    place = run / "checkpoints" / name
    said = hyperprior("info", place, check=2).stderr
    assert said == (
        f"hyperprior: {place} is a checkpoint of a run, not a model: `hyperprior export {run}` makes a model of the "
        f"run's best weights\n"
    )
    for words in (["compress", "a.png", "--model"], ["evaluate", "--images", ".", "--out", "o"]):
        assert hyperprior(*words, place, check=2).stderr == said
    copied = shutil.copy(place, tmp_path / "copy.npz")
    assert (
        "copy.npz is a checkpoint of a run, not a model: `hyperprior export RUN`"
        in hyperprior("info", copied, check=2).stderr
    )


# Photographs ----------------------------------------------------------------------------------------------


def test_photographs_are_turned_upright() -> None:
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:8, :8] = (255, 0, 0)
    expected = images.decode_photo(encoded(Image.fromarray(corners), "PNG"))[0]
    for orientation in range(1, 9):
        undo = {
            1: None,
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }[orientation]
        stored = Image.fromarray(corners) if undo is None else Image.fromarray(corners).transpose(undo)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            data = encoded(stored, kind, exif=exif, **options)
            assert np.array_equal(images.decode_photo(data)[0], expected), (kind, orientation)
        as_jpeg = images.decode_photo(encoded(stored, "JPEG", exif=exif, quality=95))[0]
        assert as_jpeg.shape == expected.shape and np.abs(as_jpeg.astype(int) - expected).mean() < 3, orientation


def test_every_loss_in_a_photograph_is_noted() -> None:
    assert images.decode_photo(encoded(photo(1), "PNG"))[1] == []
    assert images.decode_photo(encoded(photo(1).convert("L"), "PNG"))[1] == []
    assert images.decode_photo(encoded(photo(1).convert("RGBA"), "PNG"))[1] == ["transparency is flattened onto white"]
    assert images.decode_photo(encoded(photo(1).convert("CMYK")))[1] == ["CMYK is converted without a colour profile"]
    deep = Image.fromarray((np.arange(80 * 96).reshape(80, 96) * 8).astype(np.uint16))
    pixels, notes = images.decode_photo(encoded(deep, "PNG"))
    assert notes == ["16 bits are reduced to 8"] and np.ptp(pixels) > 200
    assert images.decode_photo(encoded(photo(1), "PNG", icc_profile=b"x" * 200))[1] == ["its colour profile is dropped"]
    frames = encoded(photo(1), "GIF", save_all=True, append_images=[photo(2)])
    assert images.decode_photo(frames)[1] == ["only the first of 2 frames is kept"]
    assert images.decode_photo(frames[: len(frames) * 2 // 3])[0].shape == (80, 96, 3)  # the second frame is cut
    with pytest.raises(images.Unusable, match="Pillow"):
        images.decode_photo(b"")


DECODE_IN_CHILD = """
import multiprocessing, os, sys
import numpy as np
from PIL import Image
import hyperprior.pillow
from hyperprior.codec import load
from hyperprior.errors import ConfigError

path, engine = sys.argv[1], sys.argv[2]
data = open(path, "rb").read()
codec = load("q1", engine=engine)
codec.decompress(data)                       # the parent has decoded once
Image.open(path).load()                      # so has Pillow's
first = load("q1", engine="numpy").decompress(data)

def decode(number):
    try:
        codec.decompress(data)
        own = "decodes"
    except ConfigError as error:
        own = str(error)
    return own, np.array_equal(np.asarray(Image.open(path)), first)

def search(number):
    try:
        codec.compress(first, effort=1)
    except ConfigError as error:
        return str(error)

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(decode, range(4)).get(120))
    if engine == "tensorflow":
        print(pool.map_async(search, range(4)).get(120))
"""


@pytest.mark.parametrize("engine", ["numpy", "tensorflow", "auto"])
def test_a_forked_process_decodes_or_says_why_not(tmp_path: Path, engine: str) -> None:
    photo(1).save(tmp_path / "x.hyp", model="q1")
    command = [sys.executable, "-c", DECODE_IN_CHILD, str(tmp_path / "x.hyp"), engine]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    if engine == "tensorflow":
        assert output.count("TensorFlow does not work in a process that was forked") == 4 + 4, output
    else:
        assert output.count("decodes") == 4, output
    assert output.count("True") == 4, output


def test_a_tensorflow_that_does_not_work_is_used_only_if_it_is_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = types.ModuleType("tensorflow")
    old.__version__ = "2.12.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", old)
    assert isinstance(codec.load(run / "model").engine, NumPyEngine)
    with pytest.raises(ConfigError, match="TensorFlow is 2.12.0"):
        codec.load(run / "model", "tensorflow")


def test_an_opened_image_travels_like_any_other(tmp_path: Path) -> None:
    photo(1).save(tmp_path / "x.hyp", model="q1")
    pixels = np.asarray(Image.open(tmp_path / "x.hyp"))
    for travel in (copy.copy, copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))):
        for is_loaded in (False, True):
            with Image.open(tmp_path / "x.hyp") as image:
                if is_loaded:
                    image.load()
                arrived = travel(image)
                assert arrived.size == (96, 80) and np.array_equal(np.asarray(arrived), pixels)
                assert np.array_equal(np.asarray(image), pixels)


def test_a_file_that_cannot_be_read_is_the_os_error_that_users_of_pillow_expect(tmp_path: Path) -> None:
    photo(1).save(tmp_path / "x.hyp", model="q1")
    data = (tmp_path / "x.hyp").read_bytes()
    header = data[:5] + bytes(8) + data[13:-4]  # of a model that is not here
    unknown = header + zlib.crc32(header).to_bytes(4, "little")
    for damaged in (data[:6], data[:-3], data[:60] + bytes([data[60] ^ 1]) + data[61:], unknown):
        with pytest.raises(OSError) as raised:
            Image.open(io.BytesIO(damaged)).load()
        assert isinstance(raised.value, BitstreamError) and str(raised.value)


def test_pillow_opens_and_saves(model: Codec, run: Path, tmp_path: Path) -> None:
    photo(5, 130, 70).save(tmp_path / "x.hyp")
    photo(5, 130, 70).convert("RGBA").save(tmp_path / "y.hyp", model=model)
    photo(5, 130, 70).save(tmp_path / "z.hyp", model=run / "model")
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.hyp")  # flattened onto white, as `compress` does
    flattened = model.compress(images.decode_photo(encoded(clear, "PNG"))[0])
    assert (tmp_path / "clear.hyp").read_bytes() == flattened
    data = (tmp_path / "x.hyp").read_bytes()
    assert data == (tmp_path / "y.hyp").read_bytes() == (tmp_path / "z.hyp").read_bytes()
    with Image.open(tmp_path / "x.hyp") as image:
        assert image.format == "HYP" and image.size == (130, 70) and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), model.decompress(data))
        assert image.crop((0, 0, 10, 10)).size == (10, 10)
    (tmp_path / "x.hyp").write_bytes(data[:-1])
    with pytest.raises(BitstreamError, match="cut off"):
        Image.open(tmp_path / "x.hyp")
    assert pillow.accept(data)


def test_what_decompress_would_refuse_is_not_written(tmp_path: Path, model: Codec) -> None:
    huge = np.broadcast_to(np.uint8(0), (65_000, 2_800, 3))  # takes no memory
    for compress in (model.compress, lambda image: model.compress_batch([image])):
        with pytest.raises(DataError, match="2800x65000 pixels; at most 178,956,970 are compressed"):
            compress(huge)
    with pytest.raises(DataError, match="at most 178,956,970 are compressed"):
        Image.new("L", (2_800, 65_000)).save(tmp_path / "x.hyp", model=model)
    assert not (tmp_path / "x.hyp").exists()
    small = np.asarray(photo(1, 40, 30))
    with pytest.raises(DataError, match="at most 1,199"):
        model.compress(small, max_pixels=1_199)
    assert model.decompress(model.compress(small, max_pixels=1_200), max_pixels=1_200).shape == small.shape


def test_the_served_codec_writes_nothing_that_it_would_refuse(model: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = native.load_operations().module
    if not operations:
        pytest.skip("needs the C++ range coder")
    monkeypatch.setattr(container, "MAX_PIXELS", 1_199)
    with pytest.raises(tf.errors.InvalidArgumentError, match="image size not accepted"):
        serving.compress_in_graph(model, operations, tf.constant(np.asarray(photo(1, 40, 30))))


# Other processes ------------------------------------------------------------------------------------------


def run_script(name: str, *arguments: object, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr


def check_settings(model: Path, pictures: list[Path], settings: list[tuple[str, str]], tmp_path: Path) -> int:
    """Checks that files written with each of `settings` (threads, oneDNN) decode alike with all; returns the count."""
    written: list[Path] = []
    for i, (threads, onednn) in enumerate(settings):
        run_script("settings.py", model, threads, "write", *pictures, tmp_path / f"w{i}", TF_ENABLE_ONEDNN_OPTS=onednn)
        for path in sorted((tmp_path / f"w{i}").iterdir()):
            written.append(path.rename(tmp_path / f"{i}-{path.name}"))
    read = []
    for i, (threads, onednn) in enumerate(settings):
        out = tmp_path / f"r{i}.npz"
        run_script("settings.py", model, threads, "read", *written, out, TF_ENABLE_ONEDNN_OPTS=onednn)
        read.append(dict(np.load(out)))
    served = {}
    if native.load_operations().module:
        run_script("serve.py", model / "saved_model", *written, tmp_path / "served.npz")
        served = dict(np.load(tmp_path / "served.npz"))
        assert "do not match their CRC-32" in str(served["error"])
    assert bool(served) == (model / "saved_model").exists()
    for path in written:
        latents, pixels = (read[0][f"{path.name} {kind}"] for kind in ("latents", "pixels"))
        for other in read:
            assert np.array_equal(other[f"{path.name} latents"], latents)
            assert np.abs(other[f"{path.name} pixels"].astype(int) - pixels).max() <= 1
            if "batch" in path.name:
                assert np.array_equal(other[f"{path.name} latents in a batch"], latents)
                assert np.abs(other[f"{path.name} pixels in a batch"].astype(int) - pixels).max() <= 1
        if served:
            assert np.abs(served[f"{path.name} pixels"].astype(int) - pixels).max() <= 1
    again = package.load(model)
    for path in written[:4] if served else []:  # this package reads the files that the served model writes
        pixels = served[f"{path.name} pixels"]
        assert again.decompress(served[f"{path.name} again"].tobytes()).shape == pixels.shape
    return len(written)


def test_files_decode_alike_with_other_threads_kernels_batches_and_as_saved_model(run: Path, tmp_path: Path) -> None:
    pictures = []
    for i, size in enumerate([(333, 500), (64, 64), (1, 1), (200, 90)]):
        photo(i, *size).save(tmp_path / f"{i}.png")
        pictures.append(tmp_path / f"{i}.png")
    assert check_settings(run / "model", pictures, [("1", "0"), ("2", "1")], tmp_path) == 16


def test_loading_turns_onednn_on_in_this_process_and_not_in_its_children(run: Path) -> None:
    code = (
        "import os, sys, hyperprior, numpy as np; codec = hyperprior.load(sys.argv[1], 'tensorflow'); "
        "codec.compress(np.zeros((64, 64, 3), np.uint8)); print('left', os.environ.get('TF_ENABLE_ONEDNN_OPTS'))"
    )
    for given, left in ((None, "left None"), ("0", "left 0")):
        environment = {**os.environ, "ONEDNN_VERBOSE": "1", "TF_ENABLE_ONEDNN_OPTS": given or ""}
        if given is None:
            del environment["TF_ENABLE_ONEDNN_OPTS"]
        command = [sys.executable, "-c", code, str(run)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert ("exec,cpu,convolution" in done.stdout) == (given is None)
        assert left in done.stdout


@pytest.mark.slow
def test_real_photographs_decode_alike_under_every_setting(run: Path, samples: Path, tmp_path: Path) -> None:
    pictures = sorted((samples / "kodak").glob("*.png"))[::3]
    settings = [(threads, onednn) for threads in "12" for onednn in "01"]
    assert check_settings(run / "model", pictures, settings, tmp_path) == len(pictures) * 8
