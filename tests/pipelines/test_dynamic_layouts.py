"""Models whose images have layouts of their own, through feature store, plan and sweep, against one image at a time."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench import Swept, same
from PIL import Image

from nuwa.benchmarks import get_benchmark
from nuwa.budget import budget_on
from nuwa.generation import ImageBatch, answer_encoded
from nuwa.layout import layout_order
from nuwa.methods import specify
from pipelines.data.datasets import IMAGES, write_examples
from pipelines.features.encoding import encode_missing
from pipelines.features.faults import ImpossibleImage
from pipelines.features.identity import ModelIdentity
from pipelines.features.layouts import image_layouts, layouts_of
from pipelines.search.run import race_cost
from pipelines.settings import ClusterSettings, FeatureSettings, SettingsError, SweepSettings
from pipelines.sweep.answers import SweepSpec, branch, run_sweep
from pipelines.sweep.costs import forecast, sweep_costs
from pipelines.sweep.results import ResultStore
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import plan_units, read_examples

ONE = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
ASKED = ["what is on the left ?", "how many red cat near the sign ?"]
MAX_NEW = 3
SLOW = 1e8


def sweep_settings(unit: str, budgets: list[float], *entries) -> SweepSettings:
    return SweepSettings(
        benchmarks=["pope"],
        images=None,
        subset_seed=0,
        unit_images=3,
        budget_unit=unit,
        budgets=budgets,
        grids=list(entries),
    )


GRIDS = [
    {"name": "methods", "method": ["nuwa", "random"], "position": ["perc", "pesp", "rpme"]},
    {"name": "methods", "method": ["divprune", "uniform"], "stage2_layer": "off"},
    {"name": "cuts", "method": "fastv", "budget": 0.6},
    {"name": "cuts", "method": "nuwa", "stage2_layer": [2, 4], "stage2_scorer": ["cosine_mean_text", "random"]},
]
SHARES = [0.7, 0.9]


def in_memory(vlm) -> dict:
    """A model without files: encoded in this process, known by its encoder."""
    known = ModelIdentity({"encoder": vlm.encoder_identity}, {}, vlm.encoder_identity)
    return {"vlm": vlm, "known": known, "in_process": True}


class Dynamic:
    """Photos of many sizes, two questions each, encoded and planned."""

    def __init__(self, vlm, photos, root, monkeypatch):
        for module in ("pipelines.features.encoding", "pipelines.sweep.answers"):
            monkeypatch.setattr(f"{module}.load_model", lambda path, device, loading: vlm)
        monkeypatch.setattr("pipelines.features.loading.load_adapter", lambda path, **_: vlm)
        self.vlm, self.root = vlm, root
        content = []
        for photo in photos:
            buffer = io.BytesIO()
            photo.save(buffer, "PNG")
            content.append(buffer.getvalue())
        names = [hashlib.sha256(one).hexdigest() for one in content]
        self.photos = dict(zip(names, photos, strict=True))
        widths, heights = zip(*(photo.size for photo in photos), strict=True)
        rows = {"image": names, "width": widths, "height": heights, "bytes": content}
        pq.write_table(pa.table(rows, IMAGES), root / "images.parquet")
        self.table = pd.DataFrame(
            [
                {
                    "example_id": f"pope:{name[:6]}:{number}",
                    "image": name,
                    "width": photo.size[0],
                    "height": photo.size[1],
                    "prompt": prompt,
                    "family": "vqa",
                    "max_new_tokens": MAX_NEW,
                }
                for name, photo in self.photos.items()
                for number, prompt in enumerate(ASKED)
            ]
        )
        settings = FeatureSettings(dtype="float32", shard_images=2, batch_size=2)
        self.store, self.encoded = encode_missing(
            "model", root / "images.parquet", root / "features", settings, ONE, **in_memory(vlm)
        )
        self.layouts = image_layouts(vlm, self.table)
        self.counts = Layouts.of(self.layouts.values(), dynamic=True)
        self.costs = sweep_costs(vlm, self.table)
        self.examples = read_examples(self.table, self.store.identity, self.layouts)

    def expand(self, unit, budgets, *entries):
        return expand(sweep_settings(unit, budgets, *entries), self.counts, self.vlm.layers)

    def run(self, trials, results, unit_images=3, done=lambda *_: None):
        spec = SweepSpec(
            model="model",
            feature_root=str(self.root / "features"),
            feature_identity=self.store.identity,
            encoder=self.vlm.encoder_identity,
            results=str(results),
            images=str(self.root / "images.parquet"),
            threads=1,
        )
        outcome = run_sweep(
            spec,
            trials,
            self.examples,
            ONE,
            costs=self.costs,
            speed=SLOW,
            unit_images=unit_images,
            on_done=done,
            in_process=True,
        )
        return Swept.of(outcome, results, trials, self.examples)


@pytest.fixture(scope="module", params=["tiny_next", "tiny_qwen"])
def dynamic(request, photos, tmp_path_factory) -> Iterator[Dynamic]:
    """Encoded once for all tests; none writes where another reads."""
    with pytest.MonkeyPatch.context() as patch:
        yield Dynamic(request.getfixturevalue(request.param), photos, tmp_path_factory.mktemp("dynamic"), patch)


def test_a_shard_holds_images_of_one_layout_and_says_which(dynamic):
    assert dynamic.encoded == len(dynamic.photos)
    groups = dynamic.store.by_layout(sorted(dynamic.photos))
    assert len(groups) == len(dynamic.counts.counts) > 4
    for layout, images in groups.items():
        assert {dynamic.layouts[image] for image in images} == {layout}
        signals = dynamic.store.read(images)
        encoded = dynamic.vlm.encode_images([dynamic.photos[image] for image in images])
        for row, image in enumerate(encoded):
            for name, value in image.signals.items():
                assert (signals[name][row] - value).abs().max() < 1e-5


def test_encoding_reads_every_row_group_of_prepared_images_once(tiny_qwen, tmp_path, monkeypatch):
    """Images of seven sizes in mixed order, written as ``prepare`` does and as they come: the same store, read less."""
    monkeypatch.setattr("pipelines.features.encoding.load_model", lambda path, device, loading: tiny_qwen)
    monkeypatch.setattr("pipelines.features.loading.load_adapter", lambda path, **_: tiny_qwen)
    monkeypatch.setattr("pipelines.data.datasets.IMAGES_PER_ROW_GROUP", 8)
    sizes = [(60, 40), (30, 70), (48, 48), (100, 30), (41, 57), (73, 65), (24, 90)]
    rng = np.random.default_rng(3)
    rows = []
    for number in range(100):
        buffer = io.BytesIO()
        photo = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(sizes[number * 5 % 7])
        photo.save(buffer, "PNG")
        picture = {"bytes": buffer.getvalue(), "path": ""}
        answer = {"question": "where ?", "answer": "yes", "category": "random"}
        rows.append({"id": str(number), "question_id": str(number), "image": picture, **answer})
    pq.write_table(pa.Table.from_pylist(rows, get_benchmark("pope").schema), tmp_path / "pope.parquet")
    order = functools.cache(lambda size: layout_order(tiny_qwen.layout_of(size)))
    read: list[int] = []
    take = pq.ParquetFile.read_row_groups

    def counted(held, groups, columns=None):
        read.extend(groups if "bytes" in columns else [])
        return take(held, groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    settings, stores, counts = FeatureSettings(dtype="float32", shard_images=8, batch_size=4), [], []
    for name, by in (("sorted", order), ("mixed", lambda size: ())):
        images = tmp_path / f"{name}.parquet"
        write_examples({"pope": tmp_path}, "testbed", tmp_path / "e.parquet", images, order=by)
        store, encoded = encode_missing("m", images, tmp_path / name, settings, ONE, **in_memory(tiny_qwen))
        assert encoded == 100
        stores.append({path.name: path.read_bytes() for path in store.folder.iterdir()})
        counts.append((sorted(read), pq.ParquetFile(images).num_row_groups))
        read.clear()
    assert stores[0] == stores[1], "the store does not know in which order images were read"
    once, groups = counts[0]
    assert once == list(range(groups))
    mixed, groups = counts[1]
    assert len(mixed) > 5 * groups


def test_every_answer_is_that_of_the_image_alone_in_units_of_any_size(dynamic, tmp_path):
    """The slow way: pixels, one image, one question, one trial at a time, budgets from the image's own tokens.

    Every trial on every third image, and every image under every third trial. Units of one image come to the same, and
    nothing is asked twice.
    """
    vlm, trials = dynamic.vlm, dynamic.expand("share", SHARES, *GRIDS)
    assert len(trials) == 1 + 2 * 3 * 2 + 2 * 2 + 1 + 2 * 2 * 2
    outcome = dynamic.run(trials, tmp_path / "results")
    assert not outcome.failures
    found = outcome.predictions.to_pandas().set_index(["trial_id", "example_id"])
    assert len(found) == len(trials) * len(dynamic.table)
    kept = outcome.kept.to_pandas().set_index(["trial_id", "image"])
    alone_encoded = functools.cache(lambda image: vlm.encode_images([dynamic.photos[image]]))
    pairs = itertools.product(enumerate(trials), enumerate(dynamic.photos))
    for trial, image in [(trial, image) for (row, trial), (column, image) in pairs if (row + column) % 3 == 0]:
        asked = trial.spec

        def spec_of(layout, asked=asked, trial=trial):
            if asked.budget is None:
                return specify("unpruned")
            layers = {"layer": asked.stage2.layers_of(vlm.layers)} if asked.stage2 else {}
            return specify(
                asked.method,
                position=asked.position,
                budget=max(1.0, trial.budgets[0] * layout.tokens),
                stage2={**layers, "scorer": asked.stage2.scorer} if asked.stage2 else None,
                without_stage2=asked.stage2 is None,
            )

        mine = dynamic.table[dynamic.table["image"] == image]
        for row in mine.itertuples():
            batch = ImageBatch(encoded=alone_encoded(image), names=[image], questions=[[row.prompt]])
            ((alone,),) = answer_encoded(vlm, batch, spec_of, MAX_NEW)
            there = found.loc[(trial.trial_id, row.example_id)]
            assert (alone.text, alone.kept_last) == (there["prediction"], tuple(there["kept_final"])), trial.label
            assert tuple(kept.loc[(trial.trial_id, image)]["indices"]) == alone.kept.slots

    done = []
    other = dynamic.run(trials, tmp_path / "other", unit_images=1, done=lambda unit, report: done.append(report))
    assert same(outcome, other) and sum(report.answers for report in done) == len(trials) * len(dynamic.table)
    again = []
    assert same(dynamic.run(trials, tmp_path / "other", done=lambda *_: again.append(1)), outcome) and not again


def test_rows_hold_means_over_images(dynamic):
    trials = dynamic.expand("share", [0.8], GRIDS[0])
    layouts = [dynamic.layouts[image] for image in dynamic.photos]
    tokens = sum(layout.tokens for layout in layouts) / len(layouts)
    for trial in trials:
        row = trial.row(dynamic.counts, lambda schedule: {"flops": float(schedule.tokens), "words": "same"})
        averages = [trial.on(layout).schedule.average_tokens for layout in layouts]
        assert row["average_tokens"] == pytest.approx(sum(averages) / len(averages))
        assert row["image_tokens"] == round(tokens) and row["flops"] == pytest.approx(tokens)
        if trial.budgets:
            assert row["budget"] == round(0.8 * round(tokens)) and row["budgets"] == [row["budget"]]
            assert abs(row["average_tokens"] - 0.8 * tokens) < 0.5
    assert trials[1].label.startswith("nuwa · 80 % · perc")


def test_a_race_costs_budgets_as_they_are_and_everything_else_exactly(dynamic):
    """Shares of images of many sizes are no whole tokens: what one share costs is one cost, two shares are two."""
    close = [0.7, 0.71]
    entries = [
        {"name": "g", "method": ["nuwa", "random"], "position": ["perc", "pesp"]},
        {"name": "g", "method": "uniform", "stage2_layer": "off"},
    ]
    trials = dynamic.expand("share", close, *entries)
    counts = dynamic.counts
    rows = {trial.trial_id: trial.row(counts, lambda schedule: {"flops": float(schedule.tokens)}) for trial in trials}
    costs = {trial.trial_id: race_cost(trial, rows[trial.trial_id], counts, "average_tokens") for trial in trials}
    tokens = sum(dynamic.layouts[image].tokens for image in dynamic.photos) / len(dynamic.photos)
    for trial in trials:
        row, cost = rows[trial.trial_id], costs[trial.trial_id]
        assert race_cost(trial, row, counts, "flops") == row["flops"]
        expected = trial.budgets[0] * tokens if trial.budgets else tokens
        assert cost == pytest.approx(expected, rel=1e-12) and abs(cost - row["average_tokens"]) <= 0.5
    assert len(set(costs.values())) == 3, "two shares and everything"
    one = next(trial for trial in trials if trial.spec.method == "random" and trial.budgets == (0.7,))
    far = rows[one.trial_id] | {"average_tokens": 0.7 * tokens - 2}
    assert race_cost(one, far, counts, "average_tokens") == 0.7 * tokens - 2, "coarser grids really cost less"


def test_an_absolute_budget_keeps_all_of_an_image_that_has_fewer(dynamic):
    largest = max(layout.tokens for layout in dynamic.counts.counts)
    _, trial = dynamic.expand("tokens", [largest - 1.0], {"name": "g", "method": "random"})
    for layout in dynamic.counts.counts:
        kept = trial.on(layout).schedule.stage1_keep
        assert kept == min(largest - 1, layout.tokens)
        assert budget_on(layout, largest - 1.0, "tokens", dynamic=True) == kept


@pytest.mark.parametrize("dynamic", ["tiny_next"], indirect=True)
def test_a_budget_out_of_reach_on_one_image_is_refused_or_left_out(dynamic):
    entry = {"name": "g", "method": "random"}
    with pytest.raises(SettingsError) as caught:
        dynamic.expand("tokens", [5.0], entry)
    assert str(caught.value).startswith(
        "sweep.grids.0 (g), method random: 5 tokens before the first cut are out of reach"
    )
    assert str(caught.value).endswith("tokens); give the entry its own budget or set where_reachable: true")
    assert len(dynamic.expand("tokens", [5.0], {**entry, "where_reachable": True})) == 1
    told: list[str] = []
    several = {"name": "g", "method": ["random", "uniform"], "position": ["perc", "pesp"], "where_reachable": True}
    settings = sweep_settings("tokens", [5.0, 30.0], several, {**several, "name": "h", "budget": 30})
    kept = expand(settings, dynamic.counts, dynamic.vlm.layers, told.append)
    assert len(kept) == 5, "the unpruned one, and two methods at 30"
    (line,) = told
    assert line.startswith(
        "grid 'g' leaves out 4 trials that cannot be reached: random at 5; uniform at 5 "
        "(the first: 5 tokens before the first cut are out of reach on this image: allowed "
    )
    assert re.search(r"newline tokens \(budget 5, an image of \d+ tokens\)\)$", line)
    with pytest.raises(ValueError, match=r"budget 5 of grid 'g' must lie in \(0, 1\]: budget_unit is share"):
        dynamic.expand("share", [5.0], entry)


def test_the_forecast_is_the_sum_over_images(dynamic):
    """With as many layouts as are costed one by one, against each image's own trials on its own questions."""
    trials = dynamic.expand("share", SHARES, *GRIDS)
    assert {part.layout for part in dynamic.costs} == set(dynamic.counts.counts)
    alone = sum(part.alone(trial.on(part.layout)) for part in dynamic.costs for trial in trials)
    expected = forecast(trials, dynamic.costs)
    assert expected.alone_flops == alone and expected.answers == len(trials) * len(dynamic.table)
    model = dynamic.costs[0].model
    for part in dynamic.costs:
        (unpruned,) = (trial.on(part.layout) for trial in trials if trial.spec.method == "unpruned")
        prefix = model.system + part.layout.tokens
        text, made = part.load.text, part.load.made
        rows = part.load.questions * prefix + text
        assert part.alone(unpruned) > model.layers * rows * model.token + made * model.layers * model.token
        assert unpruned.schedule.stage1_keep == part.layout.tokens
    units, cached = plan_units(trials, dynamic.examples, [], dynamic.costs, SLOW, 3)
    assert cached == 0
    asked = [(t.trial_id, e.digest) for unit in units.values() for t in unit.trials for e in unit.examples]
    assert len(asked) == len(set(asked)) == expected.answers


