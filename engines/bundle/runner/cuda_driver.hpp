// The CUDA driver's calls: memory, streams, events, graphs.
#pragma once

#include "error.hpp"

#include <algorithm>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace runner
{

using Pointer = unsigned long long; // CUdeviceptr
using Handle = void*;

// The CUDA driver, found at run time, so that a machine without one gets a message and not the dynamic linker's.
class Driver
{
public:
    Driver()
    {
        mLibrary = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (mLibrary == nullptr)
        {
            throw Error(kMissing, "this machine has no NVIDIA driver (libcuda.so.1 is not found); run this on the device with the GPU");
        }
        bind("cuGetErrorString", mErrorString);
        int (*init)(unsigned) = nullptr;
        int (*count)(int*) = nullptr;
        bind("cuInit", init);
        bind("cuDeviceGetCount", count);
        int devices = 0;
        int status = init(0);
        status = status == 0 ? count(&devices) : status;
        if (status != 0 || devices == 0)
        {
            throw Error(kMissing,
                "this machine has no NVIDIA GPU that can be used" + (status != 0 ? " (" + describe(status) + ")" : std::string())
                    + "; run this on the device with the GPU");
        }
        int (*get)(int*, int) = nullptr;
        int (*name)(char*, int, int) = nullptr;
        int (*retain)(Handle*, int) = nullptr;
        int (*setCurrent)(Handle) = nullptr;
        int (*version)(int*) = nullptr;
        bind("cuDeviceGet", get);
        bind("cuDeviceGetName", name);
        bind("cuDeviceGetAttribute", mAttribute);
        bind("cuDevicePrimaryCtxRetain", retain);
        bind("cuCtxSetCurrent", setCurrent);
        bind("cuDriverGetVersion", version);
        bind("cuMemGetInfo_v2", mMemory);
        bind("cuMemAlloc_v2", mAllocate);
        bind("cuMemFree_v2", mFree);
        bind("cuMemcpyHtoDAsync_v2", mToDevice);
        bind("cuMemcpyDtoHAsync_v2", mToHost);
        bind("cuStreamCreate", mStreamCreate);
        bind("cuStreamSynchronize", mSynchronize);
        bind("cuEventCreate", mEventCreate);
        bind("cuEventRecord", mEventRecord);
        bind("cuEventElapsedTime", mEventElapsed);
        check("cuDeviceGet", get(&mDevice, 0));
        Handle context = nullptr;
        check("cuDevicePrimaryCtxRetain", retain(&context, mDevice));
        check("cuCtxSetCurrent", setCurrent(context));
        char text[256] = "";
        check("cuDeviceGetName", name(text, sizeof text, mDevice));
        deviceName = text;
        int number = 0;
        check("cuDriverGetVersion", version(&number));
        cudaVersion = std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
        capability = std::to_string(attribute(75)) + "." + std::to_string(attribute(76)); // COMPUTE_CAPABILITY_MAJOR, _MINOR
    }

    Pointer allocate(size_t bytes)
    {
        Pointer pointer = 0;
        check("cuMemAlloc", mAllocate(&pointer, std::max<size_t>(bytes, 1)));
        return pointer;
    }

    void release(Pointer pointer)
    {
        mFree(pointer);
    }

    // On the stream that uses the data: a stream that does not block waits for no copy on another one, the legacy stream included.
    void toDevice(Pointer pointer, std::vector<char> const& bytes, Handle stream)
    {
        check("cuMemcpyHtoDAsync", mToDevice(pointer, bytes.data(), bytes.size(), stream));
        synchronize(stream);
    }

    void toHost(std::vector<char>& bytes, Pointer pointer, Handle stream)
    {
        check("cuMemcpyDtoHAsync", mToHost(bytes.data(), pointer, bytes.size(), stream));
        synchronize(stream);
    }

    Handle stream()
    {
        Handle handle = nullptr;
        check("cuStreamCreate", mStreamCreate(&handle, 1)); // CU_STREAM_NON_BLOCKING
        return handle;
    }

    Handle event()
    {
        Handle handle = nullptr;
        check("cuEventCreate", mEventCreate(&handle, 0));
        return handle;
    }

    void record(Handle event, Handle stream)
    {
        check("cuEventRecord", mEventRecord(event, stream));
    }

    void synchronize(Handle stream)
    {
        check("cuStreamSynchronize", mSynchronize(stream));
    }

    double milliseconds(Handle from, Handle to)
    {
        float value = 0;
        check("cuEventElapsedTime", mEventElapsed(&value, from, to));
        return value;
    }

    size_t freeMemory()
    {
        size_t free = 0;
        size_t total = 0;
        check("cuMemGetInfo", mMemory(&free, &total));
        return free;
    }

    // Captures what `launch` puts on the stream. Nullptr where it cannot be captured.
    template <typename Launch>
    Handle capture(Handle stream, Launch launch)
    {
        int (*begin)(Handle, int) = nullptr;
        int (*end)(Handle, Handle*) = nullptr;
        int (*instantiate)(Handle*, Handle, unsigned long long) = nullptr;
        bind("cuStreamBeginCapture_v2", begin);
        bind("cuStreamEndCapture", end);
        bind("cuGraphInstantiateWithFlags", instantiate);
        bind("cuGraphLaunch", mGraphLaunch);
        Handle graph = nullptr;
        Handle executable = nullptr;
        if (begin(stream, 1) != 0) // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        {
            return nullptr;
        }
        bool const launched = launch();
        bool const captured = end(stream, &graph) == 0 && launched;
        return captured && instantiate(&executable, graph, 0) == 0 ? executable : nullptr;
    }

    void launchGraph(Handle graph, Handle stream)
    {
        check("cuGraphLaunch", mGraphLaunch(graph, stream));
    }

    std::string deviceName;
    std::string capability;
    std::string cudaVersion;

private:
    template <typename Function>
    void bind(char const* name, Function& function)
    {
        void* const address = dlsym(mLibrary, name);
        if (address == nullptr)
        {
            throw Error(kMissing, std::string("the NVIDIA driver is too old: it has no ") + name + "; install the driver of CUDA 12");
        }
        std::memcpy(&function, &address, sizeof address);
    }

    std::string describe(int status)
    {
        char const* text = nullptr;
        mErrorString(status, &text);
        return (text == nullptr ? "unknown error" : text) + (", CUDA error " + std::to_string(status));
    }

    void check(char const* name, int status)
    {
        if (status != 0)
        {
            throw Error(kMissing, std::string(name) + " failed: " + describe(status));
        }
    }

    int attribute(int which)
    {
        int value = 0;
        check("cuDeviceGetAttribute", mAttribute(&value, which, mDevice));
        return value;
    }

    void* mLibrary{nullptr};
    int mDevice{0};
    int (*mErrorString)(int, char const**){nullptr};
    int (*mAttribute)(int*, int, int){nullptr};
    int (*mMemory)(size_t*, size_t*){nullptr};
    int (*mAllocate)(Pointer*, size_t){nullptr};
    int (*mFree)(Pointer){nullptr};
    int (*mToDevice)(Pointer, void const*, size_t, Handle){nullptr};
    int (*mToHost)(void*, Pointer, size_t, Handle){nullptr};
    int (*mStreamCreate)(Handle*, unsigned){nullptr};
    int (*mSynchronize)(Handle){nullptr};
    int (*mEventCreate)(Handle*, unsigned){nullptr};
    int (*mEventRecord)(Handle, Handle){nullptr};
    int (*mEventElapsed)(float*, Handle, Handle){nullptr};
    int (*mGraphLaunch)(Handle, Handle){nullptr};
};

} // namespace runner
