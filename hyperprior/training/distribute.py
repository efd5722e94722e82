"""The distribution strategy, and this worker's place in it. Without TF_CONFIG there is one worker.

The rest of the package gets everything about distribution from here: the number of replicas, this worker's lanes of
the global batch, the chief, sums over workers, and checks that the workers agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TypeVar

import numpy as np
import tensorflow as tf

from hyperprior import config, errors, stack
from hyperprior.errors import ConfigError, HyperpriorError
from hyperprior.training import meeting

T = TypeVar("T")

# Flags of /proc/cpuinfo that stand for instructions on vectors and matrices.
INSTRUCTION_SETS = re.compile("sse4|avx|amx|fma|f16c|asimd|sve|sme(?!p)|bf16|i8mm")
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # variables that oneDNN reads


class World:
    """The `strategy`, and all values that follow from it. A command makes one before any other use of TensorFlow."""

    def __init__(self, settings: config.Distribute, batch_size: int, warn: Callable[[str], None] = print):
        cluster, self.worker = meeting.read_tf_config()
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
            meeting.bypass_proxy(cluster)
            meeting.wait_for_workers(cluster, self.worker, settings.start_timeout, warn)
            cpu_devices = stack.use_cpu_devices(settings.cpu_devices or 1)
            with meeting.give_up_after(meeting.JOINED_AFTER), stack.join_without_lock(), cpu_devices:
                self.strategy = meeting.make_strategy_of_workers(cluster[self.worker])
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
                raise getattr(errors, failure["type"])(f"worker {worker}: {failure['message']}")

    def check_same(self, values: dict[str, Any]) -> None:
        """Raises ConfigError, on all workers, unless all have the same flat `values`. Names the differences."""
        first, *others = self.gather(values)
        for worker, other in enumerate(others, 1):
            if different := [key for key in first if first[key] != other.get(key)]:
                listed = "; ".join(f"{key} is {first[key]} and {other.get(key)}" for key in different)
                raise ConfigError(
                    f"workers 0 and {worker} disagree: {listed}; give all workers the same config, "
                    f"version, data and run directory"
                )

    def environment(self) -> dict[str, Any]:
        """Everything besides (config, seed, step) that changes the bits of a training step. Checkpoints store it."""
        return {
            "tensorflow": tf.__version__,
            "onednn": str(int(stack.is_onednn_on())),
            "intra_op_threads": count_threads(),
            "devices": f"{self.replicas} x {self.device_kind}",
            "hardware": self.hardware,
            "workers": self.workers,
        }


def count_threads() -> int:
    """The number of threads inside an operation: from the config, or as TensorFlow chooses it."""
    setting = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
    number = tf.config.threading.get_intra_op_parallelism_threads() or (int(setting) if setting.isdecimal() else 0)
    return number or stack.count_cores()


def describe_hardware(gpus: list[Any]) -> str:
    """The hardware by which TensorFlow's libraries choose kernels: the GPUs' models, or the CPU's instruction sets.

    The model of the CPU is included because its caches decide how sums are split.
    """
    if gpus:
        details = map(tf.config.experimental.get_device_details, gpus)
        return ", ".join(sorted({each.get("device_name", "GPU") for each in details}))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    sets = sorted(flag for flag in (flags[1].split() if flags else []) if INSTRUCTION_SETS.match(flag))
    limits = [f"{name}={os.environ[name]}" for name in ONEDNN_LIMITS if name in os.environ]
    return " ".join([model[1] if model else platform.machine(), *sets, *limits])


def check_devices(devices: list[str]) -> None:
    """Raises ConfigError, on all workers, unless all have the same number of devices of one kind."""
    if len(set(devices)) > 1:
        listed = ", ".join(f"worker {worker} has {each}" for worker, each in enumerate(devices))
        raise ConfigError(
            f"workers have different devices: {listed}; give all the same number, with CUDA_VISIBLE_DEVICES or "
            f"distribute.cpu_devices"
        )
