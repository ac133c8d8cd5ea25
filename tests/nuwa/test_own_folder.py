"""What stands in the place of a folder whose name can be foretold."""

from __future__ import annotations

import os
import stat

import pytest

from nuwa.own_folder import UnsafeFolder, own_folder
from nuwa.vlm.checkpoint import keep_json, read_checkpoint
from pipelines.features import store

REMEDY = "; remove it, or set TMPDIR to a folder of your own"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_its_user_alone_and_one_of_old_is_closed(tmp_path):
    for path in (tmp_path / "new", tmp_path / "old"):
        if path.name == "old":
            path.mkdir()
            path.chmod(0o755)
        assert own_folder(path) == path and mode(path) == 0o700


def test_one_that_cannot_be_made_is_left_to_who_writes_there(tmp_path):
    (tmp_path / "file").touch()
    assert own_folder(tmp_path / "file") == tmp_path / "file"
    assert own_folder(tmp_path / "file" / "below") == tmp_path / "file" / "below"
    keep_json(tmp_path / "file" / "below" / "memo.json", {})


def traps(tmp_path):
    """Path → what is wrong with it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    return {
        "link": "is a link",
        "dangling": "is a link",
        "open": "may be written to by others (mode 777)",
    }


def test_a_trap_is_refused_in_one_line_by_all_who_keep_something_there(tmp_path, monkeypatch):
    for name, wrong in traps(tmp_path).items():
        place = tmp_path / name
        monkeypatch.setattr(store, "SHARD_CACHE", place)
        for use in (
            lambda place=place: own_folder(place),
            lambda place=place: keep_json(place / "memo.json", {}),
            lambda place=place: read_checkpoint(tmp_path, place),
            lambda: store.make_room(1),
            lambda: store.FeatureStore("memory://somewhere", "identity"),
        ):
            with pytest.raises(UnsafeFolder) as refused:
                use()
            assert str(refused.value) == f"{place} {wrong}{REMEDY}"
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "nowhere").exists()


def test_another_users_is_refused(tmp_path, monkeypatch):
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(UnsafeFolder) as refused:
        own_folder(tmp_path)
    assert str(refused.value) == f"{tmp_path} belongs to user {own}, not to {own + 1}{REMEDY}"
