"""Errors that a user can act on. Every other exception is a bug and keeps its traceback."""

from __future__ import annotations

from ensemble.text import TrustedLines, escape_invisible, escape_to_one_line


class UserError(Exception):
    """An error that a user can act on: what is wrong, where, what was found, what to do. It says nothing about our code.

    Each subclass has the exit code that docs/guide.md documents.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", found: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where)
        self.found = found
        self.do = do
        self.notes: tuple[str, ...] = ()
        """What was chosen or found odd before: it may explain the rest."""

    def __str__(self) -> str:
        labelled = [
            ("", escape_to_one_line(self.what)),
            ("where: ", escape_invisible(self.where)),  # a place is spelt as it is
            ("found: ", escape_to_one_line(self.found)),
            ("do: ", escape_to_one_line(self.do)),
            *(("note: ", escape_to_one_line(note)) for note in self.notes),
        ]
        return TrustedLines("\n  ".join(label + text for label, text in labelled if text))


class UsageError(UserError):
    """The command line or an environment variable is invalid, or outputs can't be written."""

    exit_code = 2


class InputRefused(UserError):
    """Input images, or tables about them, are missing, unreadable or can't be used safely."""

    exit_code = 3


class WeightsBroken(UserError):
    """The weights of a member are missing, damaged, altered, or of an unsupported kind."""

    exit_code = 4


class OutOfMemory(UserError):
    """Memory ran out. The exit code is that of a process killed by the system for its memory."""

    exit_code = 137


class MembersFailed(UserError):
    """Fewer members than required gave a prediction."""

    exit_code = 5
