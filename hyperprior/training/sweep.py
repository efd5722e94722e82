"""One training run per lambda, or a search for the lambda that gives a wanted rate or quality.

Each run is a separate `hyperprior train` in OUT/lambda-VALUE. So the same command, started again, resumes unfinished
runs and skips finished ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
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

from hyperprior import stack
from hyperprior.config import load_config
from hyperprior.errors import ConfigError, DataError, DivergedError, HyperpriorError, Stopped
from hyperprior.metric_table import METRICS, RESULT, cell
from hyperprior.storage import write_text
from hyperprior.terminal import Terminal
from hyperprior.training.runs import read_result

SEARCH_RUNS = 5
ERRORS = {error.exit_code: error for error in (ConfigError, DataError, DivergedError, Stopped)}
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Plan:
    """The runs to train: `config` with `overrides`, in `out`, `jobs` at a time. `warm_start`: each from the last."""

    config: Path
    overrides: Sequence[str]
    out: Path
    jobs: int = 1
    warm_start: bool = False
    quiet: bool = False  # do not print the steps of runs that have no log

    def folder(self, lmbda: float) -> Path:
        return self.out / f"lambda-{lmbda:g}"

    def check(self, lambdas: Sequence[float]) -> None:
        """Raises ConfigError if the plan cannot be trained."""
        if not lambdas:
            raise ConfigError("--lambdas is empty; 0.0035,0.013,0.0483 are three")
        if len({self.folder(lmbda) for lmbda in lambdas}) < len(lambdas):
            raise ConfigError(f"--lambdas {','.join(map('{:g}'.format, lambdas))}: a lambda is given twice; keep one")
        if any(override.startswith(("loss.lambda=", "train.start_from=")) for override in self.overrides):
            raise ConfigError("loss.lambda and train.start_from are set for each run; leave them out")
        if self.warm_start and self.jobs > 1:
            raise ConfigError(f"--warm-start needs the runs one after another; --jobs is {self.jobs}; leave one out")
        if (gpus := len(list_visible_gpus())) and self.jobs > gpus:
            raise ConfigError(f"--jobs is {self.jobs}, but there are {gpus} GPUs, and each run needs one; lower --jobs")
        if self.config.exists() and not self.config.is_file():
            raise ConfigError(f"{self.config} can be read only once, but each run reads the config; write it to a file")
        for lmbda in lambdas:
            load_config(self.config, [*self.overrides, f"loss.lambda={lmbda!r}"])


def list_visible_gpus() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in listed.split(",") if name.strip() and name.strip() != "-1"]
    return sorted(path.name[6:] for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def sweep(plan: Plan, lambdas: Sequence[float], terminal: Terminal) -> list[Path]:
    """Trains unfinished runs, writes OUT/sweep.md with all runs in OUT, and returns the folders.

    Raises ConfigError before it trains anything, and later the error that ended a run.
    """
    plan.check(lambdas)
    origins = [None, *lambdas[:-1]] if plan.warm_start else [None] * len(lambdas)
    train_all(plan, list(zip(lambdas, origins)), terminal)
    rows = [result_of(plan, lmbda) for lmbda in lambdas]
    results = map(read_result, plan.out.glob("lambda-*"))  # of earlier sweeps, too
    table = make_table(sorted((row for row in results if row and "loss" in row), key=lambda row: row["lambda"]))
    write_text(plan.out / "sweep.md", table)
    terminal.say(table.rstrip())
    runs = [plan.folder(lmbda) for lmbda in lambdas]
    terminal.tell([{"run": str(run), **row} for run, row in zip(runs, rows)])
    return runs


@dataclass(frozen=True)
class Target:
    """The target of a search: `scale` of a column of the result. `slope`: its growth with the logarithm of lambda on
    the paper's curve, used until there are two runs."""

    scale: Callable[[float], float]
    slope: float
    tolerance: float
    tolerance_text: str


TARGETS = {"bpp": Target(math.log, 0.6, 0.02, "2%"), "psnr_db": Target(float, 2.3, 0.1, "0.1 dB")}


def search_lambda(plan: Plan, column: str, value: float, terminal: Terminal) -> Path:
    """Trains with one lambda after another, first the config's, until `column` of the held-out images is `value`.

    `column`: bpp or psnr_db. With `warm_start` each run starts from the earlier run with the nearest lambda. Returns
    the folder of the run nearest to `value`. OUT/sweep.md lists all runs.
    """
    target = TARGETS[column]
    wanted = target.scale(value)
    lmbda = round_lambda(load_config(plan.config, list(plan.overrides)).loss.lmbda)
    plan.check([lmbda])
    measured: dict[float, float] = {}  # by lambda: the scaled column
    while len(measured) < SEARCH_RUNS and lmbda not in measured:
        nearest = min(measured, key=lambda other: abs(math.log(other / lmbda)), default=None)
        train_all(plan, [(lmbda, nearest if plan.warm_start else None)], terminal)
        measured[lmbda] = target.scale(result_of(plan, lmbda)[column])
        rows = [result_of(plan, each) for each in sorted(measured)]
        write_text(plan.out / "sweep.md", make_table(rows))
        best = min(measured, key=lambda each: abs(measured[each] - wanted))
        if abs(measured[best] - wanted) <= target.tolerance:
            break
        lmbda = next_lambda(target, measured, wanted)
    terminal.say(make_table(rows).rstrip())
    terminal.tell([{"run": str(plan.folder(best)), **result_of(plan, best)}])
    if abs(measured[best] - wanted) > target.tolerance:
        terminal.warn(f"lambda {best:g} came nearest, not within {target.tolerance_text}")
    terminal.say(f"{column} is {result_of(plan, best)[column]:.4g} at lambda {best:g}: {plan.folder(best)}")
    return plan.folder(best)


