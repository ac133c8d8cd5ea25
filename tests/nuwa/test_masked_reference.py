"""The schedule-aware decoder and its scorers against a stock model with blocked attention, question by question."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from oracles import scorers as scorer_oracle
from oracles.masked_model import MaskedModel, eager_copy
from oracles.pictures import best_first
from PIL import Image

from nuwa.decoder import Answer, Trunk
from nuwa.methods import specify
from nuwa.signals import top_indices
from nuwa.stage1 import get_method
from nuwa.stage2 import SCORERS, Cut, CutEvidence, Recycling, Scorer, get_scorer
from nuwa.stage2.recycling import cluster_noise
from nuwa.stage2.scorers import raters

torch.set_num_threads(1)
MAX_NEW = 6
# Of different lengths, so that rows and blocks are padded.
ASKED = [["locate the red 3 on the left"], ["what digit is blue?", "locate the digit that is red and looks like a 3"]]
SELECTING = {"random": {}, "uniform": {}, "nuwa": {"aggregation": False}}  # methods that merge nothing
KEEP = 40
# Others are shown to equal a masked model by test_inside_methods.py, and to their oracles by test_inside_scorers.py.
PLAIN = [
    name for name, scorer in SCORERS.items() if scorer.score.__module__ == "nuwa.stage2.scorers" and name != "none"
]
CUTS = {"one cut": [(4, 12)], "two cuts": [(2, 24), (6, 9)], "at both ends": [(1, 20), (7, 5)]}


@pytest.fixture(scope="module")
def twin(tiny_vlm):
    return eager_copy(tiny_vlm.model)


@pytest.fixture(scope="module")
def images(scenes):
    return [Image.fromarray(scene.image) for scene in scenes]


@dataclass
class Ours:
    """What the decoder said, and what could be overheard: scores at every cut and logits at every step."""

    answers: list[Answer] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)  # one a cut, (questions, visual)
    logits: list[torch.Tensor] = field(default_factory=list)  # one a step, (active questions, vocabulary)

    def logits_of(self, question: int) -> list[torch.Tensor]:
        """A question is active at a step if it has not ended before: then it has made a token at every step so far."""
        found = []
        for step, logits in enumerate(self.logits):
            active = [number for number, answer in enumerate(self.answers) if len(answer.tokens) >= step]
            assert len(logits) == len(active)
            if question in active:
                found.append(logits[active.index(question)])
        return found


def encode(vlm, images):
    return vlm.signals(vlm.encode(vlm.pixels(images)), tuple(f"scene-{number}" for number in range(len(images))))


def stage1(signals, method, keep=KEEP, seed=0, **parameters):
    chosen = get_method(method)
    return chosen.select(signals, keep, chosen.configure(**parameters), seed)


def trunk_of(vlm, signals, selection, asked, strategy="pesp"):
    prompts = [[vlm.encode_prompt(text) for text in texts] for texts in asked]
    return Trunk(vlm, selection, prompts, strategy, signals.image_ids)


def decode(vlm, trunk, cuts, limit=MAX_NEW, seed=0) -> Ours:
    """One trunk to its answers; ``cuts`` (layer, keep, scorer's name) may be empty, and may end in a recycling."""
    ours = Ours()

    def overhear(scorer: Scorer) -> Scorer:
        def score(evidence: CutEvidence, *options) -> torch.Tensor:
            ours.scores.append(scorer.score(evidence, *options))
            return ours.scores[-1]

        return dataclasses.replace(scorer, score=score)

    listener = vlm.model.lm_head.register_forward_hook(lambda _module, _inputs, out: ours.logits.append(out.clone()))
    limits = [limit] * len(trunk.prompts)
    try:
        if not cuts:
            ours.answers = trunk.finish(limits)
        else:
            trunk.advance(cuts[0][0], frozenset({cuts[0][0] - 1}))
            heard = [Cut(layer, keep, overhear(get_scorer(scorer)), *more) for layer, keep, scorer, *more in cuts]
            ours.answers = trunk.fork(heard, limits, seed)
    finally:
        listener.remove()
    return ours


def answers(vlm, signals, selection, asked, cuts, strategy="pesp", seed=0) -> list[Answer]:
    return decode(vlm, trunk_of(vlm, signals, selection, asked, strategy), cuts, seed=seed).answers


def assert_equals_masked_model(vlm, twin, images, selection, asked, cuts, ours, strategy="pesp", merged=False) -> None:
    places = [(row, text) for row, texts in enumerate(asked) for text in texts]
    for number, (row, text) in enumerate(places):
        kept = selection.indices[row].tolist()
        embedded = twin.model.multi_modal_projector(selection.features[row]) if merged else None
        reference = MaskedModel(twin, vlm.processor, images[row], text, kept, strategy, embedded)
        for at, (layer, keep, scorer, *recycling) in enumerate(cuts):
            found = ours.scores[at][number].tolist()
            if scorer == "random":
                expected = found  # any numbers will do; what follows from them will not
            else:
                expected = reference.scores(layer, scorer)
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
            if recycling:
                prompt = vlm.encode_prompt(text)
                identity = (f"cut {layer}", f"scene-{row}", repr(prompt.after))
                noise = cluster_noise(0, [identity], len(found))[0]
                reference.cut_and_recycle(layer, keep, expected, noise)
            else:
                reference.cut(layer, keep, expected)
        assert list(ours.answers[number].kept) == reference.alive[-1]
        tokens, logits = reference.answer(MAX_NEW, vlm.end_tokens, ours.answers[number].tokens)
        assert list(ours.answers[number].tokens) == tokens
        heard = ours.logits_of(number)
        assert len(heard) == len(logits)
        for step, (one, other) in enumerate(zip(heard, logits, strict=True)):
            # 1e-4, and what float32 cannot tell apart in this model's large logits.
            assert torch.allclose(one, other, atol=1e-4, rtol=1e-5), f"question {number}, step {step}"


# Every scorer behind every method, and in every cutting.
@pytest.mark.parametrize("scorer", PLAIN)
@pytest.mark.parametrize(("method", "cutting"), zip(SELECTING, CUTS, strict=True))
def test_cuts_equal_blocked_attention(tiny_vlm, twin, images, method, cutting, scorer):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, method, **SELECTING[method])
    cuts = [(layer, keep, scorer) for layer, keep in CUTS[cutting]]
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, selection, ASKED), cuts)
    assert_equals_masked_model(tiny_vlm, twin, images, selection, ASKED, cuts, ours)


