"""A thread for which the kernel refuses some calls: real errors of real files, without the file system that has them."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
CALLS = {
    "x86_64": {"open": 2, "flock": 73, "openat": 257},
    "aarch64": {"flock": 32, "openat": 56},
}[platform.machine()]
FLAGS_AT = {"open": 24, "openat": 32}  # where a filter finds an open's flags
LOAD, EQUALS, HAS_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2


class _Step(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.POINTER(_Step)))


def _refuse(names: tuple[str, ...], number: int) -> None:
    """From now on the kernel answers these calls of this thread with the error ``number``; folders open as ever."""
    steps = [_Step(LOAD, 0, 0, 0)]
    for name in names:
        if name not in CALLS:
            continue
        refuse = [_Step(RETURN, 0, 0, REFUSE | number)]
        if name in FLAGS_AT:
            allowed = [_Step(LOAD, 0, 0, FLAGS_AT[name]), _Step(HAS_BITS, 0, 1, os.O_DIRECTORY)]
            refuse = [*allowed, _Step(RETURN, 0, 0, ALLOW), *refuse]
        steps += [_Step(EQUALS, 0, len(refuse), CALLS[name]), *refuse]
    steps.append(_Step(RETURN, 0, 0, ALLOW))
    program = _Program(len(steps), (_Step * len(steps))(*steps))
    kernel = ctypes.CDLL(None, use_errno=True)
    if kernel.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or kernel.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "this kernel takes no filters")


def where_refused(names: tuple[str, ...], number: int, action: Callable[[], Result]) -> Result:
    """What ``action`` returns or raises in a thread whose calls ``names`` fail with ``number``, as all it starts do."""
    came: list[Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            _refuse(names, number)
            came.append(action())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return came[0]


OPENING = ("open", "openat")
PASSING = [errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT]
