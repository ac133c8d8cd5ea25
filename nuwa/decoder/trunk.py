"""The shared work of a batch of images: what all questions, and all trials of one selection, have in common."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.decoder.caches import Keys
from nuwa.decoder.cuts import cut_stretch, trimmed
from nuwa.decoder.generation import Answer, generate
from nuwa.decoder.sequence import (
    EVERYONE,
    TEXT,
    Prefix,
    Stretch,
    Texts,
    advance,
    leave,
    pass_prefix,
    true_columns,
)
from nuwa.layout import InterleavedLayout, VisualLayout
from nuwa.positions import PositionStrategy, sequence_positions
from nuwa.selection import Selection
from nuwa.stage2 import Cut, Scorer
from nuwa.vlm.adapter import Adapter, EncodedPrompt

# Numbers in the hidden states of what passes the layers at once: enough to keep a device busy, and in a layer of a 7B
# model a few hundred MiB in all.
PASS_NUMBERS, PASS_NUMBERS_CPU = 2**24, 2**21
CACHED_TOKENS = 2048  # on a CPU no more than its caches hold
HELD_PASSES = (
    16  # questions have rows above a cut, and are decoded, while these have no more tokens than so many passes
)


def usual_pass_tokens(vlm: Adapter) -> int:
    """Tokens that pass a model's layers at once where no setting says otherwise; the kind of device decides, and the width."""
    width = vlm.language.config.hidden_size
    if vlm.device.type == "cpu":
        return max(1, min(CACHED_TOKENS, PASS_NUMBERS_CPU // width))
    return max(1, PASS_NUMBERS // width)


class Trunk:
    """The shared work of one stage-1 selection and position strategy: all questions about a batch of images.

    ``selection``: kept tokens of ``len(prompts)`` images, over the slots of ``layout`` (see :func:`nuwa.layout.place`;
    absent: the one layout of a model with a fixed grid). Under an :class:`nuwa.layout.InterleavedLayout` each row has
    several images, of which every row keeps equally many tokens, and its questions agree on the texts between them.
    ``prompts``: each image's questions. ``image_ids`` and the prompts' ids seed what is random. ``pass_tokens``: about
    how many tokens pass the layers at once, and with it how many questions have rows above a cut at once; absent: the
    adapter's, and where it has none :func:`usual_pass_tokens`. In float32 it changes no answer, only memory.

    ``whole``, ``questions``: of a portion, the trunk that it is of, and which of its questions these are.
    """

    whole: Trunk | None = None
    questions: slice = slice(None)
    _prefix: Prefix | None = None

    def __init__(
        self,
        vlm: Adapter,
        selection: Selection,
        prompts: Sequence[Sequence[EncodedPrompt]],
        strategy: PositionStrategy,
        image_ids: Sequence[str],
        layout: VisualLayout | None = None,
        *,
        pass_tokens: int | None = None,
    ) -> None:
        layout = layout or vlm.layout
        if layout is None:
            raise ValueError(f"images of {vlm.encoder} differ in layout: name the layout of these")
        self.vlm, self.strategy, self.layout = vlm, strategy, layout
        befores = {prompt.before for questions in prompts for prompt in questions}
        if len(befores) != 1:
            raise ValueError(f"all prompts of a batch must begin alike; found {len(befores)} beginnings")
        self.before = list(befores.pop())
        self.between = [_between(questions, layout) for questions in prompts]
        self.prompts = [prompt for questions in prompts for prompt in questions]
        self.images = [image_ids[row] for row, questions in enumerate(prompts) for _ in questions]

        if vlm.flash_attention:  # see masks_of
            owners = [row for row, questions in enumerate(prompts) for _ in questions]
            selection = selection.at(owners)
            prompts = [[prompt] for prompt in self.prompts]
            self.between = [self.between[owner] for owner in owners]
        self.pass_tokens = pass_tokens or vlm.pass_tokens or usual_pass_tokens(vlm)
        self.slots = selection.indices.to(vlm.device)  # (rows, kept)
        self.projected, *deep = vlm.embed_visual(selection, self.layout).chunk(1 + self.layout.deep, dim=-1)
        self.deep = tuple(deep)
        self.stretch = self._lay_out(prompts)
        self.scored: dict[tuple[int, Scorer, int | None, int], Tensor] = {}  # by layer, scorer, what is kept, seed

    def _lay_out(self, prompts: Sequence[Sequence[EncodedPrompt]]) -> Stretch:
        device, start, rows = self.vlm.device, len(self.before), len(prompts)
        placed = sequence_positions(self.slots, self.strategy, start, self.layout)
        visual, between = self._columns()
        after = placed.after
        texts = Texts.of(tuple(tuple(prompt.after for prompt in questions) for questions in prompts))
        prefix = start + len(visual) + len(between)

        ids = F.pad(texts.ids, (prefix, 0))
        ids[:, :start] = torch.tensor(self.before)
        ids[:, between] = torch.tensor(self.between, dtype=torch.long)
        before = torch.tensor(EVERYONE).expand(rows, prefix, 2)
        depth = F.pad(texts.depth, (prefix, 0)).to(device)
        positions = (depth + after[:, None]).repeat(self.layout.axes, 1, 1)
        positions[:, :, :start] = torch.arange(start, device=device)
        visual, between = visual.to(device), between.to(device)
        positions[:, :, visual] = placed.visual
        positions[:, :, between] = placed.between.expand(self.layout.axes, -1, -1)
        slot = torch.full(ids.shape, TEXT, device=device)
        slot[:, visual] = self.slots

        self.ids = ids.to(device)
        hidden = self.vlm.language.embed_tokens(self.ids)
        hidden = hidden.index_copy(1, visual, self.projected.to(hidden))
        deep = tuple(torch.zeros_like(hidden).index_copy(1, visual, part.to(hidden)) for part in self.deep)
        own, place = texts.own.to(device), texts.place.to(device)
        return Stretch(
            hidden=self.vlm.text.enter(hidden),
            spans=torch.cat([before, texts.spans], dim=1).to(device),
            positions=positions,
            slot=slot,
            between=between.expand(rows, -1),
            place=place,
            text=torch.where(own >= 0, own + prefix, -1),
            last=texts.last.to(device) + prefix,
            next_position=after[place[:, 0]] + texts.lengths.to(device),
            first=0,
            layer=0,
            keys=Keys(),
            inputs={},
            deep=deep,
        )

    def _columns(self) -> tuple[Tensor, Tensor]:
        """Columns of the images' tokens, and of the texts between images, the same in every row."""
        start, kept = len(self.before), self.slots.shape[1]
        if not isinstance(self.layout, InterleavedLayout):
            return torch.arange(start, start + kept), torch.arange(0)
        counts = self.layout.owners[self.slots[0].cpu()].bincount(minlength=len(self.layout.images))
        lengths = torch.stack([counts, torch.tensor([*self.layout.between, 0])], dim=1).flatten()
        is_text = torch.arange(2).repeat(len(counts)).repeat_interleave(lengths)
        columns = torch.arange(start, start + len(is_text))
        return columns[is_text == 0], columns[is_text == 1]

    @property
    def prefix(self) -> Prefix | None:
        """The tokens before the image, which rows above a first cut here stand behind; null where there are none.

        They go on from where the trunk stands, for all cuts there: what one of them gives hangs on no other, in half
        precision too.
        """
        if self.whole is not None:
            return self.whole.prefix
        if self.before and (self._prefix is None or self._prefix.first != self.stretch.layer):
            self._prefix = pass_prefix(self.vlm, self.stretch, len(self.before))
        return self._prefix

    def advance(self, layer: int, watch: frozenset[int] = frozenset()) -> None:
        """Run the trunk up to ``layer`` (exclusive), remembering the inputs of layers in ``watch`` for scorers."""
        advance(self.vlm, self.stretch, layer, self.pass_tokens, watch)

    def finish(self, max_new_tokens: Sequence[int]) -> list[Answer]:
        """Answers of the trunk itself: no cut. The trunk stays usable for forks at its own layer and above."""
        return self.decode(self._whole(), max_new_tokens)

    def _whole(self) -> list[Stretch]:
        end = replace(self.stretch, keys=Keys(self.stretch.keys.held))
        leave(self.vlm, end, self.pass_tokens)
        return [end]

    def reach(self, cuts: Sequence[Cut]) -> None:
        """Run the trunk up to the first of ``cuts``, remembering what its scorer reads; without cuts nothing is to do."""
        if cuts:
            self.advance(cuts[0].layer, frozenset({cuts[0].layer - 1}))

    def answer(self, cuts: Sequence[Cut], max_new_tokens: Sequence[int], seed: int = 0) -> list[Answer]:
        """Answers under ``cuts``, of the trunk itself where there are none; it must not stand above the first cut."""
        self.reach([Cut(*cut) for cut in cuts])
        return self.fork(cuts, max_new_tokens, seed) if cuts else self.finish(max_new_tokens)

    def fork(self, cuts: Sequence[Cut], max_new_tokens: Sequence[int], seed: int = 0) -> list[Answer]:
        """Answers under ``cuts``; the trunk must stand at the first cut's layer."""
        cuts = [Cut(*cut) for cut in cuts]
        self._check_stands_at(cuts[0])
        return [
            answer
            for part in self.portions(cuts)
            for answer in part.decode(part.prefill(cuts, seed), max_new_tokens[part.questions])
        ]

    def portions(self, cuts: Sequence[Cut]) -> Iterator[Trunk]:
        """The trunk for some of its questions after others, by their ``questions``; itself where there are no ``cuts``.

        Above a cut every question has a row, so that without this memory would grow with the questions of an image. Each
        portion is for :meth:`prefill` and :meth:`decode` before the next is asked for; the trunk is at the first cut by then.
        """
        if not cuts:
            yield self
            return
        cuts = [Cut(*cut) for cut in cuts]
        row = max(cut.keep for cut in cuts) + self.stretch.between.shape[1] + self.stretch.text.shape[1]
        together = max(1, HELD_PASSES * self.pass_tokens // row)
        if together >= len(self.prompts):
            yield self
            return
        self.reach(cuts)
        for start in range(0, len(self.prompts), together):
            yield self._portion(slice(start, start + together))

    def _portion(self, questions: slice) -> Trunk:
        portion = copy.copy(self)
        portion.whole, portion.questions = self, questions
        portion.prompts, portion.images = self.prompts[questions], self.images[questions]
        portion.stretch = self.stretch.of(questions)
        return portion

    def prefill(self, cuts: Sequence[Cut], seed: int = 0) -> list[Stretch]:
        """All layers over images and prompts under ``cuts``, up to where :meth:`decode` makes the first token."""
        cuts = [Cut(*cut) for cut in cuts]
        self.reach(cuts)
        return self._forked(cuts, seed) if cuts else self._whole()

    def decode(self, stretches: list[Stretch], max_new_tokens: Sequence[int]) -> list[Answer]:
        """The answers that follow on :meth:`prefill`, whose keys and values this takes away."""
        return generate(self.vlm, stretches, self.prompts, max_new_tokens)

    def _check_stands_at(self, cut: Cut) -> None:
        if self.stretch.layer != cut.layer:
            raise ValueError(f"the trunk stands before layer {self.stretch.layer}, the first cut before {cut.layer}")

    def _forked(self, cuts: Sequence[Cut], seed: int) -> list[Stretch]:
        self._check_stands_at(cuts[0])
        stretches = [self.stretch]
        for cut in cuts:
            below = stretches[-1]
            if below is not self.stretch:
                advance(self.vlm, below, cut.layer, self.pass_tokens, frozenset({cut.layer - 1}))
            stretches.append(cut_stretch(self, below, cut, seed))
            if below is not self.stretch:
                below.let_go()
        leave(self.vlm, stretches[-1], self.pass_tokens)
        stretches[0] = replace(self.stretch, keys=Keys(self.stretch.keys.held))

        for number, cut in enumerate(cuts):
            if cut.trims:
                stretches[: number + 1] = self._trimmed(stretches[: number + 2])
        return stretches

    def _trimmed(self, stretches: Sequence[Stretch]) -> list[Stretch]:
        """All stretches but the last, with its visual tokens only."""
        *below, top = stretches
        rows = top.place[:, 0]
        alive = top.slot[rows].gather(1, true_columns(top.slot[rows] != TEXT))
        return [
            trimmed(stretch, alive, range(stretch.first, above.first), len(self.before))
            for stretch, above in itertools.pairwise([*below, top])
        ]


def _between(questions: Sequence[EncodedPrompt], layout: VisualLayout) -> list[int]:
    """Tokens of the texts between a row's images, one behind the other."""
    expected = layout.between if isinstance(layout, InterleavedLayout) else ()
    found = {prompt.between for prompt in questions}
    if len(found) != 1 or tuple(len(text) for text in next(iter(found))) != expected:
        lengths = sorted({tuple(len(text) for text in between) for between in found})
        raise ValueError(
            f"the questions of a row must agree on the texts between images, of {list(expected)} tokens; "
            f"found {len(found)}, of {', '.join(str(list(length)) for length in lengths)}"
        )
    return list(itertools.chain(*found.pop()))
