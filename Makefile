# `make quickstart` trains on real photographs, `make test` runs the tests, `make bench` every benchmark at small
# settings. All set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
# DeepSpeed looks for ninja and itself on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart test lint bench bench-docs clean

quickstart: .venv/ready data/elpv/train
	"$(BIN)/python" "$(BIN)/deepspeed" launch.py --config quickstart

test: .venv/ready
	"$(BIN)/python" -m pytest -q -n 2 --dist worksteal

lint: .venv/ready
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

# Small settings, under 15 minutes on 2 cores: does every question have an answer? Rows go to runs/bench, so that the
# page's, from the commands of benchmarks/README.md, stay as they are.
BENCHMARKS := attention dataloading end_to_end memory scaling peers breakdown visible_only

.PHONY: kernels $(BENCHMARKS)

bench: kernels $(BENCHMARKS)

# The rows of the GPU's kernels have a page of their own; here is what the CPU computes in their place.
kernels: .venv/ready
	"$(BIN)/python" benchmarks/$@.py --cpu --dtypes float32 --rounds 5 --json runs/bench/$@.json

$(BENCHMARKS): .venv/ready data/elpv/train
	"$(BIN)/python" benchmarks/$@.py --json runs/bench/$@.json $($@_small)

attention_small := --rounds 3
dataloading_small := --images 64 --photographs 64 --rounds 1 --cores 1 --qualities 90
end_to_end_small := --recipe quickstart --data data/elpv/train --rounds 8 --steps 10
memory_small := --variants "ZeRO 0" "ZeRO 2" "ZeRO 3" --images 4
scaling_small := --stages 1 --rounds 3 --images 4
peers_small := --sizes small --modes eager --batch 4 --rounds 3 --warmup 1
breakdown_small := --sizes small --batch 4 --rounds 1
visible_only_small := --sizes base --ratios --batch 2 --rounds 1

bench-docs: .venv/ready
	"$(BIN)/python" benchmarks/docs.py

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
