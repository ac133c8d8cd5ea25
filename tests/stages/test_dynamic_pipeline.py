"""LLaVA-NeXT and Qwen2.5-VL through all stages, from a model and published tables on disk to the page and MLflow.

The models are random, but TextVQA's truths are what stock ``generate`` answers: unpruned accuracy must be 100 %. No word
they know is a number, so grounding scores 0 and its retention is no number.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lxml.html
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from stores import copy_store
from transformers import (
    InternVLConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import import_utils
from workers_here import work_here

import nuwa
from benchmarks.gpu.families import (
    InternVLPicturesOnly,
    PicturesOnly,
    Qwen2_5PicturesOnly,
    Qwen2PicturesOnly,
    QwenPicturesOnly,
    SmolVLMPicturesOnly,
)
from nuwa.benchmarks import get_benchmark
from nuwa.vlm import Adapter
from pipelines.settings import Settings, load_settings
from stages.entry import (
    HEADLINE,
    KEPT,
    METRICS,
    OUR_FAULT,
    PREDICTIONS,
    REPORT,
    SCORES,
    SWEEP,
    TRIALS,
    planned_trials,
    run_stage,
)
from stages.evaluate import evaluate
from stages.features import features
from stages.prepare import prepare
from stages.report import report
from stages.sweep import sweep
from stages.track import track

ROOT = Path(__file__).parents[2]
SIZES = [(100, 30), (30, 70), (48, 48), (73, 65)]  # wide, tall, square, and one with sides that nothing divides
QUESTIONS = ["what is on the left ?", "how many red cat near the sign ?"]
SHARES = [0.3, 0.6]
PRESETS = {"tiny_next": "released_next", "tiny_qwen": "released_qwen"}
BOXES = {"tiny_next": "refcoco/val", "tiny_qwen": "refcoco/val:pixels"}


def grids_of(model: str) -> list[dict[str, object]]:
    largest = SHARES[-1]
    return [
        {"name": "methods", "method": "nuwa", "preset": PRESETS[model]},
        {"name": "methods", "method": "uniform", "position": "perc"},
        {"name": "methods", "method": "fastv", "budget": largest},
        {"name": "scorer", "method": "nuwa", "budget": largest},
        {"name": "scorer", "method": "nuwa", "budget": largest, "stage2_scorer": "cosine_mean_text"},
    ]


def photos() -> list[Image.Image]:
    rng = np.random.default_rng(8)
    coarse = [Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)) for _ in SIZES]
    return [one.resize(size, Image.Resampling.BICUBIC) for one, size in zip(coarse, SIZES, strict=True)]


def png(image: Image.Image) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "photo.png"}


def write_tables(answers: list[str]) -> None:
    """Published tables: questions of TextVQA, two an image, as many as there are ``answers``, and one expression of
    RefCOCO about the wide and the tall one."""
    images = [png(photo) for photo in photos()]
    asked = [(image, question) for image in images for question in QUESTIONS][: len(answers)]
    tables = {
        "textvqa": [
            {"question_id": number, "question": question, "image": image, "answers": [answers[number]] * 10}
            for number, (image, question) in enumerate(asked)
        ],
        "refcoco": [
            {"question_id": str(number), "answer": ["the red dog"], "bbox": [4.0, 6.0, 12.0, 9.0], "image": image}
            for number, image in enumerate(images[:2])
        ],
    }
    for name, rows in tables.items():
        Path("tables", name).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=get_benchmark(name).schema)
        pq.write_table(table, Path("tables", name, "val.parquet"))


def write_params(model: str, tables: dict[str, str], grids: list[dict[str, object]]) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    largest = SHARES[-1]
    params["model"] |= {"path": f"models/{model}", "prompt_style": "llava_v1"}
    params["prepare"]["tables"] = tables
    params["features"]["shard_images"] = 2
    params["sweep"] |= {
        "benchmarks": [*tables],
        "images": None,
        "unit_images": 2,
        "budget_unit": "share",
        "budgets": SHARES,
        "grids": grids,
    }
    params["search"]["swarm"] = None
    params["evaluate"]["resamples"] = 100
    params["report"]["headline_budget"] = largest
    params["tracking"] = {"uri": f"sqlite:///{model}.db", "experiment": "tiny"}
    Path("params.yaml").write_text(yaml.safe_dump(params))


PROCESSORS = {
    Qwen2_5_VLConfig: Qwen2_5PicturesOnly,
    Qwen2VLConfig: Qwen2PicturesOnly,
    LlavaOnevisionConfig: PicturesOnly,
    Qwen3VLConfig: QwenPicturesOnly,
    InternVLConfig: InternVLPicturesOnly,
    SmolVLMConfig: SmolVLMPicturesOnly,
}


def save(vlm: Adapter, folder: Path) -> None:
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


def stock_inputs(vlm: Adapter, image: Image.Image, prompt: str):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text = vlm.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return vlm.processor(images=[image], text=[text], return_tensors="pt")


def stock_answer(vlm: Adapter, image: Image.Image, prompt: str, length: int) -> str:
    """The model's own ``generate``."""
    inputs = stock_inputs(vlm, image, prompt)
    out = vlm.model.generate(**inputs, max_new_tokens=length, do_sample=False)
    made = out[0, inputs["input_ids"].shape[1] :]
    return vlm.processor.tokenizer.decode(made, skip_special_tokens=True).strip()


