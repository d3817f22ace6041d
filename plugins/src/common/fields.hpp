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

// The field `name` of exactly one int32 or float, or of a text. Wrong type, wrong length, null data and duplicates are bad.
FieldStatus readField(nvinfer1::PluginFieldCollection const* fields, char const* name, int32_t& value) noexcept;
FieldStatus readField(nvinfer1::PluginFieldCollection const* fields, char const* name, float& value) noexcept;
FieldStatus readField(nvinfer1::PluginFieldCollection const* fields, char const* name, std::string& value) noexcept;

inline nvinfer1::PluginFieldType fieldType(int32_t) noexcept
{
    return nvinfer1::PluginFieldType::kINT32;
}

inline nvinfer1::PluginFieldType fieldType(float) noexcept
{
    return nvinfer1::PluginFieldType::kFLOAT32;
}

inline nvinfer1::PluginFieldType fieldType(std::string const&) noexcept
{
    return nvinfer1::PluginFieldType::kCHAR;
}

inline char const* typeName(nvinfer1::PluginFieldType type) noexcept
{
    return type == nvinfer1::PluginFieldType::kINT32 ? "kINT32"
        : type == nvinfer1::PluginFieldType::kCHAR   ? "kCHAR"
                                                     : "kFLOAT32";
}

template <typename Value>
nvinfer1::PluginField describeField(char const* name, Value const& value)
{
    return nvinfer1::PluginField{name, &value, fieldType(value), 1};
}

inline nvinfer1::PluginField describeField(char const* name, std::string const& value)
{
    return nvinfer1::PluginField{
        name, value.data(), nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size())};
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
        fields.push_back(describeField(field, value));
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
