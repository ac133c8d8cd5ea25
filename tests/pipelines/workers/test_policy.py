"""The policy of a run, row by row, against real Ray processes: each fault comes from a worker's own code."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from bare_cluster import bare_ray

from pipelines.files.storage import StorageUnavailable
from pipelines.settings import ClusterSettings
from pipelines.workers import Allowance, ClusterUnavailable, Failure, Fault, Policy, UnitsFailed, run_units, start_ray
from pipelines.workers.policy import fault_of

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
SOON = Policy(first_pause_s=0.1, look_every_s=0.5)
NOBODY_STARTS = r"no worker can be started, 3 attempts each: a worker on .+ cannot start: RuntimeError: no model for"
STICKY = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(scope="module", autouse=True)
def one_ray(warm):
    """Two pretended GPUs on this machine, for all tests of the module."""
    with bare_ray(num_cpus=2, num_gpus=2):
        yield


def two(gpus: float = 0) -> ClusterSettings:
    return ClusterSettings(address=None, workers=2, cpus=1, gpus=gpus)


@dataclass(frozen=True)
class Unit:
    """``what`` its worker shall do, and for how many of its tries; ``seconds`` it takes otherwise.

    ``after``: how often GPU 0 has to have been tried before it is done, ``workers``: how many workers have to have begun.
    """

    name: str
    what: str = ""
    times: int = 99
    seconds: float = 0.0
    after: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Pair(Unit):
    """A unit that comes apart into ``parts``."""

    parts: tuple[Unit, ...] = ()

    def split(self):
        return {part.name: part for part in self.parts}


@dataclass(frozen=True)
class Faulty:
    """A worker that does what its unit says; one on ``sick`` GPU (``all``) fails at ``when``."""

    notes: str
    sick: str = ""
    when: str = ""

    def build(self):
        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"] or [""]
        sick = self.sick in (gpu, "all")
        if self.when == "build" and sick:
            raise RuntimeError("no model for this machine")
        return FaultyWorker(Path(self.notes), sick and self.when == "run", gpu)


class FaultyWorker:
    def __init__(self, notes, sick, gpu):
        self.notes, self.sick, self.gpu = notes, sick, gpu

    def run(self, unit, upcoming):
        tries = len(list(self.notes.glob(f"{unit.name}.*")))
        (self.notes / f"{unit.name}.{tries}.{self.gpu}.{os.getpid()}").touch()
        if self.sick:
            raise RuntimeError(STICKY)
        if unit.what and tries < unit.times:
            WHAT[unit.what]()
        while len(tried_on(self.notes, "0")) < unit.after or len(workers_of(self.notes)) < unit.workers:
            time.sleep(0.02)
        time.sleep(unit.seconds)
        return unit.name


def tried_on(notes: Path, gpu: str) -> list[Path]:
    return [path for path in notes.iterdir() if path.name.split(".")[2] == gpu]


def workers_of(notes: Path) -> set[str]:
    """Process ids."""
    return {path.name.split(".")[3] for path in notes.iterdir()}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(3600)


def too_many_files():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_storage():
    raise StorageUnavailable("s3://bucket/x: could not read it in 4 attempts")


def no_memory():
    raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


def no_room():
    raise MemoryError("no room for both")


def no_such_thing():
    raise KeyError("no such thing")


WHAT = {
    "die": die,
    "hang": hang,
    "open": too_many_files,
    "storage": no_storage,
    "memory": no_memory,
    "room": no_room,
    "raise": no_such_thing,
}


class Run:
    """A run of ``units`` and what came of it."""

    def __init__(self, folder: Path, units, spec=None, cluster=None, policy=SOON, **options):
        self.notes = folder / "tries"
        self.notes.mkdir()
        self.finished: list[str] = []
        spec = replace(spec, notes=str(self.notes)) if spec else Faulty(str(self.notes))
        self.given_up = run_units(
            spec,
            {unit.name: unit for unit in units},
            cluster or two(),
            lambda name, _: self.finished.append(name),
            policy=policy,
            **options,
        )

    def tries(self, name: str) -> int:
        return len(list(self.notes.glob(f"{name}.*")))


def numbered(count: int, seconds: float = 0.0) -> list[Unit]:
    return [Unit(f"u{number}", seconds=seconds) for number in range(count)]


def names(units: list[Unit]) -> list[str]:
    return sorted(unit.name for unit in units)


def test_a_gpu_with_a_sticky_error_is_left_aside_and_the_other_does_all(tmp_path, capsys):
    units = [replace(unit, after=SOON.place_failures) for unit in numbered(12)]
    run = Run(tmp_path, units, Faulty("", sick="0", when="run"), two(gpus=1))
    assert sorted(run.finished) == names(units) and not run.given_up
    assert len(tried_on(run.notes, "0")) == SOON.place_failures
    line = capsys.readouterr().err
    assert f"GPU 0: 3 workers in a row failed there, last: RuntimeError: {STICKY}; it gets no more work" in line


def test_a_worker_that_cannot_start_does_not_end_the_others(tmp_path, capsys):
    units = numbered(40, 0.1)
    run = Run(tmp_path, units, Faulty("", sick="1", when="build"), two(gpus=1))
    assert sorted(run.finished) == names(units) and not run.given_up
    assert f"a worker on {socket.gethostname()}" in (line := capsys.readouterr().err)
    assert "cannot start: RuntimeError: no model for this machine" in line


def test_where_no_worker_can_start_the_run_stops_with_the_reason(tmp_path):
    with pytest.raises(UnitsFailed, match=NOBODY_STARTS) as no:
        Run(tmp_path, numbered(4), Faulty("", sick="all", when="build"), replace_workers(two(), 1))
    assert "\n" not in str(no.value).partition("\n")[0]


def replace_workers(cluster: ClusterSettings, workers) -> ClusterSettings:
    return cluster.model_copy(update={"workers": workers})


def test_a_worker_that_hangs_is_replaced_and_holds_up_nothing_else(tmp_path, capsys):
    units = [Unit("stuck", "hang", times=1), *numbered(6)]
    run = Run(tmp_path, units, policy=replace(SOON, silence_s=5.0))
    assert sorted(run.finished) == names(units) and not run.given_up
    assert run.finished[-1] == "stuck" and run.tries("stuck") == 2
    assert all(run.tries(unit.name) == 1 for unit in units[1:])
    assert "was silent for" in capsys.readouterr().err


def test_a_unit_that_kills_three_workers_is_split_until_what_kills_stands_alone(tmp_path):
    deadly = Unit("deadly", "die")
    killer = Pair("killer", "die", parts=(deadly, Unit("harmless")))
    wide = Pair("wide", "room", parts=(Unit("left"), Unit("right")))
    run = Run(tmp_path, [Unit("frail", "die", times=2), killer, wide, *numbered(4)])
    assert sorted(run.finished) == ["frail", "harmless", "left", "right", "u0", "u1", "u2", "u3"]
    assert [run.tries(name) for name in ("frail", "killer", "deadly", "wide")] == [3, 3, 1, 1]
    ((unit, failure),) = run.given_up.values()
    assert unit == deadly and failure.attempts == 3
    assert failure.reason.startswith("killed 3 workers: ActorDiedError")


def test_auto_takes_what_the_cluster_has_too_many_open_files_pass_and_an_exception_is_recorded(tmp_path):
    """Two workers, of which each waits for the other's first unit."""
    together = [replace(unit, workers=2) for unit in numbered(3)]
    units = [Unit("reading", "open", times=2), Unit("bad", "raise"), *together]
    run = Run(tmp_path, units, cluster=replace_workers(two(), "auto"))
    assert len(workers_of(run.notes)) == 2
    assert sorted(run.finished) == ["reading", "u0", "u1", "u2"]
    assert run.tries("reading") == 3 and run.tries("bad") == 1
    assert all(run.tries(unit.name) == 1 for unit in together)  # none had to be replaced to meet another
    ((_, failure),) = run.given_up.values()
    assert failure.reason == "KeyError: 'no such thing'"


