"""TensorFlow's versions: what is refused, and the private modules that this package needs of every version."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
from conftest import Command, photo

COMMANDS = {
    "train": ["configs/quickstart.yaml", "--run", "r"],
    "sweep": ["configs/quickstart.yaml", "--lambdas", "0.01", "--out", "s"],
    "export": ["runs/a"],
    "compress": ["photo.png", "--engine", "tensorflow"],
    "inspect": ["."],
    "pack": [".", "--out", "shards"],
    "evaluate": ["q3", "--images", ".", "--out", "o"],
    "bench": ["configs/quickstart.yaml"],
    "doctor": [],
}


@pytest.mark.parametrize(
    "source, found",
    [
        ("__version__ = '2.13.1'", "TensorFlow is 2.13.1"),
        ("__version__ = '1.15'", "TensorFlow is 1.15"),
        ("raise AttributeError('np.float_ was\\nremoved')", "TensorFlow cannot be imported (np.float_ was removed)"),
    ],
)
def test_commands_refuse_a_tensorflow_that_does_not_work_in_one_line(
    tmp_path: Path, hyperprior: Command, source: str, found: str
) -> None:
    fake = tmp_path / "fake" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(source)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[1] / "configs")
    photo(0).save(tmp_path / "photo.png")
    before = sorted(tmp_path.rglob("*"))
    path = os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")])
    for name, arguments in COMMANDS.items() if "2.13" in source else [("train", COMMANDS["train"])]:
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        result = hyperprior(name, *arguments, check=2, env=environment)
        assert result.stderr == (
            f"hyperprior: {found}; 2.14.1 and newer versions work: `pip install 'tensorflow>=2.14.1'`\n"
        ), name
    assert sorted(tmp_path.rglob("*")) == before


def run_code(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_private_modules_are_imported_in_one_place_and_this_tensorflow_has_them() -> None:
    package = Path(__file__).parents[1] / "hyperprior"
    files = [path.name for path in package.rglob("*.py") if re.search(r"tensorflow\.python", path.read_text())]
    assert files == ["stack.py"]


@pytest.mark.parametrize(("setting", "expected"), [(None, "True"), ("0", "False"), ("1", "True")])
def test_it_is_known_whether_onednn_is_on(
    monkeypatch: pytest.MonkeyPatch, setting: Optional[str], expected: str
) -> None:
    for name in ("TF_ENABLE_ONEDNN_OPTS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    code = "from hyperprior import stack; stack.start_tensorflow(); print(stack.is_onednn_on())"
    code += f"; import os; assert {setting!r} == os.environ.get('TF_ENABLE_ONEDNN_OPTS')"
    code += "; assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ"  # child processes inherit neither
    assert run_code(code, **({"TF_ENABLE_ONEDNN_OPTS": setting} if setting else {})) == expected


def test_a_worker_uses_as_many_cpu_devices_as_it_was_told() -> None:
    code = """
import tensorflow as tf
from hyperprior import stack
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
with stack.use_cpu_devices(3):
    print(tf.distribute.MultiWorkerMirroredStrategy().num_replicas_in_sync)
"""
    cluster = {"cluster": {"worker": ["127.0.0.1:0"]}, "task": {"type": "worker", "index": 0}}
    assert run_code(code, TF_CONFIG=json.dumps(cluster), CUDA_VISIBLE_DEVICES="-1") == "3"
