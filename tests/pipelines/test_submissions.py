"""Answers whose truths are not published, in the form of the benchmarks' servers."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from pipelines.data.datasets import parse_name
from pipelines.files.spreadsheet import write_sheet
from pipelines.scores.submissions import SubmissionError, check_scored, submissions, write_submission
from pipelines.settings import Settings, SettingsError, parse_settings
from stages.evaluate import evaluate
from stages.submission import submission

PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
NAMES = {"main": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}


def photo() -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (9, 8, 7)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "a.png"}


# as published: what would tell the answer is null, "nan" or absent
ROWS = {
    "vqav2/testdev:submission": [
        {"question_id": 262144000 + number, "question": "How many?", "image": photo(), "answers": None}
        for number in range(2)
    ],
    "vizwiz/test:submission": [
        {"question_id": f"VizWiz_test_0000000{number}{end}", "question": "What?", "image": photo(), "category": None}
        for number, end in enumerate((".jpg", ""))
    ],
    "mmbench/test:submission": [
        {"index": 7, "question": "Is a < b & c?", "hint": "nan", "answer": "nan", "A": "yes", "B": " no", "C": "nan",
         "D": None, "category": "x", "image": photo(), "source": "s", "L2-category": "y", "comment": "nan",
         "split": "test"}
    ],
}  # fmt: skip
ANSWERS = ["The Two Dogs.", "A: yes\x00\n"]


def asked(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Examples and predictions of two trials, the second of which answers otherwise."""
    examples = list(parse_name(name).examples(pa.Table.from_pylist(ROWS[name])))
    truths = [json.dumps(one.truth) for one in examples]
    ids = [one.example_id for one in examples]
    told = [
        {"trial_id": trial, "example_id": one, "prediction": ANSWERS[(number + turn) % 2]}
        for turn, trial in enumerate(("one", "two"))
        for number, one in enumerate(ids)
    ]
    return pd.DataFrame({"example_id": ids, "benchmark": name, "truth": truths}), pd.DataFrame(told)


def written(name: str, folder: Path) -> dict[str, Path]:
    return {trial: write_submission(*one, folder) for one in submissions(*asked(name)) if (trial := one[1])}


def test_vqav2s_is_a_list_for_evalai(tmp_path):
    paths = written("vqav2/testdev:submission", tmp_path)
    assert {trial: str(path.relative_to(tmp_path)) for trial, path in paths.items()} == {
        "one": "vqav2-testdev/one.json",
        "two": "vqav2-testdev/two.json",
    }
    assert json.loads(paths["one"].read_text())[0] == {"question_id": 262144000, "answer": "2 dogs"}
    assert [row["question_id"] for row in json.loads(paths["two"].read_text())] == [262144000, 262144001]


def test_vizwizs_names_the_pictures(tmp_path):
    rows = json.loads(written("vizwiz/test:submission", tmp_path)["one"].read_text())
    assert [row["image"] for row in rows] == ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001.jpg"]
    assert rows[0]["answer"] == "2 dogs"


def cells(path: Path) -> list[list[str | None]]:
    with zipfile.ZipFile(path) as book:
        assert book.testzip() is None
        sheet = ElementTree.fromstring(book.read("xl/sheet.xml"))
        for name in book.namelist():
            ElementTree.fromstring(book.read(name))
    return [
        ["".join(cell.itertext()) or None for cell in row.findall("main:c", NAMES)]
        for row in sheet.iterfind(".//main:row", NAMES)
    ]


def test_mmbenchs_is_a_sheet_of_answers_as_they_were_given(tmp_path):
    paths = written("mmbench/test:submission", tmp_path)
    assert paths["two"].name == "two.xlsx"
    assert cells(paths["two"]) == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        ["7", "Is a < b & c?", "yes", " no", None, None, "A: yes\n"],  # no file of XML holds a null character
    ]


def test_a_sheet_is_the_same_file_each_time(tmp_path):
    for name in ("a", "b"):
        write_sheet(["x"], [[1], ["é"], [None]], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert cells(tmp_path / "a") == [["x"], ["1"], ["é"], [None]]


def test_a_trial_that_lacks_an_answer_hands_in_nothing():
    examples, predictions = asked("vqav2/testdev:submission")
    with pytest.raises(SubmissionError) as caught:
        list(submissions(examples, predictions[1:]))
    assert str(caught.value) == "trial one has no answer to vqav2:262144000; run the sweep to its end first"


def test_nothing_to_hand_in_is_one_line():
    examples, predictions = asked("vqav2/testdev:submission")
    with pytest.raises(SubmissionError) as caught:
        list(submissions(examples.assign(benchmark="vqav2/validation"), predictions))
    assert str(caught.value) == (
        "sweep.benchmarks: none is for a server; allowed: vqav2/testdev:submission, mmbench/test:submission, "
        "vizwiz/test:submission"
    )


def test_what_only_a_server_scores_is_not_scored_here():
    check_scored(["vqav2/validation", "pope"])
    with pytest.raises(SubmissionError) as caught:
        check_scored(["pope", "mmbench/test:submission"])
    assert str(caught.value) == (
        "sweep.benchmarks: 'mmbench/test:submission' has no published answers, so nothing here can score it; "
        "`make submission` answers it and writes the file for its server"
    )


def settings_of(*benchmarks: str) -> Settings:
    params = PARAMS | {
        "model": PARAMS["model"] | {"prompt_style": "llava_v1"},
        "prepare": PARAMS["prepare"] | {"tables": dict.fromkeys(benchmarks, "tables")},
        "sweep": PARAMS["sweep"] | {"benchmarks": list(benchmarks), "images": None},
    }
    return parse_settings(yaml.safe_dump(params), "params.yaml")


def test_it_is_swept_apart_from_what_is_scored():
    with pytest.raises(SettingsError) as caught:
        settings_of("vizwiz/test:submission", "vizwiz/val")
    assert (
        "sweep.benchmarks: the answers to 'vizwiz/test:submission' are with its server and 'vizwiz/val' is scored here; "
        "sweep them apart" in str(caught.value)
    )


def test_the_stage_writes_a_file_a_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    name = "vqav2/testdev:submission"
    examples, predictions = asked(name)
    examples.assign(image=["a.png", "b.png"]).to_parquet("data/examples.parquet")
    predictions.to_parquet("data/predictions.parquet")
    labels = pd.DataFrame({"trial_id": ["one", "two"], "label": ["unpruned", "nuwa · 16"]})
    labels.to_parquet("data/trials.parquet")
    sweep = Path("data/sweep.json")
    sweep.write_text("{}")

    submission(settings_of(name))
    assert capsys.readouterr().out == (
        "data/submissions/vqav2-testdev/one.json: 2 answers of unpruned\n"
        "data/submissions/vqav2-testdev/two.json: 2 answers of nuwa · 16\n"
    )
    with pytest.raises(SubmissionError, match=r"^sweep.benchmarks: .* nothing here can score it"):
        evaluate(settings_of(name))
