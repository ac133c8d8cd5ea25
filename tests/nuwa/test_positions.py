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

from nuwa.grid import PatchGrid
from nuwa.layout import InterleavedLayout, View, VisualLayout
from nuwa.positions import STRATEGIES, sequence_positions, visual_positions


def line(tokens: int) -> VisualLayout:
    """An image whose tokens have one position id each."""
    return VisualLayout((View(PatchGrid(1, tokens)),))


def one_axis(kept, strategy, start, tokens) -> torch.Tensor:
    found = visual_positions(torch.as_tensor(kept), strategy, start, line(tokens))
    assert len(found) == 1
    return found[0]


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
    assert one_axis(kept, "perc", 5, 12).tolist() == [[5, 6, 7]]
    assert one_axis(kept, "pesp", 5, 12).tolist() == [[7, 8, 13]]
    # e − s = 11: 3 · 11 / 8 = 4.125 → 5; 8 · 11 / 8 = 11, the last visual id.
    assert one_axis(kept, "rpme", 5, 12).tolist() == [[5, 10, 16]]


def test_rpme_multiplies_before_it_divides():
    # 49 · (575 / 98) is 287.5 exactly; 1 · (575 / 98) = 5.87; 98 · (575 / 98) must not be pushed past 575 by rounding.
    assert one_axis([[0, 49, 98]], "rpme", 0, 576).tolist() == [[0, 288, 575]]
    for last in range(1, 576):
        assert one_axis([[0, last]], "rpme", 0, 576)[0, -1] == 575


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=kept_tokens(), strategy=st.sampled_from(STRATEGIES), start=st.integers(0, 5000))
def test_ids_follow_the_paper(case, strategy, start):
    tokens, rows = case
    found = one_axis(rows, strategy, start, tokens)
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
        assert one_axis(everything, strategy, 4, tokens).tolist() == [list(range(4, 4 + tokens))]
        assert sequence_positions(everything, strategy, 4, line(tokens)).after.tolist() == [4 + tokens]


@pytest.mark.parametrize("token", [0, 7, 143])
def test_one_kept_token(token):
    one = torch.tensor([[token]])
    assert one_axis(one, "perc", 3, 144).tolist() == [[3]]
    assert one_axis(one, "pesp", 3, 144).tolist() == [[3 + token]]
    assert one_axis(one, "rpme", 3, 144).tolist() == [[3]]


def test_text_follows_directly_under_perc_and_stays_otherwise():
    kept = torch.arange(0, 144, 9)[None].expand(2, -1)
    for strategy, expected in {"perc": 21, "pesp": 149, "rpme": 149}.items():
        assert sequence_positions(kept, strategy, 5, line(144)).after.tolist() == [expected, expected]


def test_rows_of_a_batch_are_spread_each_by_its_own_last_token():
    rows = torch.tensor([[0, 1, 2], [3, 4, 143], [141, 142, 143]])
    together = one_axis(rows, "rpme", 0, 144)
    assert together.tolist() == [one_axis(row[None], "rpme", 0, 144)[0].tolist() for row in rows]
    assert together[0].tolist() == [0, 72, 143]


def test_an_unknown_strategy_is_named_with_what_exists():
    with pytest.raises(ValueError) as caught:
        visual_positions(torch.tensor([[0]]), "sparse", 0, grid_of(2, 2))
    assert str(caught.value) == "position strategy 'sparse' is unknown; allowed: perc, pesp, rpme"


# --- three ids a token (M-RoPE): time, row, column


def grid_of(height: int, width: int) -> VisualLayout:
    return VisualLayout((View(PatchGrid(height, width)),), axes=3)


