"""The written report against the files it was made of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import lxml.html
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.report.inputs import COLUMNS, ReportInputs
from pipelines.report.page import build_report, markdown_text

ORDER = ("refcoco", "refcocoplus", "refcocog", "pope", "gqa", "textvqa")


def read_page(report: Path) -> lxml.html.HtmlElement:
    return lxml.html.fromstring((report / "index.html").read_text(encoding="utf-8"))


def cell_texts(row: lxml.html.HtmlElement) -> list[str]:
    """Every cell as ``number interval``."""
    return [" ".join(text.strip() for text in cell.itertext() if text.strip()) for cell in row.xpath("./td")]


def build(data: Path, output: Path, budget: float = 16, **provenance: str) -> Path:
    build_report(ReportInputs.load(data, provenance), output, budget)
    return output


def expected_cells(trial: pd.Series, scores: pd.DataFrame) -> list[str]:
    """The cells of a pruned trial's row from the files alone."""

    def text(row: pd.Series) -> str:
        return f"{100 * row['score']:.1f} {100 * row['low']:.1f}–{100 * row['high']:.1f}"

    mine = scores[(scores["trial_id"] == trial["trial_id"]) & scores["headline"]]
    means = mine[mine["benchmark"] == "mean"].set_index("family")
    single = mine[mine["benchmark"] != "mean"].set_index("benchmark")
    second = ["–" if pd.isna(trial[name]) else str(int(trial[name])) for name in ("stage2_keep", "stage2_layer")]
    return [
        *(text(means.loc[family]) for family in ("grounding", "vqa")),
        *(text(single.loc[benchmark]) for benchmark in ORDER),
        *(str(trial["stage1_keep"]), *second, f"{trial['average_tokens']:g}", f"{trial['flops'] / 1e9:.3g}"),
    ]


def test_every_number_of_the_budget_tables_is_the_files(full_run, full_report):
    trials, scores = (pd.read_parquet(full_run / f"{name}.parquet") for name in ("trials", "scores"))
    main = trials[trials["grids"].map(lambda grids: "main" in grids) & (trials["method"] != "unpruned")]
    page = read_page(full_report)
    for budget, mine in main.groupby("budget"):
        rows = page.xpath(f'//table[@data-budget="{budget:g}"]/tbody/tr')
        assert "unpruned" in rows[0].get("class")
        assert cell_texts(rows[0])[1:3] == ["100", "100"]
        assert sorted(row.get("data-trial") for row in rows[1:]) == sorted(mine["trial_id"])
        by_id = mine.set_index("trial_id", drop=False)
        for row in rows[1:]:
            trial = by_id.loc[row.get("data-trial")]
            position, *cells = cell_texts(row)
            assert position.split()[0] == trial["position"].upper()
            assert cells == expected_cells(trial, scores)


def test_a_pair_named_before_the_run_is_told_apart_from_the_others(full_run, full_report):
    pairs = pd.read_parquet(full_run / "comparisons.parquet")
    pairs = pairs[(pairs["question"] == "planned") & (pairs["budget"] == 16)].set_index("family")
    parts = [
        f"{name} −{abs(100 * row.difference):.1f} points [−{abs(100 * row.low):.1f}, −{abs(100 * row.high):.1f}], "
        f"p\u00a0<\u00a00.001, {row.verdict}"
        for name, row in (("Grounding", pairs.loc["grounding"]), ("VQA", pairs.loc["vqa"]))
    ]
    said = [line.text_content() for line in read_page(full_report).xpath('//section[@id="pairs"]/p')]
    assert (
        f"Named before the run: VisionZip (PERC) less Nüwa (paper) (PESP): {'; '.join(parts)}; "
        "p corrected for these 2 alone." in said
    )


