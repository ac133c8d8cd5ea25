"""The sweep: an interrupted one continues, sharing changes nothing. That workers of Ray give the bytes of one process is
shown by test_chaos.py, while they are killed, and by test_blocks.py in half precision; what becomes of units there, by
workers/test_policy.py.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from bench import BENCHMARKS, SLOW, same
from forked import forked, kill_when

from nuwa.decoder import Trunk
from nuwa.grid import PatchGrid
from nuwa.methods import RECIPES, Recipe
from nuwa.signals import SIGNAL_NAMES
from nuwa.stage1 import get_method
from nuwa.stage1.registry import METHODS, register
from nuwa.stage1.uniform import Uniform
from nuwa.vlm import LlavaAdapter
from pipelines.features.encoding import encode_missing
from pipelines.features.identity import ModelIdentity
from pipelines.features.images import read_images
from pipelines.features.loading import Loading
from pipelines.features.store import FeatureStore
from pipelines.files.lock import exclusive
from pipelines.files.storage import StorageFull
from pipelines.settings import FeatureSettings, SweepSettings
from pipelines.sweep import answers as answering
from pipelines.sweep.answers import branch
from pipelines.sweep.identity import answer_context
from pipelines.sweep.results import ResultStore, file_of
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.sweep.units import WorkUnit, read_examples
from pipelines.workers import UnitsFailed, run_units

LAYERS = 8  # of the random model
NO_MOUNT = 77  # of a process that may not mount


def test_every_trial_answers_every_question_once(bench, undisturbed):
    assert len(bench.trials) == 15
    assert undisturbed.predictions.num_rows == len(bench.trials) * len(bench.questions.examples)
    assert undisturbed.kept.num_rows == len(bench.trials) * 12
    frame = undisturbed.predictions.to_pandas()
    assert not frame.duplicated(["trial_id", "example_id"]).any()
    assert frame.groupby("trial_id")["prediction"].agg(tuple).nunique() > 5, "trials must be able to differ"


def test_a_language_model_that_overflows_is_refused_at_once_with_its_layer(bench, cluster, tmp_path):
    """No number that is not finite becomes an answer, and the unpruned trial is not left to the end of the sweep."""
    vlm = LlavaAdapter.load(bench.model)
    vlm.language.layers[3].mlp.down_proj.weight.data.fill_(torch.inf)
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    with pytest.raises(UnitsFailed) as caught:
        replace(bench, model=str(tmp_path / "model")).run(tmp_path / "results", cluster)
    assert str(caught.value) == (
        "the unpruned trial has no answers: model.dtype float32: layer 3 of the language model gave numbers that are not "
        "finite; set it to bfloat16 or float32, or look at the model's weights"
    )
    assert ResultStore(tmp_path / "results").done() == []


@pytest.fixture
def glaring(bench, monkeypatch) -> Trial:
    """A trial of a method of one's own whose merged tokens go beyond the largest float32."""
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS))
    # Before it is registered, which would leave one of its own behind.
    monkeypatch.setitem(RECIPES, "glaring", Recipe("glaring"))

    @register("glaring", Uniform)
    def select(signals, keep, config, seed=0):
        chosen = get_method("uniform").select(signals, keep, config, seed)
        return replace(chosen, features=chosen.features * 3e38)

    grid = {"name": "sums", "method": "glaring", "budget": 16}
    plan = SweepSettings(benchmarks=BENCHMARKS, images=None, subset_seed=0, unit_images=4, budgets=[16], grids=[grid])
    _, trial = expand(plan, Layouts.fixed(PatchGrid(12, 12)), 8)  # behind the unpruned one
    return trial


