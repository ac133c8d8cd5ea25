"""What decides an answer decides whether it is asked again, and nothing else does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from bench import SLOW, Swept, same
from mutation.verdicts import BORROWED
from safetensors.torch import load_file, save_file

from nuwa.methods import RECIPES, specify
from nuwa.stage1 import get_method
from nuwa.stage2 import get_scorer
from nuwa.vlm import checkpoint
from pipelines.features.encoding import features_identity
from pipelines.features.identity import ModelIdentity
from pipelines.features.loading import Loading
from pipelines.settings import ClusterSettings, FeatureSettings
from pipelines.sweep.collection import Origins, collect
from pipelines.sweep.identity import answer_context, code_of, options_of, trial_code, with_code
from pipelines.sweep.provenance import merged, mixed, told
from pipelines.sweep.refill import PulledTables, table_facts
from pipelines.sweep.results import PARTS, ResultStore, StoredUnit, reuse_key
from pipelines.sweep.reuse import Changes, explain, summary
from pipelines.sweep.units import plan_units, read_examples

SETTINGS = FeatureSettings(dtype="float32", shard_images=5, batch_size=3)
GENERATION = {"eos_token_id": 2, "repetition_penalty": 1.0}


# Files of a model


@pytest.fixture(scope="module")
def family(tiny_vlm):
    return tiny_vlm


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    copy = shutil.copytree(model_folder, tmp_path / "model")
    (copy / "generation_config.json").write_text(json.dumps(GENERATION))
    (copy / "README.md").write_text("a model")
    return copy


def identities(folder: Path, vlm, memory: Path) -> tuple[str, str]:
    """Of features and of answers."""
    known = ModelIdentity.of(str(folder), Loading(), vlm, memory)
    return features_identity(known, vlm, "float32").digest, answer_context(known, vlm, SETTINGS).digest


def edit_json(name: str, *keys: str, value: object):
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        section = content
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return edit


def edit_tensor(part: str):
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        name = next(name for name in sorted(state) if part in name)
        state[name] = state[name] + torch.ones_like(state[name])
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return edit


ANSWERS_ONLY = {
    "rope_theta": edit_json("config.json", "text_config", "rope_parameters", "rope_theta", value=123.0),
    "hidden_act": edit_json("config.json", "text_config", "hidden_act", value="gelu"),
    "rms_norm_eps": edit_json("config.json", "text_config", "rms_norm_eps", value=1e-2),
    "repetition_penalty": edit_json("generation_config.json", "repetition_penalty", value=1.2),
    "eos_token_id": edit_json("generation_config.json", "eos_token_id", value=[2, 5]),
    "a template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "the tokenizer": edit_json("tokenizer_config.json", "add_bos_token", value=False),
    "weights of the language model": edit_tensor("language_model"),
    "weights of the projector": edit_tensor("projector"),
}
FEATURES_TOO = {
    "the encoder's activation": edit_json("config.json", "vision_config", "hidden_act", value="relu"),
    "the layer that is read": edit_json("config.json", "vision_feature_layer", value=-1),
    "weights of the encoder": edit_tensor("vision_tower"),
}


def reordered(folder: Path) -> None:
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            path.write_text(json.dumps(dict(reversed(content.items())), indent=3))


NOTHING = {
    "the order of keys": reordered,
    "a README": lambda folder: (folder / "README.md").write_text("another README"),
    "a note beside": lambda folder: (folder / "notes.json").write_text("{}"),
    "who saved it": edit_json("config.json", "transformers_version", value="0.0.1"),
    "a time stamp": lambda folder: (folder / "model.safetensors").touch(),
}


@pytest.mark.parametrize("name", ANSWERS_ONLY)
def test_files_that_decide_answers_make_them_new(folder, family, tmp_path, name):
    features, answers = identities(folder, family, tmp_path)
    ANSWERS_ONLY[name](folder)
    after = identities(folder, family, tmp_path)
    assert after[0] == features, "no image is encoded again"
    assert after[1] != answers


@pytest.mark.parametrize("name", FEATURES_TOO)
def test_files_that_decide_features_make_both_new(folder, family, tmp_path, name):
    features, answers = identities(folder, family, tmp_path)
    FEATURES_TOO[name](folder)
    after = identities(folder, family, tmp_path)
    assert after[0] != features and after[1] != answers


@pytest.mark.parametrize("name", NOTHING)
def test_files_that_decide_nothing_remake_nothing(folder, family, tmp_path, name):
    before = identities(folder, family, tmp_path)
    NOTHING[name](folder)
    assert identities(folder, family, tmp_path) == before


def test_another_backend_of_the_processor_is_another_model(folder, family, tmp_path, monkeypatch):
    before = identities(folder, family, tmp_path)
    usual = type(family.processor.image_processor)
    backend = type(
        f"{usual.__name__}Fast", (usual,), {}
    )  # as the one that torchvision brings: same settings, other pixels
    monkeypatch.setattr(family.processor, "image_processor", backend(**vars(family.processor.image_processor)))
    after = identities(folder, family, tmp_path)
    assert after[0] != before[0] and after[1] != before[1]


def test_a_worker_reads_no_weights_to_know_its_model(bench, tmp_path, monkeypatch):
    """The driver tells it: weights are read once a machine and change of files, never once a worker."""
    read = []
    monkeypatch.setattr(checkpoint, "_read_digests", lambda path: read.append(path) or iter(()))
    worker = bench.spec(tmp_path).build()
    assert worker.vlm.layers == 8
    assert read == []


def test_how_a_model_is_loaded_counts(folder, family, tmp_path):
    ways = [
        Loading(),
        Loading("bfloat16"),
        Loading("float16"),
        Loading(attention="eager"),
        Loading(conversation="llava_v1"),
    ]
    known = [ModelIdentity.of(str(folder), way, family, tmp_path) for way in ways]
    assert len({answer_context(one, family, SETTINGS).digest for one in known}) == len(ways)
    assert len({features_identity(one, family, "float32").digest for one in known}) == 3, "by dtype alone"


def test_how_many_tokens_pass_at_once_counts_in_half_precision_alone(folder, family, tmp_path):
    def contexts(dtype: str) -> set[str]:
        ways = [Loading(dtype), Loading(dtype, pass_tokens=64), Loading(dtype, pass_tokens=65)]
        known = [ModelIdentity.of(str(folder), way, family, tmp_path) for way in ways]
        assert len({features_identity(one, family, "float32").digest for one in known}) == 1
        return {answer_context(one, family, SETTINGS).digest for one in known}

    assert {dtype: len(contexts(dtype)) for dtype in ("float32", "bfloat16", "float16")} == {
        "float32": 1,
        "bfloat16": 3,
        "float16": 3,
    }


# Stored answers


@pytest.fixture(scope="module")
def coded(bench, family):
    return replace(bench, trials=with_code(bench.trials, family, "cpu"))


@pytest.fixture(scope="module")
def stored(coded, cluster_of_one, tmp_path_factory) -> tuple[Path, Swept]:
    place = tmp_path_factory.mktemp("stored")
    return place, coded.run(place, cluster_of_one)


@pytest.fixture(scope="module")
def cluster_of_one():
    return ClusterSettings(address=None, workers=1, cpus=1, gpus=0)


def cached(bench, store: Path, trials=None, reuse="any") -> int:
    held = [(unit.trials, unit.examples) for unit in ResultStore(store).done()]
    return plan_units(trials or bench.trials, bench.examples, held, bench.costs, SLOW, 4, reuse=reuse)[1]


def test_answers_of_other_code_are_not_taken(coded, stored, family):
    place, _ = stored
    everything = len(coded.trials) * len(coded.examples)
    assert cached(coded, place) == everything
    changed = coded.trials[1]
    other = [*coded.trials[:1], changed.coded("f" * 12 + changed.code[12:]), *coded.trials[2:]]
    assert cached(coded, place, other) == everything - len(coded.examples)
    assert cached(coded, place) == everything, "two versions of the code share a store without harming each other"


def test_answers_of_other_versions_are_taken_unless_that_is_refused(coded, stored):
    place, _ = stored
    elsewhere = [trial.coded(f"{trial.code.partition('.')[0]}.{'0' * 8}") for trial in coded.trials]
    everything = len(coded.trials) * len(coded.examples)
    assert cached(coded, place, elsewhere) == everything
    assert cached(coded, place, elsewhere, reuse="same_versions") == 0
    assert cached(coded, place, reuse="same_versions") == everything


def test_provenance_stands_beside_every_unit(stored):
    place, _ = stored
    for unit in ResultStore(place).done():
        origin = unit.origin
        assert origin["torch"] == torch.__version__ and origin["device"] == "cpu"
        assert origin["dtype"] == "float32" and origin["kernel"] == "sdpa" and origin["threads"] == 1
        assert sum(origin["batches"]) <= 4


def test_provenance_that_is_mixed_is_one_line():
    here = {"torch": "2.8", "transformers": "5.0", "device": "cpu", "hardware": "x86_64", "batches": [4]}
    there = here | {"torch": "2.9", "batches": [1]}
    assert mixed(told([here, here | {"batches": [2]}])) == ""
    assert mixed(told([here, there])) == (
        "answers of mixed provenance: torch 2.8, transformers 5.0, device cpu, hardware x86_64; "
        "torch 2.9, transformers 5.0, device cpu, hardware x86_64"
    )
    assert merged([here, there])["torch"] == "2.8 and 2.9"


def test_the_code_of_a_trial_names_its_own_files(coded, family):
    files = {trial.spec.method: set(code_of(trial, family).parts) for trial in coded.trials}
    assert "code of nuwa/stage1/nuwa.py" in files["nuwa"] - files["visionzip"]
    assert "code of nuwa/stage1/visionzip.py" in files["visionzip"] - files["nuwa"]
    every = set.intersection(*files.values())
    assert {"code of nuwa/decoder/trunk.py", "code of pipelines/sweep/answers.py", "code of nuwa/vlm/llava.py"} <= every
    assert not any(
        "llava_next" in name or "qwen" in name or "benchmarks" in name for name in set.union(*files.values())
    )


@pytest.mark.parametrize("name", RECIPES)
def test_no_trial_runs_the_file_of_another_method_or_scorer(name):
    """Beside its own file and what every cut is made of, only what it takes from another's by name."""
    spec = specify(name, budget=None if name == "unpruned" else 64)
    scorers = spec.stage2.scorer_names if spec.stage2 else ()
    module = get_method(spec.stage1).select.__module__
    modules = {module, *(get_scorer(scorer).score.__module__ for scorer in scorers)}
    own = {f"{one.replace('.', '/')}.py" for one in modules} | BORROWED.get(module, set())
    shared = {f"nuwa/stage2/{one}.py" for one in ("cut", "projections", "scorers")}
    options = options_of(spec.stage2) if spec.stage2 else ()
    shared |= {f"nuwa/stage2/{option}.py" for option in options}
    code = trial_code(name, spec.stage1, scorers, options, "llava", "llama")
    ran = {one.removeprefix("code of ") for one in code.parts}
    assert {one for one in ran if "/stage1/" in one or "/stage2/" in one} <= own | shared | {"nuwa/stage1/registry.py"}


