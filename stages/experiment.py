"""``python -m stages.experiment NAME``: put an overlay of ``experiments/`` into ``params.yaml``, whole or not at all."""

from __future__ import annotations

import sys

from pipelines.files.atomic import atomic_path
from pipelines.presets import compose, preset_path, refuse_to_overwrite
from pipelines.settings import PARAMS_FILE, SettingsError, parse_settings, read_yaml
from stages.entry import BAD_INPUT, planned_trials


def experiment(name: str) -> str:
    """The composed parameters, validated with every trial they mean; raises :class:`SettingsError`."""
    path = preset_path(name)
    whole, overlay = PARAMS_FILE.read_text(), path.read_text()
    for source, held in ((PARAMS_FILE, whole), (path, overlay)):
        if not isinstance(read_yaml(held, str(source)), dict):
            raise SettingsError(f"{source}: must hold a mapping of sections, as params.yaml does")
    text = compose(whole, overlay)
    planned_trials(parse_settings(text, f"{PARAMS_FILE} with {path}"))
    return text


if __name__ == "__main__":
    try:
        composed = experiment(sys.argv[1] if len(sys.argv) == 2 else "")
        refuse_to_overwrite(PARAMS_FILE, composed)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    with atomic_path(PARAMS_FILE) as fresh:
        fresh.write_text(composed)
