"""Questions about several images, from a published table to answers: those of :func:`nuwa.generate` to the letter."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench import SLOW, Swept, same
from PIL import Image
from test_dynamic_layouts import ONE, in_memory

import nuwa
from nuwa.benchmarks import get_benchmark
from nuwa.layout import InterleavedLayout
from pipelines.data.datasets import SEVERAL_IMAGES, read_notes, write_examples
from pipelines.data.image_keys import digests_of, shows_several
from pipelines.features.encoding import encode_missing
from pipelines.features.layouts import image_layouts
from pipelines.settings import FeatureSettings, SweepSettings
from pipelines.sweep.answers import SweepSpec, run_sweep
from pipelines.sweep.costs import forecast, sweep_costs
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import read_examples

NAME, MAX_NEW, SHARE = "mmmu/validation:all_images", 3, 0.5
# question, options and the photos that columns image_1 … hold
ROWS = (
    ("What is in <image 1>?", ["dog", "cat"], (0,)),
    ("Is <image 2> like <image 1>?", ["yes", "no"], (1, 2)),
    ("Which one?", ["<image 1>", "<image 2>", "<image 1>"], (3, 0)),
    ("<image 3> <image 1> <image 2>", ["yes", "no"], (0, 0, 4)),
    ("Which of <image 1> and <image 2>?", ["one", "two"], (1, 3)),
    ("Where is <image 1>, beside <image 2>?", ["left", "right"], (1, 2)),  # the same two, in the same order
)
GRIDS = [
    {"name": "one", "method": "nuwa", "position": ["pesp", "rpme"]},
    {"name": "one", "method": "nuwa", "preset": "paper", "position": "perc"},
    {"name": "one", "method": ["fastv", "uniform"], "position": "own"},
]
ENCODED_ANEW = {"name": "anew", "method": "downsample"}  # where a family makes images smaller


def png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


def published(photos: list[Image.Image]) -> pa.Table:
    rows = []
    for number, (question, options, shown) in enumerate(ROWS):
        images = {f"image_{place}": {"bytes": png(photos[at]), "path": None} for place, at in enumerate(shown, start=1)}
        row = {"id": f"validation_Art_{number}", "question": question, "options": str(options), "answer": "A"}
        rows.append(row | images | {"question_type": "multiple-choice"})
    return pa.Table.from_pylist(rows, get_benchmark("mmmu").schema)


@pytest.fixture(scope="module", params=["tiny_vlm", "tiny_qwen", "tiny_next"])
def asked(request, photos, tmp_path_factory):
    """A published table through ``prepare`` and ``features``; every image is encoded once."""
    vlm, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp("several")
    pq.write_table(published(photos), folder / "validation.parquet")
    examples, images = folder / "examples.parquet", folder / "images.parquet"
    notes = write_examples({NAME: folder}, "llava_v1", examples, images)
    settings = FeatureSettings(dtype="float32", shard_images=2, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pipelines.features.encoding", "pipelines.sweep.answers"):
            patch.setattr(f"{module}.load_model", lambda path, device, loading: vlm)
        store, encoded = encode_missing("model", images, folder / "features", settings, ONE, **in_memory(vlm))
        table = pd.read_parquet(examples).assign(max_new_tokens=MAX_NEW)
        yield SimpleNamespace(vlm=vlm, folder=folder, store=store, encoded=encoded, table=table, notes=notes)


def planned(asked, grids):
    """Trials of ``grids`` on a half of each image's tokens, what they cost, and the layout of each question's images."""
    vlm, table = asked.vlm, asked.table
    layouts = image_layouts(vlm, table)
    plan = SweepSettings(
        benchmarks=[NAME],
        images=None,
        subset_seed=0,
        unit_images=4,
        budget_unit="share" if vlm.dynamic else "tokens",
        budgets=[SHARE if vlm.dynamic else SHARE * vlm.layout.tokens],
        grids=grids,
    )
    trials = expand(plan, Layouts.of(layouts.values(), vlm.dynamic), vlm.layers)
    return trials, sweep_costs(vlm, table), layouts


def swept(asked, tmp_path, unit_images=4):
    vlm, table = asked.vlm, asked.table
    trials, costs, layouts = planned(asked, [*GRIDS, *[ENCODED_ANEW] * vlm.resizes])
    spec = SweepSpec(
        model="model",
        feature_root=str(asked.folder / "features"),
        feature_identity=asked.store.identity,
        encoder=vlm.encoder_identity,
        results=str(tmp_path),
        images=str(asked.folder / "images.parquet"),
        threads=1,
    )
    examples = read_examples(table, asked.store.identity, layouts)
    outcome = run_sweep(spec, trials, examples, ONE, costs=costs, speed=SLOW, unit_images=unit_images, in_process=True)
    return trials, Swept.of(outcome, tmp_path, trials, examples)


@pytest.fixture(scope="module")
def together(asked, tmp_path_factory):
    """All questions in units of four."""
    return swept(asked, tmp_path_factory.mktemp("together"))


def test_prepared_tables_name_every_image_of_a_question(asked):
    by_id = asked.table.set_index("example_id")
    assert asked.encoded == 5 and not asked.notes
    for number, (_, _, shown) in enumerate(ROWS):
        row = by_id.loc[f"mmmu/validation:validation_Art_{number}"]
        assert len(digests_of(row["image"])) == len(shown) and shows_several(row["image"]) == (len(shown) > 1)
        images = row["images"]
        assert (images is None) == (len(shown) == 1)
        if images is not None:
            assert tuple(one["image"] for one in images) == digests_of(row["image"])
            assert (images[0]["width"], images[0]["height"]) == (row["width"], row["height"])
    first, second = by_id["prompt"].iloc[0], by_id.loc["mmmu/validation:validation_Art_1", "prompt"]
    assert "<image" not in by_id.loc["mmmu/validation:validation_Art_0", "prompt"]
    assert second.startswith("Is <image 2> like <image 1>?\nA. yes") and first


def test_answers_are_the_library_s(asked, together, photos):
    trials, sweep = together
    assert not sweep.failures and len(trials) == 6 + asked.vlm.resizes
    predictions = sweep.predictions.to_pandas().set_index(["trial_id", "example_id"])
    kept = {(row["trial_id"], row["image"]): row["indices"] for row in sweep.kept.to_pylist()}
    prompts = asked.table.set_index("example_id")
    vlm, told = asked.vlm, set()

    for trial in trials:
        options = {"position": trial.spec.position} | (
            {} if trial.spec.budget is None else {"retention" if vlm.dynamic else "average_tokens": trial.budgets[0]}
        )
        preset = {"preset": trial.spec.preset} if trial.spec.method == "nuwa" else {}
        for number, (_, _, shown) in enumerate(ROWS):
            name = f"mmmu/validation:validation_Art_{number}"
            (library,) = nuwa.generate(
                vlm.model,
                vlm.processor,
                [[photos[at] for at in shown]],
                [prompts.at[name, "prompt"]],
                method=trial.spec.method,
                max_new_tokens=MAX_NEW,
                **options,
                **preset,
            )
            row = predictions.loc[trial.trial_id, name]
            assert row["prediction"] == library.text, (trial.label, name)
            assert tuple(row["kept_final"]) == library.kept_last, (trial.label, name)
            if len(shown) > 1:
                assert tuple(kept[trial.trial_id, prompts.at[name, "image"]]) == library.kept.slots
            told.add(library.text)
    assert len(told) > 3, "a constant model would prove nothing"


def test_units_and_batches_change_nothing(asked, together, tmp_path):
    _, apart = swept(asked, tmp_path, unit_images=1)
    assert same(together[1], apart)


def test_the_plan_counts_all_images_of_a_sequence(asked):
    vlm, table = asked.vlm, asked.table
    (unpruned, half), costs, layouts = planned(asked, [{"name": "a", "method": "uniform"}])
    (longest,) = (layouts[key] for key in table["image"] if len(digests_of(key)) == 3)
    assert isinstance(longest, InterleavedLayout) and longest.tokens == sum(one.tokens for one in longest.images)
    counts = Layouts.of(layouts.values(), vlm.dynamic)
    assert sum(counts.counts.values()) == sum(map(len, {shown for *_, shown in ROWS}))

    on_three = half.on(longest)
    assert on_three.schedule.stage1_keep == sum(half.on(one).schedule.stage1_keep for one in longest.images)
    assert unpruned.on(longest).schedule.stage1_keep == longest.tokens
    alone = [one for one in costs if not isinstance(one.layout, InterleavedLayout)]
    assert len(alone) < len(costs)
    assert forecast([half], costs).alone_flops < forecast([unpruned], costs).alone_flops


def test_a_model_that_takes_one_image_at_a_time_is_not_asked_and_says_how_often(photos, tmp_path):
    pq.write_table(published(photos), tmp_path / "validation.parquet")
    target = tmp_path / "examples.parquet"
    notes = write_examples({NAME: tmp_path}, "llava_v1", target, tmp_path / "images.parquet", several=False)
    assert notes == {NAME: {SEVERAL_IMAGES: 5}} == read_notes(target)
    table = pd.read_parquet(target)
    assert table["example_id"].tolist() == ["mmmu/validation:validation_Art_0"]
    assert json.loads(table["truth"][0])["answer"] == "A"
