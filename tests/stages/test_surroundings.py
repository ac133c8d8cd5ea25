"""Rights, read-only places, full disks, files where folders should be: one line each. What is our fault keeps its trace."""

from __future__ import annotations

import errno
import os
import sqlite3  # noqa: F401  (what a stage imports late may lie where an ordinary user cannot read)
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nuwa.errors import UserError
from pipelines.files.atomic import atomic_path
from stages.entry import OUR_FAULT, run_stage

ROOT = Path(__file__).parents[2]
GO_ON = "then run the same command again; finished work is kept"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ordinary_user(project) -> Iterator[int]:
    """This process without root's power over files."""
    for folder in (project, *project.parents):
        if folder.stat().st_uid == os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    before = os.geteuid()
    if before == 0:
        for path in (project, project / "data", project / "params.yaml"):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
    yield os.geteuid()
    os.seteuid(before)


def stopped(stage: Callable[[object], None], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        run_stage(stage, needs_model=False)
    assert caught.value.code == 1
    return capsys.readouterr().err


def write(_settings) -> None:
    with atomic_path(Path("data/out.csv")) as fresh:
        fresh.write_text("x")


def test_a_folder_that_may_not_be_written(ordinary_user, capsys):
    Path("data").chmod(0o555)
    said = stopped(write, capsys)
    assert said.startswith("error: data/out.csv: user ") and said.count("\n") == 1
    assert said.endswith(
        f" may not read or write it: give it the rights (`ls -ld` shows them) or name another place, {GO_ON} "
        "(Permission denied)\n"
    )


def test_settings_that_may_not_be_read(ordinary_user, capsys):
    Path("params.yaml").chmod(0)
    said = stopped(write, capsys)
    assert said.startswith("error: params.yaml: user ") and "may not read or write it" in said


def test_a_table_of_another_user(ordinary_user, capsys):
    Path("data/other").mkdir(mode=0)
    said = stopped(lambda _: Path("data/other/test.parquet").read_bytes(), capsys)
    assert said.startswith("error: data/other/test.parquet: user ")


def test_a_full_disk(project, capsys):
    def fill(_settings) -> None:
        with open("/dev/full", "w") as sink:
            sink.write("x")

    said = stopped(fill, capsys)
    assert said == f"error: a file: no space is left: free some, {GO_ON} (No space left on device)\n"


def test_a_file_where_a_folder_should_be(project, capsys):
    (project / "data").rmdir()
    (project / "data").write_text("x")
    said = stopped(write, capsys)
    assert said.startswith("error: data/out.csv: ") and said.count("\n") == 1


def test_links_in_a_circle_and_files_that_are_not_there(project, capsys):
    (project / "a").symlink_to("b")
    (project / "b").symlink_to("a")
    assert stopped(lambda _: Path("a").read_text(), capsys) == (
        f"error: a: links lead in a circle: mend them, {GO_ON} (Too many levels of symbolic links)\n"
    )
    assert stopped(lambda _: Path("data/trials.parquet").read_bytes(), capsys) == (
        "error: data/trials.parquet: no such file; `dvc repro` makes what stages leave to each other\n"
    )


def test_a_table_of_the_stage_before_is_named_with_what_makes_it(project, capsys):
    """Arrow says the name and nothing else."""
    assert stopped(lambda _: pq.read_table("data/lost.parquet"), capsys) == (
        "error: data/lost.parquet: no such file; `dvc repro` makes what stages leave to each other\n"
    )


def test_every_fault_that_a_machine_may_have_is_told_without_a_trace(project, capsys):
    for number in (errno.EROFS, errno.EDQUOT, errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG):

        def fail(_settings, number=number) -> None:
            raise OSError(number, os.strerror(number), "data/x")

        said = stopped(fail, capsys)
        assert said.startswith("error: data/x: ") and said.count("\n") == 1 and "Traceback" not in said


def test_memory_that_runs_out_is_one_line(project, capsys):
    assert stopped(lambda _: bytearray(2**62), capsys).startswith("error: memory ran out in the driver; close other")


def test_settings_that_are_no_text(project, capsys):
    (project / "params.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(SystemExit) as caught:
        run_stage(write, needs_model=False)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: params.yaml: no text in UTF-8 (byte 7); save it as UTF-8\n"


def test_a_fault_of_ours_keeps_its_trace_and_says_so(project, capsys):
    said = stopped(lambda _: {}["a key that is not there"], capsys)
    assert said.startswith("Traceback (most recent call last):") and "KeyError: 'a key that is not there'" in said
    assert said.endswith(f"\nerror: {OUR_FAULT}\n")


def test_what_a_user_can_mend_has_no_trace(project, capsys):
    def refuse(_settings) -> None:
        raise UserError("file.parquet: row 3: column 'answer' is empty; mend the row")

    assert stopped(refuse, capsys) == "error: file.parquet: row 3: column 'answer' is empty; mend the row\n"
