"""Stage 2: which visual tokens a question needs, judged inside the language model, at one layer or several."""

from nuwa.stage2 import coordinates, dart, sparsevlm, without_rope  # noqa: F401  (they register their scorers)
from nuwa.stage2.cut import Cut
from nuwa.stage2.recycling import Recycling
from nuwa.stage2.scorers import SCORERS, CutEvidence, Scorer, get_scorer, register_scorer

__all__ = ["SCORERS", "Cut", "CutEvidence", "Recycling", "Scorer", "get_scorer", "register_scorer"]
