#include "fields.hpp"

#include "logging.hpp"

#include <cstring>

namespace fna
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

template <typename Value>
FieldStatus read(PluginFieldCollection const* fields, char const* name, PluginFieldType type, char const* typeName, Value& value)
{
    if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr))
    {
        logError("the plugin's fields are null, but a field collection is needed");
        return FieldStatus::kBad;
    }
    PluginField const* found = nullptr;
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        PluginField const& field = fields->fields[i];
        if (field.name == nullptr || std::strcmp(field.name, name) != 0)
        {
            continue;
        }
        if (found != nullptr)
        {
            logError("field ", name, " is given more than once, but it is needed once");
            return FieldStatus::kBad;
        }
        found = &field;
    }
    if (found == nullptr)
    {
        return FieldStatus::kMissing;
    }
    if (found->type != type)
    {
        logError("field ", name, " has type ", static_cast<int32_t>(found->type), ", but ", typeName, " (",
            static_cast<int32_t>(type), ") is needed");
        return FieldStatus::kBad;
    }
    if (found->length != 1)
    {
        logError("field ", name, " has ", found->length, " values, but exactly 1 is needed");
        return FieldStatus::kBad;
    }
    if (found->data == nullptr)
    {
        logError("field ", name, " has no data, but one value is needed");
        return FieldStatus::kBad;
    }
    std::memcpy(&value, found->data, sizeof value);
    return FieldStatus::kFound;
}

} // namespace

FieldStatus readField(PluginFieldCollection const* fields, char const* name, int32_t& value) noexcept
{
    return read(fields, name, PluginFieldType::kINT32, "kINT32", value);
}

FieldStatus readField(PluginFieldCollection const* fields, char const* name, float& value) noexcept
{
    return read(fields, name, PluginFieldType::kFLOAT32, "kFLOAT32", value);
}

} // namespace fna
