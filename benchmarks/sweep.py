"""What sharing is worth: two grids on the testbed's model, swept, against the same trials run one by one.

Three ways to get the same answers, in one process and one thread:

* *shared*: the sweep as it is, with planning, storing and collecting.
* *one by one*: every trial by itself with a loaded model, cached features and prompts, and batches of 64 questions sorted
  by length, each question its own sequence. Its answers and its time are compared with stock ``generate``.
* *the papers' way*: the model loaded and every image encoded again for every trial, one question at a time.

The slow ways answer a seeded sample and are scaled up by the number of questions, images and trials, unless ``--full``.
Time is CPU time of this one-thread process, so other programs on the machine hardly matter. The last line is one JSON
object.

    python -m benchmarks.sweep
    python -m benchmarks.sweep --images 12 --sample 64
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks import features
from benchmarks.planning import planning
from nuwa.decoder import Trunk
from nuwa.methods import specify
from nuwa.schedule import TokenSchedule
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.stage1 import get_method
from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.vlm import LlavaAdapter
from nuwa.vlm.shapes import model_shape
from pipelines.data.datasets import write_examples
from pipelines.features.encoding import encode_missing
from pipelines.features.images import read_images
from pipelines.features.loading import FULL_PRECISION, Loading
from pipelines.features.store import FeatureStore
from pipelines.settings import ClusterSettings, FeatureSettings
from pipelines.sweep.answers import SweepOutcome, SweepSpec, UnitReport, Words, run_sweep
from pipelines.sweep.collection import collect
from pipelines.sweep.costs import Costs, Load, ModelCost, forecast, sweep_costs, usual_speed
from pipelines.sweep.results import ResultStore
from pipelines.sweep.tree import work_tree
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import UnitExample, read_examples

MODEL = "models/testbed"
QUESTIONS = {"refcoco": 6, "refcocoplus": 4, "refcocog": 4, "pope": 6, "gqa": 4, "textvqa": 2}  # of each image
SEED = 7
BATCH = 64
UNIT_IMAGES = 25
ONE_WORKER = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
METHODS = ("nuwa", "visionzip", "random", "uniform")
POSITIONS = ("perc", "pesp", "rpme")
BARS = {"speedup_stage1_grid": 5.0, "speedup_stage2_grid": 3.0, "fraction_of_predicted": 0.8}
Result = TypeVar("Result")
BARS |= {"speedup_vs_papers_way": 15.0, "model_time_share": 0.9}


def stage1_grid(tokens: int, layers: int, budgets: Iterable[int]) -> list[Trial]:
    """Four methods at three budgets, under three position strategies, without stage 2."""
    return [
        Trial(specify(method, position=position, budget=keep), TokenSchedule(tokens, layers, keep), {})
        for method in METHODS
        for keep in budgets
        for position in POSITIONS
    ]


def stage2_grid(tokens: int, layers: int, keep: int, cuts: Sequence[int], keeps: Sequence[int]) -> list[Trial]:
    """Every layer x K2 x scorer behind three stage-1 settings."""
    return [
        Trial(
            specify(method, budget=keep, stage2={"layer": layer, "scorer": scorer}),
            TokenSchedule(tokens, layers, keep, ((layer, second),)),
            {},
        )
        for method in METHODS[:3]
        for layer in cuts
        for second in keeps
        for scorer in ("attention_last_token", "cosine_mean_text")
    ]


def clock(work: Callable[[], Result]) -> tuple[float, Result]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


@dataclass
class Bench:
    """The testbed's questions, their features and the model."""

    vlm: LlavaAdapter
    root: Path
    store: FeatureStore
    table: pd.DataFrame
    examples: list[UnitExample]
    costs: list[Costs]
    words: Words

    @classmethod
    def prepare(cls, root: Path, images: int) -> Bench:
        make_testbed_benchmark(root / "benchmarks", images, QUESTIONS, SEED)
        tables = dict.fromkeys(QUESTIONS, root / "benchmarks")
        write_examples(tables, "testbed", root / "examples.parquet", root / "images.parquet")
        settings = FeatureSettings(dtype="float32", shard_images=64, batch_size=25)
        store, _ = encode_missing(
            MODEL, root / "images.parquet", root / "features", settings, ONE_WORKER, in_process=True
        )
        vlm, table = LlavaAdapter.load(MODEL), pd.read_parquet(root / "examples.parquet")
        examples = read_examples(table, store.identity)
        return cls(vlm, root, store, table, examples, sweep_costs(vlm, table), Words(vlm))

    def shared(
        self, trials: Sequence[Trial], results: Path, loading: Loading = FULL_PRECISION
    ) -> tuple[float, dict[tuple[str, str], str], float]:
        """CPU seconds, the answers, and the share of the worker's wall time inside the decoder."""
        table = results / "predictions.parquet"
        spec = SweepSpec(
            model=MODEL,
            feature_root=str(self.root / "features"),
            feature_identity=self.store.identity,
            encoder=self.vlm.encoder_identity,
            results=str(results),
            images=str(self.root / "images.parquet"),
            threads=1,
            loading=loading,
        )
        reports: list[UnitReport] = []

        def run() -> SweepOutcome:
            outcome = run_sweep(
                spec,
                trials,
                self.examples,
                ONE_WORKER,
                costs=self.costs,
                speed=usual_speed("cpu", 1),
                unit_images=UNIT_IMAGES,
                on_done=lambda unit, report: reports.append(report),
                in_process=True,
            )
            ids = [trial.trial_id for trial in trials]
            collect(ResultStore(results), ids, self.examples, {"predictions": table}, results / "collecting")
            return outcome

        seconds, outcome = clock(run)
        if outcome.failures:
            raise SystemExit(f"the sweep failed: {next(iter(outcome.incomplete.values())).reason}")
        share = sum(report.model_seconds for report in reports) / sum(report.seconds for report in reports)
        frame = pq.read_table(table, columns=["trial_id", "example_id", "prediction"]).to_pylist()
        return seconds, {(row["trial_id"], row["example_id"]): row["prediction"] for row in frame}, share

    def one_by_one(self, trial: Trial, examples: Sequence[UnitExample]) -> dict[tuple[str, str], str]:
        """One trial, batched, sharing nothing between questions."""
        texts: dict[tuple[str, str], str] = {}
        for batch in self._batches(examples):
            images = tuple(sorted({example.image for example in batch}))
            signals = self.vlm.signals(self.store.read(images), images)
            selection = _select(trial, signals)
            rows = torch.tensor([images.index(example.image) for example in batch])
            each = Selection(selection.indices[rows], selection.features[rows], selection.pillars[rows])
            said = self._answer(trial, each, batch, [self.words.encode(example.prompt) for example in batch])
            texts |= {(trial.trial_id, example.example_id): text for example, text in zip(batch, said, strict=True)}
        return texts

    def _answer(self, trial: Trial, selection: Selection, batch: Sequence[UnitExample], prompts: list) -> list[str]:
        trunk = Trunk(
            self.vlm,
            selection,
            [[prompt] for prompt in prompts],
            trial.spec.position,
            [example.image for example in batch],
        )
        limits = [example.max_new_tokens for example in batch]
        answers = trunk.answer(trial.spec.running_cuts(trial.schedule), limits, trial.spec.seed)
        return [self.words.decode(answer.tokens) for answer in answers]

    def papers_way(self, trials: Sequence[Trial], examples: Sequence[UnitExample]) -> float:
        """Forecast CPU seconds of ``trials`` on all questions, from those of ``examples`` and their images."""
        pictures = read_images(self.root / "images.parquet", sorted({example.image for example in examples}))
        loading = encoding = answering = 0.0

        def encode(vlm: LlavaAdapter, picture: Image.Image) -> dict[str, torch.Tensor]:
            return vlm.encode(vlm.pixels([picture]))

        def answer(trial: Trial, signals: VisionSignals, example: UnitExample) -> list[str]:
            return self._answer(trial, _select(trial, signals), [example], [self.vlm.encode_prompt(example.prompt)])

        for trial in trials:
            seconds, vlm = clock(lambda: LlavaAdapter.load(MODEL))
            loading += seconds
            signals = {}
            for image, picture in pictures.items():
                seconds, encoded = clock(partial(encode, vlm, picture))
                encoding += seconds
                signals[image] = vlm.signals(encoded, (image,))
            for example in examples:
                answering += clock(partial(answer, trial, signals[example.image], example))[0]
        images = len({example.image for example in self.examples})
        whole = encoding * images / len(pictures) + answering * len(self.examples) / len(examples)
        return (loading + whole) / len(trials)

    def stock(self, examples: Sequence[UnitExample]) -> float:
        """Time of the unpruned trial one by one, over that of stock ``generate`` on the same cached features."""
        tokens, layers = self.vlm.grid.tokens, self.vlm.layers
        trial = Trial(specify("unpruned"), TokenSchedule(tokens, layers, tokens), {})
        ours, answers = clock(lambda: self.one_by_one(trial, examples))
        theirs, texts = clock(lambda: [pair for batch in self._batches(examples) for pair in self._generate(batch)])
        different = sum(answers[trial.trial_id, example_id] != text for example_id, text in texts)
        if different:
            raise SystemExit(f"{different} of {len(examples)} unpruned answers differ from stock generate")
        return ours / theirs

    @torch.inference_mode()
    def _generate(self, batch: Sequence[UnitExample]) -> list[tuple[str, str]]:
        """Stock ``generate`` on a batch, padded at the left, from embeddings of words and cached features."""
        images = tuple(sorted({example.image for example in batch}))
        projected = self.vlm.project(self.store.read(images)["features"])
        prompts = [self.words.encode(example.prompt) for example in batch]
        longest = max(len(prompt.after) for prompt in prompts)
        rows, padding = [], self.vlm.processor.tokenizer.pad_token_id
        for example, prompt in zip(batch, prompts, strict=True):
            pad = [padding] * (longest - len(prompt.after))
            before = self.vlm.language.embed_tokens(torch.tensor([*pad, *prompt.before]))
            after = self.vlm.language.embed_tokens(torch.tensor(prompt.after))
            rows.append(torch.cat([before, projected[images.index(example.image)], after]))
        embedded = torch.stack(rows)
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)

        for row, prompt in enumerate(prompts):
            mask[row, : longest - len(prompt.after)] = 0
        made = self.vlm.model.generate(
            inputs_embeds=embedded,
            attention_mask=mask,
            max_new_tokens=max(example.max_new_tokens for example in batch),
            do_sample=False,
        )
        return [
            (example.example_id, self.vlm.decode_text(row)) for example, row in zip(batch, made.tolist(), strict=True)
        ]

    def _batches(self, examples: Sequence[UnitExample]) -> list[list[UnitExample]]:
        """Batches of questions of like length."""
        ordered = sorted(examples, key=lambda example: (len(self.words.encode(example.prompt).after), example.image))
        return [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]


