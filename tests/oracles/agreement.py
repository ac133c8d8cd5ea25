"""Pictures of the oracles as the tensors methods take, and what it means that a method and its oracle agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from nuwa.grid import PatchGrid
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.stage1 import METHODS, get_method
from oracles.nuwa import Outcome
from oracles.pictures import KINDS, SHAPES, Picture, draw_picture

# LearnPruner needs weights trained on its encoder and downsampling the images; their own tests show the same of them.
PRUNING = sorted(set(METHODS) - {"unpruned", "learnpruner", "downsample"})
SIGNALS = ("features", "cls_attention", "keys", "similarity")
FURTHER = {
    "early_attention": "early",
    "received_middle": "middle",
    "received_late": "late",
    "relevance": "relevance",
    "projected": "projected",
}


def signals_of(*pictures: Picture) -> VisionSignals:
    """A batch of pictures of one grid."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(picture, name) for picture in pictures]))

    return VisionSignals(
        grid=PatchGrid(pictures[0].height, pictures[0].width),
        features=stack("features"),
        cls_attention=stack("attention"),
        keys=stack("keys"),
        similarity=stack("similarity"),
        image_ids=tuple(picture.name for picture in pictures),
        **{name: stack(field) for name, field in FURTHER.items()},
    )


def select(name: str, picture: Picture | VisionSignals, keep: int, config: Any = None, seed: int = 0) -> Selection:
    method = get_method(name)
    signals = signals_of(picture) if isinstance(picture, Picture) else picture
    return method.select(signals, keep, config or method.configure(), seed)


def assert_same_outcome(selection: Selection, expected: Outcome, picture: Picture) -> None:
    """Indices and pillars exactly, pillars' features bit for bit, merged ones within rounding of their dtype.

    What a method merges behind the projector is compared with what the projector made.
    """
    untouched = picture.projected if selection.projected else picture.features
    assert selection.indices.dtype == torch.int64 and selection.pillars.dtype == torch.bool
    assert selection.indices[0].tolist() == expected.kept
    assert selection.pillars[0].tolist() == expected.pillars
    found = selection.features[0].numpy()
    assert found.dtype == untouched.dtype, "features leave in the dtype they came in"
    tolerance = 2e-3 if found.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(found.astype(np.float64), expected.features, rtol=tolerance, atol=tolerance)
    for at, token in enumerate(expected.kept):
        if expected.pillars[at]:
            assert np.array_equal(found[at], untouched[token]), "pillars are bit-identical to their input"


def keeps(tokens: int, turn: int | None = None) -> list[int]:
    """One token, a third, all but one, and all; of a ``turn`` every second of these, so that two turns keep them all."""
    chosen = [1, -(-tokens // 3), tokens - 1, tokens]
    return sorted({*(chosen if turn is None else chosen[turn % 2 :: 2])} - {0})


@st.composite
def pictures(draw, kinds=KINDS):
    height, width = draw(st.sampled_from(SHAPES))
    return draw_picture(draw(st.integers(0, 10_000)), height, width, draw(st.sampled_from(kinds)))


@st.composite
def pictures_and_keep(draw, kinds=KINDS):
    picture = draw(pictures(kinds))
    return picture, draw(st.integers(1, picture.tokens))
