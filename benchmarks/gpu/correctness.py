"""Part (a): is it right on the device?

The committed testbed model answers on the CPU in float32, and on the device in three dtypes: unpruned, under every
method, every scorer of stage 2 and every position strategy. Float32 (TF32 off) must say what the CPU says but for
:data:`MAY_DIFFER`; how much half precision says otherwise is told. Tiny random models of the three families must say
what stock ``generate`` says on the same device, and under Nüwa what they say on the CPU. No tensor of numbers may stay
behind on the CPU.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import families
from benchmarks.gpu.decoding import answer_from, held_tensors, open_trunk
from benchmarks.gpu.results import Result
from benchmarks.gpu.scenes import PinnedScenes, read_scenes
from benchmarks.gpu.session import Piece, Session
from nuwa import UNPRUNED
from nuwa.generation import Generation, ImageBatch, answer_encoded, plan, select
from nuwa.methods import RECIPES, MethodSpec, specify
from nuwa.positions import STRATEGIES
from nuwa.signals import OPTIONAL_SIGNALS
from nuwa.stage1.learnpruner import read_lpm, save_lpm
from nuwa.stage2 import SCORERS
from nuwa.vlm import Adapter, EncodedImage, LlavaAdapter, adapt, load_adapter

ROOT = Path(__file__).parents[2]
TESTBED, LEARNED = ROOT / "models/testbed", ROOT / "models/pruner/lpm.safetensors"
MAY_DIFFER = 0.005  # of all float32 answers: near ties that another order of summation decides otherwise
MAY_DIFFER_ALONE = 0.02  # of those under one method
BUDGET = 48  # average tokens of 144
# IVC-Prune's cut stands in the middle of the testbed's 8 layers, so that half of all tokens is its least.
OWN_BUDGETS = {"ivc_prune": 96}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES: dict[str, Callable[[], Adapter]] = {
    "llava": families.tiny_llava,
    "llava_next": families.tiny_next,
    "qwen2_5_vl": families.tiny_qwen,
}
WORDS = ["what is on the left ?", "how many red", "where is a dog near the blue sign on the right ?"]
TESTBED_WORDS = ["what digit is blue?", "locate the red 3 on the left", "how many digits are there?"]

Answers = dict[str, list[Generation]]  # by configuration


def pieces(session: Session) -> Iterator[Piece]:
    references: dict[str, Answers] = {}
    scenes = read_scenes(session.scale.scenes, session.scale.questions)

    def reference() -> Iterator[Result]:
        references["cpu"] = answer_all("cpu", torch.float32, scenes, session.scale.answer_tokens)
        figures = {"questions": scenes.count, "configurations": len(references["cpu"])}
        yield Result("a", "the CPU's answers", "measured", figures)

    yield Piece("the CPU's answers", 30, reference, checks=True)
    for name in DTYPES:
        compare = partial(_compare_dtype, session, scenes, name, references)
        yield Piece(f"testbed in {name}", 15, compare, checks=name == "float32")
    for name in FAMILIES:
        yield Piece(f"{name} like stock generate", 4, partial(_compare_family, session, name), checks=True)
    yield Piece("placement", 3, partial(_placement, session, scenes), checks=True)


def configurations(weights: Path = LEARNED) -> dict[str, MethodSpec]:
    """Unpruned, every method with its own stage 2, Nüwa with every scorer, and with every position strategy.

    CDPruner by diversity alone: the testbed's encoder has no text tower.
    """
    parameters = {"learnpruner": {"weights": str(weights)}, "cdpruner": {"relevance": "none"}}
    specs = {UNPRUNED: specify(UNPRUNED)}
    for method in RECIPES:
        if method != UNPRUNED:
            specs[method] = specify(
                method, budget=OWN_BUDGETS.get(method, BUDGET), parameters=parameters.get(method, {})
            )
    for scorer in SCORERS:
        specs[f"nuwa by {scorer}"] = specify("nuwa", budget=BUDGET, stage2={"scorer": scorer})
    for position in STRATEGIES:
        specs[f"nuwa in {position}"] = specify("nuwa", budget=BUDGET, position=position)
    return specs


@torch.inference_mode()
def answer_all(device: str | torch.device, dtype: torch.dtype, scenes: PinnedScenes, tokens: int) -> Answers:
    """The testbed model's answers of up to ``tokens`` tokens under every configuration, question by question."""
    vlm = LlavaAdapter.load(TESTBED, str(device), dtype)
    encoded = vlm.encode_images(scenes.images, OPTIONAL_SIGNALS)
    with tempfile.TemporaryDirectory() as folder:
        # LearnPruner's module is for the encoder it was trained on; in half precision that is another, to the letter.
        weights = Path(folder) / LEARNED.name
        save_lpm(read_lpm(LEARNED).lpm, weights, vlm.encoder_identity, {})
        return {name: _answer(vlm, encoded, scenes, spec, tokens) for name, spec in configurations(weights).items()}


