"""The report's section on a search against the files it was made of."""

from __future__ import annotations

import json
import shutil

import lxml.html
import numpy as np
import pandas as pd
import pytest

from pipelines.report.inputs import ReportInputs, SearchRecord
from pipelines.report.outcomes import Outcomes
from pipelines.report.page import build_report
from pipelines.report.search import missed_front, search_section
from pipelines.scores.front import pareto_front

FAMILIES = ("grounding", "vqa")
SUMMARY = {
    "confidence": 0.95,
    "cost": "average_tokens",
    "rungs": [
        {"rung": 1, "images": 5, "trials": 40, "stopped": 20, "answers": 600},
        {"rung": 2, "images": 10, "trials": 20, "stopped": 0, "answers": 1200},
    ],
    "answers": 1200,
    "full_answers": 2400,
}


def raced(data, stopped=()):
    """The table of a race on the run in ``data`` in which ``stopped`` stopped after the first rung."""
    trials, scores = (pd.read_parquet(data / f"{name}.parquet") for name in ("trials", "scores"))
    means = scores[scores["benchmark"] == "mean"].set_index(["trial_id", "family"])
    table = trials[["trial_id", "label", "method", "position"]].assign(cost=trials["average_tokens"].astype(float))
    table["rung"] = np.where(table["trial_id"].isin(stopped), 1, 2)
    table["images"], table["answers"] = table["rung"] * 5, table["rung"] * 30
    for family in FAMILIES:
        rows = means.loc[[(trial_id, family) for trial_id in table["trial_id"]]]
        for column, source in ((family, "score"), (f"{family}_low", "low"), (f"{family}_high", "high")):
            table[column] = rows[source].to_numpy()
        here = table["rung"] == 2
        table[f"{family}_front"] = False
        table.loc[here, f"{family}_front"] = pareto_front(
            table.loc[here, family].to_numpy(), table.loc[here, "cost"].to_numpy()
        )
        table[f"{family}_beaten_by"] = np.where(here, None, table.loc[here, "trial_id"].iloc[0])
    return table


def swarm():
    def row(number, state, trial_id, objective, **point):
        values = {f"{family}{end}": objective for family in FAMILIES for end in ("", "_low", "_high")}
        seen = {f"unseen_{name}": value - 0.1 for name, value in values.items()} if state != "stopped" else {}
        numbers = {"number": number, "rung": 2, "images": 10, "objective": objective}
        return {**numbers, "state": state, "trial_id": trial_id, "point": json.dumps(point), **values, **seen}

    return pd.DataFrame(
        [
            row(None, "preset", "p", 0.70, stage2_layer=5, **{"parameters.pillar_quantile": 0.55}),
            row(0, "finished", "a", 0.60, stage2_layer=4, **{"parameters.pillar_quantile": 0.25}),
            row(1, "stopped", "b", 0.95, stage2_layer=2, **{"parameters.pillar_quantile": 0.5}),
            row(2, "finished", "c", 0.80, stage2_layer="off", **{"parameters.pillar_quantile": 0.125}),
            row(3, "finished", "c", 0.80, stage2_layer="off", **{"parameters.pillar_quantile": 0.126}),
        ]
    )


SWARM = {"method": "nuwa", "preset": "paper", "position": "pesp", "budget": 16.0, "objective": "mean"}
SWARM |= {"points": 4, "trials": 3, "answers": 150, "full_answers": 180, "unseen_images": 7}


def write(folder, table, points=None, summary=SUMMARY):
    folder.mkdir(parents=True)
    table.to_csv(folder / "trials.csv", index=False)
    if points is not None:
        points.to_csv(folder / "swarm.csv", index=False)
        summary = summary | {"swarm": SWARM}
    (folder / "search.json").write_text(json.dumps(summary))


@pytest.fixture
def outcomes(full_run):
    return Outcomes(ReportInputs.load(full_run))


def on_the_front(table):
    return table[table[[f"{family}_front" for family in FAMILIES]].any(axis=1) & (table["method"] != "unpruned")]


def test_the_sentence_says_whether_the_front_is_the_full_grids(full_run, outcomes):
    whole = raced(full_run)
    best, rest = on_the_front(whole).iloc[0], whole[~whole["trial_id"].isin(on_the_front(whole)["trial_id"])]
    loser = rest[rest["method"] != "unpruned"].iloc[0]["trial_id"]
    start = "The search asked 1,200 of 2,400 answers (50.0 %)"

    def sentence(table):
        return search_section(SearchRecord(table, None, SUMMARY), outcomes).sentence

    assert sentence(raced(full_run, [loser])) == f"{start} and found the same front as the full grid."
    missed = raced(full_run, [loser, best["trial_id"]])
    assert sentence(missed) == f"{start} and missed 1 of the full grid's front: {best['label']}."
    other = f"{start}; it is of other trials or answers than this run, so the fronts are not compared."
    assert sentence(whole.iloc[:-1]) == other
    moved = whole.assign(vqa=whole["vqa"] + 1e-6)
    assert sentence(moved) == other
    assert missed_front(SearchRecord(whole, None, SUMMARY), outcomes, list(FAMILIES)) == []


