"""The command line: fast help, one-line errors, and the right exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import typer
from conftest import TINY, Command, encoded, photo, photos, tar_bytes
from PIL import Image

from hyperprior import cli, terminal
from hyperprior.data.lanes import group_of
from hyperprior.data.pack import choose_names
from hyperprior.data.shards import open_sources
from hyperprior.terminal import Terminal


def test_help_and_config_errors_do_not_import_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom hyperprior import cli\nsys.argv = ['hyperprior', *{arguments}]\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "loaded = [m for m in ('tensorflow', 'webdataset', 'numpy') if m in sys.modules]\nassert not loaded, loaded\n"
    )
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["train", "missing.yaml"],
        ["config", "--schema"],
    ):
        subprocess.run(
            [sys.executable, "-c", code.replace("{arguments}", repr(arguments))], check=True, capture_output=True
        )


def test_every_command_has_help_with_an_example(hyperprior: Command) -> None:
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert {"train", "pack", "config"} <= set(names)
    for name in names:
        shown = hyperprior(name, "--help").stdout
        assert "Example" in shown and f"hyperprior {name} " in shown, name
        assert "--json" in shown or name == "config", name  # `config` prints YAML
        assert "\x1b" not in shown


def on_a_terminal(folder: Path, *arguments: str, **environment: str) -> str:
    """Runs the command on a pseudo-terminal, and returns its output."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hyperprior", *arguments]
    variables = {**os.environ, "TERM": "xterm", **environment}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, cwd=folder) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # raised at the end
            while data := terminal.read(1 << 16):
                shown += data
    assert process.returncode == 0, shown
    return shown.decode()