def visual_tokens(vlm: Adapter, image: Image.Image) -> int:
    """Image placeholders that the model's own processor puts into a prompt."""
    return int((stock_inputs(vlm, image, "what ?")["input_ids"] == vlm.model.config.image_token_id).sum())


@dataclass(frozen=True)
class Run:
    """A finished pipeline. ``stock``: answers by example id. ``images``, ``tokens``: by digest."""

    name: str
    vlm: Adapter
    settings: Settings
    examples: pd.DataFrame
    stock: dict[str, str]
    images: dict[str, Image.Image]
    tokens: dict[str, int]


@pytest.fixture(scope="module", params=list(PRESETS))
def run(request, new_store, tmp_path_factory):
    """All stages, one after the other, with workers in this process."""
    vlm = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(request.param))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setitem(PROCESSOR_MAPPING._extra_content, Qwen2_5_VLConfig, Qwen2_5PicturesOnly)
        work_here(patch)  # the processor is patched in this process only
        save(vlm, Path("models", request.param))
        write_tables(["unknown"] * len(SIZES) * len(QUESTIONS))
        tables = {BOXES[request.param]: "tables/refcoco", "textvqa/val": "tables/textvqa"}
        write_params(request.param, tables, grids_of(request.param))
        settings = load_settings()
        copy_store(new_store, Path(f"{request.param}.db").absolute())
        prepare(settings)
        content = pd.read_parquet("data/images.parquet").set_index("image")["bytes"]
        images = {name: Image.open(io.BytesIO(held)).convert("RGB") for name, held in content.items()}
        stock = {
            row.example_id: stock_answer(vlm, images[row.image], row.prompt, row.max_new_tokens)
            for row in pd.read_parquet("data/examples.parquet").itertuples()
        }
        write_tables([stock[f"textvqa/val:{number}"] for number in range(len(SIZES) * len(QUESTIONS))])
        prepare(settings)
        assert len(planned_trials(settings)) == 8
        features(settings)
        sweep(settings)
        evaluate(settings)
        report(settings)
        examples = pd.read_parquet("data/examples.parquet")
        tokens = {name: visual_tokens(vlm, image) for name, image in images.items()}
        yield Run(request.param, vlm, settings, examples, stock, images, tokens)


def share_of(trial) -> float:
    """The budget a trial was asked for, as its label says."""
    return 1.0 if trial.method == "unpruned" else next(share for share in SHARES if f"{100 * share:g} %" in trial.label)


def test_unpruned_answers_are_those_of_stock_generate(run):
    trials, answers, scores = (pd.read_parquet(path) for path in (TRIALS, PREDICTIONS, SCORES))
    (unpruned,) = trials.loc[trials["method"] == "unpruned", "trial_id"]
    mine = answers[answers["trial_id"] == unpruned].set_index("example_id")["prediction"]
    assert mine.to_dict() == run.stock and len(set(run.stock.values())) > 3
    scores = scores[scores["headline"] & (scores["trial_id"] == unpruned)].set_index("benchmark")["score"]
    assert scores["textvqa/val"] == 1.0 and scores[BOXES[run.name]] == 0.0


