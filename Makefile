# `make` prints the goals. Each goal does its own set-up when it is missing; everything built lands in build/.
.DEFAULT_GOAL := help

PYTHON     ?= python3.11
MODEL      ?= dinov2-small-saliency
RESOLUTION ?= 518
LANDMARKS  ?= 128
LAYERS     ?= 6-11
SAMPLER    ?= grid
METHOD     ?= weighted
TARGET     ?= all
PRECISION  ?= fp32
CHECKS     ?= --bisect --task --bench quick
BUILD      ?= build
PLAN       ?=

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
comma  := ,
NAME   := $(notdir $(subst :,-,$(MODEL)))-$(RESOLUTION)-layers$(subst $(comma),+,$(LAYERS))-s$(LANDMARKS)-$(SAMPLER)-$(METHOD)-$(PRECISION)
ifneq ($(PLAN),)
NAME   := $(notdir $(subst :,-,$(MODEL)))-$(basename $(notdir $(PLAN)))-$(PRECISION)
endif
HOW    := $(if $(PLAN),--plan $(PLAN),--resolution $(RESOLUTION) --layers $(LAYERS) --landmarks $(LANDMARKS) --sampler $(SAMPLER) --method $(METHOD))
ONNX   := $(BUILD)/$(NAME).onnx
ENGINE := $(BUILD)/$(NAME).engine

.PHONY: help setup plan export engine validate bench test lint clean

help: ## Print the goals and the build folder's layout
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: MODEL=$(MODEL) RESOLUTION=$(RESOLUTION) LANDMARKS=$(LANDMARKS) LAYERS=$(LAYERS)"
	@echo "             SAMPLER=$(SAMPLER) METHOD=$(METHOD) TARGET=$(TARGET) PRECISION=$(PRECISION)"
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
	$(BIN)/fna plan $(MODEL) -o $(BUILD)/plan.json --resolution $(RESOLUTION) --plot $(BUILD)/pareto.png

export: $(STAMP) ## Write the ONNX file with FNA
	@mkdir -p $(BUILD)
	$(BIN)/fna export $(MODEL) -o $(ONNX) $(HOW) --precision $(PRECISION)

engine: $(STAMP) ## Build a TensorRT-RTX engine from it; needs no GPU
	@test -f $(ONNX) || $(MAKE) --no-print-directory export
	$(BIN)/fna build $(ONNX) -o $(ENGINE) --backend tensorrt-rtx --target $(TARGET)

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # two workers share two cores

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
