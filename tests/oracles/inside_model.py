"""A stock model with blocked attention, from whose layers the methods inside the language model choose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracles import inside, scorers
from oracles.masked_model import MaskedModel
from oracles.pictures import best_first

OF_SCORERS = {
    "attention_last_token": scorers.last_token,
    "attention_last_token_next_layer": scorers.last_token,
    "attention_all_text": scorers.all_text,
}


class InsideModel(MaskedModel):
    """``places``: row and column of every visual token, null where it ends a row. ``trims``: whether answers see only what
    the last layer sees."""

    def __init__(
        self, *arguments: Any, places: list[tuple[int, int] | None], trims: bool = False, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self.places, self.trims = places, trims
        attention = self.language.layers[0].self_attn
        self.heads = self.language.config.num_attention_heads
        self.head_dim, self.scaling = attention.head_dim, attention.scaling

    def mask(self, layer: int, length: int) -> Tensor:
        mask = super().mask(layer, length)
        if self.trims:
            gone = set(range(len(self.visual))).difference(self.alive[-1])
            dropped = torch.tensor([self.visual[patch] for patch in sorted(gone)], dtype=torch.long)
            mask[:, :, len(self.prompt) :, dropped] = -torch.inf
        return mask

    def _pass(self) -> None:
        """What enters every layer of the prompt, once for every state of what is alive."""
        alive = [tuple(tokens) for tokens in self.alive]
        if getattr(self, "_passed", None) != alive:
            self.forward([])
            self._passed = alive

    @property
    def frequencies(self) -> list[float]:
        return self.language.rotary_emb.inv_freq.tolist()

    @property
    def axes_of_frequencies(self) -> list[int]:
        """Which axis of the ids turns every pair of numbers."""
        sections = self.language.config.rope_parameters.get("mrope_section")
        if sections is None:
            return [0] * len(self.frequencies)
        return [axis for axis, count in enumerate(sections) for _ in range(count)]

    @torch.inference_mode()
    def projections(self, number: int, rotated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries ``(heads, n, d)``, keys and values ``(kv heads, n, d)`` of layer ``number`` over the whole prompt."""
        self._pass()
        layer = self.language.layers[number]
        hidden = layer.input_layernorm(self.entering[number])
        attention = layer.self_attn
        parts = [
            project(hidden)[0].view(len(self.prompt), -1, self.head_dim).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        if rotated:
            ids = self.position_tensor(self.positions(number, len(self.prompt)))
            cos, sin = (table[0] for table in self.language.rotary_emb(hidden, position_ids=ids))
            half = self.head_dim // 2
            parts[:2] = [
                part * cos + torch.cat([-part[..., half:], part[..., :half]], dim=-1) * sin for part in parts[:2]
            ]
        return tuple(part.numpy() for part in parts)

    @torch.inference_mode()
    def normed(self, number: int) -> np.ndarray:
        """States entering layer ``number`` through the final norm, ``(n, dim)``."""
        self._pass()
        return self.language.norm(self.entering[number])[0].numpy()

    def choose(self, layer: int, keep: int, scorer: str, options: dict[str, Any]) -> list[int]:
        """From ``layer`` on only ``keep`` visual tokens may be seen, those that ``scorer`` chooses among those alive."""
        alive = self.alive[layer - 1]
        places = [self.places[token] for token in alive]
        if scorer == "none":
            chosen = list(range(keep))
        elif scorer == "dart":
            chosen = self._dart(layer, alive, keep, options)
        elif scorer == "ivc_prune":
            chosen = self._ivc_prune(layer, alive, keep, options)
        elif scorer == "feather":
            grid = inside.grid_of(places, options["stride"])
            chosen = inside.united([grid], self._scores(layer, "attention_last_token_without_rope", options), keep)
        else:
            chosen = sorted(best_first(self._scores(layer, scorer, options))[:keep])
        for number in range(layer, len(self.alive)):
            self.alive[number] = [alive[at] for at in chosen]
        return self.alive[-1]

    def _columns(self, layer: int) -> dict[str, list[int]]:
        """``before``: the texts before and between images."""
        visual = [self.visual[token] for token in self.alive[layer - 1]]
        before = [at for at in range(self.text[0]) if at not in set(self.visual)]
        return {"before": before, "visual": visual, "text": self.text}

    def _scores(self, layer: int, scorer: str, options: dict[str, Any]) -> list[float]:
        columns = self._columns(layer)
        visual = columns["visual"]
        if scorer in ("attention_last_token_without_rope", "attention_last_token_among_visual"):
            query, keys, _ = self.projections(layer - 1, scorer == "attention_last_token_among_visual")
            return inside.attention(query[:, -1], keys[:, visual], self.scaling)
        if scorer == "attention_last_token_next_layer_without_rope":
            query, keys, _ = self.projections(layer, False)
            everyone = columns["before"] + visual + columns["text"]
            shares = inside.attention(query[:, -1], keys[:, everyone], self.scaling)
            return shares[len(columns["before"]) :][: len(visual)]
        maps = self.forward([], attentions=True)[1][layer if scorer.endswith("next_layer") else layer - 1]
        if scorer != "attention_raters_by_distance":
            return OF_SCORERS[scorer](maps, visual, self.text)
        words = self.embeddings([])[0, self.text].numpy()
        entered = self.projected[self.alive[0]].numpy()
        ids = list(zip(*self.positions(layer - 1, len(self.prompt)), strict=True))
        return inside.raters_by_distance(
            maps[:, self.text][:, :, visual].astype(np.float64),
            [ids[at] for at in self.text],
            [ids[at] for at in visual],
            list(zip(self.axes_of_frequencies, self.frequencies, strict=True)),
            scorers.raters(entered, words),
            options["priority_heads"],
            options["floor"],
        )

    def _dart(self, layer: int, alive: list[int], keep: int, options: dict[str, Any]) -> list[int]:
        _, keys, _ = self.projections(layer - 1, options["pivot_rope"])
        states, columns = self.normed(layer), self._columns(layer)
        return inside.dart(
            keys[:, columns["visual"]],
            keys[:, columns["text"]],
            states[columns["visual"]],
            states[columns["text"]],
            keep,
            self.visual[0],
            **{name: options[name] for name in ("image_pivots", "text_pivots", "pivot_order", "pivot_norm")},
        )

    def _ivc_prune(self, layer: int, alive: list[int], keep: int, options: dict[str, Any]) -> list[int]:
        _, _, values = self.projections(layer - 1, False)
        columns = self._columns(layer)
        ids = list(zip(*self.positions(layer - 1, len(self.prompt)), strict=True))
        return inside.ivc_prune(
            {name: values[:, own] for name, own in columns.items()},
            [list(ids[at]) for at in columns["visual"]],
            self.frequencies,
            keep,
            **options,
        )
