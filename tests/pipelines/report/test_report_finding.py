"""The sentences say what the numbers say, whichever way they point. Intervals of the synthetic run are ± 3 points."""

from __future__ import annotations

import pytest

from pipelines.report.finding import finding
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes

VQA = (0.9, 0.9, 0.9)


@pytest.fixture
def sentences(synthetic, tmp_path):
    """Grounding retention at 16 tokens of (method, position) → the finding."""

    def write(grounding: dict[tuple[str, str], float], budget: float = 16) -> list[str]:
        run = synthetic(images=1)
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


def test_ahead_beyond_the_intervals(sentences):
    assert sentences({("nuwa", "pesp"): 0.47, ("visionzip", "perc"): 0.05, ("random", "pesp"): 0.21}) == [
        "At 11 % of the tokens (16 of 144 on average), Nüwa keeps 47.0 % [44.0, 50.0] of grounding accuracy and "
        "90.0 % [87.0, 93.0] of visual question answering; VisionZip with compressed (PERC) position ids keeps "
        "5.0 % [2.0, 8.0] of the former and 90.0 % [87.0, 93.0] of the latter.",
        "The paper’s claim holds here: no other method keeps as much grounding, the next being Random with original "
        "(PESP) position ids at 21.0 % [18.0, 24.0].",
    ]


def test_behind_beyond_the_intervals_contradicts_the_paper(sentences):
    assert sentences({("nuwa", "pesp"): 0.20, ("visionzip", "perc"): 0.05, ("random", "pesp"): 0.41})[1] == (
        "On these data the paper’s claim does not hold: Random with original (PESP) position ids keeps more grounding than Nüwa, "
        "41.0 % [38.0, 44.0], and the intervals do not overlap."
    )


@pytest.mark.parametrize(
    ("control", "verdict"),
    [
        (0.30, "beats its control"),
        (0.58, "is not told from its control, as their intervals overlap"),
        (0.90, "does not beat its control"),
    ],
)
def test_learnpruner_is_held_against_its_random_control(sentences, control, verdict):
    text = sentences({("nuwa", "pesp"): 0.40, ("learnpruner", "pesp"): 0.60, ("random", "pesp"): control})[-1]
    span = f"{100 * control:.1f} % [{100 * control - 3:.1f}, {100 * control + 3:.1f}]"
    assert text == (
        "LearnPruner’s learned choice of tokens against a random one behind the same stage 2: on grounding it "
        f"{verdict} (60.0 % [57.0, 63.0] against {span}); on visual question answering it is not told from its "
        "control, as their intervals overlap (90.0 % [87.0, 93.0] against 90.0 % [87.0, 93.0])."
    )


def test_without_its_control_nothing_is_said_of_learnpruner(sentences):
    texts = sentences({("nuwa", "pesp"): 0.40, ("learnpruner", "pesp"): 0.60, ("random", "perc"): 0.1})
    assert not any("random one behind" in text for text in texts)


@pytest.mark.parametrize(("other", "order"), [(0.38, "ahead of"), (0.40, "level with"), (0.42, "behind")])
def test_overlapping_intervals_settle_nothing(sentences, other, order):
    text = sentences({("nuwa", "pesp"): 0.40, ("divprune", "pesp"): other})[1]
    assert text == (
        f"These data neither confirm nor refute the paper’s claim: Nüwa is {order} DivPrune with original (PESP) position "
        f"ids, {100 * other:.1f} % [{100 * other - 3:.1f}, {100 * other + 3:.1f}], but their intervals overlap."
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