def test_pruned_answers_are_those_of_the_library_call(run):
    """At each method's smallest share, from pixels, one image and question at a time.

    Random methods are no part of it: the library seeds them by pixels, the pipeline by the file's bytes.
    """
    trials = pd.read_parquet(TRIALS)
    answers = pd.read_parquet(PREDICTIONS).set_index(["trial_id", "example_id"])
    kept = pd.read_parquet(KEPT).set_index(["trial_id", "image"])
    asked = {"nuwa": {"preset": PRESETS[run.name]}, "uniform": {"position": "perc"}, "fastv": {}}
    differing = 0
    trials = trials[["methods" in grids for grids in trials["grids"]]].sort_values("average_tokens")
    smallest = trials[trials["method"] != "unpruned"].drop_duplicates("method")
    assert set(smallest["method"]) == set(asked)
    for trial in smallest.itertuples():
        for row in run.examples.itertuples():
            (alone,) = nuwa.generate(
                run.vlm.model,
                run.vlm.processor,
                [run.images[row.image]],
                [row.prompt],
                method=trial.method,
                retention=share_of(trial),
                max_new_tokens=row.max_new_tokens,
                **asked[trial.method],
            )
            there = answers.loc[(trial.trial_id, row.example_id)]
            assert (there["prediction"], tuple(there["kept_final"])) == (alone.text, alone.kept_last)
            stage1 = kept.loc[(trial.trial_id, row.image)]
            assert tuple(stage1["indices"]) == alone.kept.slots
            assert list(stage1["pillar"]) == [role != "collector" for role in alone.kept.roles]
            differing += alone.text != run.stock[row.example_id]
    assert differing > len(run.examples), "pruning that changes nothing would prove nothing"


def test_average_tokens_are_counted_from_what_was_kept(run):
    """In every image: what stage 1 kept up to the cut, and what the last layer had behind it; budgets are its shares."""
    trials, answers, kept = (pd.read_parquet(path) for path in (TRIALS, PREDICTIONS, KEPT))
    layers, image_of = len(run.vlm.language.layers), run.examples.set_index("example_id")["image"]
    assert len(set(run.tokens.values())) > 2
    for trial in trials.itertuples():
        stage1 = kept[kept["trial_id"] == trial.trial_id].set_index("image")["indices"].map(len)
        mine = answers[answers["trial_id"] == trial.trial_id]
        cut = layers if pd.isna(trial.stage2_layer) else int(trial.stage2_layer)
        averages = []
        for image, tokens in run.tokens.items():
            (last,) = set(mine.loc[mine["example_id"].map(image_of) == image, "kept_final"].map(len))
            averages.append((cut * stage1[image] + (layers - cut) * last) / layers)
            assert abs(averages[-1] - share_of(trial) * tokens) < 1
        assert trial.average_tokens == pytest.approx(sum(averages) / len(averages))
        assert trial.image_tokens == round(sum(run.tokens.values()) / len(run.tokens))


def test_what_cannot_be_known_is_said_and_not_printed(run):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    metrics = json.loads(METRICS.read_text(), parse_constant=refuse)
    assert metrics["nuwa"]["vg"] is metrics["rival"]["vg"] is metrics["lead"]["vg"] is None
    assert 0 <= metrics["nuwa"]["vqa"] <= 1 and metrics["full"] == {"vg": 0.0, "vqa": 1.0}
    headline = pd.read_csv(HEADLINE)
    assert len(headline) == 3 and headline["grounding"].isna().all() and headline["vqa"].between(0, 1).all()
    text = lxml.html.parse(REPORT / "index.html").getroot().text_content()
    assert "retention on grounding is a share of nothing and left out" in text
    for words in (text, (REPORT / "report.md").read_text()):
        assert not {"nan", "NaN", "None", "inf"} & set(words.split())


def test_the_page_names_every_trial_and_draws_images_in_their_shapes(run):
    page, trials = lxml.html.parse(REPORT / "index.html").getroot(), pd.read_parquet(TRIALS)
    assert set(trials["label"]) <= {cell.text_content() for cell in page.xpath("//th[@scope='row']")}
    main = trials[["methods" in grids for grids in trials["grids"]]]
    assert set(page.xpath("//tr/@data-trial")) == set(main["trial_id"])
    sizes = run.examples.set_index("example_id")[["width", "height"]]
    cases = page.xpath("//div[@class='case']")
    assert len(cases) == 2
    for case in cases:
        width, height = map(int, sizes.loc[case.get("data-example")])
        (plain, *drawn) = ([int(img.get(side)) for side in ("width", "height")] for img in case.xpath(".//img"))
        assert abs(plain[0] * height - plain[1] * width) <= max(width, height)
        assert case.xpath(".//img/@alt")[1:] == ["Nüwa PESP", "FastV PESP"]
        several = len(run.vlm.layout_of((width, height)).views) > 1
        assert [size == plain for size in drawn] == [not several, not several]