@pytest.mark.parametrize("strategy", ["perc", "rpme"])
@pytest.mark.parametrize("cutting", CUTS)
def test_positions_are_renewed_at_every_cut(tiny_vlm, twin, images, cutting, strategy):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, "random")
    scorers = ["attention_all_text", "attention_last_token"]
    cuts = [(layer, keep, scorers[at]) for at, (layer, keep) in enumerate(CUTS[cutting])]
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, selection, ASKED, strategy), cuts)
    assert_equals_masked_model(tiny_vlm, twin, images, selection, ASKED, cuts, ours, strategy)


@pytest.mark.parametrize("strategy", ["perc", "pesp", "rpme"])
def test_recycled_tokens_equal_exchanged_ones(tiny_vlm, twin, images, strategy):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, "random")
    cuts = [
        (1, 24, "attention_raters", Recycling()),
        (3, 13, "attention_last_token", Recycling()),  # recycles recycled tokens again
        (6, 6, "cosine_mean_text", Recycling()),
    ]
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, selection, ASKED, strategy), cuts)
    assert_equals_masked_model(tiny_vlm, twin, images, selection, ASKED, cuts, ours, strategy)


@pytest.mark.parametrize(("method", "budget"), [("pyramiddrop", 64), ("sparsevlm", 32)])
def test_whole_methods_of_several_cuts_equal_blocked_attention(tiny_vlm, twin, images, method, budget):
    signals = encode(tiny_vlm, images[:2])
    spec = specify(method, budget=budget, position="perc")
    schedule = spec.schedule(tiny_vlm.grid, tiny_vlm.layers)
    assert len(schedule.cuts) == 3
    selection = stage1(signals, "unpruned", keep=schedule.stage1_keep)
    cuts = [
        (cut.layer, cut.keep, cut.scorer.name, *([cut.recycling] if cut.recycling else []))
        for cut in spec.cuts(schedule)
    ]
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, selection, ASKED, "perc"), cuts)
    assert_equals_masked_model(tiny_vlm, twin, images, selection, ASKED, cuts, ours, "perc")


