"""Tiny real objects for the tests: photographs drawn from a seed, tars of them, and runs of the command."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without TensorFlow, tests/codec leaves these out: they train a model, or compute with TensorFlow.
collect_ignore = [] if find_spec("tensorflow") else ["codec/test_files.py", "codec/test_search.py"]


def pytest_report_header() -> str:
    return f"without TensorFlow, so without {' and '.join(collect_ignore)}" if collect_ignore else ""


# A model and patches so small that a run takes seconds.
TINY = [
    "model.num_filters=8",
    "model.latent_channels=8",
    "model.hyper_channels=8",
    "data.patch_size=64",
    "data.eval_crop=64",
    "data.val_split=0",
    "data.test_split=0",
    "train.batch_size=4",
    "train.steps_per_call=1",
    "train.learning_rate=1e-3",
    "summaries.scalars_every=1",
    "summaries.images_every=null",
]


def photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A smooth random picture."""
    small = np.random.RandomState(seed).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def less_memory_than(limit: int) -> Iterator[None]:
    """Fails if Python and NumPy take `limit` bytes or more at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@contextlib.contextmanager
def browser_tab(**options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page in Chromium, and the errors and warnings of its console and scripts."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(**options)
        errors: list[str] = []
        tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("dialog", lambda dialog: errors.append(dialog.message))
        yield tab, errors
        browser.close()


def photos(count: int, prefix: str = "p") -> list[tuple[str, bytes]]:
    return [(f"{prefix}{i:03d}.JPEG", encoded(photo(i))) for i in range(count)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL that serves the files of tmp_path."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def flat_tar(tmp_path: Path) -> Path:
    """24 photographs in one tar."""
    path = tmp_path / "flat.tar"
    path.write_bytes(tar_bytes(photos(24)))
    return path


@pytest.fixture
def nested_tar(tmp_path: Path) -> Path:
    """Six class tars of 1 to 6 photographs, in ImageNet's layout."""
    path = tmp_path / "nested.tar"
    path.write_bytes(tar_bytes((f"n{c}.tar", tar_bytes(photos(c + 1, f"n{c}_"))) for c in range(6)))
    return path


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real photographs in ImageNet's layout."""
    folder = os.environ.get("HYPERPRIOR_SAMPLES")
    if not folder:
        pytest.skip("HYPERPRIOR_SAMPLES is not set: it names the folder of the real ImageNet samples")
    return Path(folder)


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hyperprior(tmp_path: Path) -> Command:
    """Runs the command in a forked process, in the test's directory. `fresh` or `env`: in a new process instead."""

    def call(
        *arguments: object, check: int | None = 0, fresh: bool = False, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        if fresh or env:
            command = [sys.executable, "-m", "hyperprior", *words]
            limits: dict[str, Any] = {"timeout": forked.SECONDS, "cwd": tmp_path, "env": env}
            result = subprocess.run(command, capture_output=True, text=True, **limits)
        else:
            result = forked.run(words, tmp_path)
        if check is not None:
            assert result.returncode == check, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return call


@pytest.fixture
def empty_config(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 0\n")
    return path
