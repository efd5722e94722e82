"""The job: one run per lambda and their curve, or the lambda that gives a wanted rate or quality.

Each run is a `hyperprior train` of its own in OUT/lambda-VALUE, so the same command goes on where it stopped, and
passes over what is done. Nothing here needs TensorFlow.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from hyperprior.checkpoint import write_text
from hyperprior.config import load_config
from hyperprior.errors import ConfigError, DataError, DivergedError, HyperpriorError, Stopped
from hyperprior.runs import read_result
from hyperprior.terminal import Terminal

SEARCH_RUNS = 5
ERRORS = {error.exit_code: error for error in (ConfigError, DataError, DivergedError, Stopped)}
PR_SET_PDEATHSIG = 1
COLUMNS = {"lambda": ".5g", "bpp": ".4f", "psnr_db": ".3f", "ms_ssim": ".5f", "loss": ".4f", "step": "d"}


@dataclass(frozen=True)
class Plan:
    """What to train: `config` with `overrides`, in `out`; `jobs` runs at a time; `warm_start`: each from the last."""

    config: Path
    overrides: Sequence[str]
    out: Path
    jobs: int = 1
    warm_start: bool = False
    quiet: bool = False  # about the steps of runs that have no log

    def folder(self, lmbda: float) -> Path:
        return self.out / f"lambda-{lmbda:g}"

    def check(self, lambdas: Sequence[float]) -> None:
        """Raises ConfigError."""
        if not lambdas:
            raise ConfigError("--lambdas is empty; 0.0035,0.013,0.0483 are three")
        if len({self.folder(lmbda) for lmbda in lambdas}) < len(lambdas):
            raise ConfigError(f"--lambdas {','.join(map('{:g}'.format, lambdas))}: a lambda is given twice; keep one")
        if any(override.startswith(("loss.lambda=", "train.start_from=")) for override in self.overrides):
            raise ConfigError("loss.lambda and train.start_from are set for each run; leave them out")
        if self.warm_start and self.jobs > 1:
            raise ConfigError(
                f"--warm-start needs the runs one after another; --jobs is {self.jobs}; leave one of them out"
            )
        if (gpus := len(visible_gpus())) and self.jobs > gpus:
            raise ConfigError(
                f"--jobs is {self.jobs}, and this machine shows {gpus} GPUs; each run needs one; lower it"
            )
        for lmbda in lambdas:
            load_config(self.config, [*self.overrides, f"loss.lambda={lmbda!r}"])


def visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() and name.strip() != "-1"]
    return sorted(path.name[6:] for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def sweep(plan: Plan, lambdas: Sequence[float], terminal: Terminal) -> list[Path]:
    """Trains what is not done yet, writes OUT/sweep.md, and returns the runs' folders.

    Raises ConfigError before anything is trained, and what ended a run.
    """
    plan.check(lambdas)
    before = [None, *lambdas[:-1]] if plan.warm_start else [None] * len(lambdas)
    train(plan, list(zip(lambdas, before)), terminal)
    rows = [result(plan, lmbda) for lmbda in lambdas]
    write_text(plan.out / "sweep.md", table(rows))
    terminal.say(table(rows).rstrip())
    runs = [plan.folder(lmbda) for lmbda in lambdas]
    terminal.tell([{"run": str(run), **row} for run, row in zip(runs, rows)])
    return runs


@dataclass(frozen=True)
class Target:
    """What a search compares: `scale` of a column of the result. `slope`: how it grows with the logarithm of lambda
    on the paper's curve, until two runs tell."""

    column: str
    scale: Callable[[float], float]
    slope: float
    tolerance: float
    spoken: str


TARGETS = {"bpp": Target("bpp", math.log, 0.6, 0.02, "2%"), "psnr_db": Target("psnr_db", float, 2.3, 0.1, "0.1 dB")}


