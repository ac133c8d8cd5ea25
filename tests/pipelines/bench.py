"""A small sweep on a random model, for the tests of the engine."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sweep.answers import SweepOutcome, SweepSpec, run_sweep
from pipelines.sweep.collection import collect
from pipelines.sweep.costs import Costs
from pipelines.sweep.results import PARTS, ResultStore
from pipelines.sweep.units import plan_units, read_examples

BENCHMARKS = ["refcoco", "pope", "gqa"]
ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "tests")])
LONGEST = 3  # tokens of an answer; a random model never ends one by itself
SLOW = 1e9  # FLOP/s: a unit's ten seconds are over soon
GRIDS = [
    {"name": "methods", "method": ["nuwa", "visionzip", "random"], "position": ["perc", "pesp"]},
    {"name": "cuts", "method": "nuwa", "stage2_layer": [2, 6], "stage2_scorer": ["attention_last_token", "random"]},
    {"name": "several", "method": "sparsevlm", "budget": 48},
    {"name": "several", "method": "downsample", "budget": 48, "position": ["perc", "pesp"]},
    {"name": "several", "method": "pyramiddrop", "budget": 48, "stage2_layer": [[1, 3, 6]]},
]


@dataclass
class Bench:
    """A prepared sweep on a random model: twelve images, fifteen trials."""

    model: str
    root: Path
    identity: str
    encoder: str
    images: Path
    trials: list
    questions: object
    context: str
    costs: list[Costs]

    def spec(self, results: Path) -> SweepSpec:
        return SweepSpec(
            model=self.model,
            feature_root=str(self.root),
            feature_identity=self.identity,
            encoder=self.encoder,
            results=str(results),
            images=str(self.images),
            threads=1,
        )

    @property
    def examples(self):
        return read_examples(self.questions.examples, self.context)

    def units(self, results, unit_images=4):
        stored = [(unit.trials, unit.examples) for unit in ResultStore(results).done()]
        return plan_units(self.trials, self.examples, stored, self.costs, SLOW, unit_images)[0]

    def run(
        self,
        results,
        cluster,
        in_process=True,
        trials=None,
        examples=None,
        unit_images=4,
        done=lambda *_: None,
        log=None,
        speed=SLOW,
    ):
        """``speed`` is low, so that even this small sweep is cut into many units; ``log``: see :class:`Logged`."""
        spec, trials = self.spec(results), trials or self.trials
        examples = self.examples if examples is None else examples
        outcome = run_sweep(
            Logged(spec, str(log), spec.results) if log else spec,
            trials,
            examples,
            cluster,
            costs=self.costs,
            speed=speed,
            unit_images=unit_images,
            on_done=done,
            in_process=in_process,
        )
        return Swept.of(outcome, results, trials, examples)


@dataclass(frozen=True)
class Swept:
    """A sweep's outcome, and its tables as the bytes of their files."""

    outcome: SweepOutcome
    files: dict[str, bytes]

    @classmethod
    def of(cls, outcome, results, trials, examples):
        with tempfile.TemporaryDirectory() as folder:
            targets = {part: Path(folder) / f"{part}.parquet" for part in PARTS}
            ids = [trial.trial_id for trial in trials]
            collect(ResultStore(results), ids, examples, targets, Path(folder) / "collecting")
            return cls(outcome, {part: path.read_bytes() for part, path in targets.items()})

    @property
    def failures(self):
        return self.outcome.failures

    @property
    def incomplete(self):
        return self.outcome.incomplete

    @property
    def predictions(self):
        return self.table("predictions")

    @property
    def kept(self):
        return self.table("kept")

    def table(self, part):
        return pq.read_table(pa.BufferReader(self.files[part]))


@dataclass(frozen=True)
class Logged:
    """The sweep's worker, that also notes in a file when it begins and ends a unit."""

    spec: SweepSpec
    log: str
    results: str

    @property
    def reuse(self):
        return self.spec.reuse

    def build(self):
        return LoggedWorker(self.spec.build(), self.log)


class LoggedWorker:
    def __init__(self, worker, log):
        self.worker, self.log = worker, log

    def note(self, *words):
        with open(self.log, "a") as lines:
            lines.write(" ".join(map(str, words)) + "\n")

    def run(self, unit, upcoming):
        self.note("begin", unit.unit_id, os.getpid(), len(unit.trials) * len(unit.examples))
        result = self.worker.run(unit, upcoming)
        self.note("end", unit.unit_id, os.getpid(), len(unit.trials) * len(unit.examples))
        return result


def same(one, other):
    """Byte for byte, whatever units the answers came in."""
    return all(one.files[part] == other.files[part] for part in ("predictions", "kept"))
