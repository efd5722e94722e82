"""Baseline codecs: the codecs of Pillow's wheels as rows of a table, and a cache of their results.

A baseline's result on an image does not change. So it is kept in a file of JSON lines. Its key contains everything that
it depends on: the versions of Pillow and of the codec, the settings, the quality and the pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import PIL
from PIL import Image, features

from hyperprior.errors import ConfigError, DataError

log = logging.getLogger(__name__)

CACHE_FORMAT = 1  # raise it when a measurement changes its meaning


@dataclass(frozen=True)
class Baseline:
    """A codec with fixed settings. `sweep`: the values of its one `parameter`, from few bits to many."""

    name: str
    label: str
    format: str  # Pillow's name
    library: str  # Pillow's feature, or a plugin's module
    sweep: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    parameter: str = "quality"

    def version(self) -> Optional[str]:
        """The version of the codec in use; None if the codec is missing."""
        if self.library in PLUGINS:
            try:
                importlib.import_module(self.library)
            except ImportError:
                return None
            return importlib.metadata.version(PLUGINS[self.library])
        with warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")  # an older Pillow warns about a codec that it does not know
            return features.version(self.library) if features.check(self.library) else None
        return None

    def encode(self, pixels: np.ndarray, value: float) -> bytes:
        """A whole file of [H, W, 3] uint8 pixels at one value of the parameter. Raises DataError."""
        # OpenJPEG takes a compression ratio relative to 24 bits a pixel, the other codecs take a quality.
        setting = {"quality_layers": [24.0 / value]} if self.parameter == "bpp" else {"quality": int(value)}
        file = io.BytesIO()
        try:
            Image.fromarray(pixels).save(file, self.format, **self.options, **setting)
        except Exception as error:  # such as WebP's limit of 16,383 pixels a side
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(f"{self.label} cannot hold an image of {size}: {error}; see --baselines") from error
        return file.getvalue()

    def settings(self) -> dict[str, Any]:
        """Everything that decides a result, except the parameter and the pixels."""
        return {
            "format": self.format,
            "options": dict(self.options),
            "pillow": PIL.__version__,
            "codec": self.version(),
        }


PLUGINS = {"pillow_jxl": "pillow-jxl-plugin"}

# The sweeps give about 0.1 to 2.5 bits a pixel on photographs. Published curves use JPEG with the standard's Huffman
# tables and WebP at its default effort. Optimized tables save a third of a small JPEG, and WebP's method 6 saves 2%.
# By default libaom tunes AVIF for the eye, but a model trained for MSE is measured in PSNR. So there is also an AVIF
# tuned for PSNR, without chroma subsampling and with more effort: the strongest baseline in PSNR.
JPEG_SWEEP = (5, 10, 15, 20, 30, 40, 55, 70, 80, 90)
BASELINES = {
    row.name: row
    for row in (
        Baseline("jpeg", "JPEG 4:2:0", "JPEG", "jpg", JPEG_SWEEP, {"subsampling": "4:2:0"}),
        Baseline(
            "jpeg-opt", "JPEG 4:2:0 optimized", "JPEG", "jpg", JPEG_SWEEP, {"subsampling": "4:2:0", "optimize": True}
        ),
        Baseline(
            "jpeg-444", "JPEG 4:4:4 optimized", "JPEG", "jpg", JPEG_SWEEP, {"subsampling": "4:4:4", "optimize": True}
        ),
        Baseline("webp", "WebP", "WEBP", "webp", (0, 5, 15, 30, 45, 60, 75, 84, 90, 95), {"method": 4}),
        Baseline("avif", "AVIF", "AVIF", "avif", (5, 15, 25, 35, 45, 55, 65, 75, 83, 90), {"speed": 6}),
        Baseline(
            "avif-psnr",
            "AVIF 4:4:4 for PSNR",
            "AVIF",
            "avif",
            (5, 15, 27, 40, 52, 64, 74, 82),
            {"speed": 4, "subsampling": "4:4:4", "advanced": {"tune": "psnr"}},
        ),
        Baseline(
            "jpeg-2000",
            "JPEG 2000",
            "JPEG2000",
            "jpg_2000",
            (0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.9, 1.25, 1.75, 2.5),
            {"quality_mode": "rates", "irreversible": True, "mct": 1},
            parameter="bpp",
        ),
        Baseline("jpeg-xl", "JPEG XL", "JXL", "pillow_jxl", (5, 15, 30, 45, 60, 72, 80, 87, 92, 95), {"effort": 7}),
    )
}


def choose(names: str, say: Callable[[str], None]) -> list[Baseline]:
    """The baselines that `names` asks for: `all` that this Pillow has, `none`, or a list with commas.

    Raises ConfigError if a name is unknown, or if a named baseline is missing. `say` gets a message if `all` leaves out
    missing ones.
    """
    if names == "none":
        return []
    wanted = list(BASELINES) if names == "all" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in BASELINES:
            raise ConfigError(f"--baselines names `{name}`; there are {', '.join(BASELINES)}, `all` and `none`")
    missing = [name for name in wanted if BASELINES[name].version() is None]
    if missing:
        needs = {"JXL": "JPEG XL needs `pip install pillow-jxl-plugin`", "AVIF": "AVIF needs Pillow 11.3 or later"}
        formats = dict.fromkeys(BASELINES[name].format for name in missing)
        remedy = ", ".join(needs.get(each, f"{each} needs another build of Pillow") for each in formats)
        if names != "all":
            raise ConfigError(f"--baselines names {', '.join(missing)}, which this Pillow does not have: {remedy}")
        say(f"without {', '.join(missing)}, which this Pillow does not have: {remedy}")
    return [BASELINES[name] for name in wanted if name not in missing]


def decode(data: bytes) -> np.ndarray:
    """The pixels of a baseline's file: [H, W, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def fit(baseline: Baseline, pixels: np.ndarray, num_bytes: int) -> Optional[tuple[bytes, int]]:
    """(file, quality): the highest integer quality whose file has at most `num_bytes`, or None if none has."""
    low, high, best = 1, 100 if baseline.format != "JPEG" else 95, None
    while low <= high:  # size grows with quality, apart from a few bytes
        middle = (low + high) // 2
        data = baseline.encode(pixels, middle)
        if len(data) <= num_bytes:
            low, best = middle + 1, (data, middle)
        else:
            high = middle - 1
    return best