def test_a_run_that_only_fails_stops_early(tmp_path):
    with pytest.raises(UnitsFailed, match="the first 3 units all failed, so the run stops: KeyError: 'no such thing'"):
        Run(tmp_path, [replace(unit, what="raise") for unit in numbered(50)], cluster=replace_workers(two(), 1))
    assert len(list((tmp_path / "tries").iterdir())) < 15


def test_a_storage_that_stays_away_stops_the_run_after_three_attempts(tmp_path):
    with pytest.raises(UnitsFailed, match=r"s3://bucket/x: could not read it .*; 3 attempts, the last on "):
        Run(tmp_path, [Unit("reading", "storage")], cluster=replace_workers(two(), 1))
    assert len(list((tmp_path / "tries").iterdir())) == 3


def test_a_library_without_memory_costs_its_worker(tmp_path):
    """The unit cannot be split here, so it is given up; the next one runs in another process."""
    run = Run(tmp_path, [Unit("wide", "memory"), Unit("next")], cluster=replace_workers(two(), 1))
    assert run.finished == ["next"] and run.given_up["wide"][1].fault == Fault.MEMORY
    pids = {path.name.split(".")[0]: path.name.split(".")[3] for path in run.notes.iterdir()}
    assert pids["wide"] != pids["next"]


