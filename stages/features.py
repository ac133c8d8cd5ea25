"""``features``: every image passes the vision encoder once, ever. Writes what the store holds for this data."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
from rich.progress import Progress

from pipelines.atomic import atomic_path
from pipelines.features import Loading, encode_missing
from pipelines.lock import exclusive
from pipelines.settings import Settings
from stages.entry import CACHE, FEATURE_STORE, FEATURES, IMAGES, run_stage


def features(settings: Settings) -> None:
    with exclusive(CACHE), Progress() as bar:
        task = bar.add_task("encoding images", total=None)
        store, encoded = encode_missing(
            settings.model.path,
            IMAGES,
            settings.features.store or FEATURE_STORE,
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