def test_every_number_of_the_pairs_is_the_files(full_run, full_report):
    """Every other main trial of the headline budget, held against Nüwa as released."""
    trials = pd.read_parquet(full_run / "trials.parquet").set_index("trial_id")
    pairs = pd.read_parquet(full_run / "comparisons.parquet")
    pairs = pairs[(pairs["question"] == "against") & (pairs["budget"] == 16)]
    (reference,) = set(pairs["reference"])
    assert tuple(trials.loc[reference, ["method", "preset", "position"]]) == ("nuwa", "released", "pesp")

    def cells(row):
        signed = [
            f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0").replace("-", "−")
            for value in (row.difference, row.low, row.high)
        ]
        p = "p\u00a0<\u00a00.001" if row.p_corrected < 0.001 else f"p\u00a0=\u00a0{row.p_corrected:.3f}"
        return [f"{signed[0]} {signed[1]} … {signed[2]}", p, row.verdict]

    expected = sorted(
        (
            trials.loc[trial, "position"].upper(),
            *(text for row in both.sort_values("family").itertuples() for text in cells(row)),
        )
        for trial, both in pairs.groupby("trial_id")
    )
    rows = [cell_texts(row) for row in read_page(full_report).xpath('//section[@id="pairs"]//tbody/tr')]
    assert sorted((position.split()[0], *texts) for position, *texts in rows) == expected
    (note,) = read_page(full_report).xpath('//section[@id="pairs"]//p[@class="note"]')
    assert f"over all {len(pairs)} of these comparisons" in note.text_content()


def test_few_images_are_said(synthetic, tmp_path):
    run = synthetic(images=1)
    run.add_main(
        {
            ("nuwa", "released", "pesp"): ((0.4,) * 3, (0.9,) * 3),
            ("random", "default", "pesp"): ((0.2,) * 3, (0.9,) * 3),
        }
    )
    data = run.write(tmp_path / "data")
    said = "fewer than 100 images"
    assert said not in (build(data, tmp_path / "many") / "index.html").read_text()
    table = pq.read_table(data / "comparisons.parquet")
    few = table.set_column(table.schema.get_field_index("images"), "images", pa.array([40] * len(table), pa.int32()))
    pq.write_table(few, data / "comparisons.parquet")
    assert said in (build(data, tmp_path / "few") / "index.html").read_text()


def test_the_markdown_tables_hold_the_same_numbers(full_run, full_report):
    trials, scores = (pd.read_parquet(full_run / f"{name}.parquet") for name in ("trials", "scores"))
    trial = trials[(trials["method"] == "visionzip") & (trials["position"] == "rpme") & (trials["budget"] == 32)].iloc[
        0
    ]
    cells = [re.sub(r"(\S+) (\S+)–(\S+)", r"\1 [\2, \3]", cell) for cell in expected_cells(trial, scores)]
    text = (full_report / "report.md").read_text(encoding="utf-8")
    assert f"| VisionZip | RPME | {' | '.join(cells)} |" in text


def test_the_best_of_every_column_is_marked(full_run, full_report):
    scores = pd.read_parquet(full_run / "scores.parquet").set_index("trial_id")
    rows = read_page(full_report).xpath('//table[@data-budget="32"]/tbody/tr')[1:]
    ids = [row.get("data-trial") for row in rows]
    for place, benchmark in enumerate(("grounding", "vqa", *ORDER), start=1):
        column = scores[scores["headline"] & ((scores["benchmark"] == benchmark) | (scores["family"] == benchmark))]
        if benchmark in ("grounding", "vqa"):
            column = column[column["benchmark"] == "mean"]
        best = {name for name in ids if column.loc[name, "score"] == column.loc[ids, "score"].max()}
        marked = {row.get("data-trial") for row in rows if "best" in (row.xpath("./td")[place].get("class") or "")}
        assert marked == best


