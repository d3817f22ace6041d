#include "common/fields.hpp"

#include <cstring>

namespace fna
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr int32_t kLongestText = 64;

// The one field `name` of a type, with data; in `match` where it is found.
FieldStatus find(PluginFieldCollection const* fields, char const* name, PluginFieldType type, PluginField const*& match)
{
    if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr))
    {
        logError("the plugin's fields are null, but a field collection is needed");
        return FieldStatus::kBad;
    }
    match = nullptr;
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
    int32_t const most = type == PluginFieldType::kCHAR ? kLongestText : 1;
    if (match->length < 1 || match->length > most)
    {
        logError("field ", name, " has ", match->length, " values, but ", most == 1 ? "exactly " : "1 to ", most, most == 1 ? " is" : " are",
            " needed");
        return FieldStatus::kBad;
    }
    if (match->data == nullptr)
    {
        logError("field ", name, " has no data, but one value is needed");
        return FieldStatus::kBad;
    }
    return FieldStatus::kFound;
}

template <typename Number>
FieldStatus readNumber(PluginFieldCollection const* fields, char const* name, Number& value)
{
    PluginField const* match = nullptr;
    FieldStatus const status = find(fields, name, fieldType(value), match);
    if (status == FieldStatus::kFound)
    {
        std::memcpy(&value, match->data, sizeof value);
    }
    return status;
}

} // namespace

FieldStatus readField(PluginFieldCollection const* fields, char const* name, int32_t& value) noexcept
{
    return readNumber(fields, name, value);
}

FieldStatus readField(PluginFieldCollection const* fields, char const* name, float& value) noexcept
{
    return readNumber(fields, name, value);
}

// Some hosts count the zero that ends a text, others do not.
FieldStatus readField(PluginFieldCollection const* fields, char const* name, std::string& value) noexcept
{
    PluginField const* match = nullptr;
    FieldStatus const status = find(fields, name, PluginFieldType::kCHAR, match);
    if (status == FieldStatus::kFound)
    {
        char const* const text = static_cast<char const*>(match->data);
        value.assign(text, strnlen(text, static_cast<size_t>(match->length)));
    }
    return status;
}

} // namespace fna
