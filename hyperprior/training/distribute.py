"""The distribution strategy, and this worker's place in it. TF_CONFIG lists the workers; without it there is one.

The rest of the package gets everything about distribution from here: the number of replicas, this worker's lanes of
the global batch, the chief, sums over workers, and checks that the workers agree.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, TypeVar

import numpy as np
import tensorflow as tf

from hyperprior import config, stack
from hyperprior.errors import ConfigError, HyperpriorError, LostWorker, Stopped, find_error_type
from hyperprior.terminal import LATE

T = TypeVar("T")

IN_USE = "where another process listens; start the same command again, or give another port if it stays"
# Flags of /proc/cpuinfo that stand for instructions on vectors and matrices.
INSTRUCTION_SETS = re.compile("sse4|avx|amx|fma|f16c|asimd|sve|sme(?!p)|bf16|i8mm")
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # variables that oneDNN reads
TF_CONFIG_KEYS = {"cluster", "task", "environment", "rpc_layer", "job"}  # TensorFlow's, and `job` of Google's clouds

CALLED_AFTER = 5  # seconds that a worker which has reached all others waits for their calls
JOINED_AFTER = 45  # seconds that workers which have met may take until all have joined TensorFlow's cluster


class World:
    """The `strategy`, and all values that follow from it. A command makes one before any other use of TensorFlow."""

    def __init__(self, settings: config.Distribute, batch_size: int, warn: Callable[[str], None] = print):
        cluster, self.worker = read_tf_config()
        self.workers = max(len(cluster), 1)
        gpus = tf.config.list_physical_devices("GPU")
        try:
            if settings.intra_op_threads:
                tf.config.threading.set_intra_op_parallelism_threads(settings.intra_op_threads)
            if settings.cpu_devices:
                tf.config.set_visible_devices([], "GPU")
                gpus = []
                cpu = tf.config.list_physical_devices("CPU")[0]
                tf.config.set_logical_device_configuration(
                    cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(settings.cpu_devices)]
                )
        except RuntimeError as error:
            raise ConfigError(
                "TensorFlow is already in use in this process, so distribute.cpu_devices and intra_op_threads cannot "
                "change; train in another process"
            ) from error
        for gpu in gpus:
            with contextlib.suppress(RuntimeError):  # GPUs in use keep their setting
                tf.config.experimental.set_memory_growth(gpu, True)
        if gpus and settings.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.device_kind = "GPU" if gpus else "CPU"
        self.local_replicas = len(gpus) or settings.cpu_devices or 1
        own = {"devices": f"{self.local_replicas} x {self.device_kind}", "hardware": describe_hardware(gpus)}
        machines = [own]
        self.strategy: tf.distribute.Strategy
        if self.workers > 1:
            bypass_proxy(cluster)
            wait_for_workers(cluster, self.worker, settings.start_timeout, warn)
            cpu_devices = stack.use_cpu_devices(settings.cpu_devices or 1)
            with give_up_after(JOINED_AFTER), stack.join_without_lock(), cpu_devices:
                self.strategy = make_strategy_of_workers(cluster[self.worker])
                machines = stack.exchange(own, self.worker, self.workers)
            check_devices([machine["devices"] for machine in machines])
        elif self.local_replicas > 1 or gpus:
            devices = [f"{self.device_kind}:{i}" for i in range(self.local_replicas)]
            self.strategy = tf.distribute.MirroredStrategy(devices)
        else:
            self.strategy = tf.distribute.get_strategy()
        self.hardware = ", ".join(sorted({machine["hardware"] for machine in machines}))
        self.replicas = self.strategy.num_replicas_in_sync
        self.batch_size, self.replica_batch = batch_size, batch_size // self.replicas

    def check_batch(self) -> None:
        """Raises ConfigError unless the replicas divide the global batch. Names the nearest sizes that fit."""
        size, replicas = self.batch_size, self.replicas
        if size % replicas:
            below, above = size // replicas * replicas, (size // replicas + 1) * replicas
            fitting = f"{below} and {above} are" if below else f"{above} is"
            raise ConfigError(f"train.batch_size is {size}; it must be divisible by {replicas} replicas ({fitting})")

    @property
    def is_chief(self) -> bool:
        return self.worker == 0

    def lanes(self, batch_size: int) -> range:
        """The positions of a global batch that this worker fills."""
        each = batch_size // self.workers
        return range(self.worker * each, (self.worker + 1) * each)

    def place(self, parts: list[np.ndarray]) -> Any:
        """Puts one array on each local replica. Returns a per-replica value."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group % len(parts)])
        )

    def place_once(self, array: np.ndarray) -> Any:
        """Puts `array` on the first local replica and zeros on the others, so a sum over replicas counts it once."""
        return self.place([array] + [np.zeros_like(array)] * (self.local_replicas - 1))

    def first(self, value: Any) -> tf.Tensor:
        """The first local replica's copy of a value that is the same on all."""
        return self.strategy.experimental_local_results(value)[0]

    def sum_workers(self, array: np.ndarray) -> np.ndarray:
        """Sums an integer array over workers. Its shape is the same on each."""
        if self.workers == 1:
            return array
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, self.place_once(array), axis=None).numpy()

    def gather(self, value: Any) -> list[Any]:
        """Collects the `value` of every worker, in order of workers. It must be JSON data."""
        if self.workers == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.zeros(self.workers, np.int64)
        sizes[self.worker] = len(text)
        sizes = self.sum_workers(sizes)
        rows = np.zeros((self.workers, np.max(sizes)), np.int64)
        rows[self.worker, : len(text)] = text
        rows = self.sum_workers(rows)
        return [json.loads(row[:size].astype(np.uint8).tobytes()) for row, size in zip(rows, sizes)]

    def on_every_worker(self, action: Callable[[], T]) -> T:
        """Runs `action()`. If it raises a HyperpriorError on one worker, all raise it. All workers must call this."""
        if self.workers == 1:
            return action()
        error: Optional[HyperpriorError] = None
        try:
            result = action()
        except HyperpriorError as raised:
            error = raised
        self.raise_if_any_failed(error)
        return result

    def raise_if_any_failed(self, error: Optional[HyperpriorError]) -> None:
        """Raises the first `error` of any worker on all workers. All workers must call this."""
        if self.workers == 1:
            if error:
                raise error
            return
        own_failure = {"type": type(error).__name__, "message": str(error)} if error else None
        for worker, failure in enumerate(self.gather(own_failure)):
            if failure:
                raise find_error_type(failure["type"])(f"worker {worker}: {failure['message']}")

    def check_same(self, values: dict[str, Any]) -> None:
        """Raises ConfigError, on all workers, unless all have the same flat `values`. Names the differences."""
        first, *others = self.gather(values)
        for worker, other in enumerate(others, 1):
            if different := [
                f"{key} is {first[key]} and {other.get(key)}" for key in first if first[key] != other.get(key)
            ]:
                raise ConfigError(
                    f"workers 0 and {worker} disagree: {'; '.join(different)}; give all workers the same config, "
                    f"version, data and run directory"
                )

    def environment(self) -> dict[str, Any]:
        """Everything besides (config, seed, step) that changes the bits of a training step. Checkpoints store it."""
        return {
            "tensorflow": tf.__version__,
            "onednn": str(int(stack.is_onednn_on())),
            "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
            "devices": f"{self.replicas} x {self.device_kind}",
            "hardware": self.hardware,
            "workers": self.workers,
        }


