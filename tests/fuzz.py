"""Fuzzers of everything that parses foreign bytes. `python tests/fuzz.py KIND COUNT` tries COUNT damaged inputs.

    hyp    files of a codec: the image, or a BitstreamError (--model, --image and --engine choose the codec and image)
    tar    our index of members against Python's tarfile and GNU tar: the same members and bytes, or a DataError
    jpeg   our decoders against TensorFlow and Pillow: what those read is read, with the same pixels, or it is Unusable
    yaml   configs: a Config that can be written and read again, or a ConfigError
    json   results.json and metrics.jsonl in `runs`, `compare`, `sweep` and a resume, summary.json in the gate
    npz    models, and checkpoints in a resume and an export: usable, or a typed error

Inputs are damaged as disks, networks and attackers damage them; half of them get new checksums, so that the parser
itself is tested. Any other exception, any difference, and more than a minute for one input ends the process with the
number of the mutant; `--first NUMBER` begins with it. The outcomes, the slowest input and the growth of memory are
printed. The slow suite runs 10,000 of each.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

SECONDS = 60  # a hang


class Hang(BaseException):
    """No Exception: the code under test must not take it for an error of its own."""


def stop(number: int, frame: object) -> None:
    raise Hang(f"not done after {SECONDS} s")


Attempt = Callable[[random.Random], str]  # tries one mutant and returns the outcome


class Figures(NamedTuple):
    outcomes: collections.Counter[str]
    slowest: float  # seconds
    grown: float  # MiB

    def __str__(self) -> str:
        lines = [f"{times:7,}  {outcome}" for outcome, times in sorted(self.outcomes.items())]
        return "\n".join([*lines, f"slowest {self.slowest:.2f} s, memory grew by {self.grown:.0f} MiB"])


def fuzz(kind: str, count: int, folder: Path, first: int = 0, **options: Any) -> Figures:
    """Tries mutants `first`, `first` + 1, … in the empty `folder`. Raises AssertionError for one that goes wrong."""
    attempt: Attempt = KINDS[kind](folder, **options)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest, before = 0.0, peak_memory()
    signal.signal(signal.SIGALRM, stop)
    for number in range(first, first + count):
        signal.alarm(SECONDS)
        began = time.perf_counter()
        try:
            outcomes[attempt(random.Random(number))] += 1
        except (Exception, Hang) as error:
            raise AssertionError(f"{kind} mutant {number}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - began)
    return Figures(outcomes, slowest, peak_memory() - before)


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flipped bits, other bytes, or a cut, somewhere."""
    data = data or b"\0"
    result = bytearray(data)
    place = rng.randrange(len(data) + 1)
    kind = rng.choice(["flip", "flip", "flips", "bytes", "cut", "grown", "moved"])
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else rng.randrange(2, 30)):
            result[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        result[place : place + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
    elif kind == "cut":
        del result[place:]
    elif kind == "grown":
        result += rng.randbytes(rng.randrange(1, 300))
    else:
        part = result[place : place + rng.randrange(1, 600)]
        other = rng.randrange(len(data))
        result[other:other] = part
    return bytes(result)


# .hyp -----------------------------------------------------------------------------------------------------


class HypMutant(NamedTuple):
    kind: str
    sealed: bool  # it has the CRC-32 of its new bytes
    data: bytes


def damage_hyp(rng: random.Random, files: Sequence[bytes]) -> HypMutant:
    data = bytearray(rng.choice(files))
    kind = rng.choice(["flip", "flips", "bytes", "cut", "grown", "swapped", "size", "lengths", "random", "splice"])
    place = rng.randrange(len(data))
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else rng.randrange(2, 30)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        data[place : place + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(0, 40))
    elif kind == "cut":
        del data[place:]
    elif kind == "grown":
        data += rng.randbytes(rng.randrange(1, 300))
    elif kind == "swapped":
        half = len(data) // 2
        data = data[:29] + data[half:-4] + data[29:half] + data[-4:]
    elif kind == "size" and len(data) >= 33:
        data[13:17] = struct.pack("<HH", *(rng.choice([0, 1, 64, 333, 5000, 65535]) for _ in range(2)))
    elif kind == "lengths" and len(data) >= 33:
        data[17:25] = struct.pack("<II", *(rng.choice([0, 1, 100, len(data), 2**31, 2**32 - 1]) for _ in range(2)))
    elif kind == "random":
        data[29:-4] = rng.randbytes(rng.randrange(0, 400))
    elif kind == "splice":
        data[place:] = rng.choice(files)[place:]
    sealed = rng.random() < 0.5 and len(data) >= 33
    if sealed and kind in ("bytes", "cut", "grown", "random", "splice"):  # these need correct lengths, too
        escapes = min(struct.unpack_from("<I", data, 21)[0], (len(data) - 33) // 2)
        data[17:25] = struct.pack("<II", len(data) - 33 - 2 * escapes, escapes)
    if sealed:
        data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
    return HypMutant(kind, sealed, bytes(data))


def make_hyp(folder: Path, model: str = "q3", image: str | None = None, engine: str = "auto") -> Attempt:
    import re

    import numpy as np
    from conftest import photo
    from PIL import Image

    import hyperprior
    from hyperprior.errors import BitstreamError

    codec = hyperprior.load(model, engine)
    pixels = np.asarray(Image.open(image).convert("RGB") if image else photo(1, 300, 200))
    files = [codec.compress(pixels[:h, :w]) for h, w in ((64, 64), (200, 130), (90, 300))]
    originals = {codec.decompress(data).tobytes() for data in files}

    def attempt(rng: random.Random) -> str:
        mutant = damage_hyp(rng, files)
        try:
            decoded = codec.decompress(mutant.data, max_pixels=2**20)
            assert decoded.shape[:2] == struct.unpack_from("<HH", mutant.data, 13)
            which = "the same image" if decoded.tobytes() in originals else "ANOTHER IMAGE"
            assert mutant.sealed or which == "the same image"
            outcome = "unchanged" if mutant.data in files else f"{which}, by `{mutant.kind}`"
        except BitstreamError as error:
            outcome = re.split("[:;]", str(error))[0]
            outcome = re.sub(r"\d+x\d+", "NxN", re.sub("model .*|version .*", "another one", outcome))
        return f"{'new CRC' if mutant.sealed else 'as is':8} {outcome}"

    return attempt


# Tars -----------------------------------------------------------------------------------------------------

BLOCK = 512
TAR_TYPES = [b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"X", b"S", b"D", b"V", b"Z"]


def make_tars(folder: Path) -> list[bytes]:
    """Small tars of every format, with long names, links, folders, devices, other fields and sparse files."""
    tars = []
    long = "d" * 60 + "/" + "n" * 120 + ".jpg"
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
            for name, size in (("a.jpg", 700), ("dir/b.jpg", 512), (long, 10), ("e.png", 0), ("ü.jpg", 3)):
                info = tarfile.TarInfo(name if tar_format != tarfile.USTAR_FORMAT or len(name) < 160 else "s.jpg")
                info.size = size
                tar.addfile(info, io.BytesIO(random.Random(size).randbytes(size)))
            for name, kind, target in (
                ("h.jpg", tarfile.LNKTYPE, "a.jpg"),
                ("s.jpg", tarfile.SYMTYPE, "dir/b.jpg"),
                ("dir", tarfile.DIRTYPE, ""),
                ("p.jpg", tarfile.FIFOTYPE, ""),
                ("l.jpg", tarfile.SYMTYPE, "x" * (80 if tar_format == tarfile.USTAR_FORMAT else 150)),
            ):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
            info = tarfile.TarInfo("z.jpg")
            info.size, info.pax_headers = 5, {"comment": "é" * 30, "size": "5"}
            tar.addfile(info, io.BytesIO(b"z" * 5))
            info = tarfile.TarInfo("last")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        tars.append(file.getvalue())
    hole = folder / "hole.jpg"
    with hole.open("wb") as sparse:
        for place in range(0, 400_000, 50_000):
            sparse.seek(place)
            sparse.write(b"data")
        sparse.truncate(10**6)
    for option in ("--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"):
        options = [option] if "format" in option else ["--format=posix", option]
        command = ["tar", "--sparse", *options, "-cf", "-", "hole.jpg"]
        tars.append(subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout)
    return tars


def damage_tar(rng: random.Random, tars: Sequence[bytes]) -> bytes:
    data = bytearray(rng.choice(tars))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        headers = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"] or [0]
        at = rng.choice(headers)
        kind = rng.choice(
            ["damage", "field", "size", "type", "pax", "block", "remove", "repeat", "cut", "zeros", "end"]
        )
        if kind == "damage":
            data = bytearray(damage(rng, data)) or data
        elif kind == "field":
            begin, end = rng.choice([(0, 100), (100, 108), (108, 124), (136, 148), (157, 257), (257, 265), (345, 500)])
            field = rng.choice([b"\0" * 155, rng.randbytes(155), b"7" * 155, b" " * 155, b"../" * 52, b"\xff" * 155])
            data[at + begin : at + end] = field[: end - begin]
        elif kind == "size":
            octal = [0, 1, 511, 512, 513, 10_000, len(data), 8**11 - 1]
            number = rng.choice([2**62, 2**63 - 1, 2**88, -1, -512, -1024, -1536, -(10**9), 700])
            field = rng.choice([b"%011o\0" % rng.choice(octal), struct.pack(">b11s", -128, b"\xff" * 11)])
            if rng.random() < 0.5:
                field = number.to_bytes(12, "big", signed=True)
                field = bytes([field[0] | 0x80]) + field[1:]
            data[at + 124 : at + 136] = field
        elif kind == "type":
            data[at + 156 : at + 157] = rng.choice(TAR_TYPES)
        elif kind == "pax":
            key = rng.choice(["size", "path", "linkpath", "hdrcharset", "GNU.sparse.major", "GNU.sparse.size", "mtime"])
            values = ["5", "-1024", "9" * 30, "x" * 70, "BINARY", "1", "", "a.jpg", "\0", "1e3", "99999999999999999999"]
            record = f" {key}={rng.choice(values)}\n"
            record = f"{len(record) + len(str(len(record) + 2))}{record}"
            body = record.encode() * rng.choice([1, 1, 3])
            info = tarfile.TarInfo("pax")
            info.type, info.size = rng.choice([b"x", b"g"]), len(body)
            data[at:at] = info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)
        elif kind == "block":
            data[at:at] = rng.choice([bytes(BLOCK), rng.randbytes(BLOCK), bytes(2 * BLOCK)])
        elif kind == "remove":
            del data[at : at + BLOCK]
        elif kind == "repeat":
            data[at:at] = data[at : at + BLOCK] * rng.choice([1, 2, 400])
        elif kind == "cut":
            del data[at + rng.choice([0, BLOCK, 100]) :]
        elif kind == "zeros":
            data[at : at + BLOCK] = bytes(BLOCK)
        else:
            data += rng.choice([rng.randbytes(BLOCK), bytes(BLOCK), rng.choice(tars)])
        if rng.random() < 0.85 and data[at : at + BLOCK].strip(b"\0") and len(data) >= at + BLOCK:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
        data = data or bytearray(1)
    return bytes(data)


def make_tar(folder: Path) -> Attempt:
    from hyperprior.data import tars
    from hyperprior.errors import DataError

    originals = make_tars(folder)
    path = folder / "t.tar"

    def attempt(rng: random.Random) -> str:
        data = damage_tar(rng, originals)
        path.write_bytes(data)
        for cached in (tars.list_members, tars.list_images):
            cached.cache_clear()
        with contextlib.suppress(DataError):
            tars.check_ends(str(path), 0, len(data), "t.tar")
        with contextlib.suppress(DataError):
            tars.find_first_image_or_tar(str(path), len(data))
        streamed = None
        with contextlib.suppress(DataError):
            streamed = [(name, image) for name, image, problem in tars.stream_images(str(path), "t.tar") if not problem]
        try:
            members = tars.list_members(str(path), 0, len(data), "t.tar")
        except DataError as error:
            assert "\n" not in str(error) and "t.tar" in str(error)
            return "refused"
        # An inner tar must be read as it is read outside, and nothing of what is beside it.
        (folder / "outer.tar").write_bytes(b"\xa5" * BLOCK + data + b"\xa5" * BLOCK)
        inner = tars.list_members(str(folder / "outer.tar"), BLOCK, len(data), "t.tar")
        assert inner == tuple(m if m.problem else m._replace(offset=m.offset + BLOCK) for m in members)
        read = {m.name: tars.read_at(str(path), m.offset, m.size) for m in members if not m.problem}
        with tarfile.open(path, "r:") as tar:
            entries = list(tar)
            assert [m.name for m in members] == [e.name for e in entries if not e.isdir()]
            regular = [(e.name, tar.extractfile(e).read()) for e in entries if e.isreg()]  # type: ignore[union-attr]
        places = {e.name for e in entries if e.isreg()}
        own = [(m.name, tars.read_at(str(path), m.offset, m.size)) for m in members if not m.problem]
        assert ([pair for pair in own if pair in regular] and set(regular) <= set(own)) or not regular
        assert all(name in places or image in [d for _, d in regular] for name, image in read.items())
        expected = [pair for pair in regular if tars.is_training_image(pair[0])]
        assert streamed == expected, "the stream is refused" if streamed is None else "the stream holds other images"
        gnu = subprocess.run(["tar", "-xOf", path], capture_output=True, close_fds=False)
        same = gnu.stdout == b"".join(image for _, image in regular)
        is_known = all(entry.type in tarfile.SUPPORTED_TYPES for entry in entries)
        assert same or gnu.returncode or not is_known, "GNU tar reads other bytes"
        if not is_known:
            outcome = "read, with members of unknown types, which are named"
        else:
            outcome = "read, GNU tar complains" if gnu.returncode else "read"
        outcome += "" if same or not is_known else " and reads other bytes"
        return outcome

    return attempt


# JPEGs ----------------------------------------------------------------------------------------------------


def make_jpegs() -> list[bytes]:
    from conftest import encoded, photo
    from PIL import Image

    image = photo(1, 90, 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [encoded(image.convert(mode)) for mode in ("RGB", "L", "CMYK")]
    jpegs += [encoded(image, progressive=True), encoded(image, subsampling=0), encoded(image, subsampling=1)]
    return [*jpegs, encoded(image, restart_marker_blocks=3), encoded(image, exif=exif), encoded(image, optimize=True)]


def list_segments(data: bytes) -> list[tuple[int, int]]:
    """(begin, end) of each segment of a good JPEG, up to its first scan."""
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append((at, end))
        at = end
    return [*segments, (at, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))]


def damage_jpeg(rng: random.Random, jpegs: Sequence[bytes]) -> bytes:
    data = rng.choice(jpegs)
    segments = list_segments(data)
    begin, end = rng.choice(segments)
    kind = rng.choice(["damage", "head", "head", "size", "length", "marker", "stray", "remove", "repeat", "splice"])
    if kind == "damage":
        return damage(rng, data)
    if kind == "head":
        return damage(rng, data[: segments[-1][1]])[:2000] + data[segments[-1][1] :]
    if kind == "size":
        (at,) = (begin for begin, _ in segments if data[begin + 1] in (0xC0, 0xC2))
        size = struct.pack(">HH", *(rng.choice([0, 1, 64, 71, 90, 1000, 65500, 65535]) for _ in range(2)))
        return data[: at + 5] + size + data[at + 9 :]
    if kind == "length":
        length = rng.choice([0, 1, 2, 3, 17, end - begin, 65535])
        return data[: begin + 2] + struct.pack(">H", length) + data[begin + 4 :]
    if kind == "marker":
        return data[: begin + 1] + bytes([rng.choice([0, 1, *range(0xC0, 0x100)])]) + data[begin + 2 :]
    if kind == "stray":
        stray = rng.choice([b"\0", b"\xff", b"\xff\xff", b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"\xff\xd9", b"abc"])
        return data[:begin] + stray * rng.choice([1, 2, 50]) + data[begin:]
    if kind == "remove":
        return data[:begin] + data[end:]
    if kind == "repeat":
        return data[:begin] + data[begin:end] * rng.choice([2, 3, 300]) + data[end:]
    other = rng.choice(jpegs)
    return data[: rng.choice(segments)[0]] + other[rng.choice(list_segments(other))[0] :]


def make_jpeg(folder: Path) -> Attempt:
    import numpy as np
    import tensorflow as tf
    from PIL import Image

    from hyperprior import images
    from hyperprior.data.patches import Place, cut_patches

    jpegs = make_jpegs()

    def by_tensorflow(data: bytes) -> np.ndarray:
        with tf.device("cpu:0"):
            return tf.io.decode_jpeg(data, 3, dct_method="INTEGER_ACCURATE").numpy()

    def by_pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))

    def result_of(function: Callable[[bytes], np.ndarray], data: bytes, *errors: type[Exception]) -> Any:
        try:
            return function(data)
        except errors as error:
            return error

    def attempt(rng: random.Random) -> str:
        with mock.patch.object(images, "MAX_PIXELS", 2**20):
            return compare(damage_jpeg(rng, jpegs))

    def compare(data: bytes) -> str:
        whole = result_of(images.decode, data, images.Unusable)
        upright = result_of(lambda data: images.decode_photo(data)[0], data, images.Unusable)
        patch = result_of(lambda data: cut_patches(data, 64, [Place(3, 5)])[0], data, images.Unusable)
        patches = result_of(lambda data: cut_patches(data, 64, [Place(3, 5)] * 2)[0], data, images.Unusable)
        if any("pixels; at most" in str(each) for each in (whole, upright)):
            for each in (whole, upright, patch, patches):
                assert isinstance(each, images.Unusable)
            return "too many pixels"
        expected = result_of(by_tensorflow, data, tf.errors.InvalidArgumentError)
        pillow = result_of(by_pillow, data, Exception)
        if isinstance(expected, np.ndarray):
            assert np.array_equal(whole, expected)
            if min(expected.shape[:2]) >= 64:
                assert patch.shape == patches.shape == (64, 64, 3)
        assert isinstance(upright, np.ndarray) == isinstance(pillow, np.ndarray), f"{upright} but Pillow: {pillow}"
        if isinstance(pillow, np.ndarray):
            assert sorted(upright.shape) == sorted(pillow.shape)
        readers = [
            name
            for name, each in (("training", whole), ("TensorFlow", expected), ("compress", upright), ("Pillow", pillow))
            if isinstance(each, np.ndarray)
        ]
        outcome = f"read by {', '.join(readers)}" if readers else "read by nobody"
        if isinstance(whole, np.ndarray) and isinstance(pillow, np.ndarray):
            outcome += "" if np.array_equal(whole, pillow) else ", other pixels"
        return outcome

    return attempt


