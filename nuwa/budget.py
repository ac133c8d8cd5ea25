"""What a budget means: average visual tokens over the language model's layers, or a share of an image's own tokens."""

from __future__ import annotations

from typing import Literal, get_args

from nuwa.layout import VisualLayout

BudgetUnit = Literal["tokens", "share"]
UNITS: tuple[str, ...] = get_args(BudgetUnit)


def budget_on(layout: VisualLayout, budget: float, unit: BudgetUnit, dynamic: bool) -> float:
    """Average tokens that ``budget`` asks of an image of ``layout``.

    ``dynamic``: whether images differ in layout; then an image that has fewer tokens than ``budget`` keeps all it has,
    where a model of one layout refuses. A share asks for at least one token.
    """
    if unit == "share":
        return max(1.0, budget * layout.tokens)
    return min(budget, layout.tokens) if dynamic else budget


def budget_tokens(budget: float, unit: BudgetUnit, tokens: int) -> float:
    """``budget`` as people read it, in average tokens of images that have ``tokens``; of a share the nearest whole number."""
    return float(round(budget * tokens)) if unit == "share" else budget
