"""What a plan costs: FLOPs of the tree of shared work and of its trials one by one, in a few sums over the questions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cache
from typing import Any

import pandas as pd

from nuwa.cost import LlmShape
from nuwa.decoder import share_beginnings
from nuwa.layout import InterleavedLayout, VisualLayout, layout_order
from nuwa.vlm import Adapter
from pipelines.features.layouts import image_layouts
from pipelines.sweep.tree import work_tree
from pipelines.sweep.trials import Trial

TYPICAL_ANSWERS = {"grounding": "[0.12, 0.34, 0.56, 0.78]", "vqa": "yes"}  # their length forecasts decoding
SPEEDS = {"cpu": 3e10, "cuda": 5e13}  # FLOP/s of one thread, of one GPU; until a sweep has measured its own
SAMPLED = 500  # images whose questions are tokenised for a forecast
STRATA = 12  # layouts that are costed, where images have layouts of their own
RESULT_BYTES = 40  # of an answer, beside the patches it kept


def usual_speed(device: str, threads: int) -> float:
    """FLOP/s of a worker that has not been measured."""
    return SPEEDS[device] * (threads if device == "cpu" else 1)


@dataclass(frozen=True)
class ModelCost:
    """Floating-point operations of a decoder-only language model; a multiplication and an addition are two.

    ``token``: linear maps of one token in one layer. ``pair``: one query on one key in one layer. ``head``: the next
    token's logits. ``projector``: one visual token. ``system``: tokens before the image.
    """

    layers: int
    token: float
    pair: float
    head: float
    projector: float
    system: int

    @classmethod
    def of(cls, config: Any, system: int) -> ModelCost:
        """From the configuration of a model of transformers. Qwen's merger projects inside the encoder."""
        shape, dim = LlmShape.from_config(config), config.text_config.hidden_size
        attention = 2 * dim * shape.head_dim * (shape.heads + shape.kv_heads)
        return cls(
            layers=shape.layers,
            token=2.0 * (attention + shape.ffn_matrices * dim * shape.intermediate),
            pair=4.0 * shape.heads * shape.head_dim,
            head=2.0 * dim * config.text_config.vocab_size,
            projector=2.0 * (config.vision_config.hidden_size + dim) * dim
            if getattr(config, "projector_hidden_act", None)
            else 0.0,
            system=system,
        )


@dataclass(frozen=True)
class Load:
    """Sums over examples that costs are linear in.

    ``text``, ``made``: tokens of the question behind the image, and of its answer, with squares and product.
    ``merged``: text tokens when common beginnings stand once an image, ``merged_depth``: how many of them each sees.
    """

    images: int = 0
    questions: int = 0
    text: int = 0
    text_squared: int = 0
    made: int = 0
    made_squared: int = 0
    text_made: int = 0
    merged: int = 0
    merged_depth: int = 0

    def scaled(self, factor: float) -> Load:
        return Load(*(round(value * factor) for value in astuple(self)))

    @classmethod
    def of(cls, images: Sequence[Sequence[tuple[tuple[int, ...], int]]]) -> Load:
        """From each image's questions as token ids behind the image, and length of answer."""
        lengths = [(len(text), made) for questions in images for text, made in questions]
        depths = [
            place + 1 for questions in images for place in share_beginnings([text for text, _ in questions]).depth
        ]
        return cls(
            images=len(images),
            questions=len(lengths),
            text=sum(text for text, _ in lengths),
            text_squared=sum(text**2 for text, _ in lengths),
            made=sum(made for _, made in lengths),
            made_squared=sum(made**2 for _, made in lengths),
            text_made=sum(text * made for text, made in lengths),
            merged=len(depths),
            merged_depth=sum(depths),
        )


@dataclass(frozen=True)
class Costs:
    """What parts of the tree cost on a load, in FLOPs; trials are those on ``layout``, of which the images are."""

    model: ModelCost
    load: Load
    layout: VisualLayout | None = None
    known: dict[Any, float] = field(default_factory=dict, compare=False, repr=False)  # of trials alike in tokens

    def alone(self, trial: Trial) -> float:
        """A trial that shares nothing: every question its own sequence."""
        return self._once(self._alone, trial)

    def branch(self, trial: Trial) -> float:
        """What a trial adds to its trunk: layers above its first cut, and decoding."""
        return self._once(self._branch, trial)

    def _once(self, cost: Callable[[Trial], float], trial: Trial) -> float:
        key = (cost.__name__, trial.schedule.stage1_keep, trial.cuts, trial.schedule.trimmed)
        if key not in self.known:
            self.known[key] = cost(trial)
        return self.known[key]

    def _alone(self, trial: Trial) -> float:
        return (
            self.load.questions * trial.schedule.stage1_keep * self.model.projector
            + sum(layers * (self._rows(kept) + self._decoding(held)) for layers, kept, held in _runs(trial))
            + self._head()
        )

    def trunk(self, kept: int, layers: int, by_question: bool = False) -> float:
        """The layers that all trials of a trunk share; ``by_question``: whose questions share none of them."""
        model, load, prefix = self.model, self.load, self.model.system + kept
        if by_question:
            return layers * self._rows(kept) + load.questions * kept * model.projector
        once = load.images * (prefix * model.token + prefix * (prefix + 1) / 2 * model.pair)
        text = load.merged * model.token + (prefix * load.merged + load.merged_depth) * model.pair
        return layers * (once + text) + load.images * kept * model.projector

    def _branch(self, trial: Trial) -> float:
        runs = _runs(trial)
        above = sum(layers * self._rows(kept) for layers, kept, _ in runs[1:])
        return above + sum(layers * self._decoding(held) for layers, _, held in runs) + self._head()

    def _rows(self, kept: int) -> float:
        """A layer over questions that stand alone."""
        load, prefix = self.load, self.model.system + kept
        tokens = load.questions * prefix + load.text
        pairs = load.questions * prefix**2 + 2 * prefix * load.text + load.text_squared + tokens
        return tokens * self.model.token + pairs / 2 * self.model.pair

    def _decoding(self, kept: int) -> float:
        load, prefix = self.load, self.model.system + kept
        pairs = prefix * load.made + load.text_made + (load.made_squared + load.made) / 2
        return load.made * self.model.token + pairs * self.model.pair

    def _head(self) -> float:
        return (self.load.made + self.load.questions) * self.model.head


