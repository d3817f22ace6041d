// The two symbols that the library exports; IPluginRegistry::loadLibrary looks for them by name.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
