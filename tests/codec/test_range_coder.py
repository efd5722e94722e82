"""The range coder in Python gives the bytes of the C++ one, whichever is installed, and comes back from any bytes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperprior.codec import range_coder

try:
    from hyperprior.codec import native
except ModuleNotFoundError:  # without TensorFlow
    native = None  # type: ignore[assignment]

needs_tensorflow = pytest.mark.skipif(native is None, reason="without TensorFlow there is no C++ range coder")


class Case:
    """Random tables, and symbols to code by them, from a seed."""

    def __init__(self, seed: int, precision: int, length: int, batch: int, likely: bool):
        rng = np.random.RandomState(seed)
        lookup, sizes = [], []
        for _ in range(rng.randint(1, 6)):
            size = rng.randint(1, min(40, 2**precision) + 1)
            edges = np.sort(rng.choice(np.arange(1, 2**precision), size - 1, replace=False)) if size > 1 else []
            lookup += [precision, 0, *edges, 2**precision]
            sizes.append(size)
        self.lookup = np.array(lookup, np.int32)
        self.index = rng.randint(0, len(sizes), (batch, length)).astype(np.int32)
        sizes_of = np.array(sizes)[self.index]
        drawn = rng.geometric(0.6, self.index.shape) - 1 if likely else rng.randint(0, 1 << 30, self.index.shape)
        self.symbols = (np.minimum(drawn, sizes_of - 1) if likely else drawn % sizes_of).astype(np.int32)

    def encode(self, encoder: Any) -> list[bytes]:
        half = self.index.shape[1] // 2  # in two parts
        encoder.put(self.symbols[:, :half], self.index[:, :half])
        encoder.put(self.symbols[:, half:], self.index[:, half:])
        return encoder.finish()


cases = st.builds(
    Case, st.integers(0, 10**6), st.integers(1, 16), st.integers(0, 3000), st.integers(1, 3), st.booleans()
)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_what_was_encoded_is_decoded(case: Case) -> None:
    counts = range_coder.Counts(case.lookup)
    strings = case.encode(range_coder.Encoder(counts, len(case.index)))
    assert np.array_equal(range_coder.Decoder(counts, strings).take(case.index), case.symbols)


@needs_tensorflow
@given(cases, st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_bytes_and_symbols_are_those_of_the_c_operations(case: Case, noise: bytes) -> None:
    operations = native.load_operations()
    if not operations.module:
        pytest.skip(operations.report)
    counts = range_coder.Counts(case.lookup)
    batch = len(case.index)
    strings = case.encode(range_coder.Encoder(counts, batch))
    assert strings == case.encode(native.Encoder(operations.module, case.lookup, batch))
    cut = [string[: len(string) // 2] for string in strings]
    mutated = [
        bytes(a ^ b for a, b in zip(string, noise * (len(string) // max(len(noise), 1) + 1))) for string in strings
    ]
    for data in (strings, cut, mutated, [noise] * batch):
        mine = range_coder.Decoder(counts, data).take(case.index)
        assert np.array_equal(mine, native.Decoder(operations.module, case.lookup, data).take(case.index))


@needs_tensorflow
@pytest.mark.slow
def test_a_hundred_thousand_symbols_of_each_precision_have_the_bytes_of_the_c_operations() -> None:
    operations = native.load_operations()
    if not operations.module:
        pytest.skip(operations.report)
    for precision in range(1, 17):
        case = Case(precision, precision, 10**5, 1, precision % 2 == 0)
        counts = range_coder.Counts(case.lookup)
        strings = case.encode(range_coder.Encoder(counts, 1))
        assert strings == case.encode(native.Encoder(operations.module, case.lookup, 1)), precision
        assert np.array_equal(range_coder.Decoder(counts, strings).take(case.index), case.symbols)


@needs_tensorflow
def test_a_package_that_cannot_be_loaded_is_named_and_the_next_coder_is_used(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "broken_ops" / "cc").mkdir(parents=True)
    (folder / "broken_ops" / "__init__.py").write_text("raise ImportError")
    (folder / "broken_ops" / "cc" / "ops.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(native, "PACKAGES", {"missing_ops": "cc/ops.so", "broken_ops": "cc/ops.so"})
    found = native.load_operations.__wrapped__()
    assert found.module is None
    assert "missing_ops is not installed; broken_ops cannot be loaded: " in found.report


@needs_tensorflow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_the_package_can_be_imported_before_and_after(first: str) -> None:
    package = next((name for name in native.PACKAGES if importlib.util.find_spec(name)), None)
    if not package:
        pytest.skip(native.load_operations().report)
    lines = ["from hyperprior.codec import native; native.load_operations().module.create_range_encoder"]
    lines.append(f"import {package} as theirs; theirs.create_range_encoder")
    code = "; ".join(lines if first == "ours" else lines[::-1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
