"""What became of runs: `hyperprior runs` lists them, `hyperprior compare` shows where two differ.

Everything is read from the run directories; nothing here needs TensorFlow.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from rich.table import Table

from hyperprior import config
from hyperprior.errors import ConfigError

TAIL_BYTES = 2**18  # of metrics.jsonl, which grows with a run
SHOWN = {"lambda": "{:g}", "step": "{:,}", "loss": "{:.4f}", "bpp": "{:.4f}", "psnr_db": "{:.2f}", "ms_ssim": "{:.4f}"}
ENDINGS = {3: "bad data", 4: "diverged", 75: "stopped"}


def find(folders: Sequence[Path]) -> list[Path]:
    """The run directories among and below `folders`, by name. Raises ConfigError."""
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no directory; give runs, or a directory of runs")
        found |= {path.parent for path in folder.rglob("config.yaml") if (path.parent / "lock").exists()}
    if not found:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: no run there; `hyperprior train CONFIG --run DIR` makes one"
        )
    return sorted(found)


def describe(run: Path) -> dict[str, Any]:
    """State, lambda, step, metrics of the last validation or the final test, size in bytes."""
    settings = config.load_config(run / "config.yaml", [])
    rows = list(last_rows(run))
    steps = [int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob("step-*.npz")]
    saved = max(steps, default=0)
    reached = max([saved, *(row["step"] for row in rows if row["kind"] in ("train", "val"))])
    result = read_result(run)
    ended = next((row for row in reversed(rows) if row["kind"] in ("ended", "train")), None)
    if is_held(run):
        state, step = "running", reached
    elif result and result["trained_steps"] >= reached:
        state, step = "finished", result["trained_steps"]
    elif ended and ended["kind"] == "ended":
        state, step = ENDINGS.get(ended["code"], f"ended with code {ended['code']}"), saved
    else:
        state, step = "cut off", saved
    shown = result or next((row for row in reversed(rows) if row["kind"] == "val"), {})
    return {
        "run": str(run),
        "state": state,
        "step": step,
        "lambda": settings.loss.lmbda,
        "metric": settings.loss.metric,
        **{name: shown[name] for name in ("loss", "bpp", "psnr_db", "ms_ssim") if name in shown},
        "bytes": sum(path.stat().st_size for path in run.rglob("*") if path.is_file()),
        **({"reason": ended["reason"]} if ended and ended["kind"] == "ended" and state != "running" else {}),
    }


def last_rows(run: Path) -> Iterator[dict[str, Any]]:
    """The last lines of metrics.jsonl that are whole."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(start)
        for number, line in enumerate(file.read().splitlines()):
            try:
                row = json.loads(line)
                row["kind"], row["step"]
                yield row
            except (ValueError, TypeError, KeyError):
                if number or not start:  # the last, cut off by a kill
                    return


def read_result(run: Path) -> Optional[dict[str, Any]]:
    """What results.json holds; None where there is none, or none that training wrote."""
    try:
        found = json.loads((run / "results.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("trained_steps"), int) else None


def is_held(run: Path) -> bool:
    """Whether a process trains there now: it holds the lock."""
    try:
        with (run / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def table(found: Sequence[dict[str, Any]]) -> Table:
    grid = Table("run", "state", box=None, header_style="bold", pad_edge=False)
    shown = [name for name in SHOWN if any(name in row for row in found)]
    for name in [*shown, "size"]:
        grid.add_column({"psnr_db": "PSNR, dB", "ms_ssim": "MS-SSIM"}.get(name, name), justify="right")
    for row in found:
        values = [SHOWN[name].format(row[name]) if name in row else "" for name in shown]
        grid.add_row(row["run"], row["state"], *values, f"{row['bytes'] / 2**20:,.0f} MiB")
    return grid


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Keys of the config that differ, and the metrics of both: {name: [of a, of b]}. Raises ConfigError."""
    settings = []
    for run in (a, b):
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{run} is no run: it has no config.yaml; `hyperprior runs DIR` lists those below DIR")
        settings.append(config.load_config(run / "config.yaml", []))
    facts = [describe(run) for run in (a, b)]
    names = ("state", "step", "loss", "bpp", "psnr_db", "ms_ssim")
    return {
        "runs": [str(a), str(b)],
        "config": {key: [was, now] for key, was, now, _ in config.differences(*settings)},
        "metrics": {name: [fact.get(name) for fact in facts] for name in names},
    }


def comparison(found: dict[str, Any]) -> Table:
    grid = Table("", *found["runs"], box=None, header_style="bold", pad_edge=False)
    for key, values in found["config"].items():
        grid.add_row(key, *map(str, values))
    grid.add_row("")
    for name, values in found["metrics"].items():
        shown = [SHOWN[name].format(v) if name in SHOWN and v is not None else str(v or "") for v in values]
        grid.add_row(name, *shown)
    return grid
