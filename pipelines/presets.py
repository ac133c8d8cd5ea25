"""Experiments as overlays: ``experiments/<name>.yaml`` holds just what differs from ``params.yaml``.

Sections are merged key by key; a list or a plain value replaces what was there. Comments of ``params.yaml`` stay.
"""

from __future__ import annotations

import subprocess
from collections.abc import MutableMapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.settings import SettingsError

EXPERIMENTS = Path("experiments")
REPLACED = ("tables", "questions")  # mappings that are one value: the overlay's stands alone


def preset_path(name: str) -> Path:
    """The overlay called ``name``; raises :class:`SettingsError` that lists what exists."""
    path = EXPERIMENTS / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(preset.stem for preset in EXPERIMENTS.glob("*.yaml")))
        raise SettingsError(f"experiment {name!r} is unknown; allowed: {known or 'none, experiments/ is empty'}")
    return path


def compose(params: str, overlay: str) -> str:
    """The text of ``params`` with ``overlay`` merged in."""
    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dump, _: dump.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    base, over = yaml.load(params), yaml.load(overlay)
    _merge(base, over)
    out = StringIO()
    yaml.dump(base, out)
    return out.getvalue()


def _merge(base: MutableMapping[str, Any], over: MutableMapping[str, Any]) -> None:
    for key, value in over.items():
        ours = base.get(key)
        if isinstance(value, MutableMapping) and isinstance(ours, MutableMapping) and key not in REPLACED:
            _merge(ours, value)
        else:
            base[key] = value


def refuse_to_overwrite(params: Path, composed: str) -> None:
    """Raises :class:`SettingsError` where ``params`` has changes that git does not know and that would be lost."""
    if params.read_text() == composed:
        return
    state = subprocess.run(["git", "status", "--porcelain", "--", str(params)], capture_output=True, text=True)
    if state.returncode or state.stdout.strip():
        raise SettingsError(
            f"{params} has changes that are not committed; commit or stash them, the experiment would replace them"
        )
