"""Pruning as blocked attention: a stock model over the whole, unpruned sequence, one question, no cache.

A token that is dropped from layer ``l`` on stays in the sequence, and from layer ``l`` on nobody else may attend to
it. A recycled token is its cluster's centre, whose hidden state is exchanged for the cluster's mean before layer ``l``.
Nothing of a schedule's bookkeeping is left: no gathering, no cut rows, no caches, no shared prefixes.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracles import recycling, scorers
from oracles.pictures import best_first


def eager_copy(model):
    """An own copy of a model whose layers return their attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin.eval()


def axis_ids(ids: list[int], strategy: str, last: int) -> list[int]:
    """Kept ids of one axis, counted from the image's first, under PERC, PESP and RPME; ``last`` is its largest."""
    distinct = sorted(set(ids))
    if strategy == "perc":
        return [distinct.index(value) for value in ids]
    if strategy == "pesp":
        return ids
    return [0 if value == distinct[0] else math.ceil(Fraction(value * last, max(distinct[-1], 1))) for value in ids]


PICTURES = ("image_sizes", "image_grid_thw", "batch_num_images")  # what says how images lie, beside their pixels


def between_ends(prompt: list[int], tokenizer) -> tuple[list[int], list[int]]:
    """SmolVLM: where an image's tokens and the names of its tiles stand, and which image each is of.

    An image begins behind the first ``<fake_token_around_image>``, and ends before the one behind the tile of the whole.
    """
    around, whole, image = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>", "<image>"])
    places, owners, inside, last, number = [], [], False, False, -1
    for at, token in enumerate(prompt):
        if token == around and not inside:
            inside, last, number = True, False, number + 1
        elif token == around and last and prompt[at - 1] == image:
            inside = False
        elif inside:
            last = last or token == whole
            places.append(at)
            owners.append(number)
    return places, owners


