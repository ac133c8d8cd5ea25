"""The first forty damaged inputs of the fuzzer; `make fuzz` takes two hundred."""

from __future__ import annotations

import pytest
from fuzzer import attempt


@pytest.mark.parametrize("number", range(40))
def test_a_damaged_input_is_refused_in_one_line_or_read_for_what_it_says(number):
    outcome = attempt(number)
    assert outcome.verdict in ("refused", "read"), outcome


def test_the_same_number_is_the_same_damage():
    one, other = attempt(7), attempt(7)
    assert one._replace(seconds=0.0) == other._replace(seconds=0.0)
