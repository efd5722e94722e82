"""How the launch files handle exit codes and signals. A script replaces the `hyperprior` command."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import pytest
import yaml
from workers import ROOT

from hyperprior.config import load_config


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment whose `hyperprior` ends with $CODE, or with 75 at SIGTERM."""
    command = tmp_path / "hyperprior"
    command.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\necho $TF_NUM_INTRAOP_THREADS >> "$0.threads"\ntrap "exit 75" TERM\n'
        'if [ "$CODE" = wait ]; then sleep 30 & wait; fi\nexit "$CODE"\n'
    )
    command.chmod(0o755)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HYPERPRIOR": str(command)}


def test_a_pod_ends_with_codes_that_the_operator_understands(stand_in: dict[str, str]) -> None:
    job = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
    chief, worker = (job["spec"]["tfReplicaSpecs"][kind] for kind in ("Chief", "Worker"))
    assert chief["template"] == worker["template"] and chief["restartPolicy"] == "ExitCode"
    (container,) = chief["template"]["spec"]["containers"]
    assert container["name"] == "tensorflow"  # the operator looks for this name
    command = [*container["command"], *container["args"]]
    for code, expected in (("0", 0), ("3", 3), ("4", 4), ("75", 143)):
        assert subprocess.run(command, env={**stand_in, "CODE": code}).returncode == expected
    pod = subprocess.Popen(command, env={**stand_in, "CODE": "wait"})
    time.sleep(1)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(10) == 143


