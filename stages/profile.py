"""``profile``: how long answers take and what they hold, per method, budget, batch and attention kernel.

Figures depend on the machine, so the stage is frozen and its table is in git, for the report to show; ``make profile``
measures again.
"""

from __future__ import annotations

import pandas as pd
import torch

from pipelines.files.atomic import atomic_path
from pipelines.profiling import profile_model
from pipelines.settings import Settings, SettingsError
from stages.entry import PROFILE, run_stage


def profile(settings: Settings) -> None:
    plan = settings.profile
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("profile.device = 'cuda': torch sees no GPU here; set it to cpu")
    torch.set_num_threads(plan.threads)
    rows: list[dict] = []

    def show(row: dict) -> None:
        rows.append(row)
        print(
            f"{row['model']}  {row['attention']}  batch {row['batch']}  {row['method']} at {row['average_tokens']:g}: "
            f"prefill {row['prefill_ms']:.1f} ms, total {row['total_ms']:.1f} ms",
            flush=True,
        )

    profile_model(plan, show, lambda line: print(line, flush=True))
    with atomic_path(PROFILE) as fresh:
        pd.DataFrame(rows).to_csv(fresh, index=False, float_format="%.4g")


if __name__ == "__main__":
    run_stage(profile, needs_model=False)
