#include "common/fields.hpp"

#include <cstring>

namespace fna
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

template <typename Value>
FieldStatus read(PluginFieldCollection const* fields, char const* name, Value& value)
{
    PluginFieldType const type = fieldType(value);
    if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr))
    {
        logError("the plugin's fields are null, but a field collection is needed");
        return FieldStatus::kBad;
    }
    PluginField const* match = nullptr;
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        PluginField const& field = fields->fields[i];
        if (field.name == nullptr || std::strcmp(field.name, name) != 0)
        {
            continue;
        }
        if (match != nullptr)
        {
            logError("field ", name, " is given more than once, but it is needed once");
            return FieldStatus::kBad;
        }
        match = &field;
    }
    if (match == nullptr)
    {
        return FieldStatus::kMissing;
    }
    if (match->type != type)
    {
        logError("field ", name, " has type ", static_cast<int32_t>(match->type), ", but ", typeName(type), " (",
            static_cast<int32_t>(type), ") is needed");
        return FieldStatus::kBad;
    }
    if (match->length != 1)
    {
        logError("field ", name, " has ", match->length, " values, but exactly 1 is needed");
        return FieldStatus::kBad;
    }
    if (match->data == nullptr)
    {
        logError("field ", name, " has no data, but one value is needed");
        return FieldStatus::kBad;
    }
    std::memcpy(&value, match->data, sizeof value);
    return FieldStatus::kFound;
}

} // namespace

FieldStatus readField(PluginFieldCollection const* fields, char const* name, int32_t& value) noexcept
{
    return read(fields, name, value);
}

FieldStatus readField(PluginFieldCollection const* fields, char const* name, float& value) noexcept
{
    return read(fields, name, value);
}

} // namespace fna
