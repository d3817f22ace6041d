// The kernels that the ahead-of-time build compiled (fna plugin). This library carries them at the end of its own file, behind what
// the linker wrote: images, an index, a footer, as fna.plugins.table.kernel_file writes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fna
{

struct KernelEntry
{
    std::string variant; // such as "output-fp16-s64-d64"
    int32_t sm{0};       // compute capability times ten; 0 is PTX for any chip from 8.0 on
    uint64_t offset{0};  // of the packed image among the images
    uint64_t packed{0};  // bytes there
    uint64_t size{0};    // bytes unpacked
    int32_t shared{0};   // dynamic shared memory, bytes
    int32_t warps{0};
    std::string symbol; // the function's name in the image
    std::string layout; // one letter for each argument: p address, i int32, f float32
};

// The entry for a variant on a chip, or nullptr. It stays where it is for as long as the library is loaded.
KernelEntry const* findKernel(char const* variant, int32_t sm) noexcept;

// Why this library has no kernels at all, or an empty text.
std::string const& whyNoKernels() noexcept;

// A kernel's image. Empty where it is damaged or cannot be read.
std::vector<uint8_t> unpackKernel(KernelEntry const& entry);

} // namespace fna
