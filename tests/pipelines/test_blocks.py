"""Half precision: the same settings give the same bytes, whatever the workers, the kills and the steps in between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from bare_cluster import bare_ray
from bench import SLOW, Bench, Swept, same

from pipelines.data.datasets import choose_questions
from pipelines.features.encoding import encode_missing
from pipelines.features.loading import Loading
from pipelines.settings import ClusterSettings, FeatureSettings
from pipelines.sweep import results
from pipelines.sweep.answers import SweepSpec, run_sweep
from pipelines.sweep.results import ResultStore
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import Blocks, UnitExample, plan_units, read_examples

BLOCKS = Blocks(3, seed=5)
BENCHMARKS = ["refcoco", "pope"]  # one question an image and two
ONE = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
METHODS = {"unpruned", "nuwa", "sparsevlm", "downsample", "random"}  # cut once and often, of other images, drawn
SETTINGS = FeatureSettings(dtype="float16", shard_images=5, batch_size=3)


class Killed(Exception):
    """As a driver that goes: what is stored stays."""


@dataclass
class HalfBench:
    """The bench's sweep in half precision."""

    bench: Bench
    spec: SweepSpec
    trials: list[Trial]
    images: int  # of every benchmark

    def examples(self, images: int | None = None) -> list[UnitExample]:
        """Of the first so many ``images`` of every benchmark."""
        images = images or self.images
        table = choose_questions(self.bench.questions.examples, BENCHMARKS, images, BLOCKS.seed).examples
        return read_examples(table, "context", None, BLOCKS)

    def run(
        self,
        results: Path | str,
        images: int | None = None,
        cluster: ClusterSettings = ONE,
        speed: float = SLOW,
        kill: int = 0,
    ) -> tuple[Swept, int]:
        """The sweep's tables and how many answers were made; ``kill``: after so many units."""
        made = []

        def done(unit_id: str, report: object) -> None:
            made.append(report.answers)
            if len(made) == kill:
                raise Killed

        outcome = run_sweep(
            replace(self.spec, results=str(results)),
            self.trials,
            self.examples(images),
            cluster,
            costs=self.bench.costs,
            speed=speed,
            unit_images=BLOCKS.images,
            on_done=done,
            in_process=cluster.workers == 1,
        )
        assert not outcome.failures
        return Swept.of(outcome, results, self.trials, self.examples(images)), sum(made)


# Neither is quick on a CPU: of each benchmark two whole blocks and one of a single image, or one of either.
@pytest.fixture(scope="module", params=[("float16", 4), ("bfloat16", 7)], ids=["float16", "bfloat16"])
def half(request, bench, tmp_path_factory) -> HalfBench:
    dtype, images = request.param
    root, loading = tmp_path_factory.mktemp("half"), Loading(dtype)
    store, _ = encode_missing(bench.model, bench.images, root, SETTINGS, ONE, loading=loading, in_process=True)
    spec = replace(
        bench.spec(root),
        feature_root=str(root),
        feature_identity=store.identity,
        loading=loading,
        images=str(bench.images),
    )
    chosen = {trial.spec.method: trial for trial in bench.trials if trial.spec.method in METHODS}
    assert chosen.keys() == METHODS
    return HalfBench(bench, spec, list(chosen.values()), images)


@pytest.fixture(scope="module")
def whole(half, tmp_path_factory) -> Swept:
    swept, made = half.run(tmp_path_factory.mktemp("whole"))
    assert made == len(half.trials) * len(half.examples())
    return swept


def test_units_of_another_size_give_the_same_bytes(half, whole, tmp_path):
    fast, _ = half.run(tmp_path, speed=1e15)
    assert same(fast, whole)
    assert len(ResultStore(tmp_path).done()) == len({example.block for example in half.examples()})


# Units of another size give the same bytes in both; what follows from that is shown in one.
@pytest.mark.parametrize("half", [("bfloat16", 7)], indirect=True)
def test_a_killed_sweep_of_more_images_than_before_goes_on_to_the_same_bytes(half, whole, tmp_path):
    """Whole blocks are kept; the last of each benchmark is asked again."""
    _, first = half.run(tmp_path, images=4)
    with pytest.raises(Killed):
        half.run(tmp_path, kill=3)
    killed = sum(len(unit.trials) * len(unit.examples) for unit in ResultStore(tmp_path).done()) - first
    assert killed > 0
    resumed, rest = half.run(tmp_path)
    assert same(resumed, whole)
    everything = len(half.trials) * len(half.examples())
    assert rest > 0 and everything < first + killed + rest < everything + first
    assert half.run(tmp_path)[1] == 0


