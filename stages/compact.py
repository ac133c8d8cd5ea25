"""``compact``: put small units of the result store together; those they replace are removed when that is a day old."""

from __future__ import annotations

from pipelines.settings import Settings
from pipelines.sweep.compaction import compact
from pipelines.sweep.results import ResultStore
from stages.entry import places, run_stage


def compact_results(settings: Settings) -> None:
    """Other drivers may work on the store meanwhile."""
    done = compact(ResultStore(places(settings).results))
    print(f"{done.made:,} units are made of {done.small:,} small ones")
    print(f"{done.removed:,} replaced units are removed, {done.wait:,} wait until that is a day old")


if __name__ == "__main__":
    run_stage(compact_results, needs_model=False)
