"""Calls of the training graph, two in flight: a call starts before the result of the call before it is read.

So the devices have work while the host reports. What a call may do depends on the call before it: the verdicts
`stopped` and `failed` go from call to call without the host. After a stop, or after too many failed steps, a call that
was started already changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from hyperprior.data.stream import Counts
from hyperprior.training.feed import Chunk
from hyperprior.training.steps import Steps
from hyperprior.training.stop import StopRequest


class Outcome(NamedTuple):
    """The result of a call, in the host's memory: see `Steps`. `ended`: time.perf_counter() when it was there."""

    done: int
    stopped: bool
    failed: int
    sums: np.ndarray
    counts: Counts
    all_reduce: float
    ended: float


class Call(NamedTuple):
    """A call in flight: its input, and its result when it is there."""

    chunk: Chunk
    outcome: Future[Outcome]

    def idle_since(self) -> float:
        """When the devices ended this call, or now if they have not."""
        return self.outcome.result().ended if self.outcome.done() else time.perf_counter()


class Calls:
    """Runs calls in a thread, in order, and reads their results in another one. Use it as a context.

    No other thread may let workers meet (`World.sum_workers`, `gather`) while a call runs: `drain` first.
    """

    def __init__(self, train_steps: Callable[..., Steps], stop: StopRequest, failed: int):
        self.train_steps, self.stop = train_steps, stop
        self.verdict = tf.constant(False), tf.constant(float(failed))
        self.runner, self.reader = ThreadPoolExecutor(1, "calls"), ThreadPoolExecutor(1, "results")

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: object) -> None:
        for thread in (self.runner, self.reader):
            thread.shutdown(cancel_futures=True)

    def start(self, chunk: Chunk) -> Call:
        return Call(chunk, self.reader.submit(self._read, self.runner.submit(self._run, chunk)))

    def drain(self) -> None:
        """Waits until every call that was started has run."""
        self.runner.submit(lambda: None).result()

    def _run(self, chunk: Chunk) -> Steps:
        if chunk.error:  # not earlier: the call before it has good input
            self.stop.request(chunk.error)
        steps = self.train_steps(chunk.images, chunk.counts, tf.constant(chunk.step, tf.int64), *self.verdict)
        self.verdict = steps.stopped, steps.failed
        return steps

    @staticmethod
    def _read(running: Future[Steps]) -> Outcome:
        steps = running.result()
        counts = Counts(*map(int, steps.counts.numpy()))
        verdict = int(steps.done), bool(steps.stopped), int(steps.failed)
        return Outcome(*verdict, steps.metrics.numpy(), counts, float(steps.all_reduce), time.perf_counter())
