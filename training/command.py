"""Report errors of the commands that users call in the same way as the product does."""

from __future__ import annotations

from collections.abc import Callable

from ensemble.errors import UserError
from ensemble.logging_setup import report_failure, set_up_logging


def call(command: Callable[[], int]) -> int:
    """Run a command with messages on stdout. Returns its exit code: for what a user can act on, that of the error."""
    set_up_logging()
    try:
        return command()
    except UserError as error:
        report_failure(error)
        return error.exit_code