def test_mlflow_holds_the_tables(run):
    track(run.settings)
    client = MlflowClient(run.settings.tracking.uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    sweep_id = json.loads(SWEEP.read_text())["sweep_id"]
    (parent,) = client.search_runs([experiment], f"tags.sweep_id = '{sweep_id}'")
    artifacts = {Path(one.path).name for one in client.list_artifacts(parent.info.run_id, "report")}
    assert {"index.html", "report.md"} <= artifacts
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    trials, scores = pd.read_parquet(TRIALS).set_index("trial_id"), pd.read_parquet(SCORES)
    means = scores[(scores["benchmark"] == "mean") & (scores["family"] == "vqa")].set_index("trial_id")["score"]
    assert sorted(child.data.tags["trial_id"] for child in children) == sorted(trials.index)
    for child in children:
        trial_id, metrics = child.data.tags["trial_id"], child.data.metrics
        assert metrics["average_tokens"] == trials.at[trial_id, "average_tokens"]
        assert metrics["vqa_retention"] == means[trial_id] and "grounding_retention" not in metrics


def test_a_second_run_computes_nothing_and_changes_nothing(run, capsys):
    def store() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for kind in ("*.unit.parquet", "*.arrow")
            for path in Path("cache").rglob(kind)
        }

    tables = (TRIALS, PREDICTIONS, KEPT, SWEEP)
    before, held = {path: path.read_bytes() for path in tables}, store()
    capsys.readouterr()
    features(run.settings)
    sweep(run.settings)
    said = "".join(capsys.readouterr())
    answers = 8 * len(run.examples)
    assert f"0 images encoded, {len(SIZES)} found in" in said
    assert f"{answers}/{answers} answers, {answers} of them cached" in said
    assert {path: path.read_bytes() for path in tables} == before
    assert store() == held and len(held) > 4


def test_a_newer_family_goes_through_all_stages(newer, tmp_path, monkeypatch):
    """Unpruned the pipeline answers as stock ``generate``, pruned as the library call from pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for config, processor in PROCESSORS.items():
        monkeypatch.setitem(PROCESSOR_MAPPING._extra_content, config, processor)
    work_here(monkeypatch)
    name = newer.model.config.model_type  # a process keeps models by the paths they were loaded from
    save(newer, Path("models", name))
    write_tables(["unknown"] * 4)
    write_params(name, {"textvqa/val": "tables/textvqa"}, [{"name": "methods", "method": "nuwa", "preset": "paper"}])
    settings = load_settings()
    for stage in (prepare, features, sweep, evaluate, report):
        stage(settings)

    examples = pd.read_parquet("data/examples.parquet")
    content = pd.read_parquet("data/images.parquet").set_index("image")["bytes"]
    trials = pd.read_parquet(TRIALS).sort_values("average_tokens")
    answers = pd.read_parquet(PREDICTIONS).set_index(["trial_id", "example_id"])["prediction"]
    (unpruned,) = trials.loc[trials["method"] == "unpruned", "trial_id"]
    smallest = trials["trial_id"].iloc[0]
    differing = 0
    for row in examples.itertuples():
        image = Image.open(io.BytesIO(content[row.image])).convert("RGB")
        whole = answers[unpruned, row.example_id]
        assert whole == stock_answer(newer, image, row.prompt, row.max_new_tokens)
        pruned = nuwa.generate(
            newer.model,
            newer.processor,
            image,
            row.prompt,
            retention=SHARES[0],
            preset="paper",
            max_new_tokens=row.max_new_tokens,
        )
        assert answers[smallest, row.example_id] == pruned.text
        differing += pruned.text != whole
    assert differing and Path(REPORT, "index.html").is_file()


def test_without_torchvision_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Transformers' own refusal to make Qwen2.5-VL's processor, and SmolVLM's; any other import that fails is a fault of
    ours."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    absent = (lambda: False, import_utils.TORCHVISION_IMPORT_ERROR)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "torchvision", absent)
    with pytest.raises(SystemExit) as stopped:
        run_stage(lambda _: import_utils.requires_backends(Run, ["torchvision"]), needs_model=False)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "error: model.path = 'models/testbed': the model's processor needs torchvision, which is not installed; "
        "pip install torchvision\n"
    )
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    words = SimpleNamespace(convert_tokens_to_ids=lambda _: 0)
    with pytest.raises(SystemExit) as stopped:
        run_stage(lambda _: processing_smolvlm.SmolVLMProcessor(None, words, None), needs_model=False)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "error: model.path = 'models/testbed': the model's processor needs num2words, which is not installed; "
        "pip install num2words\n"
    )
    with pytest.raises(SystemExit) as stopped:
        run_stage(lambda _: __import__("a_module_that_is_not_there"), needs_model=False)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in said
    assert said.endswith(f"error: {OUR_FAULT}\n")
