"""TF_CONFIG: what names a cluster, and what is refused because each worker would otherwise train alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from workers import ROOT, addresses

from hyperprior import config
from hyperprior.data.lanes import ALL
from hyperprior.data.splits import Split, Splits
from hyperprior.errors import ConfigError, LostWorker, Stopped
from hyperprior.training import checkpoint, distribute, meeting, resume
from hyperprior.training.meeting import read_tf_config

TASK = {"type": "worker", "index": 1}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, ([], 0)),
        ({"cluster": {}, "task": {"type": "worker", "index": 0}, "environment": "cloud", "job": {}}, ([], 0)),
        ({"cluster": {"worker": ["a:1", "b:2"]}, "task": TASK}, (["a:1", "b:2"], 1)),
        ({"cluster": {"chief": ["c:0"], "worker": ["a:1", "b:2"]}, "task": TASK}, (["c:0", "a:1", "b:2"], 2)),
        (
            {"cluster": {"chief": ["c:0"], "worker": ["a:1"]}, "task": {"type": "chief", "index": "0"}},
            (["c:0", "a:1"], 0),
        ),
    ],
)
def test_a_cluster_is_read(monkeypatch: pytest.MonkeyPatch, tree: Any, expected: Any) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(tree))
    assert read_tf_config() == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[1]", "AttributeError"),
        (
            '{"sparseCluster": {"worker": {"1": "a:1"}}, "task": {"type": "worker", "index": 1}}',
            "`sparseCluster` is unknown",
        ),
        (
            '{"cluster": {"worker": {"1": "a:1"}}, "task": {"type": "worker", "index": 1}}',
            "`cluster.worker` must be a list",
        ),
        ('{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}', "`cluster.worker` must be a list"),
        (
            '{"cluster": {"master": ["m:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            "`master` is unknown",
        ),
        ('{"cluster": {"ps": ["p:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}', "`ps` is unknown"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}', "must be a chief or worker"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', "must be a chief or worker"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "must be a chief or worker"),
        ('{"cluster": {"worker": ["a:1"]}}', "TypeError"),
        ('{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}', "have the same address"),
    ],
)
def test_what_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match="TF_CONFIG is .*as TensorFlow documents") as error:
        read_tf_config()
    assert problem in str(error.value)


def test_while_workers_are_missing_a_warning_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LATE", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = f"127.0.0.1:{free.getsockname()[1]}"
    warnings: list[str] = []
    with pytest.raises(LostWorker, match=r"no answer in 3 s .* worker 1 \(127.0.0.1:9\) of 2"):
        meeting.wait_for_workers([own, "127.0.0.1:9"], 0, 3, warnings.append)
    assert 3 <= len(warnings) <= 6 and all("waiting for worker 1 (127.0.0.1:9) of 2" in text for text in warnings)


def test_a_port_in_use_is_tried_again() -> None:
    """Another process may take a port after it was chosen, before this worker listens, or before TensorFlow does."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        own = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Stopped, match=f"cannot listen at {own}, where another process listens") as error:
            meeting.wait_for_workers([own, "127.0.0.1:9"], 0, 3, print)
        assert error.value.exit_code == 75
        place = {"cluster": {"worker": [own, "127.0.0.1:9"]}, "task": {"type": "worker", "index": 0}}
        program = (
            "from hyperprior import config\nfrom hyperprior.training import distribute, meeting\n"
            "meeting.wait_for_workers = lambda *arguments: None\ndistribute.World(config.Distribute(), 2)"
        )
        environment = {**os.environ, "TF_CONFIG": json.dumps(place), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stderr
        assert f"Stopped: TensorFlow cannot listen at {own}, where another process listens" in said, said
    with pytest.raises(ConfigError, match="it cannot listen there"):
        meeting.wait_for_workers(["127.0.0.1:99999", "127.0.0.1:9"], 0, 3, print)


def test_the_environment_names_what_kernels_are_chosen_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = distribute.World(config.Distribute(), 2)
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    hardware = world.environment()["hardware"].split()
    assert {"avx2", "avx512f", "amx_bf16"} & set(flags.split()) <= set(hardware) and "smep" not in hardware
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # oneDNN then chooses other kernels
    limited = distribute.World(config.Distribute(), 2).environment()["hardware"].split()
    assert limited == [*hardware, "ONEDNN_MAX_CPU_ISA=AVX2"]
    details = {"device_name": "NVIDIA L4", "compute_capability": (8, 9)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    assert distribute.describe_hardware(["GPU:0", "GPU:1"]) == "NVIDIA L4"


def test_a_resume_on_other_hardware_warns_once_and_an_old_checkpoint_does_not(tmp_path: Path) -> None:
    settings = config.load_config(None, [])
    splits = Splits(Split([], ALL), Split([], ALL), Split([], ALL), "val")
    before = {"onednn": "1", "hardware": "EPYC avx2", "workers": 1}
    for stored, expected in (
        (before, []),
        ({"onednn": "1", "workers": 1}, []),
        (
            {**before, "hardware": "Xeon avx512f"},
            ["hardware was Xeon avx512f and is now EPYC avx2: the weights may not"],
        ),
    ):
        saved = {"config": settings.to_dict(), "data": resume.describe_data(splits), "environment": stored}
        warnings: list[str] = []
        terminal: Any = SimpleNamespace(warn=warnings.append, say=pytest.fail)
        resume.check(tmp_path, saved, settings, splits, before, terminal)
        assert len(warnings) == len(expected) and all(map(str.startswith, warnings, expected)), warnings


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_worker_stays_until_all_have_met_it(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    if "::" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    cluster, met = [address.replace("127.0.0.1", host) for address in addresses(2)], list[int]()
    original = meeting.is_reachable

    def call(address: str) -> bool:
        time.sleep(threading.current_thread().name == "0")  # the other worker reaches this one before it is called
        return original(address)

    def meet(own: int) -> None:
        meeting.wait_for_workers(cluster, own, 8, pytest.fail)
        met.append(own)

    monkeypatch.setattr(meeting, "is_reachable", call)
    threads = [threading.Thread(target=meet, args=(own,), name=str(own)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(met) == [0, 1]


def test_workers_go_around_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "no_grpc_proxy"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "intranet")
    meeting.bypass_proxy(["node-1:20000", "[::1]:20001", "node-1:20002"])
    assert os.environ[name] == "intranet,::1,node-1"


def test_only_the_errors_of_a_lost_peer_are_a_lost_worker() -> None:
    lost = {"UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError"}
    types = [getattr(tf.errors, name) for name in dir(tf.errors) if name.endswith("Error") and name != "OpError"]
    assert (
        lost == {kind.__name__ for kind in types if meeting.is_loss_of_peer(kind(None, None, "text"))}
        and len(types) > 12
    )


def test_the_checkpoint_that_the_chief_chose_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VISIBLE_AFTER", 0)
    with pytest.raises(LostWorker, match="the chief resumes from step 7, but here .*step-000000007.npz"):
        checkpoint.wait_for(tmp_path, 7)
    monkeypatch.setattr(checkpoint, "VISIBLE_AFTER", 60)

    def write_late() -> None:
        time.sleep(0.5)
        checkpoint.save(checkpoint.path_of(tmp_path, 7), {"a": np.ones(3)}, {"run": {"step": 7}})

    thread = threading.Thread(target=write_late)
    thread.start()
    arrays, state = checkpoint.wait_for(tmp_path, 7)
    thread.join()
    assert np.array_equal(arrays["a"], np.ones(3)) and state["run"]["step"] == 7
