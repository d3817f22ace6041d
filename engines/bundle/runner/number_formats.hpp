// fp16, bf16 and integers from and to fp32.
#pragma once

#include "error.hpp"

#include <NvInferRuntime.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace runner
{

using nvinfer1::DataType;

inline float halfToFloat(uint16_t half)
{
    uint32_t const sign = (half & 0x8000U) << 16;
    uint32_t const exponent = (half >> 10) & 0x1FU;
    uint32_t const fraction = half & 0x3FFU;
    if (exponent == 0)
    {
        float const value = std::ldexp(static_cast<float>(fraction), -24);
        return sign != 0U ? -value : value;
    }
    uint32_t const bits = exponent == 0x1FU ? sign | 0x7F800000U | (fraction << 13) : sign | ((exponent + 112U) << 23) | (fraction << 13);
    float value = 0.F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest, ties to even; what is too large becomes infinite.
inline uint16_t floatToHalf(float value)
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    uint16_t const sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
    if (std::isnan(value))
    {
        return static_cast<uint16_t>(sign | 0x7E00U);
    }
    float const magnitude = std::fabs(value);
    if (magnitude >= 65520.F)
    {
        return static_cast<uint16_t>(sign | 0x7C00U);
    }
    if (magnitude < 6.103515625e-05F) // subnormal: multiples of 2^-24
    {
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
    }
    uint32_t const rounded = (bits & 0x7FFFFFFFU) + 0xFFFU + ((bits >> 13) & 1U);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded - (112U << 23)) >> 13));
}

inline float bfloatToFloat(uint16_t bfloat)
{
    uint32_t const bits = static_cast<uint32_t>(bfloat) << 16;
    float value = 0.F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t floatToBfloat(float value)
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value))
    {
        return static_cast<uint16_t>((bits >> 16) | 0x40U);
    }
    return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

inline int64_t elementBytes(DataType type)
{
    switch (type)
    {
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    case DataType::kINT64: return 8;
    default: break;
    }
    throw Error(kBadInput, "the engine has an input or output that is neither fp32, fp16, bf16, int32 nor int64");
}

template <typename Stored, typename Convert>
void store(std::vector<char>& bytes, std::vector<float> const& values, Convert convert)
{
    for (size_t i = 0; i < values.size(); ++i)
    {
        Stored const value = static_cast<Stored>(convert(values[i]));
        std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    }
}

inline std::vector<char> encode(std::vector<float> const& values, DataType type)
{
    std::vector<char> bytes(values.size() * static_cast<size_t>(elementBytes(type)));
    auto const same = [](float value) { return value; };
    switch (type)
    {
    case DataType::kFLOAT: store<float>(bytes, values, same); break;
    case DataType::kHALF: store<uint16_t>(bytes, values, floatToHalf); break;
    case DataType::kBF16: store<uint16_t>(bytes, values, floatToBfloat); break;
    case DataType::kINT32: store<int32_t>(bytes, values, same); break;
    default: store<int64_t>(bytes, values, same); break;
    }
    return bytes;
}

template <typename Stored, typename Convert>
void load(std::vector<float>& values, char const* bytes, Convert convert)
{
    for (size_t i = 0; i < values.size(); ++i)
    {
        Stored value{};
        std::memcpy(&value, bytes + i * sizeof value, sizeof value);
        values[i] = static_cast<float>(convert(value));
    }
}

inline std::vector<float> decode(std::vector<char> const& bytes, DataType type)
{
    std::vector<float> values(bytes.size() / static_cast<size_t>(elementBytes(type)));
    auto const same = [](auto value) { return value; };
    switch (type)
    {
    case DataType::kFLOAT: load<float>(values, bytes.data(), same); break;
    case DataType::kHALF: load<uint16_t>(values, bytes.data(), halfToFloat); break;
    case DataType::kBF16: load<uint16_t>(values, bytes.data(), bfloatToFloat); break;
    case DataType::kINT32: load<int32_t>(values, bytes.data(), same); break;
    default: load<int64_t>(values, bytes.data(), same); break;
    }
    return values;
}

inline std::string number(char const* format, double value)
{
    char text[64];
    std::snprintf(text, sizeof text, format, value);
    return text;
}

} // namespace runner
