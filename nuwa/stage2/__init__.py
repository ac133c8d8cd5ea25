"""Stage-2 scorers: which visual tokens a question needs, judged inside the language model at one layer."""

from nuwa.stage2.scorers import SCORERS, CutEvidence, Scorer, get_scorer

__all__ = ["SCORERS", "CutEvidence", "Scorer", "get_scorer"]
