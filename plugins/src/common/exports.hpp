// The symbols that the library exports. IPluginRegistry::loadLibrary looks for the first two by name; a host that wants to know
// whether the chip's own kernels run looks for the third.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" __attribute__((visibility("default"))) void fnaCountKernels(int32_t* compiled, int32_t* fromPtx);
