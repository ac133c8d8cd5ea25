"""A question that holds the image placeholder's text is one example: told by name, or left out of all trials with its group."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from pipelines.data.left_out import left_out, without
from pipelines.sweep.askable import Unaskable, askable, unaskable


def table(*rows: tuple[str, str, str | None]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "example_id": name,
                "benchmark": "mme",
                "prompt": prompt,
                "truth": json.dumps({"group": group} if group else {}),
            }
            for name, prompt, group in rows
        ]
    )


QUESTIONS = (
    ("mme:1:yes", "is it red ?", "count/1"),
    ("mme:1:no", "what is <image> ?", "count/1"),
    ("mme:11:yes", "is it blue ?", "count/11"),
    ("mme:2", "an <image of text", None),
)
REASON = "the question 'what is <image> ?' holds the model's image placeholder; reword it or take it out"


def test_only_what_holds_the_placeholder_and_its_group_cannot_be_asked(family):
    holder = family.processor.tokenizer.convert_ids_to_tokens(family.image_token)
    rows = [(name, prompt.replace("<image>", holder), group) for name, prompt, group in QUESTIONS]
    found = unaskable(family, table(*rows))
    assert found == {
        "mme:1:no": REASON.replace("<image>", holder),
        "mme:1:yes": "it is scored together with mme:1:no, which cannot be asked",
    }


@pytest.mark.parametrize(
    ("prompt", "held"),
    [
        ("<image>", True),
        ("<image> what is left of <image> ?", True),
        ("what isa<image>b ?", True),
        ("what is left ?\n<image>", True),
        ("what is < image > ?", False),
        ("what is <IMAGE> ?", False),
        ("what is &lt;image&gt; ?", False),
        ("what is <image", False),
        ("", False),
    ],
)
def test_only_the_placeholder_itself_keeps_a_question_from_being_asked(family, prompt, held):
    holder = family.processor.tokenizer.convert_ids_to_tokens(family.image_token)
    asked = prompt.replace("<image>", holder).replace("<image", holder[:-1]).replace("IMAGE", holder[1:-1].upper())
    found = unaskable(family, table(("gqa:1", asked, None), ("gqa:2", "is it red ?", None)))
    assert list(found) == (["gqa:1"] if held else [])


def test_they_are_refused_by_name_before_any_work(tiny_vlm):
    with pytest.raises(Unaskable) as caught:
        askable(tiny_vlm, table(*QUESTIONS), allowed=False)
    assert str(caught.value) == (
        f"2 of 4 questions cannot be asked, first mme:1:no: {REASON} in its table, or set sweep.quarantine: allow to leave "
        "such questions out of all trials"
    )


def test_allowed_they_are_left_out_of_sweep_and_scores_alike(tiny_vlm, tmp_path):
    rest, reasons = askable(tiny_vlm, table(*QUESTIONS), allowed=True)
    assert list(rest["example_id"]) == ["mme:11:yes", "mme:2"] and list(rest.index) == [0, 1]
    (tmp_path / "sweep.json").write_text(json.dumps({"left_out": reasons}))
    pd.testing.assert_frame_equal(without(table(*QUESTIONS), left_out(tmp_path / "sweep.json")), rest)
    (tmp_path / "sweep.json").write_text("{}")
    assert without(rest, left_out(tmp_path / "sweep.json")) is rest


def test_a_table_without_such_questions_stays_as_it_is(tiny_vlm):
    plain = table(*QUESTIONS[2:])
    rest, reasons = askable(tiny_vlm, plain, allowed=False)
    assert rest is plain and reasons == {}
