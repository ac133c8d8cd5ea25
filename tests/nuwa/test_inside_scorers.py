"""Scorers of the newer methods on evidence made by hand, ordinary and adversarial, against oracles token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oracles import inside, scorers
from oracles.agreement import keeps
from oracles.pictures import KINDS, SHAPES, Picture, best_first, draw_picture

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout, grid_tokens
from nuwa.signals import top_indices
from nuwa.stage2 import SCORERS, CutEvidence, Scorer, get_scorer
from nuwa.stage2.coordinates import IvcPrune, coordinate_flags, with_coordinates
from nuwa.stage2.dart import Dart
from nuwa.stage2.dart import kept as dart_kept
from nuwa.stage2.projections import Projections
from nuwa.stage2.sparsevlm import PriorityHeads
from nuwa.stage2.without_rope import Feather

BEFORE, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 3
FREQUENCIES = [1.0, 0.25, 0.0625]
NEWER = [name for name, scorer in SCORERS.items() if scorer.score.__module__ != "nuwa.stage2.scorers"]


@dataclasses.dataclass
class Question:
    """What one question sees at a cut: NumPy arrays of ``before``, ``visual`` and ``text`` tokens."""

    picture: Picture
    query: np.ndarray  # (heads, text, d)
    keys: dict[str, np.ndarray]  # (kv heads, tokens, d)
    values: dict[str, np.ndarray]
    states: dict[str, np.ndarray]  # (tokens, dim), behind the final norm
    maps: np.ndarray  # (heads, text, visual)
    words: np.ndarray  # (text, dim)

    @property
    def text(self) -> int:
        return self.query.shape[1]

    @property
    def positions(self) -> dict[str, list[list[int]]]:
        """Row and column of a patch; of a word its number twice."""
        start = BEFORE + max(self.picture.height, self.picture.width)
        return {
            "visual": [[BEFORE + place for place in self.picture.place(at)] for at in range(self.picture.tokens)],
            "text": [[start + at, start + at] for at in range(self.text)],
        }


def draw_question(picture: Picture, text: int, seed: int) -> Question:
    rng = np.random.default_rng([seed, text])

    def heads_of(vectors: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(vectors.reshape(len(vectors), KV_HEADS, HEAD_DIM).transpose(1, 0, 2))

    def words_like(vectors: np.ndarray, count: int) -> np.ndarray:
        return rng.normal(size=(count, vectors.shape[1])).astype(vectors.dtype)

    values = picture.keys[::-1]
    return Question(
        picture,
        rng.normal(size=(HEADS, text, HEAD_DIM)).astype(picture.keys.dtype),
        {
            "before": heads_of(words_like(picture.keys, BEFORE)),
            "visual": heads_of(picture.keys),
            "text": heads_of(words_like(picture.keys, text)),
        },
        {
            "before": heads_of(words_like(values, BEFORE)),
            "visual": heads_of(values),
            "text": heads_of(words_like(values, text)),
        },
        {"visual": picture.similarity, "text": words_like(picture.similarity, text)},
        (rng.dirichlet(np.ones(picture.tokens), (HEADS, text)) * picture.attention.astype(np.float64)),
        words_like(picture.projected, text),
    )


def evidence_of(questions: list[Question], keep: int) -> CutEvidence:
    """All have one grid; words are padded with what must not count."""
    first = questions[0].picture
    longest = max(question.text for question in questions)

    def padded(arrays: list[np.ndarray], axis: int) -> torch.Tensor:
        rows = []
        for array in arrays:
            more = [(0, 0)] * array.ndim
            more[axis] = (0, longest - array.shape[axis])
            rows.append(np.pad(array, more, constant_values=7.0))
        return torch.from_numpy(np.stack(rows))

    def of(name: str, tokens: str) -> torch.Tensor:
        arrays = [getattr(question, name)[tokens] for question in questions]
        return padded(arrays, -2) if tokens == "text" else torch.from_numpy(np.stack(arrays))

    def projections(tokens: str, rotated: bool, ahead: bool) -> Projections:
        key, value = of("keys", tokens), of("values", tokens)
        query = padded([question.query for question in questions], -2) if tokens == "text" else key
        return Projections(query, key, value, HEAD_DIM**-0.5, None)

    def tables(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.float()[..., None] * torch.tensor(FREQUENCIES)
        return angles.cos(), angles.sin()

    def positions(tokens: str) -> torch.Tensor:
        rows = [question.positions[tokens] for question in questions]
        return torch.tensor([row + [[0, 0]] * (longest - len(row)) if tokens == "text" else row for row in rows])

    mask = torch.tensor([[at < question.text for at in range(longest)] for question in questions])
    maps = padded([question.maps for question in questions], 1) * mask[:, None, :, None]
    features = torch.from_numpy(np.stack([question.picture.projected for question in questions]))
    return CutEvidence(
        attention=lambda last_only: maps,
        next_attention=lambda last_only: maps,
        text_mask=mask,
        text=padded([question.words for question in questions], 0),
        visual=features,
        entered=features,
        seed=0,
        identity=[(question.picture.name,) for question in questions],
        projections=projections,
        states=of("states", "visual"),
        normed=lambda tokens: of("states", tokens),
        positions=positions("visual").permute(2, 0, 1),
        rotary=lambda tokens: tables(positions(tokens)[..., 0]),
        rotary_by_axis=lambda: tables(positions("visual").permute(2, 0, 1)),
        slots=torch.arange(first.tokens).expand(len(questions), -1),
        layout=VisualLayout((View(PatchGrid(first.height, first.width)),)),
        keep=keep,
    )


def chosen_by(scorer: Scorer, questions: list[Question], keep: int) -> list[list[int]]:
    scores = scorer.scores(evidence_of(questions, keep))
    assert scores.isfinite().all() and scores.shape == (len(questions), questions[0].picture.tokens)
    return top_indices(scores, keep).tolist()


def expected(scorer: Scorer, question: Question, keep: int) -> list[int]:
    """The oracle's choice."""
    options, picture = scorer.parameters, question.picture
    last, scaling = question.query[:, -1], HEAD_DIM**-0.5
    if scorer.name == "dart":
        own = {name: options[name] for name in ("image_pivots", "text_pivots", "pivot_order", "pivot_norm")}
        return inside.dart(
            question.keys["visual"],
            question.keys["text"],
            question.states["visual"],
            question.states["text"],
            keep,
            BEFORE,
            **own,
        )
    if scorer.name == "ivc_prune":
        return inside.ivc_prune(question.values, question.positions["visual"], FREQUENCIES, keep, **options)
    if scorer.name == "attention_raters_by_distance":
        places = question.positions
        scores = inside.raters_by_distance(
            question.maps,
            places["text"],
            places["visual"],
            [(0, frequency) for frequency in FREQUENCIES],
            scorers.raters(picture.projected, question.words),
            options["priority_heads"],
            options["floor"],
        )
        return sorted(best_first(scores)[:keep])
    if scorer.name == "attention_last_token_next_layer_without_rope":
        everyone = np.concatenate([question.keys[name] for name in ("before", "visual", "text")], axis=1)
        scores = inside.attention(last, everyone, scaling)[BEFORE:][: picture.tokens]
        return sorted(best_first(scores)[:keep])
    scores = inside.attention(last, question.keys["visual"], scaling)
    if scorer.name == "feather":
        grid = inside.grid_of([picture.place(at) for at in range(picture.tokens)], options["stride"])
        return inside.united([grid], scores, keep)
    return sorted(best_first(scores)[:keep])


