"""params.yaml: what is wrong is told in one line before anything runs."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml

from nuwa.grid import PatchGrid
from nuwa.methods import RECIPES
from nuwa.stage2 import SCORERS
from pipelines.settings import SettingsError, SweepSettings, load_settings, parse_settings
from pipelines.sweep.trials import Layouts, expand

GRID, LAYERS = Layouts.fixed(PatchGrid(12, 12)), 8


def write(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_projects_own_file_is_valid(params, tmp_path):
    settings = load_settings(write(tmp_path, params))
    assert settings.sweep.budgets == [16, 32, 48]
    trials = expand(settings.sweep, GRID, LAYERS)
    assert len(trials) >= 40
    assert len({trial.trial_id for trial in trials}) == len(trials)
    assert len({trial.label for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("sweep", "bugdets"), [16], "sweep.bugdets: unknown key; see docs/params.md for the keys that exist"),
        (
            ("features", "dtype"),
            "float8",
            "features.dtype = 'float8': Input should be 'float16' or 'float32'",
        ),
        (
            ("sweep", "store"),
            "nowhere://bucket",
            "sweep.store: 'nowhere://bucket' is of an unknown scheme; allowed: a folder, s3, gs, abfs, abfss, hdfs, or a "
            "scheme of fsspec",
        ),
        (("sweep", "store"), "s3://", "sweep.store: 's3://' names no place; write it as s3://bucket/folder"),
        (
            ("features", "store"),
            "~/features",
            "features.store: '~/features': ~ is a shell's word for a home folder; write the folder out",
        ),
        (("sweep", "store"), "", "sweep.store = '': String should have at least 1 character"),
        (("sweep", "budgets"), [0], "sweep.budgets.0 = 0: Input should be greater than 0"),
        (("cluster", "workers"), 0, "cluster.workers = 0: Input should be greater than or equal to 1"),
        (("cluster", "gpus"), 0.3, "cluster: gpus 0.3 must be 0, a whole number or 1/k (0.5, 0.25, 0.2, ...)"),
        (
            ("sweep", "benchmarks"),
            ["pope", "pope:first_sentence"],
            "sweep: benchmark 'pope' is named more than once; a sweep scores one variant of each",
        ),
        (("sweep", "images"), True, "sweep.images = True: Input should be a valid integer"),
        (("sweep", "images"), {"gqa": 0}, "sweep.images.gqa = 0: Input should be greater than or equal to 1"),
        (
            ("sweep", "images"),
            {"mme": 5},
            "sweep: images: 'mme' is not in sweep.benchmarks; allowed: refcoco, refcocoplus, refcocog, pope, gqa, textvqa",
        ),
        (("sweep", "images"), {"gqa": 401}, "sweep.images = 401: prepare.images makes 400"),
        (("sweep", "reuse"), "never", "sweep.reuse = 'never': Input should be 'any' or 'same_versions'"),
        (("sweep", "images"), 401, "sweep.images = 401: prepare.images makes 400"),
        (("sweep", "benchmarks"), ["mme"], "sweep.benchmarks: 'mme' is not in prepare.questions; add it there"),
        (
            ("prepare", "questions"),
            {"mme": 1},
            "prepare.questions: 'mme' is unknown; allowed: refcoco, refcocoplus, refcocog, pope, gqa, textvqa",
        ),
        (
            ("report", "headline_budget"),
            17,
            "report.headline_budget = 17 is swept by no grid; swept: 16, 18, 32, 36, 48",
        ),
        (("prepare", "seed"), -1, "prepare.seed = -1: Input should be greater than or equal to 0"),
        (
            ("sweep", "grids"),
            [{"name": "a", "method": "nuwer"}],
            f"sweep: method 'nuwer' of grid 'a' is unknown; allowed: {', '.join(sorted(RECIPES))}",
        ),
        (
            ("sweep", "grids"),
            [{"name": "a", "method": "nuwa", "position": "pesq"}],
            "sweep.grids.0.position = 'pesq': Input should be 'own', 'perc', 'pesp', 'rpme' or 'gap'",
        ),
    ],
)
def test_one_line_names_key_value_and_what_is_allowed(params, tmp_path, keys, value, message):
    bent = copy.deepcopy(params)
    section = bent
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    path = write(tmp_path, bent)
    with pytest.raises(SettingsError) as raised:
        load_settings(path)
    assert str(raised.value) == f"{path}: {message}"


SPACE = ("search", "swarm", "space")
QUANTILE = (*SPACE, "parameters")
NUWA = "separation, region_side, candidates_per_region, salience, pillars, pillar_signal, pillar_quantile, aggregation, distance_threshold, distance_convention, reset_self_weight"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (QUANTILE, {"pilar": [1]}, f"search.swarm: space.parameters.pilar: nuwa has no parameter 'pilar'; allowed: {NUWA}"),
        (
            QUANTILE,
            {"pillar_quantile": {"low": 0.7, "high": 0.3}},
            "search.swarm.space.parameters.pillar_quantile: low 0.7 must lie below high 0.3",
        ),
        (
            QUANTILE,
            {"pillar_quantile": {"low": 0.5, "high": 0.5}},
            "search.swarm.space.parameters.pillar_quantile: low 0.5 must lie below high 0.5",
        ),
        (
            QUANTILE,
            {"pillar_quantile": {"low": 0.5, "high": 1.5}},
            "search.swarm: space.parameters.pillar_quantile: nuwa.pillar_quantile 1.5 must lie in [0, 1]",
        ),
        (
            QUANTILE,
            {"separation": ["yes"]},
            "search.swarm: space.parameters.separation: nuwa.separation 'yes' is of the wrong type; allowed: bool",
        ),
        (
            QUANTILE,
            {"pillar_quantile": []},
            "search.swarm.space.parameters.pillar_quantile: must be a list of at least one choice, or a range {low: ..., high: ...}",
        ),
        (
            QUANTILE,
            {"pillar_quantile": {"low": 0.1}},
            "search.swarm.space.parameters.pillar_quantile: a range needs both ends: {low: ..., high: ...}",
        ),
        (
            QUANTILE,
            {"pillar_quantile": {"low": 0.0, "high": 1.0, "log": True}},
            "search.swarm.space.parameters.pillar_quantile: low 0 must be above 0 on a logarithmic range",
        ),
        (
            QUANTILE,
            {"pillar_quantile": [[0.1]]},
            "search.swarm.space.parameters.pillar_quantile: choice [0.1] must be a number, a word, true, false or null",
        ),
        (
            (*SPACE, "stage2_scorer"),
            ["attn"],
            "search.swarm: space.stage2_scorer: stage-2 scorer 'attn' is unknown; allowed: " + ", ".join(sorted(SCORERS)),
        ),
        ((*SPACE, "stage2_layer"), [2, "of"], "search.swarm.space: stage2_layer: 'of' must be a whole number or off"),
        (
            (*SPACE, "stage2_ratio"),
            {"low": 0.5, "high": 1.5},
            "search.swarm: space.stage2_ratio: stage-2 ratio K2/K1 1.5 must lie in (0, 1]",
        ),
        (SPACE, {}, "search.swarm: space: it has no axis; name parameters, stage2_layer, stage2_scorer or stage2_ratio"),
        (
            ("search", "swarm", "preset"),
            "papper",
            "search.swarm: nuwa has no preset 'papper'; allowed: released, released_next, released_qwen, paper, paper_next",
        ),
        (
            ("search", "shares"),
            [0.5, 0.25, 1.0],
            "search: shares [0.5, 0.25, 1.0] must rise and end with 1.0, all of the images",
        ),
        (("search", "shares"), [0.5], "search: shares [0.5] must rise and end with 1.0, all of the images"),
        (
            ("search", "confidence"),
            0.999,
            "search.confidence = 0.999 over 3 rungs needs evaluate.resamples of at least 3000, not 1000",
        ),
        (("search", "cost"), "tokens", "search.cost = 'tokens': Input should be 'average_tokens' or 'flops'"),
    ],
)  # fmt: skip
def test_a_wrong_search_is_refused_in_one_line(params, tmp_path, keys, value, message):
    test_one_line_names_key_value_and_what_is_allowed(params, tmp_path, keys, value, message)


def test_a_searchs_budget_is_in_the_sweeps_unit(params, tmp_path):
    params["sweep"] |= {"budget_unit": "share", "budgets": [0.5], "grids": [{"name": "a", "method": "random"}]}
    params["report"]["headline_budget"] = 0.5
    path = write(tmp_path, params)
    with pytest.raises(SettingsError) as raised:
        load_settings(path)
    assert str(raised.value) == f"{path}: search.swarm.budget = 16 must lie in (0, 1]: sweep.budget_unit is share"


def test_a_search_may_leave_out_hyper_parameters_and_off_is_a_word_there_too(params, tmp_path):
    params["search"]["swarm"]["space"]["stage2_layer"] = [2, False]
    assert load_settings(write(tmp_path, params)).search.swarm.space.stage2_layer.choices == [2, "off"]
    params["search"]["swarm"] = None
    assert load_settings(write(tmp_path, params)).search.swarm is None


def test_a_missing_section_a_missing_file_and_no_yaml(params, tmp_path):
    del params["evaluate"]
    path = write(tmp_path, params)
    with pytest.raises(SettingsError, match=r"evaluate: missing; see docs/params\.md for its meaning$"):
        load_settings(path)
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: no such file; run from the repository's top folder$"):
        load_settings(tmp_path / "nowhere.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(SettingsError, match=r"pipe\.yaml: no file but a pipe or a device; put the settings there$"):
        load_settings(tmp_path / "pipe.yaml")
    with pytest.raises(SettingsError, match="not YAML"):
        load_settings(write(tmp_path, "a: [1"))
    with pytest.raises(SettingsError, match="must hold a mapping of sections: model, prepare"):
        load_settings(write(tmp_path, "- 1\n"))


TEXT = (Path(__file__).parents[2] / "params.yaml").read_text()
LAUGHS = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10) if n else 'x'}]\n" for n in range(9))
HOSTILE = {  # what stands for ``seed: 2602`` of ``prepare``, and the message behind ``params.yaml: ``
    "a key twice": (
        "seed: 2602\n  seed: 7",
        "line 11: seed stands there twice, first in line 10; leave out one of the two",
    ),
    "a tab": (
        "\tseed: 2602",
        "not YAML: while scanning for the next token found character '\\t' that cannot start any token",
    ),
    "a date": ("seed: 2024-10-01", "prepare.seed = datetime.date(2024, 10, 1): Input should be a valid integer"),
    "no date": ("seed: 2024-13-45", "not YAML: '2024-13-45' is no timestamp in "),
    "a word that is said to be a number": ("seed: !!int abc", "not YAML: 'abc' is no int in "),
    "more digits than Python reads": (f"seed: {'9' * 5000}", "not YAML: '999"),
    "a number beyond NumPy's": ("seed: 4294967296", "prepare.seed = 4294967296: Input should be less than 4294967296"),
    "an alias within itself": (
        "seed: &x [*x]",
        "nested more than 40 levels deep, or an alias (*name) within what it names",
    ),
    "deep": (
        f"seed: {'[' * 60}{']' * 60}",
        "nested more than 40 levels deep, or an alias (*name) within what it names",
    ),
    "deeper than a parser goes": (f"seed: {'{a: ' * 900}1{'}' * 900}", "nested more than 40 levels deep, or an alias"),
    "aliases that multiply": ("seed: *k8", "holds more than 100,000 values; write out what aliases (*name) repeat"),
    "half an alias": ("seed: *nobody", "not YAML: found undefined alias 'nobody' in"),
    "a program": ("seed: !!python/name:os.system", "not YAML: could not determine a constructor for the tag"),
    "a NUL": ('seed: "a\\0"', "'a\\x00' holds a NUL character; take it out"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_yaml_passes_over_or_fails_on_is_one_line(kind):
    stands, message = HOSTILE[kind]
    text = TEXT.replace("seed: 2602", stands, 1) if "\t" not in stands else TEXT.replace("  seed: 2602", stands, 1)
    with pytest.raises(SettingsError) as caught:
        parse_settings((LAUGHS if "*k" in stands else "") + text, "params.yaml")
    assert str(caught.value).startswith(f"params.yaml: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["report", "plugins", "sweep"])
def test_a_section_that_stands_there_twice_is_refused(section):
    """YAML's own loader would take the last and say nothing."""
    with pytest.raises(SettingsError, match=f"line .*: {section} stands there twice, first in line "):
        parse_settings(f"{TEXT}\n{section}: []\n", "params.yaml")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("keys", [("cluster", "gpus"), ("cluster", "patience"), ("pruner", "learning_rate")])
