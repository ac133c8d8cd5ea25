"""Python's search for garbage, kept off what stays: six thousand tests, their fixtures, and the libraries they import.

While tests are collected, objects only come, and the search goes through all of them again and again: a fifth of the
time. Later they are exempt, so that each search looks at what tests made.
"""

from __future__ import annotations

import gc

import pytest


def pytest_collectstart() -> None:
    gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
