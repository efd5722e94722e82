"""The search for a model: one in the box, a file or directory that `export` wrote, or the model of a run.

The models in the box are q1, q2, … by rising quality, and for MS-SSIM q1-ms-ssim, …. They are in this directory;
README.md is their model card, and released.json names the models of every release by fingerprint.
This module does not need TensorFlow.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, Optional

from hyperprior import storage
from hyperprior.errors import ConfigError, DataError

FORMAT = "model 1"
WEIGHTS = "model.npz"  # in a model directory
BOX = Path(__file__).parent
DEFAULT_QUALITY = 3


@functools.lru_cache
def in_the_box() -> dict[str, Path]:
    return {path.stem: path for path in sorted(BOX.glob("q*.npz"), key=lambda path: (len(path.stem), path.stem))}


def find(model: str | Path) -> Path:
    """The .npz of a model: a file, a model directory, a run, or else a name such as q3. Raises ConfigError."""
    path = Path(model)
    for candidate in (path, path / WEIGHTS, path / "model" / WEIGHTS):
        if candidate.is_file():
            return candidate
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} holds no exported model; `hyperprior export {path}` makes one")
    if str(model) in in_the_box():
        return in_the_box()[str(model)]
    known = f", or one of {', '.join(in_the_box())}" if in_the_box() else ""
    raise ConfigError(f"{path} is no model: give a run, a model that `hyperprior export RUN` wrote{known}")


def choose(model: Optional[str], quality: Optional[int] = None, metric: Optional[str] = None) -> str:
    """The model of --model, or of --quality and --metric, else of HYPERPRIOR_MODEL, else the default.

    Raises ConfigError.
    """
    options = {"--quality": quality, "--metric": metric}
    given = [f"{option} {value}" for option, value in options.items() if value is not None]
    if model and given:
        raise ConfigError(f"--model {model} and {given[0]} are both given; keep one")
    if not given and (named := model or os.environ.get("HYPERPRIOR_MODEL")):
        return named
    name = f"q{DEFAULT_QUALITY if quality is None else quality}"
    name += f"-{metric}" if metric not in (None, "mse") else ""
    if name not in in_the_box():
        raise ConfigError(
            f"{' '.join(given)} is not in the box; {', '.join(in_the_box())} are (q1: --quality 1; q1-ms-ssim: "
            f"--quality 1 --metric ms-ssim)"
        )
    return str(in_the_box()[name])  # not the name, which may also be that of a user's model


def find_by_fingerprint(fingerprint: str) -> Optional[Path]:
    """The model in the box with this fingerprint, or None."""
    return next((path for path in in_the_box().values() if read_description(path)["fingerprint"] == fingerprint), None)


def find_release(fingerprint: str) -> Optional[str]:
    """The release whose box has the model with this fingerprint, such as `q3 of hyperprior 0.1.0`, or None."""
    return json.loads(Path(__file__).with_name("released.json").read_text()).get(fingerprint)


def read_description(model: str | Path) -> dict[str, Any]:
    """The notes of export: fingerprint, format, dimensions, lambda, step, cost of exactness.

    Raises ConfigError if there is no such model, and DataError if the model is damaged.
    """
    path = find(model)
    try:
        description = storage.load_state(path)
        storage.check_format(path, description["format"], FORMAT)
        own = {"fingerprint": description["fingerprint"], "format": description["format"]}
        return {**own, **description["config"]["model"], **description["config"]["loss"], **description["info"]}
    except ValueError as error:
        raise DataError(f"{error}; export the model again") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: its description lacks {error}; export the model again") from error
