# The goals of the TensorRT plugin; included by the Makefile.
ARCH ?= $(shell uname -m)
SM   ?= # every chip of plugins/table/chips.py

PLUGIN_TABLE := $(BUILD)/plugin
PLUGIN_OUT   := $(BUILD)/plugin/$(ARCH)
PLUGIN_CROSS := $(if $(filter $(ARCH),$(shell uname -m)),,-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/plugins/cmake/$(ARCH).cmake)

.PHONY: plugin test-gpu

plugin: $(STAMP) ## Compile the kernels for every chip, and the TensorRT plugin library (ARCH=aarch64 to cross-compile)
	$(BIN)/python -m fna.plugins.aot --output $(PLUGIN_TABLE) $(if $(SM),--sm $(SM))
	cmake -S plugins -B $(PLUGIN_OUT) -DFNA_TABLE_DIR=$(CURDIR)/$(PLUGIN_TABLE) -DFNA_PYTHON=$(CURDIR)/$(BIN)/python \
	    -DFNA_HEADER_CACHE=$(CURDIR)/$(BUILD)/headers -DFNA_BUILD_TESTS=ON $(PLUGIN_CROSS)
	cmake --build $(PLUGIN_OUT) --parallel 2
	@ls -l $(PLUGIN_OUT)/libfna_plugin.so $(PLUGIN_OUT)/libfna_plugin_register.so

test-gpu: $(STAMP) ## Check the kernels and the plugin on this machine's GPU, compute-sanitizer included
	$(MAKE) --no-print-directory plugin
	$(BIN)/python -m pytest -m gpu tests/plugins tests/engines
	$(BIN)/python -m fna.plugins.sanitize
