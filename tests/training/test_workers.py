"""Several workers in separate processes: kills, stops, lost workers, and configs that differ."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Command, photos, tar_bytes
from workers import ROOT, ends, finish, keys_of, lines, newest, same_weights, start, wait_for

from hyperprior.training import checkpoint


@pytest.fixture
def arguments(nested_tar: Path, empty_config: Path) -> list[object]:
    return [
        empty_config,
        *TINY,
        f"data.train=[{nested_tar}]",
        f"data.val=[{nested_tar}]",
        "train.learning_rate=1e-4",
        "distribute.intra_op_threads=1",
    ]


def test_two_workers_train_like_one_stop_together_and_continue_as_one(
    hyperprior: Command, tmp_path: Path, arguments: list[object]
) -> None:
    arguments += ["train.steps=12", "train.validate_every=12", "train.ema=0.9", "summaries.images_every=6"]
    hyperprior("train", *arguments, "--run", "one")
    workers = start(tmp_path, 2, *arguments, "--run", "two", faults=["slow=0.1"])
    wait_for(tmp_path / "two", 4, workers[0])
    workers[1].send_signal(signal.SIGTERM)  # not the chief
    outcomes = ends(workers)
    assert [code for code, _ in outcomes] == [75, 75], outcomes
    assert all("start the same command again" in said for _, said in outcomes)
    hyperprior("train", *arguments, "--run", "two")
    states = [newest(tmp_path / run)[1]["run"] for run in ("one", "two")]
    assert states[0]["cursors"] == states[1]["cursors"]  # type: ignore[index]
    for row_a, row_b in zip(lines(tmp_path / "one", "train"), lines(tmp_path / "two", "train")):
        assert row_a["step"] == row_b["step"] and row_a["loss"] == pytest.approx(row_b["loss"], rel=2e-3)
    assert lines(tmp_path / "two", "val")[0]["images"] == 21


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_takes_effect_within_a_call_of_many_steps(tmp_path: Path, arguments: list[object], count: int) -> None:
    intervals = ["train.steps_per_call=400", "train.validate_every=null", "summaries.scalars_every=400"]
    intervals += ["train.steps=5000", "train.checkpoint_every=5000", "--run", "r"]
    workers = start(tmp_path, count, *arguments, *intervals)
    wait_for(tmp_path / "r", 1, workers[0])  # the first call is over
    time.sleep(1)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert [code for code, _ in ends(workers)] == [75] * count
    assert newest(tmp_path / "r")[1]["run"]["step"] % 400 > 0  # type: ignore[index]


NAN = ["train.steps=9", "train.checkpoint_every=2", "train.validate_every=null", "train.steps_per_call=3"]


def test_nan_on_one_worker_stops_all_before_the_weights_change(tmp_path: Path, arguments: list[object]) -> None:
    outcomes = ends(start(tmp_path, 2, *arguments, *NAN, "--run", "stops", faults=["nan=5,6"]))
    for code, said in outcomes:
        assert code == 4 and "not finite at step 5" in said
        assert said.count("nested.tar//n") == 4  # the keys of the whole global batch
    arrays, state = newest(tmp_path / "stops")
    assert state["run"]["step"] == 4  # type: ignore[index]
    assert all(np.isfinite(value).all() for value in arrays.values())


@pytest.mark.slow
def test_nan_on_one_worker_is_skipped_by_all(tmp_path: Path, arguments: list[object]) -> None:
    arguments += NAN
    finish(tmp_path, 2, *arguments, "train.on_nonfinite=skip", "--run", "skips", faults=["nan=5,6"])
    arrays, state = newest(tmp_path / "skips")
    run = state["run"]
    assert (run["step"], run["nonfinite"], run["failed"]) == (9, 2, 0)  # type: ignore[index]
    assert all(np.isfinite(value).all() for value in arrays.values()) and arrays["optimizer/updates"] == 7
    assert [row["nonfinite"] for row in lines(tmp_path / "skips", "train")] == [0] * 5 + [1] + [2] * 3
    limited = [*arguments, "train.on_nonfinite=skip", "train.max_nonfinite=2", "--run", "limited"]
    for code, said in ends(start(tmp_path, 2, *limited, faults=["nan=5,6"])):
        assert code == 4 and "not finite 2 times in a row, last at step 6" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["seed=1", "train.steps=7"], 2, "workers 0 and 1 disagree: seed is 0 and 1; train.steps is 5 and 7"),
        pytest.param(
            ["data.train=[other.tar]"], 2, "workers 0 and 1 disagree: data is 6 shards", marks=pytest.mark.slow
        ),
        pytest.param(["data.train=[none.tar]"], 3, "none.tar cannot be read: No such file", marks=pytest.mark.slow),
    ],
)
def test_workers_that_differ_are_refused_with_the_difference(
    tmp_path: Path, arguments: list[object], words: list[object], code: int, message: str
) -> None:
    (tmp_path / "other.tar").write_bytes(tar_bytes(photos(30)))
    workers = start(tmp_path, 2, *arguments, "train.steps=5", "--run", "r", each=[[], words])
    for exit_code, said in ends(workers):
        assert exit_code == code and message in said, said
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_workers_with_different_devices_are_refused_before_they_train(tmp_path: Path, arguments: list[object]) -> None:
    devices = [["distribute.cpu_devices=1"], ["distribute.cpu_devices=2"]]
    for code, said in ends(start(tmp_path, 2, *arguments, "--run", "r", each=devices)):
        # Newer versions of TensorFlow log lines of their own.
        assert code == 2 and sum(line.startswith("hyperprior: ") for line in said.splitlines()) == 1, said
        assert "workers have different devices: worker 0 has 1 x CPU, worker 1 has 2 x CPU; give all the same" in said
    assert not (tmp_path / "r").exists()


def test_a_worker_that_never_starts_is_named(tmp_path: Path, arguments: list[object]) -> None:
    workers = start(tmp_path, 3, *arguments, "distribute.start_timeout=12", "--run", "r", only=[0, 2])
    for code, said in ends(workers):
        assert code == 75 and "no answer in 12 s (distribute.start_timeout) from worker 1 (127.0.0.1:" in said
        assert said.count("127.0.0.1:") == 1


def test_all_workers_can_resume_after_a_full_disk_on_the_chief(tmp_path: Path, arguments: list[object]) -> None:
    arguments += ["train.steps=3000", "train.checkpoint_every=2", "train.validate_every=null", "--run", "r"]
    workers = start(tmp_path, 2, *arguments, faults=["slow=0.05"])
    wait_for(tmp_path / "r", 6, workers[0])
    # From now on the chief cannot write beyond 100 kB of a file. A checkpoint then fails as on a full disk.
    import resource

    resource.prlimit(workers[0].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    for code, said in ends(workers):
        assert code == 75 and "cannot be written" in said and "free the disk" in said, said
    assert newest(tmp_path / "r")


@pytest.mark.slow
def test_workers_sh_restarts_all_workers_after_a_kill(tmp_path: Path, arguments: list[object]) -> None:
    arguments += ["train.steps=40", "train.checkpoint_every=5", "train.validate_every=null"]
    disturbed(tmp_path, arguments, [kill])


Fault = Callable[[list[int], Path], None]


def kill(victims: list[int], run: Path) -> None:
    os.kill(random.choice(victims), signal.SIGKILL)


def terminate(victims: list[int], run: Path) -> None:
    os.kill(random.choice(victims), signal.SIGTERM)


def freeze(victims: list[int], run: Path) -> None:
    os.kill(random.choice(victims), signal.SIGSTOP)


def corrupt(victims: list[int], run: Path) -> None:
    """Damages the newest checkpoint if there is an older one, so that the run can continue, and kills a worker."""
    checkpoints = [checkpoint.path_of(run / "checkpoints", step) for step in checkpoint.steps_in(run / "checkpoints")]
    if len(checkpoints) > 1:
        os.truncate(checkpoints[-1], random.randrange(checkpoints[-1].stat().st_size))
    kill(victims, run)


def disturbed(tmp_path: Path, arguments: list[object], faults: Iterable[Fault]) -> list[tuple[str, float]]:
    """Runs two workers under workers.sh, applies `faults` to them, and compares with two undisturbed workers.

    Returns each fault's name and the seconds until both workers had ended.
    """
    environment = {**os.environ, "HYPERPRIOR": str(Path(sys.executable).with_name("hyperprior"))}
    script = ROOT / "launch" / "workers.sh"
    run = tmp_path / "disturbed"
    command = [script, "--max-restarts", 10_000, "--max-pause", 1, "2", *arguments, "--run", run]
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    seconds: list[tuple[str, float]] = []
    random.seed(1)
    try:
        for fault in faults:
            began, before, victims = time.monotonic(), len(run_rows(run)), list[int]()
            while len(victims) < 2 or len(run_rows(run)) in (0, before):
                assert process.poll() is None and time.monotonic() - began < 180, process.communicate()[1]
                time.sleep(0.02)
                victims = workers_of(process.pid)
                before = min(before, len(run_rows(run)) or before)
            time.sleep(2 * random.random())
            began = time.monotonic()
            fault(victims, run)
            while set(workers_of(process.pid)) & set(victims):
                time.sleep(0.02)
            seconds.append((fault.__name__, time.monotonic() - began))
        said = process.communicate(timeout=1200)[1]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert said.count("all workers start again") == len(seconds)
    assert said.count("was killed by signal 9") >= sum(name == "kill" for name, _ in seconds)
    assert "TF_CONFIG" not in said  # Bash would show the source of what was killed
    finish(tmp_path, 2, *arguments, "--run", "alone", timeout=1200)
    assert same_weights(tmp_path / "alone", run) > 100
    return seconds


def run_rows(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []


def workers_of(shell: int) -> list[int]:
    """The workers among the processes that a shell started."""
    listing = subprocess.run(["pgrep", "-P", str(shell), "-f", "hyperprior train"], capture_output=True, text=True)
    return [int(pid) for pid in listing.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "code"), [(0.01, 3), (1.0, 0)])
def test_a_shard_truncated_during_a_run_is_counted_alike_on_every_worker(
    tmp_path: Path, arguments: list[object], share: float, code: int
) -> None:
    shards = [tmp_path / f"s{i}.tar" for i in range(8)]
    for i, path in enumerate(shards):
        path.write_bytes(tar_bytes(photos(4, f"s{i}_")))
    arguments += [f"data.train=[{', '.join(map(str, shards))}]", "train.validate_every=null", "train.steps=60"]
    run = tmp_path / "r"
    workers = start(tmp_path, 2, *arguments, f"data.max_bad_fraction={share}", "--run", run, faults=["slow=0.1"])
    wait_for(run, 3, workers[0])
    for path in shards[:4]:
        os.truncate(path, 3000)
    ended = ends(workers)
    assert [exit_code for exit_code, _ in ended] == [code, code], ended
    warned = [sorted({row for row in said.splitlines() if row.startswith("warning: ")}) for _, said in ended]
    assert warned[0] == warned[1] and warned[0]
    assert all("the file was longer" in row and any(str(path) in row for path in shards[:4]) for row in warned[0]), (
        warned
    )
    named = {row["sample"] for row in lines(run, "skipped")}
    assert len(named) == len(warned[0])
    if code:
        # The first error depends on how many of the shards had been indexed when they were cut.
        kinds = ("samples are unusable", "shards that were begun could not be read to their end")
        assert any(all(kind in said for _, said in ended) for kind in kinds), ended


# Slow -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills_do_not_change_the_weights(tmp_path: Path, arguments: list[object]) -> None:
    arguments += ["train.steps=3000", "train.checkpoint_every=25", "train.validate_every=500", "train.ema=0.99"]
    seconds = [each for _, each in disturbed(tmp_path, arguments, [kill] * 20)]
    print(f"20 kills: the other worker ended after {min(seconds):.1f} to {max(seconds):.1f} s")
    assert max(seconds) < 60


@pytest.mark.slow
def test_half_an_hour_of_faults_does_not_change_the_weights(tmp_path: Path, arguments: list[object]) -> None:
    end = time.monotonic() + 60 * float(os.environ.get("HYPERPRIOR_SOAK_MINUTES", "30"))

    def faults() -> Iterator[Fault]:
        while time.monotonic() < end:
            yield random.choice([kill, kill, terminate, terminate, corrupt, freeze])

    arguments += ["train.steps=30000", "train.checkpoint_every=200", "train.validate_every=3000", "train.ema=0.99"]
    seconds = disturbed(tmp_path, [*arguments, "summaries.scalars_every=20"], faults())
    for name in ("kill", "terminate", "corrupt", "freeze"):
        times = [each for fault, each in seconds if fault == name]
        print(f"{len(times)} x {name}: both workers had ended after {min(times):.1f} to {max(times):.1f} s")
    assert len(seconds) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_worker_ends_if_a_worker_hangs(tmp_path: Path, arguments: list[object], victim: int) -> None:
    workers = start(tmp_path, 2, *arguments, "train.steps=100000", "train.validate_every=null", "--run", "r")
    wait_for(tmp_path / "r", 4, workers[0])
    began = time.monotonic()
    workers[victim].send_signal(signal.SIGSTOP)
    other = workers[1 - victim]
    _, said = other.communicate(timeout=60)
    print(f"gave up after {time.monotonic() - began:.1f} s")
    assert other.returncode == 75 and "another worker ended or stopped answering" in said
    workers[victim].send_signal(signal.SIGCONT)  # it wakes up alone, and ends too
    assert ends([workers[victim]], 60)[0][0] == 75


@pytest.mark.slow
def test_any_number_of_workers_sees_the_same_batches(tmp_path: Path, arguments: list[object]) -> None:
    arguments += ["train.steps=50", "train.validate_every=50", "train.checkpoint_every=10"]
    batches, weights, losses = {}, {}, {}
    for name, parts in {
        "1": [(1, 50, 1)],
        "2": [(2, 50, 1)],
        "4": [(4, 50, 1)],
        "2x2": [(2, 50, 2)],
        "2, 1, 4": [(2, 17, 1), (1, 31, 1), (4, 50, 1)],
    }.items():
        (tmp_path / f"keys {name}").mkdir()
        batch_keys: list[list[str]] = []
        for count, end, devices in parts:
            keys = tmp_path / f"keys {name}" / str(end)
            keys.mkdir()
            steps = [f"train.steps={end}", f"distribute.cpu_devices={devices}", "--run", f"run {name}"]
            finish(tmp_path, count, *arguments, *steps, faults=[f"keys={keys}"])
            padded = [[]] * len(batch_keys)
            for worker in range(count):  # the files of a part begin at the step where it resumed
                path = keys / f"worker-{worker}.txt"
                path.write_text("".join(f"{i} []\n" for i in range(len(padded))) + path.read_text())
            batch_keys += keys_of(keys, count)[len(batch_keys) :]
        batches[name] = batch_keys
        arrays, state = newest(tmp_path / f"run {name}")
        weights[name] = {key: value for key, value in arrays.items() if key.startswith("model/")}
        losses[name] = lines(tmp_path / f"run {name}", "val")[-1]["loss"]
        assert lines(tmp_path / f"run {name}", "val")[-1]["images"] == 21
    assert len(batches["1"]) == 50 and all(len(batch) == 4 for batch in batches["1"])
    for name in batches:
        assert batches[name] == batches["1"], name
        assert losses[name] == pytest.approx(losses["1"], rel=1e-3)
        for key, value in weights[name].items():
            # Adam can turn the rounding error of a tiny gradient into a full step, at most in each of the steps.
            assert np.abs(value - weights["1"][key]).max() <= 2 * 50 * 1e-4, (name, key)
            assert np.abs(value - weights["1"][key]).mean() <= 1e-4, (name, key)


@pytest.mark.slow
def test_clock_time_zone_locale_and_directory_have_no_effect(
    tmp_path: Path, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments += ["train.steps=20", "train.validate_every=10", "train.checkpoint_every=5"]
    finish(tmp_path, 2, *arguments, "--run", "plain")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    finish(tmp_path, 2, *arguments, "train.steps=10", "--run", "odd", faults=["clock=1e6"])
    monkeypatch.setenv("TZ", "America/Adak")
    monkeypatch.setenv("LC_ALL", "C")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "odd").rename(tmp_path / "elsewhere" / "odd")
    finish(tmp_path, 2, *arguments, "--run", "elsewhere/odd", faults=["clock=-1e6"])
    same_weights(tmp_path / "plain", tmp_path / "elsewhere" / "odd")


@pytest.mark.slow
def test_a_full_file_system_ends_the_run(tmp_path: Path, arguments: list[object], hyperprior: Command) -> None:
    """A full tmpfs under the checkpoints ends the run. Under the summaries alone it does not. Needs root."""
    arguments += ["train.checkpoint_every=5", "train.validate_every=null"]
    for folder, size in (("checkpoints", "1m"), ("train", "8k")):
        mount = tmp_path / folder / folder
        mount.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
        try:
            result = hyperprior("train", *arguments, "train.steps=60", "--run", folder, check=None)
            if folder == "train":
                assert result.returncode == 0 and "scalars: not all can be written, training goes on" in result.stderr
                assert newest(tmp_path / folder)[1]["run"]["step"] == 60  # type: ignore[index]
            else:
                assert result.returncode == 75 and "No space left on device" in result.stderr
                assert len(result.stderr.splitlines()) == 1
                assert 5 <= newest(tmp_path / folder)[1]["run"]["step"] < 60  # type: ignore[index]
        finally:
            subprocess.run(["umount", mount], check=True)


@pytest.mark.slow
def test_a_stalled_shard_is_named_and_counts_as_input_wait(tmp_path: Path, arguments: list[object]) -> None:
    sources = []
    for i in range(8):
        (tmp_path / f"s{i}.tar").write_bytes(tar_bytes(photos(4, f"s{i}_")))
        sources.append(f"'pipe:sleep 33; cat {tmp_path}/s{i}.tar'")
    arguments += [f"data.train=[{', '.join(sources)}]", "data.allow_pipe=true", "train.validate_every=null"]
    for code, said in ends(start(tmp_path, 2, *arguments, "train.steps=3", "--run", "r")):
        assert code == 0 and "no input for 30 s: waiting for pipe:sleep 33; cat" in said, said
    assert lines(tmp_path / "r", "train")[0]["input_wait"] > 0.6