def rows_and_columns(kept: list[int], strategy: str, start: int, height: int, width: int) -> list[list[int]]:
    """The three axes, each by the formulas of one axis over its distinct kept ids."""
    axes = [([0] * len(kept), 1), ([slot // width for slot in kept], height), ([slot % width for slot in kept], width)]
    found = []
    for ids, size in axes:
        distinct = sorted(set(ids))
        new = dict(zip(distinct, reference(distinct, strategy, start, size), strict=True))
        found.append([new[value] for value in ids])
    return found


def test_a_kept_row_and_two_kept_columns_by_hand():
    # A grid of 4 rows and 6 columns; kept: (1, 2), (1, 4), (3, 2).
    layout, kept = grid_of(4, 6), torch.tensor([[8, 10, 20]])
    assert visual_positions(kept, "pesp", 5, layout)[:, 0].tolist() == [[5, 5, 5], [6, 6, 8], [7, 9, 7]]
    # Rows 1 and 3 close up, and so do columns 2 and 4; the text follows the longer side, 2.
    closed = visual_positions(kept, "perc", 5, layout)
    assert closed[:, 0].tolist() == [[5, 5, 5], [5, 5, 6], [5, 6, 5]]
    assert sequence_positions(kept, "perc", 5, layout).after.tolist() == [7]
    # Rows 1, 3 of 0...3 become 0, 3; columns 2, 4 of 0...5 become 0, 5; the text stays behind the 6 columns.
    spread = visual_positions(kept, "rpme", 5, layout)
    assert spread[:, 0].tolist() == [[5, 5, 5], [5, 5, 8], [5, 10, 5]]
    assert sequence_positions(kept, "rpme", 5, layout).after.tolist() == [11]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(STRATEGIES),
    start=st.integers(0, 500),
)
def test_every_axis_follows_the_formulas_of_one(height, width, seed, strategy, start):
    rng = np.random.default_rng(seed)
    keep = int(rng.integers(1, height * width + 1))
    rows = [sorted(rng.choice(height * width, keep, replace=False).tolist()) for _ in range(2)]
    layout = grid_of(height, width)
    found = visual_positions(torch.tensor(rows), strategy, start, layout)
    for row, kept in enumerate(rows):
        assert found[:, row].tolist() == rows_and_columns(kept, strategy, start, height, width)
    behind = sequence_positions(torch.tensor(rows), strategy, start, layout).after.tolist()
    if strategy == "perc":
        assert behind == [max(map(max, found[:, row].tolist())) + 1 for row in range(2)]
    else:
        assert behind == [start + max(height, width)] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_grid_keeps_its_three_ids(strategy):
    layout = grid_of(3, 5)
    found = sequence_positions(torch.arange(15)[None], strategy, 7, layout)
    assert found.visual[:, 0].tolist() == rows_and_columns(list(range(15)), "pesp", 7, 3, 5)
    assert found.after.tolist() == [12]


# --- several images in a sequence


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4),
    axes=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(STRATEGIES),
)
def test_every_image_is_placed_as_if_alone_behind_the_text_before_it(shapes, axes, seed, strategy):
    rng = np.random.default_rng(seed)
    images = [VisualLayout((View(PatchGrid(height, width)),), axes=axes) for height, width in shapes]
    between = rng.integers(0, 4, len(images) - 1).tolist()
    layout = InterleavedLayout.of(images, between)
    # Rows keep as many in all, but not of every image: some of them may lose all.
    keep = int(rng.integers(0, layout.tokens + 1))
    rows = [sorted(rng.choice(layout.tokens, keep, replace=False).tolist()) for _ in range(3)]
    found = sequence_positions(torch.tensor(rows, dtype=torch.long), strategy, 5, layout)
    for row, kept in enumerate(rows):
        start, first, visual, texts = 5, 0, [], []
        for image, text in zip(images, [*between, 0], strict=True):
            own = torch.tensor([[slot - first for slot in kept if first <= slot < first + image.tokens]]).long()
            alone = sequence_positions(own, strategy, start, image)
            visual.append(alone.visual[:, 0])
            texts += range(int(alone.after), int(alone.after) + text)
            start, first = int(alone.after) + text, first + image.tokens
        assert found.visual[:, row].tolist() == torch.cat(visual, dim=1).tolist()
        assert found.between[row].tolist() == texts
        assert found.after[row] == start


def test_texts_between_images_are_counted_right():
    image = VisualLayout((View(PatchGrid(2, 2)),))
    with pytest.raises(ValueError) as caught:
        InterleavedLayout.of([image, image], [3, 4])
    assert str(caught.value) == "2 images have 1 texts between them, not 2"