def test_a_pruned_trial_that_overflows_alone_is_given_up_by_name(bench, undisturbed, cluster, glaring, tmp_path):
    """It has no answers, not even some; every other trial has those it has without it."""
    others = bench.trials[::3]
    outcome = bench.run(tmp_path, cluster, trials=[*others, glaring], unit_images=12, speed=1e13)
    assert {trial_id: failure.reason for trial_id, failure in outcome.incomplete.items()} == {
        glaring.trial_id: "NotFinite: model.dtype float32: layer 0 of the language model gave numbers that are not finite; set "
        "it to bfloat16 or float32, or look at the model's weights"
    }
    wanted = {trial.trial_id for trial in others}
    assert {trial for unit in ResultStore(tmp_path).done() for trial in unit.trials} == wanted
    for part in ("predictions", "kept"):
        frame = undisturbed.table(part).to_pandas().query("trial_id in @wanted").reset_index(drop=True)
        assert outcome.table(part).to_pandas().equals(frame)


def test_shared_trunks_answer_as_each_trial_alone(bench, undisturbed):
    """The slow way: a trunk of its own for every trial and image, one question at a time, one image encoded alone."""
    vlm = LlavaAdapter.load(bench.model)
    pictures = read_images(bench.images, sorted(set(bench.questions.examples["image"])))
    features = FeatureStore(bench.root, bench.identity)
    answers = undisturbed.predictions.to_pandas().set_index(["trial_id", "example_id"])["prediction"]
    checked = bench.trials[::2]
    assert any(get_method(trial.spec.stage1).reads_images for trial in checked), "one that encodes images anew"
    for trial in checked:
        method = get_method(trial.spec.stage1)
        for example in bench.questions.examples.iloc[::3].itertuples():
            resized = partial(vlm.encode_resized, [pictures[example.image]])
            signals = vlm.signals(features.read([example.image]), (example.image,), resized)
            selection = method.select(signals, *trial.plan.keeps, trial.spec.config, trial.spec.seed)
            trunk = Trunk(vlm, selection, [[vlm.encode_prompt(example.prompt)]], trial.spec.position, (example.image,))
            if trial.cuts:
                trunk.advance(trial.first_cut, frozenset({trial.first_cut - 1}))
            (alone,) = branch(trunk, trial, [example.max_new_tokens])
            assert vlm.decode_text(list(alone.tokens)) == answers[trial.trial_id, example.example_id]


def test_a_driver_killed_half_way_is_continued(bench, undisturbed, cluster, tmp_path):
    """SIGKILL once some units are on disk; the rerun does the rest, and nothing differs.

    The driver is a copy of this process, which no test has started Ray in yet: its threads would not be copied.
    """
    results = tmp_path / "results"
    kill_when(lambda: len(list(results.rglob("*.unit.parquet"))) >= 3, lambda: bench.run(results, cluster))
    units = bench.units(results)
    assert units, "killed half-way means that something is left to do"
    redone = []
    outcome = bench.run(results, cluster, done=lambda unit, result: redone.append(unit))
    assert sorted(redone) == sorted(units)
    assert same(outcome, undisturbed)


def test_only_what_is_missing_is_computed(bench, undisturbed, cluster, tmp_path):
    """First some trials on one benchmark, then all of everything in other units, then nothing is left."""
    first = [example for example in bench.examples if example.example_id.startswith("pope")]
    bench.run(tmp_path, cluster, trials=bench.trials[:6], examples=first)
    done = []
    outcome = bench.run(tmp_path, cluster, unit_images=7, done=lambda unit, report: done.append(report.answers))
    assert sum(done) == len(bench.trials) * len(bench.examples) - 6 * len(first)
    assert same(outcome, undisturbed)
    again = []
    assert same(bench.run(tmp_path, cluster, done=lambda unit, report: again.append(unit)), undisturbed)
    assert not again


def test_answers_to_other_words_are_not_taken_for_these(few, undisturbed_few, cluster, tmp_path):
    """A question whose text has changed keeps its id; its old answers stay in the store and out of the tables."""
    changed = few.questions.examples.copy()
    changed.loc[0, "prompt"] = "how many digits are there?"
    few.run(tmp_path, cluster, examples=read_examples(changed, few.context))
    done = []
    outcome = few.run(tmp_path, cluster, done=lambda unit, report: done.append(report.examples))
    assert set(done) == {1}, "just the one question is asked again"
    assert same(outcome, undisturbed_few)


