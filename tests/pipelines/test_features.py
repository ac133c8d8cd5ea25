"""The feature store: once per image, ever; never a damaged byte."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nuwa.benchmarks import image_size
from nuwa.vlm import LlavaAdapter
from pipelines.data.datasets import write_examples
from pipelines.features.encoding import encode_missing, features_identity
from pipelines.features.faults import BrokenImages, MissingFeatures, NoRoom, SignalNotFinite
from pipelines.features.identity import ModelIdentity
from pipelines.features.images import read_images
from pipelines.features.loading import Loading
from pipelines.features.signals import signal_bytes
from pipelines.features.store import FeatureStore
from pipelines.files.storage import LEFTOVER_S
from pipelines.settings import ClusterSettings, FeatureSettings

SETTINGS = FeatureSettings(dtype="float32", shard_images=5, batch_size=3)


@pytest.fixture(scope="module")
def encoded(model_folder, prepared, tmp_path_factory):
    """A store of all images, which no test changes."""
    one = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
    root = tmp_path_factory.mktemp("encoded")
    store, made = encode_missing(str(model_folder), prepared / "images.parquet", root, SETTINGS, one, in_process=True)
    assert made == 12
    return store


@pytest.fixture
def stored(encoded, prepared, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(encoded.folder, tmp_path / encoded.folder.name)
    images = sorted(pq.read_table(prepared / "images.parquet")["image"].to_pylist())
    return FeatureStore(tmp_path, encoded.identity), images


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
    more = pa.concat_tables(
        [
            table,
            pa.table({"image": ["f" * 64], "width": [96], "height": [96], "bytes": [buffer.getvalue()]}, table.schema),
        ]
    )
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
    leftovers = [store.folder / ".x.arrow.abc.tmp", store.folder / "nobody-named-it.arrow"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    _, encoded = again(store, model_folder, prepared, cluster)
    assert encoded == 0
    assert all(leftover.exists() for leftover in leftovers), "another driver may be at them"
    for leftover in leftovers:
        os.utime(leftover, (0, time.time() - LEFTOVER_S - 1))
    _, encoded = again(store, model_folder, prepared, cluster)
    assert encoded == 0
    assert not any(leftover.exists() for leftover in leftovers)


def test_identity_follows_weights_preprocessing_and_dtype(model_folder):
    vlm = LlavaAdapter.load(str(model_folder))
    base = vlm.encoder_fingerprint()
    assert LlavaAdapter.load(str(model_folder)).encoder_fingerprint() == base
    known = ModelIdentity.of(str(model_folder), Loading(), vlm)
    assert known.fingerprint == base, "from the files as from the loaded model"
    half, full = (features_identity(known, vlm, dtype).digest for dtype in ("float16", "float32"))
    assert half != full
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


def test_side_by_side_rows_are_mapped_and_not_copied(stored):
    store, images = stored
    mapped = FeatureStore(store.folder.parent, store.identity, cache_bytes=0)
    run = mapped.read(images[1:4])["features"]
    again = mapped.read(images[2:3])["features"]
    assert again.data_ptr() == run[1:].data_ptr()
    run.zero_()  # a private mapping: the file keeps what was written
    assert torch.equal(
        FeatureStore(store.folder.parent, store.identity).read(images[1:4])["features"],
        store.read(images[1:4])["features"],
    )


def test_an_image_is_read_from_disk_once(stored):
    """What a process holds does not need its file any more: every further read is served from memory."""
    store, images = stored
    first = store.read(images)
    for shard in store.folder.glob("*.arrow"):
        with open(shard, "r+b") as content:  # in place, so that a mapping would see it
            content.write(b"\0" * shard.stat().st_size)
    for _ in range(3):
        for name, value in store.read(images[::-1]).items():
            assert torch.equal(value, first[name].flip(0)), name
    with pytest.raises(MissingFeatures):
        FeatureStore(store.folder.parent, store.identity).read(images)


def test_the_cache_stays_within_its_bytes(stored):
    store, images = stored
    one = sum(value.nbytes for value in store.read(images[:1]).values())
    small = FeatureStore(store.folder.parent, store.identity, cache_bytes=3 * one)
    for image in [*images, *images[::-1]]:
        for name, value in small.read([image]).items():
            assert torch.equal(value, store.read([image])[name])
        assert sum(array.nbytes for row in small._held.values() for array in row.values()) <= 3 * one


def test_damage_that_leaves_no_trace_in_time_stamps_is_found_by_its_reader(stored, model_folder, prepared, cluster):
    store, images = stored
    whole = store.read(images)
    shard = sorted(store.folder.glob("*.arrow"))[0]
    of_it = json.loads(shard.with_suffix(".json").read_text())["images"]
    stamp = shard.stat()
    flip_a_byte(shard)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(
        MissingFeatures, match=r"fails its checksum.* and is moved to .*/damaged/.*; `dvc repro -f features`"
    ):
        FeatureStore(store.folder.parent, store.identity).read(images)
    mended, encoded = again(store, model_folder, prepared, cluster)
    assert encoded == len(of_it)
    assert all(torch.equal(value, whole[name]) for name, value in mended.read(images).items())


def test_features_that_do_not_fit_are_refused_before_encoding(model_folder, prepared, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(NoRoom) as raised:
        encode_missing(str(model_folder), prepared / "images.parquet", tmp_path, SETTINGS, cluster, in_process=True)
    stored = 12 * 144 * (3 * LlavaAdapter.load(str(model_folder)).model.config.vision_config.hidden_size + 1) * 4
    assert str(raised.value) == (
        f"features of 12 images need {stored / 1e9:.1f} GB in {next(tmp_path.iterdir())}, which has 0.0 GB free; "
        "make room, set features.dtype: float16, or name another place in features.store"
    )
    assert not list(tmp_path.rglob("*.arrow"))


def scaled_model(model_folder, factor, folder):
    """The model, with the block before its last far off; ``features`` are what leaves that one."""
    vlm = LlavaAdapter.load(str(model_folder))
    vlm.tower.encoder.layers[-2].mlp.fc2.weight.mul_(factor)
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def one_worker(cluster):
    """What a worker of Ray raises reaches the driver from one as from several."""
    return cluster.model_copy(update={"workers": 1})


@pytest.mark.parametrize("in_process", [True, False])
def test_a_signal_that_float16_cannot_hold_is_refused(
    model_folder, prepared, one_worker, one_ray, tmp_path, in_process
):
    folder = scaled_model(model_folder, 1e8, tmp_path / "model")
    images = prepared / "images.parquet"

    def encode(dtype, in_process=True):
        settings = FeatureSettings(dtype=dtype, shard_images=12, batch_size=3)
        return encode_missing(str(folder), images, tmp_path / "store", settings, one_worker, in_process=in_process)

    with pytest.raises(SignalNotFinite) as raised:
        encode("float16", in_process)
    first = min(pq.read_table(images)["image"].to_pylist())
    assert str(raised.value) == (
        f"image {first[:12]}: signal features goes beyond 65504, the end of features.dtype: float16; "
        "set features.dtype: float32"
    )
    assert not list((tmp_path / "store").rglob("*.arrow"))
    store, encoded = encode("float32")
    assert encoded == 12 and store.read([first])["features"].abs().max() > 65504


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 1e8), ("float32", float("inf"))])
def test_numbers_that_are_not_finite_in_the_model_are_refused(model_folder, prepared, cluster, tmp_path, dtype, factor):
    """Weights too large for the model's dtype, and weights that no dtype holds: no dtype of the store mends that."""
    folder = scaled_model(model_folder, factor, tmp_path / "model")
    images, store = prepared / "images.parquet", tmp_path / "store"
    with pytest.raises(SignalNotFinite) as raised:
        encode_missing(str(folder), images, store, SETTINGS, cluster, loading=Loading(dtype), in_process=True)
    first = min(pq.read_table(images)["image"].to_pylist())
    remedy = {"float16": "set model.dtype: float32", "float32": f"mend the weights in {folder}"}[dtype]
    assert str(raised.value) == (
        f"image {first[:12]}: signal features is not finite as the encoder gives it in model.dtype: {dtype}, "
        f"whatever features.dtype is; {remedy}"
    )
    assert not list(store.rglob("*.arrow"))


