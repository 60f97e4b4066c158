.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint figures

PYTHON ?= python3
BIN := .venv/bin
# in random order; the tests of a file share what they build, so that one worker runs them all
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[plot,space,dev]'
	touch $@

demo: .venv/installed ## certify 200 real test images with the model that ships
	HF_HUB_OFFLINE=1 $(BIN)/hf-smoothing demo

test: .venv/installed ## run the tests (under 10 minutes on two cores)
	$(PYTEST) --durations 10 -m 'not slow'

test-slow: .venv/installed ## run the slow tests too
	$(PYTEST)

lint: .venv/installed ## ruff, mypy, and whether every figure in the text is the measured one
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/update_figures.py --check
	HF_HUB_OFFLINE=1 $(BIN)/hf-smoothing card --check model_cards/*/

figures: .venv/installed ## write the measured figures into README and cards, and complete the model folders
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/update_figures.py
	HF_HUB_OFFLINE=1 $(BIN)/hf-smoothing card model_cards/*/
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/link_remote_code.py