@pytest.mark.parametrize("strategy", ["perc", "pesp", "rpme"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_the_full_budget_answers_as_the_unpruned_model(tiny_vlm, images, method, strategy):
    signals = encode(tiny_vlm, images[:2])
    everything = stage1(signals, "unpruned", keep=144)
    spec = specify(method, budget=144, position=strategy)
    cuts = [(*cut[:2], cut.scorer.name, cut.recycling) for cut in spec.cuts(spec.schedule(tiny_vlm.grid, 8))]
    assert cuts and all(keep == 144 for _, keep, *_ in cuts)
    assert answers(tiny_vlm, signals, everything, ASKED, cuts, strategy) == answers(
        tiny_vlm, signals, everything, ASKED, []
    )


@pytest.mark.parametrize("strategy", ["perc", "pesp", "rpme"])
def test_stage_1_alone_equals_blocked_attention(tiny_vlm, twin, images, strategy):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, "nuwa", aggregation=False)
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, selection, ASKED, strategy), [])
    assert_equals_masked_model(tiny_vlm, twin, images, selection, ASKED, [], ours, strategy)


@pytest.mark.parametrize(("method", "scorer"), [("nuwa", "cosine_mean_text"), ("visionzip", "attention_last_token")])
def test_merged_tokens_stand_in_the_place_of_their_patch(tiny_vlm, twin, images, method, scorer):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, method)
    assert not selection.pillars.all()
    cuts = [(4, 12, scorer)]
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, selection, ASKED), cuts)
    assert_equals_masked_model(tiny_vlm, twin, images, selection, ASKED, cuts, ours, merged=True)


def test_fastv_keeps_what_the_stock_models_attention_ranks_first(tiny_vlm, twin, images):
    signals = encode(tiny_vlm, images[:1])
    selection = stage1(signals, "unpruned", keep=144)
    found = answers(tiny_vlm, signals, selection, [ASKED[1]], [(2, 16, "attention_last_token")])
    for text, answer in zip(ASKED[1], found, strict=True):
        stock = MaskedModel(twin, tiny_vlm.processor, images[0], text, list(range(144)))
        attention = stock.forward([], attentions=True)[1][1]  # the layer before the cut
        scores = scorer_oracle.last_token(attention, stock.visual, stock.text)
        assert list(answer.kept) == sorted(best_first(scores)[:16])


def test_what_a_masked_model_is_told_to_expect_changes_nothing(tiny_vlm, twin, images):
    reference = MaskedModel(twin, tiny_vlm.processor, images[0], ASKED[0][0], list(range(0, 144, 5)))
    tokens, logits = reference.answer(MAX_NEW, tiny_vlm.end_tokens)
    wrong = [*tokens[:3], (tokens[3] + 1) % 50, *tokens[4:]]
    for expected in (tokens, tokens[:5], wrong, [*tokens, 7]):
        again, same = reference.answer(MAX_NEW, tiny_vlm.end_tokens, expected)
        assert again == tokens and len(same) == len(logits)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(same, logits, strict=True))


def test_the_model_is_loud_enough_for_all_this_to_prove_something(tiny_vlm, images):
    signals = encode(tiny_vlm, images[:2])
    told = {
        (method, scorer, strategy): tuple(
            answer.tokens
            for answer in answers(
                tiny_vlm,
                signals,
                stage1(signals, method, **SELECTING[method]),
                ASKED,
                [(4, 12, scorer)],
                strategy,
            )
        )
        for method in SELECTING
        for scorer in ("random", "attention_last_token", "cosine_mean_text")
        for strategy in ("pesp", "perc")
    }
    assert len(set(told.values())) == len(told)
    assert all(len(tokens) > 3 for tokens in told["nuwa", "random", "pesp"])


