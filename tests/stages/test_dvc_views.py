"""What DVC's own commands show of a sweep: one short row of metrics, differences by name, one line a method."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from nuwa.methods import RECIPES
from pipelines.scores.summary import budget_curves, headline_metrics, headline_table, headline_trials
from pipelines.settings import parse_settings

ROOT = Path(__file__).parents[2]
BUDGETS = [16.0, 32.0]
RETENTION = {("nuwa", "pesp"): 0.7, ("visionzip", "perc"): 0.1, ("visionzip", "pesp"): 0.6}
METHODS = {"nuwa (paper)", "nuwa (released)", "visionzip"}


def sweep_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Unpruned, VisionZip under two position strategies and two presets of Nüwa, at two budgets."""
    trials = [{"trial_id": "u", "label": "unpruned", "method": "unpruned", "preset": "", "position": "pesp"}]
    trials[0] |= {"stage2_layer": None, "average_tokens": 144.0, "budgets": [144.0], "grids": ["main"]}
    scores = [row("u", "pope", "vqa", 0.9), row("u", "refcoco", "grounding", 0.8)]
    for (method, position), retention in RETENTION.items():
        for preset in ("released", "paper") if method == "nuwa" else ("released",):
            for budget in BUDGETS:
                trial = f"{method} {preset} {position} {budget:g}"
                trials.append({"trial_id": trial, "label": trial, "method": method, "preset": preset})
                trials[-1] |= {"position": position, "average_tokens": budget - 0.25, "budgets": [budget]}
                trials[-1] |= {"grids": ["main"], "stage2_layer": 4 if method == "nuwa" else None}
                share = retention + 0.1 * (budget == 32) - 0.05 * (preset == "paper")
                scores += [row(trial, "mean", "grounding", share), row(trial, "mean", "vqa", share + 0.2)]
    return pd.DataFrame(trials), pd.DataFrame(scores)


def row(trial: str, benchmark: str, family: str, score: float) -> dict:
    score = round(score, 4)
    place = {"trial_id": trial, "benchmark": benchmark, "family": family, "headline": benchmark != "mean"}
    return place | {"score": score, "low": score - 0.05, "high": score + 0.05}


def test_headline_metrics_are_nuwas_best_and_the_best_of_the_others():
    metrics = headline_metrics(*sweep_tables(), 16.0)
    assert metrics == {
        "full": {"vg": 0.8, "vqa": 0.9},
        "nuwa": {"vg": 0.7, "vqa": 0.9},
        "rival": {"vg": 0.6, "vqa": 0.8},
        "lead": {"vg": 0.1, "vqa": 0.1},
        "seeds": None,
    }


def test_what_a_sweep_lacks_is_null_under_the_same_names():
    trials, scores = sweep_tables()
    without = trials[trials["method"] != "nuwa"]
    scores = scores[scores["trial_id"].isin(without["trial_id"]) & (scores["family"] == "vqa")]
    metrics = headline_metrics(without, scores, 16.0)
    assert metrics["nuwa"] == metrics["lead"] == {"vg": None, "vqa": None}
    assert metrics["rival"] == {"vg": None, "vqa": 0.8} and metrics["full"]["vg"] is None


def test_the_table_holds_every_main_trial_of_the_budget():
    table = headline_table(*sweep_tables(), 32.0)
    assert list(table["label"]) == sorted(table["label"]) and len(table) == 4
    released = table[table["label"] == "nuwa released pesp 32"].iloc[0]
    assert released[["grounding", "grounding low", "vqa high"]].tolist() == [0.8, 0.75, 1.05]


def test_methods_stand_side_by_side_by_their_best_trials():
    trials, scores = sweep_tables()
    assert headline_trials(trials, scores, 32.0, most=3) == ["u", "nuwa released pesp 32", "visionzip released pesp 32"]
    assert headline_trials(trials, scores, 16.0, most=2) == ["u", "nuwa released pesp 16"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A working copy with the project's own dvc.yaml, at a commit with one headline budget and changed to another."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvc/plots"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    trials, scores = sweep_tables()
    (folder / "data/plots").mkdir(parents=True)
    for family, table in budget_curves(trials, scores).items():
        table.to_csv(folder / f"data/plots/{family}_retention.csv", index=False)

    write = (folder / "data/metrics.json").write_text
    write(
        json.dumps(headline_metrics(trials, scores, 16.0) | {"lead": {"vg": -0.1234, "vqa": -0.0123}, "seeds": 0.0123})
    )
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A", "-f"], [*who, "commit", "-qm", "16 tokens"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    write(
        json.dumps(headline_metrics(trials, scores, 32.0) | {"lead": {"vg": -0.1235, "vqa": -0.0124}, "seeds": 0.0124})
    )
    parameters = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(parameters.replace("margin: 0.01", "margin: 0.02"))
    return folder


def dvc(repository: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *command], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metrics_fit_a_terminal(repository):
    shown = dvc(repository, "metrics", "show").splitlines()
    assert len(shown) == 2 and max(map(len, shown)) <= 120
    assert shown[0].split() == ["Path", *KEYS]


KEYS = [f"{who}.{family}" for who in ("full", "lead", "nuwa", "rival") for family in ("vg", "vqa")]
KEYS.append("seeds")


