"""Sweeps over lambda and searches for one, with real runs in processes that are stopped and killed."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command, photo

from hyperprior import cli, stack
from hyperprior.config import load_config
from hyperprior.errors import ConfigError, Stopped
from hyperprior.training import sweep

SHORT = [*TINY, "train.steps=20", "train.validate_every=10", "train.checkpoint_every=5"]


@pytest.fixture
def arguments(empty_config: Path, flat_tar: Path) -> list[str]:
    return ["sweep", str(empty_config), *SHORT, f"data.train=[{flat_tar}]", f"data.val=[{flat_tar}]"]


def children(parent: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(line) for line in listing.stdout.split()]


@pytest.mark.slow
def test_a_stopped_and_killed_sweep_gives_the_table_of_an_undisturbed_one(
    hyperprior: Command, tmp_path: Path, arguments: list[str]
) -> None:
    arguments += ["--lambdas", "0.002,0.05", "--warm-start"]
    hyperprior(*arguments, "--out", "alone")
    command = [sys.executable, "-m", "hyperprior", *arguments, "--out", "stopped"]
    for sent, folder in [(signal.SIGTERM, "lambda-0.002"), (signal.SIGKILL, "lambda-0.05")]:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        newest = tmp_path / "stopped" / folder / "checkpoints"
        while not list(newest.glob("step-*.npz")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        trainers = children(process.pid)
        process.send_signal(sent)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == (75 if sent == signal.SIGTERM else -9), output
        assert len(trainers) == 1
        for _ in range(600):  # the run must end too
            if not Path(f"/proc/{trainers[0]}").exists():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"the run {folder} goes on after signal {sent} to the sweep")
        assert sent == signal.SIGKILL or not (tmp_path / "stopped" / "lambda-0.05").exists()
    done = hyperprior(*arguments, "--out", "stopped").stdout
    assert "resumed at step" in done or "is done" in done
    table = (tmp_path / "alone" / "sweep.md").read_text()
    assert table == (tmp_path / "stopped" / "sweep.md").read_text() and table in done
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 0.002", "| 0.05"]
    for folder, origin in [("lambda-0.002", "null"), ("lambda-0.05", "alone/lambda-0.002")]:
        assert f"start_from: {origin}" in (tmp_path / "alone" / folder / "config.yaml").read_text()


@pytest.mark.slow
def test_parallel_runs_give_the_same_table_and_are_evaluated_together(
    hyperprior: Command, tmp_path: Path, arguments: list[str]
) -> None:
    arguments += ["--lambdas", "0.002,0.05"]
    one = json.loads(hyperprior(*arguments, "--out", "one", "--json").stdout)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        photo(i).save(tmp_path / "photos" / f"{i}.png")
    options = ["--images", "photos", "--baselines", "none"]
    done = json.loads(hyperprior(*arguments, "--out", "two", "--jobs", "2", *options, "--json").stdout)
    assert (tmp_path / "one" / "sweep.md").read_text() == (tmp_path / "two" / "sweep.md").read_text()
    assert "step" in (tmp_path / "two" / "lambda-0.05.log").read_text()
    assert [row["run"] for row in done] == ["two/lambda-0.002", "two/lambda-0.05"] and done[0]["bpp"] < done[1]["bpp"]
    assert [row["loss"] for row in one] == [row["loss"] for row in done]
    assert "lambda-0.002" in (tmp_path / "two" / "results" / "summary.md").read_text()


@pytest.mark.parametrize("moment", ["before it starts", "before it is noted"])
def test_a_signal_while_a_run_starts_stops_that_run(
    tmp_path: Path, empty_config: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    started: list[Child] = []

    class Child(subprocess.Popen[bytes]):
        def __init__(self, command: object, **options: Any):
            if moment == "before it starts":
                os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(["sleep", "60"], **options)
            started.append(self)
            if moment == "before it is noted":
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Child)
    with pytest.raises(Stopped):
        sweep.train_all(sweep.Plan(empty_config, [], tmp_path / "out"), [(0.1, None), (0.2, None)], sweep.Terminal())
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_a_run_whose_sweep_died_before_it_began_ends() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # as in a sweep, and inherited by its children
    try:
        process = subprocess.Popen(["sleep", "60"], preexec_fn=functools.partial(sweep.end_with_parent, 1))
        assert process.wait(50) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_wrong_sweep_is_refused_before_anything_is_trained(
    hyperprior: Command,
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stack, "restart_with_allocator", lambda: None)  # it would restart the test process
    for wrong, message in [
        (["--lambdas", "0.01,zero"], "write numbers with commas"),
        (["--lambdas", "0.01,0.010"], "a lambda is given twice"),
        (["--lambdas", "0.01,-1"], "`loss.lambda` is -1.0"),
        (["--lambdas", "0.01", "--target-bpp", "0.5"], "give one of"),
        ([], "give one of"),
        (["--lambdas", "0.01", "loss.lambda=3"], "leave them out"),
        (["--lambdas", "0.01,0.02", "--jobs", "2", "--warm-start"], "needs the runs one after another"),
        (["--lambdas", "0.01", "--images", "nowhere"], "--images nowhere is no directory"),
        (["--lambdas", "0.01", "--images", ".", "--baselines", "gif"], "--baselines names `gif`"),
    ]:
        monkeypatch.setattr(sys, "argv", ["hyperprior", *arguments, *wrong, "--out", "out"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2 and message in capsys.readouterr().err, wrong
    failed = hyperprior(
        *arguments, "data.train=[nothing.tar]", "--lambdas", "0.01,0.02", "--out", "out", check=3
    ).stderr
    assert "nothing.tar" in failed and "lambda-0.01 ended with exit code 3" in failed
    assert not (tmp_path / "out" / "lambda-0.02").exists()


@pytest.mark.parametrize("folder", ["runs/sweep #2", "runs/a: b", "@x", "*x"])
def test_a_warm_start_finds_a_folder_of_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    plan = sweep.Plan(tmp_path / "c.yaml", [], tmp_path / folder, warm_start=True)
    sweep.start_run(plan, 0.05, 0.002, 0)
    (override,) = (word for word in commands[0] if word.startswith("train.start_from="))
    assert load_config(None, [override]).train.start_from == str(tmp_path / folder / "lambda-0.002")


@pytest.mark.parametrize(("column", "value"), [("bpp", 0.4), ("psnr_db", 31.0)])
def test_a_search_finds_the_lambda_on_a_curve_and_repeats_its_runs(
    column: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[float, object]] = []

    def curve(plan: sweep.Plan, lmbda: float) -> dict[str, float]:  # bpp steeper, PSNR flatter than the paper's
        return {"lambda": lmbda, "bpp": 3.0 * lmbda**0.8, "psnr_db": 40.0 + 1.6 * math.log(lmbda)}

    monkeypatch.setattr(sweep, "result_of", curve)
    monkeypatch.setattr(sweep, "train_all", lambda plan, runs, terminal: trained.extend(runs))
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    plan = sweep.Plan(tmp_path / "c.yaml", [], tmp_path / "out", warm_start=True)
    folder = sweep.search_lambda(plan, column, value, sweep.Terminal())
    lmbda = float(folder.name.removeprefix("lambda-"))
    assert curve(plan, lmbda)[column] == pytest.approx(value, rel=0.02 if column == "bpp" else 0.1 / value)
    first = list(trained)
    assert 2 <= len(first) <= 4 and first[0] == (0.013, None) and first[1][1] == 0.013
    sweep.search_lambda(plan, column, value, sweep.Terminal())
    assert trained == first * 2
    assert "came nearest" not in capsys.readouterr().err


def test_a_search_that_misses_its_target_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "result_of", lambda plan, lmbda: {"lambda": lmbda, "bpp": 0.3 + 0.01 * lmbda})
    monkeypatch.setattr(sweep, "train_all", lambda plan, runs, terminal: None)
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    sweep.search_lambda(sweep.Plan(tmp_path / "c.yaml", [], tmp_path / "out"), "bpp", 2.0, sweep.Terminal())
    assert "came nearest, not within 2%" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="empty"):
        sweep.Plan(tmp_path / "c.yaml", [], tmp_path).check([])
