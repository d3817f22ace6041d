// The kernels that the ahead-of-time build compiled (fna plugin): where each lies in the packed data, and how to launch it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fna
{

struct KernelEntry
{
    char const* variant; // such as "output-fp16-s64-d64"
    int32_t sm;          // compute capability times ten; 0 is PTX for any chip from 8.0 on
    size_t offset;       // of the packed image in the data
    size_t packed;       // bytes there
    size_t size;         // bytes unpacked
    int32_t shared;      // dynamic shared memory, bytes
    int32_t warps;
    char const* symbol; // the function's name in the image
    char const* layout; // one letter for each argument: p address, i int32, f float32
};

// The entry for a variant on a chip, or nullptr.
KernelEntry const* findKernel(char const* variant, int32_t sm) noexcept;

uint8_t const* packedKernels() noexcept;

} // namespace fna
