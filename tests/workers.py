"""Starts runs and workers in separate processes, and reads the files that they write."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from hyperprior.training import checkpoint

ROOT = Path(__file__).parents[1]
FAULTY = ROOT / "tests" / "faulty.py"
Processes = list["subprocess.Popen[str]"]
Checkpoint = tuple[dict[str, np.ndarray], dict[str, Any]]


def addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    names = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return names


def start(
    folder: Path,
    count: int,
    *arguments: object,
    faults: Sequence[str] = (),
    each: Sequence[Sequence[str]] = (),
    only: Optional[Sequence[int]] = None,
) -> Processes:
    """Starts `count` workers that train with `arguments`. Worker i also gets the arguments `each[i]`."""
    cluster = {"worker": addresses(count)}
    command = [sys.executable, *([str(FAULTY), *faults] if faults else ["-m", "hyperprior"]), "train"]
    workers = []
    for index in range(count) if only is None else only:
        place = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        proxy = {"http_proxy": "http://127.0.0.1:9"}  # which nobody serves, and which gRPC obeys
        environment = {**os.environ, **proxy, "TF_CONFIG": json.dumps(place)} if count > 1 else None
        own = each[index] if each else ()
        workers.append(
            subprocess.Popen(
                [*command, *map(str, arguments), *own],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=environment,
            )
        )
    return workers


def ends(workers: Processes, timeout: float = 240) -> list[tuple[int, str]]:
    """Waits for the workers, and returns (exit code, stderr) of each. Kills those that do not end."""
    try:
        said = [worker.communicate(timeout=timeout)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, text) for worker, text in zip(workers, said)]


def finish(folder: Path, count: int, *arguments: object, faults: Sequence[str] = (), timeout: float = 240) -> None:
    for code, said in ends(start(folder, count, *arguments, faults=faults), timeout):
        assert code == 0, said


def same_weights(a: Path, b: Path) -> int:
    """Asserts that the newest checkpoints are equal, bit for bit. Returns the number of arrays."""
    (left, state_a), (right, state_b) = newest(a), newest(b)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []
    assert state_a["run"] == state_b["run"]
    return len(left)


def keys_of(folder: Path, count: int) -> list[list[str]]:
    """The sample keys of each global batch. A step that ran twice must have had the same keys both times."""
    steps: dict[tuple[int, int], list[str]] = {}
    for worker in range(count):
        for line in (folder / f"worker-{worker}.txt").read_text().splitlines():
            step, _, keys = line.partition(" ")
            assert steps.setdefault((int(step), worker), json.loads(keys)) == json.loads(keys)
    last = max(step for step, _ in steps)
    return [[key for worker in range(count) for key in steps[step, worker]] for step in range(last + 1)]


def newest(run: Path) -> Checkpoint:
    newest_checkpoint = checkpoint.load_newest(run / "checkpoints", print)
    assert newest_checkpoint
    return newest_checkpoint


def lines(run: Path, kind: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if (run / "metrics.jsonl").exists() and len(lines(run, "train")) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run is not getting on")


def start_training(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hyperprior", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
