"""Charts hold the numbers they draw; the gallery shows the patches, boxes and answers of the files."""

from __future__ import annotations

import io
import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.report import charts
from pipelines.report.browser import questions
from pipelines.report.charts import (
    Panel,
    Point,
    draw_panel,
    forest,
    heatmap,
    line,
    panels_png,
    small_multiples,
    spread,
)
from pipelines.report.gallery import COLLECTOR, PILLAR, gallery, rows_of
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes
from pipelines.report.style import contrast, theme


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def test_heatmap_cells_hold_their_numbers_and_holes_a_dash():
    values = np.array([[0.311, np.nan], [0.5, 0.4204]])
    svg = draw_panel(heatmap("Grounding", ["random", "cosine"], ["2", "4"], values, ("scorer", "layer")), "h").svg
    found = texts(svg)
    assert {"31.1", "–", "50.0", "42.0", "random", "cosine", "2", "4", "scorer", "layer", "Grounding"} <= set(found)
    assert "<image" not in svg


def test_heatmap_of_holes_only_is_drawn():
    svg = draw_panel(heatmap("VQA", ["a"], ["b"], np.array([[np.nan]]), ("x", "y")), "h").svg
    assert "–" in texts(svg)


def test_forest_names_every_setting_with_its_number():
    points = [Point(0.0, "regions on", 0.748, 0.7, 0.8), Point(0.0, "regions <off>", 0.114)]
    found = texts(draw_panel(forest("Published: VQA", points, "#000000"), "f").svg)
    assert {"74.8", "11.4", "regions on", "regions &lt;off&gt;"} <= set(found)


def test_panels_are_the_same_bytes_every_time_and_carry_no_date():
    panel = line("t", [Point(0.1, "", 0.5, 0.4, 0.6), Point(0.2, "", 0.6, 0.5, 0.7)], "x", "#0072B2", marked=0.1)
    one, again = draw_panel(panel, "a"), draw_panel(panel, "a")
    assert one.svg == again.svg
    assert panels_png([one, one, one]) == panels_png([again, again, again])
    assert "date" not in one.svg.lower()
    picture = Image.open(io.BytesIO(panels_png([one, one, one])))
    assert not picture.text
    assert picture.size == (2 * one.pixels.width, 2 * one.pixels.height)


def test_colours_of_a_chart_are_the_pages_variables_and_a_heat_maps_are_its_own():
    """A dark page defines them anew; text on a pale cell has to stay dark."""
    curve = draw_panel(line("t", [Point(0.1, "", 0.5), Point(0.2, "", 0.6)], "x", "#0072B2", marked=0.1), "a").svg
    assert {"var(--m-0072b2)", "var(--ink)", "var(--muted)", "var(--rule)"} <= set(re.findall(r"var\(--[^)]+\)", curve))
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href="|id="|url\()#?\w+', "", curve))
    cells = draw_panel(heatmap("t", ["a"], ["b", "c", "d"], np.array([[0.1, 0.9, np.nan]]), ("x", "y")), "h").svg
    fills = [re.search('fill: ([^;"]+)', tag)[1] for tag in re.findall(r"<text[^>]*>(?=10\.0|90\.0|–)", cells)]
    assert sorted(fills) == ["#101014", "#ffffff", "var(--muted)"], "a hole lies on the page itself"


def test_small_multiples_have_a_panel_a_selection_and_a_name_at_every_line(full_run):
    outcomes = Outcomes(ReportInputs.load(full_run))
    names = list(dict.fromkeys(outcomes.name(trial) for trial in outcomes.main))
    for family in ("grounding", "vqa"):
        panels = small_multiples(outcomes, family)
        assert [panel.title for panel in panels] == names
        for panel, name in zip(panels, names, strict=True):
            drawn = draw_panel(panel, "m")
            own = {trial.position.upper() for trial in outcomes.main if outcomes.name(trial) == name}
            assert {text for text in texts(drawn.svg) if text.isupper()} == own
            assert name in texts(drawn.svg) and drawn.overlaps == []


def test_of_more_selections_than_can_be_told_apart_each_methods_first_has_a_panel(full_run, monkeypatch):
    outcomes = Outcomes(ReportInputs.load(full_run))
    monkeypatch.setattr(charts, "MOST_SERIES", 3)
    panels = small_multiples(outcomes, "vqa")
    first = {trial.method: outcomes.name(trial) for trial in reversed(outcomes.main)}
    assert sorted(panel.title for panel in panels) == sorted(first.values())


