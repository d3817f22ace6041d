// A stand-in for libnvinfer.so: the version, a plugin registry that loads a library as TensorRT does (dlopen, getCreators), and the
// runtime of runtime.hpp, so that scripts and the runner can be tested where there is no TensorRT.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include "runtime.hpp"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <vector>

namespace
{

using namespace nvinfer1;

template <typename Function>
Function find(void* library, char const* name)
{
    void* const address = dlsym(library, name);
    Function function = nullptr;
    std::memcpy(&function, &address, sizeof address);
    return function;
}

class Registry : public IPluginRegistry
{
public:
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override
    {
        return nullptr;
    }
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool const) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override
    {
        void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            return nullptr;
        }
        auto const creators = find<IPluginCreatorInterface* const* (*) (int32_t&)>(library, "getCreators");
        int32_t count = 0;
        if (creators == nullptr || creators(count) == nullptr || count == 0)
        {
            return nullptr;
        }
        std::printf("stand-in registry: %d creators from %s\n", count, path);
        return library;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const) noexcept override
    {
        std::printf("stand-in registry: registered %s\n", static_cast<IPluginCreatorV3One&>(creator).getPluginName());
        std::fflush(stdout);
        return true;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override
    {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { return nullptr; }
};

} // namespace

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept
{
    static Registry registry;
    return &registry;
}

extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept
{
    return NV_TENSORRT_VERSION;
}

extern "C" __attribute__((visibility("default"))) void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept
{
    return new stand_in::Runtime(logger);
}