def _select(trial: Trial, signals: VisionSignals) -> Selection:
    (keep,) = trial.plan.keeps
    return get_method(trial.spec.stage1).select(signals, keep, trial.spec.config, trial.spec.seed)


def _sample(examples: Sequence[UnitExample], count: int) -> list[UnitExample]:
    if count >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(SEED).choice(len(examples), count, replace=False)
    return [examples[number] for number in sorted(chosen)]


def measure_grid(
    bench: Bench, name: str, trials: list[Trial], sample: int, papers_trials: int, results: Path
) -> dict[str, float | bool]:
    """Both baselines against the sweep, on one grid."""
    many, few = _sample(bench.examples, sample), _sample(bench.examples, 12)
    shared, answers, share = bench.shared(trials, results)
    slow, alone = clock(lambda: [bench.one_by_one(trial, many) for trial in trials])
    slow *= len(bench.examples) / len(many)
    papers = bench.papers_way(trials[:: -(-len(trials) // papers_trials)], few) * len(trials)
    differing = sum(answers[key] != text for of_trial in alone for key, text in of_trial.items())
    predicted = forecast(trials, bench.costs).gain
    print(
        f"{name}: {len(trials)} trials, {len(bench.examples)} questions; shared {shared:.1f} s; one by one {slow:.1f} s "
        f"(on {len(many)} questions, scaled); the papers' way {papers:.0f} s (on {papers_trials} trials and {len(few)} "
        f"questions, scaled)"
    )

    print(
        f"  {slow / shared:.2f} times faster, {predicted:.2f} predicted; {papers / shared:.1f} times the papers' way; "
        f"{share:.1%} of the time inside the decoder; {differing} of {len(trials) * len(many)} answers differ"
    )
    return {
        f"speedup_{name}": slow / shared,
        f"predicted_{name}": predicted,
        f"papers_{name}": papers / shared,
        f"share_{name}": share,
        f"identical_{name}": differing == 0,
    }


def llava_7b() -> None:
    """What RefCOCO's validation split would gain on LLaVA-1.5-7B, from the plan alone."""
    # 10,834 expressions about 1,500 images; a prompt of about 20 common tokens, 4 of the expression and 5 behind it; a
    # box of about 24 tokens.
    common = tuple(range(20))
    questions = [((*common, 100 + q, 200 + q, 300, 301, 302, 303, 304, 305, 306), 24) for q in range(7)]
    costs = [Costs(ModelCost.of(model_shape("llava-hf/llava-1.5-7b-hf"), system=40), Load.of([questions] * 1548))]
    grids = {
        "stage-1": stage1_grid(576, 32, (64, 128, 192)),
        "stage-2": stage2_grid(576, 32, 192, (12, 16, 20, 24), (8, 16, 32, 64)),
    }
    for name, trials in grids.items():
        expected = forecast(trials, costs)
        hours = expected.seconds(usual_speed("cuda", 1)) / 3600
        print(
            f"LLaVA-1.5-7B on RefCOCO val, {name} grid of {len(trials)} trials: {expected.gain:.1f} times fewer FLOPs, "
            f"{hours * expected.gain:.0f} GPU hours become {hours:.0f} at {usual_speed('cuda', 1) / 1e12:.0f} TFLOP/s"
        )


def feature_figures() -> dict[str, float]:
    """The feature store's own figures on LLaVA-1.5's sizes: see ``benchmarks/features.py``."""
    with tempfile.TemporaryDirectory() as folder:
        measured = features.measure(Path(folder), 128, *features.SIZES[""])
    return {f"feature_{key}": round(value, 3) for key, value in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50, help="test images, of about 25 questions (default: 50)")
    parser.add_argument("--sample", type=int, default=256, help="questions the trials one by one answer (default: 256)")
    parser.add_argument("--full", action="store_true", help="all questions one by one; takes about an hour")
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    plans = {count: planning(count) / count * 1000 for count in (100, 1000, 10_000)}
    hundred_thousand = planning(100_000)
    print("planning:", ", ".join(f"{count} trials {value:.3f} ms each" for count, value in plans.items()))
    print(f"planning 100,000 trials: {hundred_thousand:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bench = Bench.prepare(root, chosen.images)
        over_stock = bench.stock(_sample(bench.examples, BATCH * 4))
        print(f"one by one takes {over_stock:.2f} of the time of stock generate on the unpruned trial")
        tokens, layers = bench.vlm.grid.tokens, bench.vlm.layers
        grids = {
            "stage1_grid": stage1_grid(tokens, layers, (48, 72, 96)),
            "stage2_grid": stage2_grid(tokens, layers, 96, (4, 5, 6, 7), (4, 8, 12, 16)),
        }
        sample = len(bench.examples) if chosen.full else chosen.sample
        papers = 36 if chosen.full else 4
        figures: dict[str, float | bool] = {}
        for name, trials in grids.items():
            assert len(work_tree(trials)) in (12, 3)
            figures |= measure_grid(bench, name, trials, sample, papers, root / name)
        questions = len(bench.examples)
    llava_7b()
    both = [f"speedup_{name}" for name in grids]
    summary = {
        "benchmark": "sweep",
        "questions": questions,
        **{key: round(figures[key], 2) for key in both},
        "fraction_of_predicted": round(min(figures[f"speedup_{n}"] / figures[f"predicted_{n}"] for n in grids), 3),
        "speedup_vs_papers_way": round(min(figures[f"papers_{n}"] for n in grids), 1),
        "identical": all(figures[f"identical_{n}"] for n in grids),
        "model_time_share": round(min(figures[f"share_{n}"] for n in grids), 3),
        "plan_ms_per_trial": {str(count): round(value, 3) for count, value in plans.items()},
        "plan_seconds_100000_trials": round(hundred_thousand, 2),
        "one_by_one_over_stock": round(over_stock, 3),
        "bars": BARS,
        **feature_figures(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
