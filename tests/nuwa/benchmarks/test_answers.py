"""EvalAI normalisation and the soft vote; TextVQA, VQAv2 and GQA on hand-worked answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.answers import CONTRACTIONS, normalize_answer, soft_vote
from nuwa.benchmarks.vqav2 import normalize

NORMALIZED = [
    ("The Dog.", "dog"),
    ("two", "2"),
    ("1,000", "1000"),
    ("U.S.A.", "usa"),
    ("  A \n big\tdog ", "big dog"),
    ("None", "0"),
    ("ten dogs", "10 dogs"),
    ("twenty", "twenty"),
    ("yes, it is", "yes it is"),
    ("3.5", "3.5"),
    ("3.5.", "3.5"),
    ("Dr. Pepper", "dr pepper"),
    ("dog's", "dog 's"),
    ("red/blue", "red blue"),
    ("red / blue", "red blue"),
    ("t-shirt", "t shirt"),
    ("t- shirt", "t shirt"),
    ('"stop"', "stop"),
    ("what?!", "what"),
    ("wont", "won't"),
    ("won't", "won't"),
    ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"),
    ("oclock", "o'clock"),
    ("#5", "#5"),
    ("$1,000.50", "$1000.50"),
    ("a", "a"),
    ("The", "the"),
    ("", ""),
    (" ?,", ""),
    ("...", ""),
]


@pytest.mark.parametrize(("answer", "expected"), NORMALIZED)
def test_evalai_normalisation(answer, expected):
    assert normalize_answer(answer) == expected


def test_vqav2_has_no_word_step():
    # commas and 's belong to EvalAI's first step, which VQAv2's own evaluation lacks
    assert [normalize(answer) for answer in ("1,000", "red,blue", "red, blue", "dog's", "The Dog.")] == [
        "1000",
        "red blue",
        "red blue",
        "dog's",
        "dog",
    ]


def test_contractions_lack_one_apostrophe():
    assert CONTRACTIONS["dont"] == "don't"
    assert CONTRACTIONS["shouldn'tve"] == CONTRACTIONS["shouldnt've"] == "shouldn't've"
    # words of their own
    assert not {"ill", "well", "shell", "were", "id", "wed", "hell", "its", "lets"} & set(CONTRACTIONS)


@given(st.text())
def test_normalising_twice_changes_nothing_in_the_words(answer):
    once = normalize_answer(answer)
    assert once == " ".join(once.split())
    assert not once.isspace()


# votes for the prediction among ten → each voter sees one fewer: 1: 9·(1/3); 2: 2·(1/3) + 8·(2/3); 3: 3·(2/3) + 7·1
VOTES = [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]


@pytest.mark.parametrize(("votes", "expected"), VOTES)
def test_soft_vote(votes, expected):
    answers = ["dog"] * votes + [f"other {number}" for number in range(10 - votes)]
    assert soft_vote("dog", answers) == pytest.approx(expected)
    assert soft_vote("dog", answers[::-1]) == pytest.approx(expected)


@given(st.integers(0, 10), st.integers(0, 9))
def test_soft_vote_equals_its_definition(votes, rotation):
    answers = ["dog"] * votes + ["cat"] * (10 - votes)
    answers = answers[rotation:] + answers[:rotation]
    left_out = [answers[:i] + answers[i + 1 :] for i in range(10)]
    expected = sum(min(1, others.count("dog") / 3) for others in left_out) / 10
    assert soft_vote("dog", answers) == pytest.approx(expected)


TEXTVQA = {"answers": ["Coca-Cola", "coca cola", "Coca Cola.", "The Coca Cola", "pepsi", "", "a", "2", "two", "$1,000"]}
TEXTVQA_SCORES = [
    ("coca cola", 1.0, 0),
    ("COCA-COLA!", 1.0, 0),
    ("Pepsi", 0.3, 0),
    ("Two.", 0.6, 0),
    ("$1000", 0.3, 0),
    ("a", 0.3, 0),  # the answer "a" is meant
    ("", 0.0, 1),  # matches neither the blank answer nor the article
    (" . ", 0.0, 1),
    ("coca", 0.0, 0),
    ("it says coca cola", 0.0, 0),
]


@pytest.mark.parametrize(("answer", "accuracy", "parse_failure"), TEXTVQA_SCORES)
@pytest.mark.parametrize("variant", ["no_ocr", "ocr"])
def test_textvqa_scores(variant, answer, accuracy, parse_failure):
    expected = {"accuracy": accuracy, "parse_failure": parse_failure}
    assert get_benchmark("textvqa", variant).score(answer, TEXTVQA) == pytest.approx(expected)


VQAV2 = {"answers": ["Yes", "yes", "yes.", "no", "2", "two", "2 dogs", "1,000", "", "the"]}
VQAV2_SCORES = [("yes", 0.9, 0), ("YES!", 0.9, 0), ("no", 0.3, 0), ("Two", 0.6, 0), ("1000", 0.3, 0), ("", 0.0, 1)]


@pytest.mark.parametrize(("answer", "accuracy", "parse_failure"), VQAV2_SCORES)
def test_vqav2_scores(answer, accuracy, parse_failure):
    expected = {"accuracy": accuracy, "parse_failure": parse_failure}
    assert get_benchmark("vqav2").score(answer, VQAV2) == pytest.approx(expected)


GQA_SCORES = [
    ("t-shirt", "T-Shirt.", 1, 0),
    ("t-shirt", "tshirt", 1, 0),
    ("red", " Red! ", 1, 0),
    ("red", "the red", 0, 0),
    ("red", "dark red", 0, 0),
    ("red", "", 0, 1),
    ("red", "...", 0, 1),
    ("...", "", 0, 1),  # nothing never equals nothing
    ("3", "3", 1, 0),
    ("3", "three", 0, 0),
    ("to the left", "To the  left\n", 1, 0),
]


@pytest.mark.parametrize(("truth", "answer", "accuracy", "parse_failure"), GQA_SCORES)
def test_gqa_scores(truth, answer, accuracy, parse_failure):
    expected = {"accuracy": accuracy, "parse_failure": parse_failure}
    assert get_benchmark("gqa").score(answer, {"answer": truth}) == expected
