"""A wrong config is an error before anything starts. YAML values mean what a reader expects."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hyperprior import load
from hyperprior.config import Config, differences, load_config, render
from hyperprior.config.writing import to_model_tree
from hyperprior.errors import ConfigError, hide_secrets

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_the_documented_keys_are_read(tmp_path: Path) -> None:
    c = load_config(
        write(
            tmp_path,
            """
seed: 3
data:
  train: [/data/ILSVRC2012_img_train.tar]
  val: [/data/ILSVRC2012_img_val.tar]
  test: []
  patch_size: 256
  patches_per_image: 1
model: {num_filters: 128, latent_channels: 192, hyper_channels: 128, num_scales: 64, scale_min: 0.11, scale_max: 256}
loss: {lambda: 0.013, metric: mse}
train: {batch_size: 16, steps: 2000000, learning_rate: 1.0e-4}
""",
        ),
        [],
    )
    assert (c.seed, c.loss.lmbda, c.train.steps, c.train.epochs) == (3, 0.013, 2_000_000, None)
    assert c.data.splits() == (0.0, 0.0)  # a validation source is given, so nothing is taken from train


def test_yaml_values_mean_what_a_reader_expects(tmp_path: Path) -> None:
    c = load_config(write(tmp_path, "train: {learning_rate: 1e-4, steps: 2e6}\n"), [])
    assert c.train.learning_rate == 1e-4 and c.train.steps == 2_000_000
    c = load_config(write(tmp_path, "data: {allow_pipe: off, train: [on, no, 2026-01-01]}\ntrain: {xla: true}\n"), [])
    assert (c.data.allow_pipe, c.train.xla, c.data.train) == (False, True, ["on", "no", "2026-01-01"])
    assert load_config(write(tmp_path, "seed: 010\n"), []).seed == 10
    with pytest.raises(ConfigError, match='`loss.lambda` is "off"'):
        load_config(write(tmp_path, "loss: {lambda: off}\n"), [])
    with pytest.raises(ConfigError, match="a config is a mapping of sections; found list"):
        load_config(write(tmp_path, "[]\n"), [])


def test_a_repeated_key_is_an_error_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`seed` is on line 1 and again on line 3"):
        load_config(write(tmp_path, "seed: 1\nloss: {}\nseed: 2\n"), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", "unknown key `train.batchsize`; did you mean `train.batch_size`"),
        ("trian.steps=3", "unknown key `trian`; did you mean `train`"),
        ("train.batch_size=x", '`train.batch_size` is "x"'),
        ("train.batch_size=0", "`train.batch_size` is 0: input should be greater than or equal to 1"),
        ("data.patch_size=100", "patch_size is 100; it must be a multiple of 64 (64 and 128 are)"),
        ("data.eval_crop=100", "eval_crop is 100; it must be a multiple of 64 (64 and 128 are)"),
        ("train.validate_every=sometimes", "an interval is a number of steps, or text such as"),
        ("loss.metric=ssim", "input should be 'mse' or 'ms-ssim'"),
        ("loss.lambda=-1", "`loss.lambda` is -1: input should be greater than 0"),
        ("train.steps", "`train.steps` is not an override"),
        ("seed.x=1", "`seed` is not a section"),
        ("model.scale_max=0.1", "scale_max is 0.1; it must exceed scale_min (0.11)"),
        ("data.val_split=0.99", "val_split + test_split is 1.09; nothing is left"),
        ("train.schedule=steps", "decay_steps is empty"),
        ("train=[1", "not valid YAML"),
        ("seed={{x}}", "not valid YAML"),
        ("seed=0x_", '`seed` is "0x_"'),
        ("seed=1:30", '`seed` is "1:30"'),
        ("str=3", "unknown key `str`"),
        ("train.int=3", "unknown key `train.int`"),
        ("data.extensions=&a [*a]", "not valid YAML: the value on line 1 contains itself"),
        (
            "train.decay_steps=[&a [1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]]",
            "`train.decay_steps.0` is [1, 1",
        ),
        ("seed=\0", "not valid YAML: unacceptable character"),
        ("seed=!!bool x", "not valid YAML"),
        ("seed=!!timestamp x", "not valid YAML"),
        ("train={!!timestamp 2001-01-01: 1}", "keys should be strings"),
        ("seed=!!binary aGk=", "`seed` is b'hi'"),
        ("se\ned=1", "unknown key `se\\ned`"),
        ("data.\ntrain=[a", "write 'data.\\ntrain=[a, b]'"),
        ("seed=" + 4000 * "1", "`seed` is 11111"),
        ("model.num_filters=99999999999", "less than or equal to 4096"),
        ("seed=" + 5000 * "[", "not valid YAML"),
        ("train.validate_every=-5.0", "an interval is a number of steps"),
        ("train.validate_every=0.0", "an interval is a number of steps"),
        ("train.steps=true", "steps is true; a number or text is expected"),
    ],
)
def test_an_error_names_the_bad_value_and_the_allowed_values(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "seed: 1\n"), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def expand(text: str) -> list[str]:
    """The words that bash makes of `text`."""
    return subprocess.run(["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("'data.train=shards-{000..127}.tar'", ["shards-{000..127}.tar"]),
        ("data.train=shards-{000..127}.tar", [f"shards-{i:03d}.tar" for i in range(128)]),
        ("data.train=[shards-{0..1}.tar]", ["shards-0.tar", "shards-1.tar"]),
        ("'data.train={a,b}.tar'", ["{a,b}.tar"]),
        ("data.train={a,b}.tar", ["a.tar", "b.tar"]),
        ("""'data.train=["{0..9}.tar", photos/]'""", ["{0..9}.tar", "photos/"]),
        ("""'data.train="a.tar"'""", ["a.tar"]),
        ("data.train=photos/", ["photos/"]),
        ("data.train=2024", ["2024"]),
        ("'data.train=a: b #1.tar'", ["a: b #1.tar"]),
        ("data.train=[a.tar,b.tar] data.train=c.tar data.train=[d.tar]", ["a.tar", "b.tar", "c.tar", "d.tar"]),
        ("data.train=a.tar seed=1 data.train=[b.tar]", ["b.tar"]),  # as when a user's word follows those of a script
        ("data.train=a.tar data.train=[] data.train=b.tar", ["b.tar"]),
        ("data.train={a,b}.tar seed=1 data.train=c.tar", ["c.tar"]),  # added to a command, it replaces
        ("""data.train=b.tar 'data.train="a.tar"'""", ["a.tar"]),
        ("data.train=[a.tar] seed=1 data.train=[b.tar]", ["b.tar"]),
    ],
)
def test_sources_are_read_as_a_shell_gives_them(words: str, expected: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: [other.tar], val: [v.tar]}\n")
    config = load_config(path, expand(words))
    assert (config.data.train, config.data.val) == (expected, ["v.tar"])
    assert load_config(config, []) == config and load_config(config, ["data.train=x"]).data.train == ["x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("'data.train=[shards-{000..127}.tar]'", """braces needs quotes: ["shards-{000..127}.tar"]"""),
        (
            "data.train=[a.tar, b.tar]",
            "`data.train=[a.tar,`: not valid YAML: the list does not end; in a shell write 'data.",
        ),
        ("data.train=", "`data.train` is null: input should be a valid list"),
    ],
)
def test_sources_that_cannot_be_read_say_how_to_write_them(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, expand(words))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_is_found_by_name_and_a_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(CONFIGS[0].parent / "photos.yaml")
    assert load_config("photos") == shipped == load_config(Path("photos"))
    (tmp_path / "photos").mkdir()  # the photographs
    assert load_config("photos") == shipped
    (tmp_path / "quickstart").write_text("seed: 7\n")
    assert load_config("quickstart") == load_config(None, ["seed=7"])
    for name in ("photo", "configs/photos.yaml", "d/photos", "../photos", "photos.yaml"):
        with pytest.raises(ConfigError) as error:
            load_config(name)
        assert "There are box, imagenet_ms_ssim, imagenet_mse, photos, quickstart" in str(error.value), name
        assert "\n" not in str(error.value) and "did you mean photos?" in str(error.value), name


def test_merge_keys_work(tmp_path: Path) -> None:
    c = load_config(
        write(tmp_path, "train: &t {batch_size: 4}\nmodel: {num_filters: 8}\n"), ["train={<<: {steps: 7}, ema: 0.5}"]
    )
    assert (c.train.steps, c.train.ema) == (7, 0.5)


def test_ms_ssim_refuses_patches_that_it_cannot_measure() -> None:
    with pytest.raises(ConfigError, match="patch_size is 128.*161"):
        load_config(None, ["loss.metric=ms-ssim", "data.patch_size=128"])
    load_config(None, ["loss.metric=ms-ssim", "data.patch_size=192"])


def test_the_length_is_in_steps_or_epochs_and_the_override_wins(tmp_path: Path) -> None:
    assert load_config(None, []).train.epochs == 100
    path = write(tmp_path, "train: {epochs: 3}\n")
    assert load_config(path, ["train.steps=10"]).train.epochs is None
    with pytest.raises(ConfigError, match="both set"):
        load_config(write(tmp_path, "train: {epochs: 3, steps: 5}\n"), [])


@pytest.mark.parametrize("value", ["7", "'7 steps'", "1 step"])
def test_an_interval_may_be_text_in_steps(value: str) -> None:
    assert load_config(None, [f"train.validate_every={value}"]).train.validate_every in (1, 7)


def test_a_rendered_config_reads_back_as_the_same_config(tmp_path: Path) -> None:
    c = load_config(None, ["data.train=[a b.tar, 'ü:{0..3}.tar']", "train.checkpoint_every=2 epochs", "train.ema=0.99"])
    text = render(c)
    assert load_config(write(tmp_path, text), []) == c
    # every key has a comment
    assert all("#" in line for line in text.splitlines() if line.strip())


@pytest.mark.parametrize(
    "override",
    [
        "data.train=[https://h/s-{000..127}.tar?sig=SECRET]",
        'data.train=["https://u:SECRET@h/x?X=SECRET"',
        "https://u:p@SECRET@h/x?X=SECRET",
        "data.train=[\"pipe:curl --proxy-user b:SECRET --oauth2-bearer SECRET -uSECRET:SECRET -sSfH 'Key: SECRET' x\"",
    ],
)
def test_an_error_shows_no_secrets_of_a_url(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert "SECRET" not in str(error.value)
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, f"data:\n  train: {value or key}\n  bad"), [])
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        "curl -fsSLOH 'Authorization: Bearer SECRET' https://h/x",
        "curl -H Authorization:\\ Bearer\\ SECRET x",
        "curl --user=bob:SECRETkey --password=SECRETtoken --header=X-Token:SECRETtoken x",
        "curl -b sid=SECRET --proxy u:SECRET@p:1 --sftp-pass SECRET x",
        "SSHPASS=SECRET sshpass -e ssh me@h cat x.tar",
    ],
)
def test_the_secrets_of_a_command_are_hidden(command: str) -> None:
    shown = hide_secrets(f"pipe:{command}")
    assert "SECRET" not in shown and shown.split()[-1] == command.split()[-1]
    assert hide_secrets(shown) == shown


def test_long_texts_are_searched_for_secrets_in_no_time() -> None:
    for word in ("x" * 10**6, "-" * 10**5, "a:" * 10**5, "pipe:" + "pass" * 10**4, "pipe:" + " -a" * 10**4):
        assert hide_secrets(word) == word


@pytest.mark.parametrize(
    "command", ["find x -path '*.jpg' | tar -cf - -T -", "python -u make.py --out -", "tar -xOf a"]
)
def test_a_command_without_secrets_is_shown_whole(command: str) -> None:
    assert hide_secrets(f"pipe:{command}") == f"pipe:{command}"


def test_the_json_schema_has_every_key() -> None:
    tree = Config.model_json_schema()
    assert set(tree["properties"]) == set(Config.model_fields)
    assert "lambda" in json.dumps(tree["$defs"]["Loss"]["properties"])


def test_differences_say_which_keys_may_change() -> None:
    rows = list(differences(load_config(None, []), load_config(None, ["train.steps=5", "loss.lambda=1", "seed=1"])))
    assert {(key, may) for key, _, _, may in rows} == {
        ("train.steps", True),
        ("train.epochs", True),
        ("loss.lambda", False),
        ("seed", False),
    }


def test_photos_trains_the_model_that_it_starts_from() -> None:
    assert load_config(Path("photos"), []).model == load("q3").config.model


@pytest.mark.parametrize("density", ["gaussian", "logistic"])
def test_a_version_that_knows_no_density_can_read_a_model_without_one(density: str) -> None:
    stored = to_model_tree(load_config(None, [f"model.density={density}"]))["model"].get("density")
    assert stored == (None if density == "gaussian" else density)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid_and_open_with_their_command(path: Path) -> None:
    load_config(path, [])
    head = path.read_text().split("seed:")[0]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    assert "hyperprior train" in head or "./launch/" in head
    assert "easured" in head
