# Thin aliases of `llmkit <verb>`: `make help` explains each. Nothing here is needed to use llmkit without make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
export HF_HUB_DISABLE_TELEMETRY := 1
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: help setup setup-all tokenizer-toy check-toy inspect-toy check-report data-toy data-medium pretrain-toy sft-toy dpo-toy kto-toy rrhf-toy reward-toy grpo-toy hack-toy overfit-toy report-toy quantize-toy generate-toy export-toy push-toy pretrain-shakespeare-char adapt-lora clean-toy lint format test test-fast test-all
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-26s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/core  ## create .venv with what training needs (CPU build of PyTorch where there is no NVIDIA GPU)

setup-all: $(VENV)/all  ## everything else too: TRL, PEFT, lm-eval, DeepSpeed, the test tools

$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: llmkit needs 3.11 or newer, e.g. make PYTHON=python3.12 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
	  echo "setup: NVIDIA GPU found, PyTorch with CUDA from the default index"; index=""; \
	elif [ "$$(uname)" = Darwin ]; then \
	  echo "setup: macOS, PyTorch from the default index"; index=""; \
	elif $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=3)' 2>/dev/null; then \
	  echo "setup: no NVIDIA GPU, CPU build of PyTorch from $(CPU_INDEX)"; index="--extra-index-url $(CPU_INDEX)"; \
	else \
	  echo "setup: no NVIDIA GPU, but $(CPU_INDEX) does not answer: PyTorch from the default index"; index=""; \
	fi; $(PIP) $$index torch numpy
	@touch $@

$(VENV)/core: $(VENV)/torch pyproject.toml constraints.txt
	@echo "setup: llmkit and what training needs, into $(VENV)"
	@$(PIP) --editable '.[core]'
	@touch $@

$(VENV)/data: $(VENV)/core
	@echo "setup: what 'llmkit data' needs, into $(VENV)"
	@$(PIP) --editable '.[core,data]'
	@touch $@

$(VENV)/all: $(VENV)/core
	@echo "setup: everything, into $(VENV) (a few minutes)"
	@$(PIP) setuptools wheel ninja
	@if [ "$$(uname)" = Linux ]; then DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed; fi
	@$(PIP) --editable '.[all,dev]'
	@touch $@

check-toy: $(VENV)/core  ## every check of the toy recipe: data, tokenizer, model, loss, resume
	$(BIN)/llmkit check recipes/toy/pretrain.yaml

inspect-toy: $(VENV)/core  ## rows of the toy recipe as the model will see them: what is trained, what is masked
	$(BIN)/llmkit inspect recipes/toy/pretrain.yaml

check-report: $(VENV)/all  ## planted bugs x checks x result; README's table comes from it
	$(OFFLINE) $(BIN)/python tests/planted/report.py --write

tokenizer-toy: $(VENV)/core  ## train a tokenizer on the toy world, check it, and see how it uses its ids
	$(BIN)/llmkit tokenizer train recipes/toy/tokenizer.yaml

data-toy: $(VENV)/data  ## the toy world as token stores, with a report of everything that happened to it
	$(BIN)/llmkit data recipes/toy/data.yaml

data-medium: $(VENV)/data  ## a few hundred megabytes of Python: clean, deduplicate, tokenise
	$(BIN)/llmkit data recipes/medium/data_local.yaml --data_dir "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"

pretrain-toy: $(VENV)/core  ## train a GPT on the toy world: minutes on two CPU cores, known true entropy
	$(BIN)/llmkit pretrain recipes/toy/pretrain.yaml

sft-toy: $(VENV)/all runs/toy/pretrain/model  ## tune the toy model on instructions, then ask it 2,100 questions it never saw
	$(BIN)/llmkit sft recipes/toy/sft.yaml

overfit-toy: $(VENV)/all runs/toy/pretrain/model  ## before that: 1,000 answers must be learnt by heart
	$(BIN)/llmkit sft recipes/toy/sft.yaml --overfit 1000

dpo-toy: $(VENV)/all runs/toy/sft/model  ## tune the toy model on preference pairs: it learns to say that it does not know
	$(BIN)/llmkit dpo recipes/toy/dpo.yaml

kto-toy: $(VENV)/all runs/toy/sft/model  ## the same pairs torn apart: answers marked good or bad
	$(BIN)/llmkit kto recipes/toy/kto.yaml

