"""A worker's start on a checkpoint of several files: at most 1.3 copies of the weights are memory of its own."""

from __future__ import annotations

import pytest

from benchmarks.loading import LIMIT_COPIES, measure, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, 0.25, "float32")
    return folder


def test_weights_go_from_the_files_to_the_device_without_a_copy_of_the_whole(checkpoint):
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) > 2 and (checkpoint / "model.safetensors.index.json").exists()
    told = measure(checkpoint, "float32")
    assert told["copy_bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)
    assert told["copy_bytes"] > 200 * 1024**2
    assert told["anonymous_bytes"] <= LIMIT_COPIES * told["copy_bytes"]