def search(plan: Plan, column: str, value: float, terminal: Terminal) -> Path:
    """Trains with one lambda after another, first the config's, until `column` of the held-out images is `value`.

    `column`: bpp or psnr_db. With `warm_start` each run starts from the nearest before it. Returns the folder of the
    run that came nearest; OUT/sweep.md has them all.
    """
    target = TARGETS[column]
    wanted = target.scale(value)
    lmbda = round_lambda(load_config(plan.config, list(plan.overrides)).loss.lmbda)
    plan.check([lmbda])
    found: dict[float, float] = {}  # lambda: the scaled column
    while len(found) < SEARCH_RUNS and lmbda not in found:
        near = min(found, key=lambda other: abs(math.log(other / lmbda)), default=None)
        train(plan, [(lmbda, near if plan.warm_start else None)], terminal)
        found[lmbda] = target.scale(result(plan, lmbda)[column])
        rows = [result(plan, each) for each in sorted(found)]
        write_text(plan.out / "sweep.md", table(rows))
        best = min(found, key=lambda each: abs(found[each] - wanted))
        if abs(found[best] - wanted) <= target.tolerance:
            break
        lmbda = following(target, found, wanted)
    terminal.say(table(rows).rstrip())
    terminal.tell([{"run": str(plan.folder(best)), **result(plan, best)}])
    if abs(found[best] - wanted) > target.tolerance:
        terminal.warn(f"lambda {best:g} came nearest, not within {target.spoken}")
    terminal.say(f"{column} is {result(plan, best)[column]:.4g} at lambda {best:g}: {plan.folder(best)}")
    return plan.folder(best)


def following(target: Target, found: dict[float, float], wanted: float) -> float:
    """The next lambda: on the line through the two results nearest to what is wanted; at most a factor of 8 away."""
    first, *others = sorted(found, key=lambda lmbda: abs(found[lmbda] - wanted))
    slope = target.slope
    if others:
        measured = (found[first] - found[others[0]]) / math.log(first / others[0])
        slope = min(max(measured, slope / 4), slope * 4)
    steps = min(max((wanted - found[first]) / slope, -math.log(8)), math.log(8))
    return round_lambda(first * math.exp(steps))


def round_lambda(value: float) -> float:
    """To three digits, so that a search started again meets its own runs."""
    return float(f"{value:.3g}")


def result(plan: Plan, lmbda: float) -> dict[str, Any]:
    found = read_result(plan.folder(lmbda))
    if not found or "bpp" not in found:
        raise ConfigError(
            f"{plan.folder(lmbda)} has no result: no images are held out; set data.test or data.test_split"
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the results of the runs on their held-out images, as estimated in training."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[format(row[c], COLUMNS[c]) if c in row else "" for c in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Processes --------------------------------------------------------------------------------------------------


def train(plan: Plan, runs: Sequence[tuple[float, Optional[float]]], terminal: Terminal) -> None:
    """Trains (lambda, lambda to start from or None), `jobs` at a time; raises what ended the first that failed.

    Those that run at a time write to OUT/lambda-VALUE.log, and have a GPU each where there are any.
    """
    waiting, running = list(runs), dict[int, tuple[subprocess.Popen[bytes], Path]]()
    failed: Optional[HyperpriorError] = None
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and not failed and not stopping):
            for slot in range(plan.jobs):
                if slot not in running and waiting and not failed and not stopping:
                    lmbda, origin = waiting.pop(0)
                    terminal.say(f"lambda {lmbda:g}: {plan.folder(lmbda)}")
                    running[slot] = start(plan, lmbda, origin, slot), plan.folder(lmbda)
            for slot, (process, folder) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    if code and not failed:
                        log = f"; {folder}.log tells why" if plan.jobs > 1 else ""
                        # A kill leaves what a run can go on from; a crash, code 1, would only come again.
                        kind = Stopped if code < 0 or code > 128 else ERRORS.get(code, HyperpriorError)
                        failed = kind(f"{folder} ended with exit code {code}{log}")
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping:
        raise Stopped("stopped; start the same command again to go on")
    if failed:
        raise failed


def start(plan: Plan, lmbda: float, origin: Optional[float], slot: int) -> subprocess.Popen[bytes]:
    overrides = [*plan.overrides, f"loss.lambda={lmbda!r}"]
    if origin is not None:
        overrides.append(f"train.start_from={plan.folder(origin)}")
    command = [sys.executable, "-m", "hyperprior", "train", str(plan.config), *overrides]
    command += ["--run", str(plan.folder(lmbda)), *(["--quiet"] if plan.quiet and plan.jobs == 1 else [])]
    environment = dict(os.environ)
    if plan.jobs > 1 and (gpus := visible_gpus()):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot]
    log = Path(f"{plan.folder(lmbda)}.log") if plan.jobs > 1 else None
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {plan.out} cannot be made: {error.strerror}; choose another") from error
    with log.open("ab") if log else contextlib.nullcontext() as output:
        # A session of its own: Ctrl-C reaches it once, from here; and it ends with this process, however that ends.
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
