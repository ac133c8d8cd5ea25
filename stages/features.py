"""``features``: every image passes the vision encoder once, ever. Writes what the store holds for this data."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
from rich.progress import Progress

from pipelines.features.encoding import encode_missing
from pipelines.features.loading import Loading
from pipelines.files.atomic import atomic_path
from pipelines.files.lock import exclusive
from pipelines.settings import Settings
from stages.entry import FEATURES, IMAGES, feature_store, run_stage, shared_cache


def features(settings: Settings) -> None:
    with exclusive(shared_cache()), Progress() as bar:
        task = bar.add_task("encoding images", total=None)
        store, encoded = encode_missing(
            settings.model.path,
            IMAGES,
            settings.features.store or feature_store(),
            settings.features,
            settings.cluster,
            lambda done, total: bar.update(task, completed=done, total=total),
            loading=Loading.of(settings.model, settings.cluster),
        )
    images = sorted(pq.read_table(IMAGES, columns=["image"])["image"].to_pylist())
    print(f"{encoded} images encoded, {len(images) - encoded} found in {store.storage.place}")
    with atomic_path(FEATURES) as path:
        path.write_text(json.dumps({"identity": store.identity, "images": images}, indent=1) + "\n")


if __name__ == "__main__":
    run_stage(features)
