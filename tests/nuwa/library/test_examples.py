"""The examples of README.md and docs/models.md run as they stand, on the testbed's model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import nuwa

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def given(scenes, tmp_path, monkeypatch):
    """The names that the pages take for granted."""
    images = [Image.fromarray(scene.image) for scene in scenes[:2]]
    images[0].save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return {"path": str(ROOT / "models/testbed"), "images": images, "questions": ["what digit is blue?", "is it red?"]}


def test_the_pages_examples_run(given, capsys):
    models = examples("docs/models.md")
    assert len(models) == 3
    for number, code in enumerate([*models, *examples("README.md")]):
        exec(compile(code, f"example {number}", "exec"), given)
    assert len(given["answers"]) == 2 and given["answer"].text
    printed = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in printed] == ["0 0", "1 0"] and "Generation(" in printed[0]
    assert isinstance(given["one"].answer, nuwa.Generation)
