"""The definition file for Apptainer says what the Dockerfile says. The image itself: test/container."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from apptainer_files import definition
from conftest import REPOSITORY
from ensemble.options import command_parser

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def test_its_header_names_the_image_that_build_makes() -> None:
    header, sections = definition()
    assert header == {"Bootstrap": "docker-daemon", "From": "isles-ensemble:latest"}
    assert "IMAGE=${IMAGE:-isles-ensemble}" in (REPOSITORY / "build.sh").read_text()
    assert set(sections) == {"environment", "runscript", "test", "help"}


def test_its_scripts_run_what_the_dockerfile_runs(tmp_path: Path) -> None:
    _, sections = definition()
    for name in ("environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections[name], text=True, check=True)
    entrypoint = re.search(r"^ENTRYPOINT (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert entrypoint is not None
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    program.chmod(0o755)
    script = sections["environment"].replace("/opt/venv/bin", str(tmp_path)) + sections["runscript"]
    told = subprocess.run(
        ["sh", "-c", script, "run", "a b", "", "--x=*"], env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/theirs", "TMPDIR": "/scratch"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    arguments, environment = json.loads(told.stdout)
    assert ["python", *arguments] == [*json.loads(entrypoint[1]), "a b", "", "--x=*"]
    ours = dict(re.findall(r"(PYTHON\w+|MPLCONFIGDIR)=(\S+)", DOCKERFILE))
    assert environment["MPLCONFIGDIR"].startswith("/scratch/matplotlib-")
    assert environment.items() >= {name: text for name, text in ours.items() if name != "MPLCONFIGDIR"}.items()
    assert "PYTHONPATH" not in environment


def test_its_help_names_options_that_there_are() -> None:
    parsers = map(command_parser, ("run", "bids-app", "slurm"))
    known = {word for parser in parsers for action in parser._actions for word in action.option_strings}
    assert set(re.findall(r"--[a-z-]+", definition()[1]["help"])) - known == {"--nv", "--bind"}
