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


def scores(
    attention: Tensor, compared: Tensor, members: list[list[int]], config: HoloV, rough: bool
) -> tuple[Tensor, Tensor]:
    """The score of every token in its run, ``(batch, tokens)`` float64; runs of one length are computed together.

    Also the largest error of a run's mean score, as a share of it, ``(batch,)``: not zero where similarities are rough.
    """
    attention = attention.double()
    totals, error = torch.zeros_like(attention), attention.new_zeros(len(attention))
    doubt = rough * (2 * compared.shape[2] + 8) * 2**-24

    for size in sorted({len(run) for run in members}):
        alike = torch.tensor([run for run in members if len(run) == size], device=attention.device)
        places = alike.flatten().expand(len(attention), -1)
        own = attention.gather(1, places).view(len(attention), -1, size) * SCALE
        if size == 1:
            totals.scatter_(1, places, (own if config.scale_single else own / SCALE).flatten(1))
            continue
        similarity = (rough_similarities if rough else similarities)(compared, alike).double()
        similarity.diagonal(dim1=2, dim2=3).zero_()
        mean = similarity.sum(dim=3, keepdim=True) / (size - 1)
        variance = (similarity - mean).square().sum(dim=3) / (size - 1)
        of_run = variance.mean(dim=2, keepdim=True)
        scale = own.mean(dim=2, keepdim=True) / (of_run + EPSILON)
        totals.scatter_(1, places, (own + config.beta * variance * scale).flatten(1))
        # A run's mean is that of its attention times 1 + β v / (v + ε), and the root of v is off by the doubt at most.
        off = 2 * doubt * of_run.sqrt() + 3 * doubt**2
        slope = config.beta * EPSILON / ((of_run - off).clamp_(min=0) + EPSILON).square()
        error = torch.maximum(error, (off * slope).amax(dim=(1, 2)))
    return totals, error


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


def rough_similarities(projected: Tensor, members: Tensor) -> Tensor:
    """The same in float32, each off by ``(2 dim + 8) / 2²⁴`` at most: products and, of tokens with themselves, lengths."""
    made = []
    parts = members.split(max(1, 600 // members.shape[1]))
    # Runs that lie behind one another need not be copied.
    whole = [torch.equal(part.flatten(), torch.arange(part.numel()) + part[0, 0]) for part in parts]
    for image in projected:
        for part, row in zip(parts, whole, strict=True):
            first = int(part[0, 0])
            vectors = image[first : first + part.numel()].unflatten(0, part.shape) if row else image[part]
            vectors = vectors.float()
            product = vectors @ vectors.mT
            norm = product.diagonal(dim1=1, dim2=2).sqrt() + EPSILON
            made.append(product / (norm[:, :, None] * norm[:, None]))
    return torch.cat(made).unflatten(0, (len(projected), -1))


def certain(means: Tensor, error: Tensor, sizes: Tensor, keep: int) -> Tensor:
    """Whether means that are off by ``error`` ``(batch,)`` of themselves lead to the same quotas, ``(batch,)``.

    They do where no share rounds down to another number, no two shares change their order and no run overflows.
    """
    share = means / (means.sum(dim=1, keepdim=True) + EPSILON)
    off = share * (2 * error[:, None] + 1e-12) + 2**-32
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

    def quotas_of(attention: Tensor, compared: Tensor, rough: bool) -> tuple[Tensor, Tensor, Tensor]:
        score, error = scores(attention, compared, members, config, rough)
        means = torch.zeros(len(score), len(members), dtype=score.dtype, device=device)
        means = means.scatter_add(1, run_of.expand(len(score), -1), score) / sizes
        return score, quotas(means, sizes, keep, config), certain(means, error, sizes, keep)

    # Where attention alone decides inside a run, rough scores mostly give the quotas that exact ones give.
    rough = device.type == "cpu" and config.inside == "attention" and torch.get_float32_matmul_precision() == "highest"
    attention, compared = signals.cls_attention, signals.compared(signals.projected)
    score, quota, sure = quotas_of(attention, compared, rough)
    for row in (~sure).nonzero()[:, 0].tolist() if rough else []:
        quota[row] = quotas_of(attention[row : row + 1], compared[row : row + 1], False)[1][0]

    signal = score if config.inside == "score" else signals.cls_attention.float()
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
