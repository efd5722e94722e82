"""Every image is found and visited once. Damage is always an error that names the file."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import encoded, photo, photos, tar_bytes

from hyperprior.config import load_config
from hyperprior.data import lanes
from hyperprior.data.inspect import inspect
from hyperprior.data.lanes import Cursor, Keep, read_lane
from hyperprior.data.shards import Shard, open_sources
from hyperprior.data.splits import open_splits
from hyperprior.errors import ConfigError, DataError
from hyperprior.terminal import Terminal


def keys(shards: list[Shard]) -> list[str]:
    return [s.key for shard in shards for s in shard.samples()]


def epoch_over_lanes(shards: list[Shard], count: int, epoch: int = 0) -> Counter[str]:
    seen: Counter[str] = Counter()
    for lane in range(count):
        for cursor, sample in read_lane(shards, lanes.ALL, 7, lane, count, 4, Cursor(epoch)):
            if cursor.epoch != epoch:
                break
            seen[sample.name] += 1
    return seen


def directory(tmp_path: Path) -> Path:
    for name, data in photos(9):
        file = tmp_path / "dir" / "sub" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "dir" / "top.PNG").write_bytes(encoded(photo(9), "PNG"))
    (tmp_path / "dir" / "notes.txt").write_text("no image")
    (tmp_path / "dir" / "._p000.jpg").write_bytes(b"what macOS leaves")
    return tmp_path / "dir"


def test_files_that_are_no_training_images_are_counted_once(tmp_path: Path) -> None:
    photo(1).save(tmp_path / "a.png")
    for name in ("a.HEIC", "b.heic", "c.webp", "notes", ".hidden", "._a.png", "t.tar"):
        (tmp_path / name).write_bytes(tar_bytes(photos(1)) if name == "t.tar" else b"x")
    settings = load_config(None, [f"data.train=[{tmp_path}]", f"data.val=[{tmp_path}]", "data.test_split=0"]).data
    assert open_splits(settings, 1, count=False).ignored == {".heic": 2, ".webp": 1, "": 1}


@pytest.mark.parametrize("lane_count", [1, 3, 4, 8])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_image_is_visited_once_an_epoch_over_all_lanes(
    tmp_path: Path, flat_tar: Path, nested_tar: Path, lane_count: int, epoch: int
) -> None:
    for source, images in ((flat_tar, 24), (nested_tar, 21), (directory(tmp_path), 10)):
        shards = lanes.ensure_enough_shards(open_sources([str(source)], "x"), lane_count)
        seen = epoch_over_lanes(shards, lane_count, epoch)
        assert len(seen) == images and set(seen.values()) == {1}, source


def test_every_image_of_imagenets_own_layout_is_visited_once(samples: Path) -> None:
    for name, images in (("imagenet_train_sample.tar", 750), ("imagenet_val_sample.tar", 100)):
        shards = lanes.ensure_enough_shards(open_sources([str(samples / name)], "x"), 16)
        seen = epoch_over_lanes(shards, 16)
        assert len(seen) == images and set(seen.values()) == {1}


def test_a_nested_tar_becomes_one_shard_per_class_with_full_names(nested_tar: Path) -> None:
    shards = open_sources([str(nested_tar)], "x")
    assert [s.name.split("//")[1] for s in shards] == [f"n{c}.tar" for c in range(6)]
    assert keys(shards)[:3] == ["n0_000", "n1_000", "n1_001"]
    data = dict(photos(3, "n2_"))
    assert [s.read() for s in shards[2].samples()] == list(data.values())


def test_epochs_and_seeds_change_the_order_but_not_the_images(flat_tar: Path) -> None:
    shards = open_sources([str(flat_tar)], "x")

    def order(seed: int, epoch: int) -> list[str]:
        walk = read_lane(shards, lanes.ALL, seed, 0, 1, 8, Cursor(epoch))
        return [next(walk)[1].key for _ in range(24)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert order(0, 0) == orders[0]
    assert len({tuple(o) for o in orders}) == 3
    assert len({tuple(sorted(o)) for o in orders}) == 1


def test_a_lane_continues_from_any_cursor(nested_tar: Path) -> None:
    shards = open_sources([str(nested_tar)], "x")
    walk = read_lane(shards, lanes.ALL, 0, 1, 2, 4, Cursor())
    straight = [next(walk) for _ in range(40)]
    for at, (cursor, _) in enumerate(straight[:-2]):
        again = read_lane(shards, lanes.ALL, 0, 1, 2, 4, cursor)
        assert [next(again) for _ in range(3)] == straight[at : at + 3]


def test_keys_are_full_names_without_the_last_extension(tmp_path: Path) -> None:
    names = [
        "a.b.c.jpg",
        "./dir.d/x y.JPeG",
        "ü/é.TIFF",
        "UPPER.PNG",
        "._a.jpg",
        "README",
        "a.json",
        "x" * 180 + ".bmp",
    ]
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes((name, b"x") for name in names))
    assert keys(open_sources([str(path)], "x")) == ["a.b.c", "dir.d/x y", "ü/é", "UPPER", "x" * 180]


def test_splits_are_disjoint_and_complete() -> None:
    names = [f"n{i}" for i in range(5000)]
    parts = [Keep(0.0, 0.1), Keep(0.1, 0.3), Keep(0.3, 1.0)]
    owners = Counter(sum(keep(name) for keep in parts) for name in names)
    assert owners == {1: 5000}
    shares = [sum(map(keep, names)) / 5000 for keep in parts]
    # Binomial: three standard deviations of 5,000 draws are below 0.02.
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.02)


def test_parts_of_parts_hold_every_sample_once(flat_tar: Path) -> None:
    (shard,) = open_sources([str(flat_tar)], "x")
    parts = [piece for part in shard.split(3) for piece in part.split(2)]
    assert sorted(keys(parts)) == sorted(keys([shard]))


# Damage ---------------------------------------------------------------------------------------------------


def damaged(whole: bytes, how: str) -> bytes:
    third = whole.index(b"p003.JPEG")
    return {
        "cut in the middle": whole[: len(whole) // 2],
        "cut at a member": whole[:third],
        "garbage header": whole[:third] + b"\xa5" * 512 + whole[third + 512 :],
        "zero header": whole[:third] + b"\0" * 1024 + whole[third + 1024 :],
        "flipped checksum": whole[: third + 148] + b"0000000\0" + whole[third + 156 :],
    }[how]


DAMAGES = ["cut in the middle", "cut at a member", "garbage header", "zero header", "flipped checksum"]


def linked_tar(path: Path) -> list[str]:
    """Writes a tar of two photographs with many links to them. Returns the keys whose links lead nowhere."""
    with tarfile.open(path, "w") as tar:
        for name, data in photos(2):
            info = tarfile.TarInfo("./class/" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        first, second = (f"class/{name}" for name, _ in photos(2))
        kinds = {
            "hard.jpg": (tarfile.LNKTYPE, first),
            "class/soft.jpg": (tarfile.SYMTYPE, Path(second).name),
            "other/up.jpg": (tarfile.SYMTYPE, f"../{second}"),
            "chain.jpg": (tarfile.SYMTYPE, "other/up.jpg"),
            "early.jpg": (tarfile.LNKTYPE, "chain.jpg"),
            "gone.jpg": (tarfile.SYMTYPE, "nowhere.jpg"),
            "outside.jpg": (tarfile.SYMTYPE, "/etc/hostname"),
            "above.jpg": (tarfile.SYMTYPE, f"../../{first}"),
            "loop.jpg": (tarfile.SYMTYPE, "loop.jpg"),
            "lost.jpg": (tarfile.LNKTYPE, "nowhere.jpg"),
            "pipe.jpg": (tarfile.FIFOTYPE, ""),
        }
        for name, (kind, target) in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")  # is no image
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return ["gone", "outside", "above", "loop", "lost", "pipe"]


def test_links_in_a_tar_are_the_files_that_they_lead_to_or_are_named(tmp_path: Path) -> None:
    broken = linked_tar(tmp_path / "t.tar")
    (shard,) = open_sources([str(tmp_path / "t.tar")], "x")
    samples = {sample.key: sample for sample in shard.samples()}
    first, second = (data for _, data in photos(2))
    assert {key for key, sample in samples.items() if sample.problem} == set(broken)
    read = {key: sample.read() for key, sample in samples.items() if not sample.problem}
    assert len(read) == 2 + 5 and read["hard"] == first
    assert {read[key] for key in ("class/soft", "other/up", "chain", "early")} == {second}
    with pytest.raises(DataError, match="it is a link to nowhere.jpg, not a file of this tar"):
        samples["gone"].read()
    report = inspect([str(tmp_path / "t.tar")], 64, False, Terminal(quiet=True))
    assert {name.split(": ")[1] for name, _ in report.unusable} == set(broken) and report.images == 13


def test_links_in_a_streamed_tar_are_named(served: str, tmp_path: Path) -> None:
    broken = linked_tar(tmp_path / "t.tar")
    (shard,) = open_sources([f"{served}/t.tar"], "x")
    samples = {sample.key: sample.problem for sample in shard.samples()}
    assert {key for key, problem in samples.items() if problem} == {
        *broken,
        "hard",
        "class/soft",
        "other/up",
        "chain",
        "early",
    }
    assert "it is a link to nowhere.jpg; a stream holds no links" in samples["lost"]


def test_a_link_to_a_tar_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    inner = tar_bytes(photos(3))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("a.tar")
        info.size = len(inner)
        tar.addfile(info, io.BytesIO(inner))
        for name, target in (("b.tar", "a.tar"), ("c.tar", "nowhere.tar")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    with pytest.raises(DataError, match="c.tar cannot be read: it is a link to nowhere.tar"):
        open_sources([str(tmp_path / "t.tar")], "x")


def test_a_sparse_member_is_named(tmp_path: Path) -> None:
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.write(encoded(photo(1)))
        file.truncate(10**6)
    for kind in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={kind}", "-cf", "s.tar", "hole.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        with pytest.raises(DataError, match=r"s\.tar holds hole\.jpg as a sparse file"):
            keys(open_sources([str(tmp_path / "s.tar")], "x"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_tar_is_an_error_by_name(tmp_path: Path, how: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(damaged(tar_bytes(photos(8)), how))
    with pytest.raises(DataError, match=r"bad\.tar.*(damaged|not an uncompressed tar)"):
        keys(open_sources([str(path)], "x"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_inner_tar_is_an_error_by_name(tmp_path: Path, how: str) -> None:
    good = tar_bytes(photos(8))
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes([("good.tar", good), ("bad.tar", damaged(good, how)), ("more.tar", good)]))
    with pytest.raises(DataError, match=r"outer\.tar//bad\.tar.*(damaged|not an uncompressed tar)"):
        keys(open_sources([str(path)], "x"))


def test_a_cut_outer_tar_is_an_error_before_training(tmp_path: Path, nested_tar: Path) -> None:
    data = nested_tar.read_bytes()
    for size in (len(data) // 2, len(data) // 2 // 512 * 512):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(data[:size])
        with pytest.raises(DataError, match="cut"):
            open_sources([str(cut)], "x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"\0" * 10240), "without any member"),
        (lambda p: p.write_bytes(b"hello" * 1000), "not an uncompressed tar"),
    ],
)
def test_a_file_that_is_not_a_tar_is_refused(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "x.tar"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        open_sources([str(path)], "data.train")


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.train: .*empty holds no image"):
        open_sources([str(tmp_path / "empty")], "data.train")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"x\.zip is not a tar, image or directory"):
        open_sources([str(tmp_path / "x.zip")], "data.train")


def test_a_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    code = (
        "import os, sys; from hyperprior import errors; from hyperprior.data import shards\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: shards.open_sources(sys.argv[1:], 'data.train')\n"
        "except errors.DataError as e: print(e)\n"
    )
    for parent in (tmp_path, *tmp_path.parents):  # only their owner can enter pytest's folders
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    (folder / "sub").chmod(0)
    try:
        result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    finally:
        (folder / "sub").chmod(0o755)
    assert "sub cannot be read: Permission denied" in result.stdout, result.stderr


def test_a_tar_of_tars_is_recognised_whatever_comes_first(tmp_path: Path) -> None:
    inner = tar_bytes(photos(3))
    for first in [("README.txt", b"hello"), ("._n0.tar", b"what macOS leaves")]:
        (tmp_path / "t.tar").write_bytes(tar_bytes([first, ("n0.tar", inner), ("loose.jpg", b"x")]))
        assert keys(open_sources([str(tmp_path / "t.tar")], "x")) == ["p000", "p001", "p002", "loose"]


def test_an_inner_tar_that_would_not_be_read_is_an_error(tmp_path: Path) -> None:
    inner = tar_bytes(photos(3))
    for members in ([("a.jpg", b"x"), ("n0.tar", inner)], [("n0.tar", tar_bytes([("deep.tar", inner)]))]):
        (tmp_path / "t.tar").write_bytes(tar_bytes(members))
        with pytest.raises(DataError, match=r"holds the tar (n0|deep)\.tar"):
            keys(open_sources([str(tmp_path / "t.tar")], "x"))


@pytest.mark.parametrize(
    ("kind", "size", "pax_size", "message"),
    [
        (tarfile.REGTYPE, -1024, None, r"member new\\nline/b.jpg has a size of -1024"),
        (tarfile.REGTYPE, 0, "-1024", "has a size of"),
        (tarfile.REGTYPE, 0, "1e3", "has a size of `1e3`"),  # 0 for tarfile
        (tarfile.DIRTYPE, 1024, None, r"member new\\nline/b.jpg is no file, but has data"),  # GNU tar passes over it
        (tarfile.SYMTYPE, 1024, None, r"member new\\nline/b.jpg is no file, but has data"),
    ],
)
def test_a_header_that_programs_read_differently_is_refused(
    served: str, tmp_path: Path, kind: bytes, size: int, pax_size: str | None, message: str
) -> None:
    info = tarfile.TarInfo("new\nline/b.jpg")
    info.type, info.size, info.linkname = kind, size, "a.jpg"
    info.pax_headers = {"size": pax_size} if pax_size else {}
    header = info.tobuf(tarfile.PAX_FORMAT if pax_size else tarfile.GNU_FORMAT)
    image = tar_bytes([("a.jpg", b"x" * 700)])[:1536]
    (tmp_path / "t.tar").write_bytes(image + header + image + bytes(1024))
    for source in (str(tmp_path / "t.tar"), f"{served}/t.tar"):
        with pytest.raises(DataError, match=rf"t\.tar .*{message}") as error:
            keys(open_sources([source], "x"))
        assert "\n" not in str(error.value)


# URLs -----------------------------------------------------------------------------------------------------


def test_a_url_gives_the_samples_of_the_file_in_the_same_shuffled_order(served: str, flat_tar: Path) -> None:
    def walk(source: str) -> list[tuple[Cursor, str, bytes]]:
        samples = read_lane(open_sources([source], "x"), Keep(0.0, 0.8), 0, 0, 1, 8, Cursor(2, 0, 3))
        return [(cursor, s.key, s.read()) for cursor, s in (next(samples) for _ in range(10))]

    assert walk(f"{served}/flat.tar") == walk(str(flat_tar))


def test_a_url_whose_reader_is_not_installed_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # its import then fails, whether it is installed or not
    with pytest.raises(DataError, match="^hf://a/b.tar needs huggingface_hub, which is not installed: `pip install"):
        keys(open_sources(["hf://a/b.tar"], "x"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_url_is_an_error_by_name(served: str, tmp_path: Path, how: str) -> None:
    (tmp_path / "bad.tar").write_bytes(damaged(tar_bytes(photos(8)), how))
    with pytest.raises(DataError, match=r"http://.*bad\.tar"):
        keys(open_sources([f"{served}/bad.tar"], "x"))


def test_a_brace_pattern_names_many_shards(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"s-{i:06d}.tar").write_bytes(tar_bytes(photos(2, f"s{i}_")))
    assert len(keys(open_sources([f"{tmp_path}/s-{{000000..000002}}.tar"], "x"))) == 6
    with pytest.raises(DataError, match=r"s-000003\.tar cannot be read"):
        open_sources([f"{tmp_path}/s-{{000000..000003}}.tar"], "x")


def test_a_pipe_needs_permission(flat_tar: Path) -> None:
    with pytest.raises(ConfigError, match="shell command; set data.allow_pipe=true"):
        open_sources([f"pipe:cat {flat_tar}"], "x")
    shards = open_sources([f"pipe:cat {flat_tar}"], "x", allow_pipe=True)
    assert len(keys(shards)) == 24
    with pytest.raises(DataError, match="pipe:"):
        keys(open_sources([f"pipe:cat {flat_tar}; exit 3"], "x", allow_pipe=True))
    with pytest.raises(DataError, match="pipe:true"):
        keys(open_sources(["pipe:true"], "x", allow_pipe=True))


def test_an_unbalanced_pattern_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="is not a valid brace pattern"):
        open_sources(["a{0..3.tar"], "x")


def test_no_descriptor_is_left_open(nested_tar: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        [s.read() for shard in open_sources([str(nested_tar)], "x") for s in shard.samples()]
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # one stays in the cache


@pytest.mark.parametrize(
    "suffix, opener", [(".tar.gz", gzip.compress), (".tgz", gzip.compress), (".tar.xz", lzma.compress)]
)
def test_a_compressed_tar_is_named_wherever_it_is(
    served: str, tmp_path: Path, suffix: str, opener: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jpg").write_bytes(encoded(photo(1)))
    compressed = opener(tar_bytes(photos(2)))
    for name in (f"d/s{suffix}", "hidden.tar"):
        (tmp_path / name).write_bytes(compressed)
    for source in ("d", f"d/s{suffix}", "hidden.tar"):
        with pytest.raises(DataError, match="compressed.*decompress it"):
            open_sources([str(tmp_path / source)], "x")
    with pytest.raises(DataError, match="cannot be read as a tar: it is compressed; decompress it with"):
        keys(open_sources([f"{served}/hidden.tar"], "x"))
    members = [("b.tar", tar_bytes(photos(2))), (f"c{suffix}", compressed)]
    for name, first in (("nested", members[:1]), ("flat", photos(1))):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes([*first, members[1]]))
        for source in (str(tmp_path / f"{name}.tar"), f"{served}/{name}.tar"):
            with pytest.raises(
                DataError, match=rf"c{suffix}.* (is compressed|is a tar)|holds the tar c{suffix}|b\.tar is a"
            ):
                keys(open_sources([source], "x"))


def test_a_tar_without_an_image_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    compressed = tar_bytes([("n.tar.gz", gzip.compress(tar_bytes(photos(1))))])
    apple = [("._b.tar.gz", b"x"), *photos(1)]
    tars = {"good": tar_bytes(photos(1)), "nested": compressed, "webp": tar_bytes([("a.webp", b"x")])}
    for name, data in {**tars, "apple": tar_bytes(apple)}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"nested\.tar: its member n\.tar\.gz is compressed"):
        open_sources([f"{tmp_path}/{{good,nested}}.tar"], "x")
    with pytest.raises(DataError, match=r"webp\.tar holds no image"):
        open_sources([f"{tmp_path}/{{good,webp}}.tar"], "x")
    assert keys(open_sources([f"{tmp_path}/apple.tar"], "x")) == ["p000"]
    (tmp_path / "nested.tar").unlink()
    ignored: dict[str, Counter[str]] = {}
    assert len(open_sources([str(tmp_path)], "x", ignored=ignored)) == 2
    assert ignored[str(tmp_path / "webp.tar")] == {".webp": 1}


def test_the_home_of_nobody_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="~nobody-here/a.tar cannot be read: No such file"):
        open_sources(["~nobody-here/a.tar"], "x")
    Path("~old").mkdir()
    Path("~old/a.jpg").write_bytes(encoded(photo(1)))
    assert keys(open_sources(["~old"], "x")) == ["a"]


@pytest.mark.parametrize(
    "command", ["curl -sf -H 'Authorization: SECRET' file:///none", "curl -sfuSECRET:SECRET file:///none"]
)
def test_a_command_that_fails_is_named_without_its_secrets(command: str) -> None:
    (shard,) = open_sources([f"pipe:{command}"], "x", allow_pipe=True)
    with pytest.raises(DataError, match="cannot be read as a tar: its command ended with exit code 37") as error:
        list(shard.samples())
    assert "SECRET" not in str(error.value) and "file:///none" in str(error.value)


def test_tars_that_were_joined_by_cat_are_named(served: str, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes(photos(2)) + tar_bytes(photos(3)))
    for source in (str(tmp_path / "t.tar"), f"{served}/t.tar"):
        with pytest.raises(DataError, match="holds several tars, one after the other.*tar --concatenate"):
            keys(open_sources([source], "x"))


@pytest.mark.parametrize("kind", ["tar", "folder", "url"])
def test_a_photograph_and_its_mask_share_a_split_and_extensions_choose(served: str, tmp_path: Path, kind: str) -> None:
    members = [(f"a.b/{i:04d}.{extension}", encoded(photo(i))) for i in range(40) for extension in ("JPG", "seg.jpg")]
    if kind == "folder":
        (tmp_path / "d" / "a.b").mkdir(parents=True)
        for name, data in members:
            (tmp_path / "d" / name).write_bytes(data)
    (tmp_path / "t.tar").write_bytes(tar_bytes(members))
    source = {"tar": str(tmp_path / "t.tar"), "folder": str(tmp_path / "d"), "url": f"{served}/t.tar"}[kind]
    everything = keys(open_sources([source], "x"))
    assert len(everything) == 80
    for keep in (Keep(0.0, 0.5), Keep(0.2, 0.9, 0.4)):
        kept = {key for key in everything if keep(key)}
        assert 0 < len(kept) < 80 and kept == {key for key in everything if keep(lanes.group_of(key))}
        assert all((f"a.b/{i:04d}" in kept) == (f"a.b/{i:04d}.seg" in kept) for i in range(40))
    assert inspect([source], 64, False, Terminal(quiet=True)).keys_with_several_images == 40
    photographs = open_sources([source], "x", extensions=["jpg"])
    assert keys(photographs) == [f"a.b/{i:04d}" for i in range(40)]
    assert sorted(keys(photographs[0].split(3))) == sorted(keys(photographs))
    assert keys(open_sources([source], "x", extensions=[".Seg.JPG"])) == [f"a.b/{i:04d}.seg" for i in range(40)]
    assert inspect([str(tmp_path / "t.tar")], 64, False, Terminal(quiet=True)).images == 80
