"""LearnPruner's training where images differ in layout: LLaVA-NeXT, Qwen2-VL and Qwen2.5-VL.

Images of a batch have as many tokens as their sizes give them, position ids of as many axes as the model has, and views
that stage 1 prunes on their own. The encoder is frozen, so images are encoded when a batch is drawn, by the same adapter as
at inference: windows, crops, merger and newline tokens are its affair. Newline tokens are never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nuwa.layout import VisualLayout, place
from nuwa.pruner.instructions import Conversation, Conversations, open_image, pack_conversation
from nuwa.pruner.learner import PrunerLearner, best_tokens, relative_to_threshold, straight_through
from nuwa.selection import Selection
from nuwa.testbed.instruction import IGNORE, Packed, block_mask, collate
from nuwa.vlm import EncodedImage, view_signals

NO_VIEW = -1  # of what fills a row up


class LayoutConversations(Conversations):
    """The share of :class:`nuwa.pruner.instructions.Instructions`, for a model whose images differ in layout.

    A batch has the columns of :class:`nuwa.testbed.instruction.Packed`, with ``position_ids`` ``(batch, axes, length)``,
    and of every image, filled up to the longest: ``features`` ``(batch, tokens, dim)``; ``view`` and ``slot``
    ``(batch, tokens)``, the view a token belongs to (or ``NO_VIEW``) and its place in the image's sequence; ``embedded``
    ``(batch, slots, language_dim)``, what enters the language model, newline tokens among it.
    """

    def _batch(self, rows: np.ndarray, size: int) -> dict[str, Tensor]:
        chosen = self.chosen(rows, size)
        encoded = self.vlm.encode_images([image or open_image(conversation) for conversation, _, image in chosen])
        packed = [
            _positioned(one, image.layout, self.vlm.image_token)
            for (_, one, _), image in zip(chosen, encoded, strict=True)
        ]
        columns = collate([one for one, _ in packed], pad=self.vlm.end_tokens[0])
        length = columns["input_ids"].shape[1]
        positions = [F.pad(ids, (0, length - ids.shape[1])) for _, ids in packed]
        return {**columns, "position_ids": torch.stack(positions), **self._images(encoded)}

    def pack(self, conversation: Conversation) -> tuple[Packed | None, Image.Image | None, int]:
        image = open_image(conversation)
        tokens = self.vlm.layout_of(image.size).tokens
        return pack_conversation(self.vlm, conversation.turns, self.max_tokens, tokens), image, tokens

    def _images(self, encoded: Sequence[EncodedImage]) -> dict[str, Tensor]:
        """The columns of a batch that speak of its images."""
        columns: dict[str, list[Tensor]] = {"features": [], "view": [], "slot": [], "embedded": []}
        for image in encoded:
            layout = image.layout
            views = [
                torch.full((view.grid.tokens,), number, dtype=torch.long) for number, view in enumerate(layout.views)
            ]
            columns["features"].append(image.signals["features"].clone().cpu())
            columns["view"].append(torch.cat(views))
            columns["slot"].append(torch.cat(layout.slots))
            columns["embedded"].append(self._embedded(image).clone().cpu())
        return {name: _filled(rows, NO_VIEW if name == "view" else 0) for name, rows in columns.items()}

    def _embedded(self, image: EncodedImage) -> Tensor:
        """Language embeddings of all tokens of an image, ``(slots, dim)``."""
        features = {"features": image.signals["features"][None]}
        everything = []
        for view in view_signals(image.layout, features, ("",)):
            indices = torch.arange(view.grid.tokens, device=view.features.device)[None]
            everything.append(Selection(indices, view.features, torch.ones_like(indices, dtype=torch.bool)))
        return self.vlm.embed_visual(place(image.layout, everything), image.layout)[0]


class LayoutLearner(PrunerLearner):
    """The LPM in training, with batches of :class:`LayoutConversations`.

    ``topk_ste`` holds the share in every view of every image, as stage 1 deals its budget out by views.
    """

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["features"]

    def best(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        chosen = torch.zeros_like(scores)
        for row, own in self._views(batch):
            chosen[row, own] = best_tokens(scores[row, own][None], self._keep(int(own.sum())))[0]
        return chosen

    def kept_share(self, mask: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return mask[batch["view"] != NO_VIEW].mean()

    def mask(self, features: Tensor, batch: dict[str, Tensor] | None = None) -> Tensor:
        assert batch is not None  # the views of the images are known from it alone
        logit = self.keep_logit(features)
        if self.sparsity == "topk_ste":
            hard = self.best(logit.detach(), batch)
            shifted = torch.zeros_like(logit)
            for row, own in self._views(batch):
                count = int(own.sum())
                # A view of one token keeps it: there is nothing to learn from.
                if count > 1:
                    view = relative_to_threshold(logit[row, own][None], self._keep(count))[0]
                    shifted = shifted.index_put(
                        (torch.full((count,), row, device=own.device), own.nonzero()[:, 0]), view
                    )
            logit = shifted
        else:
            hard = (logit > 0).to(logit.dtype)
        return straight_through(hard, logit.sigmoid())

    def _keep(self, tokens: int) -> int:
        """Tokens of a view that ``keep_share`` stands for."""
        return max(1, min(round(self.keep_share * tokens), tokens - 1))

    def _views(self, batch: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
        """Every view of every image: its row and which tokens are its own, ``(tokens,)`` bool."""
        return [
            (row, views == number) for row, views in enumerate(batch["view"]) for number in range(int(views.max()) + 1)
        ]

    def answer_logits(self, batch: dict[str, Tensor], features: Tensor, mask: Tensor) -> Tensor:
        """Logits at labelled places, ``(labelled, vocabulary)``, in raster order of the batch."""
        vlm, language = self.vlm, self.vlm.language
        embeds = vlm.text.enter(language.embed_tokens(batch["input_ids"]))
        is_image = batch["input_ids"] == vlm.image_token
        first, embedded = int(is_image[0].nonzero()[0]), batch["embedded"].to(embeds)
        slots = torch.arange(embedded.shape[1], device=embeds.device)
        own = slots < is_image.sum(dim=1)[:, None]
        # Tokens of an image stand in one piece from ``first`` on; no two prompts begin otherwise.
        embeds = embeds.masked_scatter(is_image[..., None], vlm.text.enter(embedded[own]))

        real = batch["view"] != NO_VIEW
        rows = real.nonzero()[:, 0]
        kept = torch.ones(own.shape, device=mask.device, dtype=mask.dtype)
        kept = kept.index_put((rows, batch["slot"][real]), mask[real])
        rotary = vlm.text.rotations(embeds, batch["position_ids"].permute(1, 0, 2))
        hidden, visible = embeds, block_mask(batch["blocks"])
        for number, layer in enumerate(language.layers):
            given: dict[str, Any] = {
                "attention_mask": visible,
                "position_embeddings": rotary[vlm.text.kinds[number]],
                "kept": kept,
                "first": first,
            }
            if self.recompute:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **given)
            else:
                hidden = layer(hidden, **given)
        return vlm.model.lm_head(language.norm(hidden[batch["labels"] != IGNORE]))


def _positioned(packed: Packed, layout: VisualLayout, image_token: int) -> tuple[Packed, Tensor]:
    """A packed conversation and its position ids ``(axes, length)``, as the unpruned model has them."""
    start = int((packed.input_ids == image_token).argmax())
    rest = len(packed.input_ids) - start - layout.tokens
    parts = [
        torch.arange(start).expand(layout.axes, -1),
        start + layout.offsets,
        (start + layout.length + torch.arange(rest)).expand(layout.axes, -1),
    ]
    return packed, torch.cat(parts, dim=1)


def _filled(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Rows of different lengths as one tensor ``(rows, longest, ...)``."""
    longest = max(len(row) for row in rows)
    padded = [F.pad(row, (*[0, 0] * (row.ndim - 1), 0, longest - len(row)), value=fill) for row in rows]
    return torch.stack(padded)