def test_trials_alike_on_a_layout_run_once(dynamic, tmp_path, monkeypatch):
    """A budget above what every image has is everything, so two such budgets of a method are the same work."""
    largest = max(layout.tokens for layout in dynamic.counts.counts)
    entry = {"name": "g", "method": ["random", "uniform"], "stage2_layer": "off"}
    trials = dynamic.expand("tokens", [largest + 1.0, largest + 2.0], entry)
    assert len(trials) == 5
    branches = []
    monkeypatch.setattr("pipelines.sweep.answers.branch", lambda *args: branches.append(1) or branch(*args))
    outcome = dynamic.run(trials, tmp_path / "results", unit_images=1)
    answers = outcome.predictions.to_pandas().pivot(index="example_id", columns="trial_id", values="prediction")
    assert answers.nunique(axis=1).eq(1).all() and answers.shape == (len(dynamic.table), 5)
    together = [unit for unit in ResultStore(tmp_path / "results").done() if len(unit.trials) == 5]
    assert len(together) == len(dynamic.photos), "a unit an image, so that what follows is a count of one layout each"
    assert len(branches) == 3 * len(dynamic.photos), "unpruned, random and uniform"


@pytest.mark.parametrize("dynamic", ["tiny_qwen"], indirect=True)
def test_seeds_count_wherever_they_may_matter(dynamic):
    """A budget that is everything on the typical image is none on larger ones; ids do not hang on which is typical."""
    typical = dynamic.counts.typical.tokens
    assert any(layout.tokens > typical for layout in dynamic.counts.counts)
    entry = {"name": "g", "method": "nuwa", "stage2_scorer": "random", "seed": [0, 1, 2]}
    ids = []
    for counts in (dynamic.counts, Layouts({layout: 1 for layout in reversed(dynamic.counts.counts)}, dynamic=True)):
        trials = expand(sweep_settings("tokens", [float(typical)], entry), counts, dynamic.vlm.layers)
        assert len(trials) == 4
        ids.append([trial.trial_id for trial in trials])
    assert ids[0] == ids[1]


def test_an_image_that_no_model_takes_is_named(tiny_qwen):
    with pytest.raises(ImpossibleImage) as caught:
        layouts_of(tiny_qwen, {"a" * 64: (40, 40), "b" * 64: (2000, 8)})
    assert str(caught.value).startswith(f"image {'b' * 12} of 2000x8 pixels: the model takes no such image (absolute")
