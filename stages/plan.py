"""Check everything before anything runs, and say what would run: trials, work units, what is shared."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from nuwa.grid import PatchGrid
from pipelines.grid import expand
from pipelines.settings import Settings, SettingsError
from stages.entry import check_tracking, run_stage


def plan(settings: Settings) -> None:
    check_tracking(settings)
    folder = Path(settings.model.path)
    if folder.parts[0] in (".", "models") and not (folder / "config.json").exists():
        raise SettingsError(
            f"params.yaml: model.path = {settings.model.path!r}: no model there; `make testbed` trains it"
        )
    config = AutoConfig.from_pretrained(settings.model.path)
    side = config.vision_config.image_size // config.vision_config.patch_size
    trials = expand(settings.sweep, PatchGrid(side, side), config.text_config.num_hidden_layers)
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
