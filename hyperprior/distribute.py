"""The strategy and this worker's place in it, from TF_CONFIG or nothing.

Everything distributed that the rest of the package needs is here: how many replicas there are, which lanes
of the global batch this worker owns, who is chief, and sums over workers.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import tensorflow as tf

from hyperprior import config
from hyperprior.errors import ConfigError


class World:
    """`strategy` and what follows from it. One per process, made before any other use of TensorFlow."""

    def __init__(self, settings: config.Distribute, batch_size: int):
        self.workers, self.worker = tf_config_place()
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
        if self.workers > 1 and (settings.cpu_devices or 1) > 1:
            raise ConfigError(
                f"distribute.cpu_devices is {settings.cpu_devices} but TF_CONFIG names {self.workers} workers, which "
                f"use one CPU device each; leave cpu_devices out"
            )
        local_replicas = len(gpus) or settings.cpu_devices or 1
        self.local_replicas = local_replicas
        self.replicas = local_replicas * self.workers
        if batch_size % self.replicas:
            below, above = (
                batch_size // self.replicas * self.replicas,
                (batch_size // self.replicas + 1) * self.replicas,
            )
            fitting = f"{below} and {above} are" if below else f"{above} is"
            raise ConfigError(
                f"train.batch_size is {batch_size}; it must be divisible by {self.replicas} replicas ({fitting})"
            )
        self.strategy: tf.distribute.Strategy
        if self.workers > 1:
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        elif local_replicas > 1 or gpus:
            self.strategy = tf.distribute.MirroredStrategy([f"{self.device_kind}:{i}" for i in range(local_replicas)])
        else:
            self.strategy = tf.distribute.get_strategy()
        if self.strategy.num_replicas_in_sync != self.replicas:
            raise ConfigError(
                f"TensorFlow trains on {self.strategy.num_replicas_in_sync} replicas where {self.replicas} were "
                f"expected: every worker needs the same number of GPUs, or none"
            )
        self.batch_size, self.replica_batch = batch_size, batch_size // self.replicas

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

    def environment(self) -> dict[str, Any]:
        """What the bits of a training step depend on besides (config, seed, step); kept in checkpoints."""
        return {
            "tensorflow": tf.__version__,
            "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1"),
            "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
            "devices": f"{self.replicas} x {self.device_kind}",
            "workers": self.workers,
        }


def tf_config_place() -> tuple[int, int]:
    """(number of workers, index of this one) from TF_CONFIG; raises ConfigError if it is malformed."""
    text = os.environ.get("TF_CONFIG")
    if not text:
        return 1, 0
    try:
        tree = json.loads(text)
        cluster, task = tree.get("cluster", {}), tree.get("task", {})
        chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
        if not chiefs and not workers:
            return 1, 0
        count, index = len(chiefs) + len(workers), int(task["index"])
        if task["type"] not in ("chief", "worker") or not 0 <= index < len(cluster[task["type"]]):
            raise ConfigError(f"TF_CONFIG's task is {task}; it must be a chief or worker that its cluster lists")
        return count, index + (len(chiefs) if task["type"] == "worker" else 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"TF_CONFIG is {text!r}: it must be JSON with cluster and task, as TensorFlow documents ({error!r})"
        ) from error
