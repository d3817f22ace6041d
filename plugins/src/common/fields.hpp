// Plugin fields, from the ONNX parser, from a serialized engine or from anyone's code. An operator's attributes list their fields
// once (`Attributes::fields`); reading, serializing, announcing and naming them in a text go through that list.
#pragma once

#include "common/logging.hpp"

#include <NvInferRuntime.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

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

constexpr nvinfer1::PluginFieldType fieldType(int32_t) noexcept
{
    return nvinfer1::PluginFieldType::kINT32;
}

constexpr nvinfer1::PluginFieldType fieldType(float) noexcept
{
    return nvinfer1::PluginFieldType::kFLOAT32;
}

constexpr char const* typeName(nvinfer1::PluginFieldType type) noexcept
{
    return type == nvinfer1::PluginFieldType::kINT32 ? "kINT32" : "kFLOAT32";
}

// Fill the attributes of operator `name`. False, and logged, where a field is bad or one that is needed is missing.
template <typename Attributes>
bool readFields(nvinfer1::PluginFieldCollection const* given, char const* name, Attributes& attributes)
{
    bool good = true;
    Attributes::fields(attributes, [&](char const* field, auto& value, bool needed) {
        FieldStatus const status = good ? readField(given, field, value) : FieldStatus::kBad;
        if (status == FieldStatus::kMissing && needed)
        {
            logError(name, " needs the field ", field, " (", typeName(fieldType(value)), "), which is missing");
        }
        good = status == FieldStatus::kFound || (status == FieldStatus::kMissing && !needed);
    });
    return good;
}

// The fields with the values that `attributes` holds, by address.
template <typename Attributes>
std::vector<nvinfer1::PluginField> describeFields(Attributes const& attributes)
{
    std::vector<nvinfer1::PluginField> fields;
    Attributes::fields(attributes, [&](char const* field, auto const& value, bool) {
        fields.emplace_back(field, &value, fieldType(value), 1);
    });
    return fields;
}

// "scale=0.125,iterations=6", with `between` for the comma.
template <typename Attributes>
std::string printFields(Attributes const& attributes, char const* between)
{
    std::ostringstream text;
    text.precision(9);
    char const* separator = "";
    Attributes::fields(attributes, [&](char const* field, auto const& value, bool) {
        text << separator << field << "=" << value;
        separator = between;
    });
    return text.str();
}

} // namespace fna
