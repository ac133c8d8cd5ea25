"""What MLflow's pages open on: the trials of a sweep as a sorted table, as charts, and the headline ones side by side.

MLflow keeps a view that was shared as a tag of the experiment and names it in the address; a sweep writes such a tag of its
own. So a link shows the same columns, order and charts to everybody, and changes nothing of what a reader has set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from nuwa import UNPRUNED

SHOWN = (
    "grounding_retention",
    "vqa_retention",
    "average_tokens",
)  # the first sorts; MLflow shows the names of trials beside
CHARTS = {"grounding_retention": "Grounding retention", "vqa_retention": "VQA retention"}
CHART_RUNS = 1000  # of one chart, which MLflow draws a hundred of where nothing is said
SECTION = {
    "uuid": "retention-over-budget",
    "name": "Retention over the budget",
    "display": True,
    "isReordered": True,
    "columns": 2,
    "cardHeight": 420,
}
# Runs of training and scoring; where nothing is said, its pages are those of chats.
KIND = {"mlflow.experimentKind": "custom_model_development"}
LINKS = "links"  # tag of a sweep's run: what links() gave
_VIEW, _OVER_BUDGET = "mlflow.sharedViewState.", "-over-budget"


def view_tags(sweep_id: str) -> dict[str, str]:
    """Tags of the experiment: how its pages show the trials of a sweep, those too that hang below a later one by now.

    Charts leave the unpruned trial out, so far from all others in tokens that it would press them together.
    """
    trials = f"tags.sweeps LIKE '%{sweep_id}%'"
    views = {sweep_id: trials, sweep_id + _OVER_BUDGET: f"{trials} AND params.method != '{UNPRUNED}'"}
    return KIND | {_VIEW + key: json.dumps(_view(of)) for key, of in views.items()}


def _view(searched: str) -> dict[str, object]:
    """What MLflow's page of runs keeps of itself: search, order, columns, charts."""
    columns = [f"metrics.`{name}`" for name in SHOWN]
    return {
        "searchFilter": searched,
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": True,  # beside charts, which have the whole width then
        "compareRunCharts": [_scatter(metric, title) for metric, title in CHARTS.items()],
        "compareRunSections": [SECTION],
        "isAccordionReordered": True,
    }


def _scatter(metric: str, title: str) -> dict[str, object]:
    return {
        "uuid": f"{metric}-over-tokens",
        "type": "SCATTER",
        "xaxis": {"key": "average_tokens", "type": "METRIC"},
        "yaxis": {"key": metric, "type": "METRIC"},
        "runsCountToCompare": CHART_RUNS,
        "deleted": False,
        "isGenerated": False,
        "metricSectionId": SECTION["uuid"],
        "displayName": f"{title} over average tokens",
    }


def links(experiment: str, sweep_id: str, parent: str, compared: Sequence[str]) -> Mapping[str, str]:
    """What there is to see → its address below a server's own, such as ``http://127.0.0.1:5000/``.

    ``experiment``, ``parent``: MLflow's ids; ``compared``: ids of runs to stand side by side.
    """
    kind = "workflowType=machine_learning"
    runs = f"#/experiments/{experiment}/runs?{kind}&viewStateShareKey={sweep_id}"
    pages = {
        "trials, by retention of grounding": runs,
        "accuracy over the budget": f"{runs}{_OVER_BUDGET}&compareRunsMode=CHART",
        "the run itself: verdict, parameters, report": f"#/experiments/{experiment}/runs/{parent}?{kind}",
    }
    if len(compared) > 1:
        lists = {"runs": list(compared), "experiments": [experiment]}
        asked = "&".join(f"{name}={quote(json.dumps(ids))}" for name, ids in lists.items())
        pages["headline trials side by side"] = f"#/compare-runs?{asked}&{kind}"
    return pages
