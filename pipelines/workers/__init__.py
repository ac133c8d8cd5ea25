"""Runs work units on workers that each hold a model: in this process, or as Ray actors on a machine or a cluster.

``policy`` says what happens when something fails; ``ledger`` keeps which units wait and what became of the others;
``dispatch`` keeps workers busy and replaces them; ``host`` is the actor; ``joining`` starts or joins Ray. Nothing here
knows what a unit is, and importing it loads no model code, so that a worker's process starts soon.
"""

from pipelines.workers.dispatch import run_units
from pipelines.workers.joining import ClusterUnavailable, start_ray
from pipelines.workers.ledger import GivenUp, OnDone, UnitsFailed
from pipelines.workers.policy import Allowance, Failure, Fault, Partial, Policy, reason

__all__ = [
    "Allowance",
    "ClusterUnavailable",
    "Failure",
    "Fault",
    "GivenUp",
    "OnDone",
    "Partial",
    "Policy",
    "UnitsFailed",
    "reason",
    "run_units",
    "start_ray",
]
