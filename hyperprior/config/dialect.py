"""YAML with fewer surprises: `1e-4` is a number, `010` is 10, `off` and `1:30` are text.

A repeated key is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hyperprior.errors import ConfigError

REPLACED = ("bool", "int", "float", "timestamp")  # types that PyYAML sees where people mean another type
BOOL = r"(?:true|True|TRUE|false|False|FALSE)$"
INT = r"[-+]?\d+$"
FLOAT = r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other rules for numbers and booleans. It refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        line_of: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in line_of:
                raise ConfigError(
                    f"{node.start_mark.name}: `{key}` is on line {line_of[key]} and again on line {line}; keep one"
                )
            line_of[key] = line
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for name, pattern, first_characters in (
    ("bool", BOOL, "tTfF"),
    ("int", INT, "-+0123456789"),
    ("float", FLOAT, "-+0123456789."),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), list(first_characters))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text. Errors call the text `name`. Raises ConfigError."""
    loader = Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # TypeError: a key is a mapping
        problem = " ".join(str(error).split())
        if "got '{'" in problem:
            problem += """; in a list, text with braces needs quotes: ["shards-{000..127}.tar"]"""
        raise ConfigError(f"{name}: not valid YAML: {problem}") from error
    finally:
        loader.dispose()
