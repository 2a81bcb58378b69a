# Two commands: `make quickstart` trains on real photographs, `make test` runs the tests. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
# DeepSpeed looks for ninja and itself on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart test lint clean

quickstart: .venv/ready data/elpv/train
	"$(BIN)/python" "$(BIN)/deepspeed" launch.py --config quickstart

test: .venv/ready
	"$(BIN)/python" -m pytest -q -n 2 --dist worksteal

lint: .venv/ready
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

# setuptools and wheel are there first because DeepSpeed is built from source; no CUDA compiler is needed.
# setuptools warns that an editable install finds packages by name; that is what is wanted here.
.venv/ready: pyproject.toml
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv .venv
	"$(BIN)/python" -m pip install --quiet --upgrade pip setuptools wheel
	PYTHONWARNINGS=ignore "$(BIN)/python" -m pip install --quiet --editable ".[demo,dev]"
	touch $@

data/elpv/train: | .venv/ready
	"$(BIN)/fastmim" data elpv --out data/elpv

clean:
	rm -rf .venv build *.egg-info