def test_attention_stays_in_full_precision_in_a_half_precision_store(stored, model_folder, prepared, cluster, tmp_path):
    whole, images = stored
    half = SETTINGS.model_copy(update={"dtype": "float16"})
    store, _ = encode_missing(
        str(model_folder), prepared / "images.parquet", tmp_path / "half", half, cluster, in_process=True
    )
    read, full = store.read(images), whole.read(images)
    assert torch.equal(read["cls_attention"], full["cls_attention"])
    assert not torch.equal(full["cls_attention"].half().float(), full["cls_attention"]), "float16 would round it"
    assert all(torch.equal(read[name], full[name].half()) for name in ("features", "keys", "similarity"))
    vlm = LlavaAdapter.load(str(model_folder))
    for settings, signals in ((half, read), (SETTINGS, full)):
        taken = sum(value[0].nbytes for value in signals.values())
        assert signal_bytes(vlm.signal_widths(vlm.model.config), vlm.layout, settings) == taken


def truncated(kind: str, seed: int) -> bytes:
    """An image whose header says 96x96 and whose body ends halfway."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(buffer, kind)
    content = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    assert image_size(content) == (96, 96)
    return content


@pytest.mark.parametrize("in_process", [True, False])
def test_broken_images_are_named_and_all_others_kept(model_folder, prepared, one_worker, one_ray, tmp_path, in_process):
    """A JPEG and a PNG cut short: every whole image of every shard is stored, those of their own shards too."""
    table = pq.read_table(prepared / "benchmarks" / "pope.parquet")
    rows = table.to_pylist()
    for kind, asked in (("JPEG", rows[:2]), ("PNG", rows[-1:])):
        for row in asked:
            row["image"] = {"bytes": truncated(kind, seed=len(kind)), "path": ""}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "pope.parquet")
    images = tmp_path / "images.parquet"
    write_examples({"pope": tmp_path}, "testbed", tmp_path / "examples.parquet", images)
    names = pq.read_table(images, columns=["image"])["image"].to_pylist()
    bad = sorted(hashlib.sha256(truncated(kind, seed=len(kind))).hexdigest() for kind in ("JPEG", "PNG"))
    examples = pd.read_parquet(tmp_path / "examples.parquet")
    asked = examples[examples["image"] == bad[0]]["example_id"].tolist()
    progress = []

    def encode(in_process=True):
        return encode_missing(
            str(model_folder),
            images,
            tmp_path / "store",
            SETTINGS,
            one_worker,
            lambda *done: progress.append(done),
            in_process=in_process,
        )

    with pytest.raises(BrokenImages) as raised:
        encode(in_process)
    more = f" and {len(asked) - 1} more rows" if len(asked) > 1 else ""
    assert re.fullmatch(
        rf"2 images cannot be decoded, first {bad[0][:12]} \(OSError: .*(truncated|broken).*\); it is asked about by "
        rf"{re.escape(asked[0] + more)} of {tmp_path}/examples\.parquet: fetch the published file again or take these "
        r"rows out of it, then run the same command again; all other images are encoded and kept",
        str(raised.value),
    ), str(raised.value)
    (folder,) = (tmp_path / "store").iterdir()
    store = FeatureStore(tmp_path / "store", folder.name)
    assert sorted(store.missing(names)) == bad and progress[-1] == (len(names) - 2, len(names))
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    with pytest.raises(BrokenImages):
        encode()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == kept, "nothing is encoded twice"
    write_examples({"pope": prepared / "benchmarks"}, "testbed", tmp_path / "examples.parquet", images)
    mended, encoded = encode()  # in other batches than at once, which may round otherwise
    new = set(pq.read_table(images, columns=["image"])["image"].to_pylist()) - set(names)
    assert encoded == len(new) <= 2, "the mended images and no other"
    fresh, _ = encode_missing(str(model_folder), images, tmp_path / "fresh", SETTINGS, one_worker, in_process=True)
    everything = sorted(pq.read_table(images, columns=["image"])["image"].to_pylist())
    for name, value in mended.read(everything).items():
        assert torch.allclose(value, fresh.read(everything)[name], atol=1e-5), name


def test_a_broken_image_without_its_questions_is_named_by_digest(prepared, tmp_path):
    content = truncated("PNG", seed=1)
    digest = hashlib.sha256(content).hexdigest()
    row = {"image": [digest], "width": [96], "height": [96], "bytes": [content]}
    pq.write_table(pa.table(row, pq.read_schema(prepared / "images.parquet")), tmp_path / "images.parquet")
    with pytest.raises(BrokenImages) as raised:
        read_images(tmp_path / "images.parquet", [digest])
    assert str(raised.value).startswith(f"image {digest[:12]} cannot be decoded (OSError: ")
    assert f"; its questions have image = {digest}: fetch the published file again" in str(raised.value)


def test_features_are_of_the_picture_as_people_see_it(model_folder, tmp_path):
    """A photo with an orientation tag: what is encoded is the turned picture, whose size the table has."""
    photo = Image.effect_noise((60, 40), 90).convert("RGB")
    tags = Image.Exif()
    tags[274] = 6
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", exif=tags)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    row = {"image": digest, "width": 40, "height": 60, "bytes": buffer.getvalue()}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "images.parquet")
    seen = read_images(tmp_path / "images.parquet", [digest])[digest]
    assert seen.size == (40, 60)
    assert (np.asarray(seen) == np.rot90(np.asarray(photo), -1)).all()
