#include "common/cuda_driver.hpp"

#include "common/logging.hpp"
#include "launch_constants.hpp"

#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

using CUmodule = struct CUmod_st*;

namespace fna
{
namespace
{

// Values of cuda.h's enumerations, which are part of the driver's binary interface.
constexpr int32_t kSuccess = 0;
constexpr int32_t kAttributeMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int32_t kAttributeMajor = 75;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int32_t kAttributeMinor = 76;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int32_t kFunctionMaxDynamicShared = 8;   // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int32_t kDefaultSharedLimit = 48 * 1024; // above it a kernel has to ask

struct Driver
{
    int32_t (*ctxGetCurrent)(CUcontext*){nullptr};
    int32_t (*ctxGetDevice)(int32_t*){nullptr};
    int32_t (*ctxPushCurrent)(CUcontext){nullptr};
    int32_t (*ctxPopCurrent)(CUcontext*){nullptr};
    int32_t (*streamGetCtx)(CUstream, CUcontext*){nullptr};
    int32_t (*ctxGetId)(CUcontext, unsigned long long*){nullptr}; // from CUDA 12.0 on
    int32_t (*deviceGetAttribute)(int32_t*, int32_t, int32_t){nullptr};
    int32_t (*moduleLoadData)(CUmodule*, void const*){nullptr};
    int32_t (*moduleGetFunction)(CUfunction*, CUmodule, char const*){nullptr};
    int32_t (*funcSetAttribute)(CUfunction, int32_t, int32_t){nullptr};
    int32_t (*launchKernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
        void**){nullptr};
    int32_t (*getErrorString)(int32_t, char const**){nullptr};
    bool found{false};
};

template <typename Function>
bool bind(void* library, char const* name, Function& function)
{
    void* const address = dlsym(library, name);
    std::memcpy(&function, &address, sizeof address);
    return address != nullptr;
}

Driver openDriver()
{
    Driver driver;
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        return driver;
    }
    driver.found = bind(library, "cuCtxGetCurrent", driver.ctxGetCurrent) && bind(library, "cuCtxGetDevice", driver.ctxGetDevice)
        && bind(library, "cuCtxPushCurrent_v2", driver.ctxPushCurrent) && bind(library, "cuCtxPopCurrent_v2", driver.ctxPopCurrent)
        && bind(library, "cuStreamGetCtx", driver.streamGetCtx)
        && bind(library, "cuDeviceGetAttribute", driver.deviceGetAttribute)
        && bind(library, "cuModuleLoadData", driver.moduleLoadData)
        && bind(library, "cuModuleGetFunction", driver.moduleGetFunction)
        && bind(library, "cuFuncSetAttribute", driver.funcSetAttribute) && bind(library, "cuLaunchKernel", driver.launchKernel)
        && bind(library, "cuGetErrorString", driver.getErrorString);
    bind(library, "cuCtxGetId", driver.ctxGetId);
    return driver;
}

Driver const& driver()
{
    static Driver const instance = openDriver();
    return instance;
}

std::string describe(int32_t status)
{
    char const* text = nullptr;
    if (driver().getErrorString(status, &text) != kSuccess || text == nullptr)
    {
        text = "unknown error";
    }
    return std::string(text) + " (CUDA error " + std::to_string(status) + ")";
}

int32_t readDevice(Device& device)
{
    Driver const& cuda = driver();
    int32_t ordinal = 0;
    int32_t major = 0;
    int32_t minor = 0;
    int32_t status = cuda.ctxGetCurrent(&device.context);
    if (status == kSuccess)
    {
        status = cuda.ctxGetDevice(&ordinal);
    }
    if (status == kSuccess)
    {
        status = cuda.deviceGetAttribute(&major, kAttributeMajor, ordinal);
    }
    if (status == kSuccess)
    {
        status = cuda.deviceGetAttribute(&minor, kAttributeMinor, ordinal);
    }
    if (status == kSuccess)
    {
        status = cuda.deviceGetAttribute(&device.multiprocessors, kAttributeMultiprocessors, ordinal);
    }
    unsigned long long id = 0;
    if (status == kSuccess && cuda.ctxGetId != nullptr && cuda.ctxGetId(device.context, &id) == kSuccess)
    {
        device.contextId = id;
    }
    device.sm = major * 10 + minor;
    return status;
}

// Kernels by context and entry. A context's identity is its handle and, where the driver has them, its unique number, since
// a handle may come back after a reset. Modules live as long as their context: TensorRT's plugins come and go more often.
class Cache
{
public:
    bool find(Device const& device, char const* variant, LoadedKernel& kernel)
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        auto const key = std::make_tuple(device.context, device.contextId, std::string(variant));
        auto const known = mKernels.find(key);
        if (known != mKernels.end())
        {
            kernel = known->second;
            return true;
        }
        KernelEntry const* const exact = findKernel(variant, device.sm);
        KernelEntry const* const fallback = findKernel(variant, 0);
        using Severity = nvinfer1::ILogger::Severity;
        if (exact != nullptr && load(*exact, kernel, fallback != nullptr ? Severity::kWARNING : Severity::kERROR))
        {
            mKernels.emplace(key, kernel);
            return true;
        }
        if (!whyNoKernels().empty())
        {
            logError(whyNoKernels());
            return false;
        }
        if (fallback == nullptr)
        {
            logError("no kernel ", variant, " for compute capability ", device.sm / 10, ".", device.sm % 10,
                " in this library; rebuild it with that chip: fna plugin --sm ", device.sm, ",0");
            return false;
        }
        if (!load(*fallback, kernel, Severity::kERROR))
        {
            return false;
        }
        mKernels.emplace(key, kernel);
        return true;
    }

