"""What a plan remembers of code: the same as walking it, and nothing of other files or of code from elsewhere."""

from __future__ import annotations

import shutil

import pytest

from nuwa.source import closure
from pipelines.features.encoding import encoding_code
from pipelines.features.known_code import PACKAGES, CodeMemory, known_code, remembered_code
from pipelines.sweep.identity import trial_code

NUWA = ("nuwa", "nuwa", ("attention_last_token",), (), "llava", "llama")


def no_walk():
    raise AssertionError("walked again")


def test_what_is_remembered_is_what_walking_says(tmp_path):
    walked = [trial_code.__wrapped__(*NUWA).parts, encoding_code.__wrapped__("llava")]
    with remembered_code(tmp_path):
        assert [trial_code.__wrapped__(*NUWA).parts, encoding_code.__wrapped__("llava")] == walked
    with remembered_code(tmp_path):
        assert trial_code.__wrapped__(*NUWA).parts == walked[0]
        assert known_code(("features", "llava"), no_walk) == walked[1]
    with pytest.raises(AssertionError, match="walked again"):
        known_code(("features", "llava"), no_walk)  # a sweep, which asks no memory


@pytest.mark.parametrize("edit", ["changed", "new", "gone"])
def test_other_files_are_walked_anew(tmp_path, edit):
    root, memory = tmp_path / "project", tmp_path / "memory"
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "one.py").write_text("answer = 1\n")
    known = CodeMemory(memory, root)
    known.of("a trial", lambda: {"nuwa.one:f": "digest"})
    known.save()
    assert CodeMemory(memory, root).of("a trial", no_walk) == known.of("a trial", no_walk)

    path = root / "pipelines" / "one.py"
    if edit == "changed":
        path.write_text("answer = 2\n")
    elif edit == "new":
        shutil.copy(path, path.with_name("two.py"))
    else:
        path.unlink()
    with pytest.raises(AssertionError, match="walked again"):
        CodeMemory(memory, root).of("a trial", no_walk)


def of_a_plugin():
    """Code from elsewhere: this file's."""


def test_code_from_elsewhere_is_not_remembered(tmp_path):
    known = CodeMemory(tmp_path)
    assert known.of("a plug-in's trial", lambda: closure([of_a_plugin]))
    with pytest.raises(AssertionError, match="walked again"):
        known.of("a plug-in's trial", no_walk)


def test_a_memory_that_is_damaged_or_cannot_be_kept_is_walked_anew(tmp_path):
    with remembered_code(tmp_path):
        walked = encoding_code.__wrapped__("llava")
    (memo,) = tmp_path.glob("*.code.json")
    memo.write_text(memo.read_text()[:-9])
    with remembered_code(tmp_path):
        assert encoding_code.__wrapped__("llava") == walked
    (tmp_path / "a file").touch()
    with remembered_code(tmp_path / "a file"):
        assert encoding_code.__wrapped__("llava") == walked
