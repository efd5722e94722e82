"""`hyperprior info`: the facts that a `.hyp` file, a model or a run holds about itself. Nothing is decoded.

Nothing here needs TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from hyperprior.codec import box, container
from hyperprior.codec.files import ANY_SIZE, SUFFIX, read_source
from hyperprior.errors import ConfigError
from hyperprior.training import checkpoint
from hyperprior.training.runs import read_result


def info(path: Path, model: Optional[str]) -> dict[str, Any]:
    """The facts about a file, a model or a run; `model`: the one that a file may fit.

    Raises ConfigError if `path` is none of them, and DataError if it is damaged.
    """
    if (path / "checkpoints").is_dir():
        return info_of_run(path)
    if path.is_file() and path.suffix != ".npz":
        return info_of_file(read_source(str(path)), model)
    if path.suffix == SUFFIX and not path.exists():
        raise ConfigError(f"{path} does not exist")
    return {"kind": "model", **box.read_description(path)}


def info_of_run(run: Path) -> dict[str, Any]:
    problems: list[str] = []
    newest = checkpoint.load_newest(run / "checkpoints", problems.append)
    if newest is None:
        raise ConfigError(f"{run} holds no checkpoint yet; train.checkpoint_every sets the interval")
    checkpoint.check_state(run, newest[1])
    state = newest[1]["run"]
    facts = {"kind": "run", **{name: state[name] for name in ("step", "best_step", "best_loss")}}
    with contextlib.suppress(ConfigError):
        facts["exported"] = box.read_description(run)
    if problems:
        facts["problem"] = "; ".join(problems)
    if result := read_result(run):
        facts["result"] = result
    return facts


def info_of_file(data: bytes, model: Optional[str]) -> dict[str, Any]:
    """The header of a `.hyp` file, and whether a model fits it: `model`, or else the one that reads it by default."""
    stream = container.read(data, max_pixels=ANY_SIZE)
    fingerprint = stream.fingerprint.hex()
    facts = {
        "kind": "compressed image",
        "width": stream.width,
        "height": stream.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (stream.width * stream.height),
        "version": stream.version,
        "model": fingerprint,
        "symbols_bytes": len(stream.coded),
        "escapes": len(stream.escapes),
        "checksum": f"{stream.checksum:08x}",
    }
    if release := box.find_release(fingerprint):
        facts["release"] = release
    if not model and (own := box.find_by_fingerprint(fingerprint)):
        facts |= {"fits": True, "given_model": f"{own.stem}, {fingerprint}"}
    elif model := model or os.environ.get("HYPERPRIOR_MODEL"):
        given = box.read_description(model)["fingerprint"]
        facts |= {"fits": given == fingerprint, "given_model": f"{model}, {given}"}
    return facts


def lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """The lines that `info` prints."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            shown = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
            yield f"{indent}{name:<16} {shown}"