def test_fewer_or_more_workers_than_fit_are_told(tmp_path, capsys):
    Run(tmp_path, numbered(4, 0.05), cluster=replace_workers(two(gpus=1), 3))
    line = capsys.readouterr().err
    assert "workers: 3 asked for, the cluster holds 2 now; the others start when there is room" in line


def test_gpu_hours_end_a_run_in_order(tmp_path):
    """A tenth of a second of two workers: what runs is finished, what waits is left, and both are known."""
    units = numbered(50, 0.2)
    allowance = Allowance(0.5 / 3600)
    run = Run(tmp_path, units, allowance=allowance)
    assert run.finished and sorted([*run.finished, *run.given_up]) == names(units)
    assert {failure.fault for _, failure in run.given_up.values()} == {Fault.LEFT}
    assert next(iter(run.given_up.values()))[1].reason == "sweep.gpu_hours = 0.000138889 are used"
    assert not set(run.finished) & {path.name.partition(".")[0] for path in run.notes.iterdir()} ^ set(run.finished)
    assert allowance.used >= allowance.gpu_hours
    (tmp_path / "next").mkdir()
    then = Run(tmp_path / "next", numbered(3), allowance=allowance)
    assert not then.finished and len(then.given_up) == 3, "the runs of a search share one allowance"


# --- trials and examples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Trials on examples; an example's image is its letter."""

    trials: tuple[str, ...]
    examples: tuple[str, ...]

    @property
    def unit_id(self):
        return f"{'+'.join(self.trials)} on {'+'.join(self.examples)}"

    @property
    def home(self):
        return self.examples[0][0]

    @property
    def members(self):
        yield from (("trial", trial) for trial in self.trials)
        yield from (("example", example) for example in self.examples)

    @property
    def suspects(self):
        if len(self.trials) * len(self.examples) > 1:
            return {}
        return {("trial", self.trials[0]): self.home, ("example", self.examples[0]): self.trials[0]}

    def without(self, members):
        trials = tuple(trial for trial in self.trials if ("trial", trial) not in members)
        examples = tuple(example for example in self.examples if ("example", example) not in members)
        taken = []
        if trials != self.trials:
            taken.append(Product(tuple(t for t in self.trials if t not in trials), self.examples))
        if trials and examples != self.examples:
            taken.append(Product(trials, tuple(e for e in self.examples if e not in examples)))
        return (Product(trials, examples) if trials and examples else None), taken

    def split(self):
        for name in ("examples", "trials"):
            whole = getattr(self, name)
            if len(whole) > 1:
                cut = len(whole) // 2
                halves = [replace(self, **{name: part}) for part in (whole[:cut], whole[cut:])]
                return {half.unit_id: half for half in halves}
        return {}

    @property
    def answers(self):
        return set(itertools.product(self.trials, self.examples))


@dataclass(frozen=True)
class Picky:
    """A worker that cannot bear some trials and some examples; it notes each try."""

    notes: str
    trials: frozenset
    examples: frozenset = frozenset()

    def build(self):
        return self

    def run(self, unit, upcoming):
        with open(self.notes, "a") as lines:
            lines.write("try\n")
        if not self.trials.isdisjoint(unit.trials) or not self.examples.isdisjoint(unit.examples):
            raise ValueError("shapes do not fit")
        return unit


TRIALS = tuple(f"t{number}" for number in range(8))
EXAMPLES = tuple(f"{image}{number}" for image in "abcdefghij" for number in range(8))


def products():
    batches = [EXAMPLES[start : start + 8] for start in range(0, len(EXAMPLES), 8)]
    made = [Product(pair, batch) for batch in batches for pair in zip(TRIALS[::2], TRIALS[1::2], strict=True)]
    return {unit.unit_id: unit for unit in made}


@pytest.mark.parametrize(
    ("bad", "in_process"),
    [
        ({"trials": {"t0"}}, True),
        ({"examples": {"e3"}}, True),
        ({"trials": {"t5"}, "examples": {"b2"}}, True),
        ({"trials": {"t5"}, "examples": {"b2"}}, False),
    ],
)
def test_a_trial_or_an_example_that_always_raises_is_given_up_and_all_else_is_answered(tmp_path, bad, in_process):
    trials, examples = frozenset(bad.get("trials", ())), frozenset(bad.get("examples", ()))
    done, notes = set(), tmp_path / "tries"
    units = products()
    spec = Picky(str(notes), trials, examples)
    given_up = run_units(
        spec, units, two(), lambda _, unit: done.update(unit.answers), policy=SOON, in_process=in_process
    )
    everything = set(itertools.product(TRIALS, EXAMPLES))
    wanted = {(trial, example) for trial, example in everything if trial not in trials and example not in examples}
    assert done == wanted
    lost = [answer for unit, _ in given_up.values() for answer in unit.answers]
    assert set(lost) == everything - wanted and len(lost) == len(set(lost))
    assert len(notes.read_text().splitlines()) < len(units) + 60, "what is given up is not tried answer by answer"


