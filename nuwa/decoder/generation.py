"""Greedy decoding of all questions of a trunk or a fork together.

What decoding needs beside the model's layers is laid out for several tokens ahead: buffers for keys and values, masks,
rotary tables, and which question stands in which row. Between two layouts a token costs the model's own operations and a
handful of others. Bookkeeping is the host's; it waits for the device once in several tokens, to learn who has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nuwa.decoder.attention import grouped_layers
from nuwa.decoder.caches import Keys, StaticKeys
from nuwa.decoder.finite import not_finite_logits
from nuwa.decoder.sequence import NOBODY, TEXT, Columns, Prefix, Stretch, masks_of, slots_of, take, true_columns
from nuwa.vlm.adapter import Adapter, EncodedPrompt

ENOUGH_ENDED = 3 / 4  # rows are laid out again when so few questions of the last time go on
STEPS_AHEAD = 16  # tokens of a question that a layout has room for
# Tokens of a question between two looks at who has ended. On a CPU a look costs nothing and saves the ended ones' work.
TOKENS_A_LOOK = {"cpu": 1}
FEW_LOOKS = 4
BROKEN = -1  # in place of a token whose logits are not finite


@dataclass(frozen=True)
class Answer:
    """``tokens``: generated ids without the end token; ``kept``: slots alive in the last layer, ascending.

    A slot is a place in the unpruned image's sequence (:mod:`nuwa.layout`); on LLaVA-1.5 it is the patch's index. A
    recycled token is listed as the slot of its cluster's centre.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]


