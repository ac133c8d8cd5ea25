"""What a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A fault in what was brought or asked for, said in one line: key or file, value, what is allowed, what to do.

    Stages print the line and exit with ``exit_code``. Anything else that is raised is a fault of ours and keeps its
    trace. Subclasses derive from the built-in exception that a caller of the library would expect as well.
    """

    exit_code = 1


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What another program's ``error`` says, as a part of a line of ours: white space folded, at most so many characters."""
    return " ".join(str(error).split())[:most]
