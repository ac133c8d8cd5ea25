"""Pruning as blocked attention: a stock model over the whole, unpruned sequence, one question, no cache.

A token that is dropped from layer ``l`` on stays in the sequence, and from layer ``l`` on nobody else may attend to
it. Nothing of a schedule's bookkeeping is left: no gathering, no cut rows, no caches, no shared prefixes.
"""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from oracles import scorers
from oracles.pictures import best_first


def eager_copy(model):
    """An own copy of a model whose layers return their attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin.eval()


def position_ids(kept: list[int], strategy: str, start: int, tokens: int) -> list[int]:
    """Position ids of kept patches under PERC, PESP and RPME."""
    if strategy == "perc":
        return [start + at for at in range(len(kept))]
    if strategy == "pesp":
        return [start + patch for patch in kept]
    spread = [start + math.ceil(Fraction(patch * (tokens - 1), max(max(kept), 1))) for patch in kept]
    return [start, *spread[1:]]


class MaskedModel:
    """One question about one image. ``alive``: patches that may be attended to, one sorted list a layer.

    ``merged``: encoder features ``(kept, dim)`` in the place of the kept patches' own.
    """

    @torch.inference_mode()
    def __init__(
        self, model, processor, image, question: str, kept: list[int], strategy: str = "pesp", merged=None
    ) -> None:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        self.model, self.strategy = model, strategy
        self.language = model.model.language_model
        self.alive = [list(kept) for _ in self.language.layers]
        self.prompt = inputs.input_ids[0].tolist()
        self.visual = [at for at, token in enumerate(self.prompt) if token == model.config.image_token_id]
        self.text = list(range(self.visual[-1] + 1, len(self.prompt)))
        self.projected = model.model.get_image_features(inputs.pixel_values).pooler_output[0].clone()
        if merged is not None:
            self.projected[kept] = model.model.multi_modal_projector(merged[None])[0]

    def embeddings(self, answer: list[int]) -> Tensor:
        """``(1, n, dim)``: words are embedded, whatever they are, and patches projected."""
        embedded = self.language.embed_tokens(torch.tensor([[*self.prompt, *answer]]))
        embedded[0, self.visual] = self.projected
        return embedded

    def mask(self, layer: int, length: int) -> Tensor:
        """Additive ``(1, 1, n, n)``: causal, and -inf towards dropped patches from all but themselves."""
        dropped = [self.visual[patch] for patch in set(range(len(self.visual))).difference(self.alive[layer])]
        mask = torch.full((length, length), -torch.inf).triu(1)
        mask[:, dropped] = -torch.inf
        mask.fill_diagonal_(0)
        return mask[None, None]

    def positions(self, layer: int, length: int) -> list[int]:
        start, tokens = self.visual[0], len(self.visual)
        kept = self.alive[layer]
        ids = [0] * length
        ids[:start] = range(start)
        for patch, position in zip(kept, position_ids(kept, self.strategy, start, tokens), strict=True):
            ids[self.visual[patch]] = position
        after = start + (len(kept) if self.strategy == "perc" else tokens)
        for at in range(self.visual[-1] + 1, length):
            ids[at] = after + at - self.visual[-1] - 1
        return ids

    @torch.inference_mode()
    def forward(self, answer: list[int], attentions: bool = False) -> tuple[Tensor, list[np.ndarray]]:
        """Logits after prompt and ``answer``, ``(vocabulary,)``, and every layer's attention ``(heads, n, n)``."""
        embedded = self.embeddings(answer)
        hooks = [
            layer.register_forward_pre_hook(self._blocking(number, embedded.shape[1]), with_kwargs=True)
            for number, layer in enumerate(self.language.layers)
        ]
        try:
            out = self.model(inputs_embeds=embedded, use_cache=False, output_attentions=attentions)
        finally:
            for hook in hooks:
                hook.remove()
        return out.logits[0, -1], [attention[0].numpy() for attention in out.attentions or ()]

    def _blocking(self, number: int, length: int):
        mask = self.mask(number, length)

        def block(_module, arguments, named):
            named = {**named, "attention_mask": mask}
            if self.strategy != "pesp":  # PESP's ids are the stock model's own
                ids = torch.tensor([self.positions(number, length)])
                named["position_embeddings"] = self.language.rotary_emb(arguments[0], position_ids=ids)
            return arguments, named

        return block

    def scores(self, layer: int, scorer: str) -> list[float]:
        """Scores of the patches alive before ``layer``, from the attention of the layer before it."""
        alive = self.alive[layer - 1]
        if scorer == "cosine_mean_text":
            words = self.embeddings([])[0, self.text].numpy()
            return scorers.cosine_with_mean_text(self.projected[alive].numpy(), words)
        # From ``layer`` on nothing is dropped yet when it is scored: ``alive`` is the same there as just before it.
        ahead = scorer == "attention_last_token_next_layer"
        attention = self.forward([], attentions=True)[1][layer if ahead else layer - 1]
        columns = [self.visual[patch] for patch in alive]
        if scorer == "attention_raters":
            words = self.embeddings([])[0, self.text].numpy()
            entered = self.projected[self.alive[0]].numpy()
            return scorers.of_raters(attention, columns, self.text, scorers.raters(entered, words))
        score = {"attention_all_text": scorers.all_text}.get(scorer, scorers.last_token)
        return score(attention, columns, self.text)

    def cut(self, layer: int, keep: int, scores: list[float]) -> list[int]:
        """From ``layer`` on only the ``keep`` best of the patches alive before it may be seen."""
        alive = self.alive[layer - 1]
        chosen = sorted(alive[at] for at in best_first(scores)[:keep])
        for number in range(layer, len(self.alive)):
            self.alive[number] = chosen
        return chosen

    def answer(self, limit: int, ends: tuple[int, ...]) -> tuple[list[int], list[Tensor]]:
        """Greedy tokens without the end token, and the logits of every step."""
        tokens: list[int] = []
        seen = []
        for _ in range(limit):
            logits, _ = self.forward(tokens)
            seen.append(logits)
            if int(logits.argmax()) in ends:
                break
            tokens.append(int(logits.argmax()))
        return tokens, seen
