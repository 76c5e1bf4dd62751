# Everything runs in an environment made here. Variables, for example `make test VENV=/tmp/venv`:
#   VENV     where the environment lives                                    (.venv)
#   PYTHON   which Python makes it                                          (python3)
#   TORCH    what pip is asked for when the environment has no torch yet    (torch==2.13.0 and the Triton made for it)
#            its CPU build: TORCH="torch==2.13.0 triton==3.7.1 --extra-index-url https://download.pytorch.org/whl/cpu"
#   PROFILE  quick or full: which demo                                      (quick)
#   SEED     of the demo, whose run is then runs/demo-SEED                  (0, runs/demo)
#   PORT     where the server of `make play` listens                        (8765)
#   BENCH    arguments of the benchmark, for example BENCH="--case 7x3"      (none)
#   VIDEOS   a folder of video files for wan-smoke                          (some are made)
#   WHEELS   arguments of .ci/wheels.py                                      (none)
#   JOBS     test processes                                                 (one per core, at most 8)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0 $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
PROFILE ?= quick
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo play test test-all wan-smoke lint format bench docs wheels clean
BIN := $(VENV)/bin
STAMP := $(VENV)/.aadkern-installed
LOG := $(VENV)/install.log

# One line per download, so that a slow network is seen to move; everything else goes to the log.
PIP_INSTALL = install() { \
    "$(BIN)/python" -m pip install --disable-pip-version-check --progress-bar off "$$@" 2>&1 | tee -a "$(LOG)" \
      | awk '/^ *Downloading / && !/\.metadata/ {printf "  %s %s %s\n", $$2, $$3, $$4; fflush()}' \
    || { tail -n 25 "$(LOG)" >&2; echo "Installation failed; the whole log is in $(LOG)" >&2; exit 1; }; }

# Two processes: Triton decides on import whether it interprets, and the compile tests need it not to. Both always run.
# One thread each: with more threads than cores they wait for one another.
RUN_TESTS = run() { OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n $(JOBS) "$$@"; }; status=0; \
    TRITON_INTERPRET=1 run tests/interpreter $(1) || status=$$?; run tests --ignore=tests/interpreter $(1) || status=$$?; \
    exit $$status

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

env: $(STAMP)  ## make the environment (the other targets do it by themselves)

# What is built; the host model and the checks of primitives are the tests' own.
BUILT_FROM := $(shell find csrc -type f -not -path '*/model_entries/*' -not -path '*/primitives/model/*' -not -path '*/primitive_checks/*')

$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(BUILT_FROM)
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here; name a Python 3.10 or later: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "aadkern needs Python 3.10 or later, and\
	 $(PYTHON) is $$("$(PYTHON)" -V); name another: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks its venv module (on Debian and Ubuntu:\
	 apt install python3-venv)" >&2; exit 1; }
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	@: > "$(LOG)"
	@$(PIP_INSTALL); "$(BIN)/python" -c 'import torch' 2>/dev/null || { echo "[1/2] $(TORCH)"; install $(TORCH); }
	@$(PIP_INSTALL); echo "[2/2] aadkern and what its training, benchmarks and tests need"; install -c constraints.txt -e '.[train,bench,dev]'
	@"$(BIN)/python" -m aadkern._build
	@touch "$@"

demo: $(STAMP)  ## train the three stages on moving digits, stream, write runs/demo/report.html (PROFILE=quick|full SEED=n)
	@"$(BIN)/aad" demo profile=$(PROFILE) $(if $(SEED),seed=$(SEED) out=runs/demo-$(SEED))

# The report is what a demo writes last: without it there is none, or one that goes on.
RUN := runs/demo$(if $(SEED),-$(SEED))
play: $(STAMP)  ## steer the demo's digit in a browser, after the demo if there is none yet (PORT=8765, SEED=n as for demo)
	@test -f "$(RUN)/report.html" || $(MAKE) --no-print-directory demo
	@"$(BIN)/aad" serve --checkpoint "$(RUN)" $(if $(PORT),--port $(PORT))

test: $(STAMP)  ## all tests but the slow ones
	@$(call RUN_TESTS,-m "not slow")

test-all: $(STAMP)  ## all tests
	@$(call RUN_TESTS)

wan-smoke: $(STAMP)  ## the path of a real Wan with tiny random networks, to runs/wan-smoke (VIDEOS=FOLDER: of your own files)
	@"$(BIN)/python" -m tests.stages.wan_smoke $(if $(VIDEOS),"$(VIDEOS)")

lint: $(STAMP)  ## ruff, and mypy on aadkern
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

format: $(STAMP)  ## rewrite the sources as ruff wants them
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

bench: $(STAMP)  ## attention beside its rivals, each timed behind a passing check (BENCH="--case 7x3 --out FILE")
	@"$(BIN)/python" -m benchmarks.run $(BENCH)

docs: $(STAMP)  ## the site, to build/docs/index.html, with every link within the site checked
	@"$(BIN)/python" -c 'import sphinx, myst_parser, furo' 2>/dev/null || { $(PIP_INSTALL); install -c constraints.txt -e '.[docs]'; }
	@"$(BIN)/python" -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

wheels: $(STAMP)  ## build, audit and try out the packages, into dist/ (WHEELS="--pair python3.12 2.13.0")
	@"$(BIN)/python" .ci/wheels.py $(WHEELS)

clean:  ## remove .venv, builds and caches; runs/ stays, and so does an environment that VENV= names
	rm -rf .venv build dist *.egg-info aadkern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
