"""Every kind of image file becomes 8-bit RGB. A defective file raises an error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, photo
from PIL import Image

from hyperprior import images
from hyperprior.data.patches import Place, crop_centre, cut_patches
from hyperprior.images import TooSmall, Unusable, decode, read_jpeg_size


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    assert np.array_equal(decode(encoded(photo(1), kind)), pixels(photo(1)))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_as_pillow_does(mode: str, options: dict[str, object]) -> None:
    data = encoded(photo(2).convert(mode), "JPEG", **options)
    expected = pixels(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data), expected)
    # The fused crop may interpolate chroma differently in the outermost columns of the window.
    patch = cut_patches(data, 64, [Place(5, 7)])[0]
    assert np.abs(patch[:, 2:-2].astype(int) - expected[5:69, 9:69].astype(int)).max() <= 1


def test_grayscale_palette_and_one_bit_become_rgb() -> None:
    gray = photo(3).convert("L")
    for image in (gray, photo(3).convert("P"), gray.convert("1"), photo(3).convert("CMYK")):
        kind = "TIFF" if image.mode == "CMYK" else "PNG"
        assert np.array_equal(decode(encoded(image, kind)), pixels(image)), image.mode


def test_sixteen_bits_are_scaled_to_eight() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        decoded = decode(encoded(Image.fromarray(ramp), kind))
        assert np.array_equal(decoded[..., 0], np.floor(ramp / 65535 * 255 + 0.5).astype(np.uint8)), kind
        assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_gray_levels_beyond_sixteen_bits_are_refused() -> None:
    for level in (65536, -1):
        with pytest.raises(images.Unusable, match="at most 16 bits can be scaled"):
            images.decode_photo(encoded(Image.fromarray(np.full((8, 8), level, np.int32)), "TIFF"))


def test_transparency_is_flattened_onto_white() -> None:
    image = photo(4).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    decoded = decode(encoded(image, "PNG"))
    assert (decoded[0] > 250).all()  # the top row is fully transparent
    assert np.abs(decoded[-1].astype(int) - pixels(photo(4))[-1].astype(int)).max() <= 1
    palette = photo(4).convert("P")
    data = encoded(palette, "PNG", transparency=int(np.asarray(palette)[0, 0]))
    assert (decode(data)[0, 0] == 255).all()


def test_a_patch_is_a_part_of_the_image_and_places_wrap() -> None:
    data = encoded(photo(5), "PNG")
    whole = pixels(photo(5))
    patches = cut_patches(data, 64, [Place(0, 0), Place(16, 32), Place(17, 33), Place(10**9, 10**9)])
    assert patches.shape == (4, 64, 64, 3)
    assert np.array_equal(patches[1], whole[16:, 32:])
    assert np.array_equal(patches[2], whole[:64, :64])  # the 17 x 33 positions wrap


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_patch_may_be_scaled_down_and_mirrored(kind: str) -> None:
    image = photo(5, 200, 160)
    data = encoded(image, kind)
    whole = decode(data)
    for count in (1, 2):  # a single patch of a JPEG is decoded without the rest
        half = cut_patches(data, 64, [Place(7, 9, 0.5)] * count)[-1]
        expected = Image.fromarray(whole[7:135, 9:137]).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.abs(half.astype(int) - pixels(expected)).max() <= 2
        mirrored = cut_patches(data, 64, [Place(7, 9, 0.5, flip=True)] * count)[-1]
        assert np.array_equal(mirrored, half[:, ::-1])
        least = cut_patches(data, 64, [Place(7, 9, 0.1)] * count)[-1]  # the window is not larger than the height
        assert least.shape == (64, 64, 3)
        expected = Image.fromarray(whole[:, 9 : 9 + 160]).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.abs(least.astype(int) - pixels(expected)).max() <= 2


def test_the_centre_crop_is_in_the_middle() -> None:
    assert np.array_equal(crop_centre(encoded(photo(6), "PNG"), 64), pixels(photo(6))[8:72, 16:80])


def test_small_images_are_refused_or_enlarged() -> None:
    for kind in ("PNG", "JPEG"):
        data = encoded(photo(7, 50, 90), kind)
        with pytest.raises(TooSmall, match="50x90 is smaller than 64x64"):
            cut_patches(data, 64, [Place(0, 0)])
        assert cut_patches(data, 64, [Place(3, 3)], upscale=True).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_a_truncated_file_is_unusable_wherever_the_patch_lies(kind: str, places: int, share: float) -> None:
    data = encoded(photo(8, 300, 300), kind)
    with pytest.raises(Unusable):
        cut_patches(data[: int(len(data) * share)], 64, [Place(0, 0)] * places)


def test_a_jpeg_with_bytes_after_its_end_is_good() -> None:
    data = encoded(photo(9))
    for tail in (b"\0" * 100, b"camera maker's notes"):
        assert np.array_equal(cut_patches(data + tail, 64, [Place(1, 1)]), cut_patches(data, 64, [Place(1, 1)]))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\0" * 50, b"\xff" * 99]
)
def test_bytes_that_are_no_image_are_unusable(data: bytes) -> None:
    with pytest.raises(Unusable):
        decode(data)


def test_very_large_dimensions_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = bytearray(encoded(photo(1)))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"  # the maximum of libjpeg
    with pytest.raises(Unusable, match="65500x65500"):
        read_jpeg_size(bytes(jpeg))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(Unusable, match="96x80 pixels"):
        decode(encoded(photo(1), "PNG"))


def test_real_photographs_decode_as_pillow_does(samples: Path) -> None:
    from hyperprior.data.shards import open_sources

    (shard,) = open_sources([str(samples / "imagenet_val_sample.tar")], "x")
    for sample in list(shard.samples())[:20]:
        data = sample.read()
        assert np.array_equal(decode(data), pixels(Image.open(io.BytesIO(data)))), sample.key


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(values: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """Encodes [H, W, C] uint8 or uint16 as a PNG of this colour type."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * (3 << 20))),
        chunk(b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
        chunk(b"tEXt", b"Comment\0" + b"y" * (3 << 20)) * 30,
        chunk(b"iCCP", b"p\0\0" + zlib.compress(b"z" * (2 << 20))),
        chunk(b"iCCP", b"p\0\0 not compressed"),
        chunk(b"tIME", b"1234567", 0),
        chunk(b"gAMA", b"1234", 0),
        chunk(b"eXIf", b"MM", 0),
        chunk(b"pHYs", b""),
        chunk(b"cHRM", b"short"),
    ],
)
def test_a_fault_in_what_does_not_change_the_pixels_costs_no_pixels(extra: bytes) -> None:
    data = png(pixels(photo(3)), 2, extra)
    assert np.array_equal(decode(data), pixels(photo(3)))
    image, notes = images.decode_photo(data)
    assert np.array_equal(image, pixels(photo(3)))
    assert notes == (["its colour profile is dropped"] if b"iCCP" in extra else [])


