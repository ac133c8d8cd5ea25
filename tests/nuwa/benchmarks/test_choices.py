"""Multiple choice: ScienceQA, SEED-Bench, MMBench and MMMU on hand-worked answers."""

from __future__ import annotations

import pytest

from nuwa.benchmarks import get_benchmark, mmbench_cn

OPTIONS = {"A": "red", "B": "dark red", "C": "a DVD player", "D": "banana"}


def chosen(name: str, answer: str, options: dict[str, str] = OPTIONS) -> str | None:
    """The option that scores, ``None`` for a parse failure, ``"none"`` for a reading that scores for no option."""
    truths = {
        letter: {"answer": letter, "options": options, "type": "multiple-choice", "id": "x"} for letter in options
    }
    scores = {letter: get_benchmark(name).score(answer, truth) for letter, truth in truths.items()}
    if all(score["parse_failure"] == 1 for score in scores.values()):
        return None
    assert all(score["parse_failure"] == 0 for score in scores.values())
    right = [letter for letter, score in scores.items() if score["accuracy"] == 1]
    assert len(right) == 1
    return right[0]


SCIENCEQA = [
    ("B", "B"),
    (" B\n", "B"),
    ("B.", "B"),
    ("B. dark red", "B"),
    ("B.C", "B"),
    ("b", "B"),
    ("b.", None),
    ("b. dark red", None),
    ("e", None),
    ("B)", None),
    ("(B)", None),
    ("The answer is B.", None),
    ("Banana", None),
    ("E", None),
    ("E. other", None),
    ("", None),
]
SEEDBENCH = [
    ("B", "B"),
    ("  B. dark", "B"),
    ("Dog", "D"),
    ("b", "B"),
    ("d. dark", "D"),
    ("e", None),
    ("(B)", None),
    ("E", None),
    ("", None),
]
MMBENCH = [
    ("B", "B"),
    ("B.", "B"),
    ("(C)", "C"),
    ("C: a DVD player", "C"),
    ("The answer is D", "D"),
    ("Answer: D).", "D"),
    ("A", "A"),
    ("A red thing", "A"),  # up to three words, A is taken for a letter
    ("A thing of bright colour", None),  # here it may be the article
    ("A or B", None),
    ("Both A. and B.", None),
    ("banana", "D"),
    ("It is a Banana!", "D"),
    ("dark red", "B"),  # the whole answer, although red stands in it
    ("it is dark red", None),  # two options stand in it
    ("bananas", None),
    ("sheer hatred", None),
    ("DVD", None),
    ("E", None),
    ("", None),
]
MMMU = [
    ("B", "B"),
    ("(B)", "B"),
    ("A cat, so (B) it is", "B"),  # brackets before bare letters
    ("Not A but B", "B"),  # the last one
    ("B, not (A)", "A"),
    ("C.", "C"),
    ("The answer is C. It plays", "C"),
    ("'D'", "D"),
    ("It is dark red", "B"),  # two options end there: the longer
    ("red or banana", "D"),
    ("a dvd PLAYER", "C"),
    ("DVD", None),
    ("LED. It shines", None),
    ("sheer hatred", None),
    ("bananas", None),
    ("E", None),
    ("", None),
]


CHINESE = {"A": "红色", "B": "深红色", "C": "一只狗", "D": "X射线"}
MMBENCH_CN = [
    ("A", "A"),
    ("B。", "B"),
    ("答案是C", "C"),
    ("选项D：X射线", "D"),
    ("（B）深红色", "B"),
    ("A或B", None),  # two letters
    ("E", None),  # no such option
    ("DVD", None),  # letters of a word
    ("红色", "A"),  # all of the answer
    ("深红色。", "B"),
    ("它是一只狗", "C"),
    ("它是深红色的", None),  # two options stand there
    ("X射线", "D"),
    ("", None),
    ("不知道", None),
]


