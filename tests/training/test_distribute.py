"""TF_CONFIG: what names a cluster, and what is refused because each worker would otherwise train alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hyperprior.errors import ConfigError
from hyperprior.training.distribute import read_tf_config

TASK = {"type": "worker", "index": 1}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, ([], 0)),
        ({"cluster": {}, "task": {"type": "worker", "index": 0}, "environment": "cloud", "job": {}}, ([], 0)),
        ({"cluster": {"worker": ["a:1", "b:2"]}, "task": TASK}, (["a:1", "b:2"], 1)),
        ({"cluster": {"chief": ["c:0"], "worker": ["a:1", "b:2"]}, "task": TASK}, (["c:0", "a:1", "b:2"], 2)),
        (
            {"cluster": {"chief": ["c:0"], "worker": ["a:1"]}, "task": {"type": "chief", "index": "0"}},
            (["c:0", "a:1"], 0),
        ),
    ],
)
def test_a_cluster_is_read(monkeypatch: pytest.MonkeyPatch, tree: Any, expected: Any) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(tree))
    assert read_tf_config() == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[1]", "AttributeError"),
        (
            '{"sparseCluster": {"worker": {"1": "a:1"}}, "task": {"type": "worker", "index": 1}}',
            "`sparseCluster` is unknown",
        ),
        (
            '{"cluster": {"worker": {"1": "a:1"}}, "task": {"type": "worker", "index": 1}}',
            "`cluster.worker` must be a list",
        ),
        ('{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}', "`cluster.worker` must be a list"),
        (
            '{"cluster": {"master": ["m:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            "`master` is unknown",
        ),
        ('{"cluster": {"ps": ["p:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}', "`ps` is unknown"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}', "must be a chief or worker"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', "must be a chief or worker"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "must be a chief or worker"),
        ('{"cluster": {"worker": ["a:1"]}}', "TypeError"),
    ],
)
def test_what_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match="TF_CONFIG is .*as TensorFlow documents") as error:
        read_tf_config()
    assert problem in str(error.value)
