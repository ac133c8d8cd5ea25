"""Names are unique, unknown ones are answered with what exists, and whatever a user can mend is one kind of error."""

import importlib
import inspect
import pkgutil

import pytest

import nuwa
from nuwa.errors import UserError
from nuwa.registry import NameTaken, Registry, UnknownName


def test_collisions_are_refused_and_the_first_entry_stays():
    registry: Registry[int] = Registry("scorer")
    registry.add("cosine", 1)
    with pytest.raises(NameTaken, match=r"^scorer 'cosine' is registered twice; choose another name for the second$"):
        registry.add("cosine", 2)
    assert dict(registry) == {"cosine": 1}


def test_unknown_names_are_answered_with_the_nearest():
    registry: Registry[int] = Registry("scorer")
    registry.add("cosine", 1)
    registry.add("attention", 2)
    with pytest.raises(UnknownName) as caught:
        registry.look_up("cosin")
    assert str(caught.value) == "scorer 'cosin' is unknown; allowed: attention, cosine; did you mean 'cosine'?"
    with pytest.raises(UnknownName) as caught:
        registry.look_up("zzz")
    assert str(caught.value) == "scorer 'zzz' is unknown; allowed: attention, cosine"


def test_every_error_of_the_library_is_one_a_user_can_mend():
    errors = set()
    harnesses = "nuwa.integrations."  # a module there imports the harness that it is for; its own tests bring one
    modules = [
        module for module in pkgutil.walk_packages(nuwa.__path__, "nuwa.") if not module.name.startswith(harnesses)
    ]
    for module in modules:
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(value, Exception) and value.__module__.startswith("nuwa."):
                errors.add(value)
    assert UserError in errors and len(errors) > 5
    assert {error for error in errors if not issubclass(error, UserError)} == set()
