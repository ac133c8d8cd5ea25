"""Questions to browse show the answers, boxes and dropped patches of the files."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace

import pandas as pd
import pytest
from PIL import Image

from pipelines.report import browser
from pipelines.report.browser import questions
from pipelines.report.gallery import gallery
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes


@pytest.fixture(scope="module")
def shown(full_run):
    inputs = ReportInputs.load(full_run)
    return questions(inputs, Outcomes(inputs), 16)


def test_the_sample_goes_by_digests_benchmark_by_benchmark_and_shows_no_image_twice(full_run, shown):
    examples = pd.read_parquet(full_run / "examples.parquet").set_index("example_id")
    assert len(shown) == len({examples.at[one.example_id, "image"] for one in shown}) == 10
    first = {
        name: min(of.index, key=lambda example: hashlib.sha256(example.encode()).hexdigest())
        for name, of in examples.groupby("benchmark")
    }
    assert shown[0].example_id == first["refcoco"]


def test_every_trial_of_the_budget_answers_as_in_the_files(full_run, shown):
    trials = pd.read_parquet(full_run / "trials.parquet")
    main = trials[
        trials["grids"].map(lambda grids: "main" in grids) & (trials["budget"].isna() | trials["budget"].eq(16))
    ]
    answers = pd.read_parquet(full_run / "predictions.parquet").set_index(["trial_id", "example_id"])["prediction"]
    questions = [one for one in shown if one.benchmark == "GQA"]
    assert questions
    for one in questions:
        said = [answers[trial, one.example_id] for trial in main["trial_id"]]
        assert sorted(answer.text for answer in one.answers) == sorted(said)
        assert one.truth == "red" and one.right == said.count("red")
        assert all(answer.right == (answer.text == "red") for answer in one.answers)


def test_what_is_covered_is_what_stage_1_dropped(full_run, shown):
    """Cells are 8 pixels wide on pictures of 96."""
    trials = pd.read_parquet(full_run / "trials.parquet").set_index("trial_id")
    kept = pd.read_parquet(full_run / "kept.parquet").set_index(["trial_id", "image"])["indices"]
    examples = pd.read_parquet(full_run / "examples.parquet").set_index("example_id")
    (trial,) = trials[
        (trials["method"] == "visionzip") & (trials["position"] == "rpme") & (trials["budget"] == 16)
    ].index
    for one in shown[:2]:
        (answer,) = [answer for answer in one.answers if answer.trial == "VisionZip RPME"]
        covered = set()
        for left, top, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", answer.dropped):
            assert int(height) == 8 and int(width) % 8 == 0
            covered |= {int(top) // 8 * 12 + (int(left) + step) // 8 for step in range(0, int(width), 8)}
        assert covered == set(range(144)) - set(kept[trial, examples.at[one.example_id, "image"]].tolist())
        assert answer.tokens == "16"
        assert Image.open(io.BytesIO(base64.b64decode(one.picture.partition(",")[2]))).size == one.size == (96, 96)
        assert [a.dropped for a in one.answers if a.trial == "Unpruned"] == [""]


def test_the_sample_ends_where_the_page_would_grow_too_large(full_run, monkeypatch):
    monkeypatch.setattr(browser, "BYTES", 1)
    inputs = ReportInputs.load(full_run)
    assert len(questions(inputs, Outcomes(inputs), 16)) == browser.FEWEST


def test_questions_about_several_images_count_and_are_not_drawn(full_run, shown):
    inputs = ReportInputs.load(full_run)
    name = shown[0].example_id.partition(":")[0]
    several = inputs.examples["example_id"].str.startswith(f"{name}:")
    image = inputs.examples["image"]
    inputs = replace(inputs, examples=inputs.examples.assign(image=image.mask(several, image + "+" + image)))

    outcomes, left = Outcomes(inputs), set(inputs.examples.loc[~several, "example_id"])
    assert name in {column.benchmark for column in outcomes.columns}
    drawn = [one.example_id for one in (*questions(inputs, outcomes, 16), *gallery(inputs, outcomes, 16))]
    assert drawn and set(drawn) <= left