def describe_hardware(gpus: list[Any]) -> str:
    """What TensorFlow's libraries choose their kernels by: the models of the GPUs, or the CPU's instruction sets.

    The model of the CPU is included because its caches decide how sums are split.
    """
    if gpus:
        return ", ".join(
            sorted({tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus})
        )
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    sets = sorted(flag for flag in (flags[1].split() if flags else []) if INSTRUCTION_SETS.match(flag))
    limits = [f"{name}={os.environ[name]}" for name in ONEDNN_LIMITS if name in os.environ]
    return " ".join([model[1] if model else platform.machine(), *sets, *limits])


def make_strategy_of_workers(address: str) -> tf.distribute.Strategy:
    """Raises Stopped if another process took the port meanwhile."""
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.UnknownError as error:
        if "Could not start gRPC server" not in str(error):
            raise
        raise Stopped(f"TensorFlow cannot listen at {address}, {IN_USE}") from error


def check_devices(devices: list[str]) -> None:
    """Raises ConfigError, on all workers, unless all have the same number of devices of one kind."""
    if len(set(devices)) > 1:
        listed = ", ".join(f"worker {worker} has {each}" for worker, each in enumerate(devices))
        raise ConfigError(
            f"workers have different devices: {listed}; give all the same number, with CUDA_VISIBLE_DEVICES or "
            f"distribute.cpu_devices"
        )


def bypass_proxy(cluster: list[str]) -> None:
    """Lets gRPC reach the workers directly. It obeys http_proxy, which few proxies expect of it."""
    hosts = {address.rpartition(":")[0].strip("[]") for address in cluster}
    name = "no_grpc_proxy"  # gRPC reads it in place of no_proxy, in small letters only
    others = os.environ.get(name) or os.environ.get("no_proxy")
    os.environ[name] = ",".join([*([others] if others else []), *sorted(hosts)])


def wait_for_workers(cluster: list[str], own: int, seconds: int, warn: Callable[[str], None]) -> None:
    """Waits until every worker of `cluster` answers at its address. Raises LostWorker with those that do not.

    TensorFlow would wait for an hour, and name none. Until TensorFlow opens this worker's port, a socket here answers
    on it. So an answer means that the worker has reached this point. A worker stays until all have called it, too:
    none is then left behind that waits for one that has met it and died.
    """
    began = time.monotonic()
    deadline, calls = began + seconds, 0
    told = LATE
    missing = dict(enumerate(cluster))

    def describe_missing() -> str:
        return f"{', '.join(f'worker {i} ({address})' for i, address in missing.items())} of {len(cluster)} workers"

    with socket.socket() as listener:
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


@contextlib.contextmanager
def give_up_after(seconds: int) -> Iterator[None]:
    """Ends the process as a lost worker does if the block takes longer: its thread may be waiting in TensorFlow."""

    def give_up() -> None:
        print(
            f"hyperprior: another worker ended or stopped answering: all had met, but after {seconds} s they have not "
            f"joined; start the same command on all workers again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LostWorker.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
