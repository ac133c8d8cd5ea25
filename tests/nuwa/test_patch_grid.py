"""The patch grid and the containers of signals, against loops and hand-worked grids."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from oracles.nuwa import regions as region_blocks

from nuwa.grid import PatchGrid
from nuwa.selection import gather_tokens, keep_unmerged
from nuwa.signals import (
    VisionSignals,
    cosine_similarity,
    directions,
    random_scores,
    ranked,
    seeded_generator,
    top_indices,
)

GRIDS = [(1, 1), (1, 9), (9, 1), (5, 7), (4, 10), (12, 12)]


def signals(grid: PatchGrid, batch: int = 2, **wrong) -> VisionSignals:
    parts = {
        "features": torch.randn(batch, grid.tokens, 3),
        "cls_attention": torch.rand(batch, grid.tokens),
        "keys": torch.randn(batch, grid.tokens, 4),
        "similarity": torch.randn(batch, grid.tokens, 3),
        "image_ids": tuple(f"image-{row}" for row in range(batch)),
    }
    return VisionSignals(grid=grid, **{**parts, **wrong})


def test_tokens_stand_in_raster_order():
    # Token 1 is beside token 0, token 3 below it.
    assert PatchGrid(2, 3).distances(torch.tensor([[0]]))[0, 0].square().round().tolist() == [0, 1, 4, 1, 2, 5]


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("side", [1, 2, 3, 20])
def test_regions_are_the_blocks_of_the_grid(height, width, side):
    found = PatchGrid(height, width).regions(side).tolist()
    blocks = region_blocks(height, width, side)
    assert [found[token] for block in blocks for token in block] == [
        number for number, block in enumerate(blocks) for _ in block
    ]
    assert PatchGrid(height, width).region_sizes(side) == [len(block) for block in blocks]


def test_clips_grid_has_the_papers_144_regions():
    sizes = torch.bincount(PatchGrid(24, 24).regions(2))
    assert sizes.tolist() == [4] * 144


def test_regions_at_the_far_edges_are_smaller():
    # A 3x5 grid in blocks of 2: columns 0-1, 2-3, 4 and rows 0-1, 2.
    assert PatchGrid(3, 5).regions(2).view(3, 5).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_distances_are_euclidean_in_patches(height, width):
    grid = PatchGrid(height, width)
    kept = torch.tensor([[0, grid.tokens - 1], [grid.tokens // 2, grid.tokens - 1]])
    found = grid.distances(kept)
    assert found.shape == (2, 2, grid.tokens)
    for row in range(2):
        for at, token in enumerate(kept[row].tolist()):
            expected = [math.dist(divmod(token, width), divmod(other, width)) for other in range(grid.tokens)]
            assert found[row, at].tolist() == pytest.approx(expected, abs=1e-5)
    assert grid.max_squared_distance == pytest.approx(math.dist((0, 0), (height - 1, width - 1)) ** 2)


def test_largest_squared_distance_on_clips_grid_is_the_papers_1058():
    assert PatchGrid(24, 24).max_squared_distance == 1058


@pytest.mark.parametrize(("height", "width"), [(0, 3), (3, 0), (-1, 3)])
def test_an_empty_grid_is_refused(height, width):
    with pytest.raises(ValueError) as caught:
        PatchGrid(height, width)
    assert str(caught.value) == f"patch grid {height}x{width} must have at least one row and one column"


@pytest.mark.parametrize("ask", [PatchGrid.regions, PatchGrid.region_sizes])
def test_a_region_without_patches_is_refused(ask):
    with pytest.raises(ValueError) as caught:
        ask(PatchGrid(4, 4), 0)
    assert str(caught.value) == "region side 0 must be at least 1 patch"


@pytest.mark.parametrize("name", ["features", "cls_attention", "keys", "similarity"])
def test_signals_of_another_grid_are_refused(name):
    wrong = torch.zeros(2, 7) if name == "cls_attention" else torch.zeros(2, 7, 3)
    with pytest.raises(ValueError) as caught:
        signals(PatchGrid(2, 3), **{name: wrong})
    assert str(caught.value) == (
        f"signals.{name} has shape {tuple(wrong.shape)}; its first two sizes must be (2, 6): "
        "images and tokens of the 2x3 grid"
    )


def test_a_slice_of_signals_keeps_images_and_ids_together():
    whole = signals(PatchGrid(2, 3), batch=4)
    part = whole[1:3]
    assert part.image_ids == ("image-1", "image-2")
    for name in ("features", "cls_attention", "keys", "similarity"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:3])


def test_key_norm_is_that_of_the_whole_key_in_float32():
    keys = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float16)
    one = signals(PatchGrid(1, 2), 1, keys=keys, features=torch.zeros(1, 2, 1), image_ids=("x",))
    assert one.key_norm.tolist() == [[5.0, 0.0]] and one.key_norm.dtype == torch.float32


def test_equal_scores_keep_the_lower_index_first():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0], [0.0, -0.0, 0.0, 0.0, -torch.inf]])
    assert ranked(scores).tolist() == [[1, 3, 0, 2, 4], [0, 1, 2, 3, 4]]
    assert top_indices(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2]]
    # Long enough that an unstable sort would shuffle.
    assert top_indices(torch.zeros(1, 4000), 70).tolist() == [list(range(70))]


def test_gathered_tokens_are_the_asked_ones():
    values = torch.arange(2 * 3 * 2).view(2, 3, 2)
    assert gather_tokens(values, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_unmerged_tokens_are_all_pillars():
    whole = signals(PatchGrid(2, 3))
    kept = torch.tensor([[0, 5], [1, 2]])
    selection = keep_unmerged(whole, kept)
    assert selection.kept == 2 and selection.pillars.all()
    assert torch.equal(selection.features, torch.stack([whole.features[0, [0, 5]], whole.features[1, [1, 2]]]))


def test_random_streams_depend_on_seed_and_on_every_part_of_the_identity():
    draws = [
        seeded_generator(*who).random(4).tolist()
        for who in [(0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "b", "a")]
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert seeded_generator(7, "a", "b").random(4).tolist() == seeded_generator(7, "a", "b").random(4).tolist()


def split_mix(state: int) -> int:
    """SplitMix64's output for a state, in Python's unbounded integers."""
    mask = 2**64 - 1
    word = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & mask
    return word ^ (word >> 31)


def test_split_mix_starts_with_its_published_numbers():
    # The first three numbers of seed 1234567.
    step = 0x9E3779B97F4A7C15
    drawn = [split_mix((1234567 + at * step) % 2**64) for at in (1, 2, 3)]
    assert drawn == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_random_scores_are_split_mix_started_by_seed_and_image(seed):
    images = ("a", "b", "image 17", "ü")
    scores = random_scores(seed, images, 50, torch.device("cpu"))
    for row, image in enumerate(images):
        start = int.from_bytes(hashlib.sha256(f"{seed}\0{image}".encode()).digest()[:8], "little")
        words = [split_mix((start + (token + 1) * 0x9E3779B97F4A7C15) % 2**64) for token in range(50)]
        assert [score % 2**64 for score in scores[row].tolist()] == words


def test_directions_have_length_one_and_zero_stays_zero():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0], [-2.0, 0.0]], dtype=torch.float16)
    assert torch.equal(directions(vectors), torch.tensor([[0.6, 0.8], [0, 0], [0, 0], [-1, 0]], dtype=torch.float64))
    assert vectors.tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [-2.0, 0.0]], "the input is left alone"
    double = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    directions(double)
    assert double.tolist() == [[3.0, 4.0]]


def test_equal_vectors_are_equally_similar_wherever_they_stand():
    generator = torch.Generator().manual_seed(0)
    vector, others = torch.randn(1, 37, generator=generator), torch.randn(301, 37, generator=generator)
    crowd = directions(torch.cat([others[:150], vector, others[150:], vector, vector])[None])
    similarity = cosine_similarity(crowd, crowd)[0]
    for twin in (302, 303):
        assert torch.equal(similarity[150], similarity[twin]) and torch.equal(similarity[:, 150], similarity[:, twin])
    assert torch.equal(similarity, similarity.T) and (similarity.diagonal() == 1).all()
    alone = cosine_similarity(crowd[:, 150:151], crowd)[0, 0]
    assert torch.equal(alone, similarity[150])


def test_orthogonal_vectors_are_not_similar_at_all():
    # Products of the rounded unit vectors do not cancel exactly; what is left must not decide between them.
    first, second = torch.arange(1.0, 31.0).repeat_interleave(30), torch.arange(1.0, 31.0).repeat(30)
    one = directions(torch.stack([first, second, first], dim=-1)[:, None])
    other = directions(torch.stack([second, -2 * first, second], dim=-1)[:, None])
    assert (one @ other.transpose(1, 2)).any(), "without rounding something is left"
    assert not cosine_similarity(one, other).any()
