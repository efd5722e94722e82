"""Damaged tars, JPEGs, configs, records of runs, models and checkpoints are read rightly, or are a typed error."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import fuzz

# By kind: mutants of the default suite; the largest growth of memory in MiB; outcomes that some mutants must have.
KINDS = {
    "tar": (300, 64, {"refused", "read"}),
    "jpeg": (300, 512, {"read by nobody", "read by training, TensorFlow, compress, Pillow", "too many pixels"}),
    "yaml": (200, 64, {"text      ConfigError", "laughs    ConfigError", "tree      Config"}),
    "json": (120, 64, {"a result", "no result"}),
    "npz": (60, 64, {"model      works", "model      DataError", "checkpoint works", "checkpoint ConfigError"}),
}


@pytest.mark.parametrize("size", ["sample", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_rightly_or_refused(kind: str, size: str, tmp_path: Path) -> None:
    sample, most_growth, wanted = KINDS[kind]
    figures = fuzz(kind, sample if size == "sample" else 10_000, tmp_path)
    print(f"{kind}\n{figures}")
    assert all(figures.outcomes[outcome] >= sample / 100 for outcome in wanted), figures
    assert figures.grown < most_growth, figures