CONFIGURED = {
    "dart by hash": dataclasses.replace(get_scorer("dart"), options=Dart(pivot_order="hash")),
    "dart by l2": dataclasses.replace(get_scorer("dart"), options=Dart(2, 1, pivot_norm="l2")),
    "feather on every second": dataclasses.replace(get_scorer("feather"), options=Feather(2)),
    "ivc_prune for qwen": dataclasses.replace(
        get_scorer("ivc_prune"), options=IvcPrune(coordinate_share=0.1, affinity="visual")
    ),
    "two heads": dataclasses.replace(
        get_scorer("attention_raters_by_distance"), options=PriorityHeads(priority_heads=2, floor=0.4)
    ),
    **{name: get_scorer(name) for name in NEWER},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CONFIGURED)
def test_a_choice_is_its_oracles(case, kind):
    """On every shape, in a batch of questions of different lengths, one of a single word."""
    scorer = CONFIGURED[case]
    for number, (height, width) in enumerate(SHAPES):
        questions = [
            draw_question(draw_picture(seed, height, width, kind), text, seed) for seed, text in enumerate((6, 1, 3))
        ]
        for keep in keeps(height * width, number + KINDS.index(kind)):
            found = chosen_by(scorer, questions, keep)
            assert found == [expected(scorer, question, keep) for question in questions], (height, width, keep)


@pytest.mark.parametrize("name", NEWER)
def test_a_batch_of_eight_chooses_as_each_question_alone(name):
    scorer = get_scorer(name)
    for kind in ("ties", "half", "normal"):
        questions = [draw_question(draw_picture(seed, 5, 7, kind), 1 + seed % 5, seed) for seed in range(8)]
        together = chosen_by(scorer, questions, 12)
        assert together == [chosen_by(scorer, [question], 12)[0] for question in questions]
        assert chosen_by(scorer, questions[::-1], 12) == together[::-1]


def test_only_attention_scorers_say_that_they_read_attention():
    def refuse(_last_only):
        raise AssertionError("attention was read")

    question = draw_question(draw_picture(0, 5, 7), 4, 0)
    for name in NEWER:
        blind = dataclasses.replace(evidence_of([question], 9), attention=refuse)
        if get_scorer(name).reads_attention:
            with pytest.raises(AssertionError):
                get_scorer(name).scores(blind)
        else:
            assert get_scorer(name).scores(blind).shape == (1, 35)


