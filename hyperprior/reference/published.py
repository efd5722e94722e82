"""Published rate-distortion points on Kodak: of the paper, of other learned codecs, and of classical codecs."""

from __future__ import annotations

import csv
import importlib.resources
import io
import math
from pathlib import Path
from typing import NamedTuple, Optional

from hyperprior.errors import ConfigError

KODAK = {f"kodim{number:02d}.png" for number in range(1, 25)}
METRIC_TITLES = {"mse": "MSE", "ms-ssim": "MS-SSIM"}  # metrics that models are optimised for
PAPER = "Balle et al. 2018 (paper)"


class PublishedPoint(NamedTuple):
    """A mean over images. `codec`: its name and the metric it was optimised for; `point`: its lambda or setting."""

    codec: str
    point: str
    bpp: float
    psnr_db: Optional[float]
    ms_ssim: Optional[float]
    source: str


def read_points(path: Optional[Path] = None) -> list[PublishedPoint]:
    """The points of a CSV file, or those that ship with the package. Raises ConfigError."""
    points: list[PublishedPoint] = []
    try:
        source = path or importlib.resources.files("hyperprior.reference") / "kodak_rd.csv"
        for row in csv.DictReader(io.StringIO(source.read_text("utf-8"))):
            metric = METRIC_TITLES.get(row.get("optimized_for") or "")
            points.append(
                PublishedPoint(
                    codec=row["codec"] + (f", {metric}" if metric else ""),
                    point=row.get("lambda") or "",
                    bpp=read_number(row["bpp"]),
                    psnr_db=read_number(row["psnr_db"]) if row["psnr_db"] else None,
                    ms_ssim=read_number(row["ms_ssim"], below=1.0) if row["ms_ssim"] else None,
                    source=row.get("source") or "",
                )
            )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--published {path} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"--published {path}, point {len(points) + 1}: {error!r}; the columns are codec, optimized_for, lambda, "
            "bpp, psnr_db, ms_ssim and source"
        ) from error
    return points


def read_number(text: str, below: float = math.inf) -> float:
    value = float(text)
    if not 0.0 < value < below:
        raise ValueError(f"{text} is not between 0 and {below:g}")
    return value


def paper_curve() -> list[tuple[float, float]]:
    """(bpp, PSNR in dB) of the paper's models for MSE, in order of rising rate."""
    own = [p for p in read_points() if p.codec == f"{PAPER}, {METRIC_TITLES['mse']}"]
    return sorted((p.bpp, p.psnr_db) for p in own if p.psnr_db is not None)