def test_the_page_shows_every_trials_race_and_the_best_points_beside_the_preset(small_run, small_report, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_run, data)
    table = raced(data)
    loser = table[~table["trial_id"].isin(on_the_front(table)["trial_id"])].iloc[1]["trial_id"]
    table = raced(data, [loser])
    write(data / "search", table, swarm(), SUMMARY | {"fingerprints": {"model": "this model"}})
    build_report(ReportInputs.load(data, {"model": "this model"}), tmp_path / "with", 16)
    before, after = (
        lxml.html.fromstring((folder / "index.html").read_text()) for folder in (small_report, tmp_path / "with")
    )
    assert not before.xpath("//section[@id='search']")
    (section,) = after.xpath("//section[@id='search']")
    races, points = section.xpath(".//table")
    assert len(section.xpath(".//figure//svg")) == 2
    rows = [[" ".join(cell.text_content().split()) for cell in line] for line in races.xpath(".//tbody/tr")]
    assert len(rows) == len(table)
    by_id = table.set_index("trial_id")
    assert rows[-1][:3] == [" ".join(by_id.loc[loser, "label"].split()), "1", "30"]
    assert rows[-1][-1] == by_id.loc[by_id.loc[loser, "vqa_beaten_by"], "label"]
    assert rows[0][5:] == ["Grounding, VQA", ""], "the unpruned model is on both fronts"
    cells = [[cell.text_content() for cell in line] for line in points.xpath(".//tbody/tr")]
    assert [[line[0], *line[5:]] for line in cells] == [
        ["Preset", "5", "0.55"],
        ["Point 2", "off", "0.125"],
        ["Point 0", "4", "0.25"],
    ], "finished ones by objective, each trial once"
    assert [line[1][:4] for line in cells] == ["70.0", "80.0", "60.0"]
    assert [line[3][:4] for line in cells] == ["60.0", "70.0", "50.0"]
    assert "1 stopped early, so 150 of 180 answers (83.3 %) were asked" in section.text_content()
    assert "on 7 other images" in points.text_content()
    markdown = (tmp_path / "with" / "report.md").read_text()
    assert "## Search" in markdown and "figures/search.png" in markdown
    assert "| Point 2 | off | 0.125 | 80.0 [80.0, 80.0] |" in markdown
    assert (tmp_path / "with" / "figures" / "search.png").stat().st_size > 10_000


def test_a_search_of_another_model_is_not_on_the_page(small_run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_run, data)
    write(data / "search", raced(data), swarm(), SUMMARY | {"fingerprints": {"model": "another model"}})
    build_report(ReportInputs.load(data, {"model": "this model"}), tmp_path / "report", 16)
    page = lxml.html.fromstring((tmp_path / "report" / "index.html").read_text())
    assert not page.xpath("//section[@id='search']")


def test_a_search_without_points_and_one_without_other_images(small_run, tmp_path):
    for name, points, expected in (("race", None, 1), ("few", swarm(), 2)):
        data = tmp_path / name
        shutil.copytree(small_run, data)
        write(data / "search", raced(data), points)
        if points is not None:
            summary = json.loads((data / "search" / "search.json").read_text())
            summary["swarm"]["unseen_images"] = 0
            (data / "search" / "search.json").write_text(json.dumps(summary))
        build_report(ReportInputs.load(data), tmp_path / f"{name} report", 16)
        page = lxml.html.fromstring((tmp_path / f"{name} report" / "index.html").read_text())
        (section,) = page.xpath("//section[@id='search']")
        assert len(section.xpath(".//table")) == expected
        assert "other images" not in section.text_content()


def test_a_search_that_cannot_be_shown_is_refused(small_run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_run, data)
    folder = data / "search"
    write(folder, raced(data).drop(columns="rung"), swarm())
    with pytest.raises(ValueError) as raised:
        ReportInputs.load(data)
    assert str(raised.value) == f"{folder / 'trials.csv'} lacks rung; run `make search` to make it"
    raced(data).to_csv(folder / "trials.csv", index=False)
    (folder / "swarm.csv").unlink()
    with pytest.raises(ValueError) as raised:
        ReportInputs.load(data)
    assert str(raised.value).startswith(f"{folder / 'swarm.csv'} lacks number, state, trial_id")
    (folder / "search.json").write_text(json.dumps({"confidence": 0.95}))
    with pytest.raises(ValueError) as raised:
        ReportInputs.load(data)
    assert str(raised.value) == (
        f"{folder / 'search.json'} lacks cost, rungs, answers, full_answers; run `make search` to make it"
    )
