"""A program of its own: a sweep on Ray with a plugin of the working folder, told as JSON. See test_plugins.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import yaml

from nuwa.benchmarks import get_benchmark
from nuwa.grid import PatchGrid
from pipelines.features.encoding import encode_missing
from pipelines.settings import ClusterSettings, FeatureSettings, parse_settings
from pipelines.sweep.answers import SweepSpec, run_sweep
from pipelines.sweep.results import ResultStore
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import read_examples
from stages.entry import EXAMPLES, IMAGES
from stages.prepare import prepare


def main(asked: dict) -> dict:
    settings = parse_settings(yaml.safe_dump(asked["params"]), "params.yaml")
    trials = expand(settings.sweep, Layouts.fixed(PatchGrid(12, 12)), 8)
    told = {"trials": {trial.label: trial.trial_id for trial in trials}}
    if "sweep" not in asked:
        return told
    sweep = asked["sweep"]
    prepare(settings)  # the plugin's own table
    cluster = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
    made = FeatureSettings(dtype="float32", shard_images=4, batch_size=4)
    model, root = settings.model.path, Path("features").resolve()
    store, _ = encode_missing(model, IMAGES, root, made, cluster, in_process=True)
    spec = SweepSpec(
        model=model,
        feature_root=str(root),
        feature_identity=store.identity,
        encoder=sweep["encoder"],
        results=str(Path("results").resolve()),
        images=str(IMAGES.resolve()),
        threads=1,
        plugins=tuple(settings.plugins),
    )
    questions = pd.read_parquet(EXAMPLES).assign(max_new_tokens=3).sort_values("question")
    examples = read_examples(questions, "context")
    outcome = run_sweep(spec, trials, examples, cluster, costs=[], speed=1e9, unit_images=4)
    told["questions"] = questions["question"].tolist()
    told["scores"] = [
        get_benchmark("signs").score(said, json.loads(truth))["accuracy"]
        for said, truth in zip(sweep["said"], questions["truth"], strict=True)
    ]
    labels = {trial.trial_id: trial.label for trial in trials}
    answered = {name for unit in ResultStore(Path("results")).done() for name in unit.trials}
    told["failed"] = {labels[name]: str(failure) for name, failure in outcome.incomplete.items()}
    told["answered"] = sorted(label for name, label in labels.items() if any(one.startswith(name) for one in answered))
    return told


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