def _answer(
    vlm: Adapter, encoded: Sequence[EncodedImage], scenes: PinnedScenes, spec: MethodSpec, tokens: int
) -> list[Generation]:
    batch = ImageBatch(encoded=encoded, names=scenes.names, questions=scenes.questions, pictures=scenes.images)
    answers = answer_encoded(vlm, batch, lambda layout: spec, tokens)
    return [one for about_image in answers for one in about_image]


def _compare_dtype(
    session: Session, scenes: PinnedScenes, name: str, references: Mapping[str, Answers]
) -> Iterator[Result]:
    if "cpu" not in references:
        yield Result("a", f"testbed in {name}", "skipped", {"why": "the CPU's answers are missing"}, name == "float32")
        return
    answers = answer_all(session.device, DTYPES[name], scenes, session.scale.answer_tokens)
    yield compare(name, answers, references["cpu"])


def compare(name: str, answers: Answers, reference: Answers) -> Result:
    """How many answers differ from the reference's, how many of its selections, and by which configuration.

    In float32 this is a check: at most :data:`MAY_DIFFER` of all answers and :data:`MAY_DIFFER_ALONE` of any one
    configuration's.
    """
    shares = {}
    differing = kept_otherwise = total = 0
    for configuration, expected in reference.items():
        pairs = list(zip(answers[configuration], expected, strict=True))
        count = sum(one.tokens != other.tokens for one, other in pairs)
        kept_otherwise += sum(
            (one.kept.slots, sorted(one.kept_last)) != (other.kept.slots, sorted(other.kept_last))
            for one, other in pairs
        )
        differing, total = differing + count, total + len(pairs)
        if count:
            shares[configuration] = count / len(pairs)

    share = differing / total
    worst = max(shares.values(), default=0.0)
    figures: dict[str, Any] = {"answers": total, "differ_share": share, "worst_differ_share": worst}
    figures |= {"kept_otherwise_share": kept_otherwise / total, "differ_share_by_configuration": shares}
    if name != "float32":
        return Result("a", f"testbed in {name}", "measured", figures)
    figures |= {"may_differ_share": MAY_DIFFER, "may_differ_alone_share": MAY_DIFFER_ALONE}
    held = share <= MAY_DIFFER and worst <= MAY_DIFFER_ALONE
    return Result("a", f"testbed in {name}", "held" if held else "failed", figures, checks=True)


