# The goals of the TensorRT plugin; included by the Makefile.
ARCH ?= $(shell uname -m)
SM   ?= # every chip of plugins/table/chips.py

PLUGIN_TABLE := $(BUILD)/plugin

.PHONY: plugin release test-gpu

plugin: $(STAMP) ## Compile the kernels for every chip, and the TensorRT plugin library (ARCH=aarch64 to cross-compile)
	$(BIN)/fna plugin -o $(PLUGIN_TABLE) --machine $(ARCH) $(call given,SM,--sm ) --checks

release: $(STAMP) ## Make the source distribution and wheels with kernels and libraries (build/dist)
	$(BIN)/fna plugin -o $(PLUGIN_TABLE) --machine x86_64,aarch64 $(call given,SM,--sm )
	$(BIN)/python -m fna.plugins.release . --table $(PLUGIN_TABLE) -o $(BUILD)/dist

test-gpu: $(STAMP) ## Check the kernels and the plugin on this machine's GPU, compute-sanitizer included
	$(MAKE) --no-print-directory plugin
	$(BIN)/python -m pytest -m gpu tests/plugins tests/engines
	$(BIN)/python -m fna.plugins.sanitize
