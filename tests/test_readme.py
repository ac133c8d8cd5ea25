"""What the pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_path_of_the_tour_exists():
    tour = (ROOT / "README.md").read_text().split("### A tour of the code")[1].split("\n## ")[0]
    paths, folder = [], ""
    for name in re.findall(r"`([\w./]+)`", tour):
        folder = f"{Path(name).parent}/" if "/" in name.rstrip("/") else folder
        paths.append(name if "/" in name or name == "params.yaml" else folder + name)
    assert len(paths) > 12 and [path for path in paths if not (ROOT / path).exists()] == []
    assert len(re.findall(r"^\d+\. ", tour, re.MULTILINE)) == 10
