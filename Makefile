# `make train` and `make test` work from a bare clone with python3 and make, without root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENV ?= HalfCheetah-v4
STEPS ?= 500000
OUT ?= results/runs

.PHONY: train test slow lint clean

# The base install and the fast simulator; the stamp changes when a dependency does.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[envpool]'
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Its metadata ask for an older Gymnasium, with which nothing here runs; where there is no wheel its tests are skipped.
	-$(BIN)/pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps pybullet==3.2.7 bullet-safety-gym==1.4.0
	touch $@

# Train MDPO, compare its speed with SB3's PPO, and set it beside the committed runs of its peers.
train: $(VENV)/base
	$(BIN)/tether train MDPO --env $(ENV) --steps $(STEPS) --out $(OUT)
	$(BIN)/tether evaluate $(OUT)/$(ENV)/MDPO/seed-0
	$(BIN)/tether report $(OUT)/$(ENV)/MDPO/seed-0 results/measured --env $(ENV) --out $(OUT)/$(ENV)
	$(BIN)/tether bench on-policy --env $(ENV) --rounds 3 --only MDPO 'SB3 PPO, defaults'
	@echo
	@echo "Curves: $(BIN)/tensorboard --logdir $(OUT)   then open the address it prints."

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n auto

slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -n auto -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
