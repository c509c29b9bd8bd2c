"""The name under which the program was started, so that messages name commands that work."""

import sys
from pathlib import Path


def program_name() -> str:
    """Return `isles-ensemble` if the installed command runs, else `process.py`."""
    return "isles-ensemble" if Path(sys.argv[0]).stem == "isles-ensemble" else "process.py"


def command_line(arguments: str) -> str:
    """Return a full command line of this program for messages: `python process.py members list`."""
    name = program_name()
    return f"python {name} {arguments}" if name.endswith(".py") else f"{name} {arguments}"


def help_advice(prog: str) -> str:
    """Return the advice to read the help of a parser called `prog` (`process.py`, `process.py run`)."""
    return f"see {command_line(f'{prog} --help'.removeprefix(program_name()).strip())}"
