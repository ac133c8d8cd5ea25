"""What is said of the methods: as values, and as the page and the references beside it."""

from __future__ import annotations

import re
from pathlib import Path

import nuwa
from nuwa.catalogue import STAGES, page
from nuwa.methods import RECIPES, preset_values, specify

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = re.compile(r"^@\w+\{(\w+),$", re.MULTILINE)
OWN_CHOICES = {"unpruned", "random", "uniform", "pooling", "downsample"}  # of no paper


def test_the_page_is_what_the_code_says():
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == page(), "run python -m nuwa.catalogue > docs/methods.md"


def test_every_method_is_listed_with_presets_and_what_it_reads_and_cites():
    known = {one.name: one for one in nuwa.methods()}
    assert list(known) == sorted(RECIPES)
    assert all(one.about and one.stage in STAGES for one in known.values())
    assert {one.name for one in known.values() if not one.cite} == OWN_CHOICES
    assert known["nuwa"].presets["released"] == preset_values("nuwa", "released")
    assert known["holov"].reads == ("features", "cls_attention", "projected")
    assert known["dart"].parameters["image_pivots"] == 4 and known["dart"].stage == STAGES[1]
    assert known["vscan"].scorers == ("attention_last_token_next_layer",) and known["vscan"].stage == STAGES[2]
    assert {name for name, one in known.items() if one.trained} == {"learnpruner"}
    asking = {name for name, one in known.items() if one.text_aware}
    assert {"cdpruner", "dart", "fastv", "nuwa"} <= asking and not {"holov", "random", "vtw"} & asking


def test_the_listing_is_called_by_the_modules_own_name():
    assert nuwa.methods.specify is specify


def test_references_are_those_that_are_cited():
    entries = ENTRY.findall((DOCS / "references.bib").read_text(encoding="utf-8"))
    cited = {key for one in nuwa.methods() for key in one.cite}
    assert len(entries) == len(set(entries))
    assert set(entries) == cited | {"gap"}, "gap is a position strategy's"