def test_two_builds_are_the_same_bytes_whatever_the_order_and_the_hash_seed(full_run, full_report, tmp_path):
    """The other build has its rows shuffled and runs in a process whose sets iterate in another order."""
    rng = np.random.default_rng(1)
    for name in COLUMNS:
        table = pq.read_table(full_run / f"{name}.parquet")
        pq.write_table(table.take(rng.permutation(len(table))), tmp_path / f"{name}.parquet")
    code = (
        "import sys; from pathlib import Path; from pipelines.report.page import ReportInputs, build_report\n"
        "inputs = ReportInputs.load(Path(sys.argv[1]), {'model path': 'models/testbed', 'data': 'md5 1f<2>'})\n"
        "build_report(inputs, Path(sys.argv[2]), 16)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, tmp_path, tmp_path / "report"], env=environment, check=True)
    files = sorted(path.relative_to(full_report) for path in full_report.rglob("*") if path.is_file())
    assert len(files) > 30
    assert files == sorted(p.relative_to(tmp_path / "report") for p in (tmp_path / "report").rglob("*") if p.is_file())
    for name in files:
        assert (full_report / name).read_bytes() == (tmp_path / "report" / name).read_bytes(), name


def test_the_page_loads_nothing(full_report):
    page = read_page(full_report)
    (script,) = page.xpath("//script")  # plain, and the page reads without it
    assert not script.attrib
    assert not re.search(r"https?:|fetch|XMLHttp|import\b", script.text)
    assert not page.xpath("//link|//iframe|//object|//embed|//base|//audio|//video|//form")
    loading = ("src", "href", "{http://www.w3.org/1999/xlink}href", "xlink:href", "srcset", "poster", "action")
    loads = [value for element in page.iter() for name, value in element.attrib.items() if name in loading]
    assert len(loads) > 100
    assert all(value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")) for value in loads)
    style = "".join(page.xpath("//style/text()")) + "".join(page.xpath("//@style"))
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)
    assert not [element for element in page.iter() for name in element.attrib if name.startswith("on")]


def test_ids_are_unique_on_the_page_and_references_resolve(full_report):
    page = read_page(full_report)
    ids = page.xpath("//@id")
    assert len(ids) == len(set(ids))
    text = (full_report / "index.html").read_text(encoding="utf-8")
    wanted = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted
    assert wanted <= set(ids)


def test_texts_from_data_are_escaped(full_report):
    text = (full_report / "index.html").read_text(encoding="utf-8")
    page = read_page(full_report)
    questions = page.xpath('//section[@id="gallery"]//h3/text()')
    assert "the <script>alert(1)</script> | 5" in [question.strip() for question in questions]
    assert "<script>alert" not in text
    assert "✗ <b>blue</b>" in [caption.strip() for caption in page.xpath('//section[@id="gallery"]//span/text()')]
    assert "<b>blue</b>" not in text
    assert page.xpath('//section[@id="provenance"]//tr[th="data"]/td/code/text()') == ["md5 1f<2>"]
    markdown = (full_report / "report.md").read_text(encoding="utf-8")
    assert "the &lt;script&gt;alert(1)&lt;/script&gt; \\| 5" in markdown
    assert "<script" not in markdown
    assert "<b>" not in markdown


def test_markdown_text_keeps_a_cell_one_cell():
    assert markdown_text("a | b\nc_d *e* [f](g) <h>") == r"a \| b c\_d \*e\* \[f\](g) &lt;h&gt;"


def test_markdown_shows_pictures_that_exist_and_every_picture_made(full_report):
    shown = re.findall(r"\]\((figures/[^)]+)\)", (full_report / "report.md").read_text(encoding="utf-8"))
    made = [f"figures/{path.name}" for path in (full_report / "figures").iterdir()]
    assert sorted(shown) == sorted(made)


def test_a_method_without_a_trial_at_a_budget_is_named_not_shown(full_report):
    page = read_page(full_report)
    names = {budget: page.xpath(f'//table[@data-budget="{budget}"]//tbody//th/text()') for budget in ("16", "32", "48")}
    assert ["FastV" in names[budget] for budget in ("16", "32", "48")] == [False, True, True]
    note = page.xpath('//section[@id="headline"]/p')[0].text_content()
    assert "No trial at this budget: FastV (PESP), run at 32, 48." in note


def test_missing_scores_leave_dashes(synthetic, tmp_path):
    run = synthetic(images=2)
    run.add_main({("nuwa", "released", "pesp"): ((0.5, 0.6, 0.7), (0.9, 0.9, 0.9))})
    target = run.trials[1]["trial_id"]
    run.scores = [row for row in run.scores if row["trial_id"] != target or row["benchmark"] not in ("gqa", "mean")] + [
        {**row, "score": float("nan"), "low": float("nan"), "high": float("nan")}
        for row in run.scores
        if row["trial_id"] == target and (row["benchmark"], row["family"]) == ("mean", "grounding")
    ]
    page = read_page(build(run.write(tmp_path / "data"), tmp_path / "report"))
    cells = cell_texts(page.xpath(f'//table[@data-budget="16"]//tr[@data-trial="{target}"]')[0])
    assert [cells[place] for place in (1, 2, 7)] == ["–", "–", "–"]
    assert "no grounding result of Nüwa" in page.xpath('//p[@class="finding"]')[0].text_content()


def test_without_ablations_or_square_patches_those_sections_are_absent(synthetic, full_report, tmp_path):
    assert {"ablations", "gallery", "published", "failures", "provenance"} <= set(
        read_page(full_report).xpath("//section/@id")
    )
    run = synthetic(images=2)
    run.add_main({("nuwa", "released", "pesp"): ((0.5, 0.6, 0.7), (0.9, 0.9, 0.9))})
    for trial in run.trials:
        trial["image_tokens"] = 150  # 16 of 150 is 10.7 %, within a point of 11.1 %
        trial["image_grid"] = "10x15"
    run.scores = [row for row in run.scores if row["metric"] != "parse_failure"]
    page = read_page(build(run.write(tmp_path / "data"), tmp_path / "report"))
    assert page.xpath("//section/@id") == ["headline", "curves", "published"]


def test_images_of_several_layouts_are_not_drawn_as_one_grid(synthetic, tmp_path):
    """Their mean may be a square by chance; their slots are places in layouts of their own."""
    run = synthetic(images=2)
    run.add_main({("nuwa", "released", "pesp"): ((0.5, 0.6, 0.7), (0.9, 0.9, 0.9))})
    assert "gallery" in read_page(build(run.write(tmp_path / "one"), tmp_path / "report")).xpath("//section/@id")
    for trial in run.trials:
        trial["image_grid"] = None
    assert "gallery" not in read_page(build(run.write(tmp_path / "two"), tmp_path / "report")).xpath("//section/@id")


def test_a_run_of_ablations_only_still_makes_a_page(synthetic, tmp_path):
    run = synthetic(images=2)
    for pillars in (True, False):
        run.add("nuwa", "released", "pesp", 16, (0.5, 0.9), ("pillars",), {"pillars": pillars})
    page = read_page(build(run.write(tmp_path / "data"), tmp_path / "report"))
    assert page.xpath("//section/@id") == ["headline", "curves", "ablations", "failures"]
    assert len(page.xpath('//table[@data-budget="16"]/tbody/tr')) == 1
    assert page.xpath('//p[@class="finding"]')[0].text_content().endswith("and none of any other method.")


def test_published_figures_stand_beside_this_runs_row_by_row(full_report):
    """Nüwa at 64 tokens by hand: the scores of tables 2, 3 and 5 over the unpruned ones."""
    pairs = [(29.43, 58.30), (28.60, 56.42), (28.22, 59.43), (17.47, 38.88), (21.81, 48.50)]
    by_hand = 100 * sum(score / full for score, full in pairs) / len(pairs)
    (section,) = read_page(full_report).xpath('//section[@id="published"]')
    (table,) = section.xpath(".//table")
    heads = [head.text_content() for head in table.xpath("./thead/tr[2]/th")]
    assert heads == ["Method", "Ids", *["published", "this run"] * 6]
    nuwa = cell_texts(table.xpath('.//tr[th="Nüwa (released)"]')[0])
    assert nuwa[:3] == ["PESP own", f"{by_hand:.1f} (5)", "47.0"]
    assert nuwa[1] == "47.7 (5)"
    assert not table.xpath('.//tr[th="Nüwa (paper)"]')  # the first preset stands beside them
    (prumerge,) = table.xpath('.//tr[th="PruMerge+"]')  # which the source writes otherwise
    assert cell_texts(prumerge)[0] == "PERC own"
    fastv = cell_texts(table.xpath('.//tr[th="FastV"]')[0])
    assert fastv[2::2] == ["–", "41.0", "63.0", "–", "80.0", "90.0"]
    assert all(cell.get("class") == "theirs" for cell in table.xpath('.//tr[th="FastV"]')[0].xpath("./td")[1::2])
    note = section.xpath("./p")[-1].text_content()
    assert note.startswith("Published: LLaVA-1.5-7B, ") and "This run: models/testbed;" in note
    assert "Not shown, as their source prints no unpruned row: LearnPruner, VisPruner, DivPrune." in note


def test_the_highest_parse_failure_is_stated(full_run, full_report):
    scores = pd.read_parquet(full_run / "scores.parquet")
    failures = scores[scores["metric"] == "parse_failure"]
    worst = failures["score"].max()
    section = read_page(full_report).xpath('//section[@id="failures"]')[0]
    assert f"Highest rate: {100 * worst:.1f} % on RefCOCO, " in section.text_content()
    rows = section.xpath(".//tbody/tr")
    assert len(rows) == scores["trial_id"].nunique()
    shown = {row.xpath("./th")[0].text_content(): cell_texts(row) for row in rows}
    trials = pd.read_parquet(full_run / "trials.parquet").set_index("trial_id")
    for row in failures.itertuples():
        place = ("refcoco", "refcocoplus", "refcocog").index(row.benchmark)
        assert shown[trials.at[row.trial_id, "label"]][place] == f"{100 * row.score:.1f}"


def test_facts_count_what_was_asked_not_what_was_prepared(synthetic, tmp_path):
    run = synthetic(images=3)
    run.add_main({("nuwa", "released", "pesp"): ((0.5, 0.6, 0.7), (0.9, 0.9, 0.9))})
    unused = run.images[2]["image"]
    left_out = {example["example_id"] for example in run.examples if example["image"] == unused}
    run.predictions = [row for row in run.predictions if row["example_id"] not in left_out]
    page = read_page(build(run.write(tmp_path / "data"), tmp_path / "report"))
    facts = dict(zip(page.xpath("//dl//dt/text()"), page.xpath("//dl//dd/text()"), strict=True))
    assert (facts["Images"], facts["Questions"], facts["Trials"], facts["Answers"]) == ("2", "12", "4", "48")


GROUNDING, VISUAL = ("RefCOCO", "RefCOCO+", "RefCOCOg"), ("POPE", "GQA", "TextVQA")


@pytest.mark.parametrize(
    ("families", "benchmarks", "words"),
    [
        (("grounding",), GROUNDING, "grounding"),
        (("grounding", "vqa"), GROUNDING + VISUAL, "grounding and visual question answering"),
    ],
)
def test_where_the_unpruned_model_scores_nothing_no_retention_is_printed(
    synthetic, tmp_path, families, benchmarks, words
):
    """As ``evaluate`` writes it: scores of 0, and shares of 0 that are not numbers."""
    run = synthetic(images=2)
    run.add_main({("nuwa", "released", "pesp"): ((0.5, 0.6, 0.7), (0.8, 0.9, 0.9))})
    run.add_ablations()
    for row in run.scores:
        if row["family"] in families:
            row |= dict.fromkeys(("retention", "retention_low", "retention_high"), np.nan)
            row |= dict.fromkeys(("score", "low", "high"), np.nan if row["benchmark"] == "mean" else 0.0)
    report = build(run.write(tmp_path / "data"), tmp_path / "report")
    page = read_page(report)
    said = page.xpath('//p[@class="finding"]')[-1].text_content()
    assert said == (
        f"The unpruned model scores 0 on {', '.join(benchmarks)}: retention on {words} is a share of nothing and left out."
    )
    rows = page.xpath('//table[@data-budget="16"]/tbody/tr')
    assert len(rows) == 2
    for row in rows:
        retention, scores = cell_texts(row)[1:3], cell_texts(row)[3:6]
        assert retention[0] == "–" and (retention[1] == "–") == ("vqa" in families)
        assert set(scores) == {"0.0 0.0–0.0"}
        assert not any("best" in (cell.get("class") or "") for cell in row.xpath("./td")[3:6])
    for text in (page.text_content(), (report / "report.md").read_text()):
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    titles = [svg.get("aria-label") for svg in page.xpath('//section[@id="curves"]//*[name()="svg"]')]
    assert titles == ([] if "vqa" in families else ["VQA, Nüwa"])
    if "vqa" in families:
        assert page.xpath('//section[@id="curves"]/p')[0].text_content() == "No curves: no trial has a retention."
    ours = [svg.get("aria-label") for svg in page.xpath('//section[@id="ablations"]//*[name()="svg"]')]
    assert {title.removeprefix("This run: ") for title in ours if "Published" not in title} <= {"VQA"}


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_missing_file_is_named_with_the_stage_to_run(full_run, tmp_path, name):
    for other in COLUMNS:
        if other != name:
            (tmp_path / f"{other}.parquet").symlink_to(full_run / f"{other}.parquet")
    path = tmp_path / f"{name}.parquet"
    with pytest.raises(FileNotFoundError) as caught:
        ReportInputs.load(tmp_path)
    assert str(caught.value) == f"{path} is missing; run `dvc repro evaluate` to make it"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.slice(0, 0), "has no rows; run `dvc repro evaluate` to make it"),
        (
            lambda table: table.drop_columns(["low", "n"]),
            "lacks the columns low, n; run `dvc repro evaluate` to make it",
        ),
        (None, "is not a Parquet file; run `dvc repro evaluate` to make it"),
    ],
)
def test_a_damaged_file_is_named_with_the_stage_to_run(full_run, tmp_path, damage, message):
    for name in COLUMNS:
        (tmp_path / f"{name}.parquet").write_bytes((full_run / f"{name}.parquet").read_bytes())
    path = tmp_path / "scores.parquet"
    if damage is None:
        path.write_bytes(b"trial_id,score\n")
    else:
        pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(ValueError) as caught:
        ReportInputs.load(tmp_path)
    assert str(caught.value) == f"{path} {message}"


