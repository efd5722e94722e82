"""How workers find, meet and lose each other. TF_CONFIG lists them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import tensorflow as tf

from hyperprior.errors import ConfigError, LostWorker, Stopped
from hyperprior.terminal import LATE

TF_CONFIG_KEYS = {"cluster", "task", "environment", "rpc_layer", "job"}  # TensorFlow's, and `job` of Google's clouds
IN_USE = "where another process listens; start the same command again, or give another port if it stays"
CALLED_AFTER = 5  # seconds that a worker which has reached all others waits for their calls
JOINED_AFTER = 45  # seconds that workers which have met may take until all have joined TensorFlow's cluster


def read_tf_config() -> tuple[list[str], int]:
    """Reads (addresses of all workers, index of this worker) from TF_CONFIG; ([], 0) if it names no cluster.

    Raises ConfigError for all that is not understood, because each worker would otherwise train alone.
    """
    text = os.environ.get("TF_CONFIG")
    if not text:
        return [], 0
    try:
        tree = json.loads(text)
        cluster, task = tree.get("cluster") or {}, tree.get("task")
        if unknown := [*(tree.keys() - TF_CONFIG_KEYS), *(cluster.keys() - {"chief", "worker"})]:
            raise ValueError(f"`{unknown[0]}` is unknown; a cluster has a `chief`, `worker`s, or both")
        for kind, addresses in cluster.items():
            if not isinstance(addresses, list) or not all(isinstance(address, str) for address in addresses):
                raise ValueError(f"`cluster.{kind}` must be a list of addresses")
        chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
        if not chiefs and not workers:
            return [], 0
        index = int(task["index"])
        if task["type"] not in ("chief", "worker") or not 0 <= index < len(cluster.get(task["type"], [])):
            raise ValueError(f"its task is {task}, which must be a chief or worker that its cluster lists")
        if len({*chiefs, *workers}) < len([*chiefs, *workers]):
            raise ValueError("two workers have the same address")
        return [*chiefs, *workers], index + (len(chiefs) if task["type"] == "worker" else 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"TF_CONFIG is {text!r}: it must be JSON with cluster and task, as TensorFlow documents "
            f"({error if type(error) is ValueError else repr(error)})"
        ) from error


def bypass_proxy(cluster: list[str]) -> None:
    """Lets gRPC reach the workers directly. It obeys http_proxy, which few proxies expect of it."""
    hosts = {address.rpartition(":")[0].strip("[]") for address in cluster}
    name = "no_grpc_proxy"  # gRPC reads it in place of no_proxy, in small letters only
    others = os.environ.get(name) or os.environ.get("no_proxy")
    os.environ[name] = ",".join([*([others] if others else []), *sorted(hosts)])


def wait_for_workers(cluster: list[str], own: int, seconds: int, warn: Callable[[str], None]) -> None:
    """Waits until every worker of `cluster` answers at its address. Raises LostWorker with those that do not.

    TensorFlow would wait for an hour, and name none. Until TensorFlow opens this worker's port, a socket here answers
    on it. So an answer means that the worker has reached this point. A worker also stays until all others have called
    it: if it left earlier and died, a slower one would wait for it in vain.
    """
    began = time.monotonic()
    deadline, calls = began + seconds, 0
    told = LATE
    missing = dict(enumerate(cluster))

    def describe_missing() -> str:
        return f"{', '.join(f'worker {i} ({address})' for i, address in missing.items())} of {len(cluster)} workers"

    has_both = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if has_both else socket.AF_INET) as listener:
        if has_both:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4, too
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(cluster[own].rpartition(":")[2])))
            listener.listen(len(cluster))
            listener.setblocking(False)
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise Stopped(f"this worker cannot listen at {cluster[own]}, {IN_USE}") from error
            raise ConfigError(
                f"TF_CONFIG gives this worker the address {cluster[own]}, but it cannot listen there: {error}; "
                f"give it HOST:PORT with a free port"
            ) from error
        while (missing or calls < len(cluster)) and time.monotonic() < deadline:
            if missing:
                missing = {i: address for i, address in missing.items() if not is_reachable(address)}
                deadline = deadline if missing else min(deadline, time.monotonic() + CALLED_AFTER)
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    calls += 1
            if missing or calls < len(cluster):
                time.sleep(0.2)
            if missing and time.monotonic() - began > told:
                warn(f"waiting for {describe_missing()} since {told} s, for {seconds} s at most")
                told += LATE
    if missing:
        raise LostWorker(
            f"no answer in {seconds} s (distribute.start_timeout) from {describe_missing()}; start the same command on "
            f"all of them again"
        )


def is_reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def make_strategy_of_workers(address: str) -> tf.distribute.Strategy:
    """Raises Stopped if another process took the port meanwhile."""
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.UnknownError as error:
        if "Could not start gRPC server" not in str(error):
            raise
        raise Stopped(f"TensorFlow cannot listen at {address}, {IN_USE}") from error


@contextlib.contextmanager
def give_up_after(seconds: int) -> Iterator[None]:
    """Ends the process with LostWorker's exit code if the block takes longer: an exception could not end it there.

    At some moment of the block TensorFlow's library takes SIGTERM for itself, and the process would not end on it.
    Python's handler is put back within 5 ms.
    """
    is_over, library, handler = threading.Event(), ctypes.CDLL(None), ctypes.create_string_buffer(1024)
    library.sigaction(signal.SIGTERM, None, handler)

    def watch() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if is_over.wait(0.005):
                return
            library.sigaction(signal.SIGTERM, handler, None)
        print(
            f"hyperprior: another worker ended or stopped answering: all had met, but after {seconds} s they have not "
            f"joined; start the same command on all workers again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LostWorker.exit_code)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        library.sigaction(signal.SIGTERM, handler, None)


@contextlib.contextmanager
def name_lost_workers() -> Iterator[None]:
    """Raises LostWorker in place of the errors that TensorFlow raises when another worker is lost."""
    try:
        yield
    except tf.errors.OpError as error:
        if len(read_tf_config()[0]) <= 1 or not is_loss_of_peer(error):
            raise
        traceback.clear_frames(error.__traceback__)  # TensorFlow's hold a thread pool, whose end at exit is noisy
        reason = re.search("aborted by: (.*)", error.message)
        raise LostWorker(
            f"another worker ended or stopped answering ({reason[1][:200] if reason else type(error).__name__}); "
            f"the checkpoints are intact: start the same command on all workers again"
        ) from error


def is_loss_of_peer(error: tf.errors.OpError) -> bool:
    """Whether TensorFlow raises this error when another worker ends or stops answering. Its other errors are real."""
    lost = tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError
    return isinstance(error, lost)