def test_experiments_fit_a_terminal_as_readme_shows_them(repository, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    command = re.search(r"^\$ dvc (exp show .*?)(?: +#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
    shown = [line for line in dvc(repository, *shlex.split(command)).splitlines() if line.strip(" ─")]
    assert max(map(len, shown)) <= 120 and "…" not in "".join(shown)
    heads, workspace, committed = (re.split(r" {2,}", line.strip()) for line in shown)
    changed = ["nuwa.vg", "nuwa.vqa", "rival.vg", "rival.vqa", "lead.vg", "lead.vqa", "seeds", "evaluate.margin"]
    assert heads == ["Experiment", "Created", *changed]
    assert [workspace[0], workspace[2], workspace[-1]] == ["workspace", "0.8", "0.02"]
    assert [committed[2], committed[-1]] == ["0.7", "0.01"]


def test_readmes_experiment_sets_what_is_not_set_already():
    (assignment,) = re.findall(r"dvc exp run .*?-S '([^']+)'", (ROOT / "README.md").read_text())
    name, _, value = assignment.partition("=")
    section, key = name.split(".")
    text = (ROOT / "params.yaml").read_text()
    parameters = yaml.safe_load(text)
    assert parameters[section][key] != yaml.safe_load(value)
    parameters[section][key] = yaml.safe_load(value)
    assert getattr(getattr(parse_settings(yaml.safe_dump(parameters), "params.yaml"), section), key)
    assert parameters["report"]["headline_budget"] in parameters["sweep"]["budgets"], "the report needs it"


@pytest.fixture(scope="module")
def pulled(tmp_path_factory) -> tuple[Path, Path]:
    """A finished run whose every file is a stand-in, pushed by one line of README, and a colleague's clone that pulled it."""
    work, clone = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("colleague") / "clone"
    for name in ("dvc.yaml", "params.yaml", ".dvc/config"):
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, work / name)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    model = yaml.safe_load((ROOT / "params.yaml").read_text())["model"]["path"]
    named = [one for stage in stages for kind in ("outs", "metrics", "deps") for one in stage.get(kind, [])]
    paths = [(next(iter(one)) if isinstance(one, dict) else one).replace("${model.path}", model) for one in named]
    for name in sorted(paths, key=lambda name: -name.count("/")):  # a folder comes with the files in it
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(path.name)

    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *command], cwd=work, check=True)

    remote = re.search(r"^\$ dvc (remote add .*?)(?: +#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
    here = re.sub(r"\S+$", str(work / "store"), remote)  # the place alone is another
    git("init", "-q")
    (work / ".gitignore").write_text("/data/*.parquet\n/data/benchmarks\n/data/plots\n/store\n/report\n")
    commands = [shlex.split(here), ["commit", "--force", "--quiet"], ["push", "--quiet"]]
    every = "import sys, json, dvc.cli; sys.exit(any(map(dvc.cli.main, json.loads(sys.argv[1]))))"  # one start for all
    subprocess.run([sys.executable, "-c", every, json.dumps(commands)], cwd=work, check=True, capture_output=True)
    git("add", "-A"), git("commit", "-qm", "a run")
    subprocess.run(["git", "clone", "-q", str(work), str(clone)], check=True)
    dvc(clone, "pull", "--quiet")
    return work, clone


def test_a_colleague_pulls_every_table_and_the_report(pulled):
    work, clone = pulled
    tables = ["examples", "images", "trials", "predictions", "kept", "scores", "comparisons", "groups"]
    got = [*(f"data/{name}.parquet" for name in tables), "data/benchmarks", "data/plots", "data/sweep.json", "report"]
    assert {name: (clone / name).read_text() for name in got} == {name: (work / name).read_text() for name in got}
    assert not (clone / "cache").exists(), "what can be made again does not travel"


def test_a_difference_across_budgets_is_by_the_same_names(repository):
    difference = json.loads(dvc(repository, "metrics", "diff", "--json", "--all"))["data/metrics.json"]
    assert set(difference) == set(KEYS)
    assert difference["nuwa.vg"] == {"old": 0.7, "new": 0.8, "diff": pytest.approx(0.1)}


def test_a_selection_with_cuts_at_two_layers_is_two_lines():
    trials, scores = sweep_tables()
    third = trials[trials["label"].str.startswith("nuwa paper")].assign(stage2_layer=3)
    third["trial_id"] += " third"
    more = scores[scores["trial_id"].str.startswith("nuwa paper")].assign(
        trial_id=lambda rows: rows["trial_id"] + " third"
    )
    table = budget_curves(pd.concat([trials, third]), pd.concat([scores, more]))["vqa"]
    assert set(table["method"]) == {"nuwa (paper, layer 3)", "nuwa (paper, layer 4)", "nuwa (released)", "visionzip"}
    lines = table.groupby(["method", "position"])["average_tokens"]
    assert (lines.nunique() == lines.size()).all()


def test_plots_draw_one_line_a_method(repository):
    dvc(repository, "plots", "show", "--out", "plots")
    page = (repository / "plots/index.html").read_text()
    specs = [json.loads(found) for found in re.findall(r"var spec = (\{.*?\});\s", page, re.DOTALL)]
    assert len(specs) == 2, "grounding and VQA, and no chart beside them"
    for spec in specs:
        rows = spec["data"]["values"]
        assert spec["spec"]["encoding"]["color"]["field"] == "method"
        colors = spec["spec"]["encoding"]["color"]["scale"]["range"]
        assert len(set(colors)) == len(colors) >= len(RECIPES), "each method has its own"
        assert spec["facet"]["column"]["field"] == "position" and spec["facet"]["row"]["field"] == "rev"
        assert {point["method"] for point in rows} == METHODS
        lines = pd.DataFrame(rows).groupby(["rev", "position", "method"])["average_tokens"]
        assert (lines.nunique() == lines.size()).all() and (lines.size() == len(BUDGETS)).all()
