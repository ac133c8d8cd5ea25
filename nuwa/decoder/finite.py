"""Numbers that are not finite: float16 overflows in some layer, and every answer after it would be noise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nuwa.decoder.sequence import Stretch
from nuwa.errors import UserError


class NotFinite(UserError, ArithmeticError):
    """A layer's numbers, or the logits, are infinite or no numbers; the line names the layer and the dtype."""


def check_cut(below: Stretch, states: Tensor, scores: Tensor) -> None:
    """Raises :class:`NotFinite` where what a cut reads is not finite.

    ``states`` ``(questions, kept, dim)``: hidden states that go on; ``scores`` ``(questions, visual)``.
    """
    if not bool(states.isfinite().all()):
        raise _not_finite(f"layer {_first_layer([below], below.layer - 1)}", states)
    if not bool(scores.isfinite().all()):
        raise _not_finite(f"the scores of the cut before layer {below.layer}", states)


def not_finite_logits(stretches: Sequence[Stretch], layers: int, logits: Tensor) -> NotFinite:
    """The error about logits that are not finite, by the first layer whose keys or values are not."""
    return _not_finite(f"layer {_first_layer(stretches, layers - 1)}", logits)


def _first_layer(stretches: Sequence[Stretch], last: int) -> int:
    """The layer that first left something not finite: the one before the first whose keys or values show it."""
    for stretch in stretches:
        for number, pair in sorted(stretch.keys.held.items()):
            if not all(bool(one.isfinite().all()) for one in pair):
                return max(0, number - 1)
    return last


def _not_finite(where: str, values: Tensor) -> NotFinite:
    dtype = str(values.dtype).removeprefix("torch.")
    return NotFinite(
        f"model.dtype {dtype}: {where} of the language model gave numbers that are not finite; set it to bfloat16 or "
        "float32, or look at the model's weights"
        if not where.startswith("the scores")
        else f"model.dtype {dtype}: {where} are not finite; set it to bfloat16 or float32"
    )
