"""The registry, prompt styles, and what every score owes: any text, the same numbers, an untouched truth."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuwa.benchmarks import BENCHMARKS, TESTBED, Example, get_benchmark

BOXED = {"box": [0.25, 0.25, 0.75, 0.75], "size": [20, 10], "photo": [20, 10], "padded": [20, 10]}
OPTIONS = {"A": "red (dark)", "B": "a [b", "C": "\\d+"}
TRUTHS = {
    "refcoco": [BOXED],
    "refcocoplus": [BOXED],
    "refcocog": [BOXED],
    "gqa": [{"answer": "yes"}],
    "pope": [{"answer": "yes"}, {"answer": "no"}],
    "textvqa": [{"answers": ["a", "", "the", *["yes"] * 7]}],
    "vqav2": [{"answers": ["a", "", "the", *["yes"] * 7]}],
    "scienceqa": [{"answer": "A", "options": OPTIONS}],
    "mme": [{"answer": "yes", "group": "count/1"}],
    "mmbench": [{"answer": "A", "options": OPTIONS, "group": "1", "grade": 0.25}],
    "mmbench_cn": [{"answer": "A", "options": OPTIONS, "group": "1"}],
    "seedbench": [{"answer": "A", "options": OPTIONS}],
    "mmmu": [
        {"id": "x", "type": "multiple-choice", "options": OPTIONS, "answer": "A"},
        {"id": "x", "type": "open", "answers": ["7", "x", "nan"]},
    ],
    "mmvet": [{"question": "q", "answer": "x", "grade": 0.25}],
    "docvqa": [{"answers": ["yes", "a b"]}],
    "infovqa": [{"answers": ["yes", "a b"]}],
    "ocrbench": [{"answers": ["yes", "a b"], "dataset": name, "part": "scene"} for name in ("SVT", "HME100k")],
    "chartqa": [{"answer": answer, "type": "human_test"} for answer in ("yes", "0", "12.5%")],
    "mmstar": [{"answer": "A"}],
    "hallusionbench": [{"answer": "yes", "group": "f | q", "grade": 1}],
    "realworldqa": [{"answer": answer, "options": ["yes", "(", ""]} for answer in ("A", "2", "Down hill")],
    "ai2d": [{"answer": "A", "options": OPTIONS}],
    "vizwiz": [{"answers": ["a", "", "the", *["yes"] * 7]}],
}
CASES = [
    pytest.param(benchmark.under(protocol), truth, id=f"{name}-{benchmark.variant}-{protocol}-{number}")
    for name, variants in BENCHMARKS.items()
    for benchmark in variants
    if benchmark.submission is None  # scored by its server alone
    for protocol in (TESTBED, *(name for name, rules in benchmark.rules.items() if rules.score))
    for number, truth in enumerate(TRUTHS[name])
]
any_text = st.one_of(
    st.text(),
    st.text(alphabet="[](){},.:;-+eE0123456789 \n"),
    st.text(alphabet="ABCDEabcdyesno'()., \n"),
    st.lists(st.sampled_from(["[", "]", "0.5", ",", "yes", "no", "A", "(B)", "is", "=", "1,000", "the", "."])).map(
        "".join
    ),
)


@settings(max_examples=200, deadline=None)
@given(prediction=any_text)
def test_any_text_scores(prediction):
    """Every text under every rule: to draw one takes longer than to score it."""
    for case in CASES:
        (benchmark, truth), rule = case.values, case.id
        before = copy.deepcopy(truth)
        scores = benchmark.score(prediction, truth)
        assert scores["parse_failure"] in (0.0, 1.0), rule
        assert all(type(value) is float and 0 <= value <= 1 + 1e-12 for value in scores.values()), rule
        assert benchmark.score(prediction, truth) == scores, rule
        assert truth == before, rule


@pytest.mark.parametrize(("benchmark", "truth"), CASES)
def test_hostile_texts_score(benchmark, truth):
    for prediction in ("\0", "\ud800", "9" * 10_000, "[" * 5_000, "1e999", "[" + "0," * 3 + "1" * 500 + "]", "İ ﬁ ①"):
        assert all(math.isfinite(value) for value in benchmark.score(prediction, truth).values())


@pytest.mark.parametrize(("benchmark", "truth"), CASES)
def test_aggregates_name_their_headline(benchmark, truth):
    table = benchmark.score_table(["yes", "A"], [truth | {"group": "g"}] * 2, ["count"] * 2)
    assert list(table["group"]) == ["g", "g"] and list(table["category"]) == ["count"] * 2
    result = benchmark.aggregate(table)
    assert "parse_failure" in result
    assert all(type(value) is float and math.isfinite(value) for value in result.values())
    assert benchmark.headline in result or benchmark.name == "mmvet"


def test_questions_without_group_are_their_own():
    table = get_benchmark("gqa").score_table(["yes", "no"], [{"answer": "yes"}] * 2, ["", ""])
    assert table["group"].nunique() == 2


def test_scores_need_as_many_truths_as_answers():
    with pytest.raises(ValueError):
        get_benchmark("gqa").score_table(["yes"], [], [])


def test_the_registry_holds_every_benchmark_and_variant():
    assert {name: [one.variant for one in variants] for name, variants in BENCHMARKS.items()} == {
        "refcoco": ["as_published", "unpadded", "pixels", "thousandths", "ref_tags"],
        "refcocoplus": ["as_published", "unpadded", "pixels", "thousandths", "ref_tags"],
        "refcocog": ["as_published", "unpadded", "pixels", "thousandths", "ref_tags"],
        "gqa": [""],
        "pope": ["exact", "first_sentence"],
        "textvqa": ["no_ocr", "ocr"],
        "vqav2": ["", "submission"],
        "scienceqa": [""],
        "mme": [""],
        "mmbench": ["rules", "judged", "submission"],
        "mmbench_cn": [""],
        "seedbench": [""],
        "mmmu": ["all_images", "single_image", "first_image"],
        "mmvet": ["", "judged"],
        "docvqa": [""],
        "infovqa": [""],
        "ocrbench": [""],
        "chartqa": [""],
        "mmstar": [""],
        "hallusionbench": ["yes_no", "judged"],
        "realworldqa": [""],
        "ai2d": [""],
        "vizwiz": ["", "submission"],
    }
    for name, variants in BENCHMARKS.items():
        assert get_benchmark(name) is variants[0]
        for benchmark in variants:
            assert benchmark.name == name
            assert get_benchmark(name, benchmark.variant) is benchmark


ALL = ", ".join(sorted(BENCHMARKS))
UNKNOWN = [
    (("refcco", None), f"benchmark 'refcco' is unknown; allowed: {ALL}; did you mean 'refcoco'?"),
    (("xyz", None), f"benchmark 'xyz' is unknown; allowed: {ALL}"),
    (
        ("pope", "first-sentence"),
        "variant of pope 'first-sentence' is unknown; allowed: exact, first_sentence; did you mean 'first_sentence'?",
    ),
    (("gqa", "ocr"), "variant of gqa 'ocr' is unknown; allowed: none"),
]


@pytest.mark.parametrize(("asked", "message"), UNKNOWN)
def test_unknown_names_say_what_exists(asked, message):
    with pytest.raises(ValueError) as error:
        get_benchmark(*asked)
    assert str(error.value) == message


def test_unknown_prompt_styles_are_refused():
    example = Example("gqa:1", "why?", {"answer": "yes"}, "", b"")
    with pytest.raises(ValueError, match=r"^prompt style 'chatml' does not exist; choose one of llava_v1, testbed$"):
        get_benchmark("gqa").prompt(example, "chatml")
