"""What a machine says of files, in one line with what to do: rights, places that are read-only, full or not there."""

from __future__ import annotations

import errno
import getpass
import os

GO_ON = "then run the same command again; finished work is kept"
REMEDIES = {
    errno.EACCES: "{user} may not read or write it: give it the rights (`ls -ld` shows them) or name another place, {go_on}",
    errno.EPERM: "{user} may not change it: give it the rights (`ls -ld` shows them) or name another place, {go_on}",
    errno.EROFS: "it lies where nothing can be written: name another place, or run in a copy of the project that can be "
    "written",
    errno.ENOSPC: "no space is left: free some, {go_on}",
    errno.EDQUOT: "your share of the disk is used up: free some, {go_on}",
    errno.EFBIG: "the file would be larger than is allowed here (`ulimit -f`): allow more, {go_on}",
    errno.ENOTDIR: "a file stands where a folder should be: move it away, {go_on}",
    errno.EEXIST: "a file stands where a folder should be: move it away, {go_on}",
    errno.EISDIR: "a folder stands where a file should be: move it away, {go_on}",
    errno.ENOTEMPTY: "others write into this folder: see that nothing else uses it, {go_on}",
    errno.EMFILE: "too many files are open (`ulimit -n`): allow more, {go_on}",
    errno.ENFILE: "too many files are open on this machine: wait, {go_on}",
    errno.ELOOP: "links lead in a circle: mend them, {go_on}",
    errno.ENAMETOOLONG: "the name is too long for this file system: use a shorter place, {go_on}",
    errno.EIO: "the disk failed: see that it is whole, {go_on}",
    errno.ESTALE: "the network mount was lost: mount it again, {go_on}",
    errno.ENOENT: "no such file; `dvc repro` makes what stages leave to each other",
}


def surroundings(error: OSError) -> str | None:
    """``error`` in one line, or null where it says nothing of the surroundings and is a fault of ours."""
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None or (error.errno == errno.ENOENT and error.filename is None):
        return None
    place = error.filename2 or error.filename or "a file"
    if isinstance(place, bytes):
        place = os.fsdecode(place)
    words = remedy.format(user=present_user(), go_on=GO_ON)
    return f"{place}: {words}" if error.errno == errno.ENOENT else f"{place}: {words} ({error.strerror})"


def present_user() -> str:
    try:
        return f"user {getpass.getuser()}"
    except (KeyError, OSError):  # a number without a name, as in containers
        return f"user {os.getuid()}"