# --- forks, order and batches


FORKS = [
    [(2, 24, "attention_last_token")],
    [(2, 10, "attention_all_text"), (5, 4, "attention_last_token")],
    [(5, 12, "cosine_mean_text")],
    [(5, 12, "attention_last_token"), (6, 3, "random")],
    [(2, 30, "attention_raters", Recycling()), (3, 16, "attention_raters", Recycling()), (5, 8, "attention_raters")],
]


@pytest.mark.parametrize(("strategy", "order"), [("perc", [0, 1, 4, 2, 3]), ("rpme", [4, 1, 0, 3, 2])])
def test_forks_of_one_trunk_equal_runs_of_their_own(tiny_vlm, images, strategy, order):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, "visionzip")
    alone = {number: answers(tiny_vlm, signals, selection, ASKED, cuts, strategy) for number, cuts in enumerate(FORKS)}
    uncut = answers(tiny_vlm, signals, selection, ASKED, [], strategy)
    limits = [MAX_NEW] * 3
    trunk = trunk_of(tiny_vlm, signals, selection, ASKED, strategy)
    assert trunk.finish(limits) == uncut
    for number in order:
        layer = FORKS[number][0][0]
        trunk.advance(layer, frozenset({layer - 1}))
        cuts = [Cut(at, keep, get_scorer(scorer), *more) for at, keep, scorer, *more in FORKS[number]]
        assert trunk.fork(cuts, limits) == alone[number]
        assert trunk.fork(cuts, limits) == alone[number], "a fork may not spend the trunk"
        assert trunk.finish(limits) == uncut
    assert len({tuple(answer.tokens for answer in found) for found in [*alone.values(), uncut]}) == len(FORKS) + 1


@pytest.mark.parametrize("scorer", SCORERS)
def test_questions_do_not_depend_on_their_company(tiny_vlm, images, scorer):
    asked = [
        ["what digit is blue?", "locate the red 3 on the left", "how many digits are there?"],
        ["locate the digit that is red and looks like a 3"],
        ["is there a green 7 in this image?", "what digit is blue?"],
    ]
    signals = encode(tiny_vlm, images[:3])
    cuts = [(3, 12, scorer), (6, 6, scorer)]

    def told(rows, texts):
        part = dataclasses.replace(
            signals,
            **{name: getattr(signals, name)[rows] for name in ("features", "cls_attention", "keys", "similarity")},
            image_ids=tuple(signals.image_ids[row] for row in rows),
        )
        trunk = trunk_of(tiny_vlm, part, stage1(part, "nuwa"), texts, "rpme")
        found = decode(tiny_vlm, trunk, cuts, limit=3).answers
        return dict(
            zip([(row, text) for row, own in zip(rows, texts, strict=True) for text in own], found, strict=True)
        )

    together = told([0, 1, 2], asked)
    assert told([2, 0, 1], [asked[row][::-1] for row in (2, 0, 1)]) == together
    for row, texts in enumerate(asked):  # one of each image; which of them goes round by scorer
        text = texts[list(SCORERS).index(scorer) % len(texts)]
        assert told([row], [[text]]) == {(row, text): together[row, text]}
    assert together[0, "what digit is blue?"] != together[2, "what digit is blue?"], "another image, another answer"


