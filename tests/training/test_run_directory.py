"""A run directory under random sequences of training, stops, kills, full disks, damage, and files beside ours.

After each command: the user's own files are as they were. Every checkpoint that nobody damaged is whole, and equals the
uninterrupted run at its step bit for bit, unless a warning said why not. A command that fails says so in one line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import TINY, photo, photos, tar_bytes
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from hyperprior import storage
from hyperprior.training import checkpoint
from hyperprior.watch.summaries import Summaries

STEPS = 12
KEPT = 3
SPEEDS = {"images_per_s", "input_wait", "all_reduce"}
TRAIN_KEYS = {"loss", "bpp", "bpp_y", "bpp_z", "distortion", "psnr_db", "gradient_norm", "learning_rate"}
DEVIATES = "the weights may not be bit-identical"
NOTE = b"a note of the user"
OURS = ["newest", "oldest", "all", "best.npz", "metrics.jsonl", "config.yaml"]

# Names that look like ours, and a folder with exactly such a name.
COPIES = ["step-000000006 (copy).npz", "step-good.npz", "step-6.npz", "best (1).npz", ".step-000000003.npz.swp"]
FOLDERS = ["mine", "checkpoints/mine", "checkpoints/step-000000099.npz", "train/mine"]


class RunDirectory(RuleBasedStateMachine):
    """The rules. `folder`: where all examples live; `arguments`: those of the run; `whole`: the uninterrupted run."""

    folder: Path
    arguments: list[str]
    whole: Path
    done: Counter[str]

    @initialize(step=st.integers(1, STEPS))
    def begin(self, step: int) -> None:
        self.done["examples"] += 1
        self.place = self.folder / f"example-{self.done['examples']}"
        self.place.mkdir()
        self.run = self.place / "r"
        self.own_files: dict[Path, bytes] = {}
        self.damaged: set[str] = set()  # names of our files
        self.deviates = self.best_was_lost = False
        self.log: list[str] = []
        self.train([f"halt={step}"])

    # Training ---------------------------------------------------------------------------------------------

    @rule(devices=st.sampled_from([1, 1, 1, 2]))
    def train_to_the_end(self, devices: int) -> None:
        self.train([], devices)

    @rule(step=st.integers(1, STEPS), devices=st.sampled_from([1, 1, 1, 2]))
    def stop(self, step: int, devices: int) -> None:
        self.train([f"halt={step}"], devices)

    @rule(operation=st.integers(1, 120), step=st.integers(1, STEPS))
    def kill(self, operation: int, step: int) -> None:
        self.train([f"kill={operation}", f"halt={step}"])

    @rule(operation=st.integers(1, 120), step=st.integers(1, STEPS), size=st.sampled_from([4096, 30_000, 300_000]))
    def fill_the_disk(self, operation: int, step: int, size: int) -> None:
        self.train([f"full={operation},{size}", f"halt={step}"])

    def train(self, faults: list[str], devices: int = 1) -> None:
        intact = self.intact_steps()
        was_new = not checkpoint.steps_in(self.run / "checkpoints")
        config = self.run / "config.yaml"
        before = config.read_bytes() if config.is_file() else b""
        result = self.command(["train", *self.arguments, f"distribute.cpu_devices={devices}", "--run", "r"], faults)
        said = result.stdout + result.stderr
        if was_new:  # the first step decides
            self.deviates = devices != 1
        self.deviates |= DEVIATES in said
        self.best_was_lost |= "the search for the best starts again" in said or "instead of the best" in said
        allowed = {0, 75, -9} if any(fault.startswith("kill") for fault in faults) else {0, 75}
        if not faults:
            allowed = {0}
        if not intact and not was_new:
            allowed = {2, -9}
            assert result.returncode == -9 or "is intact; move them away for a new run" in said, said
        elif not was_new and result.returncode == 0 and "is done" not in said:
            assert f"resumed at step {max(intact)}" in said, said
        if self.user_file_in_model():
            allowed.add(2)
        assert result.returncode in allowed, f"{result.returncode}\n{said}"
        if result.returncode == 0:
            assert max(checkpoint.steps_in(self.run / "checkpoints")) == STEPS
        if config.is_file() and config.read_bytes() != before:  # a command that was killed early has not renewed it
            self.damaged.discard("config.yaml")
        self.check_metrics(is_complete=result.returncode in (0, 75) and "cannot be written" not in said)

    # Files ------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(COPIES), newest=st.booleans())
    def copy_a_file_beside(self, name: str, newest: bool) -> None:
        steps = self.intact_steps()
        source = checkpoint.path_of(self.run / "checkpoints", max(steps) if newest else min(steps)) if steps else None
        target = self.run / "checkpoints" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes() if source else b"")
        self.own_files[target] = target.read_bytes()

    @rule(name=st.sampled_from([*FOLDERS, "model"]))
    def keep_a_note(self, name: str) -> None:
        if name == "model" and not (self.run / "model").is_dir():
            return
        note = self.run / name / "note.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(NOTE)
        self.own_files[note] = NOTE

    @rule(
        which=st.sampled_from(["newest", "oldest", "all", "best.npz", "metrics.jsonl", "config.yaml", "results.json"])
    )
    def delete(self, which: str) -> None:
        for path in self.choose(which):
            path.unlink()
            self.damaged.discard(path.name)

    @rule(which=st.sampled_from(OURS), place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
    def damage(self, which: str, place: float, cut: bool) -> None:
        for path in self.choose(which):
            content = bytearray(path.read_bytes())
            if not content:
                continue
            position = int(place * len(content))
            if cut:
                del content[position:]
            else:
                content[position : position + 16] = bytes(byte ^ 0xA5 for byte in content[position : position + 16])
            path.write_bytes(content)
            self.damaged.add(path.name)

    def choose(self, which: str) -> list[Path]:
        steps = checkpoint.steps_in(self.run / "checkpoints")
        paths = [checkpoint.path_of(self.run / "checkpoints", step) for step in steps]
        if which in ("newest", "oldest", "all"):
            return {"newest": paths[-1:], "oldest": paths[:1], "all": paths}[which]
        path = self.run / "checkpoints" / which if which == "best.npz" else self.run / which
        return [path] if path.is_file() else []

    # Other commands ---------------------------------------------------------------------------------------

    @rule(command=st.sampled_from(["export", "evaluate", "look"]))
    def use(self, command: str) -> None:
        getattr(self, command)()

    def export(self) -> None:
        result = self.command(["export", "r"])
        refuses = not self.intact_steps() or self.user_file_in_model()
        assert result.returncode == (2 if refuses else 0), result.stderr

    def evaluate(self) -> None:
        has_model = (self.run / "model" / "model.npz").is_file()
        words = ["evaluate", "r", "--images", "../photos", "--out", "out", "--baselines", "none", "--engine", "numpy"]
        assert self.command(words).returncode == (0 if has_model else 2)

    def look(self) -> None:
        has_config = (self.run / "config.yaml").is_file() and (self.run / "lock").exists()
        code = self.command(["runs", "."]).returncode
        assert code == 0 if has_config and "config.yaml" not in self.damaged else code in (0, 2)

    # What holds -------------------------------------------------------------------------------------------

    def command(self, words: list[str], faults: list[str] = []) -> subprocess.CompletedProcess[str]:  # noqa: B006
        self.done[f"{words[0]} {' '.join(fault.partition('=')[0] for fault in faults[:1])}".strip()] += 1
        self.done["rules with a command"] += 1
        self.log.append(" ".join([*faults, *words]))
        result = forked.run(words, self.place, faults)
        assert "Traceback" not in result.stderr, self.tell(result)
        if result.returncode > 0:
            errors = [line for line in result.stderr.splitlines() if line.startswith("hyperprior: ")]
            assert len(errors) == 1 and result.stderr.rstrip().splitlines()[-1] == errors[0], self.tell(result)
        self.check_files(result)
        return result

    def tell(self, result: subprocess.CompletedProcess[str]) -> str:
        return f"{self.log[-1]}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}"

    def check_files(self, result: subprocess.CompletedProcess[str]) -> None:
        for path, content in self.own_files.items():
            assert path.read_bytes() == content, (path, self.tell(result))
        if result.returncode >= 0:
            assert not [path for path in self.run.rglob("*.tmp") if path.is_dir()], self.tell(result)
        folder = self.run / "checkpoints"
        for step in checkpoint.steps_in(folder):
            path = checkpoint.path_of(folder, step)
            if path.name in self.damaged:
                with contextlib.suppress(ValueError):  # a later command replaced it
                    storage.load_arrays(path, checkpoint.FORMAT)
                    self.damaged.discard(path.name)
                continue
            arrays, state = storage.load_arrays(path, checkpoint.FORMAT)
            expected, expected_state = load_step(self.whole, step)
            assert state["run"]["step"] == step and arrays.keys() == expected.keys()
            for name in ("cursors", "samples", "visits", "bad", "small", "lost"):
                assert state["run"][name] == expected_state["run"][name], (name, self.tell(result))
            if not (self.deviates or DEVIATES in result.stderr or "2 x CPU" in result.stdout):
                unequal = [name for name in arrays if arrays[name].tobytes() != expected[name].tobytes()]
                assert not unequal, (step, unequal, self.tell(result))

    def check_metrics(self, is_complete: bool) -> None:
        """`is_complete`: the command ended by itself on a good disk, so the file has no torn line."""
        path = self.run / "metrics.jsonl"
        if not is_complete or not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        steps = checkpoint.steps_in(self.run / "checkpoints")
        expected = {(row["kind"], row["step"]): row for row in rows_of(self.whole)}
        for kind in ("train", "val"):
            own = [row for row in rows if row["kind"] == kind]
            reached = [row["step"] for row in own]
            assert reached == sorted(set(reached)) and max(reached, default=0) <= max(steps, default=0), reached
            for row in own:
                like = expected.get((kind, row["step"]))
                if like and not self.deviates and "metrics.jsonl" not in self.damaged:
                    assert row.keys() == like.keys()
                    assert all(row[name] == like[name] for name in row.keys() - SPEEDS), (row, like)

    def intact_steps(self) -> list[int]:
        folder = self.run / "checkpoints"
        return [s for s in checkpoint.steps_in(folder) if checkpoint.path_of(folder, s).name not in self.damaged]

    def user_file_in_model(self) -> bool:
        return self.run / "model" / "note.txt" in self.own_files

    def teardown(self) -> None:
        """Whatever happened: without the damaged checkpoints the run comes to its end."""
        if not hasattr(self, "run"):
            return
        for name in self.damaged:
            with contextlib.suppress(FileNotFoundError):
                (self.run / "checkpoints" / name).unlink()
        self.damaged -= {name for name in self.damaged if name.endswith(".npz")}
        self.train([])
        if not self.deviates:
            result, expected = (json.loads((run / "results.json").read_text()) for run in (self.run, self.whole))
            if not self.best_was_lost:
                assert result == expected
        shutil.rmtree(self.place)


@functools.lru_cache(maxsize=STEPS + 1)
def load_step(whole: Path, step: int) -> tuple[storage.Arrays, dict[str, Any]]:
    return storage.load_arrays(checkpoint.path_of(whole / "checkpoints", step), checkpoint.FORMAT)


@functools.lru_cache(maxsize=1)
def rows_of(whole: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]


def make_machine(folder: Path) -> type[RunDirectory]:
    """The rules for runs in `folder`, with the uninterrupted run to compare with."""
    (folder / "empty.yaml").write_text("seed: 0\n")
    (folder / "photos").mkdir()
    photo(1).save(folder / "photos" / "a.png")
    (folder / "flat.tar").write_bytes(tar_bytes(photos(24)))
    arguments = ["../empty.yaml", *TINY, "data.train=[../flat.tar]", "data.val=[../flat.tar]", "train.ema=0.9"]
    arguments += [f"train.steps={STEPS}", "train.validate_every=4", f"train.keep_checkpoints={KEPT}"]
    arguments += ["distribute.intra_op_threads=1", "train.checkpoint_every=3"]
    (folder / "whole").mkdir()
    every = ["train.checkpoint_every=1", f"train.keep_checkpoints={STEPS + 1}"]
    result = forked.run(["train", *arguments, *every, "--run", "whole"], folder / "whole")
    assert result.returncode == 0, result.stderr

    class Machine(RunDirectory):
        pass

    Machine.folder, Machine.arguments, Machine.whole = folder, arguments, folder / "whole" / "whole"
    Machine.done = Counter()
    return Machine


def explore(folder: Path, examples: int, rules: int) -> Counter[str]:
    """Runs `examples` sequences of at most `rules` rules. Prints and returns how often each command ran."""
    machine = make_machine(folder)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=rules,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)  # type: ignore[no-untyped-call]
    finally:
        print(dict(machine.done))
    return machine.done


def test_a_history_with_every_kind_of_event_loses_nothing(tmp_path: Path) -> None:
    history = make_machine(tmp_path)()
    history.begin(4)
    history.copy_a_file_beside(COPIES[0], newest=True)
    history.keep_a_note("mine")
    history.kill(35, 9)
    history.damage("newest", 0.5, cut=False)
    history.damage("metrics.jsonl", 0.5, cut=True)
    history.fill_the_disk(25, 10, 30_000)
    history.delete("best.npz")
    history.use("export")
    history.teardown()


def test_damaged_lines_of_the_log_are_left_out_and_the_rest_stays(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}).encode() for step in (2, 4, 6, 8)]
    foreign = [b'"mine"', b"[1]", b'{"kind": "train"}', b'{"kind": "skipped", "step": 3}', b'{"step": "3"}']
    damaged = [lines[0], b'{"kind": "tr\xff', *foreign, lines[1], b"\0\0", lines[2], lines[3], b'{"kind": "tra']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(damaged))
    warnings: list[str] = []
    report = Summaries(tmp_path, 6, warnings.append)
    report.write_record("val", 6, loss=2.0)
    report.close()
    row = b'{"kind": "val", "step": 6, "loss": 2.0}'
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == [*lines[:3], row]
    assert len(warnings) == 1 and "metrics.jsonl: damaged lines that are left out from now on: 7" in warnings[0]


@pytest.mark.slow
def test_many_histories_lose_nothing(tmp_path: Path) -> None:
    count = int(os.environ.get("HYPERPRIOR_HISTORIES", "60"))
    assert explore(tmp_path, count, 8)["examples"] >= count
