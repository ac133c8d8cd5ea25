"""Where answers came from: versions, device, kernel. It is recorded beside them and is no part of what they are."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


@functools.cache
def own_version() -> str:
    """This package's version; null where it runs from a folder and is not installed."""
    try:
        return importlib.metadata.version("nuwa")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(device: str) -> dict[str, str]:
    """What ``sweep.reuse: same_versions`` asks to be the same; ``device``: its kind."""
    return {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers"), "device": device}


def versions_digest(device: str) -> str:
    return hashlib.sha256(json.dumps(versions(device), sort_keys=True).encode()).hexdigest()[:8]


def hardware(device: str) -> str:
    """The model of the device, as far as it tells."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()


TOLD = ("torch", "transformers", "device", "hardware", "dtype", "kernel")  # what a person is told of it


def told(provenance: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every combination of versions and device that occurs, in words."""
    return sorted({", ".join(f"{key} {one[key]}" for key in TOLD if key in one) for one in provenance})


def mixed(words: Sequence[str]) -> str:
    """One line about answers of several origins, as :func:`told` names them; empty where there is one."""
    return f"answers of mixed provenance: {'; '.join(words)}" if len(words) > 1 else ""


def came_from(words: Sequence[str]) -> str:
    """The same for a table of facts; what is of one origin is named, too. Empty where nothing is known."""
    return f"{'of mixed provenance: ' if len(words) > 1 else ''}{'; '.join(words)}"


def merged(provenance: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """One provenance of answers of several: what differs is listed."""
    values: dict[str, dict[str, None]] = {}
    for one in provenance:
        for key in (*TOLD, "nuwa", "threads"):
            if key in one:
                values.setdefault(key, {})[str(one[key])] = None
    return {key: " and ".join(sorted(several)) for key, several in values.items()}