def test_a_run_without_an_unpruned_trial_is_refused(full_run, tmp_path):
    for name in COLUMNS:
        (tmp_path / f"{name}.parquet").write_bytes((full_run / f"{name}.parquet").read_bytes())
    path = tmp_path / "trials.parquet"
    trials = pq.read_table(path)
    pq.write_table(trials.filter(pa.compute.not_equal(trials["method"], "unpruned")), path)
    with pytest.raises(ValueError) as caught:
        ReportInputs.load(tmp_path)
    assert str(caught.value) == (
        f"{path} has no trial of method 'unpruned', which every retention is measured against; "
        "add it to a grid in params.yaml and run `dvc repro evaluate`"
    )


def test_a_headline_budget_that_was_not_run_is_refused_before_anything_is_written(full_run, tmp_path):
    with pytest.raises(ValueError) as caught:
        build_report(ReportInputs.load(full_run), tmp_path / "report", 20)
    assert str(caught.value) == (
        "headline_budget 20 has no trial; set report.headline_budget in params.yaml "
        "to one of this run's budgets: 16, 32, 48"
    )
    assert not (tmp_path / "report").exists()


def test_a_page_says_what_was_measured_where_names_would_mislead(small_run, small_report, tmp_path):
    about = "Measured on drawn scenes."
    build_report(ReportInputs.load(small_run, about=about), tmp_path / "said", 16)
    for name in ("index.html", "report.md"):
        assert about in (tmp_path / "said" / name).read_text()
        assert about not in (small_report / name).read_text()


