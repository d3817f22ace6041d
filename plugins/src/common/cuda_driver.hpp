// The CUDA driver, found at run time, so that the library loads on a machine that has none.
#pragma once

#include "common/kernel_table.hpp"

#include <cstddef>
#include <cstdint>

// Handles of the driver's interface, as cuda.h declares them.
using CUcontext = struct CUctx_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;

namespace fna
{

// Of one launch.
constexpr size_t kMaxArguments = 40;

struct Device
{
    CUcontext context{nullptr};
    uint64_t contextId{0};
    int32_t sm{0}; // compute capability times ten
    int32_t multiprocessors{0};
};

struct LoadedKernel
{
    CUfunction function{nullptr};
    KernelEntry const* entry{nullptr};
};

// The device of the calling thread's context. False, and logged, when there is no driver or no context.
bool currentDevice(Device& device) noexcept;

// The same, silent: the build phase may run on a machine without a driver.
bool probeDevice(Device& device) noexcept;

// True from the oldest chip of the table on; otherwise logs what to do instead.
bool checkDevice(Device const& device) noexcept;

// The kernel of `variant` for the device, loaded once per context; the PTX where the table has nothing for the chip or the
// driver refuses it. False, and logged, when neither is to be had. Not for use while a stream is captured.
bool loadKernel(char const* variant, Device const& device, LoadedKernel& kernel) noexcept;

// How many kernels were loaded as compiled for the chip, and how many the driver compiled from PTX.
void countKernels(int32_t& compiled, int32_t& fromPtx) noexcept;

// Whether the calling thread has a context, or there is no driver that could have one.
bool hasContext() noexcept;

// While it lives, the calling thread has a context: its own, or where it has none that of the stream. TensorRT's callers need not
// have made one current in the thread that they enqueue from.
class StreamContext
{
public:
    explicit StreamContext(CUstream stream) noexcept;
    ~StreamContext();
    StreamContext(StreamContext const&) = delete;
    StreamContext& operator=(StreamContext const&) = delete;

private:
    bool mPushed{false};
};

// `arguments` points to one value for each letter of the kernel's layout.
bool launchKernel(LoadedKernel const& kernel, uint32_t const (&grid)[3], void const* const* arguments, CUstream stream) noexcept;

} // namespace fna
