"""The report's table of time and memory against the file it was made of."""

from __future__ import annotations

import shutil

import lxml.html
import pandas as pd
import pytest

from pipelines.report.efficiency import efficiency_tables, paid_tables
from pipelines.report.finding import named
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes
from pipelines.report.page import build_report

SETTING = {"model": "m/one", "device": "CPU, 1 thread", "dtype": "float32", "attention": "sdpa", "output_tokens": 16}
MEASURED = {
    "preprocess_ms": 0.5,
    "encode_ms": 1.5,
    "selection_ms": 1.0,
    "prefill_ms": 5.0,
    "decode_ms": 4.0,
    "total_ms": 12.0,
}


def row(method: str, average: float, batch: int = 1, **values: float) -> dict:
    measured = MEASURED | values
    return {
        **SETTING,
        "batch": batch,
        "method": method,
        "average_tokens": average,
        "kv_bytes": 2e6,
        "peak_memory_bytes": 3e6,
    } | measured


@pytest.fixture
def profile() -> pd.DataFrame:
    return pd.DataFrame(
        [
            row("visionzip", 16),
            row("unpruned", 144, prefill_ms=20.0, total_ms=36.0),
            row("nuwa", 32, prefill_ms=8.0),
            row("nuwa", 16),
            row("stock generate", 144, prefill_ms=25.0, total_ms=40.0),
            row("unpruned", 144, batch=8, prefill_ms=10.0),
            row("nuwa", 16, batch=8),
        ]
    )


def test_a_table_a_setting_and_ratios_within_it(profile):
    one, eight = efficiency_tables(profile)
    assert one.title == "m/one, CPU, 1 thread, float32, sdpa, batch 1, 16 tokens of answer"
    assert [(line.name, line.tokens) for line in one.rows] == [
        ("Stock generate", "144"),
        ("Unpruned", "144"),
        ("Nüwa", "16"),
        ("Nüwa", "32"),
        ("VisionZip", "16"),
    ]
    assert [line.prefill for line in one.rows] == ["0.80×", "1.00×", "4.00×", "2.50×", "4.00×"]
    assert [line.total for line in one.rows] == ["0.90×", "1.00×", "3.00×", "3.00×", "3.00×"]
    assert one.rows[2].times == ("0.5", "1.5", "1.0", "5.0", "4.0", "12.0")
    assert one.rows[2].cache == "2.0"
    assert [line.prefill for line in eight.rows] == ["1.00×", "2.00×"]


def test_without_an_unpruned_run_that_fits_there_are_no_ratios(profile):
    kept = profile[(profile["batch"] == 1) | (profile["method"] != "unpruned")]
    _, eight = efficiency_tables(kept)
    assert [(line.name, line.prefill, line.total) for line in eight.rows] == [("Nüwa", "–", "–")]


def test_the_page_shows_it_where_it_was_measured(small_run, small_report, profile, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_run, data)
    profile.to_csv(data / "profile.csv", index=False)
    build_report(ReportInputs.load(data), tmp_path / "with", 16)
    before, after = (lxml.html.parse(folder / "index.html").getroot() for folder in (small_report, tmp_path / "with"))
    assert not before.xpath("//section[@id='efficiency']")
    (section,) = after.xpath("//section[@id='efficiency']")
    cells = [[cell.text_content() for cell in line] for line in section.xpath("(.//table)[1]//tbody/tr")]
    assert cells[2] == ["Nüwa", "16", "0.5", "1.5", "1.0", "5.0", "4.0", "12.0", "4.00×", "3.00×", "2.0", "3.0"]
    assert "5.973" in section.text_content(), "the papers' figures stand beside"
    assert (
        "| Nüwa | 16 | 0.5 | 1.5 | 1.0 | 5.0 | 4.0 | 12.0 | 4.00× | 3.00× | 2.0 | 3.0 |"
        in (tmp_path / "with" / "report.md").read_text()
    )


def test_a_profile_that_cannot_be_shown_is_refused(small_run, profile, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_run, data)
    path = data / "profile.csv"
    for column in ("prefill_ms", "preprocess_ms"):
        profile.drop(columns=column).to_csv(path, index=False)
        with pytest.raises(ValueError) as raised:
            ReportInputs.load(data)
        assert str(raised.value) == f"{path} lacks {column}; run `make profile` to make it"
    profile[profile["method"] == "nuwa"].to_csv(path, index=False)
    with pytest.raises(ValueError) as raised:
        ReportInputs.load(data)
    assert str(raised.value) == f"{path} lacks its unpruned rows; run `make profile` to make it"


def test_what_is_kept_stands_beside_what_was_measured(profile, full_run):
    """By image; of the trials of the authors' ids and of what the answer names; the setting of most images first."""
    outcomes = Outcomes(ReportInputs.load(full_run))
    tables, panels = paid_tables(outcomes, profile, "m/one", named(outcomes, 16))
    assert [table.title for table in tables] == [
        "CPU, 1 thread, float32, sdpa: 8 images at once, 1 question an image, 16 tokens of answer",
        "CPU, 1 thread, float32, sdpa: 1 image at once, 1 question an image, 16 tokens of answer",
    ]
    eight, one = ({row.name: row for row in table.rows} for table in tables)
    assert list(eight) == ["Unpruned", "Nüwa (released)"]
    assert (eight["Nüwa (released)"].prefill, eight["Nüwa (released)"].total) == ("0.62", "1.5")
    assert [(row.name, row.tokens, row.retention["grounding"].text, row.faster) for row in tables[1].rows] == [
        ("Unpruned", "144", "100", "1.00×"),
        ("Nüwa (released)", "16", "47.0", "3.00×"),
        ("Nüwa (released)", "32", "71.0", "3.00×"),
        ("VisionZip", "16", "2.0", "3.00×"),
    ]
    assert (one["VisionZip"].cache, one["VisionZip"].memory) == ("2.00", "3.00")
    assert [panel.title for panel in panels] == ["Grounding over measured time", "VQA over measured time"]


def test_a_model_that_was_not_measured_has_no_such_table(profile, full_run):
    outcomes = Outcomes(ReportInputs.load(full_run))
    assert paid_tables(outcomes, profile, "m/other", []) == paid_tables(outcomes, None, "m/one", []) == ([], [])
