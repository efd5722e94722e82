"""Runs the command in a process that is forked after TensorFlow's import, which takes half the time of a short run.

The import starts no part of TensorFlow, so the forked process is like a fresh process after the import.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import faulty
import pytest

SECONDS = 900  # a hang
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"  # read once, at the import
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["hyperprior.training.loop", "hyperprior.training.export", "hyperprior.evaluation.evaluate"]
)


def run(arguments: list[str], folder: Path, faults: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs `hyperprior ARGUMENTS` in `folder`, with `faults` of faulty.py. The result is like `subprocess.run`'s."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
        task = (arguments, folder, dict(os.environ), out.name, error.name, faults)
        process = SERVER.Process(target=command, args=task)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ONEDNN, "1")  # for the server, which starts with the first process
            process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, SECONDS, out.read(), error.read())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read().decode(), error.read().decode())


def command(
    arguments: list[str], folder: Path, environment: dict[str, str], out: str, error: str, faults: Sequence[str]
) -> None:
    for stream, name in ((1, out), (2, error)):
        os.dup2(os.open(name, os.O_WRONLY), stream)
    os.chdir(folder)
    from hyperprior import cli, stack

    if importlib.util.find_spec("tensorflow"):
        stack.is_onednn_on()  # the first call reads the server's setting
    os.environ.clear()
    # Without this the command would restart itself to set the allocator.
    os.environ.update(environment, MALLOC_TOP_PAD_=str(2**28))
    sys.argv = ["hyperprior", *arguments]
    faulty.apply(faults)
    cli.main()