def test_methods_as_their_authors_ship_them_come_first_and_then_the_same_tokens_by_ids(full_run, full_report):
    trials = pd.read_parquet(full_run / "trials.parquet")
    scores = pd.read_parquet(full_run / "scores.parquet")
    page = read_page(full_report)
    first, further = page.xpath('//table[@data-budget="16"]')
    own = {"nuwa": "pesp", "visionzip": "perc", "divprune": "perc", "pooling": "perc", "random": "perc"}
    shown = {row.get("data-trial") for row in first.xpath("./tbody/tr[not(@class)]")}
    at_budget = trials[(trials["budget"] == 16) & trials["grids"].map(lambda grids: "main" in grids)]
    assert {"nuwa", "visionzip", "pooling", "random"} <= set(at_budget[at_budget["trial_id"].isin(shown)]["method"])
    for trial in at_budget.itertuples():
        if trial.method in own:
            assert (trial.trial_id in shown) == (trial.position == own[trial.method])
    assert further.getparent().getparent().tag == "details"

    kept = scores[scores["benchmark"] == "mean"].set_index(["trial_id", "family"])["score"]
    visionzip = at_budget[at_budget["method"] == "visionzip"].set_index("position")["trial_id"]
    (row,) = page.xpath('//table[@class="positions"]//tr[th="VisionZip"]')
    numbers = [text.split()[0] for text in cell_texts(row)]
    assert numbers == [
        f"{100 * kept[visionzip[ids], family]:.1f}"
        for family in ("grounding", "vqa")
        for ids in ("pesp", "perc", "rpme")
    ]
    assert [cell.get("class") for cell in row.xpath("./td")] == [None, "own", None] * 2


