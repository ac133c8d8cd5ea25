"""Numbers that are not finite: float16 overflows in some layer, and every answer after it would be noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nuwa.decoder.caches import Pair
from nuwa.decoder.sequence import Stretch
from nuwa.errors import UserError


class NotFinite(UserError, ArithmeticError):
    """A layer's numbers, or the logits, are infinite or no numbers; the line names the layer and the dtype."""


def check_cut(below: Stretch, states: Tensor, scores: Tensor) -> None:
    """Raises :class:`NotFinite` where what a cut reads is not finite.

    ``states`` ``(questions, columns, dim)``: hidden states that go on; ``scores`` ``(questions, visual)``.
    """
    if not _finite(states):
        raise _not_finite(f"layer {_first_layer([below.keys.held], below.layer - 1)}", states)
    if not _finite(scores):
        raise _not_finite(f"the scores of the cut before layer {below.layer}", states)


def not_finite_logits(held: Sequence[Mapping[int, Pair]], layers: int, logits: Tensor) -> NotFinite:
    """The error about logits that are not finite, by the first layer whose keys or values are not.

    ``held``: of every stretch, keys and values by layer.
    """
    return _not_finite(f"layer {_first_layer(held, layers - 1)}", logits)


def _first_layer(held: Sequence[Mapping[int, Pair]], last: int) -> int:
    """The layer that first left something not finite: the one before the first whose keys or values show it."""
    for of_stretch in held:
        for number, pair in sorted(of_stretch.items()):
            if not all(_finite(one) for one in pair):
                return max(0, number - 1)
    return last


def _finite(values: Tensor) -> bool:
    """Without a tensor of flags, which ``isfinite`` makes as large as the values."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def _not_finite(where: str, values: Tensor) -> NotFinite:
    dtype = str(values.dtype).removeprefix("torch.")
    return NotFinite(
        f"model.dtype {dtype}: {where} of the language model gave numbers that are not finite; set it to bfloat16 or "
        "float32, or look at the model's weights"
        if not where.startswith("the scores")
        else f"model.dtype {dtype}: {where} are not finite; set it to bfloat16 or float32"
    )