@pytest.mark.parametrize(("method", "budget"), [("pyramiddrop", 48), ("sparsevlm", 40)])
def test_batches_of_1_8_and_64_give_the_same_answers(tiny_vlm, images, method, budget):
    spec = specify(method, budget=budget)
    cuts = [(*cut[:2], cut.scorer.name, cut.recycling) for cut in spec.cuts(spec.schedule(tiny_vlm.grid, 8))]
    words = ["red", "blue", "green", "yellow", "red or blue", "left", "right of the red 3", "how many"]
    signals = encode(tiny_vlm, images)
    rng = np.random.default_rng(0)

    def told(asked):
        """``asked``: questions by image."""
        rows = list(asked)
        part = dataclasses.replace(
            signals,
            **{name: getattr(signals, name)[rows] for name in ("features", "cls_attention", "keys", "similarity")},
            image_ids=tuple(signals.image_ids[row] for row in rows),
        )
        trunk = trunk_of(tiny_vlm, part, stage1(part, "unpruned", keep=144), list(asked.values()))
        found = decode(tiny_vlm, trunk, cuts, limit=4).answers
        return dict(zip([(row, text) for row in rows for text in asked[row]], found, strict=True))

    of_64 = told({row: words for row in range(8)})
    assert len(of_64) == 64 and len({answer.kept for answer in of_64.values()}) > 32, "nothing would be proven"
    shuffled = told({int(row): [words[at] for at in rng.permutation(8)] for row in rng.permutation(8)})
    assert shuffled == of_64
    for row in range(0, 8, 2):
        of_8 = told({row: words})
        assert of_8 == {key: of_64[key] for key in of_8}
        text = words[row]
        assert told({row: [text]}) == {(row, text): of_64[row, text]}


def test_a_questions_limit_cuts_its_answer_and_no_other(tiny_vlm, images):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, "uniform")
    full = answers(tiny_vlm, signals, selection, ASKED, [(4, 12, "random")])
    trunk = trunk_of(tiny_vlm, signals, selection, ASKED)
    trunk.advance(4)
    limited = trunk.fork([Cut(4, 12, get_scorer("random"))], [3, MAX_NEW, 1])
    assert [answer.tokens for answer in limited] == [
        answer.tokens[:limit] for answer, limit in zip(full, [3, MAX_NEW, 1], strict=True)
    ]


def test_a_fork_away_from_its_trunk_is_refused(tiny_vlm, images):
    signals = encode(tiny_vlm, images[:2])
    trunk = trunk_of(tiny_vlm, signals, stage1(signals, "uniform"), ASKED)
    trunk.advance(2)
    with pytest.raises(ValueError) as caught:
        trunk.fork([Cut(3, 12, get_scorer("random"))], [MAX_NEW] * 3)
    assert str(caught.value) == "the trunk stands before layer 2, the first cut before 3"


def test_prompts_that_begin_differently_are_refused(tiny_vlm, images):
    signals = encode(tiny_vlm, images[:1])
    prompt = tiny_vlm.encode_prompt("what digit is blue?")
    other = dataclasses.replace(prompt, before=(*prompt.before, 5))
    with pytest.raises(ValueError) as caught:
        Trunk(tiny_vlm, stage1(signals, "uniform"), [[prompt, other]], "pesp", signals.image_ids)
    assert str(caught.value) == "all prompts of a batch must begin alike; found 2 beginnings"


# --- scorers on their own


def evidence(attention=None, lengths=(3, 2), seed=0, identity=None, visual=4) -> CutEvidence:
    """Two questions of 3 and 2 words (or ``lengths``), one padded; attention is zero at padding."""
    rng = np.random.default_rng(7)
    rows, count = max(lengths), len(lengths)
    mask = torch.tensor([[at < length for at in range(rows)] for length in lengths])
    if attention is None:
        attention = torch.from_numpy(rng.random((count, 2, rows, visual)))
    attention = attention * mask[:, None, :, None]
    last = torch.stack([attention[number, :, [length - 1]] for number, length in enumerate(lengths)])
    vectors = torch.from_numpy(rng.normal(size=(count, visual, 5)))
    return CutEvidence(
        attention=lambda last_only: last if last_only else attention,
        next_attention=lambda last_only: last.flip(-1) if last_only else attention.flip(-1),
        text_mask=mask,
        text=torch.from_numpy(rng.normal(size=(count, rows, 5))),
        visual=vectors,
        entered=torch.cat([vectors, vectors.flip(1) * 0.5], dim=1),
        seed=seed,
        identity=identity or [("image", f"question {number}") for number in range(count)],
    )


