# Everything a checkout can do. It needs Python 3.11 or newer, make and bash, and keeps what it installs in .venv.

PYTHON ?= python3
NEWEST_PYTHON ?= $(shell bash scripts/newest_python.sh)
AOT_PYTHON ?= python3.12
COMPILERS ?= tpu cuda
ROWS ?= *
TRANSFORMERS ?= 5.24.0
PYTEST_ARGS ?=
# Of speculation, nearly all of whose time is compilation, two cases: they generate with and without drafts.
SPECULATION := tests/inference/test_speculative.py
NEWEST_TESTS := tests/kernels tests/layers tests/model $(filter-out $(SPECULATION),$(wildcard tests/inference/test_*.py)) \
  '$(SPECULATION)::test_tokens_of_unequal_prompts[glm4_moe-2]' '$(SPECULATION)::test_tokens_of_unequal_prompts[deepseek_v3-3]'
ORACLE_TESTS := tests/parity tests/evaluation tests/configs tests/checkpoint/test_convert.py \
  tests/checkpoint/test_families.py tests/cli/test_doctor_compare.py tests/text
VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help core dev demo test test-all test-newest test-oracle check bench aot clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
	  printf '  make %-11s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  PYTHON=python3.12       the Python that .venv is made with (3.11, 3.12, 3.13)"
	@echo "  PYTEST_ARGS='-k moe'    more arguments for pytest"
	@echo "  ROWS='air-*,kimi-*'     of make aot, by name; COMPILERS=tpu or cuda for one of both"

core:  ## install the package into .venv
	@bash scripts/environment.sh core "$(PYTHON)" "$(origin PYTHON)"

dev:  ## install the package and the tools of its developers into .venv
	@bash scripts/environment.sh dev "$(PYTHON)" "$(origin PYTHON)"

demo: core  ## show in a few minutes on a CPU what the package does
	@$(VENV_PYTHON) examples/demo.py

test: dev  ## run the tests, less the slow ones
	$(VENV_PYTHON) -m pytest -q -n 2 --dist loadfile --durations=20 $(PYTEST_ARGS) tests

test-all: dev  ## run all tests
	$(VENV_PYTHON) -m pytest -q -n 2 --dist loadfile -m "slow or not slow" $(PYTEST_ARGS) tests

test-newest:  ## run a part of the tests on the newest Python and jax, if that Python is at hand
	@if [ -z "$(NEWEST_PYTHON)" ]; then \
	  echo "Skipped: the tests on the newest jax need Python 3.13 or 3.12, and neither is at hand"; \
	else \
	  bash scripts/environment.sh newest "$(NEWEST_PYTHON)" "$(origin NEWEST_PYTHON)" && \
	  .venv-newest/bin/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS) $(NEWEST_TESTS); \
	fi

test-oracle: dev  ## run the comparisons with another transformers than the pinned one (TRANSFORMERS=5.24.0)
	$(VENV_PYTHON) -m pip install -q --no-deps --upgrade --target .venv-oracle transformers==$(TRANSFORMERS)
	PYTHONPATH=$(CURDIR)/.venv-oracle $(VENV_PYTHON) -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS) $(ORACLE_TESTS)

check: dev  ## lint, format, types and the conventions
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy glm_jax
	$(VENV_PYTHON) -m pytest -q tests/conventions

bench: dev  ## measure what a CPU can measure
	$(VENV_PYTHON) benchmarks/cpu.py

aot:  ## compile the models at real size for TPUs and GPUs that are not here, into docs/scale.md
	@set -e; for compiler in $(COMPILERS); do \
	  bash scripts/environment.sh aot-$$compiler "$(AOT_PYTHON)" "$(origin AOT_PYTHON)"; \
	  .venv-aot-$$compiler/bin/python benchmarks/aot.py --rows '$(ROWS)'; \
	done

clean:  ## remove the environments, build outputs and caches
	@echo "removing the environments, build outputs and caches"
	@rm -rf .venv .venv-newest .venv-oracle .venv-aot-tpu .venv-aot-cuda build dist *.egg-info .jax_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