@pytest.mark.parametrize("half", [("bfloat16", 7)], indirect=True)
def test_workers_of_a_cluster_give_the_same_bytes_on_a_bucket(
    half, whole, cluster, warm, bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(results, "FOOTERS", tmp_path / "footers")
    assert cluster.workers == 2
    with bare_ray(num_cpus=2):  # begun here, for workers have the bucket's keys from its environment
        assert same(half.run(bucket, cluster=cluster)[0], whole)


# How questions are cut


def table(images: int) -> pd.DataFrame:
    """Three questions an image of ``one``, one an image of ``two``."""
    rows = [("one", f"{image:02d}", number) for image in range(images) for number in range(3)]
    rows += [("two", f"{image:02d}", 0) for image in range(images)]
    return pd.DataFrame(
        {
            "benchmark": [name for name, *_ in rows],
            "example_id": [f"{name} {image} {number}" for name, image, number in rows],
            "image": [image for _, image, _ in rows],
            "prompt": "what ?",
            "max_new_tokens": 3,
        }
    )


def blocks(questions: pd.DataFrame, cut: Blocks = BLOCKS) -> dict[str, list[UnitExample]]:
    held: dict[str, list[UnitExample]] = {}
    for example in read_examples(questions, "context", None, cut):
        held.setdefault(example.block, []).append(example)
    return held


def test_a_block_is_a_run_of_images_with_all_that_one_benchmark_asks_of_them():
    cut = blocks(table(8))
    assert sorted(example.example_id for block in cut.values() for example in block) == sorted(table(8)["example_id"])
    assert sorted(len(block) for block in cut.values()) == [2, 3, 3, 6, 9, 9]
    for block in cut.values():
        assert len({example.example_id.partition(" ")[0] for example in block}) == 1
    assert list(cut) == list(blocks(table(8).sample(frac=1, random_state=1))), "whatever the order of rows"
    assert blocks(table(8), Blocks(3, seed=6)).keys() != cut.keys()
    assert blocks(table(8), Blocks(4, seed=5)).keys().isdisjoint(cut)


def test_whole_blocks_stay_what_they_are():
    few = choose_questions(table(20), ["one", "two"], 7, BLOCKS.seed).examples
    many = choose_questions(table(20), ["one", "two"], 14, BLOCKS.seed).examples
    before, after = blocks(few), blocks(many)
    kept = before.keys() & after.keys()
    assert sorted(len(before[name]) for name in kept) == [3, 3, 9, 9]
    digests = {example.digest for block in after.values() for example in block}
    assert {example.digest for name in before.keys() - kept for example in before[name]}.isdisjoint(digests)


@pytest.mark.parametrize("half", [("bfloat16", 7)], indirect=True)
def test_a_block_is_never_cut(half):
    """Not by the plan, not for want of memory, and not for an example that is given up."""
    examples = half.examples()
    units, _ = plan_units(half.trials, examples, [], half.bench.costs, SLOW, 1)
    sizes = {block: sum(example.block == block for example in examples) for block in {one.block for one in examples}}
    for unit in units.values():
        assert {example.block for example in unit.examples} == {unit.block}
        assert len(unit.examples) == sizes[unit.block]
    unit = max(units.values(), key=lambda unit: len(unit.trials))
    assert all(part.examples == unit.examples for part in unit.split().values())
    alone = unit.only(unit.trials[:1])
    assert alone.split() == {}
    assert alone.suspects == {
        ("trial", unit.trials[0].trial_id): unit.block,
        ("block", unit.block): unit.trials[0].trial_id,
    }
    for member in (("block", unit.block), ("example", unit.examples[0].example_id), ("image", unit.images[-1])):
        assert unit.without({member}) == (None, [unit]), "nothing of it is asked without the rest"
    rest, (taken,) = unit.without({("trial", unit.trials[0].trial_id)})
    assert rest.examples == taken.examples == unit.examples


@pytest.mark.parametrize("half", [("bfloat16", 7)], indirect=True)
def test_a_block_of_which_anything_is_missing_is_asked_whole(half):
    examples = half.examples()
    trial, block = half.trials[0], examples[0].block
    digests = [example.digest for example in examples if example.block == block]
    units, cached = plan_units([trial], examples, [([trial.trial_id], digests[:-1])], half.bench.costs, SLOW, 1)
    assert cached == 0
    assert sum(len(unit.examples) for unit in units.values()) == len(examples)
    units, cached = plan_units([trial], examples, [([trial.trial_id], digests)], half.bench.costs, SLOW, 1)
    assert cached == len(digests)
    assert block not in {unit.block for unit in units.values()}
