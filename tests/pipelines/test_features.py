"""The feature store: once per image, ever; never a damaged byte."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nuwa.vlm import LlavaAdapter
from pipelines.features import FeatureStore, MissingFeatures, encode_missing, store_identity
from pipelines.settings import FeatureSettings

SETTINGS = FeatureSettings(dtype="float32", shard_images=5, batch_size=3)


@pytest.fixture
def stored(model_folder, prepared, cluster, tmp_path):
    store, encoded = encode_missing(
        str(model_folder), prepared / "images.parquet", tmp_path, SETTINGS, cluster, in_process=True
    )
    images = sorted(pq.read_table(prepared / "images.parquet")["image"].to_pylist())
    assert encoded == len(images) == 12
    return store, images


def again(store, model_folder, prepared, cluster):
    return encode_missing(
        str(model_folder), prepared / "images.parquet", store.folder.parent, SETTINGS, cluster, in_process=True
    )


def test_cached_equals_encoded_bit_for_bit(stored, model_folder, prepared):
    store, images = stored
    vlm = LlavaAdapter.load(str(model_folder))
    table = pq.read_table(prepared / "images.parquet").to_pandas().set_index("image")["bytes"]
    batch = images[:3]  # the first batch of the first shard
    direct = vlm.encode(vlm.pixels([Image.open(io.BytesIO(table[image])) for image in batch]))
    cached = store.read(batch)
    for name, value in direct.items():
        assert torch.equal(value, cached[name]), name


def test_order_of_reading_is_the_callers(stored):
    store, images = stored
    forward, backward = store.read(images), store.read(images[::-1])
    for name in forward:
        assert torch.equal(forward[name], backward[name].flip(0))


def test_a_second_run_encodes_nothing(stored, model_folder, prepared, cluster):
    store, _ = stored
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    _, encoded = again(store, model_folder, prepared, cluster)
    assert encoded == 0
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_a_rerun_encodes_only_what_is_new(stored, model_folder, prepared, cluster, tmp_path):
    store, images = stored
    table = pq.read_table(prepared / "images.parquet")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(buffer, "PNG")
    more = pa.concat_tables([table, pa.table({"image": ["f" * 64], "bytes": [buffer.getvalue()]}, table.schema)])
    pq.write_table(more, tmp_path / "more.parquet")
    store, encoded = encode_missing(
        str(model_folder), tmp_path / "more.parquet", store.folder.parent, SETTINGS, cluster, in_process=True
    )
    assert encoded == 1
    assert not store.missing([*images, "f" * 64])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": flip_a_byte,
    "half-written": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "no manifest": lambda path: path.with_suffix(".json").unlink(),
    "garbled manifest": lambda path: path.with_suffix(".json").write_text("{"),
    "foreign manifest": lambda path: path.with_suffix(".json").write_text(
        json.dumps({"size": 1, "sha256": "0", "images": ["x"]})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_remade(stored, model_folder, prepared, cluster, damage):
    store, images = stored
    whole = store.read(images)
    shard = sorted(store.folder.glob("*.arrow"))[0]
    DAMAGE[damage](shard)
    with pytest.raises(MissingFeatures, match="dvc repro -f features"):
        FeatureStore(store.folder.parent, store.identity).read(images)
    mended, encoded = again(store, model_folder, prepared, cluster)
    assert 0 < encoded <= SETTINGS.shard_images
    for name, value in mended.read(images).items():
        assert torch.equal(value, whole[name]), name


def test_leftovers_of_a_killed_write_are_not_read(stored, model_folder, prepared, cluster):
    store, _ = stored
    leftover = store.folder / ".x.arrow.abc.tmp"
    leftover.write_bytes(b"half")
    _, encoded = again(store, model_folder, prepared, cluster)
    assert encoded == 0
    assert not leftover.exists()


def test_identity_follows_weights_preprocessing_and_dtype(model_folder):
    vlm = LlavaAdapter.load(str(model_folder))
    base = vlm.encoder_fingerprint()
    assert LlavaAdapter.load(str(model_folder)).encoder_fingerprint() == base
    assert store_identity(base, "float16") != store_identity(base, "float32")
    vlm.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert vlm.encoder_fingerprint() != base
    fresh = LlavaAdapter.load(str(model_folder))
    with torch.no_grad():
        fresh.tower.embeddings.class_embedding[0] += 1
    assert fresh.encoder_fingerprint() != base
    same_tower = LlavaAdapter.load(str(model_folder))
    with torch.no_grad():
        same_tower.language.norm.weight[0] += 1
    assert same_tower.encoder_fingerprint() == base, "the language model does not decide features"
    assert same_tower.fingerprint() != LlavaAdapter.load(str(model_folder)).fingerprint()
