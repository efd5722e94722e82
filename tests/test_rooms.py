"""The parts of the package (top-level modules and subpackages): which may import which, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from inspect import ismodule
from pathlib import Path

import pytest

import hyperprior
from hyperprior import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hyperprior"
SHARED = {"errors", "terminal", "metric_table", "image_files", "images", "draws", "config", "storage", "stack"}
MAY_IMPORT = {
    "errors": set(),
    "terminal": set(),
    "metric_table": set(),
    "image_files": set(),
    "images": {"stack"},
    "draws": set(),
    "stack": {"errors"},
    "config": {"errors"},
    "storage": {"errors", "config"},
    "arguments": {"errors"},
    "data": SHARED,
    "model": SHARED,
    "reference": SHARED,
    "codec": {*SHARED, "model"},
    "watch": {*SHARED, "model", "reference"},
    "training": {*SHARED, "data", "model", "reference", "codec", "watch"},
    "evaluation": {*SHARED, "model", "reference", "codec"},
    "machine": {*SHARED, "data", "model", "codec", "training"},
    "pillow": {*SHARED, "codec"},
    "cli": {*SHARED, "arguments", "data", "reference", "codec", "training", "evaluation", "machine"},
    "__init__": {"codec", "training"},
    "__main__": {"cli"},
}
WITHOUT_TENSORFLOW = [
    "hyperprior",
    "hyperprior.pillow",
    "hyperprior.cli",
    "hyperprior.config",
    "hyperprior.codec.files",
    "hyperprior.codec.codec",
    "hyperprior.codec.making",
    "hyperprior.evaluation.evaluate",
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The full names that a module imports from this package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hyperprior")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hyperprior":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_the_parts_that_the_table_allows(path: Path) -> None:
    own = part_of(path)
    imported = {name.split(".")[1] for name in imports(path) if is_module(".".join(name.split(".")[:2]))}
    assert imported - MAY_IMPORT[own] - {own} == set()


def test_imports_have_no_cycle() -> None:
    def target(name: str) -> str:
        return name if is_module(name) else name.rpartition(".")[0]

    imports_of: dict[str, set[str]] = {}
    for path in modules():
        name = ".".join(["hyperprior", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        # Imports of the parent's __init__, and of the package's __init__ for the version, do not count.
        imports_of[name] = {target(used) for used in imports(path)} - {name, "hyperprior", name.rpartition(".")[0]}
    while leaves := {name for name, used in imports_of.items() if not used & imports_of.keys()}:
        imports_of = {name: used for name, used in imports_of.items() if name not in leaves}
    assert imports_of == {}


def test_what_files_and_evaluation_need_does_not_import_tensorflow() -> None:
    code = f"import sys, {', '.join(WITHOUT_TENSORFLOW)}; assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_and_the_table_list_every_part() -> None:
    parts = {part_of(path) for path in modules()}
    assert parts == MAY_IMPORT.keys()
    tree = (PACKAGE / "README.md").read_text()
    assert {part for part in parts if not re.search(rf"^  {part}(/|\.py) ", tree, re.MULTILINE)} == set()


def test_every_subpackage_lists_all_its_modules() -> None:
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        listed = set(re.findall(r"^    (\w+)   ", (folder / "__init__.py").read_text(), re.MULTILINE))
        inside = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        if listed or len(inside) > 3:
            assert listed == inside - {"__init__"}, folder.name


def test_the_public_names_and_exit_codes_stay() -> None:
    public = {name for name, value in vars(hyperprior).items() if not name.startswith("_") and not ismodule(value)}
    assert public == {"load", "train"} and hyperprior.__version__
    exit_codes = {name: kind.exit_code for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert exit_codes == {
        "HyperpriorError": 1,
        "GateError": 1,
        "ConfigError": 2,
        "DataError": 3,
        "BitstreamError": 3,
        "DivergedError": 4,
        "Stopped": 75,
        "LostWorker": 75,
        "StorageError": 75,
    }
    from hyperprior.codec.codec import Codec

    public = {name for name in vars(Codec) if not name.startswith("_")}
    assert public >= {"compress", "compress_batch", "decompress", "decompress_batch", "estimated_bits", "latents"}