class Growing:
    """One stretch during generation: every row's cache grows by one column a slot and step.

    A row holds the questions that share its columns, each in a slot of its own. ``spans``, ``positions``: of the columns
    in the buffers, those of steps to come included, kept by the host.
    """

    def __init__(self, vlm: Adapter, stretch: Stretch, until: int) -> None:
        self.vlm, self.axes = vlm, len(stretch.positions)
        self.layers = range(stretch.first, until)
        self.modules = grouped_layers(vlm, self.layers)
        self.prefix = stretch.prefix  # until the first layout, which takes it into every row
        self.keys: Keys | StaticKeys = Keys({number: stretch.keys.held[number] for number in self.layers})
        stretch.keys = Keys()  # they are handed over: a layout copies them, and then they are let go
        self.spans, self.positions = stretch.spans.cpu(), stretch.positions[0].cpu()
        self.rows, self.ranks = stretch.place.cpu().unbind(1)
        self.next_position = stretch.next_position.cpu()

    def lay_out(self, active: Tensor, made: int, steps: int, hidden: Tensor) -> None:
        """Make room for ``steps`` tokens of every ``active`` question, which has ``made`` already.

        Rows without questions that go on are left out, and columns that serve none of these.
        """
        rows, ranks = self.rows[active], self.ranks[active]
        old, row = rows.unique(return_inverse=True)
        columns, spans = self._serving(old, row, ranks)
        slots, slot = slots_of(row, len(old))

        future = torch.tensor(NOBODY).expand(len(old), slots, 2).clone()
        future[row, slot] = torch.stack([ranks, ranks + 1], dim=1)
        ahead = torch.zeros(len(old), slots, dtype=torch.long)
        ahead[row, slot] = self.next_position[active] + made
        ahead = (ahead[:, None] + torch.arange(steps)[:, None]).flatten(1)
        standing = Columns(spans, self.positions[old].gather(1, columns)[None])
        if self.prefix is not None:
            first = Columns(self.prefix.columns.spans.cpu(), self.prefix.columns.positions[:1].cpu())
            standing = Prefix(first, {}).before(standing)
        self.spans = torch.cat([standing.spans, future.repeat(1, steps, 1)], dim=1)
        self.positions = torch.cat([standing.positions[0], ahead], dim=1)

        self.rows = torch.full_like(self.rows, -1)
        self.slot = torch.zeros_like(self.rows)
        self.rows[active], self.slot[active] = row, slot
        shared = None if self.prefix is None else self.prefix.held
        held, self.keys = self.keys.held, Keys()
        self.keys, self.prefix = StaticKeys(held, old, columns, steps * slots, shared), None
        self.shape, self.filled, self.steps = (len(old), slots), self.keys.width, steps
        self._tables(hidden, future, ahead)
        self.narrow(active)

    def _serving(self, old: Tensor, row: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Columns ``(rows, width)`` that serve an active question, in their order, and their spans."""
        # How many of a row's questions have a rank below r: a span serves those between its ends.
        below = torch.zeros(len(old), int(ranks.max()) + 2, dtype=torch.long)
        below[row, ranks + 1] = 1
        below = below.cumsum(1)
        spans = self.spans[old, : self.keys.width]
        ends = below.gather(1, spans.clamp(0, below.shape[1] - 1).flatten(1)).view(spans.shape)
        serving = ends[..., 1] > ends[..., 0]
        columns = serving.byte().argsort(dim=1, descending=True, stable=True)[:, : int(serving.sum(dim=1).max())]
        spans = spans.gather(1, columns[..., None].expand(-1, -1, 2))
        spans[~serving.gather(1, columns)] = torch.tensor(NOBODY)
        return columns, spans

    def _tables(self, hidden: Tensor, future: Tensor, ahead: Tensor) -> None:
        """Masks and rotary tables of all steps."""
        device, slots = self.vlm.device, self.shape[1]
        self.standing = Columns(self.spans.to(device), self.positions.to(device)[None])
        self.asking = Columns(future.to(device), self.standing.positions[:, :, self.filled :])
        self.rotations = self.vlm.text.rotations(hidden, self.asking.positions.expand(self.axes, -1, -1))
        self.windowed = self.vlm.text.window is not None
        if not self.windowed:
            first = Columns(self.asking.spans, self.asking.positions[:, :, :slots])
            self.masks = masks_of(self.vlm, first, self.standing, hidden.dtype, causal=False)

    def narrow(self, active: Tensor) -> None:
        """From now on :meth:`step` gets these questions only; the others' slots stay, filled with anything."""
        place = self.rows[active] * self.shape[1] + self.slot[active]
        source = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long)
        source[place] = torch.arange(len(active))
        count = len(source)
        straight = len(active) == count and bool((place == torch.arange(count)).all())
        self.source = None if straight else source.to(self.vlm.device, non_blocking=True)
        self.place = None if straight else place.to(self.vlm.device, non_blocking=True)

    def step(self, hidden: Tensor) -> Tensor:
        """Pass the newest token of every active question, ``(active, dim)``, through this stretch's layers."""
        begin, slots = self.filled, self.shape[1]
        end = begin + slots
        first = begin - (self.spans.shape[1] - self.steps * slots)
        # Questions in their rows and slots; places without one hold what nobody reads.
        layout = hidden if self.source is None else take(hidden, self.source)
        layout = layout.view(*self.shape, -1)
        masks = self._masks(end, slice(first, first + slots), hidden.dtype)
        rotations = {
            kind: tuple(table[..., first : first + slots, :] for table in tables)
            for kind, tables in self.rotations.items()
        }

        for number, module in zip(self.layers, self.modules, strict=True):
            kind = self.vlm.text.kinds[number]
            layout = module(
                layout, attention_mask=masks[kind], position_embeddings=rotations[kind], past_key_values=self.keys
            )

        self.filled = end
        layout = layout.flatten(0, 1)
        return layout if self.place is None else take(layout, self.place)

    def _masks(self, end: int, step: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.windowed:
            return {kind: mask[..., :end] for kind, mask in self.masks.items()}
        asking = Columns(self.asking.spans, self.asking.positions[:, :, step])
        standing = Columns(self.standing.spans[:, :end], self.standing.positions[:, :, :end])
        return masks_of(self.vlm, asking, standing, dtype, causal=False)

    @property
    def full(self) -> bool:
        """Whether the layout has no room for another step."""
        return self.filled == self.spans.shape[1]


class Penalty:
    """Makes tokens less likely that a question's sequence holds already.

    As in stock ``generate``, which heeds a checkpoint's ``repetition_penalty`` in greedy decoding too: prompt and image
    placeholder count as said.
    """

    def __init__(self, vlm: Adapter, prompts: Sequence[EncodedPrompt]) -> None:
        self.penalty = vlm.repetition_penalty
        self.said: Tensor | None = None
        if self.penalty == 1.0:
            return
        texts = [
            [*prompt.before, vlm.image_token, *itertools.chain(*prompt.between), *prompt.after] for prompt in prompts
        ]
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[text[0]] * (longest - len(text))] for text in texts])
        vocabulary = vlm.language.config.vocab_size
        self.said = torch.zeros(len(texts), vocabulary, dtype=torch.bool).scatter_(1, ids, True).to(vlm.device)

    def of(self, logits: Tensor) -> Tensor:
        """Logits ``(questions, vocabulary)`` of the questions that go on, penalised."""
        if self.said is None:
            return logits
        logits = logits.float()
        said = self.said.to(logits.device)
        return torch.where(said, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)

    def say(self, tokens: Tensor) -> None:
        if self.said is not None:
            self.said.scatter_(1, tokens[:, None], True)

    def narrow(self, going: Tensor) -> None:
        if self.said is not None:
            self.said = take(self.said, going)


