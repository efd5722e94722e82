"""YAML with fewer surprises: `1e-4` is a number, `010` is 10, `off` and `1:30` are text.

A repeated key is an error, and so are aliases that stand for more values than a config can have.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import yaml

from hyperprior.errors import ConfigError

MAX_VALUES = 100_000  # of a text whose aliases are written out: nine levels of nine aliases would stand for 9^9 values
MAX_SHOWN = 200  # characters of a key or value in an error
REPLACED = ("bool", "int", "float", "timestamp")  # types that PyYAML sees where people mean another type
BOOL = r"(?:true|True|TRUE|false|False|FALSE)$"
INT = r"[-+]?\d+$"
FLOAT = r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other rules for numbers and booleans. It refuses repeated keys and too many values."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node and count_values(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"with its aliases it holds more than {MAX_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        line_of: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in line_of:
                where = f"on line {line_of[key]} and again on line {line}"
                raise ConfigError(f"{node.start_mark.name}: `{show_key(key)}` is {where}; keep one")
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


def count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """The number of values below a node with its aliases written out. Raises YAMLError if a value contains itself."""
    if node not in counts:
        counts[node] = 0  # not yet known
        children = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        are_nodes = isinstance(node, yaml.CollectionNode)
        counts[node] = 1 + sum(count_values(child, counts) for child in children) if are_nodes else 1
    if not counts[node]:
        raise yaml.YAMLError(f"the value on line {node.start_mark.line + 1} contains itself")
    return counts[node]


def show_key(key: Any) -> str:
    """A key in one line, not all of it if it is long."""
    text = repr(str(key))[1:-1]
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text. Errors call the text `name`. Raises ConfigError."""
    try:
        loader = Loader(text)
        loader.name = name
        return loader.get_single_data()
    except ConfigError:
        raise
    except Exception as error:  # PyYAML raises many types, such as TypeError for a mapping as a key
        problem = " ".join(str(error).split())
        if "got '{'" in problem:
            problem += """; in a list, text with braces needs quotes: ["shards-{000..127}.tar"]"""
        raise ConfigError(f"{name}: not valid YAML: {problem}") from error