@pytest.mark.parametrize(("answer", "letter"), MMBENCH_CN)
def test_mmbench_cn(answer, letter):
    assert mmbench_cn.named_option(answer, CHINESE) == letter


@pytest.mark.parametrize(("answer", "letter"), SCIENCEQA)
def test_scienceqa(answer, letter):
    assert chosen("scienceqa", answer) == letter


@pytest.mark.parametrize(("answer", "letter"), SEEDBENCH)
def test_seedbench(answer, letter):
    assert chosen("seedbench", answer) == letter


@pytest.mark.parametrize(("answer", "letter"), MMBENCH)
def test_mmbench(answer, letter):
    assert chosen("mmbench", answer) == letter


@pytest.mark.parametrize(("answer", "letter"), MMMU)
def test_mmmu_choices(answer, letter):
    assert chosen("mmmu", answer) == letter


def test_mmbench_counts_a_question_when_all_its_copies_are_right():
    benchmark = get_benchmark("mmbench")
    truths = [
        {"answer": answer, "options": {"A": "x", "B": "y"}, "group": group}
        for answer, group in (("A", "241"), ("B", "241"), ("A", "7"), ("B", "7"), ("A", "9"))
    ]
    table = benchmark.score_table(["A", "B", "A", "A", "hm"], truths, ["c"] * 5)
    # question 241 is right twice, 7 once of two, 9 not read
    assert benchmark.aggregate(table) == pytest.approx(
        {"accuracy": 3 / 5, "circular_accuracy": 1 / 3, "parse_failure": 1 / 5}
    )
    assert benchmark.headline == "circular_accuracy"


def test_mmbench_without_copies_is_plain_accuracy():
    benchmark = get_benchmark("mmbench")
    truths = [{"answer": "A", "options": {"A": "x", "B": "y"}, "group": str(number)} for number in range(4)]
    result = benchmark.aggregate(benchmark.score_table(["A", "A", "B", "A"], truths, ["c"] * 4))
    assert result["accuracy"] == result["circular_accuracy"] == 0.75


def test_mmmus_fallback_is_drawn_by_the_question():
    def right(question_id: str, answer: str) -> float:
        truth = {"id": question_id, "type": "multiple-choice", "options": OPTIONS, "answer": "C"}
        scores = get_benchmark("mmmu").score(answer, truth)
        assert scores["parse_failure"] == 1
        return scores["accuracy"]

    drawn = [right(f"validation_Art_{number}", "no idea") for number in range(400)]
    assert drawn == [right(f"validation_Art_{number}", "?") for number in range(400)]  # neither run nor wording matter
    assert 0.18 < sum(drawn) / 400 < 0.32  # about one in four


OPEN = [
    (["7"], "7", 1),
    (["7"], "The answer is 7.", 1),
    (["7"], "7.004", 1),  # to two decimals
    (["7"], "17", 0),
    (["1,000"], "so it is 1000", 1),
    (["0.5"], "x = 1/2 = .5", 1),
    (["-3"], "the result is -3", 1),
    (["7"], "the first is 7\nthe answer is 8", 1),  # a key phrase of each line
    (["monet"], "It was painted by Claude Monet", 1),
    (["Monet", "Manet"], "Manet", 1),
    (["x"], "the answer is x", 1),
    (["x"], "the answer is exact", 0),  # a lone letter counts as a word
    (["monet"], "Ernst", 0),
]


@pytest.mark.parametrize(("answers", "answer", "accuracy"), OPEN)
def test_mmmus_open_questions(answers, answer, accuracy):
    truth = {"id": "x", "type": "open", "answers": answers}
    assert get_benchmark("mmmu").score(answer, truth) == {"accuracy": accuracy, "parse_failure": 0}


def test_an_empty_open_answer_is_a_parse_failure():
    truth = {"id": "x", "type": "open", "answers": ["7"]}
    assert get_benchmark("mmmu").score(" \n", truth) == {"accuracy": 0, "parse_failure": 1}
