from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from bare_cluster import bare_ray
from bench import BENCHMARKS, GRIDS, LONGEST, Bench, Swept
from moto.server import ThreadedMotoServer
from once_a_run import once_a_run
from pyarrow import fs

from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.vlm import LlavaAdapter
from pipelines.data.datasets import choose_questions, write_examples
from pipelines.features.encoding import encode_missing
from pipelines.features.identity import ModelIdentity
from pipelines.features.loading import Loading
from pipelines.settings import ClusterSettings, FeatureSettings, SweepSettings
from pipelines.sweep.costs import sweep_costs
from pipelines.sweep.identity import answer_context
from pipelines.sweep.trials import Layouts, expand

FEATURES = FeatureSettings(dtype="float32", shard_images=5, batch_size=3)
QUESTIONS = {"refcoco": 1, "refcocoplus": 1, "pope": 2, "gqa": 1, "textvqa": 1}


@pytest.fixture(scope="session")
def model_folder(tiny_vlm, tmp_path_factory) -> Path:
    """A random model and its processor on disk, as any user's model would be."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_vlm.model.save_pretrained(folder)
    tiny_vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Twelve test scenes prepared as the `prepare` stage does."""
    folder = tmp_path_factory.mktemp("data")
    make_testbed_benchmark(folder / "benchmarks", 12, QUESTIONS, seed=1)
    sources = dict.fromkeys(QUESTIONS, folder / "benchmarks")
    write_examples(sources, "testbed", folder / "examples.parquet", folder / "images.parquet")
    return folder


@pytest.fixture(scope="session")
def examples(prepared) -> pd.DataFrame:
    return pd.read_parquet(prepared / "examples.parquet")


@pytest.fixture
def cluster() -> ClusterSettings:
    return ClusterSettings(address=None, workers=2, cpus=1, gpus=0)


@pytest.fixture(scope="module")
def one_ray(warm) -> Iterator[None]:
    """A Ray instance for two workers, for all tests of a module that need one; else each run starts and ends its own."""
    with bare_ray(num_cpus=2):
        yield


@pytest.fixture
def params() -> dict:
    """The project's own params.yaml, as data to bend."""
    return yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


@pytest.fixture(scope="session")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch) -> str:
    """A fresh bucket, as the URI a user would write."""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = uuid.uuid4().hex
    s3 = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    s3.create_dir(name)
    return f"s3://{name}/store?scheme=http&endpoint_override={endpoint}&region=us-east-1"


@pytest.fixture(scope="session")
def bench(request, tmp_path_factory) -> Bench:
    needs = ("model_folder", "prepared", "examples")
    return once_a_run(
        tmp_path_factory, "bench", lambda folder: make_bench(folder, *map(request.getfixturevalue, needs))
    )


def make_bench(root: Path, model_folder: Path, prepared: Path, examples: pd.DataFrame) -> Bench:
    store, _ = encode_missing(
        str(model_folder),
        prepared / "images.parquet",
        root,
        FEATURES,
        ClusterSettings(address=None, workers=1, cpus=1, gpus=0),
        in_process=True,
    )
    vlm = LlavaAdapter.load(str(model_folder))
    short = examples.assign(max_new_tokens=examples["max_new_tokens"].clip(upper=LONGEST))
    questions = choose_questions(short, BENCHMARKS, None, 0)
    plan = SweepSettings(benchmarks=BENCHMARKS, images=None, subset_seed=0, unit_images=4, budgets=[16], grids=GRIDS)
    return Bench(
        str(model_folder),
        root,
        store.identity,
        vlm.encoder_identity,
        prepared / "images.parquet",
        expand(plan, Layouts.fixed(vlm.grid), vlm.layers),
        questions,
        answer_context(ModelIdentity.of(str(model_folder), Loading(), vlm), vlm, FEATURES).digest,
        sweep_costs(vlm, questions.examples),
    )


@pytest.fixture(scope="session")
def swept_once(bench, tmp_path_factory) -> tuple[Path, Swept]:
    def make(folder: Path) -> tuple[Path, Swept]:
        outcome = bench.run(folder / "results", ClusterSettings(address=None, workers=1, cpus=1, gpus=0))
        assert not outcome.failures
        return folder / "results", outcome

    return once_a_run(tmp_path_factory, "undisturbed", make)


@pytest.fixture(scope="session")
def results_of_all(swept_once) -> Path:
    """Where the undisturbed sweep is stored; what is swept there again is there already."""
    return swept_once[0]


@pytest.fixture(scope="session")
def undisturbed(swept_once) -> Swept:
    return swept_once[1]


@pytest.fixture(scope="session")
def few(bench) -> Bench:
    """Four of its trials, for what becomes of units, whatever the method: unpruned, drawn, cut, and of images anew."""
    by_method = {trial.spec.method: trial for trial in bench.trials}
    chosen = [by_method[method] for method in ("unpruned", "random", "nuwa", "downsample")]
    assert [bool(trial.cuts) for trial in chosen] == [False, False, True, False]
    return replace(bench, trials=chosen)


@pytest.fixture(scope="session")
def undisturbed_few(few, undisturbed, results_of_all) -> Swept:
    made: list[str] = []
    one = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
    outcome = few.run(results_of_all, one, done=lambda unit, report: made.append(unit))
    assert not made
    return outcome


@pytest.fixture
def engine(bench, examples, undisturbed, cluster):
    """What a race on the bench needs. A random model knows no truth: its answers vote for one, without those of the preset."""
    short = examples.assign(max_new_tokens=examples["max_new_tokens"].clip(upper=LONGEST))
    table = choose_questions(short, ["gqa", "pope"], None, 0).examples.assign(benchmark="textvqa")
    said = undisturbed.predictions.to_pandas().set_index(["trial_id", "example_id"])["prediction"]
    voters = [trial.trial_id for trial in bench.trials[:1] + bench.trials[3:]]
    truths = [json.dumps({"answers": [said[one, example] for one in voters]}) for example in table["example_id"]]
    return SimpleNamespace(bench=bench, table=table.assign(truth=truths), cluster=cluster)