def test_the_code_of_trials_that_run_alike_is_walked_once(coded, family):
    """After that a trial is a look-up: `benchmarks/planning.py` times it."""
    trial_code.cache_clear()
    first = with_code(coded.trials, family, "cpu")
    walks = trial_code.cache_info().misses
    again = with_code(coded.trials * 3, family, "cpu")
    assert walks == trial_code.cache_info().misses < len(coded.trials)
    assert [trial.code for trial in again] == [trial.code for trial in first] * 3


# Why answers are to come


def test_a_plan_says_why_answers_are_to_come(bench, coded, family, folder, tmp_path):
    known = ModelIdentity.of(str(folder), Loading(), family, tmp_path)
    context = answer_context(known, family, SETTINGS)
    store, few = ResultStore(tmp_path / "store"), coded.trials[:3]
    questions = bench.questions.examples
    digests = [example.digest for example in read_examples(questions, context.digest)]
    provenance = json.dumps({"context": context.digest[:24]})
    unit = StoredUnit("x", tuple(trial.answer_id for trial in few), tuple(digests), provenance)

    def why(trials, context, stored_unit=unit, table=questions) -> list[str]:
        examples = read_examples(table, context.digest)
        missing, _ = plan_units(trials, examples, [(stored_unit.trials, stored_unit.examples)], bench.costs, SLOW, 4)
        changes = Changes.since(store, context, [code_of(trial, family) for trial in trials])
        return summary(explain(trials, missing.values(), [stored_unit], changes))

    store.describe("context", context.digest[:24], context.parts)
    for code in {code_of(trial, family).digest: code_of(trial, family) for trial in few}.values():
        store.describe("code", code.digest[:12], code.parts)
    each = len(digests)
    assert why(few, context) == []
    assert why(coded.trials[:5], context) == [f"why: new trial: {2 * each} answers of 2 trials"]
    longer = questions.assign(max_new_tokens=questions["max_new_tokens"] + 1)
    assert why(few, context, table=longer) == [f"why: new questions: {3 * each} answers of 3 trials"]

    ANSWERS_ONLY["repetition_penalty"](folder)
    other = answer_context(ModelIdentity.of(str(folder), Loading(), family, tmp_path), family, SETTINGS)
    assert why(few, other) == [f"why: generation_config.json changed: {3 * each} answers of 3 trials"]

    # Answers that an earlier version of one method's file gave.
    code = code_of(few[1], family)
    method = few[1].spec.stage1
    before = dict(code.parts) | {f"code of nuwa/stage1/{method}.py": "0" * 64}
    store.describe("code", "0" * 12, before)
    old = few[1].trial_id + "." + "0" * 12 + "." + few[1].code.partition(".")[2]
    held = unit._replace(trials=(few[0].answer_id, old, few[2].answer_id))
    assert why(few, context, held) == [f"why: code of nuwa/stage1/{method}.py changed: {each} answers of 1 trial"]


