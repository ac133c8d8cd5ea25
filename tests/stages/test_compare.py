"""``make compare``: which answers changed, against a loop; runs, revisions and trials as people name them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import run_here
from dvc.repo import Repo

from pipelines.scores.changes import NothingToCompare, Side, changes

TRIALS = {"t1": "nuwa · 16 · pesp", "t2": "visionzip · 16 · perc"}
HOSTILE = "a\nline | of <b>words</b>"


def tables(seed: int, images: int = 8) -> dict[str, pd.DataFrame]:
    """Two trials on boxes and words, each answer right by chance of its own."""
    rng = np.random.default_rng(seed)
    examples, predictions = [], []
    for number in range(images):
        for benchmark, family, truth in (
            ("refcoco", "grounding", {"box": [0.2, 0.2, 0.6, 0.6]}),
            ("textvqa", "vqa", {"answers": ["5"] * 10}),
        ):
            example = f"{benchmark}:{number}"
            examples.append({
                "example_id": example, "benchmark": benchmark, "family": family, "image": f"i{number}",
                "question": HOSTILE, "truth": json.dumps(truth), "category": "",
            })  # fmt: skip
            for trial in TRIALS:
                right = rng.random() < 0.6
                box = "[0.20, 0.20, 0.60, 0.60]" if right else f"[0.{rng.integers(3, 5)}0, 0.40, 0.90, 0.90]"
                text = box if family == "grounding" else "5" if right else "6"
                predictions.append({"trial_id": trial, "example_id": example, "prediction": text})
    trials = pd.DataFrame({"trial_id": list(TRIALS), "label": list(TRIALS.values())})
    return {"trials": trials, "examples": pd.DataFrame(examples), "predictions": pd.DataFrame(predictions)}


def side(name: str, of: dict[str, pd.DataFrame]) -> Side:
    answers = of["predictions"].pivot(index="example_id", columns="trial_id", values="prediction")
    return Side(name, of["examples"], answers)


def write(of: dict[str, pd.DataFrame], folder: Path, dtype: str = "float32") -> Path:
    folder.mkdir(parents=True)
    for name, table in of.items():
        table.to_parquet(folder / f"{name}.parquet")
    facts = {"fingerprints": {"model": "0123456789abcdef"}, "provenance": [f"torch 2, dtype {dtype}"]}
    (folder / "sweep.json").write_text(json.dumps(facts))
    return folder


def is_right(text: str) -> bool:
    return text in ("5", "[0.20, 0.20, 0.60, 0.60]")


def test_changes_are_what_a_loop_counts():
    a, b = tables(0), tables(1)
    found = changes(side("a", a), side("b", b), [(label, trial, trial) for trial, label in TRIALS.items()])
    assert list(found.table["trial"]) == [label for label in TRIALS.values() for _ in range(2)]
    texts = [of["predictions"].set_index(["trial_id", "example_id"])["prediction"] for of in (a, b)]
    for row in found.table.itertuples():
        trial = next(trial for trial, label in TRIALS.items() if label == row.trial)
        pairs = [(texts[0][trial, f"{row.benchmark}:{n}"], texts[1][trial, f"{row.benchmark}:{n}"]) for n in range(8)]
        assert (row.n, row.changed) == (8, sum(one != other for one, other in pairs))
        assert row.lost == sum(is_right(one) and not is_right(other) for one, other in pairs)
        assert row.gained == sum(is_right(other) and not is_right(one) for one, other in pairs)
        assert row.difference == pytest.approx((row.gained - row.lost) / 8) == row.score_b - row.score_a
        assert row.low <= row.difference <= row.high
    assert found.questions == 16 and found.left_out == 0
    assert len(found.lost) >= 4
    assert [one.trials for one in found.lost] == sorted((one.trials for one in found.lost), reverse=True)
    of_boxes = [one for one in found.lost if one.benchmark == "refcoco" and one.trials == found.lost[0].trials]
    assert found.lost[: len(of_boxes)] == of_boxes  # they lost overlap


def test_two_runs_that_answer_alike_may_differ_elsewhere():
    """Nothing changed on 8 images; on another 8 something may, and no more surely than where one answer changed."""
    a, b = tables(0), tables(0)
    alike = changes(side("a", a), side("b", b), [("alike", "t1", "t1")]).table
    assert not alike[["changed", "lost", "gained", "difference"]].any(axis=None) and (alike["p"] == 1).all()
    assert (alike["low"] < -0.1).all() and (alike["high"] > 0.1).all()

    at = b["predictions"].query("trial_id == 't1' and example_id.str.startswith('textvqa')").index[0]
    b["predictions"].loc[at, "prediction"] = "5" if b["predictions"].loc[at, "prediction"] != "5" else "6"
    moved = changes(side("a", a), side("b", b), [("moved", "t1", "t1")]).table
    wider = (moved["high"] - moved["low"] >= alike["high"] - alike["low"]).tolist()
    assert moved["changed"].sum() == 1 and all(wider)


def test_a_run_differs_from_itself_nowhere():
    one = side("one", tables(0))
    found = changes(one, one, [("same", "t1", "t1")])
    assert found.lost == [] and not found.table[["changed", "lost", "gained", "difference", "low", "high"]].any(
        axis=None
    )


def test_questions_that_do_not_say_the_same_are_left_out():
    a, b = tables(0), tables(0)
    b["examples"].loc[0, "truth"] = json.dumps({"box": [0, 0, 1, 1]})
    b["examples"].loc[1, "question"] = "another"
    b["predictions"] = b["predictions"][b["predictions"]["example_id"] != "textvqa:7"]
    found = changes(side("a", a), side("b", b), [("one", "t1", "t1")])
    assert (found.questions, found.left_out) == (13, 2)
    with pytest.raises(NothingToCompare) as caught:
        changes(side("a", a), side("b", b), [])
    assert str(caught.value) == "a and b share no trial"


def test_an_answer_that_one_trial_lacks_is_named():
    a, b = tables(0), tables(0)
    b["predictions"] = b["predictions"].drop(index=0)  # trial t1's first
    with pytest.raises(NothingToCompare) as caught:
        changes(side("a", a), side("b", b), [("one", "t1", "t1")])
    assert str(caught.value) == "trial t1 of b lacks 1 of 16 answers; `dvc repro sweep` there computes them"


def test_two_folders_of_runs(tmp_path):
    write(tables(0), tmp_path / "a" / "data")
    write(tables(1), tmp_path / "b", "bfloat16")
    done = run_here("stages.compare", "a", "b", "out/table.csv", folder=tmp_path)
    assert done.stderr == "" and done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "A: a, 2 trials; B: b, 2 trials; both have 2",
        "answers: torch 2, dtype float32 in A, torch 2, dtype bfloat16 in B",
        "16 questions compared",
    ]
    written = pd.read_csv(tmp_path / "out" / "table.csv")
    sums = written.groupby("benchmark")[["n", "changed", "lost", "gained"]].sum().loc["refcoco"]
    assert next(line.split() for line in lines if line.startswith("refcoco")) == ["refcoco", *map(str, sums)]
    assert "refcoco:" in next(line for line in lines if "a line | of <b>words</b> ([0.20, 0.20, 0.60, 0.60])" in line)


def test_two_trials_of_this_run_by_label_and_id(tmp_path):
    write(tables(0), tmp_path / "data")
    done = run_here("stages.compare", "nuwa · 16 · pesp", "t2", folder=tmp_path)
    assert done.stderr == "" and done.stdout.splitlines()[:2] == ["A: nuwa · 16 · pesp", "B: visionzip · 16 · perc"]
    assert "A said" in done.stdout


def test_a_revision_whose_tables_dvc_has(tmp_path):
    def command(*words: str) -> None:
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)

    write(tables(0), tmp_path / "data")
    command("git", "init", "-q")
    command("git", "config", "user.email", "a@b.c")
    command("git", "config", "user.name", "a")
    with contextlib.chdir(tmp_path), Repo.init() as repo:
        repo.add(sorted(f"data/{path.name}" for path in (tmp_path / "data").iterdir()))
    command("git", "add", "-A")
    command("git", "commit", "-qm", "first")
    shutil.rmtree(tmp_path / "data")
    write(tables(1), tmp_path / "data")
    done = run_here("stages.compare", "HEAD", ".", folder=tmp_path)
    assert done.stderr == "" and done.stdout.startswith("A: HEAD, 2 trials; B: ., 2 trials; both have 2\n16 questions")

    shutil.rmtree(tmp_path / ".dvc" / "cache")
    refused = run_here("stages.compare", "HEAD", ".", folder=tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: HEAD: DVC does not have that revision's tables (")


@pytest.mark.parametrize(
    ("a", "b", "line"),
    [
        ("", "b", "A and B say what is compared: "),
        ("data", "nonsense", "B = 'nonsense' is no folder with tables and no revision of git; "),
        (
            "t9",
            "t1",
            "A = 't9' is no trial of data/, no folder and no revision of git; trials are 'nuwa · 16 · pesp', ",
        ),
        ("empty", "data", "empty: no predictions.parquet in it or in its data/; run `dvc repro sweep` there"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, a, b, line):
    write(tables(0, images=1), tmp_path / "data")
    (tmp_path / "empty").mkdir()
    done = run_here("stages.compare", a, b, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {line}")
