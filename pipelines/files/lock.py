"""One driver at a time on a work directory.

The file system's own lock ends with its holder, so it comes first. Where there is none (Lustre mounted without
``flock``, some NFS, SMB and FUSE mounts) a *lease* stands in: a file that only one process can create, which names its
holder and is touched as long as that one lives. A lease whose holder is gone, from this machine's processes, or silent
for ``SILENT_S`` by the file system's own clock, is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from nuwa.errors import UserError
from pipelines.files.lines import tell
from pipelines.files.surroundings import present_user

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what says that another has the lock
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # that there are none
TOUCH_S = 20.0
SILENT_S = 300.0  # fifteen times as long: a machine may be slow, and a mount away for minutes


class WorkDirectoryBusy(UserError, RuntimeError):
    """Another driver works on the same directory."""


@contextmanager
def exclusive(work: Path) -> Iterator[None]:
    """One driver at a time on a work directory: a child can outlive the ``dvc`` that started it.

    Raises :class:`WorkDirectoryBusy` with who has it, as far as that is known.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise WorkDirectoryBusy(f"{work} is in use by another sweep; wait for it or stop it") from None
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(work / "lock")) from None
            tell(f"{work}: its file system has no locks ({error.strerror}); {work / 'lease'} stands in for one")
            with _leased(work / "lease"):
                yield
        else:
            yield


@dataclass(frozen=True)
class Holder:
    """Who has a lease. ``processes``: what its number ``pid`` is one of; ``token`` tells two leases of one process apart."""

    user: str
    host: str
    processes: str
    pid: int
    token: str

    @classmethod
    def here(cls) -> Holder:
        return cls(present_user(), socket.gethostname(), _processes(), os.getpid(), secrets.token_hex(8))

    @classmethod
    def of(cls, lease: Path) -> Holder | None:
        """Null for a lease that is gone, or not written to its end."""
        try:
            return cls(**json.loads(lease.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def is_gone(self) -> bool:
        """Whether it ran among this machine's processes and does not any more."""
        if self.processes != _processes():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            pass
        return False


def _processes() -> str:
    """What process numbers are of here: a start of a machine, and a container on it, which may share a name with others."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


@contextmanager
def _leased(lease: Path) -> Iterator[None]:
    taker = Holder.here()
    _take(lease, taker)
    ended = threading.Event()
    touching = threading.Thread(target=_keep_touching, args=(lease, taker, ended), daemon=True, name="lease")
    touching.start()
    try:
        yield
    finally:
        ended.set()
        touching.join()
        if Holder.of(lease) == taker:
            lease.unlink(missing_ok=True)


def _take(lease: Path, taker: Holder) -> None:
    """Create ``lease``, or take over one whose holder is gone or silent; raises :class:`WorkDirectoryBusy`."""
    while not _create(lease, taker):
        holder = Holder.of(lease)
        if not _is_dead(lease):
            who = f"{holder.user} on {holder.host}, process {holder.pid}" if holder else "another sweep"
            raise WorkDirectoryBusy(
                f"{lease.parent} is in use by {who}; wait for it or stop it. If it is dead, {lease} is free "
                f"{SILENT_S / 60:.0f} minutes after its last sign of life"
            )
        _remove_dead(lease, taker)


def _is_dead(lease: Path) -> bool:
    holder = Holder.of(lease)
    return (holder is not None and holder.is_gone) or _is_silent(lease)


def _remove_dead(lease: Path, taker: Holder) -> None:
    """Remove ``lease`` if it is dead, one process at a time: what was dead a moment ago may be another's by now."""
    removing = lease.with_name(f"{lease.name}.removing")
    if not _create(removing, taker):
        if _is_dead(removing):
            removing.unlink(missing_ok=True)
        time.sleep(0.05)
        return
    try:
        if _is_dead(lease):
            lease.unlink(missing_ok=True)
    finally:
        removing.unlink(missing_ok=True)


def _create(lease: Path, taker: Holder) -> bool:
    """Whether this process is the one that has made ``lease``; it appears with its content."""
    fresh = lease.with_name(f".{lease.name}.{taker.token}.tmp")
    fresh.write_text(json.dumps(asdict(taker)))
    try:
        os.link(fresh, lease)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_in_place(lease, taker)  # a file system without hard links
    finally:
        fresh.unlink(missing_ok=True)
    return True


def _create_in_place(lease: Path, taker: Holder) -> bool:
    try:
        with open(lease, "x") as content:
            content.write(json.dumps(asdict(taker)))
    except FileExistsError:
        return False
    return True


def _is_silent(lease: Path) -> bool:
    """Whether nobody has touched ``lease`` for ``SILENT_S``, by a file that is touched now: clocks of hosts differ."""
    now = lease.with_name(f".{lease.name}.{secrets.token_hex(8)}.tmp")
    try:
        now.touch()
        return now.stat().st_mtime - lease.stat().st_mtime > SILENT_S
    except FileNotFoundError:
        return False
    finally:
        now.unlink(missing_ok=True)


def _keep_touching(lease: Path, taker: Holder, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_S):
        with contextlib.suppress(OSError):  # the mount may be away for a while
            if Holder.of(lease) == taker:
                os.utime(lease)
