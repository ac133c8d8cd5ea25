from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from nuwa.testbed.benchmark import make_testbed_benchmark
from pipelines.datasets import write_examples
from pipelines.settings import ClusterSettings

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


@pytest.fixture
def params() -> dict:
    """The project's own params.yaml, as data to bend."""
    return yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
