"""`hyperprior`, with a fault or a probe put into it: FAULT=VALUE... COMMAND ARGUMENTS...

keys=FOLDER     writes the sample keys of every step that was trained on to FOLDER/worker-N.txt
nan=STEP,...    worker 1's noise, and so its loss and gradients, is NaN at these steps
clock=SECONDS   each look at the clock jumps that far forth, then back
slow=SECONDS    each chunk of steps takes that much longer
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
    from hyperprior import train

    original = train.Trainer.train_chunk

    def train_chunk(self: train.Trainer, chunk: train.Chunk, track: Any) -> bool:
        begin = self.state.step
        stopped = original(self, chunk, track)
        with Path(folder, f"worker-{WORKER}.txt").open("a") as file:
            for batch, step in zip(chunk.batches, range(begin, self.state.step)):
                file.write(f"{step} {json.dumps(batch.keys)}\n")
        return stopped

    train.Trainer.train_chunk = train_chunk  # type: ignore[method-assign]


def nan(steps: str) -> None:
    import tensorflow as tf

    from hyperprior import model

    original = model.uniform_noise

    def uniform_noise(shape: Any, seed: int, step: tf.Tensor, lanes: tf.Tensor) -> tf.Tensor:
        now = tf.reduce_any([step == int(bad) for bad in steps.split(",")])
        return tf.where(now & (WORKER == 1), float("nan"), original(shape, seed, step, lanes))

    model.uniform_noise = uniform_noise


def clock(seconds: str) -> None:
    original, looks = time.time, itertools.count()
    time.time = lambda: original() + next(looks) % 2 * float(seconds)  # type: ignore[assignment]


def slow(seconds: str) -> None:
    from hyperprior import train

    original = train.Trainer.train_chunk

    def train_chunk(self: train.Trainer, chunk: train.Chunk, track: Any) -> bool:
        time.sleep(float(seconds))
        return original(self, chunk, track)

    train.Trainer.train_chunk = train_chunk  # type: ignore[method-assign]


if __name__ == "__main__":
    from hyperprior import cli

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    rest = list(itertools.dropwhile(lambda argument: "=" in argument, sys.argv[1:]))
    for fault in sys.argv[1 : len(sys.argv) - len(rest)]:
        name, _, value = fault.partition("=")
        globals()[name](value)
    sys.argv[1:] = rest
    cli.use_the_cpu_well = lambda *precision: None
    cli.main()
