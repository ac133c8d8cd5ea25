"""One driver at a time, also where the file system has no locks: the kernel refuses them as such file systems do."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import forked
from refusing_kernel import where_refused

from pipelines.files.lock import SILENT_S, WorkDirectoryBusy, exclusive
from pipelines.files.surroundings import present_user, surroundings

NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


def without_locks(action, number: int = errno.ENOLCK):
    """What ``action`` returns where the file system has no locks, in this process and those it starts."""
    return where_refused(("flock",), number, action)


def try_it(work: Path) -> None:
    """Leaves with 0 where it had the directory, with 3 where another has it."""
    try:
        with exclusive(work):
            print("mine")
    except WorkDirectoryBusy as busy:
        print(busy)
        raise SystemExit(3) from None


def left_behind(work: Path, host: str, processes: str, pid: int, age: float) -> None:
    """The lease of a driver that is not here."""
    holder = {"user": "user ann", "host": host, "processes": processes, "pid": pid, "token": "t"}
    (work / "lease").write_text(json.dumps(holder))
    os.utime(work / "lease", (0, time.time() - age))


def test_a_lock_ends_with_its_holder(tmp_path):
    with exclusive(tmp_path):
        other = forked(lambda: try_it(tmp_path))
        assert (other.code, other.out) == (3, f"{tmp_path} is in use by another sweep; wait for it or stop it\n")
    assert forked(lambda: try_it(tmp_path)).out == "mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("number", NO_LOCKS, ids=os.strerror)
def test_where_there_are_no_locks_a_lease_stands_in(tmp_path, capsys, number):
    def drivers():
        with exclusive(tmp_path):
            return forked(lambda: try_it(tmp_path)), forked(lambda: try_it(tmp_path))

    for other in without_locks(drivers, number):
        assert other.code == 3
        assert other.out == (
            f"{tmp_path} is in use by {present_user()} on {socket.gethostname()}, process {os.getpid()}; wait for it or "
            f"stop it. If it is dead, {tmp_path}/lease is free 5 minutes after its last sign of life\n"
        )
    line = f"{tmp_path}: its file system has no locks ({os.strerror(number)}); {tmp_path}/lease stands in for one\n"
    assert capsys.readouterr().err == line and other.err == line
    assert [path.name for path in tmp_path.iterdir()] == ["lock"], "it went with its holder"


def test_the_lease_of_a_driver_that_was_killed_is_free_at_once(tmp_path):
    def killed():
        with exclusive(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert without_locks(lambda: forked(killed)).code == -signal.SIGKILL
    assert (tmp_path / "lease").exists()
    assert without_locks(lambda: forked(lambda: try_it(tmp_path))).out == "mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(("age", "free"), [(SILENT_S - 60, False), (SILENT_S + 60, True)])
def test_the_lease_of_another_machine_is_free_when_it_is_silent(tmp_path, age, free):
    """A process of this number is long gone here, which says nothing of another machine."""
    left_behind(tmp_path, "node7", "another start", forked(lambda: None).code + 2**22, age)
    other = without_locks(lambda: forked(lambda: try_it(tmp_path)))
    assert (other.code, other.out.startswith("mine")) == (0 if free else 3, free)
    if not free:
        assert f"in use by user ann on node7, process {2**22}; wait for it" in other.out


def test_a_lease_that_is_being_written_is_somebodys(tmp_path):
    (tmp_path / "lease").write_text('{"user": ')
    other = without_locks(lambda: forked(lambda: try_it(tmp_path)))
    assert other.out.startswith(f"{tmp_path} is in use by another sweep; wait for it or stop it. If it is dead")


def contend(work: Path, start, over, results) -> None:
    start.wait()
    try:
        with exclusive(work):
            results.put("mine")
            over.wait()
    except WorkDirectoryBusy:
        results.put("busy")


def test_of_many_that_find_a_dead_lease_one_gets_it(tmp_path):
    processes = multiprocessing.get_context("fork")
    for round_ in range(3):
        work = tmp_path / str(round_)
        work.mkdir()
        left_behind(work, "node7", "another start", 1, SILENT_S + 60)
        start, over, results = processes.Barrier(6), processes.Event(), processes.SimpleQueue()

        def all_at_once(work=work, start=start, over=over, results=results):
            drivers = [processes.Process(target=contend, args=(work, start, over, results)) for _ in range(6)]
            for driver in drivers:
                driver.start()
            said = sorted(results.get() for _ in drivers)
            over.set()
            for driver in drivers:
                driver.join()
            return said

        assert without_locks(all_at_once) == ["busy"] * 5 + ["mine"]


def test_a_disk_that_fails_is_neither_busy_nor_without_locks(tmp_path):
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))) as raised:
        without_locks(lambda: try_it(tmp_path), errno.EIO)
    told = surroundings(raised.value)
    assert told is not None and told.startswith(f"{tmp_path}/lock: the disk failed: see that it is whole")
