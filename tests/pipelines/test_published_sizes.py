"""A plan before there is data: against the exact plan on data of the published sizes, and for every experiment."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from nuwa.benchmarks import BENCHMARKS, get_benchmark
from nuwa.benchmarks.gqa import IMAGES, INSTRUCTIONS
from nuwa.benchmarks.protocols import PROTOCOLS, TESTBED
from nuwa.grid import PatchGrid
from nuwa.layout import InterleavedLayout, View, VisualLayout
from nuwa.vlm.shapes import SHAPES, model_shape
from pipelines.addresses import BenchmarkName
from pipelines.data.datasets import write_examples
from pipelines.data.published_sizes import expected_examples, published_size
from pipelines.features.layouts import interleaved
from pipelines.presets import compose
from pipelines.settings import Settings, parse_settings
from pipelines.sweep.costs import forecast
from pipelines.sweep.progress import usual_speed
from stages.entry import run_stage
from stages.plan import Outlook, expected, image_tokens, pixel_limits, plan, plan_experiment, weightless
from stages.prepare import prepare

ROOT = Path(__file__).parents[2]
PARAMS = (ROOT / "params.yaml").read_text()
OVERLAYS = {path.stem: path.read_text() for path in sorted((ROOT / "experiments").glob("*.yaml"))}
# How many tokens part an image from the next; LLaVA's images are parted by a blank, which is no piece of a stand-in's.
BETWEEN = {"llava": 0, "llava_next": 0, "qwen2_vl": 2, "qwen2_5_vl": 2, "qwen3_vl": 2, "internvl": 3, "smolvlm": 2}
TOLERANCE = 0.05  # of the exact plan's FLOPs
WORDS = [
    "is",
    "are",
    "the",
    "a",
    "what",
    "color",
    "on",
    "left",
    "of",
    "right",
    "man",
    "dog",
    "bench",
    "red",
    "blue",
    "behind",
    "small",
    "wooden",
    "person",
    "and",
    "or",
]


def settings_of(overlay: str, **sweep) -> Settings:
    raw = yaml.safe_load(compose(PARAMS, OVERLAYS[overlay]))
    raw["sweep"] |= sweep
    raw["prepare"]["tables"] = {name: "tables/any" for name in raw["sweep"]["benchmarks"]}
    return parse_settings(yaml.safe_dump(raw), overlay)


def photo(number: int, size: tuple[int, int]) -> dict[str, bytes]:
    buffer, picture = io.BytesIO(), Image.new("L", size)
    for column, digit in enumerate(divmod(number, 256)):
        picture.putpixel((column, 0), digit)
    picture.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": ""}


def question(dice: random.Random, characters: int) -> str:
    """Words of all lengths, from half to one and a half times as long as usual."""
    text = ""
    while len(text) < characters * dice.uniform(0.5, 1.5):
        text += dice.choice(WORDS) + " "
    return text.strip().capitalize() + "?"


@pytest.fixture(scope="module")
def published_tables(tmp_path_factory) -> dict[str, Path]:
    """GQA and MME in their schemas, with as many questions and images as published, of many lengths and sizes."""
    folder, dice = tmp_path_factory.mktemp("published"), random.Random(4)
    found = {}
    for name in ("gqa/testdev", "mme/test"):
        table = BenchmarkName.parse(name)
        size = published_size(table)
        width, height = size.photo
        photos = [
            photo(number, (round(width * dice.uniform(0.85, 1.15)), round(height * dice.uniform(0.85, 1.15))))
            for number in range(size.images)
        ]
        texts = [question(dice, size.characters) for _ in range(size.questions)]
        found[name] = folder / table.name
        if table.name == "gqa":
            rows = [
                {"id": str(n), "imageId": str(n % size.images), "question": text, "answer": "yes"}
                for n, text in enumerate(texts)
            ]
            images = [{"id": str(n), "image": one} for n, one in enumerate(photos)]
            for part, content, schema in (("instructions", rows, INSTRUCTIONS), ("images", images, IMAGES)):
                home = folder / "gqa" / f"testdev_balanced_{part}"
                home.mkdir(parents=True)
                pq.write_table(pa.Table.from_pylist(content, schema), home / "testdev.parquet")
        else:
            rows = [
                {
                    "question_id": str(n // 2),
                    "image": photos[n // 2],
                    "question": f"{text} Please answer yes or no.",
                    "answer": ("Yes", "No")[n % 2],
                    "category": "existence",
                }
                for n, text in enumerate(texts)
            ]
            (folder / "mme").mkdir()
            schema = get_benchmark("mme").schema
            pq.write_table(pa.Table.from_pylist(rows, schema), folder / "mme" / "test.parquet")
    return found


@pytest.fixture(scope="module")
def written_examples(tmp_path_factory) -> Callable[[Mapping[BenchmarkName, Path], str], pd.DataFrame]:
    """The questions of tables, as a family of models is asked them; each is read once."""
    made: dict[tuple, pd.DataFrame] = {}

    def read(tables: Mapping[BenchmarkName, Path], model_type: str) -> pd.DataFrame:
        key = (*map(str, tables), model_type)
        if key not in made:
            folder = tmp_path_factory.mktemp("written")
            paths = folder / "examples.parquet", folder / "images.parquet"
            write_examples(tables, "llava_v1", *paths, model_type=model_type)
            made[key] = pd.read_parquet(paths[0])
        return made[key]

    return read


@pytest.mark.parametrize(
    "overlay, images", [("nuwa_table5", None), ("nuwa_table5", 300), ("nuwa_table12", None), ("nuwa_table14", None)]
)
def test_an_estimate_is_the_exact_plan_on_data_of_the_published_size(
    published_tables, written_examples, overlay, images
):
    """On LLaVA-1.5, LLaVA-NeXT and Qwen2.5-VL; the last two give photos of many sizes layouts of their own."""
    settings = settings_of(overlay, benchmarks=list(published_tables), images=images)
    tables = dict(zip(settings.sweep.benchmarks, published_tables.values(), strict=True))  # with their protocol
    model_type = model_shape(settings.model.path.removeprefix("models/")).model_type
    exact = Outlook.of(settings, written_examples(tables, model_type), exact=True)
    table, remarks = expected(settings)
    guessed = Outlook.of(settings, table, exact=False)
    sizes = [published_size(BenchmarkName.parse(name)).images for name in published_tables]
    assert len(exact.layouts) == len(guessed.layouts) == sum(min(images or size, size) for size in sizes)
    # An odd size can put a small budget out of reach, which no typical size does.
    names = {trial.trial_id for trial in exact.trials}
    shared = [trial for trial in guessed.trials if trial.trial_id in names]
    assert len(shared) == len(exact.trials) >= len(guessed.trials) - 3
    found = forecast(shared, guessed.costs)
    # A subset of images has another share of each table's questions by luck.
    tolerance = TOLERANCE if images is None else 4 * TOLERANCE
    assert found.shared_flops == pytest.approx(exact.forecast.shared_flops, rel=tolerance)
    assert found.alone_flops == pytest.approx(exact.forecast.alone_flops, rel=tolerance)
    assert guessed.feature_bytes == pytest.approx(exact.feature_bytes, rel=TOLERANCE)
    if images is None:
        assert found.answers == pytest.approx(exact.forecast.answers, rel=1e-3)  # samples are scaled up
        assert remarks[0].endswith("an image of several tables counts in each")
        assert " 14,952 questions about 1,585 images " in remarks[0]


@pytest.mark.parametrize("overlay", [name for name, text in OVERLAYS.items() if "prepare" in yaml.safe_load(text)])
def test_every_experiment_has_an_estimate_without_weights_or_tables(overlay):
    settings = parse_settings(compose(PARAMS, OVERLAYS[overlay]), overlay)
    table, remarks = expected(settings)
    assert len(remarks) == 1, "no benchmark of an experiment is of unknown size"
    outlook = Outlook.of(settings, table, exact=False)
    hours = outlook.forecast.seconds(usual_speed("cuda", 1)) / 3600
    assert len(outlook.trials) > 3
    assert outlook.forecast.answers == pytest.approx(len(outlook.trials) * len(table), rel=1e-3)
    assert hours > 1 and outlook.feature_bytes > 1e9 and outlook.forecast.result_bytes > 1e6


def test_pixel_limits_change_what_a_sweep_of_qwen_costs():
    """Twenty photos of MME."""
    params = yaml.safe_load(compose(PARAMS, OVERLAYS["nuwa_table14"]))
    params["prepare"]["tables"] = {"mme/test": "tables/MME"}
    params["sweep"] |= {"benchmarks": ["mme/test"], "images": 20, "grids": params["sweep"]["grids"][:1]}

    def outlook(least: int, most: int) -> Outlook:
        params["model"] |= {"min_pixels": least, "max_pixels": most}
        settings = parse_settings(yaml.safe_dump(params), "table 14")
        return Outlook.of(settings, expected(settings)[0], exact=False)

    small, large = outlook(3136, 200_704), outlook(1_003_520, 12_845_056)
    tokens = [sum(layout.tokens for layout in one.layouts.values()) for one in (small, large)]
    assert tokens[1] > 5 * tokens[0]
    assert large.feature_bytes > 5 * small.feature_bytes
    assert large.forecast.shared_flops > 3 * small.forecast.shared_flops


def test_a_plan_tells_the_tokens_of_an_image_by_layout():
    one, other = (VisualLayout((View(PatchGrid(rows, 3)),)) for rows in (2, 4))
    crops = VisualLayout((View(PatchGrid(24, 24)), View(PatchGrid(36, 48), 6, newline=True)))
    assert image_tokens([one, other, one]) == (
        "tokens an image: 8.0 on average; 2 x 3 = 6 of 2 images, 4 x 3 = 12 of 1 images"
    )
    assert image_tokens([crops]) == "tokens an image: 2,340.0 on average; 24 x 24 + 36 x 49 = 2,340 of 1 images"
    many = [VisualLayout((View(PatchGrid(1, columns)),)) for columns in range(1, 8)]
    assert image_tokens(many).endswith(", 2 further layouts")

    # Of several in a question each is an image of its own.
    assert image_tokens([InterleavedLayout.of([one, other], [2]), one]) == image_tokens([one, other, one])
    named = VisualLayout(tuple(View(PatchGrid(8, 8), leading=count) for count in (1, 2, 3)))
    assert image_tokens([named]).endswith("8 x 8 + 8 x 8 + 8 x 8 + 6 tokens that name tiles = 198 of 1 images")


@pytest.mark.parametrize("checkpoint", SHAPES)
def test_every_published_checkpoint_is_planned_without_its_files(checkpoint):
    settings = settings_of("nuwa_table14").model.model_copy(update={"path": checkpoint, "image_rules": None})
    vlm = weightless(settings)
    layout = vlm.layout_of((640, 480))
    assert layout.tokens > 250 and vlm.end_tokens
    if vlm.alike:  # questions about several images are planned, too
        together = interleaved(vlm, [layout] * 3)
        assert together.tokens == 3 * layout.tokens and together.between == (BETWEEN[vlm.model.config.model_type],) * 2


@pytest.mark.parametrize(
    ("model", "protocol", "limits", "line"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", "testbed", {}, "3,136 to 12,845,056, by the checkpoint"),
        ("Qwen/Qwen2-VL-7B-Instruct", "lmms_eval", {}, "3,136 to 602,112, by the protocol lmms_eval"),
        (
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "lmms_eval",
            {},
            "200,704 to 1,605,632, by the protocol lmms_eval; resized before that to 3,136 to 12,845,056",
        ),
        (
            "Qwen/Qwen3-VL-8B-Instruct",
            "lmms_eval",
            {"min_pixels": 200_704, "max_pixels": 1_605_632},
            "200,704 to 1,605,632, by model.min_pixels and model.max_pixels and the protocol lmms_eval",
        ),
    ],
)
def test_a_plan_tells_the_pixels_of_an_image_and_who_says_so(model, protocol, limits, line):
    settings = settings_of("nuwa_table14")
    own = {"path": model, "image_rules": protocol, "min_pixels": None, "max_pixels": None, **limits}
    settings = settings.model_copy(update={"model": settings.model.model_copy(update=own)})
    assert pixel_limits(weightless(settings.model), settings) == [f"pixels an image: {line}"]
    assert pixel_limits(weightless(settings_of("nuwa_table6").model), settings) == [], "of a family without limits"


def test_half_the_images_are_half_the_work():
    settings = settings_of("nuwa_table6")
    table, _ = expected(settings)
    halves = {name: images // 2 for name, images in table.groupby("benchmark")["image"].nunique().items()}
    whole = Outlook.of(settings, table, exact=False)
    half = Outlook.of(settings_of("nuwa_table6", images=halves), table, exact=False)
    share = len(half.layouts) / len(whole.layouts)
    assert share == pytest.approx(0.5, abs=0.001)
    assert half.feature_bytes == pytest.approx(share * whole.feature_bytes)
    assert half.forecast.shared_flops == pytest.approx(share * whole.forecast.shared_flops, rel=0.05)


def test_questions_are_dealt_out_and_differ_behind_the_instruction():
    table, unknown = expected_examples(["refcoco/testA", "refcoco/testA:pixels", "pope/unheard"], "llava_v1")
    assert unknown == ["pope/unheard"]
    size = published_size(BenchmarkName.parse("refcoco/testA"))
    assert len(table) == 2 * size.questions and table["image"].nunique() == size.images
    counts = table.groupby(["benchmark", "image"]).size()
    assert set(counts) == {size.questions // size.images, size.questions // size.images + 1}
    one = table[(table["benchmark"] == "refcoco/testA") & (table["image"] == table["image"][0])]
    instruction = get_benchmark("refcoco").llava_v1
    assert one["prompt"].is_unique and one["prompt"].str.startswith("Bounding box coordinates").all()
    assert instruction is not None and set(table["max_new_tokens"]) == {64}


def test_published_sizes_name_benchmarks_that_exist_and_are_plausible():
    sizes = {f"{name}/{split}": size for name in BENCHMARKS for split, size in get_benchmark(name).splits.items()}
    assert len(sizes) >= 23 and {name.partition("/")[0] for name in sizes} == set(BENCHMARKS)
    for text, size in sizes.items():
        name = BenchmarkName.parse(text)
        assert name.split and published_size(name) is size
        scored = [one for one in BENCHMARKS[name.name] if one.submission is None]
        assert all(one.splits == get_benchmark(name.name).splits for one in scored)
        assert 0 < size.images <= size.questions
        assert all(100 <= side <= 2000 for side in size.photo) and 10 <= size.characters <= 500


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_s_questions_are_expected(protocol):
    """The smallest split of every benchmark that the protocol asks."""
    names = []
    for name, variants in BENCHMARKS.items():
        if any(protocol in (TESTBED, *one.rules) for one in variants):
            splits = variants[0].splits
            names.append(f"{name}/{min(splits, key=lambda split: splits[split].questions)}@{protocol}")
    small = [text for text in names if not text.startswith("vqav2")]  # a quarter of a million
    model_type = next(iter(PROTOCOLS[protocol].limits), "llava")
    table, unknown = expected_examples(small, "llava_v1", model_type)
    assert set(table["benchmark"]) == set(small) and not unknown


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A fresh clone's parameters, experiments and models; no data."""
    for name in ("experiments", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    return tmp_path


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("tree", "work", "time", "disk"))]


