"""Metrics over groups of questions: finer fields, figures, questions over figures, parts of a table; by slow oracles."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from nuwa.benchmarks import get_benchmark


@pytest.mark.parametrize("seed", range(5))
def test_mmstar_averages_over_fields_not_over_questions(seed):
    draw, benchmark = random.Random(seed), get_benchmark("mmstar")
    fields = ["math: geometry", "math: statistics", "vision: colour"]
    said, truths, categories = [], [], []
    for _ in range(30):
        said.append(draw.choice("ABCD"))
        truths.append({"answer": draw.choice("ABCD")})
        categories.append(draw.choices(fields, (8, 3, 1))[0])

    by_field = defaultdict(list)
    for answer, truth, field in zip(said, truths, categories, strict=True):
        by_field[field].append(answer == truth["answer"])
    average = sum(sum(right) / len(right) for right in by_field.values()) / len(by_field)

    metrics = benchmark.aggregate(benchmark.score_table(said, truths, categories))
    assert metrics["average"] == pytest.approx(average)
    assert metrics["accuracy"] == pytest.approx(sum(map(sum, by_field.values())) / 30)


@pytest.mark.parametrize("seed", range(5))
def test_hallusionbench_asks_whole_figures_and_whole_questions(seed):
    draw, benchmark = random.Random(seed), get_benchmark("hallusionbench")
    rows = [(figure, question) for figure in range(4) for question in range(3)]
    said = [draw.choice(["Yes.", "no", "No, it is not.", "maybe"]) for _ in rows]
    right = [answer.lower().startswith("no") for answer in said]
    truths = [{"answer": "no", "group": f"VD/figure {figure} | VD/question {question}"} for figure, question in rows]

    by_figure, by_question = defaultdict(list), defaultdict(list)
    for (figure, question), correct in zip(rows, right, strict=True):
        by_figure[figure].append(correct)
        by_question[question].append(correct)

    metrics = benchmark.aggregate(benchmark.score_table(said, truths, ["VD"] * len(rows)))
    assert metrics["accuracy"] == pytest.approx(sum(right) / 12)
    assert metrics["figure_accuracy"] == pytest.approx(sum(map(all, by_figure.values())) / 4)
    assert metrics["question_accuracy"] == pytest.approx(sum(map(all, by_question.values())) / 3)
    assert metrics["parse_failure"] == pytest.approx(said.count("maybe") / 12)


def test_copies_of_a_group_are_figures_and_questions_of_their_own():
    """A bootstrap draws an image twice, with a label of its own for each copy."""
    benchmark = get_benchmark("hallusionbench")
    truths = [{"answer": "yes", "group": f"f | q #{copy}"} for copy in (0, 1)]
    metrics = benchmark.aggregate(benchmark.score_table(["yes", "no"], truths, ["VD"] * 2))
    assert metrics["figure_accuracy"] == metrics["question_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("answer", "means"),
    [("Yes", True), ("No.", False), ("Eyes are open", None), ("yes and no", None), ("", None), ("Not at all", None)],
)
def test_hallusionbench_reads_whole_words(answer, means):
    scores = get_benchmark("hallusionbench").score(answer, {"answer": "yes"})
    assert scores == {"accuracy": float(means is True), "parse_failure": float(means is None)}


def test_ocrbench_counts_hits_by_part():
    benchmark = get_benchmark("ocrbench")
    truths = [
        {"answers": ["12"], "dataset": "SVT", "part": "recognition"},
        {"answers": ["12"], "dataset": "SVT", "part": "recognition"},
        {"answers": ["a ^ B"], "dataset": "HME100k", "part": "formulas"},
    ]
    metrics = benchmark.aggregate(benchmark.score_table(["It says 12.", "123", "a^B + 1"], truths, [""] * 3))
    assert (metrics["hits"], metrics["accuracy"]) == (2, pytest.approx(2 / 3))
    assert (metrics["recognition"], metrics["formulas"], metrics["scene"]) == (0.5, 1, 0)


def test_chartqa_tells_people_from_what_was_made():
    benchmark = get_benchmark("chartqa")
    truths = [{"answer": "100", "type": kind} for kind in ("human_test", "human_test", "augmented_test")]
    metrics = benchmark.aggregate(benchmark.score_table(["105", "106", "95"], truths, [""] * 3))
    assert (metrics["human"], metrics["augmented"], metrics["accuracy"]) == (0.5, 1, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("1.05", "1", 1),
        ("1.06", "1", 0),
        ("0", "0", 1),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("1,000", "1000", 1),
        ("10,0", "100", 0),
        ("5%", "0.05", 1),
        (" Yes ", "yes", 1),
        ("nan", "nan", 1),
        ("inf", "1", 0),
        ("-1", "1", 0),
    ],
)
def test_chartqa_is_relaxed_about_numbers(answer, truth, right):
    scored = get_benchmark("chartqa").score(answer, {"answer": truth, "type": "human_test"})
    assert scored["accuracy"] == right
