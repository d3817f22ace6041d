// Raw deflate (RFC 1951) decompression, for the kernels that are packed into the library.
//
// Own code, not zlib or zstd: the library builds on the device from TensorRT's and CUDA's headers alone, without a network, and a
// device image need not have the development package of either. Unpacked, the kernels of all chips would quadruple the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fna
{

// Unpack `packed` into exactly `size` bytes. Returns an empty vector when the stream is damaged or of another size.
std::vector<uint8_t> inflate(uint8_t const* packed, size_t packedSize, size_t size);

} // namespace fna
