"""HoloV (NeurIPS 2025, arXiv 2510.02912): a budget dealt out to crops of the image, then the most attended of each crop.

The raster sequence is cut into contiguous runs. A run's share of the budget is its share of a score: CLS attention plus the
variance of a token's similarities to the others of its run, brought to the attention's scale. No merging.

Released code: github.com/obananas/HoloV. The preset ``released`` does what the published runs did on LLaVA, with these
properties, each a field of :class:`HoloV`: the runs are no crops of the image but pieces of its raster sequence; inside a
run the attention alone decides, although the paper names the score, so that the similarity term moves next to nothing
(its mean over a run is the same whatever the features are); of what exceeds a run nothing goes to others, and vectors of
zeros fill the budget. The default gives the surplus to the other runs.

Differences under every setting: the released code hands the tokens of a run over by falling attention and zero vectors
last; here the sequence is in raster order, and zero vectors stand at the last tokens that are not kept. On LLaVA-NeXT it
lays overview and local grid in one row, here each is a view of its own. On Qwen2.5-VL it pairs attention in window order
with features in raster order and counts the vision-start marker as the first token: neither is inherited.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.grid import PatchGrid
from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import VisionSignals, ranked, top_indices
from nuwa.stage1.registry import register

Inside = Literal["attention", "score"]
Overflow = Literal["redistribute", "zeros"]
Crops = Literal["runs", "grid"]
EPSILON = 1e-6
SCALE = 1000  # of the attention
SPANS = (2048, 256)  # channels whose products are summed in float32, by rising exactness


@dataclass(frozen=True)
class HoloV:
    """``count``: runs of an image; null: ``⌊16/9 · tokens / keep⌋``, as on Qwen2.5-VL. ``crops``: pieces of the raster
    sequence (``runs``) or, as the paper draws them, of the grid. ``beta``: weight of the similarity term. ``inside``:
    what decides in a run. ``overflow``: what becomes of a quota that exceeds its run. ``scale_single``: whether the
    attention of a run of one token is scaled like that of all others.
    """

    count: int | None = 16
    crops: Crops = "runs"
    beta: float = 0.09
    inside: Inside = "attention"
    overflow: Overflow = "redistribute"
    scale_single: bool = True

    def __post_init__(self) -> None:
        check_words("holov", self, crops=Crops, inside=Inside, overflow=Overflow)
        if self.count is not None and self.count < 1:
            raise ValueError(f"holov.count {self.count} must be null or at least 1")
        if self.beta < 0:
            raise ValueError(f"holov.beta {self.beta} must be at least 0")


PRESETS = {
    "default": {},
    "released": {"overflow": "zeros", "scale_single": False},
    "released_qwen": {"count": None, "overflow": "zeros", "scale_single": False},
}


def runs(grid: PatchGrid, keep: int, config: HoloV) -> list[list[int]]:
    """The tokens of every run, in raster order; sizes differ by one at most, the larger come first.

    ``grid``: the same number of pieces as near to squares as its divisors allow; rows and columns are split alike.
    """
    count = max(1, 16 * grid.tokens // (9 * keep)) if config.count is None else config.count
    count = min(count, grid.tokens)
    if config.crops == "runs":
        return _split(list(range(grid.tokens)), count)
    fitting = [down for down in range(1, count + 1) if count % down == 0]
    fitting = [down for down in fitting if down <= grid.height and count // down <= grid.width]
    if not fitting:
        raise ValueError(
            f"holov.count {count} cuts no {grid.height}x{grid.width} grid into crops; choose another or crops: runs"
        )
    down = min(fitting, key=lambda rows: abs(rows * grid.width - count // rows * grid.height))
    bands, across = _split(list(range(grid.height)), down), _split(list(range(grid.width)), count // down)
    return [[row * grid.width + column for row in band for column in columns] for band in bands for columns in across]


def _split(numbers: list[int], count: int) -> list[list[int]]:
    size, longer = divmod(len(numbers), count)
    ends = [0]
    for place in range(count):
        ends.append(ends[-1] + size + (place < longer))
    return [numbers[begin:end] for begin, end in itertools.pairwise(ends)]


def scores(attention: Tensor, compared: Tensor, members: list[list[int]], config: HoloV) -> Tensor:
    """The score of every token in its run, ``(batch, tokens)`` float64; runs of one length are computed together."""
    attention = attention.double()
    totals = torch.zeros_like(attention)

    for _, alike, own, places in alike_runs(attention, members):
        size = alike.shape[1]
        if size == 1:
            totals.scatter_(1, places, (own * (SCALE if config.scale_single else 1)).flatten(1))
            continue
        own = own * SCALE
        similarity = similarities(compared, alike)
        similarity.diagonal(dim1=2, dim2=3).zero_()
        mean = similarity.sum(dim=3, keepdim=True) / (size - 1)
        variance = (similarity - mean).square().sum(dim=3) / (size - 1)
        scale = own.mean(dim=2, keepdim=True) / (variance.mean(dim=2, keepdim=True) + EPSILON)
        totals.scatter_(1, places, (own + config.beta * variance * scale).flatten(1))
    return totals


def alike_runs(attention: Tensor, members: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Of the runs of each length: their numbers, their tokens ``(runs, size)``, these tokens' attention and places."""
    for size in sorted({len(run) for run in members}):
        numbers = [number for number, run in enumerate(members) if len(run) == size]
        alike = torch.tensor([members[number] for number in numbers], device=attention.device)
        places = alike.flatten().expand(len(attention), -1)
        yield numbers, alike, attention.gather(1, places).view(len(attention), -1, size), places