def next_lambda(target: Target, measured: dict[float, float], wanted: float) -> float:
    """The next lambda, on the line through the two results nearest to `wanted`, at most a factor of 8 away."""
    first, *others = sorted(measured, key=lambda lmbda: abs(measured[lmbda] - wanted))
    slope = target.slope
    if others:
        through_two = (measured[first] - measured[others[0]]) / math.log(first / others[0])
        slope = min(max(through_two, slope / 4), slope * 4)
    steps = min(max((wanted - measured[first]) / slope, -math.log(8)), math.log(8))
    return round_lambda(first * math.exp(steps))


def round_lambda(value: float) -> float:
    """Rounds to three digits, so that a search that is started again finds its own runs."""
    return float(f"{value:.3g}")


def result_of(plan: Plan, lmbda: float) -> dict[str, Any]:
    values = read_result(plan.folder(lmbda))
    if not values or "loss" not in values or not values["bpp"] > 0:
        raise ConfigError(f"{plan.folder(lmbda)} has no result: no image is held out; set data.test or data.test_split")
    return values


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the runs' results on their held-out images, with rates as estimated in training."""
    columns = [name for name in RESULT if any(name in row for row in rows)]
    lines = [["lambda", *(METRICS[name].title for name in columns), "step"], ["---"] * (len(columns) + 2)]
    lines += [
        [f"{row['lambda']:.5g}", *(cell(name, row.get(name)) for name in columns), str(row.get("step", ""))]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Processes --------------------------------------------------------------------------------------------------


def train_all(plan: Plan, runs: Sequence[tuple[float, Optional[float]]], terminal: Terminal) -> None:
    """Trains (lambda, lambda to start from or None) pairs, `jobs` at a time. Raises the error of the first that fails.

    If `jobs` is above 1, each run writes to OUT/lambda-VALUE.log and has its own GPU, if the machine has GPUs.
    """
    stack.start_tensorflow()  # without one that works, no run would begin
    waiting, running = list(runs), dict[int, tuple[subprocess.Popen[bytes], Path]]()
    failed: Optional[HyperpriorError] = None
    stopping = False
    told: set[int] = set()  # slots whose process was asked to stop

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True  # the loop tells the processes: one may have been started, but not be in `running` yet

    old_handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while running or (waiting and not failed and not stopping):
            for slot in range(plan.jobs):
                if slot not in running and waiting and not failed and not stopping:
                    lmbda, origin = waiting.pop(0)
                    terminal.say(f"lambda {lmbda:g}: {plan.folder(lmbda)}")
                    running[slot] = start_run(plan, lmbda, origin, slot), plan.folder(lmbda)
            for slot, (process, folder) in list(running.items()):
                if stopping and slot not in told:
                    told.add(slot)
                    process.send_signal(signal.SIGTERM)
                if (code := process.poll()) is not None:
                    del running[slot]
                    if code and not failed:
                        log = f"; {folder}.log gives the reason" if plan.jobs > 1 else ""
                        # A killed run can be resumed. A crash (code 1) would only happen again.
                        kind = Stopped if code < 0 or code > 128 else ERRORS.get(code, HyperpriorError)
                        failed = kind(f"{folder} ended with exit code {code}{log}")
            time.sleep(0.1)
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    if stopping:
        raise Stopped("stopped; start the same command again to continue")
    if failed:
        raise failed


def start_run(plan: Plan, lmbda: float, origin: Optional[float], slot: int) -> subprocess.Popen[bytes]:
    overrides = [*plan.overrides, f"loss.lambda={lmbda!r}"]
    if origin is not None:
        overrides.append(f"train.start_from={json.dumps(str(plan.folder(origin)))}")
    command = [sys.executable, "-m", "hyperprior", "train", str(plan.config), *overrides]
    command += ["--run", str(plan.folder(lmbda)), *(["--quiet"] if plan.quiet and plan.jobs == 1 else [])]
    environment = dict(os.environ)
    if plan.jobs > 1 and (gpus := list_visible_gpus()):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot]
    log = Path(f"{plan.folder(lmbda)}.log") if plan.jobs > 1 else None
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {plan.out} cannot be made: {error.strerror}; choose another") from error
    with log.open("ab") if log else contextlib.nullcontext() as output:
        # In a separate session, Ctrl-C reaches the run once, from this process. The run also ends if this process dies.
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )


def end_with_parent(parent: int) -> None:
    """Asks Linux to send SIGTERM to this process when its parent dies, which may have happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the sweep's handler would only take note of the signal
            os.kill(os.getpid(), signal.SIGTERM)
