"""What the arguments of the commands mean: rules that hold for several arguments, or for all of them."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Any, Optional

from hyperprior.errors import ConfigError


def find_config(first: Optional[str], overrides: list[str], run: Optional[Path]) -> tuple[Path, list[str]]:
    """The config of `train`: CONFIG, or that of the run that goes on. `first`: the first argument, or None."""
    with contextlib.suppress(OSError):  # settings that are too long for a name
        if first and ("=" not in first or Path(first).exists()):
            return Path(first), overrides
    if run is None or not (run / "config.yaml").is_file():
        raise ConfigError("there is no CONFIG; give a YAML file, or --run with the directory of a run to continue")
    return run / "config.yaml", [first, *overrides] if first else overrides


def choose_existing(force: bool, skip: bool) -> Any:
    if force and skip:
        raise ConfigError("--force replaces files that exist, and --skip-existing leaves them alone; give one of them")
    return "replace" if force else "skip" if skip else "refuse"


def take_local_paths(command: Any) -> Any:
    """Makes all parameters of the commands refuse URLs, except the sources of data, which may lie behind one."""

    def process(parameter: Any, context: Any, value: Any) -> Any:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and re.match("[A-Za-z][A-Za-z0-9+.-]*://", text):
                raise ConfigError(
                    f"`{parameter.name}` is {text}; it must be a local path: copy from or to other "
                    f"places yourself, or mount them"
                )
        return type(parameter).process_value(parameter, context, value)

    for subcommand in command.commands.values():
        for parameter in subcommand.params:
            if parameter.metavar not in ("SOURCE", "SECTION.KEY=VALUE"):
                parameter.process_value = functools.partial(process, parameter)
    return command
