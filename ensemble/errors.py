"""Two families of errors: those a user can act on (here), and bugs (everything else, which keep their traceback)."""

from __future__ import annotations

from ensemble.text import TrustedLines, in_one_line, visible


class UserError(Exception):
    """What is wrong, where, what was found, what to do: everything its reader needs, nothing of our code.

    Each subclass carries the exit code that docs/guide.md promises to scripts.
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
            ("", in_one_line(self.what)),
            ("where: ", visible(self.where)),  # a place is spelt as it is
            ("found: ", in_one_line(self.found)),
            ("do: ", in_one_line(self.do)),
            *(("note: ", in_one_line(note)) for note in self.notes),
        ]
        return TrustedLines("\n  ".join(label + text for label, text in labelled if text))


class UsageError(UserError):
    """The command line or an environment variable makes no sense."""

    exit_code = 2


class InputRefused(UserError):
    """The images can't be segmented safely."""

    exit_code = 3


class WeightsBroken(UserError):
    """Member weights are missing, damaged, tampered with, or of a kind that we don't read."""

    exit_code = 4


class OutOfMemory(UserError):
    """There is not enough memory; the code is that of a process which the system kills for its memory."""

    exit_code = 137


class MembersFailed(UserError):
    """Fewer members than required gave a prediction."""

    exit_code = 5
