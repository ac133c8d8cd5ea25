"""Every setting carries its meaning beside it, and docs/params.md's tables name every key, and no other."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipelines import settings
from pipelines.axes import AXES
from pipelines.settings import GridBlock, Section, Settings, SpaceSettings, SwarmSettings

PAGE = (Path(__file__).parents[2] / "docs" / "params.md").read_text(encoding="utf-8")
SECTIONS = [
    value
    for _, value in inspect.getmembers(settings, inspect.isclass)
    if issubclass(value, Section) and value not in (Section, settings.GridEntry)
]


def described(section: type[BaseModel]) -> dict[str, str]:
    """Field → the string that stands below it."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: below.value.value
        for field, below in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def table(heading: str) -> set[str]:
    """Keys of the table below a heading; ``.b`` behind ``a.x`` is ``a.b``."""
    rows = PAGE.partition(f"{heading}\n")[2].partition("\n## ")[0]
    keys = set()
    for cell in re.findall(r"^\| (`.*?`) \|", rows, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        home = first.rpartition(".")[0]
        keys |= {first, *(home + key if key.startswith(".") else key for key in others)}
    return keys


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_its_meaning_beside_it(section):
    own = set(inspect.get_annotations(section)) - {"model_config"}
    said = described(section)
    assert set(said) == own
    assert all(text.endswith(".") and len(text.split()) > 1 for text in said.values())


def test_the_page_names_every_key_and_no_other():
    hints = typing.get_type_hints(Settings)
    sections = {name: kind for name, kind in hints.items() if inspect.isclass(kind) and issubclass(kind, Section)}
    keys = {f"{name}.{field}" for name, kind in sections.items() for field in kind.model_fields}
    keys |= set(Settings.model_fields) - set(sections)

    documented = table("# params.yaml")
    whole = {key.removesuffix(".*") for key in documented if key.endswith(".*")}
    assert {key for key in documented if not key.endswith(".*")} == {
        key for key in keys if key.partition(".")[0] not in whole
    }
    assert whole <= set(sections)


def test_the_page_names_every_key_of_a_block_and_of_a_swarm():
    assert table("## A block of trials") == {*GridBlock.model_fields, *AXES}
    assert table("## A swarm search") == set(SwarmSettings.model_fields)
    assert all(f"`{name}`" in PAGE.partition("## A swarm search")[2] for name in SpaceSettings.model_fields)