def test_numbers_are_finite(params, keys, value, tmp_path):
    params[keys[0]][keys[1]] = value
    with pytest.raises(SettingsError) as caught:
        load_settings(write(tmp_path, params))
    assert str(caught.value).endswith(f"{'.'.join(keys)} = {value}: Input should be a finite number")


def sweep_with(params, *entries):
    return SweepSettings.model_validate(params["sweep"] | {"grids": list(entries)})


def test_an_impossible_budget_names_the_reachable_range(params):
    sweep = sweep_with(params, {"name": "g", "method": "fastv", "budget": 16})
    with pytest.raises(SettingsError) as raised:
        expand(sweep, GRID, LAYERS)
    assert str(raised.value) == (
        "sweep.grids.0 (g), method fastv: budget 16 is out of reach with a stage-2 cut before layer 1 of 8: "
        "allowed 18.88..144 average tokens; give the entry its own budget or set where_reachable: true"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"parameters": {"pilar": 1}}, "nuwa has no parameter 'pilar'; allowed: separation, region_side"),
        (
            {"preset": "papper"},
            "nuwa has no preset 'papper'; allowed: released, released_next, released_qwen, paper, paper_next",
        ),
        ({"stage2_layer": 8}, "stage-2 layer 8 must lie in 1..7: the model has 8 layers"),
        ({"stage2_scorer": "attn"}, "stage-2 scorer 'attn' is unknown; allowed: attention_all_text, "),
        ({"parameters": {"pillar_quantile": 1.5}}, "nuwa.pillar_quantile 1.5 must lie in [0, 1]"),
        ({"parameters": {"aggregation": "false"}}, "nuwa.aggregation 'false' is of the wrong type; allowed: bool"),
        ({"parameters": {"region_side": 2.5}}, "nuwa.region_side 2.5 is of the wrong type; allowed: int"),
        (
            {"parameters": {"distance_threshold": None}},
            "nuwa.distance_threshold None is of the wrong type; allowed: float",
        ),
        (
            {"method": "fastv", "stage2_layer": "off"},
            "fastv prunes in stage 2 only; stage2_layer: off would leave nothing of it",
        ),
        ({"budget": 145}, "budget 145 is out of reach with a stage-2 cut before layer 4 of 8: allowed 1..144"),
    ],
)
def test_impossible_trials_are_refused_by_name(params, entry, message):
    sweep = sweep_with(params, {"name": "g", "method": "nuwa", "budget": 16} | entry)
    with pytest.raises(SettingsError) as raised:
        expand(sweep, GRID, LAYERS)
    assert str(raised.value).startswith("sweep.grids.0 (g)")
    assert message in str(raised.value)


