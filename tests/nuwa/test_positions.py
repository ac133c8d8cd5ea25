"""PERC, PESP and RPME against the text of Algorithm 3, in integer arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nuwa.positions import STRATEGIES, text_start, visual_positions


def reference(kept: list[int], strategy: str, start: int, tokens: int) -> list[int]:
    """Section 2.3: renumbered; original; ``ceil(I_j · (e − s) / max I) + s`` with the first kept token at s."""
    end = start + tokens - 1
    ids = []
    for at, index in enumerate(kept):
        if strategy == "perc":
            ids.append(start + at)
        elif strategy == "pesp":
            ids.append(start + index)
        elif at == 0:
            ids.append(start)
        else:
            ids.append(math.ceil(Fraction(index * (end - start), max(kept))) + start)
    return ids


@st.composite
def kept_tokens(draw):
    tokens = draw(st.integers(1, 700))
    keep = draw(st.integers(1, tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [sorted(rng.choice(tokens, keep, replace=False).tolist()) for _ in range(draw(st.integers(1, 3)))]
    return tokens, rows


def test_three_kept_of_twelve_by_hand():
    kept = torch.tensor([[2, 3, 8]])
    assert visual_positions(kept, "perc", 5, 12).tolist() == [[5, 6, 7]]
    assert visual_positions(kept, "pesp", 5, 12).tolist() == [[7, 8, 13]]
    # e − s = 11: 3 · 11 / 8 = 4.125 → 5; 8 · 11 / 8 = 11, the last visual id.
    assert visual_positions(kept, "rpme", 5, 12).tolist() == [[5, 10, 16]]


def test_rpme_multiplies_before_it_divides():
    # 49 · (575 / 98) is 287.5 exactly; 1 · (575 / 98) = 5.87; 98 · (575 / 98) must not be pushed past 575 by rounding.
    assert visual_positions(torch.tensor([[0, 49, 98]]), "rpme", 0, 576).tolist() == [[0, 288, 575]]
    for last in range(1, 576):
        assert visual_positions(torch.tensor([[0, last]]), "rpme", 0, 576)[0, -1] == 575


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=kept_tokens(), strategy=st.sampled_from(STRATEGIES), start=st.integers(0, 5000))
def test_ids_follow_the_paper(case, strategy, start):
    tokens, rows = case
    found = visual_positions(torch.tensor(rows), strategy, start, tokens)
    assert found.dtype == torch.int64
    for ids, kept in zip(found.tolist(), rows, strict=True):
        assert ids == reference(kept, strategy, start, tokens)
        assert all(after > before for before, after in itertools.pairwise(ids)), "ids must rise"
        assert start <= ids[0] and ids[-1] <= start + tokens - 1
        if strategy == "rpme":
            assert ids[0] == start
            assert ids[-1] == start + tokens - 1 or len(ids) == 1


@pytest.mark.parametrize("tokens", [1, 2, 35, 144, 576])
def test_everything_kept_means_the_original_ids_whatever_the_strategy(tokens):
    everything = torch.arange(tokens)[None]
    for strategy in STRATEGIES:
        assert visual_positions(everything, strategy, 4, tokens).tolist() == [list(range(4, 4 + tokens))]
        assert text_start(strategy, 4, tokens, tokens) == 4 + tokens


@pytest.mark.parametrize("token", [0, 7, 143])
def test_one_kept_token(token):
    one = torch.tensor([[token]])
    assert visual_positions(one, "perc", 3, 144).tolist() == [[3]]
    assert visual_positions(one, "pesp", 3, 144).tolist() == [[3 + token]]
    assert visual_positions(one, "rpme", 3, 144).tolist() == [[3]]


def test_text_follows_directly_under_perc_and_stays_otherwise():
    assert [text_start(strategy, 5, 144, 16) for strategy in ("perc", "pesp", "rpme")] == [21, 149, 149]


def test_rows_of_a_batch_are_spread_each_by_its_own_last_token():
    rows = torch.tensor([[0, 1, 2], [3, 4, 143], [141, 142, 143]])
    together = visual_positions(rows, "rpme", 0, 144)
    assert together.tolist() == [visual_positions(row[None], "rpme", 0, 144)[0].tolist() for row in rows]
    assert together[0].tolist() == [0, 72, 143]


@pytest.mark.parametrize(
    "ask",
    [lambda: visual_positions(torch.tensor([[0]]), "sparse", 0, 4), lambda: text_start("sparse", 0, 4, 1)],
    ids=["visual_positions", "text_start"],
)
def test_an_unknown_strategy_is_named_with_what_exists(ask):
    with pytest.raises(ValueError) as caught:
        ask()
    assert str(caught.value) == "position strategy 'sparse' is unknown; allowed: perc, pesp, rpme"
