"""Changes of the source and what they remake: the short form of ``make mutation``, and edits with known meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mutation.__main__ import parsed, run
from mutation.changes import Change
from mutation.verdicts import verdict

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
LOUDEST = re.search(r"```python\n# nuwa/stage1/loudest.py\n(.*?)```", GUIDE, re.DOTALL).group(1)
EDITS = {
    "a new method, as docs/adding_a_method.md asks for": ("nuwa/stage1/loudest.py", "", LOUDEST),
    "an error reworded": ("nuwa/vlm/adapter.py", "the model has no token that ends", "no token of the model ends"),
    "images decoded in grey": (
        "nuwa/images.py",
        'image.convert("RGB") if image.mode != "RGB" else image.copy()',
        'image.convert("L").convert("RGB")',
    ),
    "another seed of a branch": (
        "pipelines/sweep/answers.py",
        "limits, trial.spec.seed)",
        "limits, trial.spec.seed + 1)",
    ),
}
CHANGES = 4


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> dict:
    """The changes and edits above, on one family of models and a trial of every kind."""
    edits = tmp_path_factory.mktemp("edits") / "edits.json"
    keys = ("file", "old", "new")
    edits.write_text(json.dumps({name: dict(zip(keys, edit, strict=True)) for name, edit in EDITS.items()}))
    chosen = ["--changes", str(CHANGES), "--seed", "7", "--edits", str(edits), "--families", "llava", "--small"]
    return run(parsed(chosen))


def test_no_old_identity_stands_over_a_new_answer(tried):
    assert tried["changes"] == CHANGES
    assert tried["answered"] == tried["slots"] > 8, "all that is measured has an answer before anything is changed"
    assert tried["stale"] == []
    assert tried["strayed"] == []


@pytest.mark.parametrize("edit", ["a new method, as docs/adding_a_method.md asks for", "an error reworded"])
def test_what_changes_no_answer_remakes_none(tried, edit):
    assert tried["edits"][edit] == {"changed": 0, "slots": tried["slots"], "features": False}


def test_images_read_otherwise_are_encoded_and_asked_again(tried):
    assert tried["edits"]["images decoded in grey"] == {
        "changed": tried["slots"],
        "slots": tried["slots"],
        "features": True,
    }


def test_trials_seeded_otherwise_are_asked_again_on_the_same_features(tried):
    assert tried["edits"]["another seed of a branch"] == {
        "changed": tried["slots"],
        "slots": tried["slots"],
        "features": False,
    }


SLOTS = {
    "llava nuwa": {"family": "llava", "module": "nuwa.stage1.nuwa", "scorers": [], "options": []},
    "llava fastv": {
        "family": "llava",
        "module": "nuwa.stage1.unpruned",
        "scorers": ["nuwa.stage2.scorers:attention_last_token"],
        "options": [],
    },
}


@pytest.mark.parametrize(
    ("file", "ids", "answers", "stale", "strayed"),
    [
        ("nuwa/stage1/nuwa.py", ["new", "old"], ["1", "1"], [], []),
        ("nuwa/stage1/nuwa.py", ["new", "new"], ["1", "1"], [], ["llava fastv"]),
        ("nuwa/stage1/nuwa.py", ["old", "old"], ["2", "1"], ["llava nuwa"], []),
        ("nuwa/vlm/qwen2_5_vl.py", ["old", "new"], ["1", "1"], [], ["llava fastv"]),
        ("nuwa/decoder/cuts.py", ["new", "new"], ["1", "1"], [], []),
        ("nuwa/decoder/cuts.py", ["old", "old"], ["1", "1"], [], []),
    ],
)
def test_a_verdict_names_stale_and_strayed_trials(file, ids, answers, stale, strayed):
    """The measure itself: an old identity over a new answer, and a change of another's file, are told."""
    before = {name: slot | {"id": "old", "answers": "1" * 64} for name, slot in SLOTS.items()}
    found = zip(SLOTS.items(), ids, answers, strict=True)
    after = {name: slot | {"id": of, "answers": said * 64} for (name, slot), of, said in found}
    told = verdict(Change(file, 1, 0, "a", "b"), "a = 1", before, after)
    assert (told["stale"], told["strayed"]) == (stale, strayed)
