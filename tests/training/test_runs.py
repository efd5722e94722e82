"""`hyperprior runs` and `compare` on real runs in every state; `doctor` on this machine."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import pytest
from conftest import TINY, Command
from workers import start_training, wait_for

from hyperprior import storage
from hyperprior.config import load_config
from hyperprior.errors import ConfigError
from hyperprior.machine import doctor
from hyperprior.terminal import Terminal
from hyperprior.training import runs
from hyperprior.watch.summaries import Summaries


def test_runs_are_listed_with_their_state_and_can_be_compared(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = [empty_config, *TINY, f"data.train=[{flat_tar}]", f"data.val=[{flat_tar}]", "train.validate_every=2"]
    arguments += ["train.checkpoint_every=2"]
    hyperprior("train", *arguments, "train.steps=4", "--run", "all/good")
    hyperprior("train", *arguments, "train.steps=90", "train.learning_rate=1e30", "--run", "all/bad", check=4)
    process = start_training(tmp_path, *arguments, "train.steps=9000", "loss.lambda=0.05", "--run", "all/long")
    wait_for(tmp_path / "all" / "long", 2, process)
    listed = {Path(row["run"]).name: row for row in json.loads(hyperprior("runs", "all", "--json").stdout)}
    assert {name: row["state"] for name, row in listed.items()} == {
        "good": "finished",
        "bad": "diverged",
        "long": "running",
    }
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    long = runs.summarise(tmp_path / "all" / "long")
    assert long["state"] == "stopped" and long["lambda"] == 0.05 and "start the same command again" in long["reason"]
    assert (tmp_path / "all" / "long" / "checkpoints" / f"step-{long['step']:09d}.npz").exists()
    good = listed["good"]
    result = json.loads((tmp_path / "all" / "good" / "results.json").read_text())
    assert (good["step"], good["loss"], good["psnr_db"]) == (4, result["loss"], result["psnr_db"])
    assert (good["split"], listed["bad"]["split"]) == ("val", None) and good["environment"]["workers"] == 1
    files = [path for path in (tmp_path / "all" / "good").rglob("*") if path.is_file()]
    assert good["bytes"] == sum(path.stat().st_size for path in files)
    # A killed run writes no record of its end.
    with (tmp_path / "all" / "long" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": long["step"], "loss": 1.0}) + '\n{"kind": "tra')
    assert runs.summarise(tmp_path / "all" / "long")["state"] == "cut off"

    # Files that no run wrote are ignored: the result is measured again.
    (tmp_path / "all" / "good" / "results.json").write_text('{"bpp": 1}')
    with (tmp_path / "all" / "good" / "metrics.jsonl").open("a") as file:
        file.write('"mine"\n')
    assert runs.summarise(tmp_path / "all" / "good")["step"] == 4
    hyperprior("train", *arguments, "train.steps=4", "--run", "all/good")
    assert json.loads((tmp_path / "all" / "good" / "results.json").read_text()) == result

    lines = hyperprior("runs", "all").stdout.splitlines()
    assert lines[0].strip() == f"runs in {tmp_path / 'all'}"
    assert len(lines) == 5 and lines[2].split()[:2] == ["bad", "diverged"]
    comparison = json.loads(hyperprior("compare", "all/good", "all/long", "--json").stdout)
    assert comparison["config"] == {"loss.lambda": [0.013, 0.05], "train.steps": [4, 9000]}
    assert comparison["metrics"]["loss"][0] == result["loss"] and comparison["environment"] == {}
    assert "loss.lambda" in hyperprior("compare", "all/good", "all/long").stdout
    rows = (tmp_path / "all" / "long" / "metrics.jsonl").read_text().splitlines()
    start = next(row for row in map(json.loads, rows[:-1]) if row["kind"] == "started")
    start.update(step=long["step"], workers=2)
    (tmp_path / "all" / "long" / "metrics.jsonl").write_text("\n".join([*rows[:-1], json.dumps(start)]))
    assert runs.compare(tmp_path / "all" / "good", tmp_path / "all" / "long")["environment"] == {"workers": [1, 2]}
    assert "no run there" in hyperprior("runs", tmp_path / "all" / "good" / "model", check=2).stderr
    assert "is no run" in hyperprior("compare", "all", "all/good", check=2).stderr


def test_doctor_finds_problems_and_names_remedies(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = ["doctor", empty_config, *TINY, f"data.train=[{flat_tar}]"]
    findings = {row["name"]: row for row in json.loads(hyperprior(*arguments, "--json").stdout)}
    assert {"software", "GPU", "CPU", "memory", "disk", "sources", "bottleneck"} <= findings.keys()
    assert "24 shards" in findings["sources"]["text"] or "4 shards" in findings["sources"]["text"]
    assert not any(row["remedy"] for name, row in findings.items() if name not in ("disk", "bottleneck")), findings
    huge = json.loads(hyperprior(*arguments, "train.batch_size=200000", "--json", check=3).stdout)
    assert "lower train.batch_size" in next(row for row in huge if row["name"] == "memory")["remedy"]
    lines = hyperprior("doctor", empty_config, "data.train=[missing.tar]", check=3).stdout.splitlines()
    assert any(line.startswith("! sources") and "missing.tar" in line for line in lines)
    with tarfile.open(flat_tar, "a") as tar:
        tar.addfile(tarfile.TarInfo("broken.jpg"))
    source = next(row for row in json.loads(hyperprior(*arguments, "--json").stdout) if row["name"] == "sources")
    assert "training stops beyond data.max_bad_fraction=0.01" in source["remedy"]
    hidden = hyperprior("doctor", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).stdout
    assert "CUDA_VISIBLE_DEVICES hides them" in hidden


def test_doctor_recommends_bfloat16_only_on_cpus_with_support(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines_for(flags: set[str], precision: str) -> list[str]:
        monkeypatch.setattr(doctor, "cpu_flags", lambda: flags)
        settings = load_config(None, [f"train.precision={precision}"])
        return [finding.line() for finding in doctor.check_precision(settings)]

    assert "train.precision=mixed_bfloat16" in lines_for({"avx512_bf16"}, "float32")[0]
    assert lines_for({"avx512_bf16"}, "mixed_bfloat16") == lines_for({"avx2"}, "float32") == []
    assert lines_for({"avx2"}, "mixed_bfloat16")[0].startswith("! precision")
    assert doctor.check_precision(None) == []


def test_a_look_at_a_run_disturbs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    (folder / "checkpoints").mkdir(parents=True)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            storage.is_locked(folder)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            with storage.lock_directory(folder):
                assert storage.is_locked(folder)
            assert not storage.is_locked(folder)
    finally:
        ended.set()
    refused = pytest.raises(ConfigError, match="another process is working in")
    with storage.lock_directory(folder), refused, storage.lock_directory(folder):
        pass

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with storage.lock_directory(folder):  # a file system without locks is not another process
        pass


@pytest.mark.parametrize(
    "bad", [b"", b'{"kind": "tr', b"[" * 10**5, b"\xff\x00", b'{"kind": "val", "step": "2"}', b'"mine"']
)
def test_a_damaged_row_costs_that_row_alone(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    rows = [json.dumps({"kind": "val", "step": step, "loss": 1.0 / step}).encode() for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([rows[0], bad, *rows[1:]]) + b"\n")
    assert runs.summarise(tmp_path)["loss"] == 1.0 / 3
    warnings: list[str] = []
    Summaries(tmp_path, 2, warnings.append).close()
    assert len(warnings) == 1 and "damaged lines that are left out from now on: 1" in warnings[0]
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == rows[:2]


@pytest.mark.parametrize("bad", [{"loss": "x"}, {"bpp": [1]}, {"lambda": 10**400}, {"step": None}, {"images": {}}])
def test_a_damaged_result_is_none(tmp_path: Path, bad: dict[str, object]) -> None:
    result = {"loss": 1.2, "bpp": 0.5, "psnr_db": 30.0, "images": 3, "lambda": 0.1, "split": "test", "step": 2}
    for change in ({}, bad):
        (tmp_path / "results.json").write_text(json.dumps({**result, "trained_steps": 3, **change}))
        assert (runs.read_result(tmp_path) is None) == bool(change)


def test_runs_that_go_while_they_are_read_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
        (tmp_path / name / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n')
    found = runs.find_runs([tmp_path])
    monkeypatch.setattr(runs, "find_runs", lambda folders: found)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b" / "metrics.jsonl").unlink()
    (summary,) = runs.summarise_all([tmp_path], pytest.fail)
    assert summary["run"] == str(tmp_path / "b") and summary["bytes"] == len("seed: 0\n")


def test_runs_behind_links_are_listed_and_one_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    for place, text in (("runs/a", "seed: 0\n"), ("scratch/b", "seed: 0\n"), ("runs/c", "from: the future\n")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "lock").touch()
        (tmp_path / place / "config.yaml").write_text(text)
    (tmp_path / "runs" / "linked").symlink_to("../scratch/b")
    warnings: list[str] = []
    summaries = runs.summarise_all([tmp_path / "runs"], warnings.append)
    assert [Path(summary["run"]).name for summary in summaries] == ["a", "linked"]
    assert len(warnings) == 1 and "c is left out: " in warnings[0] and "unknown key `from`" in warnings[0]


def test_the_names_of_runs_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[red]a\x1b[31m"
    for name in ("x\x1b[31m[bold]", "y"):
        (folder / name).mkdir(parents=True)
        (folder / name / "lock").touch()
        (folder / name / "config.yaml").write_text("seed: 0\n")
    numbers = {"trained_steps": 3, "step": 2, "lambda": 0.1}
    (folder / "y" / "results.json").write_text(json.dumps({**numbers, "split": "\x1b[31mval"}))
    terminal = Terminal()
    terminal.say(runs.make_table(runs.summarise_all([folder], pytest.fail)))
    terminal.say(runs.make_comparison_table(runs.compare(*runs.find_runs([folder]))))
    output = capsys.readouterr().out
    assert "\x1b" not in output and "[red]a" in output and "x\\x1b[31m[bold]" in output
    terminal.say(runs.make_table([]))
