"""Take the installers of Python packages out of a base image: pip, setuptools, and what would bring them back.

Nothing is deleted: a layer notes when a file of the layer below was. A folder is exchanged for one that refuses its import, a file emptied.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from pathlib import Path

INSTALLERS = r"pip|setuptools|pkg_resources|_distutils_hack|ensurepip|wheel"
REFUSAL = "raise ModuleNotFoundError(f'{__name__} is not in this image: it holds no installers', name=__name__)\n"
DPKG = Path("/var/lib/dpkg/status")


def empty_folder(path: Path, content: str | None = None) -> None:
    shutil.rmtree(path)
    path.mkdir()
    if content is not None:
        (path / "__init__.py").write_text(content)


def empty_packages(folder: Path) -> None:
    """Packages, what says that they are there, and what is run at each start of Python."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and re.fullmatch(INSTALLERS, path.name):
            empty_folder(path, REFUSAL)
        elif path.is_dir() and re.fullmatch(rf"({INSTALLERS})-.*\.(dist|egg)-info", path.name):
            empty_folder(path)
        elif path.name == "distutils-precedence.pth":
            path.write_text("")


def main() -> None:
    folders = {Path(name) for name in (*sys.path[1:], sysconfig.get_path("stdlib")) if Path(name).is_dir()}
    for folder in sorted(folders):
        empty_packages(folder)
    for folder in ("/bin", "/usr/bin", "/usr/local/bin", "/opt/conda/bin"):
        for path in sorted(Path(folder).glob("pip*")):
            if not path.is_symlink():
                path.write_text("")
                path.chmod(0o644)
    if (wheels := Path("/usr/share/python-wheels")).is_dir():
        empty_folder(wheels)
    if DPKG.is_file():  # its bill says what is there
        gone = re.compile(r"Package: python3[\d.]*-(venv|pip|pip-whl|setuptools|setuptools-whl|wheel)\n")
        paragraphs = DPKG.read_text(encoding="utf-8").split("\n\n")
        DPKG.write_text("\n\n".join(text for text in paragraphs if not gone.match(text)), encoding="utf-8")


if __name__ == "__main__":
    main()
