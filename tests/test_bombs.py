"""Small files that claim to be huge are refused before memory grows: by training, `inspect`, `compress` and `load`."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import encoded, photo
from fuzz import peak_memory

from hyperprior import image_files, images
from hyperprior.data import tars
from hyperprior.errors import DataError

MOST_GROWTH = 128  # MiB; the smallest bomb would take 280


def run_in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own, which was forked after the imports."""
    with forked.SERVER.Pool(1) as pool:
        return pool.apply(function, arguments)


# Images ---------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", deflated(3 * 10**8)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(1)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    head = b"VP8X" + struct.pack("<II", 10, 2) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + head + encoded(photo(1), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(width: int, height: int, tile_width: int, tile_height: int, pixels: bytes) -> bytes:
    """A TIFF of one deflated tile."""
    depth_at = 8 + len(pixels)
    tags = {256: width, 257: height, 259: 8, 262: 2, 277: 3, 284: 1, 322: tile_width, 323: tile_height}
    rows = [(tag, 4, 1, value) for tag, value in {**tags, 324: 8, 325: len(pixels)}.items()] + [(258, 3, 3, depth_at)]
    table = b"".join(struct.pack("<HHII", *row) for row in sorted(rows))
    head = b"II*\0" + struct.pack("<I", depth_at + 6) + pixels + struct.pack("<HHH", 8, 8, 8)
    return head + struct.pack("<H", len(rows)) + table + bytes(4)


