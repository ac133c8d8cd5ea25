"""The tree of work that trials share."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.sweep.trials import Trial

Tree = dict[str, dict[str, list[Trial]]]


def work_tree(trials: Iterable[Trial]) -> Tree:
    """Selection → position strategy → trials by rising first cut, uncut ones last: the trunk only ever moves up."""
    tree: Tree = {}
    for trial in trials:
        tree.setdefault(trial.selection_identity, {}).setdefault(trial.spec.position, []).append(trial)
    for positions in tree.values():
        for trunk in positions.values():
            trunk.sort(key=lambda trial: trial.first_cut)
    return tree
