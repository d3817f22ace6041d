# `make` prints the goals. Each goal does its own set-up when it is missing; everything built lands in build/.
.DEFAULT_GOAL := help

PYTHON     ?= python3.11
MODEL      ?= dinov2-small-saliency
LANDMARKS  ?= 128
# Those that are empty are left to the commands' own defaults, which fna export --help and fna build --help tell.
RESOLUTION ?=
LAYERS     ?=
SAMPLER    ?=
METHOD     ?=
TARGET     ?=
PRECISION  ?=
CHECKS     ?= --bisect --task --bench quick
BUILD      ?= build
PLAN       ?=

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
comma  := ,
# $(call given,VARIABLE,WORD): the word and the variable's value, or nothing where that is empty.
given   = $(if $($1),$2$($1))
SETTINGS := $(call given,RESOLUTION,-)$(call given,LAYERS,-layers)$(call given,LANDMARKS,-s)$(call given,SAMPLER,-)$(call given,METHOD,-)
NAME   := $(notdir $(subst :,-,$(MODEL)))$(if $(PLAN),-$(basename $(notdir $(PLAN))),$(subst $(comma),+,$(SETTINGS)))$(call given,PRECISION,-)
HOW    := $(if $(PLAN),--plan $(PLAN),$(call given,RESOLUTION,--resolution ) $(call given,LAYERS,--layers ) \
          $(call given,LANDMARKS,--landmarks ) $(call given,SAMPLER,--sampler ) $(call given,METHOD,--method ))
ONNX   := $(BUILD)/$(NAME).onnx
ENGINE := $(BUILD)/$(NAME).engine

.PHONY: help setup plan export engine validate bench test lint clean

help: ## Print the goals and the build folder's layout
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: MODEL=$(MODEL) RESOLUTION=$(RESOLUTION) LANDMARKS=$(LANDMARKS) LAYERS=$(LAYERS)"
	@echo "             SAMPLER=$(SAMPLER) METHOD=$(METHOD) TARGET=$(TARGET) PRECISION=$(PRECISION)"
	@echo "             empty: as the commands have it by default, see fna export --help and fna build --help"
	@echo "             PLAN=$(PLAN), a plan file instead of RESOLUTION, LANDMARKS, LAYERS, SAMPLER and METHOD"
	@echo "  Results:   $(ONNX)"
	@echo "                 the model with FNA nodes; other settings, another file name"
	@echo "             $(ENGINE)"
	@echo "                 the TensorRT-RTX engine; its manifest lies beside it as .engine.json"
	@echo "             $(BUILD)/validate/  report.html, its numbers as JSON, saliency overlay as PNG; CHECKS= for the budget alone"
	@echo "             $(BUILD)/bench/     dense against FNA, as JSON, CSV and a plot"
	@echo "             $(BUILD)/bundle/    what goes to a device, a folder for each TARGET"

setup: $(STAMP) ## Make .venv and install everything, versions pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV): the packages of constraints.txt, once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[rtx,kernels,dev]'
	@rm -rf fna.egg-info  # it would hide the installed entry points from a Python started here
	@touch $@

plan: $(STAMP) ## Choose blocks, heads and landmarks: build/plan.json, for make export PLAN=build/plan.json
	@mkdir -p $(BUILD)
	$(BIN)/fna plan $(MODEL) -o $(BUILD)/plan.json $(call given,RESOLUTION,--resolution ) --plot $(BUILD)/pareto.png

export: $(STAMP) ## Write the ONNX file with FNA
	@mkdir -p $(BUILD)
	$(BIN)/fna export $(MODEL) -o $(ONNX) $(strip $(HOW) $(call given,PRECISION,--precision ))

engine: $(STAMP) ## Build a TensorRT-RTX engine from it; needs no GPU
	@test -f $(ONNX) || $(MAKE) --no-print-directory export
	$(BIN)/fna build $(ONNX) -o $(ENGINE) --backend tensorrt-rtx $(call given,TARGET,--target )

validate: $(STAMP) ## Measure how far the result is from PyTorch, step by step
	@test -f $(ONNX) || $(MAKE) --no-print-directory export
	$(BIN)/fna validate $(if $(wildcard $(ENGINE)),$(ENGINE),$(ONNX)) --output $(BUILD)/validate $(CHECKS) \
	    --report $(BUILD)/validate/report.html

bench: $(STAMP) ## Time dense against FNA on this machine
	@mkdir -p $(BUILD)/bench
	$(BIN)/fna bench $(MODEL) --backend onnxruntime --layers all --landmarks 64 --resolution 518 --resolution 1022 \
	    --json $(BUILD)/bench/onnxruntime.json --csv $(BUILD)/bench/onnxruntime.csv --plot $(BUILD)/bench/onnxruntime.svg

test: $(STAMP) lint ## Run lint and all tests
	@tests/install_programs.sh
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # two workers share two cores

lint: $(STAMP) ## Check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf $(BUILD)/typecheck && mkdir -p $(BUILD)/typecheck/fna
	@ln -s $(CURDIR)/fna/* $(BUILD)/typecheck/fna/
	@for part in export plugins engines validate; do ln -s $(CURDIR)/$$part $(BUILD)/typecheck/fna/$$part; done
	$(BIN)/mypy

clean: ## Remove build/
	rm -rf $(BUILD)

-include plugins/plugin.mk engines/bundle/bundle.mk
