"""What sharing is worth where some methods read the question before the language model.

Two grids on the testbed's model with a random text tower beside its encoder: the sweep as it is, against every trial by
itself, one by one, as ``benchmarks.sweep`` does it: cached features, batches of 64 questions, each its own sequence.

* *methods*: twelve methods that read no question, and six that do: CDPruner before the language model, five inside it.
* *before*: twelve settings that read no question, and six of CDPruner. Of the language model's layers those share nothing,
  as every question keeps other tokens: features, projection and patches in CLIP's space are all there is to share.

What sharing can come to is bounded by what is left to do for every trial: tokens of its own in every layer above a fork,
and decoding. The forecast of the plan counts it, in FLOPs, and is printed beside what is measured: 2.0 and 1.7 times.

Both ways answer all questions, in one process and one thread; time is CPU time. A third, *the papers' way*, loads the model
and encodes the images for every trial and asks one question at a time; it answers a sample and is scaled up. The last
line is one JSON object.

    python -m benchmarks.text_aware
    python -m benchmarks.text_aware --images 12
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.families import write_text_tower
from benchmarks.sweep import MODEL, Bench, _sample, clock
from nuwa.decoder import Trunk
from nuwa.generation import ImageBatch, select
from nuwa.methods import select_views
from nuwa.vlm import LlavaAdapter, view_signals
from pipelines.features.images import read_images
from pipelines.features.loading import Loading
from pipelines.settings import GridEntry, SweepSettings
from pipelines.sweep.costs import forecast
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.sweep.units import UnitExample

LIMIT = 4.0  # times faster than trial by trial
FREE = ["visionzip", "divprune", "vispruner", "prumerge", "random", "uniform", "pooling", "fastervlm", "scope", "holov"]
BLIND: list[dict[str, Any]] = [
    {"name": "text-free", "method": FREE},
    {"name": "text-free", "method": "nuwa", "stage2_layer": "off"},
]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "methods": [
        *BLIND,
        {"name": "text-free", "method": "vtw", "budget": 54},
        {"name": "text-aware", "method": "cdpruner"},
        {"name": "text-aware", "method": ["dart", "fastv_without_rope"], "budget": 48},
        {"name": "text-aware", "method": ["feather", "sparsevlm_v2", "ivc_prune"], "budget": 96},
    ],
    "before": [
        *BLIND,
        {"name": "text-free", "method": "cdpruner", "parameters": {"relevance": ["none"]}},
        {"name": "text-aware", "method": "cdpruner", "budget": [16, 24], "parameters": {"theta": [None, 0.5, 0.9]}},
    ],
}


def trials_of(vlm: LlavaAdapter, entries: Sequence[dict[str, Any]]) -> list[Trial]:
    """Twelve text-free and six text-aware trials, at 16 average tokens of 144 where nothing else is said."""
    settings = SweepSettings(
        benchmarks=["pope"],
        images=None,
        subset_seed=0,
        unit_images=25,
        budgets=[16],
        grids=[GridEntry.model_validate(entry) for entry in entries],
    )
    pruned = [trial for trial in expand(settings, Layouts.fixed(vlm.grid), vlm.layers) if trial.budgets]
    reading = [trial for trial in pruned if trial.grids == ("text-aware",)]
    if (len(pruned), len(reading)) != (18, 6):
        raise SystemExit(f"{len(pruned)} trials, {len(reading)} of them text-aware, where 18 and 6 are meant")
    return pruned


def one_by_one(bench: Bench, trial: Trial, examples: Sequence[UnitExample]) -> dict[tuple[str, str], str]:
    """One trial in batches of questions that share nothing."""
    vlm, texts = bench.vlm, dict[tuple[str, str], str]()
    for batch in bench._batches(examples):
        images = tuple(sorted({example.image for example in batch}))
        of_image = [images.index(example.image) for example in batch]
        views = view_signals(vlm.layout, bench.store.read(images), images, heads=vlm.heads, project=vlm.project)
        prompts = [example.prompt for example in batch]
        if trial.spec.reads_question:
            rows = [view.at(of_image) for view in views]
            selection = select_views(trial.plan, vlm.layout, vlm.read_questions(rows, [[text] for text in prompts]))
        else:
            selection = select_views(trial.plan, vlm.layout, views).at(of_image)

        encoded = [[bench.words.encode(text)] for text in prompts]
        trunk = Trunk(vlm, selection, encoded, trial.spec.position, [example.image for example in batch])
        limits = [example.max_new_tokens for example in batch]
        answers = trunk.answer(trial.spec.running_cuts(trial.schedule), limits, trial.spec.seed)
        for example, answer in zip(batch, answers, strict=True):
            texts[trial.trial_id, example.example_id] = bench.words.decode(answer.tokens)
    return texts


def papers_way(bench: Bench, trial: Trial, examples: Sequence[UnitExample], tower: str) -> float:
    """Forecast CPU seconds of one trial as a run of its own, from those of ``examples`` and their images."""
    pictures = read_images(bench.root / "images.parquet", sorted({example.image for example in examples}))
    loading, vlm = clock(lambda: LlavaAdapter.load(MODEL, text_tower=tower))

    def encode() -> dict[str, Any]:
        return {image: vlm.encode_images([picture])[0] for image, picture in pictures.items()}

    def answer() -> None:
        for example in examples:
            alone = ImageBatch(encoded=[signals[example.image]], names=[example.image], questions=[[example.prompt]])
            own = select(vlm, trial.plan, vlm.layout, alone)
            trunk = Trunk(vlm, own, [[vlm.encode_prompt(example.prompt)]], trial.spec.position, [example.image])
            trunk.answer(trial.spec.running_cuts(trial.schedule), [example.max_new_tokens], trial.spec.seed)

    encoding, signals = clock(encode)
    answering, _ = clock(answer)
    images = len({example.image for example in bench.examples})
    return loading + encoding * images / len(pictures) + answering * len(bench.examples) / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=25, help="with 26 questions each (default: 25)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        bench = Bench.prepare(root, chosen.images)
        tower = write_text_tower(bench.vlm, root / "clip", longest=77)
        vlm = LlavaAdapter.load(MODEL, text_tower=tower)
        bench = replace(bench, vlm=vlm)
        figures: dict[str, float | bool] = {}
        for name, entries in GRIDS.items():
            loading = Loading(text_tower=str(tower))
            figures |= measure(bench, name, trials_of(vlm, entries), root / name, loading)
    print(json.dumps({"benchmark": "text_aware", "limit": LIMIT, **figures}))


def measure(bench: Bench, name: str, trials: list[Trial], results: Path, loading: Loading) -> dict[str, float | bool]:
    """Both ways on one grid."""
    shared, answers, _ = bench.shared(trials, results, loading)
    alone = [clock(partial(one_by_one, bench, trial, bench.examples)) for trial in trials]
    slow = sum(seconds for seconds, _ in alone)
    differing = sum(answers[key] != text for _, of_trial in alone for key, text in of_trial.items())
    few = _sample(bench.examples, 6)
    papers = sum(papers_way(bench, trial, few, loading.text_tower or "") for trial in trials)
    predicted, count = forecast(trials, bench.costs).gain, len(trials) * len(bench.examples)
    print(
        f"{name}: {len(trials)} trials, {len(bench.examples)} questions: shared {shared:.1f} s, one by one {slow:.1f} s: "
        f"{slow / shared:.2f} times faster, {predicted:.2f} predicted; {papers / shared:.1f} times the papers' way; {differing} of {count} answers differ"
    )
    return {
        f"speedup_{name}": slow / shared,
        f"predicted_{name}": predicted,
        f"papers_{name}": papers / shared,
        f"identical_{name}": differing == 0,
    }


if __name__ == "__main__":
    main()
