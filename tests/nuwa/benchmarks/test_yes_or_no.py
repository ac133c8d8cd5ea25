"""POPE and MME: reading yes and no, and their own aggregates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.mme import COGNITION, PERCEPTION

# answer → what exact and first_sentence read in it
READINGS = [
    ("yes", "yes", "yes"),
    ("No", "no", "no"),
    (" YES\n", "yes", "yes"),
    ("Yes.", None, "yes"),
    ("No, there is not.", None, "no"),
    ("Yes, there is. No doubt.", None, "yes"),
    ("There is a dog", None, "yes"),
    ("There is not a dog", None, "no"),
    ("nothing", None, "yes"),  # no whole word no
    ("None", None, "yes"),
    ("NOT", None, "no"),
    ("", None, None),
    ("  ", None, None),
    (". no", None, None),  # the first sentence is empty
    ("?!", None, None),
]


@pytest.mark.parametrize(("answer", "exact", "first_sentence"), READINGS)
@pytest.mark.parametrize("truth", ["yes", "no"])
def test_pope_readings(answer, exact, first_sentence, truth):
    for variant, said in (("exact", exact), ("first_sentence", first_sentence)):
        assert get_benchmark("pope", variant).score(answer, {"answer": truth}) == {
            "correct": float(said == truth),
            "said_yes": float(said == "yes"),
            "is_yes": float(truth == "yes"),
            "hit": float(said == truth == "yes"),
            "parse_failure": float(said is None),
        }


def pope(answers: list[str], truths: list[str]) -> dict[str, float]:
    benchmark = get_benchmark("pope")
    table = benchmark.score_table(answers, [{"answer": truth} for truth in truths], ["random"] * len(answers))
    return benchmark.aggregate(table)


def test_pope_aggregate():
    # hits 1 of 2 said yes and of 3 that are yes; F1 = 2·(1/2·1/3) / (1/2 + 1/3)
    result = pope(["yes", "no", "hm", "yes", "no"], ["yes", "yes", "yes", "no", "no"])
    assert result == pytest.approx(
        {
            "accuracy": 2 / 5,
            "precision": 1 / 2,
            "recall": 1 / 3,
            "f1": 0.4,
            "yes_ratio": 2 / 5,
            "parse_failure": 1 / 5,
        }
    )
    assert get_benchmark("pope").headline == "f1"


def test_pope_without_any_yes():
    result = pope(["no", "no"], ["yes", "no"])
    assert result == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0, "parse_failure": 0}


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "hm"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_popes_f1_is_the_harmonic_mean_of_precision_and_recall(rows):
    result = pope(*(list(column) for column in zip(*rows, strict=True)))
    precision, recall = result["precision"], result["recall"]
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert result["f1"] == pytest.approx(expected)


MME_READINGS = [
    ("yes", "yes"),
    ("No.", "no"),
    ("Yes, it is", "yes"),
    ("\n'no'", "no"),
    ("y", "yes"),
    ("N.", "no"),
    ("Not at all", "no"),
    ("None", "no"),
    ("Nope.", "no"),
    ("n o", None),
    ("Eyes", None),
    ("Eyes, yes", None),
    ("note", None),
    ("nothing", None),
    ("It is yes", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "said"), MME_READINGS)
@pytest.mark.parametrize("truth", ["yes", "no"])
def test_mme_readings(answer, said, truth):
    expected = {"accuracy": float(said == truth), "parse_failure": float(said is None)}
    assert get_benchmark("mme").score(answer, {"answer": truth, "group": "x"}) == expected


def mme(*pairs: tuple[str, str, str, str]) -> dict[str, float]:
    """Pairs of (category, image, answer to the yes question, answer to the no question)."""
    benchmark = get_benchmark("mme")
    answers, truths, categories = [], [], []
    for category, image, *said in pairs:
        answers += said
        truths += [{"answer": truth, "group": f"{category}/{image}"} for truth in ("yes", "no")]
        categories += [category] * 2
    return benchmark.aggregate(benchmark.score_table(answers, truths, categories))


def test_mme_aggregate():
    result = mme(
        ("existence", "1", "yes", "no"),  # 100 + 100
        ("existence", "2", "yes", "yes"),  # 50 + 0
        ("OCR", "1", "Yes.", "hm"),  # 50 + 0
        ("code_reasoning", "1", "no", "yes"),  # 0 + 0
        ("text_translation", "1", "yes", "no"),  # 200
    )
    assert result == pytest.approx(
        {"perception": 175, "cognition": 200, "total": 375, "accuracy": 6 / 10, "parse_failure": 1 / 10}
    )


def test_mme_maxima():
    right = [(category, str(image), "yes", "no") for category in PERCEPTION + COGNITION for image in range(3)]
    result = mme(*right)
    assert (result["perception"], result["cognition"], result["total"]) == (2000, 800, 2800)
    assert get_benchmark("mme").headline == "total"


def test_mme_resamples_draw_whole_images():
    once = mme(("count", "1", "yes", "no"), ("count", "2", "yes", "yes"))
    drawn = mme(("count", "1", "yes", "no"), ("count", "1 again", "yes", "no"), ("count", "2", "yes", "yes"))
    assert (once["total"], drawn["total"]) == (125, 150)


def test_mme_refuses_half_a_pair():
    benchmark = get_benchmark("mme")
    truths = [
        {"answer": "yes", "group": "count/1"},
        {"answer": "no", "group": "count/1"},
        {"answer": "no", "group": "count/2"},
    ]
    table = benchmark.score_table(["yes", "no", "no"], truths, ["count"] * 3)
    with pytest.raises(
        ValueError, match=r"^mme scores pairs: image 'count/2' has 1 answers, not 2; score whole images$"
    ):
        benchmark.aggregate(table)
