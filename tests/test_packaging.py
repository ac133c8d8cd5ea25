"""What is installed is what was tested, and the wheel holds the library alone."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned(file: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("-c ", "-r "))]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def brought_along(named: dict[str, Requirement]) -> set[str]:
    """Everything that the installed distributions of ``named`` need, on this interpreter and system."""
    reached: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, frozenset(requirement.extras)) for name, requirement in named.items()]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in reached:
            continue
        reached.add((name, extras))

        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            if applies(requirement, set(extras)):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in reached}


def is_accelerators(name: str) -> bool:
    """Torch's CUDA builds bring libraries that its CPU build does not; torch pins each of them itself."""
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


def all_pinned() -> dict[str, Requirement]:
    main, tests = pinned("requirements.txt"), pinned("requirements-test.txt")
    assert not main.keys() & tests.keys()
    return main | tests


def test_all_that_is_installed_is_pinned():
    named, constraints = all_pinned(), pinned("constraints.txt")
    assert not named.keys() & constraints.keys()
    lacking = brought_along(named) - named.keys() - constraints.keys()
    assert {name for name in lacking if not is_accelerators(name)} == set()
    for name, requirement in (named | constraints).items():
        assert [one.operator for one in requirement.specifier] == ["=="], name


def test_the_environment_is_the_all_pinned():
    for name, requirement in all_pinned().items():
        assert requirement.specifier.contains(importlib.metadata.version(name), prereleases=True), name


def test_no_file_names_an_index():
    for file in ("requirements.txt", "requirements-test.txt", "constraints.txt", "pyproject.toml"):
        assert not re.search(r"://|--(extra-)?index-url|--find-links", (ROOT / file).read_text()), file


def test_what_is_declared_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    main, tests = pinned("requirements.txt"), pinned("requirements-test.txt")
    declared = dict.fromkeys([*project["dependencies"], *extras["pipeline"]], main) | dict.fromkeys(
        extras["dev"], tests
    )
    for text, named in declared.items():
        requirement = Requirement(text)
        (version,) = named[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(version.version, prereleases=True), text


def test_the_wheel_holds_nuwa_and_its_licence_only(library_wheel):
    names = zipfile.ZipFile(library_wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.startswith("nuwa-")} == {"nuwa"}
    assert {name for name in names if name.startswith("nuwa/")} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "nuwa").rglob("*.py")
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
