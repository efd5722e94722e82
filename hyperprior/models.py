"""Which model is meant: one in the box, a file or directory that `export` wrote, or a run.

The models in the box are q1, q2, …, by rising quality; `hyperprior/models/README.md` is their card. Nothing here
needs TensorFlow.
"""

from __future__ import annotations

import functools
import json
import os
import zipfile
from pathlib import Path
from typing import Any, Optional

import numpy as np

from hyperprior.errors import ConfigError, DataError

FORMAT = "model 1"
WEIGHTS = "model.npz"  # in a model directory
BOX = Path(__file__).parent / "models"
DEFAULT_QUALITY = 3


@functools.lru_cache
def in_the_box() -> dict[str, Path]:
    return {path.stem: path for path in sorted(BOX.glob("q*.npz"))}


def find(model: str | Path) -> Path:
    """The .npz of a model: by a name such as q3, as a file, in a model directory, or in a run. Raises ConfigError."""
    path = Path(model)
    if str(model) in in_the_box() and not path.exists():
        return in_the_box()[str(model)]
    for candidate in (path, path / WEIGHTS, path / "model" / WEIGHTS):
        if candidate.is_file():
            return candidate
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} holds no exported model; `hyperprior export {path}` makes one")
    known = f", or one of {', '.join(in_the_box())}" if in_the_box() else ""
    raise ConfigError(f"{path} is no model: give a run, what `hyperprior export RUN` wrote{known}")


def chosen(model: Optional[str], quality: Optional[int] = None) -> str:
    """What --model, --quality and HYPERPRIOR_MODEL come to, in this order. Raises ConfigError."""
    if model and quality is not None:
        raise ConfigError(f"--model {model} and --quality {quality} are both given; keep one")
    if quality is None and (named := model or os.environ.get("HYPERPRIOR_MODEL")):
        return named
    name = f"q{DEFAULT_QUALITY if quality is None else quality}"
    if name not in in_the_box():
        raise ConfigError(f"--quality {quality} is not in the box; {', '.join(in_the_box())} are (q1: --quality 1)")
    return name


def of_fingerprint(fingerprint: str) -> Optional[str]:
    """The name of the model in the box with this fingerprint."""
    return next((name for name in in_the_box() if describe(name)["fingerprint"] == fingerprint), None)


def describe(model: str | Path) -> dict[str, Any]:
    """What export noted: fingerprint, format, dimensions, lambda, step, cost of exactness.

    Raises ConfigError if there is no model, DataError if it is damaged.
    """
    path = find(model)
    try:
        with np.load(path, allow_pickle=False) as archive:  # reads this one entry
            description = json.loads(archive["state"].tobytes())
        found = {"fingerprint": description["fingerprint"], "format": description["format"]}
        return {**found, **description["config"]["model"], **description["config"]["loss"], **description["info"]}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}; export the model again") from error
