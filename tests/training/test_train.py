"""Whole runs in separate processes: exact resuming, distribution, stopping, and the files that they write."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import TINY, Command, encoded, photo, photos, tar_bytes
from workers import lines, newest, same_weights, start_training, wait_for

from hyperprior.training import checkpoint, export
from hyperprior.training.progress import describe_result
from hyperprior.training.validation import divide_sums


def test_the_result_says_how_many_images_have_an_ms_ssim() -> None:
    sums = {"loss": 6.0, "bpp_y": 2.0, "bpp_z": 1.0, "psnr_db": 90.0, "ms_ssim": 1.8, "ms_ssim_images": 2.0}
    means = divide_sums({**sums, "images": 3.0})
    assert (means["images"], means["ms_ssim_images"]) == (3, 2) and means["ms_ssim"] == 0.9 and means["loss"] == 2.0
    result = {**means, "split": "val", "step": 1, "trained_steps": 1}
    assert "3 images (MS-SSIM: the 2 that are large enough)" in describe_result(result, Path("r"))[1]
    assert "MS-SSIM" not in describe_result({**result, "ms_ssim_images": 3}, Path("r"))[1]
    assert "ms_ssim_images" not in divide_sums({**sums, "ms_ssim_images": 0.0, "images": 3.0})


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    hyperprior: Command, tmp_path: Path, nested_tar: Path, empty_config: Path
) -> None:
    arguments = [
        empty_config,
        *TINY,
        f"data.train=[{nested_tar}]",
        "train.steps=20",
        "train.checkpoint_every=20",
        "summaries.scalars_every=3",
        "train.ema=0.9",
        "train.schedule=cosine",
        f"data.val=[{nested_tar}]",
        "train.validate_every=5",
        "data.patches_per_image=2",
    ]
    hyperprior("train", *arguments, "--run", "straight")
    process = start_training(tmp_path, *arguments, "--run", "stopped")
    wait_for(tmp_path / "stopped", 2, process)  # two rows: step 6
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "start the same command again" in output
    middle = newest(tmp_path / "stopped")[1]["run"]["step"]  # type: ignore[index]
    assert 6 <= middle < 20
    hyperprior("train", *arguments, "--run", "stopped")

    (a, state_a), (b, state_b) = newest(tmp_path / "straight"), newest(tmp_path / "stopped")
    assert a.keys() == b.keys() and any(name.startswith("optimizer/adam_v") for name in a)
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different
    assert state_a == state_b
    # The metrics of each step are the same, except for the speeds.
    for kind in ("train", "val"):
        rows = [
            [
                {k: v for k, v in row.items() if k not in ("images_per_s", "input_wait", "all_reduce")}
                for row in lines(tmp_path / run, kind)
            ]
            for run in ("straight", "stopped")
        ]
        assert rows[0] == rows[1] and rows[0]
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("straight", "stopped")]
    assert results[0] == results[1]


def test_two_devices_train_like_one(hyperprior: Command, tmp_path: Path, nested_tar: Path, empty_config: Path) -> None:
    arguments = [
        empty_config,
        *TINY,
        f"data.train=[{nested_tar}]",
        "train.steps=4",
        "train.learning_rate=1e-4",
        f"data.val=[{nested_tar}]",
        "train.validate_every=4",
        "train.clip_norm=null",
        "train.initial=random",  # wavelets have gradients of rounding errors alone, which Adam follows
    ]
    hyperprior("train", *arguments, "--run", "one")
    hyperprior("train", *arguments, "distribute.cpu_devices=2", "--run", "two")
    (a, state_a), (b, state_b) = newest(tmp_path / "one"), newest(tmp_path / "two")
    assert state_a["run"]["cursors"] == state_b["run"]["cursors"]  # type: ignore[index]
    for name in a:
        if "adam_m" in name:  # linear in the gradients: only the order of float sums differs
            assert np.abs(a[name] - b[name]).max() <= 1e-4 * np.abs(a[name]).max() + 1e-7, name
        if name.startswith("model/"):  # Adam can turn the rounding error of a tiny gradient into a full step
            assert np.abs(a[name] - b[name]).max() <= 2 * 4 * 1e-4, name
            assert np.abs(a[name] - b[name]).mean() <= 2e-6 + 1e-4 * np.abs(a[name]).mean(), name
    for row_a, row_b in zip(lines(tmp_path / "one", "train"), lines(tmp_path / "two", "train")):
        assert row_a["loss"] == pytest.approx(row_b["loss"], rel=1e-4)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two")]
    assert results[0]["images"] == results[1]["images"] == 21
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)


def test_divergence_is_detected_before_it_changes_the_weights(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = [empty_config, *TINY, f"data.train=[{flat_tar}]", "train.checkpoint_every=1", "--run", "r"]
    hyperprior("train", *arguments, "train.steps=3")
    before = newest(tmp_path / "r")
    result = hyperprior("train", *arguments, "train.steps=50", "train.learning_rate=1e30", check=4)
    assert len(result.stderr.splitlines()) == 1
    assert "not finite at step 4" in result.stderr and "flat.tar: p0" in result.stderr
    # The step from 3 to 4 made the weights absurd but finite. No later step was saved.
    arrays, state = newest(tmp_path / "r")
    assert state["run"]["step"] == 4 and all(np.isfinite(v).all() for v in arrays.values())  # type: ignore[index]
    assert before[1]["run"]["step"] == 3  # type: ignore[index]
    # A run whose last steps were skipped goes on under a lower limit.
    before[1]["run"]["failed"] = 5  # type: ignore[index]
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        path.unlink()
    checkpoint.save(checkpoint.path_of(tmp_path / "r" / "checkpoints", 3), *before)
    hyperprior("train", *arguments, "train.steps=4")
    assert newest(tmp_path / "r")[1]["run"]["failed"] == 0  # type: ignore[index]


def test_a_name_that_is_too_long_is_refused(hyperprior: Command, flat_tar: Path, empty_config: Path) -> None:
    names = ", ".join(f"shards-{number:06d}.tar" for number in range(20))
    missing = hyperprior("train", f"data.train=[{names}]", "--run", "r", check=2).stderr
    assert "there is no CONFIG" in missing
    refused = hyperprior("train", empty_config, *TINY, f"data.train=[{flat_tar}]", "--run", 300 * "x", check=2).stderr
    assert "cannot be used: File name too long" in refused and len(refused.splitlines()) == 1


def test_a_run_writes_the_documented_files(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    (tmp_path / "source").mkdir()
    flat_tar.rename(tmp_path / "source" / "flat.tar")
    (tmp_path / "source" / "phone.HEIC").write_bytes(b"x")
    arguments = [
        "train",
        empty_config,
        *TINY,
        "data.train=[source]",
        "data.val_split=0.2",
        "data.test_split=0.2",
        "train.steps=10",
        "train.validate_every=4",
        "train.checkpoint_every=2",
        "train.keep_checkpoints=2",
        "summaries.scalars_every=5",
        "summaries.images_every=5",
        "summaries.num_images=2",
        "--run",
        "r",
    ]
    output = hyperprior(*arguments).stdout
    run = tmp_path / "r"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.npz",
        "step-000000008.npz",
        "step-000000010.npz",
    ]
    result = json.loads((run / "results.json").read_text())
    assert {"loss", "bpp", "distortion", "psnr_db", "ms_ssim", "images", "step"} <= result.keys() | {"ms_ssim"}
    assert result["split"] == "test" and result["loss"] == pytest.approx(
        result["bpp"] + 0.013 * 65025 * result["distortion"], rel=1e-5
    )
    assert f"PSNR {result['psnr_db']:.2f} dB" in output and "tensorboard --logdir r" in output
    assert "10/10  loss" in output  # plain lines without a terminal
    assert "ignored  files that are no training images: .heic 1\n" in output

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.util.tensor_util import make_ndarray

    events_of = {}
    for split in ("train", "val", ""):
        events = EventAccumulator(str(run / split), size_guidance={"tensors": 0})
        events.Reload()
        events_of[split] = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    common = {f"1_learning/{name}" for name in ("loss", "bpp", "psnr_db")}
    common |= {f"5_details/{name}" for name in ("distortion", "bpp_y", "bpp_z")}
    assert (
        common
        | {
            "5_details/learning_rate",
            "5_details/gradient_norm",
            "2_speed/images_per_s",
            "2_speed/input_wait",
            "3_data/skipped",
            "config",
        }
        <= events_of["train"].keys()
    )
    shown = {f"4_pictures/{name}" for name in ("reconstruction_0", "reconstruction_1", "rd_plane")}
    shown |= {"6_latents/log2_scales", "6_latents/y", "5_details/zeros_in_y", "costliest_channels"}
    assert common | shown | {"7_gdn/g_a/1/gamma", "7_gdn/g_s/5/beta"} <= events_of["val"].keys()
    assert [e.step for e in events_of["train"]["1_learning/loss"]] == [5, 10]
    for row, event in zip(lines(run, "train"), events_of["train"]["1_learning/loss"]):
        assert make_ndarray(event.tensor_proto) == pytest.approx(row["loss"], rel=1e-6)
    width, height, png = events_of["val"]["4_pictures/reconstruction_0"][0].tensor_proto.string_val
    # Two rows of two panels of 64 pixels, each enlarged to 256, with a gap of 4 and lines of text.
    assert png[1:4] == b"PNG" and int(width) == 2 * 256 + 4 and 2 * 256 < int(height) < 2.5 * 256
    assert b"channels of y that cost most" in events_of["val"]["costliest_channels"][0].tensor_proto.string_val[0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= events_of[""].keys()
    layout = layout_pb2.Layout.FromString(events_of[""]["custom_scalars__config__"][0].tensor_proto.string_val[0])
    charts = [
        tag.strip("^$") for category in layout.category for chart in category.chart for tag in chart.multiline.tag
    ]
    written = events_of["train"].keys() | events_of["val"].keys()
    # Every tag of a chart exists, except MS-SSIM: it needs larger images.
    assert set(charts) - {"1_learning/ms_ssim"} <= written and "1_learning/loss" in charts
    assert b"num_filters: 8" in events_of["train"]["config"][0].tensor_proto.string_val[0]

    again = hyperprior(*arguments).stdout
    assert "r is done: 10 steps" in again
    assert json.loads((run / "results.json").read_text()) == result


@pytest.mark.slow
def test_a_profile_is_written_and_changes_no_weights(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = [empty_config, *TINY, f"data.train=[{flat_tar}]", "train.steps=9", "train.steps_per_call=9"]
    hyperprior("train", *arguments, "--run", "plain")
    hyperprior("train", *arguments, "summaries.profile=[3, 7]", "--run", "traced")
    (trace,) = (tmp_path / "traced" / "train" / "plugins" / "profile").rglob("*.xplane.pb")
    assert trace.read_bytes().count(b"Conv2D") > 0
    plain, traced = (newest(tmp_path / run)[0] for run in ("plain", "traced"))
    assert all(np.array_equal(plain[name], traced[name]) for name in plain)
    wrong = hyperprior("train", *arguments, "summaries.profile=[7, 3]", "--run", "x", check=2).stderr
    assert "profile is [7, 3]; [100, 110] would trace ten steps" in wrong


def test_forbidden_changes_are_refused_and_allowed_ones_are_printed(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = ["train", empty_config, *TINY, f"data.train=[{flat_tar}]", "train.steps=2", "--run", "r"]
    hyperprior(*arguments)
    for override, message in (
        ("model.num_filters=9", "model.num_filters was 8 and is now 9"),
        ("train.batch_size=8", "train.batch_size was 4 and is now 8"),
        ("loss.lambda=1", "loss.lambda was 0.013 and is now 1.0"),
    ):
        error = hyperprior(*arguments, override, check=2).stderr
        assert message in error and "choose another --run" in error and len(error.splitlines()) == 1
    (tmp_path / "other.tar").write_bytes(tar_bytes(photos(30)))
    assert "on other data" in hyperprior(*arguments, f"data.train=[{tmp_path / 'other.tar'}]", check=2).stderr
    moved = tmp_path / "elsewhere" / "flat.tar"
    moved.parent.mkdir()
    flat_tar.rename(moved)
    (tmp_path / "r").rename(tmp_path / "elsewhere" / "r")
    arguments[-1] = "elsewhere/r"
    output = hyperprior(*arguments, f"data.train=[{moved}]", "train.steps=4").stdout
    assert "train.steps: 2 → 4 from here on" in output and "resumed at step 2" in output


def test_early_stopping_restores_the_best_weights(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = [
        "train",
        empty_config,
        *TINY,
        f"data.train=[{flat_tar}]",
        f"data.val=[{flat_tar}]",
        "train.steps=200",
        "train.validate_every=2",
        "train.learning_rate=0.01",
        "train.early_stopping_patience=3",
        "--run",
        "r",
    ]
    hyperprior(*arguments)
    losses = [row["loss"] for row in lines(tmp_path / "r", "val")]
    best = int(np.argmin(losses))
    assert len(losses) == best + 4 < 100
    result = json.loads((tmp_path / "r" / "results.json").read_text())
    assert result["split"] == "val" and result["step"] == 2 * (best + 1)
    assert result["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert "is done" in hyperprior(*arguments).stdout


def test_the_rate_falls_when_validations_stall_and_after_a_resume_as_without_one(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    plateau = ["train.schedule=plateau", "train.decay_patience=2", "train.decay_factor=0.5", "train.learning_rate=0.01"]
    arguments = ["train", empty_config, *TINY, *plateau, f"data.train=[{flat_tar}]", "train.validate_every=1"]
    refused = hyperprior(*arguments, "--run", "r", check=2).stderr
    assert "train.schedule=plateau follows the validations, but no images are held out" in refused
    arguments += [f"data.val=[{flat_tar}]", "train.checkpoint_every=5"]
    hyperprior(*arguments, "train.steps=24", "--run", "straight")
    for steps in (11, 24):
        hyperprior(*arguments, f"train.steps={steps}", "--run", "resumed")
    # A kill between the checkpoint of a new best and its weights in best.npz loses neither.
    killed = [str(word) for word in (*arguments, "train.steps=24", "--run", "killed")]
    assert forked.run(killed, tmp_path, ["die=0,best"]).returncode == -signal.SIGKILL
    state = newest(tmp_path / "killed")[1]["run"]  # type: ignore[index]
    assert state["best_step"] == state["step"] and not (tmp_path / "killed" / "checkpoints" / "best.npz").exists()
    assert "search for the best" not in hyperprior(*killed).stderr
    for run in ("resumed", "killed"):
        assert same_weights(tmp_path / "straight", tmp_path / run)
        assert newest(tmp_path / "straight")[1] == newest(tmp_path / run)[1]
    best, stale, rate = np.inf, 0, 0.01
    for trained, validated in zip(lines(tmp_path / "straight", "train"), lines(tmp_path / "straight", "val")):
        assert trained["learning_rate"] == pytest.approx(rate, rel=1e-6)
        stale = 0 if validated["loss"] < best else stale + 1
        best = min(best, validated["loss"])
        rate *= 0.5 if stale and stale % 2 == 0 else 1.0
    assert 0.01 / 2**6 < rate < 0.01


def test_a_run_starts_from_the_best_weights_of_another(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = [empty_config, *TINY, f"data.train=[{flat_tar}]", f"data.val=[{flat_tar}]", "train.steps=4"]
    arguments += ["train.checkpoint_every=1", "train.validate_every=2", "train.keep_checkpoints=9"]
    hyperprior("train", *arguments, "--run", "first")
    later = [*arguments, "train.learning_rate=1e-30", "train.ema=0.5", "train.start_from=first"]
    assert forked.run(list(map(str, ["train", *later, "--run", "second"])), tmp_path, ["die=0,steps"]).returncode < 0
    hyperprior("train", *later, "--run", "second")
    best = checkpoint.best_weights(tmp_path / "first", print).arrays
    arrays = newest(tmp_path / "second")[0]
    for name, array in best.items():
        assert np.array_equal(arrays[f"model/{name}"], array), name
        assert np.allclose(arrays[f"optimizer/average/{name}"], array, rtol=1e-6), name
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "val"] == [0, 2, 4]  # 0: the weights that it starts from
    refused = hyperprior("train", *later, "model.num_filters=4", "--run", "third", check=2).stderr
    assert "train.start_from: first: `g_a/0/bias` has shape (8,); this config expects (4,)" in refused
    refused = hyperprior("train", *later, "train.start_from=nowhere", "--run", "third", check=2).stderr
    assert "nowhere is no model: give a run" in refused
    # An exported model keeps its weights rounded, and h_s as integers.
    hyperprior("train", *later, "train.start_from=first/model", "--run", "fourth")
    arrays = newest(tmp_path / "fourth")[0]
    for name, array in best.items():
        rounded = export.shorten(array).astype(np.float32)
        assert np.allclose(arrays[f"model/{name}"], rounded, rtol=0, atol=2**-16 if "h_s" in name else 1e-20), name


def test_a_directory_that_is_no_run_is_not_changed(hyperprior: Command, tmp_path: Path, flat_tar: Path) -> None:
    mine = tmp_path / "mine" / "config.yaml"
    mine.parent.mkdir()
    mine.write_text(f"# tuned by hand\ndata: {{train: [{flat_tar}]}}\n")
    error = hyperprior("train", mine, *TINY, "train.steps=2", "--run", "mine", check=2).stderr
    assert "mine/config.yaml is not the config of a run, and would be replaced; choose another --run" in error
    assert list(mine.parent.iterdir()) == [mine] and mine.read_text().startswith("# tuned by hand")
    other = mine.rename(mine.with_name("metrics.jsonl"))
    words = [f"data.train=[{flat_tar}]", *TINY, "train.steps=2"]
    error = hyperprior("train", "quickstart", *words, "--run", "mine", check=2).stderr
    assert "mine is no run, but holds metrics.jsonl, which would be replaced; choose another --run" in error
    assert list(mine.parent.iterdir()) == [other] and other.read_text().startswith("# tuned by hand")


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=mixed_bfloat16"],
        pytest.param(["train.xla=true"], marks=pytest.mark.slow),
        ["loss.metric=ms-ssim", "loss.lambda=8.73", "data.patch_size=192", "data.eval_crop=full"],
        ["train.epochs=2", "train.validate_every=1 epoch", "data.eval_crop=full"],
    ],
    ids=["bfloat16", "xla", "ms-ssim", "epochs"],
)
def test_every_way_of_training_learns(
    hyperprior: Command, tmp_path: Path, empty_config: Path, options: list[str]
) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes((f"{i}.jpg", encoded(photo(i, 200 + 9 * (i % 3), 195))) for i in range(8)))
    hyperprior(
        "train",
        empty_config,
        *TINY,
        f"data.train=[{path}]",
        f"data.val=[{path}]",
        "train.learning_rate=3e-3",
        "train.initial=random",
        *([] if "train.epochs=2" in options else ["train.steps=6"]),
        *options,
        "--run",
        "r",
        fresh="train.precision=mixed_bfloat16" in options,  # bfloat16 needs TensorFlow's own kernels
    )
    losses = [row["loss"] for row in lines(tmp_path / "r", "train")]
    assert len(losses) == (4 if "train.epochs=2" in options else 6)
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "r" / "results.json").read_text())["images"] == 8


def test_too_many_bad_images_stop_the_run_and_few_do_not(
    hyperprior: Command, tmp_path: Path, empty_config: Path
) -> None:
    members = photos(24)
    for i in (3, 9):
        members[i] = (members[i][0], members[i][1][:200])
    (tmp_path / "t.tar").write_bytes(tar_bytes(members))
    arguments = ["train", empty_config, *TINY, f"data.train=[{tmp_path / 't.tar'}]", "train.steps=10"]
    result = hyperprior(*arguments, "--run", "few")
    assert "skipped" in result.stderr and "t.tar: p003: a corrupt or truncated JPEG" in result.stderr
    assert lines(tmp_path / "few", "train")[-1]["skipped"] >= 2
    assert {"p003", "p009"} == {str(row["sample"])[-4:] for row in lines(tmp_path / "few", "skipped")}
    result = hyperprior(*arguments, "data.max_bad_fraction=0.001", "--run", "many", check=3)
    assert (
        "of" in result.stderr
        and "samples are unusable, counted each time they come: more than data.max_bad_fraction=0.001" in result.stderr
    )


def test_the_nested_imagenet_sample_trains_without_extraction(
    hyperprior: Command, tmp_path: Path, samples: Path, empty_config: Path
) -> None:
    hyperprior(
        "train",
        empty_config,
        *TINY,
        f"data.train=[{samples / 'imagenet_train_sample.tar'}]",
        "train.steps=30",
        f"data.val=[{samples / 'imagenet_val_sample.tar'}]",
        "train.validate_every=15",
        "--run",
        "r",
    )
    before, after = (row["loss"] for row in lines(tmp_path / "r", "val"))
    assert after < before
    images = [p for p in tmp_path.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png")]
    assert not images  # nothing was extracted


def test_a_run_stopped_by_a_full_disk_can_be_resumed(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = [empty_config, *TINY, f"data.train=[{flat_tar}]", "train.steps=300", "train.checkpoint_every=2"]
    process = start_training(tmp_path, *arguments, "--run", "r")
    wait_for(tmp_path / "r", 6, process)
    # From now on the process cannot write beyond 100 kB of a file. A checkpoint then fails as on a full disk.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "cannot be written" in output and "free the disk and start the same command again" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "r").rglob("*.tmp"))
    step = newest(tmp_path / "r")[1]["run"]["step"]  # type: ignore[index]
    assert 4 <= step < 300
    assert f"resumed at step {step}" in hyperprior("train", *arguments, f"train.steps={step + 2}", "--run", "r").stdout


def test_a_result_belongs_to_the_trained_steps(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    arguments = ["train", empty_config, *TINY, f"data.train=[{flat_tar}]", f"data.val=[{flat_tar}]", "--run", "r"]
    arguments += ["train.validate_every=2"]
    hyperprior(*arguments, "train.steps=2")
    old = (tmp_path / "r" / "results.json").read_text()
    hyperprior(*arguments, "train.steps=4")
    (tmp_path / "r" / "results.json").write_text(old)  # as if the run had been killed before it wrote the new one
    best = tmp_path / "r" / "checkpoints" / "best.npz"
    best.write_bytes(best.read_bytes()[:-100])
    hyperprior(*arguments, "train.steps=4")
    assert checkpoint.load_best(best.parent, 4)  # the checkpoint has the same weights
    measured = json.loads((tmp_path / "r" / "results.json").read_text())
    assert measured["trained_steps"] == measured["step"] == 4


def test_a_run_stops_while_its_input_hangs(tmp_path: Path, flat_tar: Path, empty_config: Path) -> None:
    # Four shards; only a part of each arrives.
    hanging = f"pipe:head -c 30000 {flat_tar}; sleep 60"
    sources = ", ".join(f"'{hanging} # {i}'" for i in range(4))
    arguments = [empty_config, *TINY, f"data.train=[{sources}]", "data.allow_pipe=true", "train.steps=50"]
    process = start_training(tmp_path, *arguments, "data.shuffle_buffer=1", "train.validate_every=null", "--run", "r")
    wait_for(tmp_path / "r", 1, process)
    process.send_signal(signal.SIGTERM)
    # Not communicate(): the sleeping shells keep the output open.
    assert process.wait(timeout=30) == 75
    newest(tmp_path / "r")
    assert process.stdout
    process.stdout.close()


def test_a_config_from_a_pipe_is_read_once(tmp_path: Path, flat_tar: Path) -> None:
    words = " ".join(f"'{word}'" for word in [*TINY, f"data.train=[{flat_tar}]", "train.validate_every=null"])
    shell = f"{sys.executable} -m hyperprior train <(echo 'train: {{steps: 3}}') {words} --run r"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=200)
    assert newest(tmp_path / "r")[1]["run"]["step"] == 3  # type: ignore[index]
    sweep = f"{sys.executable} -m hyperprior sweep <(echo 'train: {{steps: 3}}') --lambdas 0.01 {words}"
    refused = subprocess.run(["bash", "-c", sweep], cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert refused.returncode == 2 and b"can be read only once" in refused.stderr