def test_colour_appears_only_on_a_terminal_and_never_with_no_color(hyperprior: Command, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photo(1).save(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])m")
    bright = on_a_terminal(tmp_path, "pack", "photos", "--out", "bright")
    plain = on_a_terminal(tmp_path, "pack", "photos", "--out", "plain", NO_COLOR="1")
    piped = hyperprior("pack", "photos", "--out", "piped").stderr
    assert all("broken" in shown for shown in (bright, plain, piped))
    assert [bool(colour.search(shown)) for shown in (bright, plain, piped)] == [True, False, False]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_progress(monkeypatch: pytest.MonkeyPatch, width: int, output: io.StringIO) -> str:
    """What a run shows that goes on, validates, and skips a sample."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", str(width))):
        monkeypatch.setenv(name, value)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, output)
    terminal = Terminal()
    with terminal.track("training", 120_000, 5000) as track:
        track.line("loss 1.5296  bpp 0.6883  PSNR 32.07 dB  1234.5 images/s  waiting 100%", label="train")
        track.rows["val"] = "loss 1.6012  bpp 0.7001  PSNR 31.80 dB  best 1.5932, 1,342 steps before"
        track.update(5342)
        track.keep("val  loss 1.6012  bpp 0.7001  PSNR 31.80 dB  MS-SSIM 0.9712  best")
        terminal.warn("skipped a.jpg")
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_live_block_fits_the_terminal_and_leaves_a_history(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.delenv(terminal.NOTEBOOK, raising=False)
    lines, at = [""], 0
    for part in re.split("(\x1b\\[[0-9;?]*[a-zA-Z]|\n)", show_progress(monkeypatch, width, Screen())):
        if part == "\n":
            lines, at = [*lines, ""], at + 1
        elif part == "\x1b[1A":
            at -= 1
        elif part == "\x1b[2K":
            lines[at:] = [""]
        elif not part.startswith("\x1b"):
            lines[at] += part.strip("\r")
            assert len(lines[at]) <= width
    *history, bar, train, val, _ = lines
    assert re.match("training [━╺╸]+ +5342/120000", bar)
    assert "1234.5 images/s  waiting 100%" in train and val.endswith("best 1.5932, 1,342 steps before")
    assert history[-2:] == [
        "  5342/120000  val  loss 1.6012  bpp 0.7001  PSNR 31.80 dB  MS-SSIM 0.9712  best",
        "warning: skipped a.jpg",
    ]


@pytest.mark.parametrize("is_notebook", [False, True])
def test_a_file_and_a_notebook_get_plain_lines(monkeypatch: pytest.MonkeyPatch, is_notebook: bool) -> None:
    if is_notebook:  # which has a terminal
        monkeypatch.setenv(terminal.NOTEBOOK, "1")
    lines = show_progress(monkeypatch, 80, Screen() if is_notebook else io.StringIO()).splitlines()
    assert [line.split("  loss")[0].strip() for line in lines[:2]] == ["5000/120000", "5342/120000  val"]
    assert "\x1b" not in "".join(lines[:2]) and "1234.5 images/s" in "".join(lines)
    assert is_notebook or "\x1b" not in "".join(lines)


def test_shells_complete_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        asked = {"_HYPERPRIOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "from hyperprior.__main__ import main; import sys; sys.argv[0] = 'hyperprior'; main()"
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **asked}
        ).stdout.split()

    assert completed("hyperprior ev") == ["evaluate"]
    assert "--lambdas" in completed("hyperprior sweep --l")
    command = Path(sys.executable).with_name("hyperprior")
    asked = f"{command} --show-completion; exit $?"  # the command looks for the shell that started it
    shown = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout
    assert "complete -o default -F _hyperprior_completion" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.batch_size=0"], 2, "`train.batch_size` is 0"),
        (["data.train=[]"], 3, "data.train names no source"),
        (["data.train=[missing.tar]"], 3, "data.train: missing.tar cannot be read: No such file"),
        (["data.train=[notes.txt]"], 2, "notes.txt is not a tar, image or directory"),
        (["data.train=['pipe:cat flat.tar']"], 2, "would run a shell command; set data.allow_pipe=true"),
        (["data.train=[cut.tar]"], 3, "cut.tar is damaged"),
        (["data.train=[text.tar]"], 3, "holds no image"),
        (["train.batch_size=64"], 3, "24 images but train.batch_size is 64"),
        (["distribute.cpu_devices=3"], 2, "train.batch_size is 4; it must be divisible by 3 replicas (3 and 6 are)"),
        (
            ["data.eval_crop=256", "data.val=[flat.tar]", "train.steps=1", "train.validate_every=1"],
            3,
            "data.eval_crop=256; lower it",
        ),
        (["--run", "notes.txt"], 2, "notes.txt cannot be used"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    hyperprior: Command,
    tmp_path: Path,
    empty_config: Path,
    flat_tar: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.tar").write_bytes(flat_tar.read_bytes()[:20000])
    (tmp_path / "text.tar").write_bytes(tar_bytes([("a.txt", b"hello")]))
    run = [] if "--run" in arguments else ["--run", "r"]
    result = hyperprior("train", empty_config, *TINY, f"data.train=[{flat_tar}]", *arguments, *run, check=code)
    assert message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()


def test_every_path_of_every_command_is_local(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A bucket would become a folder `gs:` here. Only sources of data may be elsewhere."""
    monkeypatch.chdir(tmp_path)
    tried = 0
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for option in command.params:
            words = {"run": "--run", "out": "--out", "model": "--model", "cache": "--cache", "images": "--images"}
            if not (flag := words.get(option.name)) or flag not in option.opts:
                continue
            required = ["x"] * sum(other.required and not other.opts[0].startswith("-") for other in command.params)
            for given in ([flag, "gs://bucket/x?key=1"], [flag + "=s3://bucket/x"]):
                monkeypatch.setattr(sys, "argv", ["hyperprior", name, *required, *given])
                with pytest.raises(SystemExit) as ended:
                    cli.main()
                error = capsys.readouterr().err
                assert ended.value.code == 2 and "://bucket/x; it must be a local path" in error, (name, given, error)
                tried += 1
    assert tried >= 2 * 15 and list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(hyperprior: Command, empty_config: Path) -> None:
    assert "Traceback" in hyperprior("--debug", "train", empty_config, check=1).stderr


