"""Runs `hyperprior` with faults or probes: FAULT=VALUE... COMMAND ARGUMENTS...

keys=FOLDER     writes the sample keys of every training step to FOLDER/worker-N.txt
nan=STEP,...    the noise of worker 1 is NaN at these steps, and so are its loss and gradients
clock=SECONDS   every second reading of the clock is this much later
slow=SECONDS    each chunk of steps takes this much longer
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WORKER = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)


def keys(folder: str) -> None:
    from hyperprior.training import loop

    original = loop.Trainer.finish_call

    def finish_call(self: loop.Trainer, call: Any, *more: Any) -> bool:
        begin = self.state.step
        stopped = original(self, call, *more)
        with Path(folder, f"worker-{WORKER}.txt").open("a") as file:
            for batch, step in zip(call.chunk.batches, range(begin, self.state.step)):
                file.write(f"{step} {json.dumps(batch.keys)}\n")
        return stopped

    loop.Trainer.finish_call = finish_call  # type: ignore[method-assign]


def nan(steps: str) -> None:
    import tensorflow as tf

    from hyperprior.model import priors

    original = priors.uniform_noise

    def uniform_noise(shape: Any, seed: int, step: tf.Tensor, lanes: tf.Tensor) -> tf.Tensor:
        now = tf.reduce_any([step == int(bad) for bad in steps.split(",")])
        return tf.where(now & (WORKER == 1), float("nan"), original(shape, seed, step, lanes))

    priors.uniform_noise = uniform_noise


def clock(seconds: str) -> None:
    original, readings = time.time, itertools.count()
    time.time = lambda: original() + next(readings) % 2 * float(seconds)  # type: ignore[assignment]


def slow(seconds: str) -> None:
    from hyperprior.training import calls

    original = calls.Calls._run

    def run(self: calls.Calls, chunk: Any) -> Any:
        time.sleep(float(seconds))
        return original(self, chunk)

    calls.Calls._run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    from hyperprior import cli, stack

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    rest = list(itertools.dropwhile(lambda argument: "=" in argument, sys.argv[1:]))
    for fault in sys.argv[1 : len(sys.argv) - len(rest)]:
        name, _, value = fault.partition("=")
        globals()[name](value)
    sys.argv[1:] = rest
    stack.restart_with_allocator = lambda: None
    cli.main()
