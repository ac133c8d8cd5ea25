"""Recycling of dropped tokens against a slow oracle, on random and on awkward tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import recycling as oracle

from nuwa.signals import top_indices
from nuwa.stage2.recycling import Recycling, cluster_noise, recycle

torch.set_num_threads(1)


def ours(hidden, scores, keep, noise):
    """Batched: selected and ``centre → mean`` of every question."""
    hidden, scores, noise = (torch.from_numpy(np.asarray(part)) for part in (hidden, scores, noise))
    count = Recycling().clusters(hidden.shape[1], keep)
    kept = top_indices(scores, keep - count)
    if not count:
        return [(row.tolist(), {}) for row in kept]
    centres, means = recycle(hidden, scores, kept, count, Recycling(), noise)
    assert centres.shape == (len(hidden), count) and means.dtype == hidden.dtype
    assert (centres.diff(dim=1) > 0).all(), "ascending and unique"
    return [
        (row.tolist(), dict(zip(mine.tolist(), mean.double().numpy(), strict=True)))
        for row, mine, mean in zip(kept, centres, means, strict=True)
    ]


def check(hidden, scores, keep, noise):
    found = ours(hidden, scores, keep, noise)
    for number, (selected, means) in enumerate(found):
        expected_selected, expected = oracle.recycle(hidden[number], scores[number].tolist(), keep, noise[number])
        assert selected == expected_selected
        assert means.keys() == expected.keys()
        assert not set(means) & set(selected), "a centre is a token that was dropped"
        assert len(selected) + len(means) == keep
        for centre, mean in expected.items():
            assert means[centre] == pytest.approx(mean, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("tokens", "keep"), [(144, 30), (60, 59), (60, 7), (40, 2), (40, 1), (12, 12), (3, 2), (2, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_tokens(tokens, keep, seed):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(3, tokens, 6)).astype(np.float32)
    check(hidden, rng.random((3, tokens)), keep, rng.random((3, tokens)))


def test_clear_groups_are_found():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.eye(3, 8) * 5, 12, axis=0) + rng.normal(size=(36, 8)) * 0.01
    best = rng.normal(size=(4, 8))  # four that are selected, and 60 that are dropped for good
    rest = rng.normal(size=(60, 8)) * 3
    hidden = np.concatenate([best, groups, rest])[None].astype(np.float32)
    scores = np.linspace(1, 0, 100)[None]
    recycling = Recycling(share=0.37, per_cluster=18)  # 36 of the 96 dropped, in three clusters
    assert recycling.pool(96) == 36 and recycling.clusters(100, 7) == 3
    kept = top_indices(torch.from_numpy(scores), 4)
    centres, means = recycle(
        torch.from_numpy(hidden), torch.from_numpy(scores), kept, 3, recycling, torch.zeros(1, 100)
    )
    assert [(centre - 4) // 12 for centre in centres[0].tolist()] == [0, 1, 2]
    for at in range(3):
        assert means[0, at].numpy() == pytest.approx(groups[12 * at : 12 * at + 12].mean(axis=0), abs=1e-5)


def test_equal_tokens_and_equal_scores():
    noise = np.random.default_rng(0).random((2, 50))
    check(np.ones((2, 50, 4), np.float32), np.full((2, 50), 0.5), 10, noise)
    check(np.zeros((2, 50, 4), np.float32), np.zeros((2, 50)), 10, np.zeros((2, 50)))


def test_half_precision_is_averaged_in_full():
    rng = np.random.default_rng(4)
    hidden = (rng.normal(size=(2, 80, 6)) * 100).astype(np.float16)
    scores, noise = rng.random((2, 80)), rng.random((2, 80))
    for number, (selected, means) in enumerate(ours(hidden, scores, 20, noise)):
        expected_selected, expected = oracle.recycle(hidden[number], scores[number].tolist(), 20, noise[number])
        assert (selected, means.keys()) == (expected_selected, expected.keys())
        for centre, mean in expected.items():
            assert means[centre] == pytest.approx(mean, rel=1e-3, abs=0.05)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_cut_keeps_what_it_is_asked_and_questions_do_not_mix(data):
    tokens = data.draw(st.integers(2, 60))
    keep = data.draw(st.integers(1, tokens))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    hidden = rng.integers(-2, 3, size=(3, tokens, 4)).astype(np.float32)  # many equal tokens
    scores = rng.integers(0, 5, size=(3, tokens)) / 4.0  # many equal scores
    noise = rng.random((3, tokens))
    check(hidden, scores, keep, noise)
    together = ours(hidden, scores, keep, noise)
    order = [2, 0, 1]
    shuffled = ours(hidden[order], scores[order], keep, noise[order])
    for (selected, means), number in zip(shuffled, order, strict=True):
        assert selected == together[number][0]
        assert means.keys() == together[number][1].keys()
        assert all(np.array_equal(means[centre], together[number][1][centre]) for centre in means)


def test_the_published_schedules_are_made_of_selected_and_recycled_tokens():
    recycling = Recycling()
    for entering, selected, made in [
        (576, 300, 9), (309, 200, 4), (204, 110, 3), (576, 303, 9), (312, 110, 7), (117, 36, 3), (576, 66, 16),
        (82, 30, 2), (32, 17, 1),
    ]:  # fmt: skip
        assert recycling.clusters(entering, selected + made) == made


@pytest.mark.parametrize("entering", [1, 2, 3, 10, 57, 144])
def test_the_split_into_selected_and_recycled(entering):
    for keep in range(1, entering + 1):
        made = Recycling().clusters(entering, keep)
        assert made == oracle.clusters(entering, keep)
        assert 0 <= made <= keep // 2
    assert Recycling().clusters(entering, entering) == 0, "where nothing is dropped nothing is recycled"


def test_noise_depends_on_seed_image_and_question_only():
    one, other = ("cut 2", "image", "words"), ("cut 2", "image", "other words")
    drawn = cluster_noise(0, [one, other], 5)
    assert drawn.shape == (2, 5) and ((drawn >= 0) & (drawn < 1)).all()
    assert np.array_equal(cluster_noise(0, [other, one], 5), drawn[::-1])
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(cluster_noise(1, [one], 5)[0], drawn[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, "recycling share 0 must lie in (0, 1]"),
        ({"share": 1.5}, "recycling share 1.5 must lie in (0, 1]"),
        ({"per_cluster": 0}, "recycling needs at least 1 token a cluster, not 0"),
    ],
)
def test_impossible_recycling_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        Recycling(**arguments)
    assert str(caught.value) == message
