"""Stage-1 methods as their equations read, on tensors: full ``tokens x tokens`` matrices, otherwise image by image.

What ``benchmarks/methods.py`` measures our forms against. Speed is no aim here, nor are ties; tests hold these forms
to the same results on ordinary pictures, so that a comparison compares equal work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.signals import VisionSignals


def nuwa_indices(signals: VisionSignals, keep: int, region_side: int = 2) -> Tensor:
    """What the released preset of Nüwa keeps, of all images; grids that regions divide."""
    grid, (batch, tokens) = signals.grid, signals.cls_attention.shape
    down, across = grid.height // region_side, grid.width // region_side
    # Separation and alignment: the n best of every region, the best of those.
    blocks = torch.arange(tokens, device=signals.features.device).view(down, region_side, across, region_side)
    blocks = blocks.transpose(1, 2).reshape(down * across, region_side**2)
    best = signals.cls_attention[:, blocks].topk(-(-keep // len(blocks)), dim=2).indices
    candidates = blocks.expand(batch, -1, -1).gather(2, best).flatten(1)
    scores = signals.cls_attention.gather(1, candidates)
    return candidates.gather(1, scores.topk(keep, dim=1).indices).sort(dim=1).values


def nuwa(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """The released preset with A, P and W between all tokens of all images."""
    grid, indices = signals.grid, nuwa_indices(signals, keep)
    # Aggregation.
    direction = F.normalize(signals.similarity, dim=-1)
    affinity = (direction @ direction.transpose(1, 2)).relu()
    places = torch.cartesian_prod(
        *(torch.arange(size, device=indices.device).float() for size in (grid.height, grid.width))
    )
    proximity = 1 - (torch.cdist(places, places) / 280**0.5 * (1058 / grid.max_squared_distance) ** 0.5).clamp(max=1)
    weights = affinity * proximity
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
    weights.diagonal(dim1=1, dim2=2).fill_(1)
    gathered = weights @ signals.features
    # Roles.
    kept_scores = signals.cls_attention.gather(1, indices)
    pillars = kept_scores >= kept_scores.quantile(0.55, dim=1, keepdim=True)
    columns = indices[..., None].expand(-1, -1, gathered.shape[-1])
    return indices, torch.where(pillars[..., None], signals.features.gather(1, columns), gathered.gather(1, columns))


def nuwa_selection(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """The released preset without aggregation."""
    indices = nuwa_indices(signals, keep)
    return indices, signals.features.gather(1, indices[..., None].expand(-1, -1, signals.features.shape[-1]))


def visionzip(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image."""
    attention, keys, features = signals.cls_attention[0], F.normalize(signals.keys[0], dim=-1), signals.features[0]
    similarity = keys @ keys.T
    contextual = round(keep * 10 / 64)
    dominant = attention.topk(keep - contextual).indices
    rest = torch.tensor([token for token in range(len(attention)) if token not in set(dominant.tolist())])
    targets = rest[:: len(rest) // contextual][:contextual]
    merged = features.clone()
    joined: dict[int, list[int]] = {}
    for token in sorted(set(rest.tolist()) - set(targets.tolist())):
        joined.setdefault(int(targets[similarity[token, targets].argmax()]), []).append(token)
    for target, others in joined.items():
        merged[target] = features[target] + features[others].mean(0)
    indices = torch.cat([dominant, targets.to(dominant.device)]).sort().values
    return indices[None], merged[indices][None]


def prumerge(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image."""
    attention, keys, features = signals.cls_attention[0], F.normalize(signals.keys[0], dim=-1), signals.features[0]
    similarity = keys @ keys.T
    first, third = attention.quantile(0.25), attention.quantile(0.75)
    ranking = attention.argsort(descending=True)[:keep].tolist()
    important = [token for token in ranking if attention[token] > third + 1.5 * (third - first)]
    left = sorted(set(range(len(attention))) - set(important))
    missing = keep - len(important)
    kept = sorted(important + [left[(2 * place + 1) * len(left) // (2 * missing)] for place in range(missing)])
    dropped = torch.tensor(sorted(set(range(len(attention))) - set(kept)), device=features.device)
    merged = []
    for token in kept:
        group = torch.cat([dropped.new_tensor([token]), dropped[similarity[token, dropped].topk(32).indices]])
        merged.append(attention[group] @ features[group] / attention[group].sum())
    return torch.tensor([kept], device=features.device), torch.stack(merged)[None]


def divprune(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image, as the released code goes about it: all distances, and each step the least of the chosen ones' rows anew."""
    features = signals.features[0]
    unit = F.normalize(features, dim=-1)
    distance = 1 - unit @ unit.T
    # Every token is nearest to itself.
    chosen = distance.topk(2, dim=0, largest=False).values[1].argmax()[None]
    while len(chosen) < keep:
        chosen = torch.cat([chosen, distance[chosen].amin(dim=0).argmax()[None]])
    indices = chosen.sort().values
    return indices[None], features[indices][None]


def vispruner(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image."""
    features = signals.features[0]
    unit = F.normalize(features, dim=-1)
    order = signals.cls_attention[0].argsort(descending=True)
    important, rest = order[: keep // 2], order[keep // 2 :]
    while len(rest) > keep - keep // 2:
        first, second = rest[::2], rest[1::2]
        likeness = (unit[first] @ unit[second].T).amax(1)
        drop = min(8, len(rest) - (keep - keep // 2))
        rest = torch.cat([first[likeness.argsort(descending=True)[drop:]], second])
    indices = torch.cat([important, rest]).sort().values
    return indices[None], features[indices][None]


def pooling(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image; square grids."""
    grid, features = signals.grid, signals.features[0]
    image = features.view(grid.height, grid.width, -1)
    width = round((keep * grid.width / grid.height) ** 0.5)
    height = round(grid.height / grid.width * width)
    while height * width > keep:
        height, width = (height - 1, width) if height / grid.height >= width / grid.width else (height, width - 1)
    cells, indices = [], []
    for row in range(height):
        for column in range(width):
            rows = slice(row * grid.height // height, -(-(row + 1) * grid.height // height))
            columns = slice(column * grid.width // width, -(-(column + 1) * grid.width // width))
            cells.append(image[rows, columns].flatten(0, 1).mean(0))
            middle = (2 * row + 1) * grid.height // (2 * height), (2 * column + 1) * grid.width // (2 * width)
            indices.append(middle[0] * grid.width + middle[1])
    return torch.tensor([indices], device=features.device), torch.stack(cells)[None]


def fastervlm(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image."""
    indices = signals.cls_attention[0].topk(keep).indices.sort().values
    return indices[None], signals.features[:1, indices]


def hiprune(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image."""
    late, height, width = signals.received_late[0].clone(), signals.grid.height, signals.grid.width
    anchors = signals.received_middle[0].topk(round(0.1 * keep / 5)).indices
    chosen = torch.zeros_like(late)
    for down, across in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        rows, columns = anchors // width + down, anchors % width + across
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        chosen[(rows * width + columns)[inside]] = 1
    chosen[anchors] = 2
    indices = (chosen + late / late.max() / 2).topk(keep).indices.sort().values
    return indices[None], signals.features[:1, indices]


def holov(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image whose tokens 16 runs divide; what a run cannot keep goes to the others."""
    size, attention = signals.grid.tokens // 16, signals.cls_attention[0].view(16, -1)
    unit = F.normalize(signals.projected[0], dim=-1).view(16, size, -1)
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).zero_()
    mean = similarity.sum(dim=2, keepdim=True) / (size - 1)
    variance = (similarity - mean).square().sum(dim=2) / (size - 1)
    own = 1000 * attention
    scale = own.mean(dim=1, keepdim=True) / (variance.mean(dim=1, keepdim=True) + 1e-6)
    score = (own + 0.09 * variance * scale).mean(dim=1)
    share = (score / score.sum()).tolist()
    order = sorted(range(16), key=lambda run: -share[run])

    quota = [int(part * keep) for part in share]
    for number in range(keep - sum(quota)):
        quota[order[number % 16]] += 1
    quota = [min(part, size) for part in quota]
    weights = [part * (size - taken) for part, taken in zip(share, quota, strict=True)]
    surplus = keep - sum(quota)
    quota = [min(q + int(surplus * weight / sum(weights)), size) for q, weight in zip(quota, weights, strict=True)]
    for run in order:
        quota[run] += min(keep - sum(quota), size - quota[run])
    kept = [run * size + attention[run].topk(taken).indices for run, taken in enumerate(quota)]
    indices = torch.cat(kept).sort().values
    return indices[None], signals.features[:1, indices]


def scope(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image."""
    unit = F.normalize(signals.features[0], dim=-1)
    similarity, attention = unit @ unit.T, signals.cls_attention[0]
    covered, chosen = torch.zeros_like(attention), []
    for _ in range(keep):
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=0) * attention
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        covered = torch.maximum(covered, similarity[:, chosen[-1]])
    indices = torch.tensor(chosen, device=attention.device).sort().values
    return indices[None], signals.features[:1, indices]


def cdpruner(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image: the kernel, then greedy inference in it."""
    relevance = -signals.relevance[0]
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    unit = F.normalize(signals.projected[0], dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    gain, rows, chosen = kernel.diagonal().clone(), [], []
    for _ in range(keep):
        best = int(gain.argmax())
        row = kernel[best]
        if rows:
            known = torch.stack(rows)
            row = row - known[:, best] @ known
        rows.append(row / gain[best].sqrt())
        gain = gain - rows[-1].square()
        gain[best] = -torch.inf
        chosen.append(best)
    indices = torch.tensor(chosen, device=gain.device).sort().values
    return indices[None], signals.features[:1, indices]


def vscan(signals: VisionSignals, keep: int) -> tuple[Tensor, Tensor]:
    """One image of 24x24 tokens, 16 windows; or of 60x48, 20."""
    early, late, features = signals.early_attention[0], signals.cls_attention[0], signals.projected[0]
    grid, side = signals.grid, min(signals.grid.height, signals.grid.width) // 4
    blocks = torch.arange(grid.tokens, device=early.device).view(grid.height // side, side, grid.width // side, side)
    blocks = blocks.transpose(1, 2).reshape(-1, side**2)
    local = blocks.gather(1, early[blocks].topk(keep // 2 // len(blocks), dim=1).indices).flatten()
    others = late.clone()
    others[local] = -torch.inf
    indices = torch.cat([local, others.topk(keep - len(local)).indices]).sort().values
    unit = F.normalize(features, dim=-1)
    joined = (unit @ unit.T)[:, indices].argmax(dim=1)
    joined[indices] = torch.arange(keep, device=early.device)
    members = F.one_hot(joined, keep).to(features)
    return indices[None], (members.T @ features / members.sum(dim=0)[:, None])[None]


# Every one takes one image at a time but Nüwa's, which is measured as a batch.
PER_IMAGE = {
    "cdpruner": cdpruner,
    "divprune": divprune,
    "fastervlm": fastervlm,
    "hiprune": hiprune,
    "holov": holov,
    "pooling": pooling,
    "prumerge": prumerge,
    "scope": scope,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "vscan": vscan,
}
