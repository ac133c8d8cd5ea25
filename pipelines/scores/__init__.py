"""Answers → scores, intervals, fronts and the numbers of DVC."""