    void count(int32_t& compiled, int32_t& fromPtx)
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        for (auto const& [key, kernel] : mKernels)
        {
            ++(kernel.entry->sm == 0 ? fromPtx : compiled);
        }
    }

private:
    bool load(KernelEntry const& entry, LoadedKernel& kernel, nvinfer1::ILogger::Severity severity)
    {
        Driver const& cuda = driver();
        std::vector<uint8_t> const image = unpackKernel(entry);
        if (image.empty())
        {
            logError("kernel ", entry.variant, " is damaged in this library; rebuild it");
            return false;
        }
        CUmodule module = nullptr;
        CUfunction function = nullptr;
        int32_t status = cuda.moduleLoadData(&module, image.data());
        if (status == kSuccess)
        {
            status = cuda.moduleGetFunction(&function, module, entry.symbol.c_str());
        }
        if (status == kSuccess && entry.shared > kDefaultSharedLimit)
        {
            status = cuda.funcSetAttribute(function, kFunctionMaxDynamicShared, entry.shared);
        }
        if (status != kSuccess)
        {
            logAt(severity, "kernel ", entry.variant, entry.sm == 0 ? " (PTX)" : "", " does not load: ", describe(status));
            return false;
        }
        kernel = LoadedKernel{function, &entry};
        return true;
    }

    std::mutex mMutex;
    std::map<std::tuple<CUcontext, uint64_t, std::string>, LoadedKernel> mKernels;
};

Cache& cache()
{
    // Never destroyed: plugins may outlive this library's static objects.
    static Cache* const instance = new Cache;
    return *instance;
}

} // namespace

bool currentDevice(Device& device) noexcept
{
    return guarded("currentDevice", false, [&] {
        if (!driver().found)
        {
            logError("the CUDA driver (libcuda.so.1) is not on this machine, so the plugin cannot run here");
            return false;
        }
        int32_t const status = readDevice(device);
        if (status != kSuccess)
        {
            logError("the current CUDA device cannot be read: ", describe(status));
        }
        return status == kSuccess;
    });
}

bool probeDevice(Device& device) noexcept
{
    return guarded("probeDevice", false, [&] { return driver().found && readDevice(device) == kSuccess; });
}

bool checkDevice(Device const& device) noexcept
{
    if (device.sm < kOldestChip)
    {
        logError("this GPU has compute capability ", device.sm / 10, ".", device.sm % 10,
            ", but the plugin's kernels need ", kOldestChip / 10, ".", kOldestChip % 10, " or later; build the engine from the portable lowering instead "
            "(fna build --lowering portable), which uses standard layers only");
        return false;
    }
    return true;
}

bool loadKernel(char const* variant, Device const& device, LoadedKernel& kernel) noexcept
{
    return guarded("loadKernel", false, [&] { return cache().find(device, variant, kernel); });
}

void countKernels(int32_t& compiled, int32_t& fromPtx) noexcept
{
    compiled = 0;
    fromPtx = 0;
    guarded("countKernels", false, [&] {
        cache().count(compiled, fromPtx);
        return true;
    });
}

bool hasContext() noexcept
{
    CUcontext context = nullptr;
    return !driver().found || driver().ctxGetCurrent(&context) != kSuccess || context != nullptr;
}

StreamContext::StreamContext(CUstream stream) noexcept
{
    CUcontext context = nullptr;
    mPushed = !hasContext() && driver().streamGetCtx(stream, &context) == kSuccess && driver().ctxPushCurrent(context) == kSuccess;
}

StreamContext::~StreamContext()
{
    CUcontext context = nullptr;
    if (mPushed)
    {
        driver().ctxPopCurrent(&context);
    }
}

bool launchKernel(LoadedKernel const& kernel, uint32_t const (&grid)[3], void const* const* arguments, CUstream stream) noexcept
{
    return guarded("launchKernel", false, [&] {
        // After a kernel's own arguments Triton's interface has two addresses of scratch that none of these kernels uses.
        void* unused = nullptr;
        void* pointers[kMaxArguments + 2];
        size_t const count = kernel.entry->layout.size();
        if (count > kMaxArguments)
        {
            logError("kernel ", kernel.entry->variant, " has ", count, " arguments, but at most ", kMaxArguments, " are possible");
            return false;
        }
        for (size_t i = 0; i < count; ++i)
        {
            pointers[i] = const_cast<void*>(arguments[i]);
        }
        pointers[count] = &unused;
        pointers[count + 1] = &unused;
        int32_t const status
            = driver().launchKernel(kernel.function, grid[0], grid[1], grid[2], static_cast<unsigned>(32 * kernel.entry->warps),
                1, 1, static_cast<unsigned>(kernel.entry->shared), stream, pointers, nullptr);
        if (status != kSuccess)
        {
            logError("kernel ", kernel.entry->variant, " does not launch: ", describe(status));
        }
        return status == kSuccess;
    });
}

} // namespace fna
