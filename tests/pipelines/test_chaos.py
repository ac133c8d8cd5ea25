"""Workers, nodes and the driver are killed during one sweep on a cluster of several raylets: the answers are the same to
the bit, and no more than the unit a killed worker was at is done again.

Three kills, one of each kind, in the test suite; ``make chaos`` runs twenty.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import time

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import pytest
from bare_cluster import add_node
from bench import PATHS, ROOT, same
from ray.cluster_utils import Cluster
from warm_workers import warm_program

KILLS = int(os.environ.get("CHAOS_KILLS", "3"))
KINDS = ("worker", "node", "driver")
NODES = 2  # beside the head, each with room for one worker
SPEED = 3e8 if KILLS == 3 else 3e7  # FLOP/s that units are cut by: more kills need more units
PATIENCE_S = 1800  # for what hangs, not for a busy machine

DRIVER = """
import pickle, sys
from pathlib import Path
import bench, ray
from pipelines.settings import ClusterSettings
ray.cloudpickle.register_pickle_by_value(bench)
small = pickle.loads(Path(sys.argv[1]).read_bytes())
cluster = ClusterSettings(address=sys.argv[2], workers=int(sys.argv[3]), cpus=1, gpus=0)
outcome = small.run(
    Path(sys.argv[4]), cluster, in_process=False, unit_images=2, log=sys.argv[5], speed=float(sys.argv[6])
)
assert not outcome.failures, outcome.failures
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Chaos:
    """A cluster, the driver of a sweep on it, and what its workers noted."""

    def __init__(self, bench, folder):
        self.folder, self.results, self.log = folder, folder / "results", folder / "units.log"
        self.log.touch()
        (folder / "driver.py").write_text(DRIVER)
        (folder / "bench.pickle").write_bytes(pickle.dumps(bench))
        self.cluster = Cluster()
        add_node(self.cluster, num_cpus=0)
        self.nodes = [self.add_node() for _ in range(NODES)]
        self.start_driver()

    def add_node(self):
        return add_node(self.cluster, wait=False, num_cpus=1)

    def start_driver(self):
        arguments = [self.folder / "bench.pickle", self.cluster.address, NODES, self.results, self.log, SPEED]
        with open(self.folder / "driver.log", "a") as output:
            self.driver = subprocess.Popen(
                warm_program(self.folder / "driver.py", *arguments),
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": PATHS, "RAY_AUTH_MODE": "disabled"},
                stdout=output,
                stderr=output,
            )

    def noted(self, kind):
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return [(unit, int(pid), int(answers)) for what, unit, pid, answers in rows if what == kind]

    def busy(self):
        """Process ids of workers that are at a unit."""
        ended = {(unit, pid) for unit, pid, _ in self.noted("end")}
        return sorted({pid for unit, pid, _ in self.noted("begin") if (unit, pid) not in ended and alive(pid)})

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "driver.log").read_text()[-3000:]
            if self.driver.poll() is not None:
                assert self.driver.returncode == 0, (self.folder / "driver.log").read_text()[-3000:]
                return False
            time.sleep(0.02)
        return True

    def kill(self, kind, rng):
        if kind == "worker":
            if self.wait_for(self.busy):
                busy = self.busy()
                os.kill(busy[rng.integers(len(busy))], signal.SIGKILL)
        elif kind == "node":
            node = self.nodes.pop(rng.integers(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.add_node())
        else:
            self.driver.kill()
            self.driver.wait()
            self.start_driver()


@pytest.fixture
def chaos(bench, warm, tmp_path):
    made = Chaos(bench, tmp_path)
    yield made
    made.driver.kill()
    made.driver.wait()
    made.cluster.shutdown()


def test_kills_lose_nothing_and_repeat_little(chaos, bench, undisturbed, cluster):
    rng = np.random.default_rng(KILLS)
    kinds = [KINDS[number % len(KINDS)] for number in rng.permutation(KILLS)]
    done = 0
    for kind in kinds:
        done += int(rng.integers(1, 3))
        if not chaos.wait_for(lambda least=done: len(chaos.noted("end")) >= least):
            break
        chaos.kill(kind, rng)
    else:
        kind = None
    assert kind is None, "the sweep ended before the last kill; it needs more units"
    deadline = time.monotonic() + PATIENCE_S
    while chaos.driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert chaos.driver.returncode == 0, (chaos.folder / "driver.log").read_text()[-3000:]

    left = []
    outcome = bench.run(chaos.results, cluster, done=lambda unit, report: left.append(unit))
    assert not left
    assert same(outcome, undisturbed)
    begun = [answers for *_, answers in chaos.noted("begin")]
    killed = sum(NODES if kind == "driver" else 1 for kind in kinds)  # a driver takes its workers with it
    assert sum(begun) - len(bench.trials) * len(bench.examples) <= killed * max(begun)
