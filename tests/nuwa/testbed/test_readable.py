"""Files of ours that others read: names of tensors as published checkpoints have them, images that `datasets` knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.testbed.readable import rename_tower
from nuwa.vlm.checkpoint import read_checkpoint

MODEL = Path(__file__).parents[3] / "models/testbed"


def test_a_saved_model_gets_the_published_names_and_keeps_its_identity(tiny_vlm, tmp_path):
    tiny_vlm.model.save_pretrained(tmp_path)
    tiny_vlm.processor.save_pretrained(tmp_path)
    before, saved = read_checkpoint(tmp_path, tmp_path / "memory"), load_file(tmp_path / "model.safetensors")
    rename_tower(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    tower = [name for name in held if name.startswith("vision_tower.")]
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert {name.replace("vision_model.", "") for name in held} == {name.replace("vision_model.", "") for name in saved}
    assert read_checkpoint(tmp_path, tmp_path / "memory") == before
    again = type(tiny_vlm).load(tmp_path)
    for name, value in tiny_vlm.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    rename_tower(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == held.keys()


def test_the_committed_model_has_the_published_names(tmp_path):
    copy = Path(shutil.copytree(MODEL, tmp_path / "model"))
    before = (copy / "model.safetensors").read_bytes()
    rename_tower(copy)
    assert (copy / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["refcoco", "textvqa", "gqa_images"])
def test_tables_say_what_is_an_image(name, tmp_path):
    make_testbed_benchmark(tmp_path, 2, {"refcoco": 1, "textvqa": 1, "gqa": 1}, seed=0)
    schema = pq.read_schema(tmp_path / f"{name}.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names and features["image"] == {"_type": "Image"}
    if name == "refcoco":
        assert features["bbox"] == {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
        assert features["iscrowd"] == {"dtype": "int8", "_type": "Value"}
