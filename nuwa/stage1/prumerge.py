"""PruMerge+ (LLaVA-PruMerge, ICCV 2025): outliers of CLS attention, evenly spaced others, and what they gather.

Selection (the paper's adaptive important token selection): tokens whose CLS attention lies above ``Q3 + 1.5 (Q3 - Q1)``
of the image's attention. PruMerge+ supplements them with evenly spaced tokens. Merging (token supplement): every kept
token takes in the k dropped tokens whose keys are most similar to its own (cosine), weighted by CLS attention.

Differences from the released code, which keeps a number that depends on the image, may keep a token twice, divides by
zero without outliers, and appends one more token holding all the rest: exactly ``keep`` tokens are kept, the most
attended outliers first and no more of them than fit; without outliers all are evenly spaced; weights are normalised (it
adds the plain sum, see ``weights``), neighbours are dropped tokens only, as the paper's text has it (its code takes kept
ones too), and the order is raster order. The preset ``released`` reads what the released code reads, the encoder's last
layer, and adds the plain sum; the default reads the layer of the features, as the other methods do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import LAST_SIGNALS, VisionSignals, cosine_similarity, directions, ranked, top_indices
from nuwa.stage1.registry import register

Weights = Literal["mean", "sum"]
Layer = Literal["features", "last"]


@dataclass(frozen=True)
class PruMerge:
    """Hyper-parameters.

    ``outlier_range``: how many interquartile ranges above the third quartile an outlier begins.
    ``neighbours``: dropped tokens merged into each kept one (32 in the released code); 0 merges nothing.
    ``layer``: whose attention and keys decide: that of the ``features``, attention averaged over heads; or the ``last``
    layer, queries and keys taken for one head of full width, as released.
    ``weights``: ``mean``: the attention-weighted mean of a token and its neighbours; ``sum``: the token plus the
    attention-weighted sum of its neighbours, as released.
    """

    outlier_range: float = 1.5
    neighbours: int = 32
    weights: Weights = "mean"
    layer: Layer = "features"

    def __post_init__(self) -> None:
        if self.outlier_range < 0:
            raise ValueError(f"prumerge.outlier_range {self.outlier_range} must be at least 0")
        if self.neighbours < 0:
            raise ValueError(f"prumerge.neighbours {self.neighbours} must be at least 0")
        check_words("prumerge", self, weights=Weights, layer=Layer)


PRESETS = {"default": {}, "released": {"layer": "last", "weights": "sum"}}


def outliers(attention: Tensor, outlier_range: float) -> Tensor:
    """True where attention lies above ``Q3 + range · (Q3 - Q1)``, quartiles linearly interpolated; ``(batch, tokens)``."""
    rising = attention.double().sort(dim=1).values

    def quartile(quarters: int) -> Tensor:
        below, quarter = divmod(quarters * (rising.shape[1] - 1), 4)
        above = min(below + 1, rising.shape[1] - 1)
        return torch.lerp(rising[:, below], rising[:, above], quarter / 4)

    first, third = quartile(1), quartile(3)
    return attention > (third + outlier_range * (third - first))[:, None]


def spaced(eligible: Tensor, count: Tensor) -> Tensor:
    """True at ``count`` (batch, 1) evenly spaced ones of the eligible tokens in raster order, ``(batch, tokens)``.

    Of R eligible tokens, the one of number r stands for place j of m when ``r = ⌊(2j + 1) R / 2m⌋``: it holds where the
    number of places at or below it grows.
    """
    total = eligible.sum(dim=1, keepdim=True)
    number = eligible.cumsum(dim=1) - 1

    def places_up_to(last: Tensor) -> Tensor:  # how many j have (2j + 1) R < 2m (last + 1)
        return (2 * count * (last + 1) + total - 1) // (2 * total.clamp(min=1))

    return eligible & (places_up_to(number) > places_up_to(number - 1))


def kept_tokens(attention: Tensor, keep: int, outlier_range: float) -> Tensor:
    """Exactly ``keep`` of each image, ``(batch, keep)`` ascending: outliers, then evenly spaced others."""
    outlier = outliers(attention, outlier_range)
    top = torch.zeros_like(outlier).scatter_(1, ranked(attention)[:, :keep], True)
    important = outlier & top
    missing = keep - important.sum(dim=1, keepdim=True)
    return top_indices((important | spaced(~important, missing)).to(torch.uint8), keep)


def nearest_dropped(similarity: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of each row ``(batch, kept, tokens)``; ties go to the lower index."""
    bound = similarity.topk(count, dim=2).values[..., -1:]
    above, equal = similarity > bound, similarity == bound
    room = count - above.sum(dim=2, keepdim=True)
    return above | (equal & (equal.cumsum(dim=2) <= room))


def merge_weights(attention: Tensor, keys: Tensor, indices: Tensor, config: PruMerge) -> Tensor:
    """What each kept token takes of every token, ``(batch, kept, tokens)`` float32.

    ``attention`` ``(batch, tokens)`` float32, ``keys`` ``(batch, tokens, key_dim)``. Rows sum to 1 (``mean``), or to 1 plus
    the attention of the neighbours (``sum``). A token all of whose group has no attention stays itself.
    """
    dropped = torch.ones_like(attention, dtype=torch.bool).scatter_(1, indices, False)
    unit = directions(keys)
    similarity = cosine_similarity(gather_tokens(unit, indices), unit).masked_fill_(~dropped[:, None], -torch.inf)
    near = nearest_dropped(similarity, min(config.neighbours, attention.shape[1] - indices.shape[1]))
    weights = near * attention[:, None]

    own, own_weight = indices[..., None], attention.gather(1, indices)[..., None]
    if config.weights == "sum":
        return weights.scatter_(2, own, 1.0)
    total = weights.sum(dim=2, keepdim=True) + own_weight
    alone = total == 0
    return weights.scatter_(2, own, own_weight.masked_fill(alone, 1.0)).div_(total.masked_fill(alone, 1.0))


def reads(config: PruMerge) -> tuple[str, ...]:
    return ("features", *(LAST_SIGNALS if config.layer == "last" else ("cls_attention", "keys")))


@register("prumerge", PruMerge, cite=("prumerge",), presets=PRESETS, reads_cls=True, reads=reads)
def select(signals: VisionSignals, keep: int, config: PruMerge, seed: int = 0) -> Selection:
    """Every kept token merges, unless nothing is dropped or there are no neighbours to take."""
    last = config.layer == "last"
    attention = (signals.last_attention if last else signals.cls_attention).float()
    indices = kept_tokens(attention, keep, config.outlier_range)
    if keep == signals.grid.tokens or config.neighbours == 0:
        return keep_unmerged(signals, indices)
    keys = signals.last_keys if last else signals.keys
    merged = merge_weights(attention, keys, indices, config) @ signals.features.float()
    return Selection(indices, merged.to(signals.features.dtype), torch.zeros_like(indices, dtype=torch.bool))