def test_labels_that_touch_are_told():
    apart = [Point(0.0, "first", 0.5), Point(0.0, "second", 0.6)]
    assert draw_panel(forest("t", apart, "#0072B2"), "f").overlaps == []

    def draw(ax):
        ax.text(0.5, 0.5, "one", transform=ax.transAxes)
        ax.text(0.51, 0.5, "other", transform=ax.transAxes)

    assert draw_panel(Panel("t", draw), "o").overlaps == [("one", "other")]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_seen_and_read_on_either_screen(dark):
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme(dark)))
    text = [name for name in colors if name.startswith("t-")]
    assert len(text) >= 25
    for name in (*text, "ink", "muted", "published", "accent", "ahead", "behind"):
        assert contrast(colors[name], colors["paper"]) >= 4.5, name
        assert contrast(colors[name], colors["faint"]) >= 4.5, name
    assert contrast(colors["ink"], colors["best"]) >= 4.5 and contrast(colors["muted"], colors["best"]) >= 4.5
    if dark:  # on a light screen the palette is as it was published
        assert all(contrast(colors[name], colors["paper"]) >= 3 for name in colors if name.startswith("m-"))


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=12).map(sorted),
    st.floats(0.5, 8),
)
def test_spread_keeps_order_distance_and_bounds(values, gap):
    placed = spread(values, gap, 0.0, 100.0)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1e-6
    assert placed[-1] <= 100 + 1e-6


def test_spread_moves_only_what_touches():
    assert spread([0.0, 10.0, 20.0], 2.0, 0.0, 100.0) == [0.0, 10.0, 20.0]
    assert spread([50.0, 50.0, 90.0], 4.0, 0.0, 100.0) == [48.0, 52.0, 90.0]
    assert spread([99.0, 100.0], 4.0, 0.0, 100.0) == [96.0, 100.0]


@pytest.fixture
def duel(synthetic, tmp_path):
    """Nüwa against Random on two images: ``answer`` sets what a method says about an example."""
    run = synthetic(images=2)
    run.add("nuwa", "released", "pesp", 16, (0.5, 0.9), ("main",), layer=4, scorer="attention_last_token")
    run.add("random", "default", "pesp", 16, (0.5, 0.9), ("main",))
    nuwa, random = (trial["trial_id"] for trial in run.trials[1:])
    truths = {example["example_id"]: json.loads(example["truth"]) for example in run.examples}
    right = {}
    for name, truth in truths.items():
        right[name] = json.dumps(truth["box"]) if "box" in truth else truth.get("answer", "5")
    answers = {(trial, name): right[name] for trial in (nuwa, random) for name in truths}
    run.answers, run.ids, run.right = answers, (nuwa, random), right

    def cases():
        for row in run.predictions:
            row["prediction"] = answers.get((row["trial_id"], row["example_id"]), row["prediction"])
        inputs = ReportInputs.load(run.write(tmp_path / "data"))
        return gallery(inputs, Outcomes(inputs), 16)

    run.cases = cases
    return run


def test_cases_show_both_outcomes(duel):
    nuwa, random = duel.ids
    duel.answers[random, "refcocog:001"] = "[0.9, 0.9, 0.95, 0.95]"
    duel.answers[nuwa, "refcoco:002"] = "no idea"
    cases = {case.example_id: case for case in duel.cases()}
    assert list(cases) == ["refcocog:001", "refcoco:002"]  # the two images, each once
    assert [(p.title, p.answer, p.right) for p in cases["refcocog:001"].pictures[1:]] == [
        ("Nüwa PESP", "IoU 1.00", True),
        ("Random PESP", "IoU 0.00", False),
    ]
    assert [(p.title, p.answer, p.right) for p in cases["refcoco:002"].pictures[1:]] == [
        ("Nüwa PESP", "no box: no idea", False),
        ("Random PESP", "IoU 1.00", True),
    ]


def test_questions_are_judged_by_their_benchmark(duel):
    """EvalAI's normalisation makes ``The five.`` right; without boxes, the most different answers are shown."""
    nuwa, random = duel.ids
    for example in duel.examples:
        if example["family"] == "grounding":
            example["width"] = 97  # not square: not shown
    duel.answers[nuwa, "textvqa:001"] = "The five."
    duel.answers[random, "textvqa:001"] = "6 or so"
    case = duel.cases()[0]
    assert (case.example_id, case.truth) == ("textvqa:001", "5")
    assert [(picture.answer, picture.right) for picture in case.pictures[1:]] == [
        ("The five.", True),
        ("6 or so", False),
    ]


@pytest.mark.parametrize("change", [{"width": 97}, {"image": "a+b"}], ids=["no square", "several in each question"])
def test_where_no_picture_can_be_shown_there_are_no_cases_and_nothing_to_browse(duel, tmp_path, change):
    for example in duel.examples:
        example.update(change)
    assert duel.cases() == []
    inputs = ReportInputs.load(tmp_path / "data")
    assert questions(inputs, Outcomes(inputs), 16) == []


