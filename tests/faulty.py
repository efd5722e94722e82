"""Runs `hyperprior` with faults or probes: FAULT=VALUE... COMMAND ARGUMENTS...

keys=FOLDER     writes the sample keys of every training step to FOLDER/worker-N.txt
nan=STEP,...    the noise of worker 1 is NaN at these steps, and so are its loss and gradients
clock=SECONDS   every second reading of the clock is this much later
slow=SECONDS    each chunk of steps takes this much longer
die=WORKER,NAME this worker kills itself with SIGKILL when it calls a function that marks a phase: see `PHASES`
halt=STEP       the run gets SIGTERM after this step
kill=COUNT      SIGKILL at this file operation of Python in the folder `r`, counted from 1
full=COUNT,SIZE from that operation on no file can grow beyond SIZE bytes, as on a full disk
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

WORKER = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)

# Phases of a run, each with the function whose call begins it.
PHASES = {
    "meeting": ("hyperprior.training.meeting", "wait_for_workers"),
    "strategy": ("hyperprior.stack", "use_cpu_devices"),
    "check": ("hyperprior.training.distribute", "World.check_same"),
    "tracing": ("hyperprior.training.loop", "build_model"),
    "first sum": ("hyperprior.training.calls", "Calls._run"),
    "steps": ("hyperprior.training.loop", "Trainer.finish_call"),
    "validation": ("hyperprior.training.validation", "Evaluator.compute_means"),
    "best": ("hyperprior.training.loop", "Trainer.write_best"),
    "checkpoint": ("hyperprior.training.loop", "Trainer.write_checkpoint"),
    "test": ("hyperprior.training.loop", "Trainer.evaluate"),
    "end": ("hyperprior.training.progress", "Progress.close"),
    "export": ("hyperprior.training.export", "make_exported"),
}


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


def die(value: str) -> None:
    victim, _, phase = value.partition(",")
    if int(victim) != WORKER:
        return
    module, path = PHASES[phase]
    *parts, name = path.split(".")
    owner = importlib.import_module(module)
    for part in parts:
        owner = getattr(owner, part)

    def kill_itself(*arguments: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, kill_itself)


def halt(step: str) -> None:
    from hyperprior.training import loop

    original = loop.Trainer.finish_call

    def finish_call(self: loop.Trainer, *arguments: Any) -> bool:
        stopped = original(self, *arguments)
        if self.state.step >= int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return stopped

    loop.Trainer.finish_call = finish_call  # type: ignore[method-assign]


def kill(count: str) -> None:
    at_operation(int(count), lambda: os.kill(os.getpid(), signal.SIGKILL))


def full(value: str) -> None:
    count, size = map(int, value.split(","))
    at_operation(count, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def at_operation(count: int, act: Callable[[], object]) -> None:
    """Calls `act` before the file operation number `count` in the folder `r`."""
    operations = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            if Path(path).parts[:1] == ("r",) and next(operations) == count:
                act()

    sys.addaudithook(hook)


def apply(faults: Iterable[str]) -> None:
    for fault in faults:
        name, _, value = fault.partition("=")
        globals()[name](value)


if __name__ == "__main__":
    from hyperprior import cli, stack

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    stack.start_tensorflow()  # as a command does, before a fault imports TensorFlow with other kernels
    rest = list(itertools.dropwhile(lambda argument: "=" in argument, sys.argv[1:]))
    apply(sys.argv[1 : len(sys.argv) - len(rest)])
    sys.argv[1:] = rest
    stack.restart_with_allocator = lambda: None
    cli.main()
