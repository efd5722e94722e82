"""Makes a Config from a YAML file and `section.key=value`. Errors name the key, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from pydantic import ValidationError

from hyperprior.config.dialect import MAX_SHOWN, parse_yaml, show_key
from hyperprior.config.schema import SOURCES, Config, find_section, list_fields
from hyperprior.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "configs"
SOURCE_KEYS = [f"data.{name}" for name in SOURCES]


def load_config(config: Union[Config, str, Path, None], overrides: Sequence[str] = ()) -> Config:
    """The Config of a YAML file, with `section.key=value` overrides on top.

    `config`: a file, or the name of a config that comes with the package, such as "photos"; a file of that name is
    preferred. It can also be a Config, or None for the defaults. Of several overrides of a key the last one counts, but
    sources that follow each other add up, because a shell makes many words of `data.train=shards-{000..127}.tar`.

    Raises ConfigError with the key, the received value and the allowed values.
    """
    if isinstance(config, Config):
        tree, origin = config.to_dict(), "config"
    elif config is None:
        tree, origin = {}, "config"
    else:
        tree, origin = read_file(find_file(Path(config))), str(config)
    for before, override in zip(["", *overrides], overrides):
        apply_override(tree, override, follows=before.partition("=")[0] == override.partition("=")[0])
    return validate(tree, origin)


def find_file(path: Path) -> Path:
    """The file at `path`. If there is none, the config of this name that comes with the package."""
    shipped = SHIPPED / f"{path}.yaml"
    is_file = path.exists() and not path.is_dir()  # a pipe, too; but photos/ may be the photographs
    return shipped if len(path.parts) == 1 and shipped.is_file() and not is_file else path


def read_file(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Their keys are not checked here. Raises ConfigError."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not text: {error}") from error
    except OSError as error:
        names = sorted(shipped.stem for shipped in SHIPPED.glob("*.yaml"))
        others = [str(other) for other in path.parent.glob("*.yaml")]
        close = difflib.get_close_matches(str(path), others, n=1) or difflib.get_close_matches(path.stem, names, n=1)
        hint = f"did you mean {close[0]}? There are" if close else "give a YAML file, or one of"
        raise ConfigError(f"config {path} cannot be read: {error.strerror}; {hint} {', '.join(names)}") from error
    if tree is None:  # an empty file
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections; found {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str, follows: bool) -> None:
    """Puts `section.key=value` into the tree of plain values. Raises ConfigError.

    `follows`: the override before it has the same key. Then sources add up; `[]` removes them.
    """
    shown = f"`{show_key(override)}`"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown} is not an override; write section.key=value, as in train.steps=1000")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            names = [name for name in Config.model_fields if name != "seed"]
            raise ConfigError(f"{shown}: `{show_key(section)}` is not a section; {', '.join(names)} are")
    if text.startswith("[") and "]" not in text:
        raise ConfigError(f"{shown}: not valid YAML: the list does not end; in a shell write '{show_key(key)}=[a, b]'")
    is_plain_source = key in SOURCE_KEYS and re.match("[^\\['\"]", text)  # it may contain any characters
    value = [text] if is_plain_source else parse_yaml(text, shown)
    adds = follows and key in SOURCE_KEYS and value and isinstance(value, list) and isinstance(node[leaf], list)
    node[leaf] = [*node[leaf], *value] if adds else value
    # Both keys set the length of a run, so the later one replaces the other.
    if key == "train.steps":
        node.pop("epochs", None)
    if key == "train.epochs":
        node.pop("steps", None)


def validate(tree: dict[str, Any], origin: str) -> Config:
    """A Config from plain values. Raises one ConfigError that lists every problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [explain_problem(problem) for problem in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(problems)) from error


def show_value(value: Any) -> str:
    """A value as JSON, or as Python writes what JSON does not have; not all of it if it is long."""
    try:
        text = json.dumps(value)
    except TypeError:  # bytes, sets and dates
        text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def explain_problem(problem: Any) -> str:
    """Our text for an error of pydantic: the key, the received value and the allowed values."""
    path = [show_key(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        *sections, key = path
        names = [name for name, _ in list_fields(find_section(sections))]
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean `{'.'.join([*sections, close[0]])}`?" if close else f"known here: {', '.join(names)}"
        return f"unknown key `{'.'.join(path)}`; {hint}"
    # A union reports one error per member, with the member's name at the end of the location.
    path = [part for part in path if not re.fullmatch(r"int|str|literal\[.*\]|function-.*", part)]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{'.'.join(path)}: {message}" if path else message
    return f"`{'.'.join(path)}` is {show_value(problem['input'])}: {message[0].lower()}{message[1:]}"