def test_kept_patches_keep_their_pixels_and_roles_their_outline(duel):
    nuwa, random = duel.ids
    duel.answers[random, "refcoco:001"] = "[0.4, 0.0, 0.5, 0.05]"
    image = duel.images[0]["image"]
    for row in duel.kept:
        if row["image"] == image and row["trial_id"] == nuwa:
            row["indices"], row["pillar"] = np.array([0, 11, 12]), np.array([True, False, True])
        if row["image"] == image and row["trial_id"] == random:
            row["indices"], row["pillar"] = np.array([0, 143]), np.array([True, True])
    for row in duel.predictions:
        if row["example_id"].endswith(":001") and row["trial_id"] in duel.ids:
            row["kept_final"] = [0, 11, 12] if row["trial_id"] == nuwa else [0]
    case = duel.cases()[0]
    assert case.example_id == "refcoco:001"
    assert [picture.tokens for picture in case.pictures] == ["", "3 tokens", "2 → 1 tokens"]
    plain, roles, bare = (np.asarray(Image.open(io.BytesIO(picture.png)), dtype=int) for picture in case.pictures)
    assert plain.shape == (288, 288, 3)
    assert tuple(roles[0, 0]) == PILLAR
    assert tuple(roles[0, 287]) == COLLECTOR
    assert tuple(roles[24, 0]) == PILLAR
    assert (roles[2:22, 2:22] == plain[2:22, 2:22]).all()
    assert (bare[264:288, 264:288] == plain[264:288, 264:288]).all()  # kept, without a role, dropped by stage 2: plain
    assert (bare[12, 12] == 255).all()  # the token alive in the last layer has its dot
    faded = 0.2 * plain[264:288, 0:24] + 0.8 * 255
    assert np.abs(roles[264:288, 0:24] - faded).max() <= 1


def test_of_a_method_that_reads_the_question_the_tokens_of_this_answer_are_shown(duel):
    """It has no row an image: what it kept was another question's too."""
    nuwa, random = duel.ids
    duel.answers[random, "refcoco:001"] = "[0.4, 0.0, 0.5, 0.05]"
    duel.kept = [row for row in duel.kept if row["trial_id"] != nuwa]
    for row in duel.predictions:
        if row["trial_id"] == nuwa:
            row["kept_final"] = [0, 11, 12] if row["example_id"] == "refcoco:001" else [5]
    case = duel.cases()[0]
    assert case.example_id == "refcoco:001" and case.pictures[1].tokens == "3 tokens"
    plain, own = (np.asarray(Image.open(io.BytesIO(picture.png)), dtype=int) for picture in case.pictures[:2])
    cells = np.abs(own - plain).reshape(12, 24, 12, 24, 3)[:, 8:16, :, 8:16].max(axis=(1, 3, 4))
    assert (cells[0, 0], cells[0, 11], cells[1, 0]) == (0, 0, 0), "kept"
    assert cells[0, 5] > 50 and (cells > 50).sum() > 100, "another question's token fades like all others"


def test_the_first_picture_is_the_image_enlarged_by_whole_pixels(duel):
    duel.answers[duel.ids[1], "refcoco:001"] = "none"
    case = duel.cases()[0]
    original = np.asarray(Image.open(io.BytesIO(duel.images[0]["bytes"])))
    shown = np.asarray(Image.open(io.BytesIO(case.pictures[0].png)))
    box = json.loads(duel.examples[0]["truth"])["box"]
    untouched = np.ones((96, 96), dtype=bool)
    left, top, right, bottom = (round(96 * value) for value in box)
    untouched[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = False
    assert (shown.reshape(96, 3, 96, 3, 3)[:, 1, :, 2][untouched] == original[untouched]).all()


def test_datasets_may_live_in_memory(duel, tmp_path):
    """The gallery filters Arrow datasets; where they come from makes no difference."""
    duel.answers[duel.ids[1], "refcoco:001"] = "none"
    from_files = duel.cases()
    tables = duel.frames()
    inputs = ReportInputs(
        **{name: tables[name].to_pandas() for name in ("trials", "scores", "comparisons", "groups", "examples")},
        **{name: ds.dataset(tables[name]) for name in ("predictions", "kept", "images")},
    )
    assert gallery(inputs, Outcomes(inputs), 16) == from_files


def test_photographs_of_which_none_is_square_leave_no_row():
    """On COCO's images a model of one fixed grid pads, and nothing is drawn: no image is looked for."""
    table = pa.table({"image": ["a", "b"], "bytes": [b"1", b"2"]})
    assert rows_of(ds.dataset(table), "image", set()).empty
    assert rows_of(ds.dataset(table), "image", {"b"})["bytes"].tolist() == [b"2"]
