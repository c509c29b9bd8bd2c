"""The layers of docs/architecture.md: each module imports only what stands above it, and what is cheap stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from conftest import REPOSITORY

#: Top to bottom; a module or package may import its own row and those above.
LAYERS = (
    (
        "text",
        "errors",
        "types",
        "threads",
        "memory",
        "logging_setup",
        "folders",
        "child_process",
        "files",
        "program",
        "tables",
    ),
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
    ("trust",),
    ("spectral",),
    ("findings",),
    ("outputs",),
    ("evaluate",),
    ("contract",),
    ("serve",),
    ("hospital",),
    ("options", "progress"),
    ("api",),
    ("batch",),
    ("cli",),
    ("__main__",),
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
        assert imported(path) == {"importlib"}
        return
    used = {name.split(".")[1] for name in imported(path) if name.startswith("ensemble.")} - {"__version__"}
    below = {name for name in used if ROW[name] > ROW[unit(path)]}
    assert not below, f"{unit(path)} stands above {below}"


def test_no_module_imports_itself_through_others() -> None:
    """Nor does any room of a package: the folders of `outputs/`, say, stand in an order too."""
    names = {path: dotted(path) for path in MODULES}
    known = set(names.values())
    modules = {names[path]: imported(path) & known for path in MODULES}
    TopologicalSorter(modules).prepare()
    rooms: dict[str, set[str]] = {}
    for name, used in modules.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in used} - {room(name)})
    TopologicalSorter(rooms).prepare()


def dotted(path: Path) -> str:
    """A module's name as it is imported."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The folder that a module lies in; of what lies directly in a package, the module."""
    parts = name.split(".")
    return ".".join(parts[:-1] if len(parts) > 3 else parts)


def test_no_module_is_missing_from_the_layers() -> None:
    assert {unit(path) for path in MODULES} - {"__init__"} == set(ROW)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not within a room either, and not by an import that waits inside a function."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): imported(path) for path in MODULES}
    TopologicalSorter({name: used & set(modules) for name, used in modules.items()}).prepare()


def test_names_come_from_the_module_that_defines_them() -> None:
    """What passes a name on ties its own imports to whoever takes it from there: so a family once came to need the manifest."""
    rooms = {
        f"ensemble.{'.'.join(path.relative_to(REPOSITORY / 'ensemble').with_suffix('').parts)}": defined(path)
        for path in MODULES
        if unit(path) in {"weights", "prepare", "families", "members"} and path.stem != "__init__"
    }
    files = [
        path for name in ("ensemble", "test", "training", "benchmarks") for path in (REPOSITORY / name).rglob("*.py")
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in rooms:
                passed_on = {alias.name for alias in node.names} - rooms[node.module]
                assert not passed_on, f"{path} takes {passed_on} from {node.module}"


def defined(path: Path) -> set[str]:
    """Names of the functions, classes and variables of a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_the_engine_knows_nothing_of_stroke() -> None:
    for path in (REPOSITORY / "ensemble" / "inference").glob("*.py"):
        used = {name for name in imported(path) if name.startswith("ensemble.")}
        assert used <= {
            name for name in used if name.split(".")[1] in {"inference", "types", "errors", "config", "memory"}
        }, path
        text = path.read_text(encoding="utf-8").lower()
        assert not [word for word in ("stroke", "lesion_", "dwi", "modality") if word in text], path


def test_the_contract_knows_nothing_of_torch() -> None:
    for path in (
        *(REPOSITORY / "ensemble" / "contract").glob("*.py"),
        *(REPOSITORY / "ensemble" / "serve").glob("*.py"),
        *(REPOSITORY / "ensemble" / "hospital").glob("*.py"),
    ):
        assert not [name for name in imported(path) if name.split(".")[0] == "torch"], path


#: The one module that imports nnunetv2, in a function that only `members check --compare` calls.
COMPARES = REPOSITORY / "ensemble" / "families" / "nnunet_v2" / "reference.py"


def test_nothing_in_the_package_imports_nnunetv2_or_training() -> None:
    for path in MODULES:
        foreign = {name.split(".")[0] for name in imported(path)} & {"nnunetv2", "training"}
        assert foreign == ({"nnunetv2"} if path == COMPARES else set()), path
    at_import = [
        node for node in ast.parse(COMPARES.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)
    ]
    assert not [node.module for node in at_import if node.module and node.module.startswith("nnunetv2")]
    for path in MODULES:  # and it waits inside functions wherever it is imported itself
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert not [node for node in body if isinstance(node, ast.ImportFrom) and node.module == dotted(COMPARES)], path


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


def test_what_all_tests_share_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.path += ['.', 'test']\nimport conftest\n"
        "heavy = {'torch', 'SimpleITK', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
