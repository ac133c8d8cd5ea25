"""Known defects of the reference harnesses, each with the case in which it shows; none of them is inherited."""

from __future__ import annotations

import copy

from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.answers import normalize_answer


def test_popes_yes_ratio_is_of_the_predictions():
    benchmark = get_benchmark("pope")
    truths = [{"answer": "yes"}, {"answer": "no"}]
    ratio = [
        benchmark.aggregate(benchmark.score_table([answer] * 2, truths, ["random"] * 2))["yes_ratio"]
        for answer in ("yes", "no")
    ]
    assert ratio == [1.0, 0.0]  # computed from the truth, both would be a half


def test_normalising_leaves_the_record_alone():
    truth = {"answers": ["The Dog.", "two"] * 5}
    before = copy.deepcopy(truth)
    for name in ("textvqa", "vqav2"):
        get_benchmark(name).score("dog", truth)
        assert truth == before


def test_more_than_32_periods_go():
    assert normalize_answer("x" + "." * 100) == "x"
    assert normalize_answer("a." * 40) == "a" * 40


def test_an_empty_answer_is_no_article():
    for name in ("textvqa", "vqav2"):
        score = get_benchmark(name).score
        assert score("", {"answers": ["a"] * 10}) == {"accuracy": 0, "parse_failure": 1}
        assert score("the", {"answers": ["a"] * 10})["accuracy"] == 0
        assert score("A", {"answers": ["a"] * 10})["accuracy"] == 1


def test_unanimity_survives_a_repeated_answer_id(published):
    votes = [{"answer": "two", "answer_confidence": "yes", "answer_id": 1}] * 10
    benchmark = get_benchmark("vqav2")
    (example,) = benchmark.examples(published("vqav2").table({"answers": votes}))
    assert benchmark.score("2", example.truth)["accuracy"] == 1


def test_a_missing_option_is_not_found_inside_banana(published):
    benchmark = get_benchmark("mmbench")
    for missing in ("nan", "NaN", None, ""):
        (example,) = benchmark.examples(published("mmbench").table({"C": missing, "D": missing}))
        assert set(example.truth["options"]) == {"A", "B"}
        assert benchmark.score("a ripe banana", example.truth) == {"accuracy": 1, "parse_failure": 0}
        assert benchmark.score("nan", example.truth) == {"accuracy": 0, "parse_failure": 1}


def test_eyes_are_no_yes():
    score = get_benchmark("mme").score
    for answer in ("Eyes", "eyes closed", "Know", "snow"):
        for truth in ("yes", "no"):
            assert score(answer, {"answer": truth}) == {"accuracy": 0, "parse_failure": 1}


def test_no_letter_hides_at_the_end_of_a_word():
    options = {"A": "disc", "B": "tape", "C": "film", "D": "paper"}
    score = get_benchmark("mmmu").score
    for answer in ("DVD", "a DVD is it", "USA.", "the NBA"):
        truth = {"id": "x", "type": "multiple-choice", "options": options, "answer": "D"}
        assert score(answer, truth)["parse_failure"] == 1


def test_a_blank_before_a_comma_still_parses():
    truth = {"box": [0.1, 0.2, 0.3, 0.4]}
    assert get_benchmark("refcoco").score("[0.1 , 0.2 , 0.3 , 0.4]", truth)["iou"] == 1


def test_a_box_without_area_divides_by_nothing():
    # an answer without a box was read as [0, 0, 0, 0], whose union with an empty truth is zero
    scores = get_benchmark("refcoco").score("[0, 0, 0, 0]", {"box": [0.0, 0.0, 0.0, 0.0]})
    assert (scores["iou"], scores["parse_failure"]) == (0, 0)


def test_a_twice_inverted_box_is_no_box():
    # both sides negative: its area is positive and its centre right
    scores = get_benchmark("refcoco").score("[0.8, 0.8, 0.2, 0.2]", {"box": [0.2, 0.2, 0.8, 0.8]})
    assert (scores["iou"], scores["center"]) == (0, 0)


def test_an_answer_without_a_box_is_counted_as_such():
    scores = get_benchmark("refcoco").score("the dog", {"box": [0.0, 0.0, 0.5, 0.5]})
    assert (scores["parse_failure"], scores["center"]) == (1, 0)  # read as zeros, its centre would lie inside
