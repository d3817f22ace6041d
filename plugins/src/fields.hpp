// Reading plugin fields: one typed value each, from the ONNX parser, from a serialized engine or from anyone's code.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

namespace fna
{

enum class FieldStatus
{
    kFound,
    kMissing,
    kBad, // logged
};

// The field `name` of exactly one int32 or float. Wrong type, wrong length, null data and duplicates are bad.
FieldStatus readField(nvinfer1::PluginFieldCollection const* fields, char const* name, int32_t& value) noexcept;
FieldStatus readField(nvinfer1::PluginFieldCollection const* fields, char const* name, float& value) noexcept;

} // namespace fna