def test_scores_by_hand():
    # One question, two heads, two words, three patches.
    attention = torch.tensor([[[[0.1, 0.2, 0.0], [0.4, 0.0, 0.2]], [[0.3, 0.0, 0.0], [0.0, 0.6, 0.2]]]])
    one = evidence(attention, lengths=(2,), visual=3)
    assert get_scorer("attention_last_token").score(one)[0].tolist() == pytest.approx([0.2, 0.3, 0.2])
    assert get_scorer("attention_all_text").score(one)[0].tolist() == pytest.approx([0.2, 0.2, 0.1])
    turned = dataclasses.replace(
        one,
        text=torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]),
        visual=torch.tensor([[[2.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]]),
    )
    assert get_scorer("cosine_mean_text").score(turned)[0].tolist() == pytest.approx([1, -(0.5**0.5), 0], abs=1e-6)


def test_padding_counts_for_nothing():
    both = evidence(lengths=(3, 2))
    attention = both.attention(False)
    for number, length in enumerate((3, 2)):
        words, patches = list(range(length)), list(range(4))
        # The oracle reads a square attention: words first, patches after them.
        square = np.zeros((2, length + 4, length + 4))
        square[:, :length, length:] = attention[number, :, :length].numpy()
        columns = [length + patch for patch in patches]
        flipped = square.copy()
        flipped[:, :, length:] = square[:, :, length:][:, :, ::-1]
        chosen = scorer_oracle.raters(both.entered[number].numpy(), both.text[number, :length].numpy())
        assert raters(both)[number].nonzero().flatten().tolist() == chosen
        for name, expected in {
            "attention_last_token": scorer_oracle.last_token(square, columns, words),
            "attention_last_token_next_layer": scorer_oracle.last_token(flipped, columns, words),
            "attention_all_text": scorer_oracle.all_text(square, columns, words),
            "attention_last_three": scorer_oracle.last_three(square, columns, words),
            "attention_raters": scorer_oracle.of_raters(square, columns, words, chosen),
            "cosine_mean_text": scorer_oracle.cosine_with_mean_text(
                both.visual[number].numpy(), both.text[number, :length].numpy()
            ),
        }.items():
            assert get_scorer(name).score(both)[number].tolist() == pytest.approx(expected, rel=1e-5), name


def test_raters_by_hand():
    # Two words, two patches. The first patch votes e²/(e² + 1) = 0.88 for the first word, the second a half for each.
    one = dataclasses.replace(
        evidence(lengths=(2,), visual=2),
        text=torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]),
        entered=torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]),
    )
    assert raters(one).tolist() == [[True, False]]
    turned = dataclasses.replace(one, entered=torch.tensor([[[0.0, 2.0], [1.0, 1.0]]]))
    assert raters(turned).tolist() == [[False, True]]
    score = get_scorer("attention_raters").score
    assert torch.equal(score(one), one.attention(False)[:, :, 0].float().mean(dim=1))
    assert torch.equal(score(turned), one.attention(False)[:, :, 1].float().mean(dim=1))


@pytest.mark.parametrize("seed", range(5))
def test_raters_are_the_oracles_on_many_words(seed):
    rng = np.random.default_rng(seed)
    lengths = (9, 1, 5)
    several = evidence(lengths=lengths)
    text, entered = rng.normal(size=(3, 9, 6)), rng.normal(size=(3, 20, 6))
    text[2, 1] = text[2, 0]  # equal words vote alike
    several = dataclasses.replace(several, text=torch.from_numpy(text), entered=torch.from_numpy(entered))
    for number, length in enumerate(lengths):
        chosen = scorer_oracle.raters(entered[number], text[number, :length])
        assert raters(several)[number].nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize("lengths", [(1, 1), (4, 3)])
def test_where_no_word_stands_out_all_rate(lengths):
    same = evidence(lengths=lengths)
    same = dataclasses.replace(same, text=torch.ones_like(same.text))
    assert torch.equal(raters(same), same.text_mask)


@pytest.mark.parametrize(
    "name", ["attention_last_token", "attention_last_token_next_layer", "attention_all_text", "attention_raters"]
)
def test_equally_attended_patches_go_by_their_index(name):
    scores = get_scorer(name).score(evidence(torch.full((2, 2, 3, 4), 0.1)))
    assert top_indices(scores, 2).tolist() == [[0, 1], [0, 1]]


