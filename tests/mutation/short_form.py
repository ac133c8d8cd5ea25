"""Changes of the source and what they remake: the short form of ``make mutation``, and edits with known meaning.

Not collected with the suite yet: ``python -m pytest tests/mutation/short_form.py`` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOUDEST = '''
"""Tokens with the largest feature norm."""
from __future__ import annotations
from dataclasses import dataclass
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, top_indices
from nuwa.stage1.registry import register

@dataclass(frozen=True)
class Loudest:
    power: float = 2.0

@register("loudest", Loudest)
def select(signals: VisionSignals, keep: int, config: Loudest, seed: int = 0) -> Selection:
    return keep_unmerged(signals, top_indices(signals.features.float().norm(dim=-1) ** config.power, keep))
'''
EDITS = {
    "a new method, as docs/adding_a_method.md asks for": ("nuwa/stage1/loudest.py", "", LOUDEST),
    "an error reworded": ("nuwa/vlm/adapter.py", "the model has no token that ends", "no token of the model ends"),
    "images decoded in grey": ("pipelines/features/images.py", '.convert("RGB")', '.convert("L").convert("RGB")'),
    "another seed of a branch": (
        "pipelines/sweep/answers.py",
        "limits, trial.spec.seed)",
        "limits, trial.spec.seed + 1)",
    ),
}
CHANGES = 5


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> dict:
    edits = tmp_path_factory.mktemp("edits") / "edits.json"
    keys = ("file", "old", "new")
    edits.write_text(json.dumps({name: dict(zip(keys, edit, strict=True)) for name, edit in EDITS.items()}))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutation", "--changes", str(CHANGES), "--seed", "7", "--edits", str(edits)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


def test_no_old_identity_stands_over_a_new_answer(tried):
    assert tried["changes"] == CHANGES
    assert tried["answered"] == tried["slots"] > 30, "all that is measured has an answer before anything is changed"
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