class Cache:
    """Measurements by key, in a file of JSON lines that only grows.

    Each line is written by one call, so processes may share the file. An incomplete line is skipped, and its content
    is measured again.
    """

    def __init__(self, folder: Path):
        self.path = folder / "baselines.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        self.has_failed = False
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a directory; choose another --cache")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.rows[entry["key"]] = dict(entry["row"])

    @staticmethod
    def make_key(baseline: Baseline, value: float, pixels_sha256: str) -> str:
        parts = [CACHE_FORMAT, baseline.settings(), baseline.parameter, value, pixels_sha256]
        return json.dumps(parts, sort_keys=True)

    def get_or_measure(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of `key`, which is measured and stored if it is missing. Without a place to store it, warns once."""
        if key not in self.rows:
            self.rows[key] = measure()
            line = json.dumps({"key": key, "row": self.rows[key]}) + "\n"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    size = os.fstat(file).st_size
                    is_last_line_cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
                    os.write(file, (b"\n" if is_last_line_cut else b"") + line.encode())
                finally:
                    os.close(file)
            except OSError as error:
                if not self.has_failed:
                    log.warning("%s: %s; baselines are measured again next time", self.path, error.strerror)
                self.has_failed = True
        return self.rows[key]


def default_cache() -> Path:
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperprior"
    return Path(os.devnull)  # nobody has a home: nothing can be kept