# Tables that were pulled


@pytest.fixture
def pulled(coded, stored, tmp_path):
    """A clone's tables: a function that reads them in a context."""
    place, _ = stored
    targets = {part: tmp_path / f"{part}.parquet" for part in PARTS}
    answers = [trial.answer_id for trial in coded.trials]
    origins = collect(ResultStore(place), answers, coded.examples, targets, tmp_path / "collecting")
    facts = tmp_path / "sweep.json"
    facts.write_text(json.dumps({"tables": table_facts(origins, "the context", coded.examples, targets)}))

    def read(context: str = "the context", questions: pd.DataFrame = coded.questions.examples) -> PulledTables | None:
        return PulledTables.of(facts, targets, context, questions, lambda table: read_examples(table, coded.context))

    read.targets = targets
    return read


def test_pulled_tables_refill_a_store(coded, stored, pulled, cluster_of_one, tmp_path):
    store = ResultStore(tmp_path / "fresh")
    tables = pulled()
    lacking = tables.lacking(store.done(), coded.trials, coded.examples, "same_versions")
    assert lacking == sorted(trial.trial_id for trial in coded.trials)
    assert tables.refill(store, lacking) == len(coded.trials) * len(coded.examples)
    assert cached(coded, tmp_path / "fresh", reuse="same_versions") == len(coded.trials) * len(coded.examples)
    asked = []
    again = coded.run(tmp_path / "fresh", cluster_of_one, done=lambda *unit: asked.append(unit))
    assert asked == [] and same(again, stored[1])
    assert tables.lacking(store.done(), coded.trials, coded.examples, "any") == [], "once is enough"


