"""What the language model is taught: many questions in one sequence behind one image.

All questions of an image share its prefix: a block mask lets each see the image and itself only, and position ids
restart after the image. That equals asking them one by one and costs little more than asking once.
Two auxiliary losses give attention something to match: projected patches are classified against the model's own
word embeddings (as CLIP aligns patches and words), and patches inside the language model tell their object's box.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from nuwa.testbed.architecture import (
    ANSWER_LAYERS,
    GRID,
    LINK_LAYERS,
    MATCHING_HEADS,
    WORD_LAYERS,
    encode_shifted,
)
from nuwa.testbed.language import COORDINATES, DIGITS, IMAGE_TOKENS, format_box
from nuwa.testbed.questions import GENERATORS, Question
from nuwa.testbed.scenes import COLOR_NAMES, IMAGE_SIZE, Scene, draw_scene
from nuwa.testbed.vision import normalize, object_patches, patch_labels

TASK_WEIGHTS = {"refcoco": 0.2, "refcocoplus": 0.13, "refcocog": 0.17, "pope": 0.13, "gqa": 0.22, "textvqa": 0.15}
QUESTIONS_PER_IMAGE = 12
PREFIX = "USER: <image>\n"
GROUNDING_PROMPT = "locate {text}"
SUFFIX = " ASSISTANT:"
COORDINATE_SOFTNESS = 1.2  # bins
ALIGNMENT_SCALE = 10.0
PLACE_LAYER = 4
# Matching a word with a patch is what takes longest to find alone, so some heads are shown where to look: a colour or
# digit word at the patches that show it, an answer at those words of its question, and an answer at its evidence (from
# this share of the phase on: before, there is nothing in the patches to match).
ANSWER_FOCUS_FROM = 0.27
FOCUS_WEIGHT = 0.5
# Brackets, commas and end tokens outnumber the words that carry an answer; they must not drown their gradient.
STRUCTURE_WEIGHT = 0.1
# A language model has met text at every position; this one would only ever see questions at one. So a share of the
# training questions starts at a random position, down to where it would stand behind a handful of image tokens.
ROAMING_SHARE = 0.5
ROAMING_RANGE = (8 - IMAGE_TOKENS, 16)
# Large models look at an object through far more tokens than they need; this one is taught to: from this share of the
# phase on, half of the images lose a random part of their patches. The others keep their position ids.
DROPOUT_FROM = 0.6
DROPOUT_SHARE = 0.5
DROPOUT_KEEPS = (0.2, 1.0)  # of an image's patches
# (share of the phase done, most objects in a scene)
CURRICULUM = ((0.0, 2), (0.10, 3), (0.28, 4), (0.45, 5))
IGNORE = -100
DROPPED = -2  # block of a patch that nothing else sees


def question_words(question: Question) -> tuple[str, str]:
    """What is asked about an image, without any chat template, and the answer's text."""
    if question.target is None:
        return question.text, str(question.answer)
    return GROUNDING_PROMPT.format(text=question.text), format_box(question.target.bbox, IMAGE_SIZE, IMAGE_SIZE)


