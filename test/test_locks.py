"""The locks name all that is installed, by version and hash, and what installs from them refuses anything else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

import pip
import pytest

from conftest import REPOSITORY
from tiny_wheels import write_wheel

LOCKS = REPOSITORY / "locks"
SCRIPTS = ("venv.sh", "locks/install.sh")


def normal(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(lock: Path) -> dict[str, tuple[str, set[str]]]:
    """Version and SHA-256 of each package of a lock."""
    joined = lock.read_text().replace("\\\n", " ")
    found: dict[str, tuple[str, set[str]]] = {}
    for line in joined.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pinned = re.match(r"([\w.-]+)==([\w.+]+)(\s|$)", line)
        assert pinned, f"{lock.name}: not a package with its version: {line}"
        assert normal(pinned[1]) not in found, f"{lock.name}: {pinned[1]} stands there twice"
        found[normal(pinned[1])] = (pinned[2], set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)))
    return found


def asked(*files: str) -> dict[str, str]:
    """The versions that requirements files ask for."""
    text = "\n".join((REPOSITORY / name).read_text() for name in files)
    return {
        normal(name): version
        for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.]+)", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", ["build", "run", "dev", "tools"])
def test_each_package_has_a_version_and_hashes(name: str) -> None:
    lock = entries(LOCKS / f"{name}.txt")
    assert lock
    assert not [package for package, (_, hashes) in lock.items() if not hashes]


def test_hashes_are_of_the_files_for_every_python_and_system() -> None:
    """Not only of those that served where the lock was made: numpy has some for each of 3.11 to 3.13, on x86-64 and ARM."""
    lock = entries(LOCKS / "run.txt")
    assert all(len(lock[name][1]) > 10 for name in ("numpy", "scipy", "pandas", "pydantic-core"))
    assert all(
        len(hashes) > 1 for name, (_, hashes) in lock.items() if name in ("tqdm", "jinja2", "rich")
    )  # wheel and source


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("run", ("requirements.txt",)),
        ("dev", ("requirements.txt", "requirements-dev.txt", "locks/build.in")),
        ("build", ("locks/build.in",)),
        ("tools", ("locks/tools.in",)),
    ],
)
def test_the_locks_hold_what_the_requirements_name(name: str, files: tuple[str, ...]) -> None:
    wanted = asked(*files)
    wanted.pop("torch", None)
    locked = {package: version for package, (version, _) in entries(LOCKS / f"{name}.txt").items()}
    assert {package: locked.get(package) for package in wanted} == wanted, "./renew.sh was not run"


def test_what_leaves_the_image_is_in_the_lock() -> None:
    """A package that nothing brings any more need not be taken away."""
    unused = re.findall(r"^[\w.-]+", (REPOSITORY / "image" / "unused.txt").read_text(), re.MULTILINE)
    assert set(unused) <= set(entries(LOCKS / "run.txt"))


def test_what_is_tested_is_what_is_shipped() -> None:
    tested, shipped = entries(LOCKS / "dev.txt"), entries(LOCKS / "run.txt")
    assert {package: tested.get(package) for package in shipped} == shipped
    assert not [package for package in tested if package == "torch" or package.startswith("nvidia-")]


def test_the_environment_of_the_tests_is_the_locked_one() -> None:
    """What is installed here has the locked version; a developer's own packages may stand beside it."""
    locked = entries(LOCKS / "dev.txt")
    installed = {normal(found.name): found.version for found in distributions()}
    assert not {
        name: (version, locked[name][0])
        for name, version in installed.items()
        if name in locked and version != locked[name][0]
    }


def test_nothing_is_installed_without_hashes_but_torch() -> None:
    """Each `pip install` of the scripts and the Dockerfile goes through locks/install.sh."""
    callers = [
        *REPOSITORY.glob("*.sh"),
        *REPOSITORY.glob("image/*.sh"),
        REPOSITORY / "Dockerfile",
        REPOSITORY / ".ci" / "run",
    ]
    for path in callers:
        commands = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in commands if re.search(r"\bpip3?\b.*\binstall\b", line)], path.name


# a tampered wheel


class Clone:
    """What installs, with locks of tiny packages that come from a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.index = root, root / "index"
        (root / "locks").mkdir()
        for name in SCRIPTS:
            shutil.copy2(REPOSITORY / name, root / name)
        (root / "requirements.txt").write_text("torch==2.13.0  # by version\ntiny==1.0\n")
        write_wheel(self.index, "torch", "2.13.0")
        self.lock("build", "builder", write_wheel(self.index, "builder", "1.0"))
        self.lock("run", "tiny", write_wheel(self.index, "tiny", "1.0"))
        # with the pip of this environment: to unpack one takes ten seconds
        venv.create(root / ".venv", symlinks=True)
        (packages,) = (root / ".venv" / "lib").glob("python*/site-packages")
        (packages / "pip").symlink_to(Path(pip.__file__).parent)

    def lock(self, name: str, package: str, digest: str | None) -> None:
        hashes = f" --hash=sha256:{digest}" if digest else ""
        (self.root / "locks" / f"{name}.txt").write_text(f"{package}==1.0{hashes}\n")
        (self.root / "locks" / "dev.txt").write_text("")

    def install(self) -> subprocess.CompletedProcess[str]:
        """Set up the environment as ./run.sh does, with no other source than the folder."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VIRTUAL_ENV"))
        }
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
        environment |= {"PIP_FIND_LINKS": self.index.as_uri(), "PIP_NO_COMPILE": "1"}
        script = "set -euo pipefail; source ./venv.sh; need_venv run; echo ready"
        return subprocess.run(
            ["bash", "-c", script], cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )

    def holds(self, package: str) -> bool:
        return bool(list(self.root.glob(f".venv/lib/python*/site-packages/{package}.py")))


def test_a_tampered_wheel_is_refused(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    write_wheel(clone.index, "tiny", "1.0", "print('not what was locked')")
    done = clone.install()
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "installing locks/run.txt failed" in done.stderr
    assert not clone.holds("tiny")
    assert not clone.holds("torch")

    # put right, the same environment is completed; a tampered builder, and a package without hashes, are refused as well
    write_wheel(clone.index, "tiny", "1.0")
    assert clone.install().stdout.endswith("ready\n")
    assert clone.holds("tiny")
    assert clone.holds("torch")
    clone.lock("run", "other", None)
    write_wheel(clone.index, "other", "1.0")
    assert "Hashes are required" in clone.install().stderr
    assert not clone.holds("other")


def test_a_tampered_builder_is_refused(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    write_wheel(clone.index, "builder", "1.0", "print('not what was locked')")
    assert "DO NOT MATCH THE HASHES" in clone.install().stderr
    assert not clone.holds("builder")
    assert not clone.holds("tiny")
