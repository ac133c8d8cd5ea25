"""How sure intervals and verdicts are, by simulation: coverage, false discoveries among many, power, exact ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from pipelines.scores.sampled import Sampled, holm

IMAGES, RESAMPLES = 100, 600


def sample_mean(values: np.ndarray, weights: np.ndarray | None = None, **known) -> Sampled:
    """The mean of ``values`` ``(trials, images)``."""
    images = values.shape[1]
    draws = values[:, :1] if weights is None else values @ weights.T / images
    left_out = (values.sum(axis=1, keepdims=True) - values) / (images - 1)
    return Sampled(values.mean(axis=1), draws, left_out, np.ones(images, bool), **known)


def multinomial(images: int, resamples: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(float)


def answers(score: float, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Shares right of three questions an image, which are right together more often than by chance ``(samples, images)``."""
    spread = 1 / 0.4 - 1
    chance = rng.beta(score * spread, (1 - score) * spread, (samples, IMAGES))
    return rng.binomial(3, chance) / 3


@pytest.mark.parametrize("score", [0.05, 0.1, 0.5, 0.95])
def test_intervals_of_a_hundred_images_cover(score):
    rng, weights = np.random.default_rng(0), multinomial(IMAGES, RESAMPLES)
    low, high = sample_mean(answers(score, 1500, rng), weights).intervals()
    assert np.mean((low <= score) & (score <= high)) >= 0.93


