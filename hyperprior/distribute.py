"""The strategy and this worker's place in it, from TF_CONFIG or nothing.

Everything distributed that the rest of the package needs is here: how many replicas there are, which lanes
of the global batch this worker owns, who is chief, sums over workers, and how workers agree.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy
from tensorflow.python.util import _pywrap_util_port

from hyperprior import config
from hyperprior.errors import ConfigError, HyperpriorError, LostWorker, error_type

T = TypeVar("T")


class World:
    """`strategy` and what follows from it. One per process, made before any other use of TensorFlow."""

    def __init__(self, settings: config.Distribute, batch_size: int):
        cluster, self.worker = tf_config_place()
        self.workers = max(len(cluster), 1)
        if settings.intra_op_threads:
            tf.config.threading.set_intra_op_parallelism_threads(settings.intra_op_threads)
        gpus = tf.config.list_physical_devices("GPU")
        if settings.cpu_devices:
            tf.config.set_visible_devices([], "GPU")
            gpus = []
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(settings.cpu_devices)]
            )
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if gpus and settings.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.device_kind = "GPU" if gpus else "CPU"
        self.local_replicas = len(gpus) or settings.cpu_devices or 1
        self.strategy: tf.distribute.Strategy
        if self.workers > 1:
            meet(cluster, self.worker, settings.start_timeout)
            with killed_after(settings.start_timeout), several_cpus(settings.cpu_devices or 1):
                self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        elif self.local_replicas > 1 or gpus:
            devices = [f"{self.device_kind}:{i}" for i in range(self.local_replicas)]
            self.strategy = tf.distribute.MirroredStrategy(devices)
        else:
            self.strategy = tf.distribute.get_strategy()
        # Not local_replicas * workers: workers are compared only once they can talk.
        self.replicas = self.strategy.num_replicas_in_sync
        self.batch_size, self.replica_batch = batch_size, batch_size // self.replicas

    def check_batch(self) -> None:
        """Raises ConfigError unless the global batch divides by the replicas, naming the nearest that do."""
        size, replicas = self.batch_size, self.replicas
        if size % replicas:
            below, above = size // replicas * replicas, (size // replicas + 1) * replicas
            fitting = f"{below} and {above} are" if below else f"{above} is"
            raise ConfigError(f"train.batch_size is {size}; it must be divisible by {replicas} replicas ({fitting})")

    @property
    def is_chief(self) -> bool:
        return self.worker == 0

    def lanes(self, batch_size: int) -> range:
        """The places of a global batch that this worker fills."""
        each = batch_size // self.workers
        return range(self.worker * each, (self.worker + 1) * each)

    def place(self, parts: list[np.ndarray]) -> Any:
        """One array for each local replica, as a per-replica value."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group % len(parts)])
        )

    def place_once(self, array: np.ndarray) -> Any:
        """`array` on the first local replica, zeros on the others: a sum over replicas counts it once."""
        return self.place([array] + [np.zeros_like(array)] * (self.local_replicas - 1))

    def first(self, value: Any) -> tf.Tensor:
        """The first local replica's part of a value that is the same on all."""
        return self.strategy.experimental_local_results(value)[0]

    def sum_workers(self, array: np.ndarray) -> np.ndarray:
        """The sum over workers of an integer array of the same shape on each."""
        if self.workers == 1:
            return array
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, self.place_once(array), axis=None).numpy()

    def gather(self, what: Any) -> list[Any]:
        """Each worker's `what`, which JSON can hold, in order of workers."""
        if self.workers == 1:
            return [what]
        text = np.frombuffer(json.dumps(what).encode(), np.uint8)
        sizes = np.zeros(self.workers, np.int64)
        sizes[self.worker] = len(text)
        sizes = self.sum_workers(sizes)
        rows = np.zeros((self.workers, sizes.max()), np.int64)
        rows[self.worker, : len(text)] = text
        rows = self.sum_workers(rows)
        return [json.loads(row[:size].astype(np.uint8).tobytes()) for row, size in zip(rows, sizes)]

    def together(self, action: Callable[[], T]) -> T:
        """`action()` on every worker; an error meant for the user, on any of them, is raised on all."""
        if self.workers == 1:
            return action()
        error: Optional[HyperpriorError] = None
        try:
            result = action()
        except HyperpriorError as raised:
            error = raised
        self.raise_first(error)
        return result

    def raise_first(self, error: Optional[HyperpriorError]) -> None:
        """Raises, on every worker, the first worker's `error` that is not None; all must call it."""
        if self.workers == 1:
            if error:
                raise error
            return
        found = self.gather(error and {"type": type(error).__name__, "message": str(error)})
        for worker, told in enumerate(found):
            if told:
                raise error_type(told["type"])(f"worker {worker}: {told['message']}")

    def same(self, what: dict[str, Any]) -> None:
        """Raises ConfigError, on every worker, unless each has the same flat `what`; names the difference."""
        first, *others = self.gather(what)
        for worker, other in enumerate(others, 1):
            if different := [
                f"{key} is {first[key]} and {other.get(key)}" for key in first if first[key] != other.get(key)
            ]:
                raise ConfigError(
                    f"workers 0 and {worker} disagree: {'; '.join(different)}; give all workers the same config, "
                    f"version, data and run directory"
                )

    def environment(self) -> dict[str, Any]:
        """What the bits of a training step depend on besides (config, seed, step); kept in checkpoints."""
        return {
            "tensorflow": tf.__version__,
            "onednn": str(int(_pywrap_util_port.IsMklEnabled())),
            "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
            "devices": f"{self.replicas} x {self.device_kind}",
            "workers": self.workers,
        }


