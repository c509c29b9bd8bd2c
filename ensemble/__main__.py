"""The command line as a program: `process.py`, `isles-ensemble` and `python -m ensemble` all start here."""

import sys

from ensemble.memory import keep_freed_memory
from ensemble.threads import limit_threads


def main() -> int:
    """Run one command. Sets up threads and memory first, because numpy reads those settings when it is imported."""
    limit_threads()
    keep_freed_memory()
    from ensemble.cli import main as run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