def test_yaml_reads_off_as_a_word_or_as_false(params):
    for off in ("off", False):
        (_, trial) = expand(
            sweep_with(params, {"name": "g", "method": "nuwa", "budget": 16, "stage2_layer": off}), GRID, LAYERS
        )
        assert trial.schedule.entering == [16] * LAYERS


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"attention": "flash_attention_2"},
            "attention flash_attention_2 needs dtype bfloat16 or float16, not float32",
        ),
        (
            {"conversation": "vicuna_v1"},
            "conversation vicuna_v1 is in words that prompt_style testbed's model does not know; allowed with it: template",
        ),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(params, model, message):
    params["model"] |= model
    with pytest.raises(SettingsError) as caught:
        parse_settings(yaml.safe_dump(params), "params.yaml")
    assert str(caught.value) == f"params.yaml: model: {message}"


# Protocols: what is prepared, asked and scored goes by one name.


def with_protocol(params, protocol, tables, benchmarks=None, style="llava_v1"):
    params["model"] |= {"prompt_style": style}
    params["prepare"] |= {"protocol": protocol, "tables": dict.fromkeys(tables, "tables/X")}
    params["sweep"] |= {"benchmarks": benchmarks or list(tables), "images": None}
    return parse_settings(yaml.safe_dump(params), "params.yaml")


