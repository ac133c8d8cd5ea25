"""Storage behind URIs: a real S3 server on loopback, any fsspec scheme, and filesystems that fail."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

from pipelines.features import store as feature_store
from pipelines.features.encoding import encode_missing
from pipelines.features.faults import MissingFeatures
from pipelines.features.store import FeatureStore
from pipelines.files.storage import ATTEMPTS, S3_TRIES, Folder, StorageUnavailable, filesystem_of
from pipelines.settings import FeatureSettings

SETTINGS = FeatureSettings(dtype="float32", shard_images=5, batch_size=3)


@pytest.fixture
def shard_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_CACHE", tmp_path / "shards")
    return tmp_path / "shards"


def encode(model_folder, prepared, cluster, root):
    return encode_missing(str(model_folder), prepared / "images.parquet", root, SETTINGS, cluster, in_process=True)


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
def test_files_are_published_listed_read_and_removed(kind, bucket, tmp_path):
    place = {"local": tmp_path / "store", "s3": bucket, "memory": f"memory://{uuid.uuid4().hex}"}[kind]
    folder = Folder.at(place, "below")
    assert folder.sizes() == {}
    folder.write("a.json", b"{}")
    source = tmp_path / "big"
    source.write_bytes(b"x" * 100_000)
    folder.publish(source, "b.arrow")
    assert folder.sizes() == {"a.json": 2, "b.arrow": 100_000}
    assert folder.sizes(".json") == {"a.json": 2}
    assert folder.read("a.json") == b"{}"
    folder.fetch("b.arrow", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    folder.remove("b.arrow")
    folder.remove("b.arrow")
    assert list(folder.sizes()) == ["a.json"]
    with pytest.raises(FileNotFoundError):
        folder.read("gone")
    assert (folder.local is not None) == (kind == "local")


def test_a_server_that_hangs_up_is_given_up_after_three_tries(monkeypatch):
    """Where it says nothing, a try ends after three seconds; Arrow's own client makes about thirty."""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    taken.append(connection.close())

        threading.Thread(target=hang_up, daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        filesystem, path = filesystem_of(f"s3://b/p?scheme=http&endpoint_override={place}&region=us-east-1")
        with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
            filesystem.get_file_info(fs.FileSelector(path))
        server.shutdown(socket.SHUT_RDWR)
    assert 1 <= len(taken) <= 2 * S3_TRIES, "a client may connect twice a try where a kept connection is lost"


class WithoutCredentials(fs.FSSpecHandler):
    """Says what Arrow's Azure client says."""

    def get_file_info_selector(self, selector):
        raise pa.ArrowException("Unknown error: Check for Hierarchical Namespace failed:\nno token. Target:\n")


def test_credentials_that_are_not_found_are_one_line():
    import fsspec

    handler = WithoutCredentials(fsspec.filesystem("memory"))
    with pytest.raises(StorageUnavailable) as caught:
        Folder("abfs://me@account/results", fs.PyFileSystem(handler), "results").sizes()
    assert str(caught.value) == (
        "abfs://me@account/results: could not list files: Unknown error: Check for Hierarchical Namespace failed: no token. "
        "Target:; see that it can be reached and the credentials are there"
    )


@pytest.mark.parametrize("uri", ["s3:///results", "ssh://127.0.0.1/results"])
def test_a_place_without_bucket_or_package_is_one_line(uri):
    with pytest.raises(StorageUnavailable) as caught:
        filesystem_of(uri)
    assert str(caught.value).startswith(f"{uri}: ") and "\n" not in str(caught.value)


def test_features_in_s3_equal_local_ones(bucket, shard_cache, model_folder, prepared, cluster, tmp_path):
    images = sorted(pq.read_table(prepared / "images.parquet")["image"].to_pylist())
    local, _ = encode(model_folder, prepared, cluster, tmp_path / "local")
    remote, encoded = encode(model_folder, prepared, cluster, bucket)
    assert encoded == 12
    expected = local.read(images)
    for name, value in remote.read(images).items():
        assert torch.equal(value, expected[name])
    for path in shard_cache.rglob("*.arrow"):  # another machine has none of them
        path.unlink()
    elsewhere = FeatureStore(bucket, remote.identity)
    assert torch.equal(elsewhere.read(images[:2])["features"], expected["features"][:2])
    assert len(list(shard_cache.rglob("*.arrow"))) == 1, "only the shard that was asked for is fetched"
    _, encoded = encode(model_folder, prepared, cluster, bucket)
    assert encoded == 0


def test_a_damaged_object_is_found_and_encoded_again(bucket, shard_cache, model_folder, prepared, cluster):
    images = sorted(pq.read_table(prepared / "images.parquet")["image"].to_pylist())
    store, _ = encode(model_folder, prepared, cluster, bucket)
    whole = store.read(images)
    sizes = store.storage.sizes(".arrow")
    name = max(sizes, key=sizes.__getitem__)  # a whole shard; the last holds fewer images
    content = bytearray(store.storage.read(name))
    content[len(content) // 2] ^= 1
    store.storage.write(name, bytes(content))
    for path in shard_cache.rglob("*.arrow"):
        path.unlink()
    with pytest.raises(MissingFeatures, match="fails its checksum"):
        FeatureStore(bucket, store.identity).read(images)
    mended, encoded = encode(model_folder, prepared, cluster, bucket)
    assert encoded == SETTINGS.shard_images
    assert all(torch.equal(value, whole[key]) for key, value in mended.read(images).items())


class Flaky(fs.FSSpecHandler):
    """A filesystem whose calls fail ``faults`` times before they work."""

    def __init__(self, faults: int) -> None:
        import fsspec

        super().__init__(fsspec.filesystem("memory"))
        self.faults = faults

    def _maybe_fail(self) -> None:
        if self.faults:
            self.faults -= 1
            raise OSError("connection reset by peer")

    def open_input_stream(self, path):
        self._maybe_fail()
        return super().open_input_stream(path)

    def open_output_stream(self, path, metadata=None):
        self._maybe_fail()
        return super().open_output_stream(path, metadata)


def flaky(faults: int) -> tuple[Folder, list[float]]:
    pauses: list[float] = []
    name = uuid.uuid4().hex
    folder = Folder(f"flaky://{name}", fs.PyFileSystem(Flaky(faults)), f"/{name}", pause=pauses.append)
    return folder, pauses


def test_faults_that_pass_are_waited_out():
    folder, pauses = flaky(ATTEMPTS - 1)
    folder.write("a.json", b"{}")
    assert folder.read("a.json") == b"{}"
    assert len(pauses) == ATTEMPTS - 1
    assert pauses == sorted(pauses)


def test_a_fault_that_lasts_is_reported_by_name():
    folder, pauses = flaky(10**6)
    with pytest.raises(StorageUnavailable) as raised:
        folder.write("a.json", b"{}")
    assert len(pauses) == ATTEMPTS - 1
    assert str(raised.value) == (
        f"{folder.place}: could not write a.json in 4 attempts, last: OSError: connection reset by peer; see that it "
        "can be reached and the credentials allow it, then run the same command again"
    )


def test_a_missing_file_is_not_waited_for():
    folder, pauses = flaky(0)
    with pytest.raises(FileNotFoundError):
        folder.read("gone")
    assert pauses == []


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(StorageUnavailable, match=r"^nowhere://bucket: no filesystem for it: .*nowhere"):
        Folder.at("nowhere://bucket")


def test_below_stands_before_the_query(bucket):
    folder = Folder.at(bucket, "below")
    assert folder.path.endswith("/store/below")
    assert folder.place.endswith("/store/below")