@torch.inference_mode()
def _compare_family(session: Session, name: str) -> Iterator[Result]:
    """A tiny random model against stock ``generate`` on the device, and under Nüwa against itself on the CPU."""
    there = FAMILIES[name]()
    vlm = adapt(copy.deepcopy(there.model).to(session.device), there.processor)
    images = families.draw_photos()[: session.scale.photos]
    words = TESTBED_WORDS if name == "llava" else WORDS
    questions = [[*words[row % 3 :], *words[: row % 3]] for row in range(len(images))]
    names, longest = [f"photo {row}" for row in range(len(images))], session.scale.answer_tokens

    def tokens(model: Adapter, spec_of: Callable[[Any], MethodSpec]) -> list[tuple[int, ...]]:
        encoded = model.encode_images(images)
        batch = ImageBatch(encoded=encoded, names=names, questions=questions, pictures=images)
        answers = answer_encoded(model, batch, spec_of, longest)
        return [one.tokens for about_image in answers for one in about_image]

    unpruned = tokens(vlm, lambda layout: specify(UNPRUNED))
    stock = [
        answer
        for image, texts in zip(images, questions, strict=True)
        for answer in stock_answers(vlm, image, texts, longest)
    ]
    yield _agreement(f"{name} like stock generate", unpruned, stock)

    def half(layout: Any) -> MethodSpec:
        return specify("nuwa", budget=0.5 * layout.tokens)

    yield _agreement(f"{name} under nuwa like the CPU", tokens(vlm, half), tokens(there, half))


def _agreement(name: str, answers: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]]) -> Result:
    """One answer in fifty may turn on a near tie; where all are alike, they prove nothing."""
    share = sum(one != other for one, other in zip(answers, expected, strict=True)) / len(expected)
    figures = {"answers": len(expected), "differ_share": share, "may_differ_share": MAY_DIFFER_ALONE}
    figures["different_answers"] = len(set(expected))
    held = share <= MAY_DIFFER_ALONE and len(set(expected)) > 1
    return Result("a", name, "held" if held else "failed", figures, checks=True)


def stock_answers(vlm: Adapter, image: Any, questions: Sequence[str], tokens: int) -> list[tuple[int, ...]]:
    """The model's own greedy ``generate`` of up to ``tokens`` tokens, one question at a time, without the end token."""
    answers = []
    for question in questions:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = vlm.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        inputs = vlm.processor(images=[image], text=[text], return_tensors="pt").to(vlm.device)
        out = vlm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        made = out[0, inputs["input_ids"].shape[1] :].tolist()
        ends = [at for at, token in enumerate(made) if token in vlm.end_tokens]
        answers.append(tuple(made[: ends[0]] if ends else made))
    return answers


@torch.inference_mode()
def _placement(session: Session, scenes: PinnedScenes) -> Iterator[Result]:
    """Where tensors lie once a question has been answered: weights, signals, selection, states and caches."""
    vlm = load_adapter(TESTBED, str(session.device), torch.float32)
    encoded = vlm.encode_images(scenes.images[:2])
    planned = plan(vlm, specify("nuwa", budget=BUDGET), encoded[0].layout)
    batch = ImageBatch(encoded=encoded, names=scenes.names[:2], pictures=scenes.images[:2])
    selection = select(vlm, planned, encoded[0].layout, batch)
    prompts = [[vlm.encode_prompt(text) for text in texts] for texts in scenes.questions[:2]]
    trunk = open_trunk(vlm, planned, selection, prompts, scenes.names[:2], encoded[0].layout)
    answer_from(trunk, planned, [session.scale.answer_tokens] * sum(map(len, prompts)))
    tensors = [*vlm.model.named_parameters(), *vlm.model.named_buffers()]
    tensors += held_tensors({"encoded": encoded, "selection": selection, "trunk": trunk})
    yield placement(tensors, session.device)


def placement(tensors: Sequence[tuple[str, torch.Tensor]], device: torch.device) -> Result:
    """No floating-point tensor may lie elsewhere than on ``device``; whole numbers may, as bookkeeping of the host."""
    numbers = [(name, value) for name, value in tensors if value.is_floating_point()]
    left = sorted(name for name, value in numbers if value.device.type != device.type)
    others = [value for _, value in tensors if not value.is_floating_point()]
    figures = {
        "tensors": len(numbers),
        "left_share": len(left) / max(len(numbers), 1),
        "whole_number_tensors": len(others),
        "whole_number_left_share": sum(one.device.type != device.type for one in others) / max(len(others), 1),
        "left": left[:8],
    }
    return Result("a", "placement", "held" if numbers and not left else "failed", figures, checks=True)
