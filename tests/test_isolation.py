"""What a test file leaves behind is found by name, and files stand in the order in which they are to be dealt."""

from __future__ import annotations

from types import SimpleNamespace

from isolation import left_behind, state
from running_order import SECONDS, TESTS, pytest_collection_modifyitems

from nuwa.methods import RECIPES, Recipe
from nuwa.stage1 import METHODS
from nuwa.vlm import ADAPTERS


def test_what_is_registered_replaced_set_or_left_is_named(monkeypatch, tmp_path):
    before = state()
    assert left_behind(before, state()) == []
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS) | {"loudest": METHODS["nuwa"]})
    monkeypatch.setitem(RECIPES, "nuwa", Recipe("nuwa"))
    monkeypatch.delitem(ADAPTERS._entries, "llava")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert left_behind(before, state()) == [
        "$HF_HOME", "method 'nuwa'", "model type 'llava'", "stage-1 method 'loudest'", "the working directory",
    ]  # fmt: skip


def test_the_longest_files_come_first_and_all_of_them_exist():
    names = ["test_readme.py", *SECONDS, "test_packaging.py"]
    assert all((TESTS / name).is_file() for name in names)
    items = [SimpleNamespace(path=TESTS / name) for name in sorted(names)]
    pytest_collection_modifyitems(items)
    order = [item.path.relative_to(TESTS).as_posix() for item in items]
    assert order[:-2] == sorted(sorted(SECONDS), key=SECONDS.get, reverse=True)
    assert order[-2:] == ["test_packaging.py", "test_readme.py"]