def meet(cluster: list[str], own: int, seconds: int) -> None:
    """Returns when every worker of `cluster` answers at its address; raises LostWorker naming those that do not.

    TensorFlow itself would wait for ever, with no thread of Python running. Until it opens this worker's port
    a socket here answers on it, so that an answer means that the worker has come this far.
    """
    deadline = time.monotonic() + seconds
    missing = dict(enumerate(cluster))
    with socket.socket() as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind(("", int(cluster[own].rpartition(":")[2])))
            here.listen(len(cluster))
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"TF_CONFIG gives this worker the address {cluster[own]}, which cannot be listened on: {error}; "
                f"give it HOST:PORT with a free port"
            ) from error
        while missing and time.monotonic() < deadline:
            missing = {i: address for i, address in missing.items() if not answers(address)}
            if missing:
                time.sleep(0.2)
    if missing:
        raise LostWorker(
            f"no answer in {seconds} s (distribute.start_timeout) from "
            f"{', '.join(f'worker {i} ({address})' for i, address in missing.items())} of {len(cluster)} workers; "
            f"start the same command on all of them again"
        )


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def killed_after(seconds: int) -> Iterator[None]:
    """Ends a process that hangs in native code by SIGALRM, and shows where it hung."""
    faulthandler.dump_traceback_later(seconds)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds + 1)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def several_cpus(count: int) -> Iterator[None]:
    """Makes MultiWorkerMirroredStrategy use `count` logical CPU devices of each worker; by itself it uses one."""
    kind = collective_all_reduce_strategy.CollectiveAllReduceExtended
    original = kind._initialize_local_devices

    def devices(self: Any, resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

    if count > 1:
        kind._initialize_local_devices = devices
    try:
        yield
    finally:
        kind._initialize_local_devices = original


def tf_config_place() -> tuple[list[str], int]:
    """(addresses of all workers, index of this one) from TF_CONFIG; raises ConfigError if it is malformed."""
    text = os.environ.get("TF_CONFIG")
    if not text:
        return [], 0
    try:
        tree = json.loads(text)
        cluster, task = tree.get("cluster", {}), tree.get("task", {})
        chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
        if not chiefs and not workers:
            return [], 0
        index = int(task["index"])
        if task["type"] not in ("chief", "worker") or not 0 <= index < len(cluster[task["type"]]):
            raise ConfigError(f"TF_CONFIG's task is {task}; it must be a chief or worker that its cluster lists")
        return [*chiefs, *workers], index + (len(chiefs) if task["type"] == "worker" else 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"TF_CONFIG is {text!r}: it must be JSON with cluster and task, as TensorFlow documents ({error!r})"
        ) from error
