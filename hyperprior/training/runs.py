"""Reads run directories: `hyperprior runs` lists runs, `compare` compares two.

Nothing here needs TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from rich.table import Table
from rich.text import Text

from hyperprior import config, storage
from hyperprior.errors import ConfigError
from hyperprior.image_files import walk
from hyperprior.metric_table import METRICS, RESULT, cell, read_record, read_row
from hyperprior.terminal import show_controls
from hyperprior.training import checkpoint

TAIL_BYTES = 2**18  # read from the end of metrics.jsonl, which grows with a run
FIELDS_OF_RESULT = {"trained_steps": int, "step": int, "split": str}
ENDINGS = {3: "bad data", 4: "diverged", 75: "stopped"}


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Finds the run directories among and below `folders`, sorted by name. Raises ConfigError if there is none."""
    runs: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no directory; give runs, or a directory of runs")
        runs |= {Path(inner) for inner, files in walk(folder) if {"config.yaml", "lock"} <= set(files)}
    if not runs:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: no run there; `hyperprior train CONFIG --run DIR` makes one"
        )
    return sorted(runs)


def summarise_all(folders: Sequence[Path], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """The summaries of all runs among and below `folders`. Runs that are moved or deleted meanwhile are left out.

    `warn` gets a message for each run whose config cannot be read, and is left out, too.
    """
    summaries = []
    for run in find_runs(folders):
        try:
            summaries.append(summarise(run))
        except ConfigError as error:
            if (run / "config.yaml").exists():
                warn(f"{run} is left out: {error}")
    return summaries


def summarise(run: Path) -> dict[str, Any]:
    """State, lambda, step, metrics of the final test or else the last validation, and size in bytes.

    `split`: where the metrics were measured, "val" or the split of the final test. `environment`: the machine at
    the run's last start, see `World.environment`.
    """
    settings = config.load_config(run / "config.yaml", [])
    rows = list(read_last_rows(run))
    saved = max(checkpoint.steps_in(run / "checkpoints"), default=0)
    reached = max([saved, *(row["step"] for row in rows if row["kind"] in ("train", "val"))])
    result = read_result(run)
    ended = next((row for row in reversed(rows) if row["kind"] in ("ended", "started", "train")), None)
    if ended and ended["kind"] != "ended":
        ended = None  # the run was resumed after its end
    if storage.is_locked(run):
        state, step, ended = "running", reached, None
    elif result and result["trained_steps"] >= reached:
        state, step = "finished", result["trained_steps"]
    elif ended:
        state, step = ENDINGS.get(ended["code"], f"ended with code {ended['code']}"), saved
    else:
        state, step = "cut off", saved
    values = result or next((row for row in reversed(rows) if row["kind"] == "val"), {})
    started: dict[str, Any] = next((row for row in reversed(rows) if row["kind"] == "started"), {})
    return {
        "run": str(run),
        "state": state,
        "step": step,
        "lambda": settings.loss.lmbda,
        "metric": settings.loss.metric,
        **{name: values[name] for name in RESULT if name in values},
        "split": values.get("split") or values.get("kind"),
        "environment": {name: value for name, value in started.items() if name not in ("kind", "step")},
        "bytes": count_bytes(run),
        **({"reason": ended["reason"]} if ended else {}),
    }


def count_bytes(folder: Path) -> int:
    """The size of all files below `folder`. Files may go while they are counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def read_last_rows(run: Path) -> Iterator[dict[str, Any]]:
    """Yields the last rows of metrics.jsonl, without damaged ones."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()
    except OSError:
        return
    yield from filter(None, map(read_row, lines))  # the first may begin before `start`; a kill may cut off the last


def read_result(run: Path) -> Optional[dict[str, Any]]:
    """The content of results.json. None if the file is missing or damaged, or if training did not write it."""
    try:
        result = read_record((run / "results.json").read_bytes())
    except OSError:
        return None
    if not result or not all(type(result.get(name)) is kind for name, kind in FIELDS_OF_RESULT.items()):
        return None
    wanted = {"lambda", *(("bpp", "psnr_db", "images") if "loss" in result else ())}
    return result if wanted <= result.keys() else None


def make_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """The table that `hyperprior runs` prints. `summaries`: results of `summarise`."""
    folder = os.path.commonpath([Path(summary["run"]).absolute().parent for summary in summaries] or [Path()])
    head = Text(show_controls(f"runs in {folder}"))  # a plain string could hold markup
    grid = Table(title=head, title_justify="left", box=None, header_style="bold", pad_edge=False)
    grid.add_column("run", overflow="fold")
    grid.add_column("state", no_wrap=True)
    columns = [name for name in RESULT if any(name in summary for summary in summaries)]
    split = ["split"] if len({summary["split"] for summary in summaries}) > 1 else []
    for title in ("lambda", "step", *(METRICS[name].title for name in columns), *split, "size"):
        grid.add_column(title, justify="right", no_wrap=True)
    for summary in summaries:
        cells = [os.path.relpath(summary["run"], folder), summary["state"]]
        cells += [f"{summary['lambda']:g}", f"{summary['step']:,}"]
        cells += [cell(name, summary.get(name)) for name in columns]
        cells += [summary[name] or "" for name in split]
        cells += [f"{summary['bytes'] / 2**20:,.0f} MiB"]
        grid.add_row(*map(show_controls, cells))
    return grid


def compare(a: Path, b: Path) -> dict[str, Any]:
    """The differences in config and environment, and the metrics of both runs, each as {name: [of a, of b]}.

    Raises ConfigError.
    """
    settings = []
    for run in (a, b):
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{run} is no run: it has no config.yaml; `hyperprior runs DIR` lists those below DIR")
        settings.append(config.load_config(run / "config.yaml", []))
    summaries = [summarise(run) for run in (a, b)]
    environments = [summary["environment"] for summary in summaries]
    machines = {name: [each.get(name) for each in environments] for name in environments[0] | environments[1]}
    return {
        "runs": [str(a), str(b)],
        "config": {d.key: [d.old, d.new] for d in config.differences(*settings)},
        "environment": {name: values for name, values in machines.items() if values[0] != values[1]},
        "metrics": {name: [summary.get(name) for summary in summaries] for name in ("state", "step", *RESULT, "split")},
    }


def make_comparison_table(comparison: dict[str, Any]) -> Table:
    """The table that `hyperprior compare` prints."""
    grid = Table("", *map(show_controls, comparison["runs"]), box=None, header_style="bold", pad_edge=False)
    for key, values in (comparison["config"] | comparison["environment"]).items():
        grid.add_row(key, *(show_controls(str(value)) for value in values))
    grid.add_row("")
    for name, values in comparison["metrics"].items():
        texts = (cell(name, v) if name in METRICS else f"{v:,}" if type(v) is int else v or "" for v in values)
        grid.add_row(name, *map(show_controls, texts))
    return grid