def test_a_fault_in_the_pixels_of_a_png_is_an_error() -> None:
    data = bytearray(png(pixels(photo(3)), 2))
    data[data.index(b"IDAT") + 8] ^= 1
    with pytest.raises(Unusable, match="corrupt"):
        decode(bytes(data))


def tiff16(values: np.ndarray) -> bytes:
    """Encodes [H, W, 3] uint16 as a TIFF."""
    height, width = values.shape[:2]
    short = {256: width, 257: height, 259: 1, 262: 2, 277: 3, 278: height, 284: 1}
    rows = [(tag, 3, 1, value) for tag, value in short.items()]
    rows += [(258, 3, 3, 8), (273, 4, 1, 14), (279, 4, 1, values.nbytes)]
    table = b"".join(struct.pack("<HHII", *row) for row in sorted(rows))
    end = struct.pack("<H", len(rows)) + table + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<IHHH", 14 + values.nbytes, 16, 16, 16) + values.astype("<u2").tobytes() + end


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "gray and alpha", "gray", "TIFF", "PPM"])
def test_a_reduced_depth_is_noted(kind: str) -> None:
    colours = pixels(photo(3)).astype(np.uint16) * 257
    opaque = np.full((*colours.shape[:2], 1), 65535, np.uint16)
    gray = colours[..., :1]
    data = {
        "RGB": png(colours, 2),
        "RGBA": png(np.concatenate([colours, opaque], -1), 6),
        "gray and alpha": png(np.concatenate([gray, opaque], -1), 4),
        "gray": png(gray, 0),
        "TIFF": tiff16(colours),
        "PPM": b"P6 # 16 bits\n96 80\n65535\n" + colours.astype(">u2").tobytes(),
    }[kind]
    image, notes = images.decode_photo(data)
    expected = np.repeat(gray // 257, 3, -1) if "gray" in kind else pixels(photo(3))
    assert np.abs(image.astype(int) - expected).max() <= 1 and "16 bits are reduced to 8" in notes
    assert not any(
        "bits" in note for note in images.decode_photo(encoded(photo(3), "PPM" if kind == "PPM" else "PNG"))[1]
    )


@pytest.mark.parametrize("alpha", [0, 128])
def test_an_alpha_channel_of_a_bmp_that_nobody_wrote_is_ignored(alpha: int) -> None:
    rgb = pixels(photo(4))
    height, width = rgb.shape[:2]
    body = np.dstack([rgb[::-1, :, ::-1], np.full(rgb.shape[:2], alpha, np.uint8)]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(body), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"\0" * 52
    size = 14 + len(header)
    data = b"BM" + struct.pack("<IHHI", size + len(body), 0, 0, size) + header + body
    flattened = pixels(Image.fromarray(rgb)) if alpha == 0 else None
    image, notes = images.decode_photo(data)
    assert np.array_equal(decode(data), image)
    assert bool(notes) == bool(alpha) and (flattened is None or np.array_equal(image, flattened))


@pytest.mark.parametrize("junk", [b"\0", b"abc", b"\xff", b"\xff\xff\xff", b"\0\xff\0", b"\x01" * 50])
def test_stray_bytes_between_segments_of_a_jpeg_are_read_over_as_decoders_do(junk: bytes) -> None:
    data = encoded(photo(1))
    starts = [2]
    while data[starts[-1] + 1] != 0xDA:
        starts.append(starts[-1] + 2 + int.from_bytes(data[starts[-1] + 2 : starts[-1] + 4], "big"))
    whole = decode(data)
    for start in starts[1:]:  # behind the first two bytes all decoders want a marker
        damaged = data[:start] + junk + data[start:]
        assert np.array_equal(decode(damaged), whole)
        assert np.array_equal(images.decode_photo(damaged)[0], whole)
        assert np.array_equal(cut_patches(damaged, 64, [Place(5, 7)]), cut_patches(data, 64, [Place(5, 7)]))


@pytest.mark.parametrize(
    "segment", [b"\xe2ICC_PROFILE\0", b"\xe2ICC_PROFILE\0\1", b"\xe0JFIF", b"\xeeAdobe", b"\xe1", b"\xedPhotoshop 3.0"]
)
def test_an_application_segment_that_is_too_short_is_ignored_as_decoders_do(segment: bytes) -> None:
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = 6
    for mode in ("RGB", "CMYK"):
        data = encoded(photo(1).convert(mode), exif=exif)
        short = segment[:1] + struct.pack(">H", 1 + len(segment)) + segment[1:]
        damaged = data[:2] + b"\xff" + short + data[2:]
        assert np.array_equal(decode(damaged), decode(data))
        assert np.array_equal(images.decode_photo(damaged)[0], images.decode_photo(data)[0])
