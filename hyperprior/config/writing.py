"""From a Config to YAML with comments, and to the differences between two configs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from hyperprior.config.schema import SOURCES, Config, find_section, list_fields
from hyperprior.errors import hide_secrets


def render(config: Config) -> str:
    """The config as YAML that `load_config` reads, with the meaning of each key as a comment."""
    lines: list[str] = []

    def add_line(indent: str, name: str, value: Any, info: FieldInfo) -> None:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...").strip()
        lines.append(f"{indent + name + ': ' + text:<38} # {info.description}")

    tree = config.to_dict()
    for name, info in list_fields(Config):
        if not isinstance(tree[name], dict):
            add_line("", name, tree[name], info)
            continue
        section = find_section([name])
        lines += ["", f"{name}:  # {section.__doc__}"]
        for key, key_info in list_fields(section):
            add_line("  ", key, tree[name][key], key_info)
    return "\n".join(lines) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """Every value under its key, such as `train.steps`."""
    values: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        values.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return values


def without_secrets(config: Config) -> Config:
    """The config as it may be shown and stored: its sources pass through `hide_secrets`."""
    data = config.data
    sources = {name: list(map(hide_secrets, getattr(data, name))) for name in SOURCES}
    return config.model_copy(update={"data": data.model_copy(update=sources)})


def to_model_tree(config: Config) -> dict[str, Any]:
    """The config that goes with a model to others, without sources, as plain values.

    Only `model` and `loss` are complete, without `density`, which 0.1.0 does not know. Other keys have their defaults
    where they are missing, so a version that does not know a later key can read the model.
    """
    changed = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    whole = config.to_dict()
    data = {name: value for name, value in changed.pop("data", {}).items() if name not in SOURCES}
    if "density" not in changed.get("model", {}):
        del whole["model"]["density"]
    return {**changed, "data": data, "model": whole["model"], "loss": whole["loss"]}


class Difference(NamedTuple):
    """A key whose values differ. With `may_change` a resumed run may have the new value."""

    key: str
    old: Any
    new: Any
    may_change: bool


def differences(old: Config, new: Config) -> Iterator[Difference]:
    """Every key whose values differ."""
    before, after = flatten(old), flatten(new)
    for key, old_value in before.items():
        if old_value != after[key]:
            *sections, name = key.split(".")
            extra = dict(list_fields(find_section(sections)))[name].json_schema_extra
            yield Difference(key, old_value, after[key], isinstance(extra, dict) and bool(extra.get("may_change")))