def retentions(right: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> list[Sampled]:
    """Shares ``right`` over ``whole``, both ``(samples, images)``: a sample each, those alike in what an image can do in one.

    Where ``whole`` is nothing there is none.
    """
    kept, images, totals = [], right.shape[1], whole.sum(axis=1).round(9)
    for total in np.unique(totals[totals > 0]):
        rows = np.abs(whole.sum(axis=1) - total) < 1e-6
        part, of = right[rows], whole[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = (part @ weights.T) / (of @ weights.T)
            left_out = (part.sum(axis=1, keepdims=True) - part) / (total - of)
        present = np.ones(images, bool)
        one = Sampled(part.sum(axis=1) / total, draws, left_out, present, paired=True, answers=part, differs=part != of)
        kept.append(replace(one, step=1 / total, unchanged=1.0, most=1.0))
    return kept


@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize(
    ("score", "lost", "gained"),
    [
        (0.05, 0.05, 0.0), (0.1, 0.2, 0.01), (0.1, 0.31, 0.03), (0.3, 0.08, 0.03), (0.5, 0.5, 0.05), (0.6, 0.01, 0.0),
        (0.6, 0.03, 0.03), (0.9, 0.013, 0.03), (0.9, 0.06, 0.0), (0.95, 0.01, 0.0), (0.95, 0.5, 0.0), (0.95, 0.9, 0.0),
    ],
)  # fmt: skip
def test_intervals_of_retention_cover(score, lost, gained, questions):
    """At both ends of scores, and where next to nothing is lost: resamples alone hold the truth in 54 % of them."""
    rng, weights = np.random.default_rng(0), multinomial(IMAGES, RESAMPLES // 2)
    spread = 1 / 0.4 - 1
    chance = (
        rng.beta(score * spread, (1 - score) * spread, (1000, IMAGES))
        if questions > 1
        else np.full((1000, IMAGES), score)
    )
    right = rng.random((questions, *chance.shape), dtype=np.float32) < chance
    change = rng.random(right.shape, dtype=np.float32)
    kept = np.where(right, change >= lost, change < gained)
    truth = 1 - lost + gained * (1 - score) / score

    ends = [one.intervals() for one in retentions(kept.mean(axis=0), right.mean(axis=0), weights)]
    low, high = np.concatenate(ends, axis=1)
    assert len(low) > 990
    assert np.mean((low <= truth) & (truth <= high)) >= 0.93


def test_of_a_thousand_null_sweeps_few_find_a_difference():
    """300 comparisons with one reference: at most 5 % of sweeps call any of them different."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(1000):
        right = rng.random((301, IMAGES), dtype=np.float32) < 0.6
        difference = sample_mean(right[1:].astype(float) - right[0])
        alarms += bool((holm(difference.p_zero()) < 0.05).any())
    assert alarms <= 50


@pytest.mark.parametrize(("images", "differing", "least"), [(1000, 0.1, 0.85), (500, 0.1, 0.3)])
def test_a_true_gap_is_found_among_three_hundred(images, differing, least):
    """5 points, where a share of the answers differs: as often as docs/results.md says, less what 100 sweeps may miss."""
    rng, finds = np.random.default_rng(0), 0
    lost, gained = (differing + 0.05) / 2, (differing - 0.05) / 2
    for _ in range(100):
        change = rng.random((300, images), dtype=np.float32)
        by_chance = (change < differing / 2).astype(float) - (change > 1 - differing / 2)
        worse = (change[0] > 1 - gained).astype(float) - (change[0] < lost)
        difference = sample_mean(np.concatenate([[worse], by_chance[1:]]))
        finds += bool(holm(difference.p_zero())[0] < 0.05)
    assert finds >= 100 * least


def test_a_true_gap_named_beforehand_is_found_from_fewer_images():
    rng = np.random.default_rng(0)
    change = rng.choice([-1.0, 0.0, 1.0], p=[0.075, 0.9, 0.025], size=(400, 500))
    assert np.mean(sample_mean(change).p_zero() < 0.05) >= 0.9


def test_p_values_are_those_of_students_paired_test():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1, (5, 40))
    by_hand = [2 * student.sf(abs(row.mean()) / (row.std(ddof=1) / math.sqrt(40)), 39) for row in values]
    assert sample_mean(values).p_zero() == pytest.approx(by_hand)


@pytest.mark.parametrize(("differing", "p"), [(1, 1.0), (3, 0.25), (6, 2.0**-5)])
def test_a_difference_is_no_surer_than_the_images_it_rests_on(differing, p):
    """Six images of six that all lost a point by the same amount have no spread; flipping their signs says 1 in 32."""
    values = np.zeros((1, 6))
    values[0, :differing] = 1.0
    assert sample_mean(values).p_zero()[0] >= p - 1e-9
    assert sample_mean(np.ones((1, 6))).p_zero()[0] == pytest.approx(2.0**-5)
    assert sample_mean(np.zeros((1, 6))).p_zero()[0] == 1.0


def test_equivalence_is_two_one_sided_tests():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(mean, 0.05, 400) for mean in (0.0, 0.004, 0.02)])
    error = values.std(axis=1, ddof=1) / 20
    by_hand = [
        max(student.cdf((mean - 0.01) / one, 399), student.sf((mean + 0.01) / one, 399))
        for mean, one in zip(values.mean(axis=1), error, strict=True)
    ]
    p = sample_mean(values).p_beyond(0.01)
    assert p == pytest.approx(by_hand)
    assert p[0] < 0.05 < p[2]
    # Equal on all of n images: a share of 1 % that differs would not show with probability 0.99 ** n.
    assert sample_mean(np.zeros((1, 400))).p_beyond(0.01)[0] == pytest.approx(0.99**400)


def retentions_lost(lost: np.ndarray, whole: np.ndarray) -> Sampled:
    """What trials that lose ``lost`` ``(trials, images)`` of what is right unpruned, ``whole`` ``(images,)``, keep less 1."""

    def share(right: np.ndarray) -> Sampled:
        return sample_mean(right, full=1.0, answers=right, step=1 / len(whole))

    unpruned = share(whole[None])
    return share(whole * (1 - lost)).share_of(unpruned).minus(unpruned.share_of(unpruned))


@pytest.mark.parametrize("score", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("images", [4, 6])
def test_a_retention_is_no_surer_than_the_images_that_differ(score, images):
    whole, lost = np.zeros(300), np.zeros((1, 300))
    whole[: int(score * 300)] = 1
    lost[0, :images] = 1
    assert retentions_lost(lost, whole).p_zero()[0] == pytest.approx(2.0 ** (1 - images))


@pytest.mark.parametrize("score", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("images", [300, 1000, 2000])
def test_who_loses_the_margin_is_seldom_called_equivalent(score, images):
    """One answer in a hundred, all lost: a few images differ, and by chance fewer, with no spread that tells."""
    whole = np.zeros(images)
    whole[: int(score * images)] = 1
    lost = np.random.default_rng(0).random((4000, images), dtype=np.float32) < 0.01
    p = retentions_lost(lost, whole).p_beyond(0.01)
    assert np.mean(p < 0.05) <= 0.055
    assert np.mean(p < 0.05 / 60) <= 0.002


def test_who_differs_on_few_images_of_many_is_equivalent():
    change = np.random.default_rng(0).random((400, 3000), dtype=np.float32)
    lost = (change < 0.005).astype(float) - (change > 0.995)
    assert np.mean(retentions_lost(lost, np.full(3000, 0.5)).p_beyond(0.01) < 0.05 / 60) >= 0.9


def test_what_is_lost_on_one_benchmark_and_gained_on_another_differs():
    one, other = np.zeros((1, 10)), np.zeros((1, 10))
    one[0, :8] = other[0, 2:] = 1.0
    first, second = (
        Sampled.mean([sample_mean(part, answers=part) for part in parts]) for parts in ((one, other), (other, one))
    )
    assert first.minus(second).differs.sum() == 4
    assert not first.minus(first).differs.any()


def test_holm_steps_down():
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, np.nan, 0.02], nan_ok=True)
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]


def test_all_wrong_or_all_right_has_the_exact_bound():
    weights = multinomial(50, 200)
    both = sample_mean(np.stack([np.zeros(50), np.ones(50)]), weights, full=1.0)
    bound = 1 - 0.025 ** (1 / 50)
    assert pytest.approx(np.array([[0.0, bound], [1 - bound, 1.0]])) == both.intervals().T
    whole = sample_mean(np.full((1, 50), 0.8), weights, full=1.0)
    kept = sample_mean(np.zeros((1, 50)), weights, full=1.0).share_of(whole)
    assert pytest.approx(np.array([[0.0, bound / 0.8]])) == kept.intervals().T
    assert whole.share_of(whole, np.array([True])).intervals().T.tolist() == [[1.0, 1.0]]
    points = sample_mean(np.zeros((1, 50)), weights)
    assert points.intervals().T.tolist() == [[0.0, 0.0]]