def test_images_are_decoded_once_a_batch_and_then_let_go(bench, cluster, tmp_path, monkeypatch):
    """Downsampling to two sizes under two strategies, a trial or two a unit; the images stay as long as their batch."""
    grid = {"name": "small", "method": "downsample", "budget": [16, 36], "position": ["perc", "pesp"]}
    plan = SweepSettings(benchmarks=BENCHMARKS, images=None, subset_seed=0, unit_images=4, budgets=[16], grids=[grid])
    decoded, alive, held, resized = [], [], [], []

    def counted(path, images):
        found = read_images(path, images)
        decoded.append(images)
        alive.extend(weakref.ref(picture) for picture in found.values())
        return found

    def watched(vlm, pictures, size, encode=LlavaAdapter.encode_resized):
        resized.append(size)
        return encode(vlm, pictures, size)

    monkeypatch.setattr(answering, "read_images", counted)
    monkeypatch.setattr(LlavaAdapter, "encode_resized", watched)

    def count(unit: object, report: object) -> None:
        held.append(sum(picture() is not None for picture in alive))

    trials = expand(plan, Layouts.fixed(PatchGrid(12, 12)), LAYERS)
    assert not bench.run(tmp_path, cluster, trials=trials, done=count, speed=SLOW / 10).failures
    images = sorted({example.image for example in bench.examples})
    assert sorted(image for batch in decoded for image in batch) == images, "each is decoded once"
    assert len(resized) > len(decoded) > 1
    assert 0 < max(held) == max(map(len, decoded)), "those of one batch at a time"


def test_an_example_that_raises_is_given_up_alone(few, undisturbed_few, cluster, tmp_path):
    """A prompt with a second image placeholder cannot be encoded."""
    poisoned = few.questions.examples.copy()
    poisoned.loc[5, "prompt"] = "what is in <image>?"
    victim = poisoned.loc[5, "example_id"]
    outcome = few.run(tmp_path, cluster, examples=read_examples(poisoned, few.context))
    assert {example.example_id for unit, _ in outcome.failures.values() for example in unit.examples} == {victim}
    assert set(outcome.incomplete) == {trial.trial_id for trial in few.trials}
    reasons = {failure.reason for failure in outcome.incomplete.values()}
    assert len(reasons) == 1 and "holds the model's image placeholder" in reasons.pop()
    rest = undisturbed_few.predictions.to_pandas().query("example_id != @victim").reset_index(drop=True)
    assert outcome.predictions.to_pandas().equals(rest)


