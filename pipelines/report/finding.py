"""What the run found, in sentences made of its numbers, whichever way they point.

The claim under test is Nüwa's (abstract): at 11 % of the tokens it keeps grounding that other methods lose (47 % of it
against VisionZip's 7 %) and about as much visual question answering. The verdict looks at grounding, where the methods
are said to differ, and calls one ahead of another where their paired difference is sure after correction for all pairs of
its kind (:mod:`pipelines.scores.comparisons`); intervals that overlap decide nothing.
"""

from __future__ import annotations

from pipelines.report.outcomes import FAMILIES, Difference, Estimate, Outcomes, TrialRow
from pipelines.report.style import benchmark_name, percent, plain_number, position_name
from pipelines.scores.comparisons import AGAINST, AHEAD, BEHIND, CONTROL, POSITION

FAMILY_WORDS = {"grounding": "grounding", "vqa": "visual question answering"}


def describe(estimate: Estimate) -> str:
    """``47.2 % [44.0, 50.1]``, with blanks that do not break."""
    return f"{percent(estimate.value)}\u00a0% [{percent(estimate.low)},\u00a0{percent(estimate.high)}]"


def points(difference: Difference) -> str:
    """``3.1 points [1.2, 5.0], p = 0.012``: how far apart, whichever is ahead."""
    ends = sorted((abs(difference.low), abs(difference.high))) if difference.low * difference.high > 0 else None
    low, high = ends or (difference.low, difference.high)
    return (
        f"{percent(abs(difference.value))}\u00a0points [{percent(low)},\u00a0{percent(high)}], {p_text(difference.p)}"
    )


def p_text(p: float) -> str:
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"


def finding(outcomes: Outcomes, budget: float) -> list[str]:
    """A few sentences: what Nüwa and VisionZip keep, who keeps most, what position ids change, and whether
    LearnPruner's learned choice beats a random one."""
    trials = outcomes.at_budget(budget)
    nuwa = _first(trials, "nuwa", ("pesp", "rpme", "perc"))
    ours = outcomes.retention(nuwa, "grounding") if nuwa is not None else None
    if nuwa is None or ours is None:
        return [_without_nuwa(outcomes, trials, budget), *_undefined(outcomes)]
    sentences = [_kept(outcomes, nuwa, ours, budget) + _beside(outcomes, trials)]
    rivals = _grounded(outcomes, [trial for trial in trials if trial.method != "nuwa"])
    if rivals:
        sentences.append(_verdict(outcomes, nuwa, max(rivals, key=_value), budget))
    further = [text for text in (_positions(outcomes, trials, budget), _learned(outcomes, trials, budget)) if text]
    return sentences + further + _undefined(outcomes)


def named(outcomes: Outcomes, budget: float) -> list[TrialRow]:
    """The trials that the answer is about: Nüwa's, the best other on grounding, VisionZip's and LearnPruner's."""
    trials = outcomes.at_budget(budget)
    others = _grounded(outcomes, [trial for trial in trials if trial.method != "nuwa"])
    best = max(others, key=_value)[0] if others else None
    chosen = [_first(trials, "nuwa", ("pesp", "rpme", "perc")), best]
    chosen += [
        _first(trials, "visionzip", ("perc", "pesp", "rpme")),
        _first(trials, "learnpruner", ("pesp", "rpme", "perc")),
    ]
    return list(dict.fromkeys(trial for trial in chosen if trial is not None))


def share_of_tokens(outcomes: Outcomes, budget: float) -> str:
    """``11 % of the tokens (16 of 144 on average)``."""
    total = outcomes.unpruned.image_tokens
    return f"{100 * budget / total:.0f}\u00a0% of the tokens ({plain_number(budget)} of {total} on average)"


def _first(trials: list[TrialRow], method: str, positions: tuple[str, ...]) -> TrialRow | None:
    """The method's trial with the first of ``positions``; presets in their order, ``released`` before others."""
    candidates = [trial for trial in trials if trial.method == method]
    return min(candidates, key=lambda trial: positions.index(trial.position), default=None)


def _ids(trial: TrialRow) -> str:
    return f"{position_name(trial.position)} position ids"


def _grounded(outcomes: Outcomes, trials: list[TrialRow]) -> list[tuple[TrialRow, Estimate]]:
    """Those of ``trials`` that have a grounding result, each with it."""
    return [(trial, known) for trial in trials if (known := outcomes.retention(trial, "grounding"))]


def _value(one: tuple[TrialRow, Estimate]) -> float:
    return one[1].value


def _kept(outcomes: Outcomes, nuwa: TrialRow, ours: Estimate, budget: float) -> str:
    text = f"At {share_of_tokens(outcomes, budget)}, {outcomes.name(nuwa)} keeps {describe(ours)} of grounding accuracy"
    vqa = outcomes.retention(nuwa, "vqa")
    return text + (f" and {describe(vqa)} of visual question answering" if vqa is not None else "")


