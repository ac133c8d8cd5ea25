"""ANLS against the definition of the distance and hand-worked answers."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.edit_distance import levenshtein, similarity

short = st.text(alphabet="abA ", max_size=7)


@cache
def recursive(one: str, other: str) -> int:
    """The definition, letter by letter from the end."""
    if not one or not other:
        return len(one) + len(other)
    replaced = recursive(one[:-1], other[:-1]) + (one[-1] != other[-1])
    return min(recursive(one[:-1], other) + 1, recursive(one, other[:-1]) + 1, replaced)


@settings(max_examples=150, deadline=None)
@given(one=short, other=short)
def test_the_distance_is_that_of_its_definition(one, other):
    assert levenshtein(one, other) == recursive(one, other)


@settings(max_examples=150, deadline=None)
@given(said=short, answers=st.lists(short, min_size=1, max_size=3))
def test_the_bound_on_lengths_changes_nothing(said, answers):
    text, best = " ".join(said.lower().split()), 0.0
    for answer in (" ".join(answer.lower().split()) for answer in answers):
        if text:
            best = max(best, 1 - recursive(answer, text) / max(len(answer), len(text)))
    assert similarity(said, answers) == (best if best >= 0.5 else 0)


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
@pytest.mark.parametrize(
    ("answer", "anls"),
    [("JAN  8", 1), ("Jan 9", 0.8), ("january 8", 1), ("Jan", 0.6), ("8", 0), ("", 0), ("the date is Jan 8", 0)],
)
def test_hand_worked_answers(name, answer, anls):
    scores = get_benchmark(name).score(answer, {"answers": ["Jan 8", "January 8"]})
    assert scores == {"anls": pytest.approx(anls), "parse_failure": float(not answer)}