class MaskedModel:
    """One question about one image, or a conversation about several.

    ``alive``: visual tokens that may be attended to, one sorted list a layer. A visual token is named by its place among
    all of the images': patches, newline tokens where there are any, and of SmolVLM the texts that name its tiles. ``images``: one or a list; ``question``: a text,
    or the messages. ``merged``: language embeddings ``(kept, dim)`` in the place of the kept tokens' own.
    """

    @torch.inference_mode()
    def __init__(
        self, model, processor, images, question, kept: list[int], strategy: str = "pesp", merged=None
    ) -> None:
        messages = question
        if isinstance(question, str):
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = images if isinstance(images, list) else [images]
        inputs = processor(images=[images], text=[prompt], return_tensors="pt")
        self.model, self.strategy = model, strategy
        self.language = getattr(model.model, "text_model", None) or model.model.language_model
        self.alive = [list(kept) for _ in self.language.layers]
        self.exchanged: list[dict[int, np.ndarray]] = [{} for _ in self.language.layers]  # patch → hidden state
        self.entering: dict[int, Tensor] = {}  # hidden states entering every layer in the last forward pass
        self.prompt = inputs.input_ids[0].tolist()
        self.visual = [at for at, token in enumerate(self.prompt) if token == model.config.image_token_id]
        named = model.config.model_type in ("smolvlm", "idefics3")
        if named:
            self.visual, pieces = between_ends(self.prompt, processor.tokenizer)
        self.text = list(range(self.visual[-1] + 1, len(self.prompt)))
        pictures = {
            name: inputs[name] for name in ("image_sizes", "image_grid_thw", "batch_num_images") if name in inputs
        }
        encoded = model.model.get_image_features(inputs["pixel_values"], **pictures)
        # What enters the first layer, and what is added behind the first, second ...: Qwen3-VL.
        deep = [torch.cat(list(part)) for part in getattr(encoded, "deepstack_features", None) or ()]
        visible = list(encoded.pooler_output)
        self.image_of = [number for number, tokens in enumerate(visible) for _ in tokens]
        if model.config.model_type == "internvl":  # told by tiles; the tokens of an image stand in one piece
            breaks = [after - before > 1 for before, after in itertools.pairwise(self.visual)]
            self.image_of = list(itertools.accumulate(breaks, initial=0))
        if named:
            self.image_of = pieces
            words = self.language.embed_tokens(inputs.input_ids[0, self.visual])
            encoded_here = torch.tensor([self.prompt[at] == model.config.image_token_id for at in self.visual])
            words[encoded_here] = torch.cat(visible)
            visible = [words]
        self.tokens = torch.cat([torch.cat(visible), *deep], dim=-1)
        if merged is not None:
            self.tokens[kept] = merged
        self.projected, *self.deep = self.tokens.chunk(1 + len(deep), dim=-1)
        if "image_grid_thw" in inputs:
            named = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw")}
            self.stock_ids = model.model.get_rope_index(inputs.input_ids, **named)[0][:, 0].tolist()
        else:
            self.stock_ids = [list(range(len(self.prompt)))]

    def embeddings(self, answer: list[int]) -> Tensor:
        """``(1, n, dim)``: words are embedded, whatever they are, and patches projected."""
        embedded = self.language.embed_tokens(torch.tensor([[*self.prompt, *answer]]))
        embedded[0, self.visual] = self.projected
        return embedded

    def mask(self, layer: int, length: int) -> Tensor:
        """Additive ``(1, 1, n, n)``: causal, within the layer's window, and -inf towards dropped patches from all others."""
        dropped = [self.visual[patch] for patch in set(range(len(self.visual))).difference(self.alive[layer])]
        mask = torch.full((length, length), -torch.inf).triu(1)
        window = self.window(layer)
        if window is not None:
            mask += torch.full((length, length), -torch.inf).tril(-window)
        mask[:, dropped] = -torch.inf
        mask.fill_diagonal_(0)
        return mask[None, None]

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a token of this layer sees; stock attention modules say so themselves."""
        config = self.language.config
        kinds = getattr(config, "layer_types", None)
        if config.model_type in ("mistral", "phi3"):
            return config.sliding_window
        return config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    def positions(self, layer: int, length: int) -> list[list[int]]:
        """Position ids of every axis; dropped tokens, whom nobody sees, get zeros."""
        axes = [[0] * length for _ in self.stock_ids]
        column, position = 0, 0
        for number in range(self.image_of[-1] + 1):
            tokens = [token for token, image in enumerate(self.image_of) if image == number]
            kept = [token for token in self.alive[layer] if self.image_of[token] == number]
            first, behind = self.visual[tokens[0]], self.visual[tokens[-1]] + 1
            start, taken = position + first - column, [-1]  # nothing may be left
            for ids, stock in zip(axes, self.stock_ids, strict=True):
                ids[column:first] = range(position, start)
                original = {token: stock[self.visual[token]] - stock[first] for token in tokens}
                renewed = axis_ids([original[token] for token in kept], self.strategy, max(original.values()))
                for token, place in zip(kept, renewed, strict=True):
                    ids[self.visual[token]] = start + place
                taken += renewed if self.strategy == "perc" else original.values()
            column, position = behind, start + max(taken) + 1
        for ids in axes:
            ids[column:] = range(position, position + length - column)
        return axes

    def position_tensor(self, axes: list[list[int]]) -> Tensor:
        """As the model's rotary embedding takes them: ``(1, n)``, or ``(3, 1, n)`` for M-RoPE."""
        return torch.tensor(axes) if len(axes) == 1 else torch.tensor(axes)[:, None]

    @torch.inference_mode()
    def forward(self, answer: list[int], attentions: bool = False) -> tuple[Tensor, list[np.ndarray]]:
        """Logits after prompt and ``answer``, ``(vocabulary,)``, and every layer's attention ``(heads, n, n)``."""
        out = self._run(answer, attentions)
        return out.logits[0, -1], [attention[0].numpy() for attention in out.attentions or ()]

    @torch.inference_mode()
    def steps(self, answer: list[int]) -> Tensor:
        """Logits after the prompt and after every token of ``answer``, ``(1 + tokens, vocabulary)``."""
        return self._run(answer, False).logits[0, len(self.prompt) - 1 :]

    def _run(self, answer: list[int], attentions: bool):
        embedded = self.embeddings(answer)
        alike: dict[Any, Any] = {}  # what layers where the same is alive, and as far seen, have in common
        hooks = [
            layer.register_forward_pre_hook(self._blocking(number, embedded.shape[1], alike), with_kwargs=True)
            for number, layer in enumerate(self.language.layers)
        ]
        hooks += [
            layer.register_forward_hook(self._adding(part))
            for layer, part in zip(self.language.layers, self.deep, strict=False)
        ]
        try:
            stock = list(map(list, self.stock_ids))
            for ids in stock:  # the answer goes on counting
                ids += range(ids[-1] + 1, ids[-1] + 1 + len(answer))
            return self.model(
                inputs_embeds=embedded,
                position_ids=self.position_tensor(stock),
                use_cache=False,
                output_attentions=attentions,
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _adding(self, part: Tensor):
        def add(_module, _arguments, out):
            out = out.clone()
            out[0, self.visual] += part
            return out

        return add

    def _blocking(self, number: int, length: int, alike: dict[Any, Any]):
        level = tuple(self.alive[number]), self.window(number)
        if level not in alike:
            alike[level] = self.mask(number, length)
        mask = alike[level]

        def block(_module, arguments, named):
            named = {**named, "attention_mask": mask}
            hidden = arguments[0].clone()
            for patch, state in self.exchanged[number].items():
                hidden[0, self.visual[patch]] = torch.from_numpy(state).to(hidden)
            self.entering[number], arguments = hidden, (hidden, *arguments[1:])
            if self.strategy != "pesp":  # PESP's ids are the stock model's own
                if level[0] not in alike:
                    ids = self.position_tensor(self.positions(number, length))
                    alike[level[0]] = self.language.rotary_emb(arguments[0], position_ids=ids)
                named["position_embeddings"] = alike[level[0]]
            return arguments, named

        return block

    def scores(self, layer: int, scorer: str) -> list[float]:
        """Scores of the visual tokens alive before ``layer``, from the attention of the layer before it."""
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
        others = {"attention_all_text": scorers.all_text, "attention_last_three": scorers.last_three}
        score = others.get(scorer, scorers.last_token)
        return score(attention, columns, self.text)

    def cut(self, layer: int, keep: int, scores: list[float]) -> list[int]:
        """From ``layer`` on only the ``keep`` best of the patches alive before it may be seen."""
        alive = self.alive[layer - 1]
        chosen = sorted(alive[at] for at in best_first(scores)[:keep])
        for number in range(layer, len(self.alive)):
            self.alive[number] = chosen
        return chosen

    def cut_and_recycle(self, layer: int, keep: int, scores: list[float], noise: np.ndarray) -> list[int]:
        """The same, with some of the ``keep`` tokens made of what is dropped."""
        alive = self.alive[layer - 1]
        self.forward([])
        hidden = self.entering[layer][0, [self.visual[patch] for patch in alive]].numpy()
        selected, means = recycling.recycle(hidden, scores, keep, noise)
        chosen = sorted(alive[at] for at in (*selected, *means))
        for number in range(layer, len(self.alive)):
            self.alive[number] = chosen
        self.exchanged[layer] = {alive[at]: mean for at, mean in means.items()}
        return chosen

    def answer(self, limit: int, ends: tuple[int, ...], expected: Sequence[int] = ()) -> tuple[list[int], list[Tensor]]:
        """Greedy tokens without the end token, and the logits of every step.

        ``expected``: what the answer may be. No token sees a later one, so one pass over all of it gives the logits of
        every step as far as it is right; from the first token that is not, the answer goes on by itself.
        """
        tokens: list[int] = []
        seen: list[Tensor] = []
        while True:
            right = list(expected[: len(tokens)]) == tokens
            assumed = list(expected[: limit - 1]) if right else list(tokens)
            for logits in self.steps(assumed)[len(tokens) :]:
                seen.append(logits)
                if int(logits.argmax()) in ends:
                    return tokens, seen
                tokens.append(int(logits.argmax()))
                if len(tokens) == limit:
                    return tokens, seen
                if tokens != assumed[: len(tokens)]:
                    break
