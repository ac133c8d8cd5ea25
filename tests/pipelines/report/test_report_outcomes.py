"""Which trials are rows, which are ablations, how they are named and ordered."""

from __future__ import annotations

import pytest

from pipelines.report.ablations import ablation
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes, varying
from pipelines.report.pairs import pair_table
from pipelines.report.published import published_ablations, published_model, published_retention, published_scores

KEPT = (0.5, 0.9)
ATTENTION = "attention_last_token"


@pytest.fixture
def outcomes_of(tmp_path):
    def load(run) -> Outcomes:
        return Outcomes(ReportInputs.load(run.write(tmp_path / "data")))

    return load


def test_main_and_ablation_grids_are_told_apart(full_run):
    outcomes = Outcomes(ReportInputs.load(full_run))
    assert outcomes.ablations == ["components", "distance", "stage2"]
    assert all("main" in trial.grids for trial in outcomes.main)
    assert len(outcomes.main) == len(outcomes.grid("main")) == 38
    shared = next(trial for trial in outcomes.main if "stage2" in trial.grids)  # an ablation's base is a row as well
    assert set(shared.grids) == {"main", "stage2", "distance", "components"}
    assert [column.benchmark for column in outcomes.columns] == [
        "refcoco", "refcocoplus", "refcocog", "pope", "gqa", "textvqa",
    ]  # fmt: skip


def test_a_run_whose_every_grid_is_an_ablation_has_no_table_of_pairs(full_run):
    """As ``experiments/nuwa_table7``, whose one grid varies a threshold."""
    outcomes = Outcomes(ReportInputs.load(full_run))
    assert outcomes.held_against(16) is not None and pair_table(outcomes, 16) is not None
    outcomes.main = []
    assert pair_table(outcomes, 16) is None


def test_varying_leaves_out_what_follows_from_the_rest(full_run):
    outcomes = Outcomes(ReportInputs.load(full_run))
    assert varying(outcomes.grid("stage2")) == ["stage2_layer", "stage2_scorer"]
    assert varying(outcomes.grid("distance")) == ["distance_threshold"]
    assert varying(outcomes.grid("components")) == ["stage2_scorer", "pillars", "separation"]
    # Nüwa cuts at layer 4, FastV at 2, others nowhere: the layer is the method's, so it varies nothing of its own
    assert varying(outcomes.grid("main")) == ["method", "preset", "position", "budget"]


def test_a_ratio_shows_as_k1(synthetic, outcomes_of):
    run = synthetic(images=1)
    for keep in (20, 24, 28):
        run.add("nuwa", "released", "pesp", 16, KEPT, ("ratio",), layer=4, scorer=ATTENTION, keep=keep)
    outcomes = outcomes_of(run)
    assert outcomes.ablations == ["ratio"]
    assert varying(outcomes.grid("ratio")) == ["stage1_keep"]


def test_grids_of_positions_and_budgets_are_rows(synthetic, outcomes_of):
    run = synthetic(images=1)
    for position in ("perc", "pesp", "rpme"):
        run.add("visionzip", "default", position, 16, KEPT, ("positions",))
    outcomes = outcomes_of(run)
    assert outcomes.ablations == []
    assert [trial.position for trial in outcomes.main] == ["pesp", "perc", "rpme"]


def test_names_tell_presets_parameters_and_seeds_apart(synthetic, outcomes_of):
    run = synthetic(images=1)
    run.add("nuwa", "paper", "pesp", 16, KEPT, ("main",), layer=4, scorer="cosine_mean_text")
    run.add("nuwa", "released", "pesp", 16, KEPT, ("main",), layer=4, scorer=ATTENTION)
    run.add("visionzip", "default", "pesp", 16, KEPT, ("main",))
    run.add("pooling", "default", "pesp", 16, KEPT, ("main",), {"align": False})
    for seed in (0, 1):
        run.add("random", "default", "pesp", 16, KEPT, ("main",), seed=seed)
    outcomes = outcomes_of(run)
    assert [outcomes.name(trial) for trial in outcomes.main] == [
        "Nüwa (released)", "Nüwa (paper)", "VisionZip", "Pooling (align off)", "Random (seed 0)", "Random (seed 1)",
    ]  # fmt: skip


def test_a_parameter_a_trial_leaves_alone_has_its_presets_value(full_run):
    outcomes = Outcomes(ReportInputs.load(full_run))
    untouched = next(trial for trial in outcomes.grid("distance") if not trial.params)
    assert untouched.setting("distance_threshold") == 280 / 1058
    assert untouched.setting("stage2_layer") == 4


def test_scores_in_points_are_not_made_per_cent(synthetic, outcomes_of):
    run = synthetic(images=1)
    for row in run.scores:
        if row["benchmark"] == "gqa":
            row.update(benchmark="mme", metric="sum", score=1706.869)
    outcomes = outcomes_of(run)
    columns = {column.benchmark: column for column in outcomes.columns}
    assert columns["mme"].text(1706.869) == "1706.9"
    assert columns["pope"].text(0.8567) == "85.7"


def titles(panels) -> list[str]:
    return [panel.title for panel in panels]