@dataclass(frozen=True)
class Whole(Product):
    """Units that say what they consist of, and cannot be taken apart but by halves."""

    without = property()  # as if it were not there

    def split(self):
        return {name: Whole(half.trials, half.examples) for name, half in Product.split(self).items()}


def test_units_that_name_suspects_need_not_come_apart(tmp_path):
    """A bad trial is met often enough to be given up everywhere; what waits of it cannot be stripped, and is tried."""
    done, notes = set(), tmp_path / "tries"
    units = {unit_id: Whole(unit.trials, unit.examples) for unit_id, unit in products().items()}
    assert not hasattr(next(iter(units.values())), "without")
    spec = Picky(str(notes), frozenset({"t0"}))
    given_up = run_units(spec, units, two(), lambda _, unit: done.update(unit.answers), policy=SOON, in_process=True)
    everything = set(itertools.product(TRIALS, EXAMPLES))
    assert done == {(trial, example) for trial, example in everything if trial != "t0"}
    assert {answer for unit, _ in given_up.values() for answer in unit.answers} == everything - done


def test_where_every_trial_raises_the_run_stops_soon(tmp_path):
    notes = tmp_path / "tries"
    with pytest.raises(
        UnitsFailed, match="the first 3 units all failed, so the run stops: ValueError: shapes do not fit"
    ):
        run_units(
            Picky(str(notes), frozenset(TRIALS)), products(), two(), lambda *_: None, policy=SOON, in_process=True
        )
    assert len(notes.read_text().splitlines()) <= SOON.hopeless_failures + 1


# --- joining ---------------------------------------------------------------------------------------------------------


def test_a_cluster_without_a_token_here_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(ClusterUnavailable, match=r"192\.0\.2\.1:6379: no token for the cluster"):
        start_ray(two())


# --- what an error says -----------------------------------------------------------------------------------------------

SPELLINGS = [
    (MemoryError(), Fault.MEMORY, False),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), Fault.MEMORY, False),
    (RuntimeError("CUDA error: out of memory"), Fault.MEMORY, False),
    (RuntimeError("HIP out of memory. Tried to allocate"), Fault.MEMORY, False),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), Fault.MEMORY, False),
    (RuntimeError("UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), Fault.MEMORY, False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), Fault.MEMORY, False),
    (RuntimeError("std::bad_alloc"), Fault.MEMORY, False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Fault.MEMORY, True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"), Fault.MEMORY, True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), Fault.MEMORY, True),
    (RuntimeError(STICKY), Fault.DEVICE, True),
    (RuntimeError("CUDA error: device-side assert triggered"), Fault.DEVICE, True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), Fault.DEVICE, True),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Fault.DEVICE, True),
    (RuntimeError("HIP error: unspecified launch failure"), Fault.DEVICE, True),
    (OSError(errno.ESTALE, "Stale file handle"), Fault.PASSING, False),
    (OSError(errno.EIO, "Input/output error"), Fault.PASSING, False),
    (ConnectionResetError("reset by peer"), Fault.PASSING, False),
    (StorageUnavailable("s3://x"), Fault.PASSING, False),
    (OSError(errno.ENOENT, "No such file"), Fault.RAISED, False),
    (ValueError("the mask has 3 rows"), Fault.RAISED, False),
]


@pytest.mark.parametrize(("error", "fault", "spent"), SPELLINGS, ids=lambda value: str(value)[:40])
def test_what_an_error_says_of_its_cause(error, fault, spent):
    failure = Failure.of(error)
    assert (fault_of(error), failure.fault, failure.spent) == (fault, fault, spent)


def test_a_cause_behind_an_error_counts():
    try:
        try:
            raise RuntimeError(STICKY)
        except RuntimeError as inner:
            raise ValueError("trial nuwa failed") from inner
    except ValueError as error:
        assert fault_of(error) == Fault.DEVICE


def test_pauses_double_up_to_a_bound_and_deadlines_follow_the_cost():
    policy = Policy(first_pause_s=1.0, longest_pause_s=10.0, silence_s=60.0, silence_factor=20.0)
    assert [policy.pause(failures) for failures in range(7)] == [0, 0, 1, 2, 4, 8, 10]
    assert policy.deadline(5.0, None) == 60.0 and policy.deadline(1.0, 1.0) == 60.0
    assert policy.deadline(5.0, 1.0) == 100.0
