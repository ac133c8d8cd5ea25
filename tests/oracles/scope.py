"""SCOPE, step by step: every unchosen token's gain in coverage, summed over the image, joined by its attention."""

from __future__ import annotations

from oracles.nuwa import Outcome
from oracles.pictures import Picture, similarity


def select(
    picture: Picture, keep: int, alpha: float = 1.0, combine: str = "multiply", attention_heads: int = 16
) -> Outcome:
    everyone = range(picture.tokens)
    likeness = [[similarity(picture.features[one], picture.features[other]) for other in everyone] for one in everyone]
    covered = [0.0] * picture.tokens
    chosen: list[int] = []
    for _ in range(keep):
        best, most = None, None
        for token in everyone:
            if token in chosen:
                continue
            gain = sum(max(0.0, likeness[token][other] - covered[other]) for other in everyone)
            attention = float(picture.attention[token])
            score = gain * attention**alpha if combine == "multiply" else gain + (attention_heads * attention) ** alpha
            if most is None or score > most:
                best, most = token, score
        chosen.append(best)
        covered = [max(covered[other], likeness[best][other]) for other in everyone]
    kept = sorted(chosen)
    return Outcome(kept, [True] * keep, picture.features[kept].astype(float))