@dataclass(frozen=True)
class Packed:
    """One image with its questions: prefix (block 0) and one block a question, all right-padded with block -1."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    blocks: np.ndarray
    labels: np.ndarray  # the next token where it is part of an answer, else IGNORE


def pack(
    tokenizer: PreTrainedTokenizerFast, questions: list[Question], roam: np.random.Generator | None = None
) -> Packed:
    """Lay out one image and its ``questions``; with ``roam`` some questions start at random position ids."""
    prefix = tokenizer(PREFIX).input_ids
    at = prefix.index(tokenizer.convert_tokens_to_ids("<image>"))
    prefix = prefix[:at] + [prefix[at]] * IMAGE_TOKENS + prefix[at + 1 :]
    turns = []
    for words, answer in map(question_words, questions):
        asked_ids = tokenizer(words + SUFFIX, add_special_tokens=False).input_ids
        turns.append((asked_ids, [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
    return lay_out(prefix, turns, roam)


def lay_out(
    prefix: list[int], turns: list[tuple[list[int], list[int]]], roam: np.random.Generator | None = None
) -> Packed:
    """One block a turn ``(asked ids, answer ids)`` behind ``prefix``; position ids of each go on from the prefix."""
    ids, positions, blocks = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    labels = [IGNORE] * len(prefix)
    for block, (asked_ids, answer_ids) in enumerate(turns, start=1):
        ids += asked_ids + answer_ids
        start = len(prefix)
        if roam is not None and roam.random() < ROAMING_SHARE:
            start += int(roam.integers(*ROAMING_RANGE, endpoint=True))
        positions += range(start, start + len(asked_ids) + len(answer_ids))
        blocks += [block] * (len(asked_ids) + len(answer_ids))
        labels += [IGNORE] * (len(asked_ids) - 1) + answer_ids + [IGNORE]
    return Packed(*(np.asarray(column) for column in (ids, positions, blocks, labels)))


def collate(packed: list[Packed], pad: int) -> dict[str, Tensor]:
    length = max(len(item.input_ids) for item in packed)

    def stack(name: str, fill: int) -> Tensor:
        rows = [np.pad(getattr(item, name), (0, length - len(item.input_ids)), constant_values=fill) for item in packed]
        return torch.from_numpy(np.stack(rows))

    return {
        "input_ids": stack("input_ids", pad),
        "position_ids": stack("position_ids", 0),
        "blocks": stack("blocks", -1),
        "labels": stack("labels", IGNORE),
    }


def block_mask(blocks: Tensor) -> Tensor:
    """``(batch, length)`` block numbers → boolean ``(batch, 1, length, length)``, True where a query may look."""
    order = torch.arange(blocks.shape[1], device=blocks.device)
    same = blocks[:, :, None] == blocks[:, None, :]
    prefix = (blocks == 0)[:, None, :] & (blocks >= 0)[:, :, None]
    return ((same | prefix) & (order[None, :] <= order[:, None])[None])[:, None]


def draw_questions(rng: np.random.Generator, scene: Scene, count: int) -> list[Question]:
    tasks, weights = list(TASK_WEIGHTS), np.asarray(list(TASK_WEIGHTS.values()))
    questions: list[Question] = []
    while len(questions) < count:
        question = GENERATORS[tasks[rng.choice(len(tasks), p=weights / weights.sum())]](rng, scene.objects)
        if question is not None:
            questions.append(question)
    return questions


def evidence_patches(questions: list[Question]) -> np.ndarray:
    """``(questions, tokens)`` bool: the patches of each question's evidence, all False where it has none."""
    nothing = np.zeros(IMAGE_TOKENS, dtype=bool)
    return np.stack([sum((object_patches(item) for item in question.evidence), nothing) for question in questions])


def draw_language_batch(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, size: int, progress: float, split: str = "train"
) -> dict[str, Tensor]:
    most = max(limit for start, limit in CURRICULUM if progress >= start)
    scenes = [draw_scene(rng, split, 2, most) for _ in range(size)]
    by_scene = [draw_questions(rng, scene, QUESTIONS_PER_IMAGE) for scene in scenes]
    packed = [pack(tokenizer, questions, roam=rng) for questions in by_scene]
    labels = patch_labels([scene.objects for scene in scenes])
    columns = collate(packed, tokenizer.pad_token_id)

    if progress >= DROPOUT_FROM:
        drop_patches(rng, columns, tokenizer.convert_tokens_to_ids("<image>"))
    return {
        **columns,
        "pixels": normalize(np.stack([scene.image for scene in scenes])),
        "shifts": torch.from_numpy(rng.integers(0, GRID, size=(size, 2))),
        "digit": labels.digit,
        "color": labels.color,
        "box": labels.box / IMAGE_SIZE,
        "evidence": torch.from_numpy(np.stack([evidence_patches(questions) for questions in by_scene])),
        "focus": torch.full((size,), float(progress >= ANSWER_FOCUS_FROM)),
    }


def drop_patches(rng: np.random.Generator, batch: dict[str, Tensor], image_id: int) -> None:
    """Hide a random part of the patches of ``DROPOUT_SHARE`` of the images from all other tokens, in place."""
    first = int((batch["input_ids"][0] == image_id).nonzero()[0])
    for blocks in batch["blocks"]:
        if rng.random() < DROPOUT_SHARE:
            hidden = rng.random(IMAGE_TOKENS) >= rng.uniform(*DROPOUT_KEEPS)
            blocks[first : first + IMAGE_TOKENS][torch.from_numpy(hidden)] = DROPPED


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(..., head_dim)`` in the half-split layout of Llama."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat([-second, first], dim=-1) * sin


