"""Secrets of a driver and its workers: a file on each machine, never a variable that a cluster's API lists.

One ``NAME=value`` a line, as a shell or Docker reads it; ``NUWA_SECRETS`` names another file. A variable that the
environment has already wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from nuwa.errors import UserError

FILE_VARIABLE = "NUWA_SECRETS"
DEFAULT_FILE = Path("~/.nuwa/secrets.env")
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY(_ID)?$")
CREDENTIALS_IN_URI = re.compile(r"://[^/@\s]+@")


class UnsafeSecret(UserError, PermissionError):
    """A secrets file that others may read, or a secret where others would see it."""


def is_secret(name: str, value: str = "") -> bool:
    """Whether an environment variable must not travel where an API shows it: by its name, or a password in a URI."""
    return bool(SECRET.search(name) or CREDENTIALS_IN_URI.search(value))


def load_secrets(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Put the secrets of this machine's file into ``environment``; returns the names it set.

    No file is no secrets. Raises :class:`UnsafeSecret` for a file that others may read, and for a line that is none.
    """
    path = Path(environment.get(FILE_VARIABLE) or DEFAULT_FILE).expanduser()
    if not path.is_file():
        return []
    if path.stat().st_mode & 0o077:
        raise UnsafeSecret(f"{path}: others may read this file of secrets; chmod 600 {path}")

    fresh = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not name or name.startswith("#"):
            continue
        if not equals:
            raise UnsafeSecret(f"{path}, line {number}: allowed is NAME=value, one a line")
        # What is set already wins over the file.
        if name not in environment:
            environment[name] = value.strip().strip("'\"")
            fresh.append(name)
    return fresh


def refuse_credentials(where: str, places: Iterable[str]) -> None:
    """Refuse a storage URI that holds a password: command lines and job lists would show it."""
    for place in places:
        if CREDENTIALS_IN_URI.search(place) or re.search(r"[?&](access_key|secret_key|sas_token)=", place):
            shown = re.sub(r"//[^/@\s]+@", "//***@", place.partition("?")[0])
            raise UnsafeSecret(
                f"{where} = {shown!r} holds credentials, which the cluster's job list would show; give the machines a "
                f"role, or put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into {DEFAULT_FILE} of every machine"
            )
