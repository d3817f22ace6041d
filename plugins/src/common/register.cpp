// libfna_plugin_register.so: for hosts that dlopen a plugin library and expect it to register itself. It registers the creators of
// libfna_plugin.so with the TensorRT that the process holds or, under LD_PRELOAD, will hold. Use it or IPluginRegistry::loadLibrary,
// never both: a plugin that is registered already makes loadLibrary fail.
#include "common/exports.hpp"
#include "common/host_version.hpp"

#include <NvInferVersion.h>

#include <cstdio>
#include <cstring>
#include <dlfcn.h>

namespace
{

using RegistryFunction = nvinfer1::IPluginRegistry* (*) () noexcept;

#define FNA_TEXT(name) #name
#define FNA_SONAME(major) "libnvinfer.so." FNA_TEXT(major)

// Among the process's global symbols; else in the libnvinfer that it holds locally (Triton Inference Server opens its backends that
// way) or that it will load later (LD_PRELOAD), which then is this one.
RegistryFunction findRegistry()
{
    void* address = dlsym(RTLD_DEFAULT, "getPluginRegistry");
    if (address == nullptr)
    {
        void* const library = dlopen(FNA_SONAME(NV_TENSORRT_MAJOR), RTLD_NOW | RTLD_LOCAL);
        address = library == nullptr ? nullptr : dlsym(library, "getPluginRegistry");
    }
    RegistryFunction function = nullptr;
    std::memcpy(&function, &address, sizeof address);
    return function;
}

struct Registration
{
    Registration()
    {
        if (!fna::hostMatchesHeaders())
        {
            std::fprintf(stderr,
                "fna: this library was built with the headers of TensorRT %d, but the process runs another major version, so the "
                "plugins are not registered; rebuild it with -DTENSORRT_ROOT, or use IPluginRegistry::loadLibrary on "
                "libfna_plugin.so\n",
                NV_TENSORRT_MAJOR);
            return;
        }
        RegistryFunction const registry = findRegistry();
        if (registry == nullptr || registry() == nullptr)
        {
            std::fprintf(stderr,
                "fna: this process has no TensorRT plugin registry, so the plugins are not registered; put "
                "libnvinfer where the dynamic linker finds it, or use IPluginRegistry::loadLibrary on libfna_plugin.so\n");
            return;
        }
        int32_t count = 0;
        nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
        for (int32_t i = 0; i < count; ++i)
        {
            if (!registry()->registerCreator(*creators[i], ""))
            {
                std::fprintf(stderr, "fna: a plugin of this name and version is registered already\n");
            }
        }
    }
};

Registration const gRegistration;

} // namespace