def mount_small(folder: Path) -> None:
    """Put a file system of 64 kB at ``folder``, for this process alone; raises ``OSError`` where nobody may."""
    libc, who = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    new_user, new_mounts, private = 0x10000000, 0x00020000, (1 << 18) | (1 << 14)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(new_user | new_mounts))
    for name, line in {"setgroups": "deny", "uid_map": f"0 {who[0]} 1", "gid_map": f"0 {who[1]} 1"}.items():
        Path("/proc/self", name).write_text(line)
    check(libc.mount(b"none", b"/", None, private, None))
    check(libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=64k"))


def test_a_full_disk_stops_the_sweep_and_keeps_what_is_done(bench, cluster, tmp_path):
    """On a file system of 64 kB of its own, in a copy of this process, which no test has started Ray in yet."""

    def fill() -> None:
        try:
            mount_small(tmp_path)
        except OSError:
            sys.exit(NO_MOUNT)
        try:
            bench.run(tmp_path, cluster)
        except StorageFull as error:
            print(len(list(tmp_path.rglob("*.unit.parquet"))), error)

    ran = forked(fill)
    if ran.code == NO_MOUNT:
        pytest.skip("this system lets nobody mount a file system in a namespace of their own")
    assert ran.code == 0 and ran.out, ran.err[-2000:]
    finished, message = ran.out.split(" ", 1)
    assert int(finished) > 0
    assert "no space is left" in message and "run the same command again" in message


def test_a_cut_off_unit_is_done_again(few, undisturbed_few, cluster, tmp_path):
    few.run(tmp_path, cluster)
    victim = sorted(tmp_path.rglob("*.unit.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    redone = []
    outcome = few.run(tmp_path, cluster, done=lambda unit, result: redone.append(unit))
    assert redone == [victim.name.partition(".")[0]]
    assert same(outcome, undisturbed_few)


@dataclass(frozen=True)
class Broken:
    """A worker that raises where its unit, a name and an error, says so, and notes each try."""

    tries: list[str]

    def build(self):
        return self

    def run(self, unit, upcoming):
        name, error = unit
        self.tries.append(name)
        if error:
            raise KeyError(error)
        return name


def test_an_exception_is_recorded_and_the_rest_goes_on(cluster):
    finished = []
    units = {"good": ("good", ""), "bad": ("bad", "no such thing"), "fine": ("fine", "")}
    failures = run_units(Broken([]), units, cluster, lambda unit, result: finished.append(unit), in_process=True)
    assert sorted(finished) == ["fine", "good"]
    assert failures["bad"][1].reason == "KeyError: 'no such thing'"


def test_a_sweep_that_only_fails_stops_early(cluster):
    worker, units = Broken([]), {f"u{number}": (f"u{number}", "broken") for number in range(50)}
    with pytest.raises(UnitsFailed, match="the first 3 units all failed, so the run stops: KeyError: 'broken'"):
        run_units(worker, units, cluster, lambda unit, result: None, in_process=True)
    assert len(worker.tries) < 15


def test_one_driver_at_a_time(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(RuntimeError, match="is in use by another sweep; wait for it or stop it"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_results_name_what_they_hold(few, cluster, tmp_path):
    few.run(tmp_path, cluster)
    stored = ResultStore(tmp_path).done()
    held = {(trial, example) for unit in stored for trial in unit.trials for example in unit.examples}
    assert held == {(trial.trial_id, example.digest) for trial in few.trials for example in few.examples}
    assert len(stored) > 2
    for unit in stored:
        footer = pq.read_metadata(tmp_path / file_of(unit.unit))
        assert footer.row_group(0).num_rows == len(unit.trials) * len(unit.examples)


@dataclass(frozen=True)
class Numbers:
    """A unit of numbers that can be halved."""

    values: tuple[int, ...]

    @property
    def home(self):
        return self.values[0] // 8

    def split(self):
        middle = len(self.values) // 2
        return {str(half): Numbers(half) for half in (self.values[:middle], self.values[middle:]) if middle}


class Limited:
    """A worker with memory for four numbers, that cannot bear 13."""

    def build(self):
        return self

    def run(self, unit, upcoming):
        if len(unit.values) > 4:
            raise MemoryError(f"no room for {len(unit.values)} numbers")
        if 13 in unit.values:
            raise ValueError("13 is unlucky")
        return unit.values


def test_units_are_split_until_what_fails_stands_alone(cluster):
    units = {f"u{start}": Numbers(tuple(range(start, start + 8))) for start in range(0, 32, 8)}
    finished = []
    given_up = run_units(Limited(), units, cluster, lambda unit, values: finished.extend(values), in_process=True)
    assert sorted(finished) == [number for number in range(32) if number != 13]
    ((unit, failure),) = given_up.values()
    assert unit.values == (13,) and failure.reason == "ValueError: 13 is unlucky"


def test_a_worker_stays_with_its_data_while_there_is_any(cluster):
    """In this process, units of a home come one after the other, and each is told what comes next."""
    units = {f"u{number}": Numbers((number % 3 * 8, number)) for number in range(9)}
    seen = []

    class Watcher:
        def build(self):
            return self

        def run(self, unit, upcoming):
            seen.append((unit, upcoming))

    run_units(Watcher(), units, cluster, lambda unit, result: None, in_process=True)
    homes = [unit.home for unit, _ in seen]
    assert [homes[0]] * 3 + [homes[3]] * 3 + [homes[6]] * 3 == homes
    assert [upcoming for _, upcoming in seen[:-1]] == [unit for unit, _ in seen[1:]]
    assert seen[-1][1] is None


def test_a_sweep_runs_in_the_dtype_and_kernel_it_was_asked_for(bench, cluster, tmp_path):
    """Half precision is another model with other features, and its answers are kept apart."""
    loading = Loading("bfloat16", "eager")
    settings = FeatureSettings(dtype="float32", shard_images=5, batch_size=3)
    root = tmp_path / "features"
    store, _ = encode_missing(bench.model, bench.images, root, settings, cluster, loading=loading, in_process=True)
    assert store.identity != bench.identity
    vlm = loading.here(bench.model)
    kernels = (loading, loading._replace(attention="sdpa"))
    known = [ModelIdentity.of(bench.model, kernel, vlm) for kernel in kernels]
    contexts = {answer_context(one, vlm, settings).digest for one in known}
    assert len(contexts | {bench.context}) == 3
    spec = replace(bench.spec(tmp_path / "results"), feature_root=str(root), feature_identity=store.identity)
    worker = replace(spec, encoder=known[0].fingerprint, loading=loading).build()
    assert worker.vlm.model.dtype == torch.bfloat16
    assert worker.vlm.language.config._attn_implementation == "eager"
    unit = WorkUnit(tuple(bench.trials), tuple(bench.examples[:6]))
    report = worker.run(unit)
    assert report.answers == 6 * len(bench.trials)


def test_a_worker_without_the_encoders_weights_answers_alike(bench, undisturbed, cluster, tmp_path, monkeypatch):
    """As where Accelerate keeps them elsewhere: in the module stand tensors without numbers."""
    vlm = LlavaAdapter.load(bench.model)
    vlm.tower.to("meta")
    monkeypatch.setattr(answering, "load_model", lambda *_: vlm)
    seen = []

    def watched(planned, layout, views, select=answering.select_views):
        seen.extend(view.encoder for view in views)
        return select(planned, layout, views)

    monkeypatch.setattr(answering, "select_views", watched)
    trials = [trial for trial in bench.trials if not get_method(trial.spec.stage1).reads_images]
    outcome = bench.run(tmp_path, cluster, trials=trials)
    assert not outcome.failures
    assert set(seen) == {LlavaAdapter.load(bench.model).encoder_identity}, "methods check it"
    whole = undisturbed.predictions.to_pandas()
    whole = whole[whole["trial_id"].isin({trial.trial_id for trial in trials})]
    pd.testing.assert_frame_equal(outcome.predictions.to_pandas(), whole.reset_index(drop=True))


def test_stage_1_runs_where_the_model_is(bench, monkeypatch):
    """Features are read into the machine's memory; a model whose words stand on ``meta`` is asked where they go."""
    vlm = LlavaAdapter.load(bench.model)
    vlm.language.embed_tokens.to("meta")
    images = sorted({example.image for example in bench.examples})[:3]
    store = FeatureStore(bench.root, bench.identity)
    groups = answering.read_encoded(store, images, bench.encoder)
    seen = []

    def watched(planned, layout, views):
        seen.extend(views)
        raise RuntimeError("enough is seen")

    monkeypatch.setattr(answering, "select_views", watched)
    asked = tuple(example for example in bench.examples if example.image in images)
    answered = answering.answer_unit(vlm, groups, WorkUnit((bench.trials[0],), asked), answering.Words(vlm))
    assert [failure.reason for failure in answered.failed.values()] == ["RuntimeError: enough is seen"]
    assert {getattr(view, name).device.type for view in seen for name in SIGNAL_NAMES} == {"meta"}
    (view,) = groups[0].views
    assert view.features.device.type == "cpu", "what is read ahead stays"


def test_signals_on_their_device_are_not_copied(bench):
    store = FeatureStore(bench.root, bench.identity)
    (group,) = answering.read_encoded(store, sorted({example.image for example in bench.examples})[:3], bench.encoder)
    (view,) = group.views
    (moved,) = group.to(torch.device("cpu")).views
    assert all(getattr(moved, name) is getattr(view, name) for name in SIGNAL_NAMES)
    bare = replace(view, keys=None, similarity=None).to(torch.device("meta"))
    assert bare.keys is None and bare.similarity is None and bare.features.device.type == "meta"
    assert (bare.image_ids, bare.encoder) == (view.image_ids, bench.encoder)
