"""A run goes on from what version 0.1.0 left: its checkpoint's state, and the fingerprint of its data."""

from __future__ import annotations

import http.server
import json
import math
import threading
import zipfile
from pathlib import Path

from conftest import TINY, Command

from hyperprior.data.lanes import ALL, Cursor, Keep
from hyperprior.data.shards import Shard
from hyperprior.data.splits import Split, Splits
from hyperprior.data.stream import Counts
from hyperprior.training.resume import Best, State

STATE_OF_0_1 = """{
    "cursors": [[1, 2, 3, 0], [0, 5, 7, 1]], "step": 40, "samples": 81, "bad": 1, "small": 2, "visits": 9, "lost": 1,
    "nonfinite": 3, "failed": 0, "validated_step": 40, "best_loss": 3.5, "best_step": 20, "stale": 1,
    "course": [[0.5, 30.0]], "logged_step": 35, "sums": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 5.0]
}"""


def test_the_state_of_0_1_is_read() -> None:
    values = json.loads(STATE_OF_0_1)
    state = State.from_json(values)
    assert state.cursors == [Cursor(1, 2, 3), Cursor(0, 5, 7, 1)]
    assert state.counts == Counts(samples=81, bad=1, small=2, visits=9, lost=1)
    assert state.best == Best(loss=3.5, step=20, stale=1)
    assert state.sums == {
        "loss": 1.0,
        "bpp_y": 2.0,
        "bpp_z": 3.0,
        "distortion": 4.0,
        "psnr_db": 5.0,
        "gradient_norm": 6.0,
        "norms": 5.0,
        "steps": 5.0,
    }
    stored = json.loads(json.dumps(state.to_json()))
    assert State.from_json(stored) == state
    assert {**stored, "sums": values["sums"]} == {**values, "decays": 0}


def test_the_fingerprint_of_0_1_is_that_of_the_same_data() -> None:
    shards = [Shard("tar", "x/a.tar", "x/a.tar", size=1024), Shard("files", "p", "p", files=("1.jpg", "2.png"))]
    train, val = Split(shards, Keep(0.2, 1.0, 0.5), 3, 12345), Split(shards, Keep(0.1, 0.2, 0.5), 1, 7)
    splits = Splits(train, val, Split(shards, ALL), "test")
    assert splits.fingerprint(as_in_0_1=True) == "0045db6b9a94de97" != splits.fingerprint()


def test_the_best_counts_the_validations_since() -> None:
    best = Best()
    losses = [3.0, 2.0, 2.0, 2.5]
    assert [best.update(loss, step) for step, loss in enumerate(losses)] == [True, True, False, False]
    assert best == Best(loss=2.0, step=1, stale=2)
    assert best.update(1.0, 4)
    assert best == Best(loss=1.0, step=4, stale=0)


def test_a_field_of_a_later_version_is_ignored() -> None:
    values = {**json.loads(STATE_OF_0_1), "from the future": 1}
    assert State.from_json(values) == State.from_json(json.loads(STATE_OF_0_1))


def test_a_url_signed_anew_is_the_same_data_and_its_secrets_are_stored_nowhere(
    hyperprior: Command, served: str, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    def train(signature: str, steps: int, check: int = 0, name: str = flat_tar.name) -> str:
        url = f"{served.replace('//', '//user:hunter2@')}/{name}?X-Amz-Signature={signature}#{signature}"
        sources = [f"data.train=['{url}', 'pipe:cat {flat_tar} # -H \"Key: {signature}\" https://x/y?s={signature}']"]
        words = [*TINY, *sources, "data.allow_pipe=true", f"train.steps={steps}", "train.validate_every=null"]
        done = hyperprior("train", empty_config, *words, "--run", "r", check=check)
        return done.stdout + done.stderr

    output = train("aaaaSECRET", 2) + train("bbbbSECRET", 4) + hyperprior("export", "r", "--out", "m").stdout
    assert "resumed at step 2" in output
    output += train("ccccSECRET", 9, check=3, name="missing.tar")
    stored = output.encode() + (tmp_path / "r" / "config.yaml").read_bytes()
    assert b"127.0.0.1" in stored
    for path in [*(tmp_path / "r").rglob("*"), *(tmp_path / "m").rglob("*")]:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as file:
                stored += b"".join(map(file.read, file.namelist()))
        elif path.is_file():
            stored += path.read_bytes()
    assert b"SECRET" not in stored and b"hunter2" not in stored
    config = json.loads((tmp_path / "m" / "model.json").read_text())["config"]
    assert set(config["data"]) == {"patch_size", "eval_crop", "val_split", "test_split", "allow_pipe"}  # what was set
    assert {"num_filters", "num_scales"} <= config["model"].keys() and "summaries" in config


def test_the_cost_of_exactness_is_measured_with_the_secrets_of_the_sources_or_says_what_is_missing(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    class Guarded(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if "key=SECRET" in self.path else 403)
            self.end_headers()
            self.wfile.write(flat_tar.read_bytes() if "key=SECRET" in self.path else b"")

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar?key=SECRET"
        for run, source in (("url", url), ("pipe", f"pipe:cat {flat_tar} # --token=SECRET")):
            words = [*TINY, f"data.train=[{flat_tar}]", f"data.val=['{source}']", "data.allow_pipe=true"]
            trained = hyperprior("train", empty_config, *words, "train.steps=1", "--run", run).stdout
            assert "integer h_s costs" in trained
            exported = hyperprior("export", run, "--out", f"{run}-model").stdout
            assert "was not measured: the run's images cannot be read" in exported
            assert "a run keeps no query, password or header" in exported and "SECRET" not in exported
            assert ("lacks a part" in exported) == (run == "pipe")
            assert str(tmp_path) not in (tmp_path / f"{run}-model" / "model.json").read_text()  # no name of a source
        server.shutdown()


def test_a_validation_without_images_is_never_the_best() -> None:
    best = Best()
    assert [best.update(loss, step) for step, loss in enumerate([math.nan, 2.0, math.nan, 3.0, 1.0])] == [
        *(False, True, False, False, True)
    ]
    assert (best.loss, best.step, best.stale) == (1.0, 4, 0)