def gif(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x4c\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b"\x3b"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def deflated(count: int) -> bytes:
    """Zeros, a thousandth of their size."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(count >> 20)) + packer.flush()


def try_images(folder: Path) -> dict[str, tuple[dict[str, str], float]]:
    """By file: the error of each reader, and the growth of memory in MiB."""
    from hyperprior.codec import files
    from hyperprior.data.inspect import inspect
    from hyperprior.data.patches import Place, cut_patches
    from hyperprior.data.shards import open_sources
    from hyperprior.terminal import Terminal

    quiet = Terminal(quiet=True)

    def compress(path: Path) -> None:
        files.compress([str(path)], "q1", str(folder / "x.hyp"), 0, "replace", False, quiet, "numpy")

    def look(path: Path) -> None:
        report = inspect([str(path)], 64, False, quiet)
        for _, reason in report.unusable:
            raise DataError(reason)

    def train(path: Path, count: int) -> None:
        (shard,) = open_sources([str(path)], "x")
        cut_patches(next(shard.samples()).read(), 64, [Place(0, 0)] * count)

    readers = {
        "compress": compress,
        "inspect": look,
        "train": lambda path: train(path, 1),
        "train, two patches": lambda path: train(path, 2),
        "validate": lambda path: images.decode(path.read_bytes()),
    }
    results = {}
    for path in (folder / "good.jpg", *sorted(folder.glob("bomb*"))):
        errors, before = {}, peak_memory()
        for name, read in readers.items():
            is_training = image_files.is_training_image(path.name)
            if path.stat().st_size > 2**30 and name == "validate":  # reads a sample, whose size was checked
                continue
            try:
                if is_training or name == "compress":
                    read(path)
                    errors[name] = ""
            except (DataError, images.Unusable) as error:
                errors[name] = str(error)
        results[path.name] = errors, peak_memory() - before
    return results


def test_images_that_claim_to_be_huge_are_refused_before_memory_grows(tmp_path: Path) -> None:
    bombs = {
        "bomb.png": png(65500, 65500),
        "bomb.jpg": jpeg(65500, 65500),
        "bomb.webp": webp(16384, 16384),
        "bomb-canvas.webp": webp(2**24, 255),
        "bomb.tif": tiff(10**5, 10**5, 256, 256, b""),
        "bomb-tile.tif": tiff(64, 64, 14_000, 14_000, deflated(3 * 14_000**2)),
        "bomb.gif": gif(65535, 65535),
        "bomb.bmp": bmp(60_000, 60_000),
        "bomb.ppm": b"P6\n99999 99999\n255\n" + bytes(100),
        "bomb.jpeg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n",
    }
    for name, data in {"good.jpg": encoded(photo(1)), **bombs}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("bomb-hole.jpg", "bomb-hole.png", "bomb-hole.tiff"):
        with (tmp_path / name).open("wb") as file:
            file.write(encoded(photo(1), {"jpg": "JPEG", "png": "PNG"}.get(name[10:], "TIFF")))
            file.truncate(2**32)
    results = run_in_child(try_images, tmp_path)
    errors, _ = results.pop("good.jpg")
    assert set(errors.values()) == {""} and len(errors) == 5
    assert len(results) == len(bombs) + 3
    for name, (errors, growth) in results.items():
        assert errors and all(errors.values()), f"{name} is read: {errors}"
        assert growth < MOST_GROWTH, f"{name}: {growth:.0f} MiB"


def try_pixels(data: bytes) -> tuple[bool, float]:
    before = peak_memory()
    image = images.decode(data)
    return image.shape == (64, 64, 3), peak_memory() - before


def test_what_follows_the_pixels_of_a_png_is_not_inflated() -> None:
    is_whole, growth = run_in_child(try_pixels, png(64, 64))  # many zeros follow
    assert is_whole and growth < MOST_GROWTH


# Tars -----------------------------------------------------------------------------------------------------


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def try_tars(folder: Path) -> dict[str, tuple[list[str], float]]:
    results = {}
    for path in sorted(folder.glob("*.tar")):
        errors, before = [], peak_memory()
        readers: list[Callable[[], Any]] = [
            lambda path=path: tars.find_first_image_or_tar(str(path), path.stat().st_size),
            lambda path=path: tars.list_members(str(path), 0, path.stat().st_size, path.name),
        ]
        if path.stat().st_size < 2**30:
            readers.append(lambda path=path: list(tars.stream_images(str(path), path.name)))
        for read in readers:
            try:
                read()
            except DataError as error:
                errors.append(str(error))
        results[path.name] = errors, peak_memory() - before
    return results


def test_headers_of_tars_that_claim_to_be_huge_are_refused_before_memory_grows(tmp_path: Path) -> None:
    good = header("a.jpg", b"0", 0)
    rest = 600 * b"\0" + bytes(10_240)
    kinds = {"member": b"0", "long": b"L", "link": b"K", "pax": b"x", "global": b"g", "sparse": b"S"}
    for name, kind in kinds.items():
        (tmp_path / f"{name}.tar").write_bytes(good + header("b.jpg", kind, 2**60) + rest)
        (tmp_path / f"{name}-first.tar").write_bytes(header("b.jpg", kind, 2**60) + rest)
        with (tmp_path / f"{name}-hole.tar").open("wb") as file:  # a file that has these bytes
            file.write(good + header("b.jpg", kind, 2**32))
            file.truncate(2**32 + 2048)
    (tmp_path / "back.tar").write_bytes(good + header("b.jpg", b"0", -1024) + rest)
    (tmp_path / "chain.tar").write_bytes(header("b", b"L", 512) * 3000 + rest)
    records = b"".join(b"%d %05d=\n" % (len(b"99 00000=\n"), number) for number in range(10_000))
    attributes = header("g", b"g", len(records)) + records + bytes(-len(records) % 512)
    (tmp_path / "many.tar").write_bytes(attributes + good * 1000 + bytes(1024))
    results = run_in_child(try_tars, tmp_path)
    assert results.pop("many.tar")[1] < MOST_GROWTH  # each header has a copy of the global one
    assert results.pop("member-hole.tar") == ([], 0)
    for name, (errors, growth) in results.items():
        assert len(errors) >= 1, f"{name} is read"
        assert growth < MOST_GROWTH, f"{name}: {growth:.0f} MiB"


def test_a_huge_member_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a file of 4,294,967,296 bytes; at most 1,431,655,760"):
        tars_sample(tmp_path).read()


def tars_sample(folder: Path) -> Any:
    from hyperprior.data.shards import open_sources

    path = folder / "t.tar"
    with path.open("wb") as file:
        file.write(header("a.jpg", b"0", 2**32))
        file.truncate(2**32 + 2048)
    (shard,) = open_sources([str(path)], "x")
    return next(shard.samples())


# Models ---------------------------------------------------------------------------------------------------


def models() -> Iterator[tuple[str, bytes]]:
    """Models with a member that is, or claims to be, huge."""
    original = Path(__file__).parent / "codec" / "vectors" / "model.npz"
    with zipfile.ZipFile(original) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    array = b"\x93NUMPY\1\0" + struct.pack("<H", 118) + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
    inflating, claiming = array % (15 * 10**7), array % 2**40
    for kind, name, content in (
        ("inflates", "state.npy", inflating.ljust(128) + bytes(6 * 10**8)),
        ("claims", "state.npy", claiming.ljust(128)),
        ("claims", "extra.npy", claiming.ljust(128)),
    ):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for other, data in {**members, name: content}.items():
                archive.writestr(other, data)
        yield f"{kind} {name}", file.getvalue()
    data = bytearray(original.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = b"\xfe\xff\xff\xff"  # the size of the first member, in the directory
    yield "directory", bytes(data)


def try_models(folder: Path) -> dict[str, tuple[list[str], float]]:
    from hyperprior.codec import box, codec
    from hyperprior.training import checkpoint

    results = {}
    for path in sorted(folder.glob("*.npz")):
        errors: list[str] = []
        before = peak_memory()
        os.link(path, checkpoint.path_of(folder / "checkpoints", 1))
        for read in (
            lambda path=path: codec.load(path, "numpy"),
            lambda errors=errors: checkpoint.load_newest(folder / "checkpoints", errors.append),
            lambda path=path: box.read_description(path),
        ):
            try:
                read()
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        checkpoint.path_of(folder / "checkpoints", 1).unlink()
        results[path.stem] = errors, peak_memory() - before
    return results


def test_models_and_checkpoints_that_claim_to_be_huge_are_refused_before_memory_grows(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name, data in models():
        (tmp_path / f"{name}.npz").write_bytes(data)
    with (tmp_path / "hole.npz").open("wb") as file:
        file.truncate(2**33)
        file.seek(0, os.SEEK_END)
        file.write((Path(__file__).parent / "codec" / "vectors" / "model.npz").read_bytes())
    results = run_in_child(try_models, tmp_path)
    assert len(results) == 5
    for name, (errors, growth) in results.items():
        assert all(error.startswith(("DataError", "ConfigError", str(tmp_path))) for error in errors), errors
        assert len(errors) >= (2 if "state" not in name else 4), f"{name} is read: {errors}"
        assert growth < MOST_GROWTH, f"{name}: {growth:.0f} MiB"