def test_config_prints_the_config_of_a_run(hyperprior: Command, empty_config: Path, tmp_path: Path) -> None:
    output = hyperprior("config", empty_config, "loss.lambda=0.025").stdout
    (tmp_path / "printed.yaml").write_text(output)
    assert hyperprior("config", "printed.yaml").stdout == output
    assert "lambda: 0.025" in output
    assert json.loads(hyperprior("config", "--schema").stdout)["additionalProperties"] is False


def test_inspect_names_everything_unusable(hyperprior: Command, tmp_path: Path) -> None:
    members = photos(5)
    members[2] = ("broken.jpg", members[2][1][:500])
    members += [("small.PNG", encoded(photo(1, 30, 20), "PNG")), ("notes.txt", b"no image"), ("text.bmp", b"hello")]
    inner = tar_bytes(members)
    (tmp_path / "t.tar").write_bytes(tar_bytes([("good.tar", inner), ("also.tar", tar_bytes(photos(3)))]))
    output = hyperprior("inspect", "t.tar", "--patch-size", "64").stdout
    assert "t.tar//good.tar: broken: a corrupt or truncated JPEG" in output
    assert ".txt 1" in output
    assert "t.tar//good.tar: text: not a PNG, BMP, TIFF or JPEG" in output
    report = json.loads(hyperprior("inspect", "t.tar", "--patch-size", "64", "--json").stdout)
    assert (report["shards"], report["images"], report["smaller_than_patch"]) == (2, 10, 1)
    assert report["formats"] == {"JPEG": 7, "PNG": 1, "unusable": 1} or report["formats"]["JPEG"] >= 7
    assert (report["shortest_side"], report["longest_side"]) == (20, 96)
    at = inner.index(b"p001.JPEG")
    damaged = inner[:at] + b"\xa5" * 512 + inner[at + 512 :]
    (tmp_path / "d.tar").write_bytes(damaged)
    result = hyperprior("inspect", "d.tar", check=3)
    assert "1 shards" in result.stdout and "d.tar is damaged" in result.stdout


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does not close its file
def test_pack_writes_equal_shards_that_webdataset_reads(hyperprior: Command, tmp_path: Path, nested_tar: Path) -> None:
    (tmp_path / "dir").mkdir()
    for name, image in (("a.b.png", photo(50, 300, 200)), ("a_b.jpg", photo(51)), ("ü" * 120 + ".bmp", photo(52))):
        image.save(tmp_path / "dir" / name)
    (tmp_path / "dir" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    result = hyperprior("pack", nested_tar, "dir", "--out", "out", "--images-per-shard", "10", "--max-side", "150")
    assert "24 images in 3 shards below out, 1 left out" in result.stdout and "bad" in result.stderr
    import webdataset

    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == 24 == len({s["__key__"] for s in samples})
    kept = {s["__key__"]: s for s in samples}
    assert kept["n0_000"]["jpg"] == photos(1)[0][1]  # bytes that need no change are kept
    with tarfile.open(shards[2]) as tar:
        assert len(tar.getmembers()) == 4
    from hyperprior import images

    assert images.decode(kept["a"]["b.png"]).shape == (100, 150, 3) and "jpg" in kept["a_b"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does not close its file
def test_packing_changes_no_split_and_keeps_a_mask_with_its_photograph(hyperprior: Command, tmp_path: Path) -> None:
    """1,100 small images: a folder with more than 1,000 is read in interleaved parts."""
    (tmp_path / "dir" / "v1.0").mkdir(parents=True)
    picture = encoded(photo(1, 4, 4), "PNG")
    for i in range(550):
        for suffix in (".png", ".seg.png"):
            (tmp_path / "dir" / "v1.0" / f"{i:04d}{suffix}").write_bytes(picture)
    said = hyperprior("pack", "dir", "--out", "out", "--images-per-shard", "500").stdout
    assert "1,100 images in 3 shards" in said and "550 keys have several images" in said
    packed = [sample.key for shard in open_sources([str(tmp_path / "out")], "x") for sample in shard.samples()]
    keys = [sample.key for shard in open_sources([str(tmp_path / "dir")], "x") for sample in shard.samples()]
    assert sorted(packed) == sorted(keys)
    import webdataset

    samples = list(webdataset.WebDataset(sorted(map(str, (tmp_path / "out").glob("*.tar"))), shardshuffle=False))
    assert len(samples) == 550 and all({"png", "seg.png"} < sample.keys() for sample in samples)


def test_names_of_packed_images_are_distinct_and_keep_their_groups() -> None:
    keys = [("a", "x/0"), ("a", "x/0.seg"), ("b", "x/0"), ("b", "x/0.seg"), ("b", "x/0"), ("b", "x/0_1"), ("c", ".h.1")]
    names = choose_names(keys)
    assert names == ["x/0", "x/0.seg", "x/0_1", "x/0_1.seg", "x/0_1.1", "x/0_1_1", "_h.1"]
    assert [group_of(name) for name in names] == [*["x/0"] * 2, *["x/0_1"] * 3, "x/0_1_1", "_h"]


def test_packing_into_its_own_source_is_refused_before_anything_is_written(
    hyperprior: Command, tmp_path: Path, flat_tar: Path
) -> None:
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    photo(1).save(tmp_path / "photos" / "inner" / "a.png")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "alias").symlink_to(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    for out in ("photos", "photos/new/deep", "photos/inner", "alias", "alias/inner", "elsewhere", "elsewhere/new"):
        error = hyperprior("pack", "photos", "--out", out, check=2).stderr
        assert f"--out {out} is a part of the source photos" in error
    for out in (".", "photos/.."):
        assert "or holds it" in hyperprior("pack", flat_tar, "--out", out, check=2).stderr
    assert sorted(tmp_path.rglob("*")) == before
    hyperprior("pack", "photos", "--out", "photos-packed")
    hyperprior("pack", "photos/inner", flat_tar, "--out", "photos/packed")


def test_pack_refuses_a_source_that_gives_other_images_when_it_is_read_again(
    hyperprior: Command, tmp_path: Path
) -> None:
    first = photos(3)
    orders = {
        "first": first,
        "other-order": first[::-1],
        "other-content": [(name, encoded(photo(9, 40, 50))) for name, _ in first],
        "fewer": first[:2],
        "more": [*first, ("q.png", encoded(photo(9), "PNG"))],
    }
    for name, members in orders.items():
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    for name in orders:
        command = f"pipe:if [ -e {name} ]; then cat {name}.tar; else touch {name}; cat first.tar; fi"
        fits = name == "first"
        done = hyperprior("pack", command, "--allow-pipe", "--out", f"out-{name}", check=0 if fits else 3)
        assert fits or "gave other images when it was read again" in done.stderr
        assert fits or name == "more" or not list((tmp_path / f"out-{name}").glob("*.tar"))


def test_pack_names_an_image_that_the_format_cannot_hold(hyperprior: Command, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    Image.new("RGB", (70_000, 2)).save(tmp_path / "d" / "wide.png")
    photo(1).save(tmp_path / "d" / "z.png")
    done = hyperprior("pack", "d", "--out", "out", "--encode", "jpeg")
    assert "left out d: wide: 70000x2 cannot be written: " in done.stderr and "1 images in 1 shards" in done.stdout


def test_pack_continues_where_it_stopped_and_refuses_other_options(
    hyperprior: Command, tmp_path: Path, flat_tar: Path
) -> None:
    arguments = ["pack", flat_tar, "--out", "out", "--images-per-shard", "5"]
    hyperprior(*arguments)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[3].unlink()
    (tmp_path / "out" / ".shards-000003.tar.123.tmp").write_bytes(b"half a shard")
    hyperprior(*arguments)
    after = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").glob("*.tar"))
    }
    assert {name: data for name, (data, _) in before.items()} == {name: data for name, (data, _) in after.items()}
    assert before["shards-000000.tar"] == after["shards-000000.tar"]  # not written again
    assert not list((tmp_path / "out").glob("*.tmp"))
    error = hyperprior("pack", flat_tar, "--out", "out", "--images-per-shard", "6", check=2).stderr
    assert "holds shards of other sources or options" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_one_signal_ends_a_command_that_waits_for_its_input(
    tmp_path: Path, empty_config: Path, number: signal.Signals
) -> None:
    source = "pipe:touch begun; sleep 100"
    commands = {
        "inspect": ["inspect", source, "--allow-pipe"],
        "pack": ["pack", source, "--allow-pipe", "--out", "shards"],
        "train": ["train", empty_config, f"data.train=['{source}']", "data.allow_pipe=true", "--run", "r"],
    }
    processes = {}
    for name, arguments in commands.items():
        (tmp_path / name).mkdir()
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "hyperprior", *map(str, arguments)],
            cwd=tmp_path / name,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
        )
    for name, process in processes.items():
        while not (tmp_path / name / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
    time.sleep(1)
    for process in processes.values():
        process.send_signal(number)
    assert {name: process.wait(timeout=30) for name, process in processes.items()} == {
        "inspect": 128 + number,
        "pack": 128 + number,
        "train": 75,
    }


def test_only_regular_files_are_read(hyperprior: Command, tmp_path: Path, empty_config: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, data in photos(4):
        (tmp_path / "d" / name).write_bytes(data)
    os.mkfifo(tmp_path / "d" / "zz.jpg")
    os.mkfifo(tmp_path / "zz.tar")
    report = json.loads(hyperprior("inspect", "d", "--json").stdout)
    assert report["images"] == 5 and [name.split(": ")[1] for name, _ in report["unusable"]] == ["zz"]
    assert "4 images in 1 shards" in hyperprior("pack", "d", "--out", "shards").stdout
    assert "neither a regular file nor a directory" in hyperprior("inspect", "zz.tar", check=3).stderr


def test_warnings_of_pillow_are_notes_on_their_image_or_not_shown(
    hyperprior: Command, tmp_path: Path, empty_config: Path
) -> None:
    (tmp_path / "d").mkdir()
    broken_exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01"  # five tags, of which nothing follows
    photo(1, 64, 64).save(tmp_path / "d" / "a.jpg", exif=broken_exif)
    tiff = encoded(photo(2, 64, 64), "TIFF", tiffinfo={296: 2})
    one, two = (struct.pack("<HHI", 296, 3, count) for count in (1, 2))  # the resolution's unit, twice
    assert tiff.count(one) == 1
    (tmp_path / "d" / "b.tif").write_bytes(tiff.replace(one, two))
    photo(3, 64, 64).save(tmp_path / "d" / "c.png")
    done = hyperprior("compress", "d", "-o", "out")
    assert done.stderr == "" and done.stdout.count("note: Pillow warns: ") == 2
    lines = done.stdout.splitlines()
    for name, text in (("a.jpg", "Corrupt EXIF data"), ("b.tif", "Metadata Warning, tag 296 had too many entries")):
        (place,) = [number for number, line in enumerate(lines) if line.startswith(f"d/{name}")]
        assert lines[place + 1].startswith(f"  note: Pillow warns: {text}")
    words = [*TINY, "data.train=[d]", "train.batch_size=2", "train.steps=1", "train.validate_every=null"]
    for command in (["inspect", "d"], ["pack", "d", "--out", "p"], ["train", empty_config, *words, "--run", "r"]):
        assert hyperprior(*command).stderr == ""
    hyperprior("evaluate", "q1", "--images", "d", "--out", "e", "--baselines", "none")


def test_a_wait_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LATE", 0.4)
    shown = terminal.Terminal()
    warnings: list[str] = []
    monkeypatch.setattr(shown, "warn", warnings.append)
    with shown.waiting() as wait_for:
        time.sleep(0.8)
        assert not warnings  # nothing is waited for
        wait_for("a.tar")
        time.sleep(1.5)
        wait_for("b.tar")
        time.sleep(0.9)
    assert 2 <= sum("waiting for a.tar" in text for text in warnings) <= 3
    assert 1 <= sum("waiting for b.tar" in text for text in warnings) <= 2


def test_a_name_cannot_command_the_terminal(hyperprior: Command, tmp_path: Path, empty_config: Path) -> None:
    name = "a\x1b]0;title\x07\x9b2Jb.jpg"
    (tmp_path / name).write_bytes(b"no image")
    for arguments, code in ((["compress", name], 3), (["inspect", f"{name}.tar"], 3), (["inspect", name], 0)):
        shown = hyperprior(*arguments, check=code)
        assert not set("\x1b\x07\x9b") & set(shown.stdout + shown.stderr)
        assert "\\x1b]0;title\\x07" in shown.stdout + shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decompress", "x.hyp", "--format", "../x"], "--format is `/x`; it must be an extension"),
        (["decompress", "x.hyp", "--format", ""], "--format is ``"),
        (["inspect", "shards/*.tar"], "patterns with * are not expanded"),
        (["config", "CONFIG", "train.decay_steps=[-5]"], "train.decay_steps"),
    ],
)
def test_a_wrong_argument_is_one_line_with_the_way_out(
    hyperprior: Command, empty_config: Path, arguments: list[str], message: str
) -> None:
    words = [str(empty_config) if word == "CONFIG" else word for word in arguments]
    result = hyperprior(*words, check=None)
    assert result.returncode in (2, 3) and message in result.stderr and result.stderr.count("\n") <= 2, result.stderr