def test_a_refilled_store_says_what_its_answers_are(coded, pulled, tmp_path):
    """The code and the versions that made them, not the present ones."""
    store, tables = ResultStore(tmp_path / "fresh"), pulled()
    tables.refill(store, [trial.trial_id for trial in coded.trials])
    (unit,) = store.done()
    assert set(unit.trials) == {trial.answer_id for trial in coded.trials}
    assert unit.origin["torch"] == torch.__version__ and unit.origin["tables"] is True
    newer = [trial.coded("f" * 12 + trial.code[12:]) for trial in coded.trials]
    assert tables.lacking(store.done(), newer, coded.examples, "any") == [], "of other code: nothing is taken"
    assert cached(coded, tmp_path / "fresh", newer) == 0


def test_tables_are_taken_for_nothing_else(coded, pulled):
    questions = coded.questions.examples
    assert pulled() is not None
    assert pulled(context="another") is None
    assert pulled(questions=questions.assign(prompt=questions["prompt"] + " ?")) is None
    assert pulled(questions=questions.iloc[1:]) is None
    whole = pulled.targets["predictions"].read_bytes()
    pulled.targets["predictions"].write_bytes(whole[:-1] + b"\0")
    assert pulled() is None, "another file than the one that was described"
    pulled.targets["predictions"].unlink()
    assert pulled() is None


def test_answers_of_several_versions_are_of_no_version(coded, tmp_path):
    """A trial whose rows came from two machines is not taken where one version is insisted on."""
    trial = coded.trials[0]
    code = trial.code.partition(".")[0]
    origins = Origins(
        answers={trial.trial_id: {f"{trial.trial_id}.{code}.11111111", f"{trial.trial_id}.{code}.22222222"}}
    )
    for part in ("predictions", "kept"):
        (tmp_path / part).write_bytes(b"")
    facts = table_facts(origins, "c", [], {part: tmp_path / part for part in ("predictions", "kept")})
    answer = f"{trial.trial_id}.{facts['code'][trial.trial_id]}"
    assert reuse_key(answer, "any") == reuse_key(trial.answer_id, "any")
    assert reuse_key(answer, "same_versions") not in {
        f"{trial.trial_id}.{code}.{one}" for one in ("11111111", "22222222")
    }
