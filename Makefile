# Two commands do everything on a fresh machine: `make repro` and `make test`.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
# Modules are compiled on all cores, where pip takes one; some packages bring templates that are no modules.
COMPILE = $(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
# Whatever the shell says: what is compiled is kept, else each of the processes of a stage or a test compiles all anew.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONDONTWRITEBYTECODE=
PORT ?= 5000

.PHONY: setup repro test chaos rehearsal fuzz mutation agreement lint plan compare submission rescore submit dashboard track testbed pruner clean profile search experiment compact report

setup: $(READY)

$(READY): requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --no-compile --quiet --disable-pip-version-check -r requirements.txt
	$(COMPILE)
	touch $@

# What tests alone need comes with the first of them: the main job does not wait for it.
$(TESTABLE): requirements-test.txt $(READY)
	$(VENV)/bin/pip install --no-compile --quiet --disable-pip-version-check -r requirements-test.txt
	$(COMPILE)
	touch $@

# Validate everything first: a wrong parameter must not cost a stage its outputs.
repro: $(READY)
	$(RUN) python -m stages.plan
	$(RUN) dvc repro
	@echo "report/index.html is the report; make dashboard shows every trial"

# What is wrong or missing, and what params.yaml asks for, or experiments/$(PRESET).yaml without touching it; DEEP=1: every
# row, image and tensor is read; EXPLAIN=1: why, trial by trial
plan: $(READY)
	$(RUN) python -m stages.plan $(PRESET)

# Whole files to three processes, the longest first (tests/running_order.py): on two cores one more than they hold, since
# those with servers and Ray instances wait for them a third of their time.
test: $(TESTABLE) lint
	$(RUN) python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Twenty kills of workers, nodes and the driver during one sweep on a cluster of three raylets: about three minutes.
chaos: $(TESTABLE)
	$(RUN) CHAOS_KILLS=20 python -m pytest tests/pipelines/test_chaos.py

# The nearest thing to the real day on one machine: a checkpoint of 1.4 GB, S3, PostgreSQL, a cluster that grows and is hurt;
# ten minutes on two free cores. ARGS="--small --images 2": minutes.
rehearsal: $(TESTABLE)
	$(RUN) PYTHONPATH=tests OMP_NUM_THREADS=1 python -m rehearsal $(ARGS)

# Two hundred damaged tables, model folders, settings and photos: each refused in one line or read for what it says.
fuzz: $(TESTABLE)
	$(RUN) python tests/fuzzing/fuzzer.py 200

# One line of the code between image and answer changed at a time, CHANGES of them: no old identity over a new answer.
CHANGES ?= 300
mutation: $(TESTABLE)
	$(RUN) PYTHONPATH=tests OMP_NUM_THREADS=1 python -m mutation --changes $(CHANGES)

# Which share of answers differs from stock generate, between batches, and between cached and fresh features, by dtype
agreement: $(READY)
	$(RUN) python -m benchmarks.agreement --write

lint: $(TESTABLE)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports
	$(RUN) mypy

# Which answers changed from A to B and what that did to scores: two runs (a folder, a revision of git) or two trials of
# data/ (an id, a label); OUT: a table of all trials
compare: $(READY)
	$(RUN) python -m stages.compare "$(A)" "$(B)" "$(OUT)"

# Questions whose answers only a server has (vqav2/testdev:submission, mmbench/test:submission, vizwiz/test:submission):
# the sweep, then a file a trial below data/submissions
submission: $(READY)
	$(RUN) python -m stages.plan
	$(RUN) dvc repro sweep
	$(RUN) python -m stages.submission

# Another rule of scoring over stored answers (prepare.protocol, a benchmark's variant, evaluate.grades): what reads or
# limits a question as before is not asked again, and the plan says first what is.
rescore: $(READY)
	$(RUN) python -m stages.plan
	$(RUN) dvc repro evaluate

# The sweep on a Ray cluster, its results back here: make submit ARGS="--address ... --storage ... --work ..."
submit: $(READY)
	$(RUN) python -m cluster.submit $(ARGS)

# The page of the finished sweep; INTERIM=1: of one that runs, on the questions that all trials have answered so far, in
# cache/interim/report and MLflow
report: $(READY)
	$(RUN) $(if $(INTERIM),python -m stages.interim,dvc repro report)

# Everything the sweep logged, at http://127.0.0.1:$(PORT); first it prints where its trials, charts and comparison are
dashboard: $(READY)
	$(RUN) python -m stages.dashboard $(PORT)

# Replay the finished sweep into MLflow.
track: $(READY)
	$(RUN) python -m stages.track

# Retrain the testbed's model from nothing: over an hour on two cores; keep them free for it.
testbed: $(READY)
	$(RUN) python -m stages.testbed
	$(RUN) dvc commit --force testbed

# Retrain LearnPruner's module on the model there is: about two minutes on two cores. git has the weights there were.
pruner: $(READY)
	rm -f models/pruner/lpm.safetensors
	$(RUN) dvc repro --force --single-item pruner

# Time methods on this machine: data/profile.csv, which the report shows. Without the memory profiler's own log.
profile: $(READY)
	$(RUN) KINETO_LOG_LEVEL=5 python -m stages.profile
	$(RUN) dvc commit --force profile

# Race the sweep's trials on growing slices, then search hyper-parameters: data/search, which the report shows.
search: $(READY)
	$(RUN) python -m stages.search
	$(RUN) dvc commit --force search

# Put experiments/$(PRESET).yaml into params.yaml and run it; README says where its tables belong.
experiment: $(READY)
	$(RUN) python -m stages.experiment "$(PRESET)"
	$(RUN) dvc repro

# Small units of the result store in fewer files; those that were replaced go when that is a day old.
compact: $(READY)
	$(RUN) python -m stages.compact

# Cached features and results, not the environment.
clean:
	rm -rf cache