def test_a_run_goes_on_without_its_config(
    hyperprior: Command, tmp_path: Path, flat_tar: Path, empty_config: Path
) -> None:
    words = [*TINY, f"data.train=[{flat_tar}]", "train.validate_every=null", "train.steps=2"]
    hyperprior("train", empty_config, *words, "--run", "r")
    assert "resumed at step 2" in hyperprior("train", "train.steps=3", "--run", "r").stdout
    assert "is done: 3 steps" in hyperprior("train", "--run", "r").stdout
    url = "data.train=https://user:SECRET@127.0.0.1:1/x.tar?sig=SECRET"
    error = hyperprior("train", url, "--run", "r", check=3).stderr  # the first word, too, keeps both slashes
    assert "https://127.0.0.1:1/x.tar" in error and "SECRET" not in error
    assert "SECRET" not in hyperprior("config", url, check=2).stderr
    for arguments in (["--run", "none"], ["train.steps=3"], []):
        assert "there is no CONFIG; give a YAML file, or --run" in hyperprior("train", *arguments, check=2).stderr


def test_what_will_not_work_has_an_exit_code(hyperprior: Command, tmp_path: Path, empty_config: Path) -> None:
    photo(1).save(tmp_path / "x.png")
    hyperprior("compress", "x.png", "--quality", "1")
    assert hyperprior("info", "x.hyp", "--model", "q1").returncode == 0
    assert "fits             False" in hyperprior("info", "x.hyp", "--model", "q2", check=3).stdout
    assert "missing.tar" in hyperprior("doctor", empty_config, "data.train=[missing.tar]", check=3).stdout


def test_a_folder_with_new_photographs_is_compressed_again(hyperprior: Command, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    photo(1).save(tmp_path / "d" / "a.png")
    hyperprior("compress", "d", "--quality", "1")
    before = (tmp_path / "d" / "a.hyp").stat()
    photo(2).save(tmp_path / "d" / "b.png")
    assert "exists; --force" in hyperprior("compress", "d", "--quality", "1", check=2).stderr
    assert "give one of them" in hyperprior("compress", "d", "--force", "--skip-existing", check=2).stderr
    rows = json.loads(hyperprior("compress", "d", "--quality", "1", "--skip-existing", "--json").stdout)
    assert [Path(row["target"]).name for row in rows] == ["b.hyp"]
    assert (tmp_path / "d" / "a.hyp").stat() == before
    assert json.loads(hyperprior("compress", "d", "--skip-existing", "--json").stdout) == []
    assert hyperprior("decompress", "d", "--skip-existing").returncode == 0
