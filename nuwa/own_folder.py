"""Folders of one user below a place where all of a machine may write, such as ``/tmp``.

Their names can be foretold, so what stands there may be somebody else's trap: a link to where we should not write, or a
folder whose files are not ours to believe.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from nuwa.errors import UserError

OTHERS = stat.S_IRWXG | stat.S_IRWXO


class UnsafeFolder(UserError, RuntimeError):
    """What stands in a folder's place is not this user's alone."""


def own_folder(path: Path) -> Path:
    """``path``, made where it is missing, as a folder that nobody but this user may enter.

    One that cannot be made is left to who writes there. Raises :class:`UnsafeFolder` for a link, for what is another
    user's, and where others may write.
    """
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        held = path.lstat()
    except OSError:
        return path

    wrong = None
    if stat.S_ISLNK(held.st_mode):
        wrong = "is a link"
    elif held.st_uid != os.getuid():
        wrong = f"belongs to user {held.st_uid}, not to {os.getuid()}"
    elif not stat.S_ISDIR(held.st_mode):  # nothing can be kept there, and nothing told
        return path
    elif held.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = f"may be written to by others (mode {stat.S_IMODE(held.st_mode):o})"
    if wrong:
        raise UnsafeFolder(f"{path} {wrong}; remove it, or set TMPDIR to a folder of your own")
    if held.st_mode & OTHERS:  # of an earlier version
        path.chmod(0o700)
    return path
