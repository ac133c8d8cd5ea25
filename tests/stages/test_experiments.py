"""Experiments: every overlay is valid on its model, composing keeps what it does not name, nothing of a user is lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import run_here

from pipelines.presets import REPLACED, compose
from pipelines.profiling import planned_methods
from pipelines.settings import SettingsError, parse_settings
from stages.entry import planned_trials
from stages.experiment import experiment
from stages.plan import only_timed

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "experiments").glob("*.yaml"))
PARAMS = (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_is_valid_and_plans_trials_on_the_published_shape(overlay):
    text = compose(PARAMS, overlay.read_text())
    settings = parse_settings(text, overlay.name)
    trials = planned_trials(settings)
    assert len(trials) > 3
    tokens = trials[0].schedule.tokens if settings.sweep.budget_unit == "share" else 1
    for trial in trials[1:]:
        assert trial.schedule.average_tokens <= max(settings.sweep.budgets) * tokens * 1.01
    assert set(settings.prepare.names) == set(settings.sweep.benchmarks)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_what_an_overlay_times_can_be_timed(overlay):
    wanted = parse_settings(compose(PARAMS, overlay.read_text()), overlay.name).profile
    planned = planned_methods(wanted, lambda line: None)
    assert set(planned) == set(wanted.models)
    for specs in planned.values():
        assert {spec.method for spec in specs} == set(wanted.methods)


def test_a_plan_says_where_an_overlay_has_no_sweep_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    told = {overlay.stem: only_timed(overlay.stem) for overlay in OVERLAYS}
    assert {name: lines for name, lines in told.items() if lines} == {
        "latency": [
            "latency sets what is timed, not what is swept: `make experiment profile PRESET=latency` runs it; the plan below is "
            "of the sweep in params.yaml"
        ]
    }


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_composing_keeps_the_rest_and_is_idempotent(overlay):
    text = compose(PARAMS, overlay.read_text())
    before, over, after = yaml.safe_load(PARAMS), yaml.safe_load(overlay.read_text()), yaml.safe_load(text)
    for section, values in before.items():
        if not isinstance(values, dict):
            assert after[section] == over.get(section, values)
            continue
        for key, value in values.items():
            named = over.get(section, {}).get(key, value)
            merged = isinstance(value, dict) and isinstance(named, dict) and key not in REPLACED
            assert after[section][key] == (value | named if merged else named)
    assert compose(text, overlay.read_text()) == text
    assert "# Everything a run depends on." in text


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git repository with the parameters and overlays of this one."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here("stages.experiment", *arguments, folder=folder)


def test_the_command_composes_once_and_refuses_to_lose_changes(checkout):
    done = run(checkout, "nuwa_table7")
    assert done.returncode == 0, done.stderr
    composed = (checkout / "params.yaml").read_text()
    assert yaml.safe_load(composed)["tracking"]["experiment"] == "nuwa-table-7"
    assert run(checkout, "nuwa_table7").returncode == 0
    assert (checkout / "params.yaml").read_text() == composed
    refused = run(checkout, "nuwa_table8")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: params.yaml has changes that are not committed; commit or stash them, "
        "the experiment would replace them\n"
    )
    assert (checkout / "params.yaml").read_text() == composed


def test_an_unknown_or_wrong_overlay_changes_nothing(checkout):
    before = (checkout / "params.yaml").read_bytes()
    unknown = run(checkout, "nuwa_table99")
    known = ", ".join(path.stem for path in OVERLAYS)
    assert (unknown.returncode, unknown.stderr) == (
        2,
        f"error: experiment 'nuwa_table99' is unknown; allowed: {known}\n",
    )
    overlay = checkout / "experiments" / "nuwa_table7.yaml"
    overlay.write_text(
        overlay.read_text().replace("budgets: [64]", "budgets: [900]").replace("budget: 64", "budget: 900")
    )
    wrong = run(checkout, "nuwa_table7")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: sweep.grids.0 (distance threshold), method nuwa: budget 900 is out of reach")
    assert (checkout / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML: while parsing a flow node"),
        ("report: {}\nreport: {}", "line 2: report stands there twice, first in line 1; leave out one of the two"),
        ("", "must hold a mapping of sections, as params.yaml does"),
        ("- 1", "must hold a mapping of sections, as params.yaml does"),
    ],
)
def test_an_overlay_that_is_none_is_one_line(text, message, tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        experiment("mine")
    assert str(caught.value).startswith(f"experiments/mine.yaml: {message}") and "\n" not in str(caught.value)
