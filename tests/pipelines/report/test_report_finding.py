"""The sentences say what the numbers say, whichever way they point.

Of the synthetic run intervals are ± 3 points, and differences have a standard error of 1.5.
"""

from __future__ import annotations

import pytest

from pipelines.report.finding import finding
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes

VQA = (0.9, 0.9, 0.9)


@pytest.fixture
def sentences(synthetic, tmp_path):
    """Grounding retention at 16 tokens of (method, position) → the finding."""

    def write(grounding: dict[tuple[str, str], float], budget: float = 16, against: str = "nuwa") -> list[str]:
        run = synthetic(images=1, against=against)
        presets = {"nuwa": "released"}
        run.add_main(
            {
                (method, presets.get(method, "default"), position): ((value, 0.7, 0.8), VQA)
                for (method, position), value in grounding.items()
            }
        )
        texts = finding(Outcomes(ReportInputs.load(run.write(tmp_path / "data"))), budget)
        return [text.replace("\u00a0", " ") for text in texts]

    return write


def test_surely_ahead(sentences):
    assert sentences({("nuwa", "pesp"): 0.47, ("visionzip", "perc"): 0.05, ("random", "pesp"): 0.21}) == [
        "At 11 % of the tokens (16 of 144 on average), Nüwa keeps 47.0 % [44.0, 50.0] of grounding accuracy and "
        "90.0 % [87.0, 93.0] of visual question answering; VisionZip with compressed (PERC) position ids keeps "
        "5.0 % [2.0, 8.0] of the former and 90.0 % [87.0, 93.0] of the latter.",
        "The paper’s claim holds here: no other method keeps as much grounding, the next being Random with original "
        "(PESP) position ids at 21.0 % [18.0, 24.0], behind by 26.0 points [23.0, 29.0], p < 0.001 after correction for "
        "4 comparisons.",
    ]


def test_surely_behind_contradicts_the_paper(sentences):
    assert sentences({("nuwa", "pesp"): 0.20, ("visionzip", "perc"): 0.05, ("random", "pesp"): 0.41})[1] == (
        "On these data the paper’s claim does not hold: Random with original (PESP) position ids keeps more grounding than Nüwa, "
        "41.0 % [38.0, 44.0], ahead by 21.0 points [18.0, 24.0], p < 0.001 after correction for 4 comparisons."
    )


@pytest.mark.parametrize(
    ("control", "verdict"),
    [
        (0.30, "beats its control"),
        (0.58, "is not told from its control"),
        (0.90, "does not beat its control"),
    ],
)
def test_learnpruner_is_held_against_its_random_control(sentences, control, verdict):
    text = sentences({("nuwa", "pesp"): 0.40, ("learnpruner", "pesp"): 0.60, ("random", "pesp"): control})[-1]
    p = "p = 0.365" if control == 0.58 else "p < 0.001"  # 2 · 2 Φ(−0.02 / 0.015)
    span = f"{100 * control:.1f} % [{100 * control - 3:.1f}, {100 * control + 3:.1f}]"
    assert text == (
        "LearnPruner’s learned choice of tokens against a random one behind the same stage 2: on grounding it "
        f"{verdict} (60.0 % [57.0, 63.0] against {span}, {p}); on visual question answering it is not told from its "
        "control (90.0 % [87.0, 93.0] against 90.0 % [87.0, 93.0], p = 1.000)."
    )


def test_without_its_control_nothing_is_said_of_learnpruner(sentences):
    texts = sentences({("nuwa", "pesp"): 0.40, ("learnpruner", "pesp"): 0.60, ("random", "perc"): 0.1})
    assert not any("random one behind" in text for text in texts)


@pytest.mark.parametrize(
    ("other", "order", "told"),
    [
        (0.38, "ahead", "2.0 points [-5.0, 1.0], p = 0.365"),
        (0.40, "level", "0.0 points [-3.0, 3.0], p = 1.000"),
        (0.42, "behind", "2.0 points [-1.0, 5.0], p = 0.365"),
    ],
)
def test_what_is_not_sure_settles_nothing(sentences, other, order, told):
    text = sentences({("nuwa", "pesp"): 0.40, ("divprune", "pesp"): other})[1]
    assert text == (
        f"These data neither confirm nor refute the paper’s claim: Nüwa is {order} in the sample, but is not told apart "
        f"from DivPrune with original (PESP) position ids, {100 * other:.1f} % "
        f"[{100 * other - 3:.1f}, {100 * other + 3:.1f}]: {told} after correction for 2 comparisons."
    )


def test_overlapping_intervals_do_not_hide_a_sure_difference(sentences):
    """± 3 points each, 4.5 apart: p = 0.0027, twice that with two comparisons."""
    text = sentences({("nuwa", "pesp"): 0.40, ("divprune", "pesp"): 0.445})[1]
    assert text.endswith(
        "44.5 % [41.5, 47.5], ahead by 4.5 points [1.5, 7.5], p = 0.005 after correction for 2 comparisons."
    )


def test_the_more_is_compared_the_less_is_sure(sentences):
    """3.3 points apart: p = 0.028 as a single comparison, but four others were looked at too."""
    alone = {("nuwa", "pesp"): 0.40, ("divprune", "pesp"): 0.433}
    crowd = {(method, "pesp"): 0.39 for method in ("random", "uniform", "vispruner", "pooling")}
    assert "neither confirm nor refute" in sentences(alone | crowd)[1]


def test_held_against_another_trial_nothing_is_said_on_the_claim(sentences):
    texts = sentences({("nuwa", "pesp"): 0.40, ("divprune", "pesp"): 0.30}, against="divprune")
    assert texts[1] == (
        "The best of the others is DivPrune with original (PESP) position ids at 30.0 % [27.0, 33.0]; pairs were held "
        "against another trial than Nüwa (evaluate.against), so nothing is said on the paper’s claim."
    )


@pytest.mark.parametrize(
    ("original", "word"), [(0.30, "matter"), (0.12, "make no clear difference"), (0.02, "do not help")]
)
def test_position_ids(sentences, original, word):
    text = sentences({("nuwa", "pesp"): 0.5, ("visionzip", "perc"): 0.10, ("visionzip", "pesp"): original})[-1]
    low = max(0.0, 100 * original - 3)
    assert text == (
        f"Position ids {word}: the same VisionZip tokens keep {100 * original:.1f} % "
        f"[{low:.1f}, {100 * original + 3:.1f}] with original (PESP) ids, and 10.0 % [7.0, 13.0] with compressed ones."
    )


def test_without_nuwa_the_claim_is_left_alone(sentences):
    assert sentences({("visionzip", "perc"): 0.05, ("random", "pesp"): 0.21}) == [
        "At 11 % of the tokens (16 of 144 on average) this run has no grounding result of Nüwa, so it says nothing on "
        "the paper’s claim; Random with original (PESP) position ids keeps most, 21.0 % [18.0, 24.0]."
    ]


def test_nuwa_alone_has_no_verdict(sentences):
    assert len(sentences({("nuwa", "pesp"): 0.47})) == 1


def test_the_released_preset_speaks_for_nuwa(synthetic, tmp_path):
    run = synthetic(images=1)
    run.add_main(
        {("nuwa", preset, "pesp"): ((value,) * 3, VQA) for preset, value in (("paper", 0.6), ("released", 0.5))}
    )
    text = finding(Outcomes(ReportInputs.load(run.write(tmp_path / "data"))), 16)[0]
    assert "Nüwa (released) keeps 50.0" in text
