# Everything a user runs: make setup | demo | test | check. Only git, make and Python >= 3.11 with venv and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The pip-installed uv is pinned like any other tool; the lock has a hash for every package.
UV := $(VENV)/uv/bin/uv
UV_VERSION := 0.13.9
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-s3 check bench-methods bench-kuairand bench-speed bench-ingest bench-log bench-state lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -m venv $(VENV)/uv
	$(VENV)/uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip sync --python $(BIN)/python --compile-bytecode --require-hashes requirements.lock
	$(UV) pip install --python $(BIN)/python --no-deps --editable .
	touch $@

demo: $(STAMP)
	$(BIN)/esrl demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# The step log in an S3 store: moto's server in an environment of its own, it would pull 30 packages into the lock.
test-s3: $(STAMP)
	test -x $(VENV)/moto/bin/python || $(UV) venv --quiet --python $(BIN)/python $(VENV)/moto
	$(UV) pip install --quiet --python $(VENV)/moto/bin/python moto==5.2.5 boto3 flask flask-cors
	ESRL_S3_SERVER=$(abspath $(VENV))/moto/bin/python $(BIN)/python -m pytest tests/integration/test_object_store.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-methods: $(STAMP)
	$(BIN)/python -m benchmarks.methods $(ARGS)

bench-kuairand: $(STAMP)
	$(BIN)/python -m benchmarks.kuairand $(ARGS)

bench-speed: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed $(ARGS)

bench-ingest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ingest $(ARGS)

bench-log: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.log $(ARGS)

bench-state: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.state $(ARGS)

lock:
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) runs
