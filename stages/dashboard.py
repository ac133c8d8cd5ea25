"""``make dashboard``: the addresses at which MLflow shows the last sweep best, then its server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

from nuwa.errors import UserError
from pipelines.settings import load_settings
from pipelines.tracking.store import TrackingStore
from pipelines.tracking.views import LINKS

HOST = "127.0.0.1"


def pages(store: TrackingStore) -> Mapping[str, str]:
    """What there is to see of the sweep that was tracked last → its address on a server; empty before the first."""
    runs = store.attempt(
        lambda: store.client.search_runs(
            [store.experiment_id], f"tags.{LINKS} != ''", max_results=1, order_by=["attributes.start_time DESC"]
        )
    )
    return json.loads(runs[0].data.tags[LINKS]) if runs else {}


def dashboard(port: int) -> None:
    """Print the addresses and become the server; one that runs elsewhere is left to do that itself."""
    tracking = load_settings().tracking
    store = TrackingStore(tracking.resolved_uri, tracking.experiment, artifact_location=None)
    elsewhere = store.uri.startswith("http")
    base = store.uri.rstrip("/") if elsewhere else f"http://{HOST}:{port}"
    print("\n".join(f"{name}:\n  {base}/{address}" for name, address in pages(store).items()), flush=True)

    if not elsewhere:
        # Not on the command line: it may hold a password, which lists of processes would show.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = store.uri
        server = ["mlflow", "server", "--host", HOST, "--port", str(port)]
        os.execvp(server[0], server)


if __name__ == "__main__":
    try:
        dashboard(int(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