rrhf-toy: $(VENV)/all runs/toy/sft/model  ## the same on ranked answers
	$(BIN)/llmkit rrhf recipes/toy/rrhf.yaml

reward-toy: $(VENV)/all runs/toy/sft/model  ## a reward model: which of two answers is better
	$(BIN)/llmkit reward recipes/toy/reward.yaml

grpo-toy: $(VENV)/all runs/toy/sft/model  ## reinforcement on sums, watched for reward hacking
	$(BIN)/llmkit grpo recipes/toy/grpo.yaml

hack-toy: $(VENV)/all runs/toy/dpo/model  ## from the DPO model, a reward that can be hacked: see the alarm
	$(BIN)/llmkit grpo recipes/toy/grpo_hackable.yaml

STAGES = $(shell for s in pretrain sft dpo kto rrhf grpo; do test -d runs/toy/$$s/model && echo runs/toy/$$s; done)
report-toy: $(VENV)/all runs/toy/pretrain/model runs/toy/sft/model  ## all stages of the toy model side by side: runs/toy/report.html
	$(OFFLINE) $(BIN)/llmkit eval recipes/toy/eval.yaml $(STAGES)
	$(BIN)/llmkit report runs/toy

runs/toy/pretrain/model:
	$(MAKE) pretrain-toy

runs/toy/sft/model:
	$(MAKE) sft-toy

runs/toy/dpo/model:
	$(MAKE) dpo-toy

quantize-toy: $(VENV)/all runs/toy/pretrain/model  ## the toy model in 8 and in 4 bit, and what each costs
	$(OFFLINE) $(BIN)/llmkit quantize recipes/toy/quantize_8bit.yaml
	$(OFFLINE) $(BIN)/llmkit quantize recipes/toy/quantize_4bit.yaml

generate-toy: $(VENV)/core  ## let the toy model write a document
	$(BIN)/llmkit generate --model_name_or_path runs/toy/pretrain

export-toy: $(VENV)/all runs/toy/pretrain/model  ## write the toy model as a plain Qwen3 folder, and as GGUF for llama.cpp and Ollama
	rm -rf runs/toy/export
	$(BIN)/llmkit export --model_name_or_path runs/toy/pretrain --output_dir runs/toy/export/qwen3 --to qwen3
	$(BIN)/llmkit export --model_name_or_path runs/toy/pretrain --output_dir runs/toy/export/gguf --to gguf

push-toy: $(VENV)/core runs/toy/pretrain/model  ## what publishing the toy model would send, and its card: nothing is sent
	$(BIN)/llmkit push recipes/toy/push.yaml

DATA_DIR ?= data
pretrain-shakespeare-char: $(VENV)/core  ## nanoGPT's classic; DATA_DIR=folder with tiny_shakespeare.txt
	$(BIN)/llmkit pretrain recipes/shakespeare-char/pretrain.yaml --data_dir $(DATA_DIR)

RECIPE ?= sft
adapt-lora: $(VENV)/all  ## LoRA on any causal LM: MODEL=path-or-id DATA=rows.jsonl [RECIPE=sft_qlora|dpo|grpo] [ARGS="--key value"]
	@test -n "$(MODEL)" -a -n "$(DATA)" || { echo "make adapt-lora MODEL=path-or-id DATA=rows.jsonl"; exit 2; }
	$(BIN)/llmkit $(firstword $(subst _, ,$(RECIPE))) recipes/adapt-lora/$(RECIPE).yaml --model_name_or_path "$(MODEL)" --datasets.0.data_files "$(DATA)" $(ARGS)

clean-toy:  ## forget the toy runs
	rm -rf runs/toy

lint: $(VENV)/all  ## ruff (lint and format), mypy, the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(OFFLINE) $(BIN)/python -m pytest tests/test_imports.py

format: $(VENV)/all  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-fast: $(VENV)/all  ## the tests that take no time, under 90 seconds
	$(OFFLINE) $(BIN)/python -m pytest -m "not slow and not medium"

test: $(VENV)/all  ## every test but the slow ones, under 10 minutes
	$(OFFLINE) $(BIN)/python -m pytest

test-all: $(VENV)/all  ## the slow ones too
	$(OFFLINE) $(BIN)/python -m pytest -m ""