def test_on_a_fresh_clone_the_testbed_is_planned_as_after_prepare(folder, capsys):
    raw = yaml.safe_load(PARAMS)
    raw["prepare"]["images"], raw["sweep"]["images"] = 60, 40
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    run_stage(plan)
    before = said(capsys)
    assert len(before) == 4 and not (folder / "data").exists()
    run_stage(prepare)
    run_stage(plan)
    assert said(capsys) == before


def test_scenes_beyond_the_drawn_ones_are_copies(folder, monkeypatch):
    monkeypatch.setattr("stages.plan.SAMPLED", 8)
    raw = yaml.safe_load(PARAMS)
    raw["prepare"]["images"], raw["sweep"]["images"] = 21, 20
    table, (remark,) = expected(parse_settings(yaml.safe_dump(raw), "params.yaml"))
    assert remark.startswith("estimate, ") and table["image"].nunique() == 21
    counts = np.unique(table.groupby("image").size(), return_counts=True)[1]
    assert counts.sum() == 21 and len(table) > 21 * 10


def test_another_experiments_data_are_no_data_of_this_one(folder, capsys):
    raw = yaml.safe_load(PARAMS)
    raw["prepare"]["images"], raw["sweep"]["images"] = 12, 12
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    run_stage(prepare)
    before = (folder / "params.yaml").read_bytes()
    run_stage(lambda _: plan_experiment("nuwa_table11"))
    out = capsys.readouterr().out
    assert "estimate, `dvc repro prepare` has not run for these benchmarks: from published sizes, " in out
    assert "of 50 TFLOP/s (a guess until a sweep has run here)" in out
    assert (folder / "params.yaml").read_bytes() == before


def test_a_benchmark_of_unknown_size_is_named_and_none_at_all_leaves_only_the_trials(folder, capsys):
    raw = yaml.safe_load(compose(PARAMS, OVERLAYS["nuwa_table7"]))
    raw["prepare"]["tables"] = {"pope/mine": "tables/a", "pope/test": "tables/b"}
    raw["sweep"]["benchmarks"] = ["pope/test", "pope/mine"]
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    run_stage(plan)
    out = capsys.readouterr().out
    assert "9,000 questions about 500 images" in out
    assert "not counted, sizes are not known: pope/mine\n" in out and "GPU hours: " in out
    raw["sweep"]["benchmarks"] = ["pope/mine"]
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    run_stage(plan)
    out = capsys.readouterr().out
    assert "not counted, sizes are not known: pope/mine\n" in out and "GPU hours: " not in out
    assert "data/examples.parquet is not there yet: `dvc repro prepare` makes it, and the next plan says what" in out