def test_ablations_with_a_published_twin_draw_it_apart(full_run):
    outcomes, scores = Outcomes(ReportInputs.load(full_run)), published_scores()
    distance = ablation(outcomes, "distance", scores)
    assert titles(distance.panels) == ["This run: Grounding", "This run: VQA", "Published: Grounding", "Published: VQA"]
    assert [panel.published for panel in distance.panels] == [False, False, True, True]
    assert distance.published == "Nüwa, table 7: LLaVA-1.5-7B, 64 of 576 average tokens"
    assert distance.constant == (
        "Nüwa, preset released, original (PESP) ids, 16 average tokens, stage 2 at layer 4 by attention last token"
    )
    assert [row.settings for row in distance.rows] == [["0.02"], ["0.14"], ["0.265"], ["0.52"], ["0.76"], ["1"]]
    components = ablation(outcomes, "components", scores)
    assert components.parameters == ["regions", "pillars", "stage-2 scorer"]
    assert components.rows[0].settings == ["off", "off", "attention last token"]
    assert components.rows[-1].settings == ["on", "on", "random"]
    assert components.published == "Nüwa, table 8: LLaVA-1.5-7B, 128 of 576 average tokens"
    stage2 = ablation(outcomes, "stage2", scores)
    assert titles(stage2.panels) == ["Grounding", "VQA"]
    assert stage2.published == ""


def test_an_ablation_too_large_to_draw_keeps_its_table(synthetic, outcomes_of):
    run = synthetic(images=1)
    for layer in (2, 3, 4):
        for scorer in ("random", ATTENTION):
            for quantile in range(7):
                params = {"pillar_quantile": quantile / 10}
                run.add("nuwa", "released", "pesp", 16, KEPT, ("large",), params, layer, scorer)
    item = ablation(outcomes_of(run), "large", published_scores())
    assert item.panels == []
    assert len(item.rows) == 42


def test_published_retention_by_hand():
    rows, unanchored = published_retention(published_scores())
    found = {(row.method, row.position, row.family, round(row.share, 3)): row for row in rows}
    pooling = found["pooling", "", "grounding", 0.111]
    by_hand = (12.01 / 58.30 + 11.84 / 56.42 + 12.20 / 59.43 + 7.55 / 38.88 + 11.40 / 48.50) / 5
    assert (pooling.retention, pooling.tasks) == (pytest.approx(by_hand), 5)
    extended = found["visionzip", "rpme", "grounding", 0.111]  # one split of the two printed has an unpruned score
    assert (extended.retention, extended.tasks) == (pytest.approx(11.57 / 58.30), 1)
    assert unanchored == ["divprune", "learnpruner", "vispruner"]


@pytest.mark.parametrize(
    ("path", "name", "share", "family", "tasks"),
    [
        ("models/llava-hf/llava-v1.6-vicuna-7b-hf", "LLaVA-NeXT-7B", 160 / 2880, "grounding", 4),
        ("models/Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B", 0.25, "vqa", 6),
        ("models/llava-hf/llava-1.5-7b-hf", "LLaVA-1.5-7B", 64 / 576, "grounding", 5),
        ("models/testbed", "LLaVA-1.5-7B", 64 / 576, "grounding", 5),
    ],
)
def test_a_run_stands_beside_the_figures_of_its_own_model(path, name, share, family, tasks):
    model, same = published_model(path)
    assert same == ("testbed" not in path)
    rows, _ = published_retention(published_scores(), model)
    mine = [row for row in rows if (row.method, row.family) == ("nuwa", family) and abs(row.share - share) < 1e-9]
    assert model.name == name and [row.tasks for row in mine] == [tasks]


def test_published_ablation_by_hand():
    row = next(row for row in published_ablations("nuwa table 7", published_scores()) if row.setting == "280")
    assert row.vqa == pytest.approx((58.33 / 61.9 + 62.0275 / 64.7 + 1706.869 / 1862) / 3)
    assert row.grounding == pytest.approx((29.43 / 58.30 + 28.22 / 59.43 + 17.47 / 38.88 + 21.81 / 48.50) / 4)


def test_rows_with_their_authors_own_position_ids_stand_first(synthetic, outcomes_of):
    """VisionZip packs what it keeps anew, FastV leaves the ids as they are; the other strategies follow."""
    run = synthetic(images=1)
    for method in ("visionzip", "fastv"):
        for position in ("rpme", "pesp", "perc"):
            run.add(method, "default", position, 16, KEPT, ("main",))
    rows = [(trial.method, trial.position, trial.own) for trial in outcomes_of(run).at_budget(16)]
    assert rows[:2] == [("visionzip", "perc", True), ("fastv", "pesp", True)]
    assert sorted(rows[2:]) == [
        (method, position, False)
        for method, position in (
            ("fastv", "perc"), ("fastv", "rpme"), ("visionzip", "pesp"), ("visionzip", "rpme"),
        )
    ]  # fmt: skip


def test_spread_over_seeds_stands_beside_spread_over_images(synthetic, outcomes_of):
    run = synthetic(images=2)
    for seed, kept in enumerate(((0.50, 0.80), (0.54, 0.80), (0.52, 0.86))):
        run.add("random", "default", "pesp", 16, kept, ("seeds",), seed=seed)
    item = ablation(outcomes_of(run), "seeds", published_scores())
    assert item.parameters == ["seed"] and [row.settings for row in item.rows] == [["0"], ["1"], ["2"]]
    assert [panel.title for panel in item.panels] == ["Grounding", "VQA"]
    assert item.seeds == (
        "Over 3 seeds: Grounding 52.0 on average, 50.0 to 54.0, standard deviation 2.0, where an interval over images "
        "reaches 3.0 to either side; VQA 82.0 on average, 80.0 to 86.0, standard deviation 3.5, where an interval over "
        "images reaches 3.0 to either side."
    )