class InstructionLearner(nn.Module):
    """The language phase: projector and language model learn, the vision tower is frozen."""

    digit_ids: Tensor
    color_ids: Tensor
    coordinate_ids: Tensor
    structure_ids: Tensor

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, compile_layers: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        if compile_layers:  # in place: parameter names stay, so checkpoints do not depend on it
            for layer in model.model.language_model.layers:
                layer.compile(dynamic=True)
        self.place = nn.Linear(model.config.text_config.hidden_size, 4)
        model.model.vision_tower.requires_grad_(False)

        def ids(words: tuple[str, ...]) -> Tensor:
            return torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))

        self.register_buffer("digit_ids", ids(DIGITS), persistent=False)
        self.register_buffer("color_ids", ids(COLOR_NAMES), persistent=False)
        self.register_buffer("coordinate_ids", ids(COORDINATES), persistent=False)
        structure = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["[", "]", ","])]
        self.register_buffer("structure_ids", torch.tensor(structure), persistent=False)
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        """Logits at labelled places ``(labelled, vocabulary)``, projected patches, patches after ``PLACE_LAYER``, and
        what enters the focus layers."""
        llava = self.model.model
        with torch.no_grad():
            features, _ = encode_shifted(llava.vision_tower, batch["pixels"], batch["shifts"])
        projected = llava.multi_modal_projector(features)
        embeds = llava.language_model.embed_tokens(batch["input_ids"])
        is_image = batch["input_ids"] == self.image_id
        embeds = embeds.masked_scatter(is_image[..., None], projected.to(embeds.dtype))
        language = llava.language_model
        mask = block_mask(batch["blocks"])
        rotary = language.rotary_emb(embeds, position_ids=batch["position_ids"])
        hidden = inside = embeds
        entering: dict[int, Tensor] = {}

        for depth, layer in enumerate(language.layers, start=1):
            if depth - 1 in (*WORD_LAYERS, *LINK_LAYERS, *ANSWER_LAYERS):
                entering[depth - 1] = hidden
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            if depth == PLACE_LAYER:
                inside = hidden[is_image].view(len(hidden), IMAGE_TOKENS, -1)
        answered = batch["labels"] != IGNORE
        return self.model.lm_head(language.norm(hidden[answered])), projected, inside, entering

    def answer_focus(self, batch: dict[str, Tensor], entering: dict[int, Tensor]) -> Tensor:
        """Attention loss of answers (from the token before the first answer token on) on their evidence."""
        rows, columns = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        evidence = batch["evidence"][rows, batch["blocks"][rows, columns] - 1]
        return self._patch_focus(batch, entering, ANSWER_LAYERS, rows, columns, evidence)

    def word_focus(self, batch: dict[str, Tensor], entering: dict[int, Tensor]) -> Tensor:
        """Attention loss of a question's colour and digit words on the patches that show them."""
        losses = []
        for words, shown in ((self.color_ids, batch["color"]), (self.digit_ids, batch["digit"])):
            which = (batch["input_ids"][..., None] == words) & ~self._answers(batch)[..., None]
            rows, columns, word = which.nonzero(as_tuple=True)
            losses.append(self._patch_focus(batch, entering, WORD_LAYERS, rows, columns, shown[rows] == word[:, None]))
        return torch.stack(losses).mean()

    def link_focus(self, batch: dict[str, Tensor], entering: dict[int, Tensor]) -> Tensor:
        """Attention loss of answers on the colour and digit words of their question, among all they can see."""
        ids, blocks = batch["input_ids"], batch["blocks"]
        rows, columns = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        words = torch.isin(ids, torch.cat([self.color_ids, self.digit_ids])) & ~self._answers(batch)
        same = blocks[rows] == blocks[rows, columns][:, None]
        order = torch.arange(ids.shape[1], device=ids.device)
        seen = (same | (blocks[rows] == 0)) & (order <= columns[:, None])
        everything = torch.ones_like(ids, dtype=torch.bool)
        shown = words[rows] & same & seen
        return self._focus(batch, entering, LINK_LAYERS, rows, columns, keys=everything, seen=seen, evidence=shown)

    @staticmethod
    def _answers(batch: dict[str, Tensor]) -> Tensor:
        """``(batch, length)`` bool: tokens that are part of an answer."""
        return F.pad(batch["labels"][:, :-1] != IGNORE, (1, 0))

    def _patch_focus(
        self,
        batch: dict[str, Tensor],
        entering: dict[int, Tensor],
        layers: tuple[int, ...],
        rows: Tensor,
        columns: Tensor,
        evidence: Tensor,
    ) -> Tensor:
        image = batch["input_ids"] == self.image_id
        everything = torch.ones_like(evidence)
        return self._focus(batch, entering, layers, rows, columns, keys=image, seen=everything, evidence=evidence)

    def _focus(
        self,
        batch: dict[str, Tensor],
        entering: dict[int, Tensor],
        layers: tuple[int, ...],
        rows: Tensor,
        columns: Tensor,
        *,
        keys: Tensor,
        seen: Tensor,
        evidence: Tensor,
    ) -> Tensor:
        """Mean of ``-log`` of the attention that the matching heads give to ``evidence`` among what is ``seen``.

        Queries are the tokens ``(rows, columns)``; ``keys`` ``(batch, length)`` picks the same number of tokens in
        every row; ``seen`` and ``evidence`` ``(queries, keys)`` speak of those. Queries without evidence do not count.
        """
        language = self.model.model.language_model
        known = evidence.any(dim=-1)
        rows, columns, seen, evidence = rows[known], columns[known], seen[known], evidence[known]
        counts = torch.bincount(rows, minlength=len(keys))
        slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        losses = []
        for number in layers:
            hidden, layer = entering[number], language.layers[number]
            attention = layer.self_attn
            width = MATCHING_HEADS * attention.head_dim
            normed = layer.input_layernorm(hidden)
            cos, sin = language.rotary_emb(hidden, position_ids=batch["position_ids"])
            query = F.linear(normed[rows, columns], attention.q_proj.weight[:width]).unflatten(-1, (MATCHING_HEADS, -1))
            key = F.linear(normed[keys], attention.k_proj.weight[:width]).unflatten(-1, (MATCHING_HEADS, -1))
            query = rotate(query, cos[rows, columns][:, None], sin[rows, columns][:, None])
            key = rotate(key, cos[keys][:, None], sin[keys][:, None])
            key = key.view(len(hidden), -1, MATCHING_HEADS, attention.head_dim)
            # One padded product an image: gathering the keys of every query would copy them hundreds of times.
            padded = query.new_zeros(len(hidden), int(slots.max()) + 1, *query.shape[1:])
            padded = padded.index_put((rows, slots), query)
            scores = torch.einsum("bnhd,bthd->bnht", padded, key)[rows, slots] * attention.scaling
            shares = scores.masked_fill(~seen[:, None], -torch.inf).log_softmax(dim=-1)
            losses.append(-shares.masked_fill(~evidence[:, None], -torch.inf).logsumexp(dim=-1).mean())
        return torch.stack(losses).mean()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, projected, inside, entering = self.logits(batch)
        target = batch["labels"][batch["labels"] != IGNORE]
        is_coordinate = (target >= self.coordinate_ids[0]) & (target <= self.coordinate_ids[-1])
        is_structure = torch.isin(target, self.structure_ids)
        is_word = ~is_coordinate & ~is_structure
        bins = torch.arange(len(COORDINATES), device=target.device)
        distance = (bins[None] - (target[is_coordinate] - self.coordinate_ids[0])[:, None]).abs()
        soft = (-distance / COORDINATE_SOFTNESS).softmax(dim=-1)
        coordinate_logits = logits[is_coordinate].log_softmax(dim=-1)[:, self.coordinate_ids]
        seen = batch["digit"] >= 0
        words = self.model.model.language_model.embed_tokens.weight
        patches = ALIGNMENT_SCALE * F.normalize(projected[seen], dim=-1)

        def align(ids: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(patches @ F.normalize(words[ids], dim=-1).T, labels[seen])

        return {
            "words": F.cross_entropy(logits[is_word], target[is_word]),
            "structure": STRUCTURE_WEIGHT * F.cross_entropy(logits[is_structure], target[is_structure]),
            "box": -(soft * coordinate_logits).sum(-1).mean(),
            "align": 0.3 * (align(self.digit_ids, batch["digit"]) + align(self.color_ids, batch["color"])),
            "answer_focus": FOCUS_WEIGHT * batch["focus"].mean() * self.answer_focus(batch, entering),
            "link_focus": FOCUS_WEIGHT * self.link_focus(batch, entering),
            "word_focus": FOCUS_WEIGHT * self.word_focus(batch, entering),
            "place": 4.0 * F.l1_loss(self.place(inside[seen]), batch["box"][seen]),
        }


def _keep_patches(batch: dict[str, Tensor], kept: Tensor, compress: bool, image_id: int) -> dict[str, Tensor]:
    """Hide all but ``kept`` patches (indices) from every query; ``compress`` renumbers the kept ids (PERC)."""
    batch = dict(batch)
    first = int((batch["input_ids"][0] == image_id).nonzero()[0])
    hidden = torch.ones(IMAGE_TOKENS, dtype=torch.bool)
    hidden[kept] = False
    blocks, positions = batch["blocks"].clone(), batch["position_ids"].clone()
    blocks[:, first : first + IMAGE_TOKENS][:, hidden] = DROPPED
    if compress:
        positions[:, first + kept] = first + torch.arange(len(kept))
        after = torch.arange(positions.shape[1]) >= first + IMAGE_TOKENS
        positions[:, after] -= IMAGE_TOKENS - len(kept)
    batch["blocks"], batch["position_ids"] = blocks, positions
    return batch


@torch.no_grad()
def evaluate_language(
    learner: InstructionLearner, tokenizer: PreTrainedTokenizerFast, images: int = 128
) -> dict[str, float]:
    """Teacher-forced accuracy per task on validation handwriting, unshifted, and the gap between kept and renumbered
    ids with a random third of the patches (Acc@0.5 of boxes; this gap is the testbed's reason to be)."""
    rng = np.random.default_rng(11)
    scenes = [draw_scene(rng, "validation") for _ in range(images)]
    questions = [draw_questions(rng, scene, QUESTIONS_PER_IMAGE) for scene in scenes]
    batch = collate([pack(tokenizer, about_scene) for about_scene in questions], tokenizer.pad_token_id)
    batch["pixels"] = normalize(np.stack([scene.image for scene in scenes]))
    batch["shifts"] = torch.zeros(images, 2, dtype=torch.long)
    device = learner.place.weight.device
    kept = torch.from_numpy(np.sort(rng.choice(IMAGE_TOKENS, size=IMAGE_TOKENS // 3, replace=False)))
    variants = {
        "": batch,
        "third_original/": _keep_patches(batch, kept, False, learner.image_id),
        "third_renumbered/": _keep_patches(batch, kept, True, learner.image_id),
    }
    metrics: dict[str, float] = {}

    for prefix, variant in variants.items():
        right = _right_answers(learner, variant, questions, device)
        for task in TASK_WEIGHTS:
            scores = [
                r
                for question, r in zip(itertools.chain.from_iterable(questions), right, strict=True)
                if question.task == task
            ]
            metrics[prefix + task] = float(np.mean(scores))
    return metrics


def _right_answers(
    learner: InstructionLearner, batch: dict[str, Tensor], questions: list[list[Question]], device: torch.device
) -> list[float]:
    """One score a question, in order: all answer tokens right, or IoU of the coordinates at least 0.5."""
    guesses = torch.cat(
        [
            learner.logits({name: value[i : i + 32].to(device) for name, value in batch.items()})[0].argmax(-1).cpu()
            for i in range(0, len(questions), 32)
        ]
    )
    targets = batch["labels"][batch["labels"] != IGNORE]
    block_of = torch.stack([torch.arange(len(questions))[:, None].expand_as(batch["blocks"]), batch["blocks"]], -1)[
        batch["labels"] != IGNORE
    ]
    scores, first = [], int(learner.coordinate_ids[0])

    for row, about_scene in enumerate(questions):
        for block, question in enumerate(about_scene, start=1):
            in_block = (block_of == torch.tensor([row, block])).all(-1)
            guess, target = guesses[in_block], targets[in_block]
            if question.target is None:
                scores.append(float((guess == target).all()))
                continue
            is_coordinate = (target >= first) & (target < first + len(COORDINATES))
            a, b = (((ids[is_coordinate] - first) / 100).tolist() for ids in (guess, target))
            overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
            scores.append(float(union > 0 and overlap / union >= 0.5))
    return scores