def test_random_scores_depend_on_seed_image_and_question_only():
    score = get_scorer("random").score
    first = score(evidence())
    assert torch.equal(first, score(evidence(attention=torch.zeros(2, 2, 3, 4))))
    assert not torch.equal(first, score(evidence(seed=1)))
    assert not torch.equal(first[0], first[1])
    swapped = score(evidence(identity=[("image", "question 1"), ("image", "question 0")]))
    assert torch.equal(swapped, first.flip(0))
    assert not torch.equal(first[0], score(evidence(identity=[("other", "question 0"), ("image", "x")]))[0])


def test_every_question_seed_and_image_draws_its_own_random_scores(tiny_vlm, images):
    signals = encode(tiny_vlm, images[:2])
    selection = stage1(signals, "uniform")
    asked = [["what digit is blue?", "how many digits are there?"], ["what digit is blue?"]]
    drawn = [
        tuple(scores.tolist())
        for seed in (0, 1)
        for scores in decode(
            tiny_vlm, trunk_of(tiny_vlm, signals, selection, asked), [(4, 12, "random")], limit=1, seed=seed
        ).scores[0]
    ]
    assert len(set(drawn)) == 6


def test_random_scores_of_a_second_cut_are_drawn_anew(tiny_vlm, images):
    # Else the second cut's scores are the first cut's, shifted onto other patches: no longer a uniform choice.
    signals = encode(tiny_vlm, images[:2])
    cuts = [(2, 24, "random"), (6, 9, "random")]
    ours = decode(tiny_vlm, trunk_of(tiny_vlm, signals, stage1(signals, "uniform"), ASKED), cuts)
    for first, second in zip(*ours.scores, strict=True):
        shared = set(first.tolist()) & set(second.tolist())
        assert len(shared) == 0


def test_only_attention_scorers_say_that_they_read_attention():
    def refuse(_last_only):
        raise AssertionError("attention was read")

    for name in PLAIN:
        scorer = SCORERS[name]
        blind = dataclasses.replace(evidence(), attention=refuse)
        if scorer.reads_attention:
            with pytest.raises(AssertionError):
                scorer.score(blind)
        else:
            assert scorer.score(blind).shape == (2, 4)
        assert scorer.seeded == (name == "random")


def test_an_unknown_scorer_is_named_with_what_exists():
    with pytest.raises(ValueError) as caught:
        get_scorer("attention")
    assert str(caught.value) == (
        f"stage-2 scorer 'attention' is unknown; allowed: {', '.join(sorted(SCORERS))}; "
        "did you mean 'attention_raters'?"
    )


# --- the encoder's signals


def test_signals_are_the_stock_encoders_own(tiny_vlm, twin, images):
    pixels = tiny_vlm.pixels(images[:3])
    tower, keys = twin.model.vision_tower, []
    penultimate = tower.encoder.layers[-2].self_attn.k_proj
    listener = penultimate.register_forward_hook(lambda _module, _inputs, out: keys.append(out))
    with torch.inference_mode():
        stock = tower(pixels, output_hidden_states=True, output_attentions=True)
    listener.remove()
    found = tiny_vlm.encode(pixels)
    layers = len(tower.encoder.layers)
    assert len(stock.hidden_states) == layers + 1
    late = stock.hidden_states[2 * layers // 3 :]  # 16 ... 24 of CLIP-L's 24 layers, 4 ... 6 of six
    expected = {
        "features": stock.hidden_states[-2][:, 1:],
        "cls_attention": stock.attentions[-2].mean(dim=1)[:, 0, 1:],
        "keys": keys[0][:, 1:],
        "similarity": sum(late)[:, 1:] / len(late),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5, rtol=1e-4), name
        assert found[name].std() > 1e-5, "a constant signal would prove nothing"


def test_prompts_are_split_at_the_image(tiny_vlm, images):
    text = "what digit is blue?"
    prompt = tiny_vlm.encode_prompt(text)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    full = tiny_vlm.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    stock = tiny_vlm.processor(images=[images[0]], text=[full], return_tensors="pt").input_ids[0].tolist()
    assert [*prompt.before, *[tiny_vlm.image_token] * 144, *prompt.after] == stock
