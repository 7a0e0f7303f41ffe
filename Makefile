# The verbs of this project; `make help` lists them. They need Python >= 3.10, make and pip alone.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# Seeds and seconds of each walk of `make chaos`.
SEEDS ?= 1 2 3
SECONDS ?= 300

# Where `make bench` has the libraries that it measures beside this one.
PEERS := .peers
# A Python for the peer that needs 3.12; without one it is left out.
NEWER ?= $(firstword $(foreach each,python3.13 python3.12,$(shell $(each) -c 'import sys; print(sys.executable)' 2>/dev/null)) $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python))

# Options for what a verb starts: make demo ARGS=--short, make test ARGS="tests/unit -k template".
ARGS ?=
PYTEST_ARGS ?= $(ARGS)

# These wait for other processes, most of the time, so two lanes are hardly slower than one; the others measure times.
IN_LANES := tests/contrib $(wildcard tests/integration/test_embedded_*.py) tests/integration/test_extras.py

# The heart: a lock that is wrong in one rare branch is a wrong lock, so tests pass through every branch of these.
HEART := $(foreach each,core/* postgres/* locks.py guards.py ownership.py spaces.py conf.py gates.py memory.py fencing.py ticks.py,concurrency_safe/$(each),)

# Where the system has it: whatever we start is interrupted when make itself is killed, -9 included.
TETHER := $(shell t='env --default-signal=INT setpriv --pdeathsig INT'; $$t true 2>/dev/null && echo $$t)

# A .venv without a working pip (half built, or its Python is gone) is built anew.
MADE := $(VENV)/.made
BROKEN := $(shell $(PY) -c 'import pip' 2>/dev/null || echo rebuild)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types bench chaos docs rebuild

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

venv: $(MADE) ## build .venv when it is missing or stale

demo: $(MADE) ## show the main job on real servers (ARGS=--short, ARGS=--serve)
	$(TETHER) $(PY) -m example.demo $(ARGS)

test: $(MADE) ## run the tests and check the coverage (ARGS="tests/unit -k key": those alone, unchecked)
	$(PY) -m tests.servers.fetch
ifneq ($(strip $(PYTEST_ARGS)),)
	$(TETHER) $(PY) -m pytest $(PYTEST_ARGS)
else
	$(PY) -m coverage erase
	$(TETHER) $(PY) -m coverage run -m pytest $(IN_LANES) -n 2 --dist loadfile
	$(TETHER) $(PY) -m coverage run -m pytest $(addprefix --ignore=,$(IN_LANES))
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report
	$(PY) -m coverage report --include='$(subst $(empty) ,,$(HEART))' --fail-under=100
endif

lint: $(MADE) ## check the code's style, its format and its layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

types: $(MADE) ## check the types: mypy for all the code, pyright for the public API
	$(PY) -m mypy
	$(PY) -m basedpyright --pythonpath $(PY)

bench: $(MADE) $(PEERS)/.made ## measure locks, hand-offs, imports and tasks, beside other libraries; write docs/benchmarks
	for part in uncontended handoff throughput imports celery_throughput dramatiq_throughput; do \
		$(TETHER) $(PY) -m benchmarks.$$part --docs docs/benchmarks $(ARGS) || exit 1; done

# What is measured beside us, one at a time, since some don't support every Python.
$(PEERS)/.made: constraints.txt Makefile
	rm -rf $(PEERS)
	for peer in django-pglock django-pgware sqlalchemy-dlock pals python-redis-lock celery-once celery-singleton matplotlib; do \
		$(PY) -m pip install --quiet --target $(PEERS)/libraries --constraint constraints.txt $$peer sqlalchemy || echo "without $$peer"; done
	$(PY) -m pip install --quiet --target $(PEERS)/predecessor --no-deps django-concurrency-safe==0.0.2
	$(if $(NEWER),$(NEWER) -m venv $(PEERS)/newer && $(PEERS)/newer/bin/python -m pip install --quiet --constraint constraints.txt postgresql-lock 'psycopg[binary]')
	touch $@

chaos: $(MADE) ## hurt workers, the network and the lock store; walk the state machine (SEEDS="1 2 3" SECONDS=300)
	$(PY) -m tests.servers.fetch
	for seed in $(SEEDS); do $(TETHER) $(PY) -m benchmarks.chaos --seed $$seed --seconds $(SECONDS) || exit 1; done
	for seed in $(SEEDS); do $(TETHER) $(PY) -m tests.contract.machine --seed $$seed --seconds $(SECONDS) || exit 1; done

docs: $(MADE) ## build the documentation (not built yet)
docs:
	@echo 'make $@: not built yet, so nothing was run' >&2; exit 1

$(MADE): pyproject.toml constraints.txt $(BROKEN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'make: $(PYTHON) is missing, or older than 3.10; name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'building $(VENV), which takes about a minute'
	@$(if $(BROKEN),$(PYTHON) -m venv --clear $(VENV) || { \
		echo 'make: $(PYTHON) has no venv; on Debian: apt-get install python3-venv' >&2; exit 1; })
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -m compileall -q concurrency_safe # as an installation that is not editable does
	@touch $@
