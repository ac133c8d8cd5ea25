"""Quantities of trials and how sure one can be of them, when the units that were sampled are images.

A quantity is known in the sample, in bootstrap resamples of its images, and with each image left out in turn. Intervals
are BCa bootstraps (Efron 1987) whose levels are widened by Student's t as Hesterberg (2015, section 4.3) does: from 100
images on they cover scores of 5 to 95 % in at least 93 % of simulated samples, where plain percentiles go down to 90 %.
Where two trials answer alike on nearly all images, resamples show too little: 40 % of samples hold no loss where one answer
in a hundred is lost. So what is paired (a retention, a difference) reaches at least as far as a score interval of the
images that changed does (Wilson 1927), and as Student's with a variance that allows for half an image's change more.
Tests of a difference need p-values far below one over the number of resamples, so they use the jackknife's standard error
and Student's t. docs/results.md has the simulated figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEVEL = 0.95
FEW_IMAGES = 100  # with fewer, intervals of scores near 0 and 1 are known to be too narrow
EQUAL = 1e-12  # resamples that differ by less are ties: sums in another order


@dataclass(frozen=True)
class Sampled:
    """Of some trials.

    ``point`` ``(trials,)``: in the sample. ``draws`` ``(trials, resamples)``. ``left_out`` ``(trials, images)``: without
    each image. ``present`` ``(images,)``: which of these the quantity is about. ``full``: what it is where every answer is
    right, if it is a share of answers. ``paired``: as a share of another trial's, which has no exact bound above.
    ``answers`` ``(trials, images)``: a number for what was answered on each image, the same for the same scores; of a
    pair ``differs`` says where it was not the same. ``step``: the most that one image can move the quantity by.
    Where these are null, pseudo-values tell which images matter, and an image counts as one of ``images``.
    ``unchanged``: of a pair, what it is where no answer changed; ``most``: how far from that lost answers can take it;
    ``itself`` ``(trials,)``: which are what they are compared with, so that nothing is to be estimated.
    """

    point: np.ndarray
    draws: np.ndarray
    left_out: np.ndarray
    present: np.ndarray
    full: float | None = None
    paired: bool = False
    answers: np.ndarray | None = None
    differs: np.ndarray | None = None
    step: float | None = None
    unchanged: float | None = None
    most: float | None = None
    itself: np.ndarray | None = None

    @property
    def images(self) -> int:
        return int(self.present.sum())

    def of(self, trials: np.ndarray) -> Sampled:
        """The quantity of some of the trials, by their numbers."""

        def some(of_trials: np.ndarray | None) -> np.ndarray | None:
            return None if of_trials is None else of_trials[trials]

        return replace(
            self,
            point=self.point[trials],
            draws=self.draws[trials],
            left_out=self.left_out[trials],
            answers=some(self.answers),
            differs=some(self.differs),
            itself=some(self.itself),
        )

    def share_of(self, whole: Sampled, itself: np.ndarray | None = None) -> Sampled:
        """As a share of ``whole``, one trial's; of nothing it is undefined. ``itself`` ``(trials,)``: which are that one."""
        share = self._with(whole, lambda part, of: np.divide(part, of, out=np.full_like(part, np.nan), where=of > 0))
        of = whole.point.item()
        full, step = (one / of if one is not None and of > 0 else None for one in (self.full, self.step))
        share = replace(share, full=full, paired=True, answers=self.answers, step=step, itself=itself)
        return replace(share, unchanged=1.0, most=1.0, differs=self._differing(whole))

    def minus(self, other: Sampled, itself: np.ndarray | None = None) -> Sampled:
        """``other``: of as many trials, or of one. ``itself`` ``(trials,)``: which are what they are compared with."""
        difference = replace(self._with(other, np.subtract), differs=self._differing(other))
        step = max(self.step, other.step) if self.step is not None and other.step is not None else None
        most = self.full if self.most is None else self.most
        return replace(difference, step=step, unchanged=0.0, most=most, itself=itself)

    def _differing(self, other: Sampled) -> np.ndarray | None:
        """Where answers are not the same, ``(trials, images)``; null where they are not known."""
        if self.answers is None or other.answers is None:
            return None
        return np.not_equal(self.answers, other.answers)

    def _with(self, other: Sampled, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Sampled:
        return Sampled(
            combine(self.point, np.broadcast_to(other.point, self.point.shape)),
            combine(self.draws, np.broadcast_to(other.draws, self.draws.shape)),
            combine(self.left_out, np.broadcast_to(other.left_out, self.left_out.shape)),
            self.present | other.present,
        )

    @classmethod
    def mean(cls, members: Sequence[Sampled]) -> Sampled:
        """The unweighted mean of several quantities of the same trials."""
        parts = [(one.point, one.draws, one.left_out) for one in members]
        point, draws, left_out = (np.mean(same, axis=0) for same in zip(*parts, strict=True))
        present = np.any([one.present for one in members], axis=0)
        full = None if any(one.full is None for one in members) else float(np.mean([one.full for one in members]))
        paired = any(one.paired for one in members)
        known = [one.answers for one in members if one.answers is not None]
        # Weights, so that what is lost in one and gained in another does not look alike.
        weights = np.random.default_rng(0).random(len(members))
        answers = None
        if len(known) == len(members):
            answers = np.sum([weight * one for weight, one in zip(weights, known, strict=True)], axis=0)
        steps = [one.step for one in members if one.step is not None]
        step = max(steps) / len(members) if len(steps) == len(members) else None

        changed = [one.differs for one in members if one.differs is not None]
        differs = np.any(changed, axis=0) if len(changed) == len(members) else None
        mean = cls(point, draws, left_out, present, full, paired, answers, differs, step)
        first = members[0]  # all are scores, or all are shares of one trial
        return replace(mean, unchanged=first.unchanged, most=first.most, itself=first.itself)

    @classmethod
    def one_below_the_other(cls, pieces: Sequence[Sampled]) -> Sampled:
        """Trials of several pieces in one."""
        parts = [(one.point, one.draws, one.left_out) for one in pieces]
        point, draws, left_out = (np.concatenate(same) for same in zip(*parts, strict=True))

        def joined(of_pieces: Sequence[np.ndarray | None]) -> np.ndarray | None:
            known = [one for one in of_pieces if one is not None]
            return np.concatenate(known) if len(known) == len(pieces) else None

        return replace(
            pieces[0],
            point=point,
            draws=draws,
            left_out=left_out,
            answers=joined([one.answers for one in pieces]),
            differs=joined([one.differs for one in pieces]),
            itself=joined([one.itself for one in pieces]),
        )

    def intervals(self) -> np.ndarray:
        """``(2, trials)``: lower and upper ends; undefined resamples do not count, and where all are, so are the ends."""
        finite = np.isfinite(self.draws)
        whole = finite.all(axis=1)
        ends = np.full((2, len(self.point)), np.nan)
        ends[:, whole] = self._ends(whole, self.draws[whole])
        for row in np.flatnonzero(~whole & finite.any(axis=1)):
            ends[:, [row]] = self._ends(np.array([row]), self.draws[[row]][:, finite[row]])
        return self._with_unseen_changes(self._with_exact(ends))

    def _with_unseen_changes(self, ends: np.ndarray) -> np.ndarray:
        """Of a pair: no narrower than what the images that changed allow, since a few more may change in another sample.

        Resamples of few changes say little of rarer ones, and of none nothing. Of 268 simulated kinds of pairs
        (docs/results.md) they alone held the truth in 5 % of samples at worst, and with these bounds in 94 %.
        """
        if self.unchanged is None:
            return ends
        away, size = self.point - self.unchanged, self._size_of_a_change()
        quantile = float(stdtrit(max(self.images - 1, 1), (1 + LEVEL) / 2))
        reach = quantile * np.sqrt(self.standard_error**2 + (size / 2) ** 2)

        lower, upper = self.point - reach, self.point + reach
        if self.most is not None:
            lower = np.fmin(
                lower, self.unchanged - self.most * _score_bound(-away / self.most, size / self.most, quantile)
            )
            upper = np.fmax(
                upper, self.unchanged + self.most * _score_bound(away / self.most, size / self.most, quantile)
            )
        if self.paired:
            lower = np.where(self.point >= 0, np.maximum(lower, 0.0), lower)  # a share of a score is none below zero

        known = np.isfinite(ends).all(axis=0)
        low, high = np.where(known, [np.fmin(ends[0], lower), np.fmax(ends[1], upper)], ends)
        if self.itself is not None:
            low, high = np.where(self.itself & known, self.point, [low, high])
        return np.stack([low, high])

    def _size_of_a_change(self) -> np.ndarray:
        """By how much an image moves a pair whose answers on it change, ``(trials,)``.

        The mean over images that changed, by weight, as if one more had changed by all that an image can; less what all
        images have in common, since a change that comes on every image does not vary.
        """
        own, step = self._own(), self.step or 0.0
        total = own.sum(axis=1)
        squares = (own**2).sum(axis=1) - total**2 / max(self.images, 1) + step**2
        total += step
        return np.divide(squares, total, out=np.zeros_like(total), where=total > 0)

    def _with_exact(self, ends: np.ndarray) -> np.ndarray:
        """Where all answers are wrong, or all right, no resample differs: the exact bound of that many images instead."""
        if self.full is None or not self.images:
            return ends
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / self.images)  # the largest share that may not show in the sample
        low, high = ends
        spread = high - low > EQUAL
        high = np.where(~spread & (self.point == 0), unseen * self.full, high)
        if not self.paired:
            low = np.where(~spread & (self.point == self.full), (1 - unseen) * self.full, low)
        return np.stack([low, high])

    def _ends(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """BCa ends of some trials, from resamples that are all defined."""
        ordered = np.sort(draws, axis=1)
        count = ordered.shape[1]
        point = self.point[rows, None]
        ties = np.abs(ordered - point) < EQUAL
        below = ((ordered < point) & ~ties).sum(axis=1) + ties.sum(axis=1) / 2
        bias = ndtri(np.clip(below / count, 1 / (count + 1), count / (count + 1)))
        skew = self._acceleration()[rows]

        ends = []
        for side in (-1, 1):
            reach = bias + side * self._reach()
            room = 1 - skew * reach
            level = ndtr(bias + np.divide(reach, room, out=np.full_like(reach, side * np.inf), where=room > 0))
            ends.append(_quantiles(ordered, level))
        return np.stack(ends)

    def _reach(self) -> float:
        """How many standard errors an interval reaches to either side."""
        if self.images < 2:
            return float(ndtri((1 + LEVEL) / 2))
        return float(stdtrit(self.images - 1, (1 + LEVEL) / 2) * np.sqrt(self.images / (self.images - 1)))

    def _influences(self) -> np.ndarray:
        """How far each image pulls the quantity up, ``(trials, images)``; zero where nothing is left without it."""
        pull = self.point[:, None] - self.left_out
        return np.where(np.isfinite(pull), pull, 0.0)

    def _acceleration(self) -> np.ndarray:
        pull = self._influences()
        spread = (pull**2).sum(axis=1) ** 1.5
        return np.divide((pull**3).sum(axis=1), 6 * spread, out=np.zeros_like(spread), where=spread > 0)

    def _own(self) -> np.ndarray:
        """How much of the quantity, of a pair of how far it changed, is each image's own, ``(trials, images)``.

        Whatever the sign. That is a share of its pseudo-value (Tukey 1958); of a mean it is a share of the image's value.
        """
        away = self.point - (self.unchanged or 0.0)
        own = np.abs(away[:, None] + (self.images - 1) * self._influences()) / max(self.images, 1)
        matters = self.present & (own * self.images > EQUAL)
        return np.where(matters if self.differs is None else matters & self.differs, own, 0.0)

    def _mattering(self) -> np.ndarray:
        """How many images the quantity rests on, ``(trials,)``: as many equal ones as would weigh alike."""
        own = self._own()
        squares = (own**2).sum(axis=1)
        return np.divide(own.sum(axis=1) ** 2, squares, out=np.zeros_like(squares), where=squares > 0)

    @property
    def standard_error(self) -> np.ndarray:
        """The jackknife's, ``(trials,)``."""
        pull = self._influences()
        count = max(self.images, 2)
        middle = pull.sum(axis=1, keepdims=True) / count
        # Images that do not matter to the quantity have no influence: their squares are not part of the sum.
        squares = (pull**2).sum(axis=1) - count * middle[:, 0] ** 2
        return np.sqrt(np.maximum(squares, 0) * (count - 1) / count)

    def p_zero(self) -> np.ndarray:
        """Two-sided p-values ``(trials,)`` of the quantity being zero.

        Never below what flipping the signs of the images that matter could show: a difference that rests on three images
        is no surer than that, however alike they are. Undefined where the quantity is.
        """
        error = self.standard_error
        statistic = np.divide(np.abs(self.point), error, out=np.where(self.point == 0, 0.0, np.inf), where=error > 0)
        p = 2 * stdtr(max(self.images - 1, 1), -statistic)
        floor = 2.0 ** (1 - np.maximum(self._mattering(), 1))
        return np.where(np.isfinite(self.point), np.maximum(p, floor), np.nan)

    def p_beyond(self, margin: float) -> np.ndarray:
        """P-values ``(trials,)`` of the quantity lying ``margin`` or more from zero: two one-sided tests.

        A small one shows equivalence (Schuirmann 1987). Where few images differ, their spread says too little of what it
        would be at the margin: it counts as no less than that of images which all differ to one side, as many as it takes.
        """
        own = self._own()
        total = own.sum(axis=1)
        size = np.divide((own**2).sum(axis=1), total, out=np.zeros_like(total), where=total > 0)
        error = np.sqrt(np.maximum(self.standard_error**2, margin * size))
        worst = np.divide(np.abs(self.point) - margin, error, out=np.zeros_like(error), where=error > 0)
        p = np.where(total > 0, stdtr(max(self.images - 1, 1), worst), self._unseen(margin))
        return np.where(np.isfinite(self.point), p, np.nan)

    def _unseen(self, margin: float) -> float:
        """How likely not one image differs in the sample where so many do that the quantity lies ``margin`` from zero."""
        count = max(self.images, 1)
        share = margin / (count * (self.step or 1 / count))
        return float((1 - min(share, 1.0)) ** count)


def _score_bound(share: np.ndarray, size: np.ndarray, quantile: float) -> np.ndarray:
    """The largest share that may have changed to one side, ``(trials,)``; undefined where none did and ``share`` rules it out.

    ``share``: that side less the other, in the sample; ``size``: of an image's change. A share ``p`` of changes by ``size``
    has the variance ``p (1 - p) size``; the bound is where the sample lies ``quantile`` of its standard errors away.
    """
    spread = quantile**2 * size
    middle = 2 * share + spread
    room = middle**2 - 4 * (1 + spread) * share**2
    bound = (middle + np.sqrt(np.maximum(room, 0.0))) / (2 * (1 + spread))
    return np.where((room >= 0) & (bound >= 0), bound, np.nan)


def _quantiles(ordered: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """``(rows,)``: of each ascending row the quantile at its level, between neighbours."""
    place = levels * (ordered.shape[1] - 1)
    left = np.floor(place).astype(int)
    right, rows = np.minimum(left + 1, ordered.shape[1] - 1), np.arange(len(ordered))
    share = place - left
    return ordered[rows, left] * (1 - share) + ordered[rows, right] * share


def holm(p: np.ndarray) -> np.ndarray:
    """P-values corrected for being looked at together (Holm 1979); undefined ones are no tests."""
    corrected = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected
