#include "common/kernel_table.hpp"

#include <cstring>

// FNA_KERNEL_DATA, a path, is set by CMake; the assembler includes the file as it is, whatever the processor.
__asm__(
    ".section .rodata\n"
    ".balign 16\n"
    ".local fna_packed_kernels\n"
    "fna_packed_kernels:\n"
    ".incbin \"" FNA_KERNEL_DATA "\"\n"
    ".byte 0\n"
    ".previous\n");

extern "C" __attribute__((visibility("hidden"))) uint8_t const fna_packed_kernels[];

namespace fna
{
namespace
{

constexpr KernelEntry kTable[] = {
#include "kernel_table.inc"
};

} // namespace

KernelEntry const* findKernel(char const* variant, int32_t sm) noexcept
{
    for (KernelEntry const& entry : kTable)
    {
        if (entry.sm == sm && std::strcmp(entry.variant, variant) == 0)
        {
            return &entry;
        }
    }
    return nullptr;
}

uint8_t const* packedKernels() noexcept
{
    return fna_packed_kernels;
}

} // namespace fna
