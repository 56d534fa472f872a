# make run    the main job on the built-in data and the embedded model        make test   the whole test suite
# Both create .venv first and install into it what requirements.lock pins; a second call finds that done.
# make run ARGS="seed=1 lora.rank=8" OUT=runs/other      overrides of the config, and another output folder
# make PYTHON=python3.12 ...                             another interpreter for .venv (3.11 or newer)
# make INSTALLER=pip ...                                 pip instead of uv, which takes minutes instead of seconds
# make cluster-test                                      a cluster of two nodes on this machine: a sweep as a job, one node dies
# make sbom                                              what is installed, as a CycloneDX list: sbom.json
# make release                                           the source archive with that list in it, and the wheel: dist/
# make lock                                              the lock files anew, from the ranges of pyproject.toml

PYTHON ?= python3
INSTALLER ?= uv
OUT ?=
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.stamp

.PHONY: run test lint format setup lock bench clean cluster-test sbom release

run: $(STAMP)
	$(BIN)/raysim compare configs/quickstart.yaml $(if $(OUT),out=$(OUT)) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP)

bench: $(STAMP)
	$(BIN)/python benchmarks/round_time.py $(ARGS)
	$(BIN)/python benchmarks/generate.py $(ARGS)
	$(BIN)/python benchmarks/scale.py $(ARGS)

cluster-test: $(STAMP)
	$(BIN)/python -m tests.cluster_test

sbom: $(STAMP)
	$(BIN)/python -m tools.sbom $(ARGS)

release: sbom
	$(BIN)/python -m hatchling build -d dist

# Resolves the ranges of pyproject.toml anew; ARGS=--upgrade takes the newest versions that they allow.
lock: $(STAMP)
	$(BIN)/python -m tools.lock $(ARGS)

$(STAMP): requirements.lock $(wildcard tools/*.lock) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "raysim needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "setting up .venv with $$($(BIN)/python --version)"
	@INSTALLER=$(INSTALLER) $(BIN)/python -m tools.install
	@touch $(STAMP)

# The runs/ folder stays: results are the user's to remove.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find raysim tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