# Configs --------------------------------------------------------------------------------------------------

YAML = [
    *("&a ", "*a", "<<: *a", "<<: [*a, *a]", "!!binary aGk=", "!!binary %", "!!set {a, b}", "!!timestamp 2001-01-01"),
    *("!!timestamp x", "!!bool x", "!!int x", "!!int [1]", "!!float x", "!!null x", "!!str {a: b}", "!!omap [a: 1]"),
    *(
        "!!pairs [a: 1]",
        "!!python/object:os.system",
        "! x",
        "!<tag:yaml.org,2002:int> 3",
        "? ",
        "? [a]\n: 1",
        ": ",
        "- ",
    ),
    *(
        "|\n  x",
        ">\n  x",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\n",
        "\n  ",
        "\t",
        "#",
        "'",
        '"',
        "%YAML 1.1\n---\n",
        "---\n",
        "...",
    ),
    *(
        "9" * 400,
        "9" * 5000,
        "1e999",
        "-1",
        "0x10",
        ".inf",
        "-.inf",
        ".nan",
        "2026-01-01",
        "1:30",
        "null",
        "~",
        "=",
        "<<",
    ),
    *(
        "\0",
        "\x1b[2J",
        "\x85",
        "\u2028",
        "\ufeff",
        "é",
        "😀",
        "\ud800",
        "true",
        "off",
        "{a: *a}",
        "[" * 200,
        "{a: " * 200,
    ),
    *("x" * 3000, "1" + "_000" * 5, "train", "model", "data", "seed", "steps", "lambda", "__class__", "self", "None"),
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "3"),
    *("\n", "\0", "\x1b[2J", "x" * 5000, "1 epoch", "0 steps", [], {}, [[]], [1, 2], [3, 1], ["a"], {"a": 1}, {"": {}}),
    *(False, "off", "full", [None], "9" * 5000, "model 1", 1, "val", "train", "ended", "skipped"),
]


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """The tree with one value replaced, one key removed, renamed or added, or one value nested deeply."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.15:
        kind = rng.randrange(12)
        if kind == 0:
            for _ in range(rng.choice([3, 90, 900])):
                tree = [tree] if rng.random() < 0.5 else {"a": tree}
            return tree
        return rng.choice(VALUES)
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.15 and isinstance(copy, dict):
        copy[rng.choice(["x", "", "step", "kind", *copy])] = copy.pop(key)
    else:
        copy[key] = damage_tree(rng, copy[key])
    return copy


def to_json(tree: Any) -> str:
    """As json.dumps, for any depth."""
    if isinstance(tree, list):
        return "[" + ", ".join(map(to_json, tree)) + "]" if len(tree) != 1 else wrap_json(tree)
    if isinstance(tree, dict):
        if len(tree) == 1:
            return wrap_json(tree)
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(value)}" for key, value in tree.items()) + "}"
    return json.dumps(tree)


def wrap_json(tree: Any) -> str:
    begin, end = [], []
    while isinstance(tree, (list, dict)) and len(tree) == 1:
        if isinstance(tree, list):
            begin.append("[")
            end.append("]")
            tree = tree[0]
        else:
            ((key, tree),) = tree.items()
            begin.append("{" + json.dumps(key) + ": ")
            end.append("}")
    return "".join(begin) + to_json(tree) + "".join(reversed(end))


def damage_text(rng: random.Random, text: str, tokens: Sequence[str]) -> str:
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(text) + 1)
        places = [at for at, character in enumerate(text) if character in ":,[{\n"]
        if places and rng.random() < 0.6:
            place = rng.choice(places) + 1
        text = text[:place] + rng.choice(["", " "]) + rng.choice(tokens) + text[place + rng.choice([0, 0, 1, 9]) :]
    return text


def make_laughs(rng: random.Random) -> str:
    """A text whose aliases stand for up to 9^30 values, under a key that is used, or merged."""
    depth, last = rng.choice([2, 5, 30]), rng.choice(["x", "[]", "{b: 1}"])
    key = rng.choice(["x", "data", "train", "seed", "train: {decay_steps", "data: {train", "train: {validate_every"])
    pattern = rng.choice(["[{0}]", "{{a: {0}, b: {0}}}", "{{<<: [{0}]}}"])
    lines = [f"a0: &a0 {last}"]
    for level in range(1, depth):
        inner = f"*a{level - 1}" if "b:" in pattern else ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {pattern.format(inner)}")
    return "\n".join([*lines, f"{key}: *a{depth - 1}" + "}" * key.count("{")]) + "\n"


def make_yaml(folder: Path) -> Attempt:
    from hyperprior.config import Config, load_config, render
    from hyperprior.errors import ConfigError

    texts = [path.read_text() for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))]
    texts = ["\n".join(line for line in text.splitlines() if not line.startswith("#")) for text in texts]
    texts += [render(Config()), "seed: 3\ntrain: &a {steps: 2}\nmodel: {<<: {num_filters: 8}}\n"]
    tree, path = Config().to_dict(), folder / "c.yaml"

    def attempt(rng: random.Random) -> str:
        kind = rng.choice(["text", "text", "tree", "override", "laughs", "bytes"])
        overrides, text = [], rng.choice(texts)
        if kind == "text":
            text = damage_text(rng, text, YAML)
        elif kind == "tree":
            text = to_json(damage_tree(rng, tree)).replace("1e-", "1.0e-")
        elif kind == "override":
            overrides = [damage_text(rng, rng.choice(["seed=3", "train.steps=5", "data.train=[a]", "train={}"]), YAML)]
        elif kind == "laughs":
            text = make_laughs(rng)
        data = text.encode(errors="surrogatepass")
        path.write_bytes(damage(rng, data) if kind == "bytes" else data)
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 10_000, f"{len(str(error))} characters"
            return f"{kind:9} ConfigError"
        path.write_text(render(config), encoding="utf-8")
        assert load_config(path, []) == config
        return f"{kind:9} Config"

    return attempt


# Records of runs ------------------------------------------------------------------------------------------


def make_json(folder: Path) -> Attempt:
    from hyperprior.errors import ConfigError
    from hyperprior.evaluation import gate
    from hyperprior.training import progress, runs, sweep
    from hyperprior.watch.summaries import Summaries

    numbers = {"loss": 1.2, "bpp": 0.5, "distortion": 1e-3, "psnr_db": 30.1, "ms_ssim": 0.97}
    result = {**numbers, "split": "test", "images": 8, "step": 30, "lambda": 0.013, "trained_steps": 40}
    rows = [{"kind": kind, "step": step, **numbers} for step in (10, 20, 30) for kind in ("train", "val")]
    rows += [{"kind": "skipped", "step": 30, "sample": "a.tar: b", "reason": "corrupt"}]
    rows += [{"kind": "ended", "step": 40, "code": 75, "reason": "stopped"}]
    point = {"kind": "model", "point": "q3", "lambda": 0.013, "metric": "mse", "loss": 1.2}
    summary = {"format": 1, "images": [{"name": "a.png", "sha256": "00"}], "points": [point]}
    run = folder / "lambda-0.013"
    for each in (run, folder / "good"):
        each.mkdir()
        (each / "lock").touch()
        (each / "config.yaml").write_text("seed: 0\n")
    plan = sweep.Plan(folder / "c.yaml", [], folder)

    def damage_json(rng: random.Random, tree: Any) -> bytes:
        kind = rng.random()
        tree = tree if kind < 0.2 else damage_tree(rng, tree)
        data = to_json(tree).encode()
        return damage(rng, data) if kind < 0.2 or kind > 0.9 else data

    def attempt(rng: random.Random) -> str:
        lines = [to_json(row).encode() for row in rows]
        bad = rng.randrange(len(lines))
        damaged = damage_json(rng, rows[bad])
        lines[bad] = damaged
        (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + rng.choice([b"\n", b""]))
        written = damage_json(rng, result) if rng.random() < 0.7 else json.dumps(result).encode()
        (run / "results.json").write_bytes(written)
        (folder / "summary.json").write_bytes(damage_json(rng, summary))
        outcomes = []
        runs.make_table(runs.summarise_all([folder], print))
        runs.make_comparison_table(runs.compare(folder / "good", run))
        json.dumps(runs.compare(run, folder / "good"))
        read = runs.read_result(run)
        if read:
            progress.describe_result(read, run)
        outcomes.append("a result" if read else "no result")
        with contextlib.suppress(ConfigError):
            row = sweep.result_of(plan, 0.013)
            sweep.make_table([row])
            assert all(isinstance(target.scale(row[name]), float) for name, target in sweep.TARGETS.items())
        with contextlib.suppress(ConfigError):
            models = {"q3": {"metric": "mse", "lambda": 0.013, "effort": 0}}
            stored = gate.read_stored(folder / "summary.json", folder / "out", {"a.png": "00"}, models)
            gate.describe_verdict(gate.judge_point({"point": "q3", "loss": 1.0}, stored["q3"], 1.0))
        # A resume from step 20 keeps every good row up to then, wherever the damage is.
        warnings: list[str] = []
        with mock.patch("hyperprior.watch.summaries.EventFileWriter"):  # its threads take most of the time
            Summaries(run, 20, warnings.append).close()
        assert all("damaged lines that are left out" in warning for warning in warnings), warnings
        kept = (run / "metrics.jsonl").read_bytes().splitlines()
        for line, row in zip(lines, rows):
            if line is not damaged and b"\n" not in damaged:
                assert (line in kept) == (row["step"] <= 20)  # type: ignore[operator]
        return ", ".join(outcomes)

    return attempt


# Models and checkpoints -----------------------------------------------------------------------------------


def make_npz(folder: Path) -> Attempt:
    import numpy as np
    from conftest import photo

    from hyperprior import config, storage
    from hyperprior.codec import codec, making
    from hyperprior.errors import ConfigError, DataError
    from hyperprior.model import architecture
    from hyperprior.terminal import Terminal
    from hyperprior.training import checkpoint, info, resume

    original = (Path(__file__).parent / "codec" / "vectors" / "model.npz").read_bytes()
    with np.load(io.BytesIO(original)) as arrays:
        description = json.loads(arrays["state"].tobytes())
    settings = config.Config(model=config.Model(num_filters=2, latent_channels=2, hyper_channels=2, num_scales=3))
    weights = {f"model/{n}": np.ones(s, np.float32) for n, s in architecture.shapes_of_weights(settings.model).items()}
    run = resume.State([resume.Cursor()] * 4, 3, best=resume.Best(1.0, 2)).to_json()
    state = {"config": settings.to_dict(), "run": run, "data": "4 shards", "environment": {"threads": 2}}
    folder = folder / "run"
    checkpoint.save(checkpoint.path_of(folder / "checkpoints", 3), weights, {"step": 3, **state})
    checkpoint.save(checkpoint.best_path(folder / "checkpoints"), weights, {"step": 2})
    kept = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    picture = np.asarray(photo(1, 30, 20))

    def to_npy(rng: random.Random, data: bytes) -> bytes:
        """A member of another type, shape or version, or that is no array."""
        try:
            array = np.lib.format.read_array(io.BytesIO(data))
        except Exception:  # it was damaged before
            return damage(rng, data)
        kind = rng.randrange(10)
        file = io.BytesIO()
        if kind == 0:
            np.save(file, np.array([{"a": 1}, [2]], object), allow_pickle=True)
        elif kind == 1:
            kinds = ["f8", "f2", "i1", "i8", "u1", "c8", "U3", "S2", "M8[s]", "?", ">f4", "i4,f4", "V8"]
            with np.errstate(all="ignore"), contextlib.suppress(Exception):
                np.save(file, np.zeros(array.shape, rng.choice(kinds)))
        elif kind == 2:
            shape = rng.choice([(), (0,), (1,), (2, 3), (array.size + 1,), (10**12,), (-1,), (2**40, 2**40), (1,) * 40])
            header = {"descr": array.dtype.str, "fortran_order": rng.random() < 0.5, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array.tobytes())
        elif kind == 3:
            with np.errstate(all="ignore"), warnings_off():
                values = np.asarray(array, np.float64 if array.dtype.kind == "f" else np.int64)
                values = values * rng.choice([0, -1, 1e3, 1e30, 1e300, 2**20])
                values.flat[rng.randrange(max(values.size, 1)) % max(values.size, 1) :][:1] = rng.choice([0, -1, 2**31])
                np.save(file, values if rng.random() < 0.3 else values.astype(array.dtype))
        elif kind == 4:
            header = rng.choice(
                [b"{'descr': ", b"[" * 5000, b"{}", b"1", b"{'shape': (9,)}", b"\0", b"__import__('os')"]
            )
            file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
        elif kind == 5:
            return rng.choice([b"", b"x", b"\x93NUMPY", b"\x80\4K\1.", b"\x93NUMPY\3\0\xff\xff\xff\x7f"])
        else:
            return damage(rng, data)
        return file.getvalue()

    def damage_npz(rng: random.Random, data: bytes, tree: Any, compressions: Sequence[int]) -> bytes:
        if rng.random() < 0.3:
            return damage(rng, data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(len(members))
            name, content = members[at]
            kind = rng.choice(["array", "array", "state", "state", "state", "remove", "repeat", "rename"])
            if kind == "array":
                members[at] = name, to_npy(rng, content)
            elif kind == "state":
                changed = damage_tree(rng, tree)
                at = [name for name, _ in members].index("state.npy") if "state.npy" in dict(members) else 0
                file = io.BytesIO()
                text = to_json(changed).encode() if rng.random() < 0.9 else damage(rng, to_json(tree).encode())
                np.save(file, np.frombuffer(text, np.uint8))
                members[at] = members[at][0], file.getvalue()
            elif kind == "remove" and len(members) > 1:
                del members[at]
            elif kind == "repeat":
                members.append((rng.choice([name, "extra.npy", name.removesuffix(".npy")]), content))
            else:
                members[at] = rng.choice([name.removesuffix(".npy"), "../x.npy", "x" * 300 + ".npy", "state"]), content
        if rng.random() < 0.7:  # the state lists the arrays that are there, and has their fingerprint
            members = seal(members)
        file = io.BytesIO()
        with warnings_off(), zipfile.ZipFile(file, "w", rng.choice(compressions)) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return file.getvalue()

    def seal(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        file = io.BytesIO()
        with warnings_off(), zipfile.ZipFile(file, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        try:
            with np.load(io.BytesIO(file.getvalue())) as archive:
                arrays = {name: archive[name] for name in archive.files if name != "state"}
                tree = json.loads(archive["state"].tobytes())
                tree["arrays"] = [name for name in archive.files if name != "state"]
            with contextlib.suppress(Exception):  # some member is no array
                tree["fingerprint"] = storage.fingerprint(arrays)
            text = io.BytesIO()
            np.save(text, np.frombuffer(json.dumps(tree).encode(), np.uint8))
            return [(name, text.getvalue() if name in ("state.npy", "state") else each) for name, each in members]
        except Exception:
            return members

    def try_model(rng: random.Random) -> str:
        path = folder / "x.npz"
        path.write_bytes(damage_npz(rng, original, description, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        with contextlib.suppress(DataError, ConfigError):
            json.dumps(list(info.lines(info.info(path, None))))
        try:
            model = codec.load(path, "numpy")
        except (DataError, ConfigError) as error:
            assert "\n" not in str(error) and len(str(error)) < 10_000
            return f"model      {type(error).__name__}"
        with contextlib.suppress(DataError):
            assert model.decompress(model.compress(picture)).shape == picture.shape
            model.trained_weights()
            return "model      works"
        return "model      works, DataError"

    def try_checkpoint(rng: random.Random) -> str:
        for path, content in kept.items():
            path.write_bytes(content)
        path = rng.choice(list(kept))
        path.write_bytes(
            damage_npz(
                rng, kept[path], {"format": 1, "step": 2, **state, "arrays": list(weights)}, [zipfile.ZIP_STORED]
            )
        )
        warnings: list[str] = []
        outcome = "checkpoint works"
        for use in (
            lambda: export(warnings.append),
            lambda: resume_from(checkpoint.load_newest(folder / "checkpoints", warnings.append)),
            lambda: json.dumps(list(info.lines(info.info(folder, None)))),
        ):
            try:
                use()
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 10_000
                outcome = "checkpoint ConfigError"
        return outcome + (", warned" if warnings else "")

    def export(warn: Callable[[str], None]) -> None:
        trained = checkpoint.best_weights(folder, warn)
        storage.check_arrays(architecture.shapes_of_weights(trained.settings.model), trained.arrays, "x")
        arrays = making.make_arrays(trained)
        codec.Codec(arrays, trained.settings, {}, "x", "numpy")

    def resume_from(newest: Any) -> None:
        arrays, saved = newest
        checkpoint.check_state(folder, saved)
        resume.compare_config(folder, config.validate(saved["config"], "x"), settings, Terminal(quiet=True))
        saved["environment"].get("threads")
        state = resume.state_of(folder, saved)
        resume.describe_lost_best(folder / "checkpoints", state.best)
        state.best.update(1.0, state.step + 1)
        assert state.to_json()
        storage.check_arrays({n: a.shape for n, a in weights.items()}, arrays, "x")

    def attempt(rng: random.Random) -> str:
        with np.errstate(all="ignore"):
            return try_model(rng) if rng.random() < 0.6 else try_checkpoint(rng)

    return attempt


@contextlib.contextmanager
def warnings_off() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


KINDS: dict[str, Callable[..., Attempt]] = {
    "hyp": make_hyp,
    "tar": make_tar,
    "jpeg": make_jpeg,
    "yaml": make_yaml,
    "json": make_json,
    "npz": make_npz,
}


def main() -> None:
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    options = {"model": None, "image": None, "engine": ("numpy", "tensorflow", "auto")}
    for name, choices in options.items():
        parser.add_argument(f"--{name}", choices=choices, help="only for hyp")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as folder:
        print(fuzz(arguments.kind, arguments.count, Path(folder), arguments.first, **given))


if __name__ == "__main__":
    main()
