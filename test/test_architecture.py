"""The layers of docs/architecture.md: each module imports only what stands above it, and what is cheap stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

#: Top to bottom; a module or package may import its own row and those above.
LAYERS = (
    ("errors", "types", "processors", "memory", "streams", "folders", "files"),
    ("config",),
    ("geometry",),
    ("volume",),
    ("resample", "fusion", "metrics", "publish"),
    ("readers",),
    ("inference",),
    ("weights",),
    ("prepare",),
    ("families",),
    ("members",),
    ("pipeline",),
    ("outputs", "evaluate"),
    ("contract",),
    ("serve",),
    ("options", "progress"),
    ("batch",),
    ("cli",),
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
MODULES = sorted((REPOSITORY / "ensemble").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def unit(path: Path) -> str:
    """The module or package directly below `ensemble` that a file belongs to."""
    return path.relative_to(REPOSITORY / "ensemble").with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_point_upwards_only(path: Path) -> None:
    if unit(path) == "__init__":
        assert not imported(path) - {"__future__"}
        return
    used = {name.split(".")[1] for name in imported(path) if name.startswith("ensemble.")} - {"__version__"}
    below = {name for name in used if ROW[name] > ROW[unit(path)]}
    assert not below, f"{unit(path)} stands above {below}"


def test_no_module_is_missing_from_the_layers() -> None:
    assert {unit(path) for path in MODULES} - {"__init__"} == set(ROW)


def test_the_engine_knows_nothing_of_stroke() -> None:
    for path in (REPOSITORY / "ensemble" / "inference").glob("*.py"):
        used = {name for name in imported(path) if name.startswith("ensemble.")}
        assert used <= {name for name in used if name.split(".")[1] in {"inference", "types", "errors", "config"}}, path
        text = path.read_text(encoding="utf-8").lower()
        assert not [word for word in ("stroke", "lesion_", "dwi", "modality") if word in text], path


def test_the_contract_knows_nothing_of_torch() -> None:
    for path in (
        *(REPOSITORY / "ensemble" / "contract").glob("*.py"),
        *(REPOSITORY / "ensemble" / "serve").glob("*.py"),
    ):
        assert not [name for name in imported(path) if name.split(".")[0] == "torch"], path


def test_nothing_in_the_package_imports_nnunetv2_or_training() -> None:
    for path in MODULES:
        assert not [name for name in imported(path) if name.split(".")[0] in {"nnunetv2", "training"}], path


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["members", "list"]])
def test_cheap_commands_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom ensemble.cli import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'matplotlib', 'nnunetv2', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
