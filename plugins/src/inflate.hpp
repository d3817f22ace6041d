// Raw deflate (RFC 1951) decompression, for the kernels that are packed into the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fna
{

// Unpack `packed` into exactly `size` bytes. Returns an empty vector when the stream is damaged or of another size.
std::vector<uint8_t> inflate(uint8_t const* packed, size_t packedSize, size_t size);

} // namespace fna