def test_a_protocol_holds_for_every_benchmark_that_names_none(params):
    settings = with_protocol(params, "lmms_eval", ["gqa/testdev", "pope/test@llava", "textvqa/validation:ocr"])
    names = ["gqa/testdev@lmms_eval", "pope/test@llava", "textvqa/validation:ocr@lmms_eval"]
    assert settings.prepare.names == settings.sweep.benchmarks == names


def test_the_testbeds_protocol_is_never_spelt_out(params):
    named = with_protocol(params, "testbed", ["gqa/testdev", "pope/test@testbed"])
    assert named.prepare.names == named.sweep.benchmarks == ["gqa/testdev", "pope/test"]


@pytest.mark.parametrize(
    ("protocol", "tables", "style", "message"),
    [
        (
            "lmms",
            ["gqa/testdev"],
            "llava_v1",
            "prepare.protocol: protocol 'lmms' is unknown; allowed: llava, lmms_eval, lmms_eval_0_3, testbed, vscan; "
            "did you mean 'lmms_eval'?",
        ),
        (
            "vscan",
            ["gqa/testdev"],
            "llava_v1",
            "sweep: protocol of gqa 'vscan' is unknown; allowed: llava, lmms_eval, lmms_eval_0_3, testbed",
        ),
        (
            "lmms_eval",
            ["gqa/testdev"],
            "testbed",
            "prepare.protocol: 'lmms_eval' is in words that prompt_style testbed's model does not know; allowed with it: "
            "testbed",
        ),
        (
            "testbed",
            ["refcoco/testA", "refcocog/test:unpadded"],
            "llava_v1",
            "sweep.benchmarks: 'refcoco/testA' reads boxes as_published and 'refcocog/test:unpadded' unpadded; one table "
            "holds one of the two",
        ),
    ],
)
def test_protocols_that_cannot_be_are_refused(params, protocol, tables, style, message):
    with pytest.raises(SettingsError) as caught:
        with_protocol(params, protocol, tables, style=style)
    assert str(caught.value) == f"params.yaml: {message}"
