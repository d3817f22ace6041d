# The goal of the deployment bundle; included by the Makefile.
BUNDLE_TARGET     := $(if $(filter-out all,$(TARGET)),$(TARGET),jetson-agx-orin)
BUNDLE_OUT        := $(BUILD)/bundle/$(BUNDLE_TARGET)
BATCH             ?= # 1; for Triton that of its repository, as in 1:4:8
BUNDLE_PRECISIONS ?= $(if $(filter-out fp32,$(PRECISION)),$(PRECISION),fp16$(comma)fp32)
# A Jetson's library too, where this machine can compile it; the device compiles its own otherwise.
BUNDLE_MACHINES   := $(shell uname -m)$(if $(shell command -v aarch64-linux-gnu-g++),$(comma)aarch64)

.PHONY: bundle

bundle: $(STAMP) ## Pack what a device needs to build, check and time its own engine (TARGET=jetson-agx-orin)
	@test -f $(ONNX) || $(MAKE) --no-print-directory export
	@missing=$$($(BIN)/python -m fna.engines.bundle.chips $(BUNDLE_TARGET) --table $(PLUGIN_TABLE) --machines $(BUNDLE_MACHINES)) \
	    || exit $$?; \
	echo "$$missing" | while read -r machine chips; do \
	    test -z "$$machine" || $(MAKE) --no-print-directory plugin ARCH=$$machine SM=$$chips || exit $$?; \
	done
	@mkdir -p $(dir $(BUNDLE_OUT))
	$(BIN)/fna bundle $(ONNX) -o $(BUNDLE_OUT) --target $(BUNDLE_TARGET) --precision $(BUNDLE_PRECISIONS) $(call given,BATCH,--batch )
	@echo "copy $(BUNDLE_OUT) to the device and run ./check.sh there"
