// Arrays in files: .npy, and raw fp32.
#pragma once

#include "number_formats.hpp"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace runner
{

struct Array
{
    std::vector<int64_t> shape; // empty for a raw file
    std::vector<float> values;
};

inline std::vector<char> readFile(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    if (!file)
    {
        throw Error(kBadInput, path + " cannot be read; is the path right?");
    }
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline void writeFile(std::string const& path, std::string const& content)
{
    std::ofstream file(path, std::ios::binary);
    file.write(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file.flush())
    {
        throw Error(kBadInput, path + " cannot be written; give a folder that exists and is writable");
    }
}

inline bool endsWith(std::string const& text, std::string const& end)
{
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

inline int64_t product(std::vector<int64_t> const& shape)
{
    int64_t count = 1;
    for (int64_t const side : shape)
    {
        if (side < 0 || (side != 0 && count > std::numeric_limits<int64_t>::max() / side))
        {
            throw Error(kBadInput, "a shape is negative or too large");
        }
        count *= side;
    }
    return count;
}

// The format: magic, version, header length, a Python dictionary as text, and the data.
inline Array readNpy(std::string const& path)
{
    std::vector<char> const bytes = readFile(path);
    auto const broken = [&path](char const* why) { return Error(kBadInput, path + " is no .npy file that can be used: " + why); };
    if (bytes.size() < 12 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0)
    {
        throw broken("it does not begin like one");
    }
    auto const byte = [&bytes](size_t at) { return static_cast<size_t>(static_cast<unsigned char>(bytes[at])); };
    bool const old = byte(6) == 1;
    size_t const start = old ? 10 : 12;
    size_t const length = old ? byte(8) | byte(9) << 8 : byte(8) | byte(9) << 8 | byte(10) << 16 | byte(11) << 24;
    if (length > bytes.size() - start)
    {
        throw broken("its header is cut off");
    }
    std::string const header(bytes.data() + start, length);
    if (header.find("'fortran_order': False") == std::string::npos)
    {
        throw broken("it is in Fortran order");
    }
    bool const half = header.find("'<f2'") != std::string::npos;
    if (!half && header.find("'<f4'") == std::string::npos)
    {
        throw broken("it is neither fp32 nor fp16, little-endian");
    }
    size_t const open = header.find("'shape': (");
    size_t const close = header.find(')', open);
    if (open == std::string::npos || close == std::string::npos)
    {
        throw broken("it gives no shape");
    }
    Array array;
    std::istringstream sides(header.substr(open + 10, close - open - 10));
    for (std::string side; std::getline(sides, side, ',');)
    {
        if (side.find_first_not_of(" ") != std::string::npos)
        {
            array.shape.push_back(std::strtoll(side.c_str(), nullptr, 10));
        }
    }
    size_t const size = half ? 2 : 4;
    size_t const count = static_cast<size_t>(product(array.shape));
    if (count > bytes.size() / size || bytes.size() - start - length != count * size)
    {
        throw broken("its data is not as long as its shape says");
    }
    array.values = decode({bytes.begin() + static_cast<int64_t>(start + length), bytes.end()}, half ? DataType::kHALF : DataType::kFLOAT);
    return array;
}

inline Array readArray(std::string const& path)
{
    if (endsWith(path, ".npy"))
    {
        return readNpy(path);
    }
    std::vector<char> const bytes = readFile(path);
    if (bytes.empty() || bytes.size() % 4 != 0)
    {
        throw Error(kBadInput, path + " is no raw fp32 file: it has " + std::to_string(bytes.size()) + " bytes");
    }
    return {{}, decode(bytes, DataType::kFLOAT)};
}

inline std::string shapeText(std::vector<int64_t> const& shape)
{
    std::string text;
    for (int64_t const side : shape)
    {
        text += (text.empty() ? "" : "x") + std::to_string(side);
    }
    return text.empty() ? "()" : text;
}

inline void writeNpy(std::string const& path, Array const& array)
{
    std::string shape;
    for (int64_t const side : array.shape)
    {
        shape += std::to_string(side) + ", ";
    }
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + "), }";
    header.append(63 - (10 + header.size()) % 64, ' ');
    header += '\n';
    std::string content("\x93NUMPY\x01\x00", 8);
    content += static_cast<char>(header.size() & 0xFFU);
    content += static_cast<char>(header.size() >> 8);
    content += header;
    content.append(reinterpret_cast<char const*>(array.values.data()), array.values.size() * sizeof(float));
    writeFile(path, content);
}

} // namespace runner