def test_all_alike_goes_by_index():
    questions = [draw_question(draw_picture(0, 4, 5), 4, 0)]
    assert chosen_by(get_scorer("none"), questions, 3) == [[0, 1, 2]]


# --- what the notes on the released code say in numbers


@pytest.mark.parametrize(("asked", "kept"), [(68, 68), (132, 132), (75, 68), (4, 4), (3, 3), (5, 4), (576, 576)])
def test_dart_as_released_gives_every_pivot_the_same(asked, kept):
    """64, 128 and 192 tokens shared among 8 pivots, and the 4 image pivots themselves."""
    assert dart_kept(576, asked, Dart(spread="released")) == kept
    assert dart_kept(576, asked, Dart()) == asked


def test_a_hashed_order_changes_with_the_places_in_the_sequence():
    """A set holds 33 before 2: its table has 32 places. What stands before the image decides the order of pivots."""
    assert list({2, 33}) == [33, 2]
    scorer = CONFIGURED["dart by hash"]
    differing = 0
    for seed in range(6):
        question = draw_question(draw_picture(seed, 8, 8), 6, seed)
        ranked = chosen_by(get_scorer("dart"), [question], 30)
        differing += chosen_by(scorer, [question], 30) != ranked
    assert differing > 0


def test_feathers_grid_has_every_third_row_and_column():
    layout = VisualLayout((View(PatchGrid(24, 24)),))
    assert int(grid_tokens(layout, 3).sum()) == 64
    two = VisualLayout((View(PatchGrid(2, 2)), View(PatchGrid(4, 5), 2, newline=True)))
    assert grid_tokens(two, 3).nonzero()[:, 0].tolist() == [0, 4, 7, 22, 25]  # rows 0 and 3 of six places each


def test_coordinates_are_those_turned_by_nearly_nothing_or_a_quarter():
    """Of one axis with one slow frequency: the first ids, and those around a quarter of the turn."""
    angles = torch.arange(100).float()[None, None, :, None] * (torch.pi / 2 / 60)
    flags = coordinate_flags(angles.cos(), angles.sin(), 0.03)
    assert flags[0].nonzero()[:, 0].tolist() == [0, 1, 2, 59, 60, 61]


def test_ids_that_are_exchanged_between_axes_are_equal_coordinates():
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    positions = torch.stack([torch.zeros(81), rows.flatten(), columns.flatten()]).float()[:, None, :, None]
    angles = positions * torch.tensor([1.0, 0.3, 0.07, 0.011])
    keep = 5  # (0, 0), then (0, 1) before (1, 0), ...
    flags = coordinate_flags(angles.cos(), torch.zeros_like(angles), keep / 81)
    found = {divmod(int(at), 9) for at in flags[0].nonzero()[:, 0]}
    assert {(0, 0), (0, 1), (1, 0)} <= found


@pytest.mark.parametrize("name", ["attention_last_token", "dart", "feather", "attention_raters_by_distance"])
def test_a_union_keeps_the_coordinates_and_the_methods_own_best(name):
    question = draw_question(draw_picture(2, 6, 6), 5, 2)
    last = {"attention_last_token": lambda last_only: torch.from_numpy(question.maps[None, :, -1:])}
    share, keep = 0.1, 14
    evidence = dataclasses.replace(
        evidence_of([question], keep), attention=last.get(name, evidence_of([question], 1).attention)
    )
    own = get_scorer(name).scores(evidence)[0].tolist()
    union = top_indices(with_coordinates(get_scorer(name), share).scores(evidence), keep)[0].tolist()
    coordinates = inside.coordinates(question.positions["visual"], FREQUENCIES, share)
    assert set(coordinates) <= set(union) and 4 <= len(coordinates) <= 8
    assert union == inside.united([coordinates], own, keep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dart(pivot_order="random"), "dart.pivot_order 'random' is unknown; allowed: ranked, hash"),
        (lambda: Dart(image_pivots=0), "dart.image_pivots 0 must be at least 1"),
        (lambda: Feather(0), "feather.stride 0 must be at least 1 token"),
        (lambda: IvcPrune(coordinate_share=1.5), "ivc_prune.coordinate_share 1.5 must lie in [0, 1]"),
        (lambda: IvcPrune(affinity="text"), "ivc_prune.affinity 'text' is unknown; allowed: all, visual"),
        (lambda: IvcPrune(skipped=-1), "ivc_prune.skipped -1 must be at least 0 tokens"),
        (lambda: PriorityHeads(0), "attention_raters_by_distance.priority_heads 0 must be at least 1"),
        (lambda: PriorityHeads(floor=0.0), "attention_raters_by_distance.floor 0 must lie in (0, 1]"),
    ],
)
def test_what_no_method_can_do_is_refused(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