def _runs(trial: Trial) -> list[tuple[int, int, int]]:
    """``(layers, visual tokens, those that answers see)`` of each stretch between cuts."""
    starts = [0, *(layer for layer, _ in trial.cuts), trial.schedule.layers]
    keeps = [trial.schedule.stage1_keep, *(keep for _, keep in trial.cuts)]
    held = [keeps[-1]] * len(keeps) if trial.schedule.trimmed else keeps
    spans = [end - start for start, end in itertools.pairwise(starts)]
    return list(zip(spans, keeps, held, strict=True))


@dataclass(frozen=True)
class Forecast:
    """The tree's size and cost. ``seconds`` is one worker's; ``trunk_flops`` + ``branch_flops`` is with sharing."""

    trials: int
    selections: int
    trunks: int
    forks: int
    answers: int
    alone_flops: float
    trunk_flops: float
    branch_flops: float
    result_bytes: int

    @property
    def shared_flops(self) -> float:
        return self.trunk_flops + self.branch_flops

    @property
    def gain(self) -> float:
        return self.alone_flops / self.shared_flops

    def seconds(self, speed: float) -> float:
        return self.shared_flops / speed


def forecast(trials: Sequence[Trial], costs: Sequence[Costs]) -> Forecast:
    """Count and cost the tree of ``trials`` on the whole load, layout by layout; sizes are of the first layout's tree."""
    parts = [_forecast([trial.on(part.layout) for trial in trials], part) for part in costs]
    sums = ("answers", "alone_flops", "trunk_flops", "branch_flops", "result_bytes")
    return replace(parts[0], **{name: sum(getattr(part, name) for part in parts) for name in sums})


def _forecast(trials: Sequence[Trial], costs: Costs) -> Forecast:
    tree, load = work_tree(trials), costs.load
    trunks = [trunk for positions in tree.values() for trunk in positions.values()]
    kept = sum(trial.final_keep for trial in trials) * load.questions
    chosen = sum(trial.schedule.stage1_keep for trial in trials) * load.images
    return Forecast(
        trials=len(trials),
        selections=len(tree),
        trunks=len(trunks),
        forks=sum(bool(trial.cuts) for trial in trials),
        answers=len(trials) * load.questions,
        alone_flops=sum(map(costs.alone, trials)),
        trunk_flops=sum(
            costs.trunk(trunk[0].schedule.stage1_keep, trunk_depth(trunk), trunk[0].spec.reads_question)
            for trunk in trunks
        ),
        branch_flops=sum(map(costs.branch, trials)),
        result_bytes=RESULT_BYTES * len(trials) * load.questions + 2 * kept + 3 * chosen,
    )


def trunk_depth(trials: Sequence[Trial]) -> int:
    """How many layers the trunk of ``trials``, in the tree's order, must pass."""
    return min(trials[-1].first_cut, trials[-1].schedule.layers)


def sweep_costs(vlm: Adapter, table: pd.DataFrame) -> list[Costs]:
    """Costs on the questions of ``table``; ``vlm`` needs no weights.

    Beyond ``SAMPLED`` images a sample stands for all, and beyond ``STRATA`` layouts images of like size for each other.
    """
    tokenizer = vlm.processor.tokenizer
    made = {
        family: len(tokenizer(answer, add_special_tokens=False).input_ids) for family, answer in TYPICAL_ANSWERS.items()
    }
    model = ModelCost.of(vlm.model.config, len(vlm.encode_prompt("?").before))

    layouts = image_layouts(vlm, table)
    names = sorted(table["image"].unique())
    sampled = table[table["image"].isin(names[:: -(-len(names) // SAMPLED)])]
    images = [(layouts[image], questions) for image, questions in sampled.groupby("image")]
    images.sort(key=lambda image: layout_order(image[0]))
    factor = len(table) / len(sampled)

    words = cache(lambda prompt: vlm.encode_prompt(prompt).after)  # many images are asked the same
    costs = []
    for part in _strata([layout for layout, _ in images]):
        sample = [
            [
                (words(prompt), min(made[family], limit))
                for prompt, family, limit in zip(
                    *(questions[name].tolist() for name in ("prompt", "family", "max_new_tokens")), strict=True
                )
            ]
            for _, questions in images[part]
        ]
        middle, _ = images[(part.start + part.stop - 1) // 2]
        between = sum(middle.between) if isinstance(middle, InterleavedLayout) else 0
        costs.append(Costs(replace(model, system=model.system + between), Load.of(sample).scaled(factor), middle))
    return costs


def _strata(layouts: Sequence[VisualLayout]) -> list[slice]:
    """Stretches of sorted layouts: one a layout, or ``STRATA`` of like length where there are more."""
    starts = [place for place, layout in enumerate(layouts) if not place or layout != layouts[place - 1]]
    if len(starts) > STRATA:
        starts = sorted({place * len(layouts) // STRATA for place in range(STRATA)})
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(layouts)], strict=True)]