@torch.inference_mode()
def generate(
    vlm: Adapter, stretches: list[Stretch], prompts: Sequence[EncodedPrompt], max_new_tokens: Sequence[int]
) -> list[Answer]:
    """Greedy decoding; a question leaves the batch when it ends or reaches its limit.

    Of ``stretches`` the keys and values are taken away.
    """
    top = stretches[-1]
    hidden = top.left
    if hidden is None:
        raise ValueError(f"the last stretch stands before layer {top.layer}: pass all layers first")
    untils = [above.first for above in stretches[1:]] + [vlm.layers]
    growing = [Growing(vlm, stretch, until) for stretch, until in zip(stretches, untils, strict=True)]
    penalty = Penalty(vlm, prompts)
    look = TOKENS_A_LOOK.get(vlm.device.type, FEW_LOOKS)
    limits, active = list(max_new_tokens), torch.arange(len(prompts))
    made: list[list[int]] = [[] for _ in limits]
    unread: list[Tensor] = []
    laid_out = step = 0

    while True:
        logits = penalty.of(vlm.model.lm_head(vlm.language.norm(hidden)))
        tokens = logits.argmax(dim=-1)
        # Where a logit is no number, or infinite, it is the largest.
        best = logits.gather(1, tokens[:, None])[:, 0]
        tokens, marked = (one.to(vlm.device) for one in (tokens, tokens.masked_fill(~best.isfinite(), BROKEN)))
        penalty.say(tokens)
        unread.append(marked)
        step += 1

        changed = False
        if len(unread) == look or step >= max(limits[question] for question in active.tolist()):
            going = _read(unread, active.tolist(), made, limits, vlm.end_tokens)
            if going is None:
                raise not_finite_logits([part.keys.held for part in growing], vlm.layers, logits)
            unread = []
            if not going:
                break
            changed = len(going) < len(active)
            if changed:
                chosen = torch.tensor(going)
                active, tokens = active[chosen], take(tokens, chosen)
                penalty.narrow(chosen)

        if not laid_out or growing[0].full or len(active) <= ENOUGH_ENDED * laid_out:
            laid_out = len(active)
            steps = min(STEPS_AHEAD, max(limits[question] for question in active.tolist()) - step)
            # The last first: its cache is let go by that, where forks to come may ask for those below.
            for part in reversed(growing):
                part.lay_out(active, step - 1, steps, hidden)
        elif changed:
            for part in growing:
                part.narrow(active)
        hidden = vlm.text.enter(vlm.language.embed_tokens(tokens))
        for part in growing:
            hidden = part.step(hidden)

    rows = top.place[:, 0]
    kept = true_columns(top.slot[rows] != TEXT)
    slots = top.slot[rows].gather(1, kept).tolist()
    return [Answer(tuple(ids), tuple(alive)) for ids, alive in zip(made, slots, strict=True)]


def _read(
    unread: Sequence[Tensor],
    active: Sequence[int],
    made: list[list[int]],
    limits: Sequence[int],
    ends: Sequence[int],
) -> list[int] | None:
    """Copy tokens to the host, into ``made``; the numbers, among the active questions, of those that go on.

    Null where a token came from logits that are not finite.
    """
    going = []

    for number, tokens in enumerate(torch.stack(list(unread), dim=1).tolist()):
        question = active[number]
        for token in tokens:
            if token in ends or len(made[question]) == limits[question]:
                break
            if token == BROKEN:
                return None
            made[question].append(token)
        else:
            if len(made[question]) < limits[question]:
                going.append(number)
    return going
