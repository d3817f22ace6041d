// A stand-in for the CUDA driver that writes down everything, one JSON object a line, into the file that FNA_FAKE_CUDA_LOG
// names. It executes nothing, unless fna_fake_cuda_execute gave it functions that do. FNA_FAKE_CUDA_SM and FNA_FAKE_CUDA_MULTIPROCESSORS say which device it plays; with
// FNA_FAKE_CUDA_REFUSE_CUBIN it takes PTX only; with FNA_FAKE_CUDA_NO_CONTEXT no context is current until one is pushed. FNA_FAKE_CUDA_LAYOUTS ("symbol=ppif;...") tells it each kernel's arguments.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace
{

using Load = uint64_t (*)(void const* image); // 0: refused
using Launch = int32_t (*)(uint64_t image, char const* symbol, unsigned const* grid, unsigned threads, unsigned shared, void** arguments);

Load loadImage = nullptr;
Launch launchImage = nullptr;
void* current = std::getenv("FNA_FAKE_CUDA_NO_CONTEXT") == nullptr ? reinterpret_cast<void*>(1) : nullptr;

struct Function
{
    std::string symbol;
    uint64_t image{0};
    int32_t shared{0};
};

FILE* logFile()
{
    static FILE* const file = std::fopen(std::getenv("FNA_FAKE_CUDA_LOG"), "a");
    return file;
}

int32_t number(char const* name, int32_t otherwise)
{
    char const* const text = std::getenv(name);
    return text == nullptr ? otherwise : std::atoi(text);
}

std::string layoutOf(std::string const& symbol)
{
    char const* const all = std::getenv("FNA_FAKE_CUDA_LAYOUTS");
    std::string const text = ";" + std::string(all == nullptr ? "" : all) + ";";
    size_t const at = text.find(";" + symbol + "=");
    if (at == std::string::npos)
    {
        return "";
    }
    size_t const start = at + symbol.size() + 2;
    return text.substr(start, text.find(';', start) - start);
}

} // namespace

extern "C"
{

    void fna_fake_cuda_execute(Load load, Launch launch)
    {
        loadImage = load;
        launchImage = launch;
    }

    int32_t cuCtxGetCurrent(void** context)
    {
        *context = current;
        return 0;
    }

    int32_t cuCtxPushCurrent_v2(void* context)
    {
        current = context;
        return 0;
    }

    int32_t cuCtxPopCurrent_v2(void** context)
    {
        *context = current;
        current = nullptr;
        return 0;
    }

    int32_t cuStreamGetCtx(void* stream, void** context)
    {
        *context = reinterpret_cast<void*>(1);
        return stream == nullptr ? 201 : 0; // CUDA_ERROR_INVALID_CONTEXT: the legacy stream is the current context's
    }

    int32_t cuCtxGetDevice(int32_t* device)
    {
        *device = 0;
        return current == nullptr ? 201 : 0;
    }

    int32_t cuDeviceGetAttribute(int32_t* value, int32_t attribute, int32_t)
    {
        int32_t const sm = number("FNA_FAKE_CUDA_SM", 87);
        *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : number("FNA_FAKE_CUDA_MULTIPROCESSORS", 16);
        return attribute == 75 || attribute == 76 || attribute == 16 ? 0 : 1;
    }

    int32_t cuModuleLoadData(void** module, void const* image)
    {
        bool const elf = std::memcmp(image, "\177ELF", 4) == 0;
        if (elf)
        {
            uint16_t machine = 0;
            std::memcpy(&machine, static_cast<char const*>(image) + 18, sizeof machine);
            if (machine != 190 || std::getenv("FNA_FAKE_CUDA_REFUSE_CUBIN") != nullptr)
            {
                return 209; // CUDA_ERROR_NO_BINARY_FOR_GPU
            }
        }
        else if (std::strstr(static_cast<char const*>(image), ".target sm_80") == nullptr)
        {
            return 218; // CUDA_ERROR_INVALID_PTX
        }
        if (loadImage != nullptr)
        {
            uint64_t const handle = loadImage(image);
            *module = reinterpret_cast<void*>(handle);
            return handle == 0 ? 209 : 0;
        }
        std::fprintf(logFile(), "{\"call\": \"load\", \"kind\": \"%s\"}\n", elf ? "cubin" : "ptx");
        *module = reinterpret_cast<void*>(2);
        return 0;
    }

    int32_t cuModuleGetFunction(void** function, void* module, char const* symbol)
    {
        *function = new Function{symbol, reinterpret_cast<uint64_t>(module)};
        return 0;
    }

    int32_t cuFuncSetAttribute(void* function, int32_t attribute, int32_t value)
    {
        if (attribute != 8)
        {
            return 1;
        }
        static_cast<Function*>(function)->shared = value;
        return 0;
    }

    int32_t cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
        void*, void** arguments, void**)
    {
        auto* const kernel = static_cast<Function*>(function);
        if (current == nullptr)
        {
            return 201;
        }
        if (shared > 48 * 1024 && static_cast<int32_t>(shared) > kernel->shared)
        {
            return 1; // CUDA_ERROR_INVALID_VALUE: the limit was not raised
        }
        if (launchImage != nullptr)
        {
            unsigned const grid[] = {x, y, z};
            return launchImage(kernel->image, kernel->symbol.c_str(), grid, threads, shared, arguments);
        }
        std::string const layout = layoutOf(kernel->symbol);
        std::fprintf(logFile(), "{\"call\": \"launch\", \"symbol\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %u, ",
            kernel->symbol.c_str(), x, y, z, threads, shared);
        std::fprintf(logFile(), "\"arguments\": [");
        for (size_t i = 0; i < layout.size(); ++i)
        {
            char const* const comma = i == 0 ? "" : ", ";
            if (layout[i] == 'p')
            {
                uint64_t value = 0;
                std::memcpy(&value, arguments[i], sizeof value);
                std::fprintf(logFile(), "%s%llu", comma, static_cast<unsigned long long>(value));
            }
            else if (layout[i] == 'i')
            {
                int32_t value = 0;
                std::memcpy(&value, arguments[i], sizeof value);
                std::fprintf(logFile(), "%s%d", comma, value);
            }
            else
            {
                float value = 0;
                std::memcpy(&value, arguments[i], sizeof value);
                std::fprintf(logFile(), "%s%.9g", comma, static_cast<double>(value));
            }
        }
        uint64_t tail[2];
        std::memcpy(&tail[0], arguments[layout.size()], sizeof tail[0]);
        std::memcpy(&tail[1], arguments[layout.size() + 1], sizeof tail[1]);
        std::fprintf(logFile(), "], \"tail\": [%llu, %llu]}\n", static_cast<unsigned long long>(tail[0]),
            static_cast<unsigned long long>(tail[1]));
        std::fflush(logFile());
        return 0;
    }

    int32_t cuGetErrorString(int32_t, char const** text)
    {
        *text = "refused by the stand-in driver";
        return 0;
    }
}
