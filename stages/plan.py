"""Say what would run: trials, and what they share. Like every stage it checks everything first."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipelines.settings import Settings
from stages.entry import planned_trials, run_stage


def plan(settings: Settings) -> None:
    trials = planned_trials(settings)
    trunks = {trial.stage1_identity for trial in trials}
    table = Table(title=f"{len(trials)} trials, {len(trunks)} shared trunks", title_justify="left")
    for name in ("grid", "trials", "methods", "average tokens"):
        table.add_column(name, justify="left")
    for name in dict.fromkeys(entry.name for entry in settings.sweep.grids):
        mine = [trial for trial in trials if name in trial.grids]
        averages = sorted({trial.schedule.average_tokens for trial in mine})
        methods = ", ".join(sorted({trial.spec.method for trial in mine}))
        table.add_row(name, str(len(mine)), methods, ", ".join(f"{value:g}" for value in averages))
    Console().print(table)


if __name__ == "__main__":
    run_stage(plan)