def test_workers_sh_prints_its_usage_and_passes_exit_codes_on(stand_in: dict[str, str]) -> None:
    script = ROOT / "launch" / "workers.sh"
    for arguments in ([], ["0", "c.yaml"], ["--max-restarts", "x", "2", "c.yaml"], ["2"]):
        result = subprocess.run([script, *arguments], env=stand_in, capture_output=True, text=True)
        assert result.returncode == 2 and "usage: " in result.stderr
    for code, expected, starts in (("0", 0, 2), ("3", 3, 2), ("75", 75, 4)):
        log = Path(stand_in["HYPERPRIOR"] + ".log")
        log.unlink(missing_ok=True)
        command = [script, "--max-restarts", "1", "2", "c.yaml", "--run", "r"]
        result = subprocess.run(command, env={**stand_in, "CODE": code}, capture_output=True, text=True)
        assert result.returncode == expected
        # A worker that is told to end before it has begun leaves no line.
        assert starts // 2 <= len(log.read_text().splitlines()) <= starts
        assert set(log.read_text().splitlines()) == {"train c.yaml --run r"}
        threads = Path(stand_in["HYPERPRIOR"] + ".threads").read_text()
        assert {int(count) for count in threads.split()} == {max(len(os.sched_getaffinity(0)) // 2, 1)}
    running = subprocess.Popen([script, "2", "c.yaml"], env={**stand_in, "CODE": "wait"})
    time.sleep(2)
    running.send_signal(signal.SIGTERM)
    assert running.wait(10) == 75  # no restart after SIGTERM


@pytest.mark.parametrize(
    ("visible", "workers", "seen"),
    [(None, 2, {"0", "1"}), ("2,3", 2, {"2", "3"}), ("3", 2, None), ("", 2, {""}), ("-1", 2, {"-1"}), (None, 3, None)],
)
def test_workers_sh_gives_each_worker_one_of_the_visible_gpus(
    stand_in: dict[str, str], tmp_path: Path, visible: Optional[str], workers: int, seen: Optional[set[str]]
) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho a sentence\necho 0\necho 1\n")
    nvidia_smi.chmod(0o755)
    command = Path(stand_in["HYPERPRIOR"])
    command.write_text('#!/bin/sh\necho "gpu:$CUDA_VISIBLE_DEVICES" >> "$0.log"\n')
    environment = {name: value for name, value in stand_in.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    script = [ROOT / "launch" / "workers.sh", str(workers), "c.yaml"]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    if seen is None:
        assert ended.returncode == 2 and "workers need one GPU each, there are" in ended.stderr
    else:
        lines = Path(f"{command}.log").read_text().splitlines()
        assert ended.returncode == 0 and len(lines) == workers and {line[4:] for line in lines} == seen


def test_workers_sh_starts_no_worker_after_a_signal(stand_in: dict[str, str], tmp_path: Path) -> None:
    """The signal comes while the ports are chosen: a worker that is started later would not get it."""
    python = tmp_path / "python"
    python.write_text(python.read_text().replace("exec", f"touch {tmp_path}/choosing; sleep 2; exec"))
    script = [ROOT / "launch" / "workers.sh", "2", "c.yaml"]
    running = subprocess.Popen(script, env={**stand_in, "CODE": "wait"})
    while not (tmp_path / "choosing").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 75 and not Path(stand_in["HYPERPRIOR"] + ".log").exists()


def test_workers_sh_ends_the_others_when_one_has_ended(stand_in: dict[str, str]) -> None:
    """A worker that dies before all have met would else be waited for until distribute.start_timeout."""
    command = Path(stand_in["HYPERPRIOR"])
    text = command.read_text().replace('"$CODE" = wait', '"${TF_CONFIG##*index}" = \'": 0}}\'').replace("30", "300")
    command.write_text(text)
    script = [ROOT / "launch" / "workers.sh", "--max-restarts", "0", "3", "c.yaml"]
    ended = subprocess.run(script, env={**stand_in, "CODE": "75"}, stderr=subprocess.DEVNULL, timeout=55)
    assert ended.returncode == 75


def make_checkout(folder: Path, **commands: str) -> None:
    """A checkout for `launch/local.sh` whose `.venv` holds these commands, each with the text of a shell script."""
    for name in ("launch/environment.sh", "launch/local.sh", "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name, text in commands.items():
        path = folder / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)


def test_an_installation_that_fails_is_tried_again(tmp_path: Path) -> None:
    """pip fails once: `launch/local.sh` passes pip's exit code on, and leaves no stamp, so it tries again."""
    make_checkout(tmp_path, python='echo "$@" >> pip.log; exit $(cat code)', hyperprior='echo "trains $@"')
    environment = {"PATH": "/usr/bin:/bin"}  # without nvidia-smi and $HYPERPRIOR
    outcomes = []
    for code in ("7", "0", "8"):
        (tmp_path / "code").write_text(code)
        command = [tmp_path / "launch" / "local.sh", "c.yaml"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        outcomes.append((result.returncode, "trains train c.yaml" in result.stdout))
    assert outcomes == [(7, False), (0, True), (0, True)]
    log = (tmp_path / "pip.log").read_text().splitlines()
    assert len(log) == 2 and all(line.endswith(" -e .") for line in log)


def test_scripts_that_start_together_install_once(tmp_path: Path) -> None:
    make_checkout(tmp_path, python='echo "begins" >> pip.log; sleep 1; echo "ends" >> pip.log', hyperprior="")
    scripts = [
        subprocess.Popen([tmp_path / "launch" / "local.sh", "c.yaml"], env={"PATH": "/usr/bin:/bin"}) for _ in range(3)
    ]
    assert [script.wait(20) for script in scripts] == [0, 0, 0]
    assert (tmp_path / "pip.log").read_text().split() == ["begins", "ends"]


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_the_papers_curve_has_the_published_lambdas_and_sizes(stand_in: dict[str, str], metric: str) -> None:
    script = ROOT / "launch" / "paper.sh"
    command = [script, metric, "kodak/", "--jobs", "2"]
    assert subprocess.run(command, env={**stand_in, "CODE": "0"}).returncode == 0
    low, high, evaluation = Path(stand_in["HYPERPRIOR"] + ".log").read_text().splitlines()
    with (ROOT / "hyperprior" / "reference" / "kodak_rd.csv").open() as file:
        published = {
            float(row["lambda"])
            for row in csv.DictReader(file)
            if row["optimized_for"] == metric and "CompressAI" in row["codec"]
        }
    trained = [[float(x) for x in line.split("--lambdas ")[1].split()[0].split(",")] for line in (low, high)]
    assert [len(part) for part in trained] == [5, 3] and {*trained[0], *trained[1]} == published
    config = load_config(ROOT / low.split()[1], [word for word in low.split() if "=" in word])
    large = load_config(ROOT / high.split()[1], [word for word in high.split() if "=" in word])
    assert config.loss.metric == metric and config.train.initial == "random"
    assert (config.model.num_filters, config.model.latent_channels) == (128, 192)
    assert (large.model.num_filters, large.model.latent_channels) == (192, 320)
    assert evaluation.startswith(f"evaluate runs/paper-{metric}/lambda-") and "--images kodak/" in evaluation
    assert subprocess.run([script, "psnr", "x"], env=stand_in, capture_output=True).returncode == 2


@pytest.mark.slow
def test_the_quickstart_goes_from_a_clone_to_a_result_and_says_when_it_is_done(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    for said in ("use      hyperprior compress", "is done"):
        command = ["./launch/quickstart.sh", "train.steps=60", "train.validate_every=30"]
        result = subprocess.run(command, cwd=tmp_path / "clone", capture_output=True, text=True)
        assert result.returncode == 0 and said in result.stdout, result.stdout + result.stderr
    results = json.loads((tmp_path / "clone/runs/quickstart/results.json").read_text())
    assert results["images"] == 2 and results["psnr_db"] > 24.0 and results["trained_steps"] == 60