def _beside(outcomes: Outcomes, trials: list[TrialRow]) -> str:
    """The end of that sentence: what VisionZip keeps, where it has a result."""
    grounded = [trial for trial, _ in _grounded(outcomes, trials)]
    visionzip = _first(grounded, "visionzip", ("perc", "pesp", "rpme"))
    grounding = outcomes.retention(visionzip, "grounding") if visionzip is not None else None
    if visionzip is None or grounding is None:
        return "."
    text = f"; VisionZip with {_ids(visionzip)} keeps {describe(grounding)} of the former"
    vqa = outcomes.retention(visionzip, "vqa")
    return text + (f" and {describe(vqa)} of the latter." if vqa is not None else ".")


def _verdict(outcomes: Outcomes, nuwa: TrialRow, rival: tuple[TrialRow, Estimate], budget: float) -> str:
    best, other = rival
    name, rival_name = outcomes.name(nuwa), f"{outcomes.name(best)} with {_ids(best)}"
    lead = outcomes.difference(AGAINST, budget, best, nuwa, "grounding")
    if lead is None:
        return (
            f"The best of the others is {rival_name} at {describe(other)}; pairs were held against another trial than "
            f"{name} (evaluate.against), so nothing is said on the paper’s claim."
        )

    told = f"{points(lead)} after correction for {lead.together} comparisons"
    if lead.verdict == BEHIND:
        return (
            f"The paper’s claim holds here: no other method keeps as much grounding, the next being {rival_name} at "
            f"{describe(other)}, behind by {told}."
        )
    if lead.verdict == AHEAD:
        return (
            f"On these data the paper’s claim does not hold: {rival_name} keeps more grounding than {name}, "
            f"{describe(other)}, ahead by {told}."
        )
    order = "ahead" if lead.value < 0 else "level" if lead.value == 0 else "behind"
    return (
        f"These data neither confirm nor refute the paper’s claim: {name} is {order} in the sample, but is not told apart "
        f"from {rival_name}, {describe(other)}: {told}."
    )


def _positions(outcomes: Outcomes, trials: list[TrialRow], budget: float) -> str | None:
    """Finding 3 of the paper: other position ids with the same VisionZip tokens."""
    by_position = {trial.position: trial for trial in trials if trial.method == "visionzip"}
    compressed = by_position.pop("perc", None)
    below = outcomes.retention(compressed, "grounding") if compressed is not None else None
    if compressed is None or below is None:
        return None
    others = []
    for _, trial in sorted(by_position.items()):
        estimate = outcomes.retention(trial, "grounding")
        difference = outcomes.difference(POSITION, budget, trial, compressed, "grounding")
        if estimate is not None and difference is not None:
            others.append((trial, estimate, difference))
    if not others:
        return None

    parts = " and ".join(f"{describe(kept)} with {position_name(trial.position)} ids" for trial, kept, _ in others)
    best = max(others, key=lambda other: other[1].value)[2]
    word = {AHEAD: "matter", BEHIND: "do not help"}.get(best.verdict, "make no clear difference")
    return f"Position ids {word}: the same VisionZip tokens keep {parts}, and {describe(below)} with compressed ones."


def _learned(outcomes: Outcomes, trials: list[TrialRow], budget: float) -> str | None:
    """LearnPruner against its control: random tokens behind the same stage 2."""
    learned = _first(trials, "learnpruner", ("pesp", "rpme", "perc"))
    if learned is None:
        return None
    parts = []

    for family, name in FAMILY_WORDS.items():
        for control in (trial for trial in outcomes.trials if trial.method == "random"):
            difference = outcomes.difference(CONTROL, budget, learned, control, family)
            ours, other = outcomes.retention(learned, family), outcomes.retention(control, family)
            if difference is None or ours is None or other is None:
                continue
            verdict = {AHEAD: "beats its control", BEHIND: "does not beat its control"}.get(
                difference.verdict, "is not told from its control"
            )
            told = f"{describe(ours)} against {describe(other)}, {p_text(difference.p)}"
            parts.append(f"on {name} it {verdict} ({told})")
    if not parts:
        return None
    return f"LearnPruner’s learned choice of tokens against a random one behind the same stage 2: {'; '.join(parts)}."


def _undefined(outcomes: Outcomes) -> list[str]:
    """A sentence where retention would be a share of nothing."""
    scores = {column.benchmark: outcomes.score(outcomes.unpruned, column.benchmark) for column in outcomes.columns}
    nothing = [benchmark_name(name) for name, score in scores.items() if score is not None and score.value == 0]
    if not nothing:
        return []
    families = " and ".join(FAMILY_WORDS[family] for family in FAMILIES if _is_undefined(outcomes, family))
    return [
        f"The unpruned model scores 0 on {', '.join(nothing)}: retention on {families} is a share of nothing and left out."
    ]


def _is_undefined(outcomes: Outcomes, family: str) -> bool:
    known = any(column.family == family for column in outcomes.columns)
    return known and outcomes.retention(outcomes.unpruned, family) is None


def _without_nuwa(outcomes: Outcomes, trials: list[TrialRow], budget: float) -> str:
    start = f"At {share_of_tokens(outcomes, budget)} this run has no grounding result of Nüwa"
    known = _grounded(outcomes, trials)
    if not known:
        return f"{start}, and none of any other method."
    best, grounding = max(known, key=_value)
    return (
        f"{start}, so it says nothing on the paper’s claim; {outcomes.name(best)} with {_ids(best)} keeps most, "
        f"{describe(grounding)}."
    )
