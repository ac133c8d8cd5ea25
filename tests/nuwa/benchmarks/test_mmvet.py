"""MM-Vet with and without a judge."""

from __future__ import annotations

import pytest

from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.mmvet import with_judge

TRUTH = {"question": "what is x?", "answer": "-1<AND>-5"}


def test_without_a_judge_there_is_no_headline():
    benchmark = get_benchmark("mmvet")
    result = benchmark.aggregate(benchmark.score_table(["-1", ""], [TRUTH] * 2, ["math"] * 2))
    assert result == {"parse_failure": 0.5}
    assert benchmark.headline not in result


def test_a_judge_grades_what_is_there():
    asked = []

    def judge(question: str, answer: str, prediction: str) -> float:
        asked.append((question, answer, prediction))
        return 0.5

    benchmark = with_judge(judge)
    result = benchmark.aggregate(benchmark.score_table(["-1", " "], [TRUTH] * 2, ["math"] * 2))
    assert result == {"judge_score": 0.25, "parse_failure": 0.5}
    assert asked == [("what is x?", "-1<AND>-5", "-1")]  # the empty answer is not worth a call


@pytest.mark.parametrize("grade", [-0.1, 1.5, float("nan")])
def test_grades_outside_the_scale_are_refused(grade):
    with pytest.raises(ValueError, match=f"^the judge of mmvet gave {grade}; grades go from 0 to 1$"):
        with_judge(lambda *_: grade).score("x", TRUTH)
