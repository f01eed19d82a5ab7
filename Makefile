# Two commands do everything on a machine with Python 3.11, git and a C compiler: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # else each lane compiles and rewrites all tests anew
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
LANES ?= 4
ALL_RESULTS ?= benchmarks/results/test-all.jsonl
GPU_PYTHON ?= python3
GPU_LANES ?= 4
GPU_TESTS := tests/gpu tests/space/test_noise.py tests/space/test_basis.py tests/api/test_synchronisations.py \
	tests/elastic/memory/test_download.py tests/training/building/test_placement.py
CHAOS_EVENTS ?= 200
CHAOS_RESULTS ?= benchmarks/results/chaos.jsonl
.PHONY: manifest help install quickstart elastic-quickstart test test-fast test-all chaos lint format study bench bench-elastic test-gpu bench-gpu gpu-wheels test-next-torch test-next-transformers schema docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# Peers in tests and benchmarks; their metadata asks for torchvision, which they do not need here.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		pyhessian curvlinops-for-pytorch backpack-for-pytorch
	touch $@

install: $(INSTALLED)  ## make .venv and install the package with all that tests and jobs need

quickstart: $(INSTALLED)  ## train a small Llama on Python's standard library: SAM, FSDP2, two workers, about 3 minutes
	$(BIN)/elastic-lsopt train configs/quickstart.yaml

elastic-quickstart: $(INSTALLED)  ## workers that may die and come back: kill -9 one meanwhile; about a minute
	$(BIN)/elastic-lsopt train configs/elastic-quickstart.yaml

test: $(INSTALLED)  ## all laws and contracts; twelve minutes on two cores
	$(BIN)/python -m pytest tests -n $(LANES) -m "not full"

test-fast: $(INSTALLED)  ## the minute before a commit
	$(BIN)/python -m pytest tests -n 2 -m "fast and not full and not long"

test-all: $(INSTALLED)  ## the full product of methods, backends, worlds and settings; goes on where it was stopped
	$(BIN)/python -m pytest tests -n $(LANES) --results $(ALL_RESULTS)

manifest: $(INSTALLED)  ## write what the suite covers into tests/manifest.txt
	$(BIN)/python -m tests.manifest

chaos: $(INSTALLED)  ## kill, stop, drain and add nodes, 200 events a backend; goes on where it was stopped
	for backend in fsdp2 zero2 zero3; do \
		$(BIN)/python -m tests.chaos.driver --backend $$backend --events $(CHAOS_EVENTS) --results $(CHAOS_RESULTS) || exit 1; \
	done

lint: $(INSTALLED)  ## ruff, pyright, import-linter, no rebinding of .data
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	@! grep -rnE "\.data *= " elastic_lsopt --include='*.py' || { echo "never rebind .data: FSDP2 ignores it silently"; exit 1; }

format: $(INSTALLED)  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

study: $(INSTALLED)  ## which flatness measure goes with generalisation: 128 small networks, ranked; 10 minutes
	$(BIN)/elastic-lsopt study configs/study-digits.yaml

bench: $(INSTALLED)  ## measure against the peers; writes benchmarks/results
	$(BIN)/python -m benchmarks.run

bench-elastic: $(INSTALLED)  ## seconds from a kill or a join to the next step, beside stock torchrun
	$(BIN)/python -m benchmarks.run elastic elastic_layer membership_simulation

test-gpu:  ## laws and contracts on a CUDA device, by the Python that is there: about 8 minutes
	TESTS_ON=$${TESTS_ON:-cuda} $(GPU_PYTHON) -m pytest -n $(GPU_LANES) -m gpu $(GPU_TESTS)

bench-gpu:  ## steps, noise, products and host versions on a CUDA device; writes benchmarks/results
	$(GPU_PYTHON) -m benchmarks.run device noise

gpu-wheels:  ## what a machine with torch >= 2.11 for CUDA and no network lacks, for Python 3.12: the folder wheels
	launch/gpu_wheels wheels

test-next-torch:  ## the fabric's newest path, in an environment of its own: torch 2.14 with CUDA is 5.6 GB
	test -x .venv-next/bin/python || $(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --quiet "torch>=2.14" && .venv-next/bin/python -m pip install --quiet -e '.[test]'
	.venv-next/bin/python -m pytest tests/backends/test_fabric.py tests/elastic/memory/test_reshard.py -m "not full"

test-next-transformers:  ## folders read and written in shards, by the transformers after the tested one
	test -x .venv-next-transformers/bin/python || $(PYTHON) -m venv .venv-next-transformers
	.venv-next-transformers/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-next-transformers/bin/python -m pip install --quiet -e '.[test]' 'transformers>=5.24'
	.venv-next-transformers/bin/python -m pytest tests/checkpoint tests/training/building -m "not full"

schema: $(INSTALLED)  ## write the JSON schema of a job's YAML, and the references of keys, measures and commands
	$(BIN)/python -m elastic_lsopt.config.pages.schema
	$(BIN)/python -m elastic_lsopt.config.pages.reference
	$(BIN)/python -m elastic_lsopt.cli.reference
	$(BIN)/python -m elastic_lsopt.probes.reference

docs: $(INSTALLED)  ## the documentation as a site, in build/site; a link that leads nowhere ends it
	@# Not --quiet, which hides the warnings from `strict: true` too.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:  ## remove the virtual environment and what runs left here
	rm -rf $(VENV) runs build *.egg-info