def similarities(projected: Tensor, members: Tensor) -> Tensor:
    """Of the tokens of every run ``(runs, size)`` to one another, ``(batch, runs, size, size)`` float64.

    Rounded to multiples of 2⁻²⁴, so that their sums do not depend on the batch.
    """
    # On a CPU few tokens at a time, which stay in the processor's cache from one pass over them to the next.
    at_once = max(1, 64 // members.shape[1]) if projected.device.type == "cpu" else len(members)
    made = []
    for image in projected:
        for part in members.split(at_once):
            vectors = image[part].double()
            norm = vectors.norm(dim=-1).add_(EPSILON)
            made.append((vectors @ vectors.mT) / (norm[:, :, None] * norm[:, None]))
    return torch.cat(made).mul_(2**24).round_().mul_(2**-24).unflatten(0, (len(projected), -1))


def rough_means(
    attention: Tensor, image: Tensor, members: list[list[int]], config: HoloV, span: int
) -> tuple[Tensor, Tensor]:
    """The mean score of each run of one image, ``(1, runs)`` float64, and the most that one is off as a share, ``(1,)``.

    A run's mean is that of its attention times ``1 + β v / (v + ε)``, with ``v`` the mean variance of its similarities in
    float32. Products over ``span`` channels at a time are summed in float64, so that a similarity, and with it the root
    of ``v``, is off by ``(2 span + 8) / 2²⁴`` at most.
    """
    doubt = (2 * min(span, image.shape[1]) + 8) * 2**-24
    means = torch.zeros(1, len(members), dtype=torch.float64)
    error = means.new_zeros(1)

    for numbers, alike, own, _ in alike_runs(attention.double(), members):
        level = own.mean(dim=2)
        if alike.shape[1] == 1:
            means[:, numbers] = level * (SCALE if config.scale_single else 1)
            continue
        variance = rough_variances(image, alike, span)
        means[:, numbers] = SCALE * level * (1 + config.beta * variance / (variance + EPSILON))
        off = 2 * doubt * variance.sqrt() + 3 * doubt**2
        slope = config.beta * EPSILON / ((variance - off).clamp_(min=0) + EPSILON).square()
        error = torch.maximum(error, (off * slope).amax())
    return means, error


def rough_variances(image: Tensor, members: Tensor, span: int) -> Tensor:
    """Mean over the tokens of a run of the variance of their similarities to the others, ``(runs,)`` float64."""
    made, size = [], members.shape[1]
    for part in members.split(max(1, 600 // size)):
        # Runs that lie behind one another need not be copied.
        first = int(part[0, 0])
        behind = torch.equal(part.flatten(), torch.arange(first, first + part.numel()))
        vectors = (image[first : first + part.numel()].unflatten(0, part.shape) if behind else image[part]).float()
        products = [channels @ channels.mT for channels in vectors.split(span, dim=2)]
        product = products[0] if len(products) == 1 else sum(one.double() for one in products)

        # Products of tokens with themselves are squared lengths.
        norm = product.diagonal(dim1=1, dim2=2).sqrt() + EPSILON
        # Beyond float32 a square is infinite where a product with a short vector is not: zero, and no doubt, would be left.
        norm.masked_fill_(norm.isinf(), torch.nan)
        similarity = product.div_(norm[:, :, None]).div_(norm[:, None])
        similarity.diagonal(dim1=1, dim2=2).zero_()
        total = similarity.sum(dim=2, dtype=torch.float64)
        squares = torch.linalg.vector_norm(similarity, dim=2, dtype=torch.float64).square()
        # Σ (s - m)² over a run with the token itself, whose similarity counts as 0, and m = Σ s / (size - 1).
        variance = (squares - total.square() * ((size - 2) / (size - 1) ** 2)) / (size - 1)
        made.append(variance.clamp_(min=0).mean(dim=1))
    return torch.cat(made)


def certain(means: Tensor, error: Tensor, sizes: Tensor, keep: int) -> Tensor:
    """Whether means that are off by ``error`` ``(batch,)`` of themselves lead to the same quotas, ``(batch,)``.

    They do where no share rounds down to another number, no two shares change their order and no run overflows.
    """
    share = means / (means.sum(dim=1, keepdim=True) + EPSILON)
    apart_at_most = 2 * error / (1 - error).clamp(min=1e-12)  # (1 + e) / (1 - e), less one: of a mean and of their sum
    off = share * (apart_at_most[:, None] + 1e-12) + 2**-32
    whole, least = share * keep, off.amax(dim=1, keepdim=True)
    over = whole - whole.floor()
    rising = share.sort(dim=1).values
    apart = (rising[:, 1:] - rising[:, :-1] > 2 * least).all(dim=1)
    return ((over > off * keep) & (over < 1 - off * keep) & (whole + 1 < sizes)).all(dim=1) & apart


def quotas(means: Tensor, sizes: Tensor, keep: int, config: HoloV) -> Tensor:
    """Tokens that each run keeps, ``(batch, runs)``, from the mean scores of runs of ``sizes`` ``(runs,)``.

    ``⌊w T⌋`` by share, what is left one each to the largest shares. Shares are rounded to 2⁻³², so that equal ones are
    equal however they were summed. Redistribution: the surplus goes by ``w (size - quota)``, rounded down, and what that
    leaves fills run after run, by falling share.
    """
    share = (means / (means.sum(dim=1, keepdim=True) + EPSILON)).mul(2**32).round().mul(2**-32)
    quota = (share * keep).floor().long()
    order = ranked(share)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    left = keep - quota.sum(dim=1, keepdim=True)
    count = order.shape[1]
    quota = quota + torch.div(left, count, rounding_mode="floor") + (place < left % count)
    capped = torch.minimum(quota, sizes)
    if config.overflow == "zeros":
        return capped

    room = (sizes - capped).double()
    wanted = share * room
    surplus = keep - capped.sum(dim=1, keepdim=True)
    dealt = (
        (surplus * wanted / wanted.sum(dim=1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)).floor().long()
    )
    capped = torch.minimum(capped + dealt, sizes)
    room = (sizes - capped).gather(1, order)
    before = F.pad(room.cumsum(dim=1), (1, 0))[:, :-1]
    surplus = keep - capped.sum(dim=1, keepdim=True)
    filled = torch.minimum((surplus - before).clamp(min=0), room)
    return capped.scatter_add(1, order, filled)


def deal(
    attention: Tensor, compared: Tensor, members: list[list[int]], keep: int, config: HoloV
) -> tuple[Tensor, Tensor]:
    """Tokens that each run keeps, ``(batch, runs)``, and what decides inside a run, ``(batch, tokens)``."""
    device = compared.device
    sizes = torch.tensor([len(run) for run in members], device=device)

    def exactly(rows: list[int]) -> tuple[Tensor, Tensor]:
        score = scores(attention[rows], compared[rows], members, config)
        of_run = torch.arange(len(members), device=device).repeat_interleave(sizes, output_size=int(score.shape[1]))
        tokens = torch.tensor([token for run in members for token in run], device=device)
        sums = torch.zeros(len(rows), len(members), dtype=score.dtype, device=device)
        sums.scatter_add_(1, of_run.expand(len(rows), -1), score[:, tokens])
        return quotas(sums / sizes, sizes, keep, config), score

    images = list(range(len(attention)))
    if config.inside == "score":
        return exactly(images)
    if device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        return exactly(images)[0], attention.float()

    # Where attention alone decides inside a run, rough scores mostly give the quotas that exact ones give.
    quota = torch.empty(len(images), len(members), dtype=torch.long)
    for span in SPANS:
        doubtful = []
        for image in images:
            means, error = rough_means(attention[image : image + 1], compared[image], members, config, span)
            quota[image] = quotas(means, sizes, keep, config)[0]
            if not certain(means, error, sizes, keep):
                doubtful.append(image)
        images = doubtful
    for image in images:
        quota[image] = exactly([image])[0][0]
    return quota, attention.float()


def reads(config: HoloV) -> tuple[str, ...]:
    return ("features", "cls_attention", "projected")


@register("holov", HoloV, cite=("holov",), presets=PRESETS, reads=reads)
def select(signals: VisionSignals, keep: int, config: HoloV, seed: int = 0) -> Selection:
    """The quota of every run, by falling attention or score; with ``overflow: zeros``, zero vectors up to ``keep``."""
    members = runs(signals.grid, keep, config)
    device = signals.features.device
    sizes = torch.tensor([len(run) for run in members], device=device)
    tokens = torch.tensor([token for run in members for token in run], device=device)
    run_of = torch.empty_like(tokens).scatter_(
        0, tokens, torch.arange(len(members), device=device).repeat_interleave(sizes, output_size=len(tokens))
    )
    quota, signal = deal(signals.cls_attention, signals.compared(signals.projected), members, keep, config)

    order = ranked(signal)
    grouped = order.gather(1, torch.sort(run_of[order], dim=1, stable=True).indices)
    starts = (sizes.cumsum(0) - sizes)[run_of[grouped]]
    place = torch.empty_like(grouped).scatter_(1, grouped, torch.arange(len(tokens), device=device) - starts)
    kept = place < quota[:, run_of]
    if config.overflow == "redistribute":
        return keep_unmerged(signals, top_indices(kept.to(torch.uint8), keep))
    # Kept tokens first, then the last of the others, which carry zeros.
    precedence = torch.where(kept, len(tokens), torch.arange(len(tokens), device=device))
    indices = top_indices(precedence, keep)
    real = kept.gather(1, indices)
    features = gather_tokens(signals.projected, indices) * real[..., None]
    return Selection(indices, features, real, projected=True)
