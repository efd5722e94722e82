"""Two workers, one of which is killed in each phase of a run. The other one ends, and both go on from there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from conftest import TINY, photos, tar_bytes
from faulty import PHASES
from workers import ends, finish, same_weights, start

SECONDS = 60  # for the survivor, from the death on

BEFORE_MEETING, AFTER_TRAINING = "meeting", "export"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A folder with the run `alone`, which two workers trained undisturbed, and the arguments of both."""
    folder = tmp_path_factory.mktemp("phases")
    nested = folder / "nested.tar"
    nested.write_bytes(tar_bytes((f"n{c}.tar", tar_bytes(photos(c + 1, f"n{c}_"))) for c in range(6)))
    (folder / "empty.yaml").write_text("seed: 0\n")
    arguments: list[object] = ["empty.yaml", *TINY, f"data.train=[{nested}]", f"data.val=[{nested}]"]
    arguments += ["train.steps=8", "train.validate_every=4", "train.checkpoint_every=2", "train.ema=0.9"]
    arguments += ["distribute.intra_op_threads=1"]
    finish(folder, 2, *arguments, "--run", "alone")
    return folder, arguments


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_death_in_any_phase_ends_the_other_worker_and_changes_no_weights(
    alone: tuple[Path, list[object]], phase: str
) -> None:
    folder, arguments = alone
    run = f"death in {phase}"
    limits = ["distribute.start_timeout=40"] if phase == BEFORE_MEETING else []
    for victim in (0,) if phase == AFTER_TRAINING else (0, 1):  # at the end only the chief's death leaves more to do
        workers = start(folder, 2, *arguments, *limits, "--run", run, faults=[f"die={victim},{phase}"])
        assert ends([workers[victim]])[0][0] == -signal.SIGKILL
        ((code, said),) = ends([workers[1 - victim]], 2 * SECONDS if limits else SECONDS)
        assert "Traceback" not in said, said
        if phase == AFTER_TRAINING:  # the chief writes the model alone; the other worker has ended
            assert code == 0, said
            continue
        assert code == 75 and "start the same command on all" in said, said
        if phase == BEFORE_MEETING:
            assert f"waiting for worker {victim} (127.0.0.1:" in said and "of 2 workers since 30 s, for 40 s" in said
        else:
            assert "another worker ended or stopped answering" in said
    finish(folder, 2, *arguments, "--run", run)
    assert same_weights(folder / "alone", folder / run) > 100
    for name in ("results.json", "model/model.npz"):
        assert (folder / run / name).read_bytes() == (folder / "alone" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_workers_join(alone: tuple[Path, list[object]], number: signal.Signals) -> None:
    """TensorFlow waits for a worker that died after they had met. One signal ends this wait within 5 s."""
    folder, arguments = alone
    workers = start(folder, 2, *arguments, "--run", "signal", faults=["die=1,strategy"])
    assert ends([workers[1]])[0][0] == -signal.SIGKILL
    workers[0].send_signal(number)
    ((code, said),) = ends([workers[0]], 20)
    assert code == 75 and "have not joined" not in said, said
    assert not (folder / "signal").exists()
