"""LearnPruner, stage 1 (ICLR 2026, arXiv 2604.23950): a trained module ranks the tokens, a few picks add diversity.

The learnable pruning module (LPM) reads each token's encoder features and nothing else, no text and no neighbour:
``M_soft = softmax(MLP(X_v))``. Of K1 tokens, ``(1 - λ) K1`` have the highest keep probability; each of the other
``λ K1`` is the token whose largest cosine similarity to all chosen before it is smallest. Nothing is merged.

The weights come from a file that the stage ``pruner`` trains (:mod:`nuwa.pruner`). It names the encoder it was trained
on: ranking the tokens of another encoder is an error and not a bad result.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nuwa.allowed import check_share
from nuwa.errors import UserError
from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import VisionSignals, cosine_similarity, directions, ranked
from nuwa.stage1.registry import register

DEFAULT_WEIGHTS = "models/pruner/lpm.safetensors"
METADATA = "lpm"  # the one metadata key: safetensors writes several in no fixed order


class WeightsError(UserError, ValueError):
    """Weights that are missing, damaged, or trained for another encoder; the message says what to do."""


class Lpm(nn.Module):
    """The learnable pruning module: Linear(dim, dim / 2), GELU, Linear(dim / 2, 2), applied to every token.

    525,826 parameters at CLIP-L's width of 1024 (the paper: 0.53 M).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2)
        self.decide = nn.Linear(dim // 2, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Encoder features ``(..., dim)`` → logits of prune and keep ``(..., 2)``; softmax gives ``M_soft``."""
        return self.decide(F.gelu(self.hidden(features)))

    def keep_logit(self, features: Tensor) -> Tensor:
        """``(..., dim)`` → log-odds of keeping ``(...)``: ranks like the keep probability, which rounds to 1."""
        prune, keep = self(features).unbind(-1)
        return keep - prune


def save_lpm(lpm: Lpm, path: Path, encoder: str, training: Mapping[str, Any]) -> None:
    """Write weights, the ``encoder``'s fingerprint and the ``training`` parameters; equal content, equal bytes."""
    metadata = json.dumps({"encoder": encoder, "training": training}, sort_keys=True)
    state = {name: value.detach().cpu().float().contiguous() for name, value in lpm.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(save(state, {METADATA: metadata}))
    fresh.replace(path)


@dataclass(frozen=True)
class LpmFile:
    """A weights file, read: the module, the fingerprint of its encoder, and how it was trained."""

    lpm: Lpm
    encoder: str
    training: Mapping[str, Any]


def read_lpm(path: Path) -> LpmFile:
    """Read what :func:`save_lpm` wrote; raises :class:`WeightsError` naming the file and what is wrong with it."""
    _digest(path)  # a missing file has its own message
    try:
        with safe_open(path, "pt") as content:
            facts = json.loads((content.metadata() or {})[METADATA])
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)

        lpm = Lpm(state["hidden.weight"].shape[1])
        lpm.load_state_dict(state)
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise WeightsError(
                f"learnpruner.weights {str(path)!r} hold numbers that are not finite; `make pruner` trains them again"
            )
        return LpmFile(lpm.eval().requires_grad_(False), facts["encoder"], facts["training"])
    except WeightsError:
        raise
    except (SafetensorError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"learnpruner.weights {str(path)!r} are no LPM weights ({type(error).__name__}); `make pruner` trains them again"
        ) from None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise WeightsError(f"learnpruner.weights {str(path)!r}: no such file; `make pruner` trains it") from None


@dataclass(frozen=True)
class LearnPruner:
    """Hyper-parameters of stage 1.

    ``weights``: the LPM's file. ``digest``: SHA-256 of its content, taken when the configuration is made (null where
    there is no file yet). It stands for the file in a trial's identity and is checked when the file is read.
    ``diversity_share``: λ, the share of the kept tokens chosen for diversity.
    """

    weights: str = field(default=DEFAULT_WEIGHTS, metadata={"identity": False})
    digest: str | None = None
    diversity_share: float = 0.1

    def __post_init__(self) -> None:
        check_share(f"learnpruner.diversity_share {self.diversity_share}", self.diversity_share, "[0, 1)")
        if self.digest is None and Path(self.weights).is_file():
            object.__setattr__(self, "digest", _digest(Path(self.weights)))


def check(config: LearnPruner, encoder: str) -> None:
    """Raise :class:`WeightsError` unless the weights can be read and were trained on the encoder ``encoder``."""
    _load(config, encoder, torch.device("cpu"))


def _load(config: LearnPruner, encoder: str | None, device: torch.device) -> Lpm:
    """The LPM in float64; ``encoder`` null: not known, so not compared."""
    trained_on, lpm = _read(config.weights, config.digest or _digest(Path(config.weights)), device)
    if encoder is not None and encoder != trained_on:
        raise WeightsError(
            f"learnpruner.weights {config.weights!r} were trained on encoder {trained_on[:12]}, the signals come from "
            f"encoder {encoder[:12]}; `make pruner` trains weights for model.path"
        )
    return lpm


@functools.lru_cache(maxsize=8)
def _read(weights: str, digest: str, device: torch.device) -> tuple[str, Lpm]:
    """Encoder and LPM of a file, read once a process for each content and device."""
    actual = _digest(Path(weights))
    if actual != digest:
        raise WeightsError(
            f"learnpruner.weights {weights!r} hold {actual[:12]}, but {digest[:12]} was asked for; "
            "they were trained anew in between: run the same command again"
        )
    file = read_lpm(Path(weights))
    return file.encoder, file.lpm.to(device, torch.float64)


def diversity_count(keep: int, share: float) -> int:
    """``round(λ K1)`` tokens are chosen for diversity; at least one stays with the LPM, to start from."""
    return min(round(share * keep), keep - 1)


def add_diverse(features: Tensor, chosen: Tensor, count: int) -> Tensor:
    """``chosen`` ``(batch, seeds)`` and ``count`` more tokens of ``features``, ``(batch, seeds + count)``.

    Each is the token whose largest cosine similarity to all chosen ones is smallest; the lower index wins a tie.
    Only ``count`` steps follow one another; images and tokens are done at once, and nothing is N×N.
    """
    unit = directions(features)
    nearest = cosine_similarity(gather_tokens(unit, chosen), unit).amax(dim=1).scatter_(1, chosen, torch.inf)
    for _ in range(count):
        pick = nearest.argmin(dim=1, keepdim=True)
        chosen = torch.cat([chosen, pick], dim=1)
        similarity = cosine_similarity(gather_tokens(unit, pick), unit)[:, 0]
        nearest = torch.maximum(nearest, similarity).scatter_(1, pick, torch.inf)
    return chosen


@register("learnpruner", LearnPruner, cite=("learnpruner",), check=check)
def select(signals: VisionSignals, keep: int, config: LearnPruner, seed: int = 0) -> Selection:
    """``K1 - round(λ K1)`` tokens by keep probability, the rest by diversity; all as the encoder gave them."""
    features = signals.compared(signals.features)
    lpm = _load(config, signals.encoder, features.device)
    # In float64, then rounded: neither batch size nor a token's place in the matrix product moves the ranking.
    logit = lpm.keep_logit(features.double()).float()
    diverse = diversity_count(keep, config.diversity_share)
    chosen = add_diverse(features, ranked(logit)[:, : keep - diverse], diverse)
    return keep_unmerged(signals, chosen.sort(dim=1).values)
