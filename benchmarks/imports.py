"""Which of the packages in the image does anything import? What nothing imports can leave it (docs/supply-chain.md).

    python -m benchmarks.imports --journal J run python process.py ...    run a command; what it and its children import goes to J
    python -m benchmarks.imports --journal J table                        size and imports of each package of locks/run.txt

Recorded by an audit hook, so that children that end without goodbye, and imports that fail, count too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOOK = """
import os, sys
def hook(event, arguments, seen=set(), journal=os.environ["IMPORTS_JOURNAL"]):
    if event == "import" and arguments[0] not in seen:
        seen.add(arguments[0])
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (arguments[0] + "\\n").encode())
        os.close(descriptor)
sys.addaudithook(hook)
"""


def run(journal: Path, command: list[str]) -> int:
    """Run a command with the hook in every Python that it starts; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(HOOK)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "IMPORTS_JOURNAL": str(journal.resolve())}
        return subprocess.run(command, env=environment, check=False).returncode


def modules(installed: Distribution) -> set[str]:
    """The names at the top that a distribution brings."""
    tops = {path.parts[0] for path in installed.files or [] if path.suffix in (".py", ".so")}
    return {top.split(".")[0] for top in tops if not top.startswith("..")}


def megabytes(installed: Distribution) -> float:
    """What a distribution's files take on the disk."""
    paths = [Path(str(installed.locate_file(path))) for path in installed.files or []]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def table(journal: Path) -> None:
    """Print the packages, those first that nothing imported, the large before the small."""
    imported = {name.split(".")[0] for name in journal.read_text().split()}
    locked = re.findall(r"^([\w.-]+)==", (HERE.parent / "locks" / "run.txt").read_text(), re.MULTILINE)
    rows: list[tuple[bool, float, str]] = []
    for name in ["torch", *locked]:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # of another system or Python
        rows.append((bool(modules(installed) & imported), -megabytes(installed), name))
    print("| package | MB | imported |\n| --- | --- | --- |")
    for used, size, name in sorted(rows):
        print(f"| {name} | {-size:.1f} | {'yes' if used else 'no'} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("part", choices=("run", "table"))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.part == "run":
        return run(options.journal, options.command)
    table(options.journal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