def test_the_first_screen_asks_answers_and_shows(full_report):
    header = read_page(full_report).xpath("//header")[0]
    assert header.xpath('./p[@class="asked"]')[0].text_content().startswith("What is left of grounding")
    assert len(header.xpath('./p[@class="finding"]')) == 2
    assert [svg.get("aria-label") for svg in header.xpath('.//*[name()="svg"]')] == [
        "Grounding: what is left", "VQA: what is left",
    ]  # fmt: skip
    labels = header.xpath('.//*[name()="text"]/text()')
    assert labels.count("Nüwa (released)") == labels.count("VisionZip") == 2
    assert labels.count("DivPrune, PESP ids") == 2  # the best of the others


def test_where_it_breaks_holds_the_numbers_of_the_groups(full_run, full_report):
    groups = pd.read_parquet(full_run / "groups.parquet")
    trials = pd.read_parquet(full_run / "trials.parquet").set_index("trial_id")
    grounding, vqa = read_page(full_report).xpath('//section[@id="groups"]//table')
    assert [head.text_content() for head in grounding.xpath(".//thead/tr[2]/th")] == [
        "Method", "smalln = 1,234", "largen = 1,235",
    ]  # fmt: skip
    assert [head.text_content() for head in vqa.xpath(".//thead/tr[2]/th")] == ["Method", "is <b>theren = 1,236"]
    nuwa = groups[
        groups["trial_id"].map(trials["label"]) == "nuwa released pesp 16 attention_last_token@4 seed 0 keep None"
    ]
    (row,) = [
        row for row in grounding.xpath("./tbody/tr") if row.xpath("./th")[0].text_content() == "Nüwa (released)PESP own"
    ]
    sizes = nuwa[nuwa["kind"] == "size"].sort_values("place")
    assert cell_texts(row) == [
        f"{100 * one.score:.1f} {100 * one.low:.1f}–{100 * one.high:.1f}" for one in sizes.itertuples()
    ]
    said = read_page(full_report).xpath('//section[@id="groups"]/p/text()')[0]
    assert said.startswith("Nüwa (released) differs most by “size of the box”: right on ")


def test_questions_can_be_browsed(full_report):
    section = read_page(full_report).xpath('//section[@id="browser"]')[0]
    details = section.xpath("./details")
    assert len(details) == 10
    for one in details:
        pictures = one.xpath('.//*[name()="use"]/@href')
        (image,) = one.xpath('.//*[name()="image"]/@id')
        assert set(pictures) == {f"#{image}"}
        assert len(pictures) == len(one.xpath(".//figcaption"))
    said = [text.strip() for text in section.xpath(".//summary/text()")]
    assert any("the <script>alert(1)</script> | 5" in text for text in said)
