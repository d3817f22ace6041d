// Runs a TensorRT engine on recorded inputs, compares its outputs with recorded ones, and times it. One file; needs TensorRT and the
// CUDA driver, nothing else: no Python, no network. Arrays are .npy (fp32 or fp16) or raw fp32, items along the first dimension.
//
//   g++ -std=c++17 -O2 -I<TensorRT's headers> -I<CUDA's headers> fna_runner.cpp -o fna_runner -lnvinfer -ldl   (-ltensorrt_rtx for RTX)
//
// Exit codes: 0 done; 1 ran, but an output is out of tolerance or a plugin layer is missing; 2 bad arguments or files; 3 this machine
// lacks a GPU, a driver, or the TensorRT that the engine needs.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int kDone = 0;
constexpr int kCheckFailed = 1;
constexpr int kBadInput = 2;
constexpr int kMissing = 3;

constexpr char const* kUsage = R"(usage: fna_runner ENGINE [options]           run an engine
       fna_runner --check-plugin LIBRARY         does the plugin library load into this TensorRT?
       fna_runner --compare NAME=FILE.npy ...    compare files with --expect, without an engine

  --plugin LIBRARY          plugin library, loaded before the engine
  --input NAME=FILE         an input, items along the first dimension: .npy, or raw fp32; FILE alone where there is one input
  --expect NAME=FILE.npy    what an output has to be
  --relative-l2 X           largest relative L2 error of an output     (1e-3)
  --cosine X                smallest cosine similarity of an output    (0.999)
  --plugin-layers FILE      layers that have to be plugin layers: a name a line, a tab, and fp32, fp16, bf16 or ?
  --output DIR              write the outputs there as NAME.npy
  --batch N                 items at a time     (the engine's usual batch, or all items if they are fewer)
  --warm-up N               runs before timing  (20)
  --runs N                  timed runs; 0 for none (100)
  --graph                   time a CUDA graph instead of single launches
  --json FILE               write every number as JSON
)";

struct Error : std::runtime_error
{
    Error(int exitCode, std::string const& message)
        : std::runtime_error(message)
        , code(exitCode)
    {
    }
    int code;
};

// ---------------------------------------------------------------------------------------------------------------- number formats

float halfToFloat(uint16_t half)
{
    uint32_t const sign = (half & 0x8000U) << 16;
    uint32_t const exponent = (half >> 10) & 0x1FU;
    uint32_t const fraction = half & 0x3FFU;
    if (exponent == 0)
    {
        float const value = std::ldexp(static_cast<float>(fraction), -24);
        return sign != 0U ? -value : value;
    }
    uint32_t const bits = exponent == 0x1FU ? sign | 0x7F800000U | (fraction << 13) : sign | ((exponent + 112U) << 23) | (fraction << 13);
    float value = 0.F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest, ties to even; what is too large becomes infinite.
uint16_t floatToHalf(float value)
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    uint16_t const sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
    if (std::isnan(value))
    {
        return static_cast<uint16_t>(sign | 0x7E00U);
    }
    float const magnitude = std::fabs(value);
    if (magnitude >= 65520.F)
    {
        return static_cast<uint16_t>(sign | 0x7C00U);
    }
    if (magnitude < 6.103515625e-05F) // subnormal: multiples of 2^-24
    {
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
    }
    uint32_t const rounded = (bits & 0x7FFFFFFFU) + 0xFFFU + ((bits >> 13) & 1U);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded - (112U << 23)) >> 13));
}

float bfloatToFloat(uint16_t bfloat)
{
    uint32_t const bits = static_cast<uint32_t>(bfloat) << 16;
    float value = 0.F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t floatToBfloat(float value)
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value))
    {
        return static_cast<uint16_t>((bits >> 16) | 0x40U);
    }
    return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

int64_t elementBytes(DataType type)
{
    switch (type)
    {
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    case DataType::kINT64: return 8;
    default: break;
    }
    throw Error(kBadInput, "the engine has an input or output that is neither fp32, fp16, bf16, int32 nor int64");
}

template <typename Stored, typename Convert>
void store(std::vector<char>& bytes, std::vector<float> const& values, Convert convert)
{
    for (size_t i = 0; i < values.size(); ++i)
    {
        Stored const value = static_cast<Stored>(convert(values[i]));
        std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
    }
}

std::vector<char> encode(std::vector<float> const& values, DataType type)
{
    std::vector<char> bytes(values.size() * static_cast<size_t>(elementBytes(type)));
    auto const same = [](float value) { return value; };
    switch (type)
    {
    case DataType::kFLOAT: store<float>(bytes, values, same); break;
    case DataType::kHALF: store<uint16_t>(bytes, values, floatToHalf); break;
    case DataType::kBF16: store<uint16_t>(bytes, values, floatToBfloat); break;
    case DataType::kINT32: store<int32_t>(bytes, values, same); break;
    default: store<int64_t>(bytes, values, same); break;
    }
    return bytes;
}

template <typename Stored, typename Convert>
void load(std::vector<float>& values, char const* bytes, Convert convert)
{
    for (size_t i = 0; i < values.size(); ++i)
    {
        Stored value{};
        std::memcpy(&value, bytes + i * sizeof value, sizeof value);
        values[i] = static_cast<float>(convert(value));
    }
}

std::vector<float> decode(std::vector<char> const& bytes, DataType type)
{
    std::vector<float> values(bytes.size() / static_cast<size_t>(elementBytes(type)));
    auto const same = [](auto value) { return value; };
    switch (type)
    {
    case DataType::kFLOAT: load<float>(values, bytes.data(), same); break;
    case DataType::kHALF: load<uint16_t>(values, bytes.data(), halfToFloat); break;
    case DataType::kBF16: load<uint16_t>(values, bytes.data(), bfloatToFloat); break;
    case DataType::kINT32: load<int32_t>(values, bytes.data(), same); break;
    default: load<int64_t>(values, bytes.data(), same); break;
    }
    return values;
}

// ------------------------------------------------------------------------------------------------------------------------- files

struct Array
{
    std::vector<int64_t> shape; // empty for a raw file
    std::vector<float> values;
};

std::vector<char> readFile(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    if (!file)
    {
        throw Error(kBadInput, path + " cannot be read; is the path right?");
    }
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void writeFile(std::string const& path, std::string const& content)
{
    std::ofstream file(path, std::ios::binary);
    file.write(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file.flush())
    {
        throw Error(kBadInput, path + " cannot be written; give a folder that exists and is writable");
    }
}

bool endsWith(std::string const& text, std::string const& end)
{
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

int64_t product(std::vector<int64_t> const& shape)
{
    int64_t count = 1;
    for (int64_t const side : shape)
    {
        if (side < 0 || (side != 0 && count > std::numeric_limits<int64_t>::max() / side))
        {
            throw Error(kBadInput, "a shape is negative or too large");
        }
        count *= side;
    }
    return count;
}

// The format: magic, version, header length, a Python dictionary as text, and the data.
Array readNpy(std::string const& path)
{
    std::vector<char> const bytes = readFile(path);
    auto const broken = [&path](char const* why) { return Error(kBadInput, path + " is no .npy file that can be used: " + why); };
    if (bytes.size() < 12 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0)
    {
        throw broken("it does not begin like one");
    }
    auto const byte = [&bytes](size_t at) { return static_cast<size_t>(static_cast<unsigned char>(bytes[at])); };
    bool const old = byte(6) == 1;
    size_t const start = old ? 10 : 12;
    size_t const length = old ? byte(8) | byte(9) << 8 : byte(8) | byte(9) << 8 | byte(10) << 16 | byte(11) << 24;
    if (length > bytes.size() - start)
    {
        throw broken("its header is cut off");
    }
    std::string const header(bytes.data() + start, length);
    if (header.find("'fortran_order': False") == std::string::npos)
    {
        throw broken("it is in Fortran order");
    }
    bool const half = header.find("'<f2'") != std::string::npos;
    if (!half && header.find("'<f4'") == std::string::npos)
    {
        throw broken("it is neither fp32 nor fp16, little-endian");
    }
    size_t const open = header.find("'shape': (");
    size_t const close = header.find(')', open);
    if (open == std::string::npos || close == std::string::npos)
    {
        throw broken("it gives no shape");
    }
    Array array;
    std::istringstream sides(header.substr(open + 10, close - open - 10));
    for (std::string side; std::getline(sides, side, ',');)
    {
        if (side.find_first_not_of(" ") != std::string::npos)
        {
            array.shape.push_back(std::strtoll(side.c_str(), nullptr, 10));
        }
    }
    size_t const size = half ? 2 : 4;
    size_t const count = static_cast<size_t>(product(array.shape));
    if (count > bytes.size() / size || bytes.size() - start - length != count * size)
    {
        throw broken("its data is not as long as its shape says");
    }
    array.values = decode({bytes.begin() + static_cast<int64_t>(start + length), bytes.end()}, half ? DataType::kHALF : DataType::kFLOAT);
    return array;
}

Array readArray(std::string const& path)
{
    if (endsWith(path, ".npy"))
    {
        return readNpy(path);
    }
    std::vector<char> const bytes = readFile(path);
    if (bytes.empty() || bytes.size() % 4 != 0)
    {
        throw Error(kBadInput, path + " is no raw fp32 file: it has " + std::to_string(bytes.size()) + " bytes");
    }
    return {{}, decode(bytes, DataType::kFLOAT)};
}

std::string shapeText(std::vector<int64_t> const& shape)
{
    std::string text;
    for (int64_t const side : shape)
    {
        text += (text.empty() ? "" : "x") + std::to_string(side);
    }
    return text.empty() ? "()" : text;
}

void writeNpy(std::string const& path, Array const& array)
{
    std::string shape;
    for (int64_t const side : array.shape)
    {
        shape += std::to_string(side) + ", ";
    }
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + "), }";
    header.append(63 - (10 + header.size()) % 64, ' ');
    header += '\n';
    std::string content("\x93NUMPY\x01\x00", 8);
    content += static_cast<char>(header.size() & 0xFFU);
    content += static_cast<char>(header.size() >> 8);
    content += header;
    content.append(reinterpret_cast<char const*>(array.values.data()), array.values.size() * sizeof(float));
    writeFile(path, content);
}

// ------------------------------------------------------------------------------------------------------------------------ errors

struct Difference
{
    double relativeL2{0};
    double cosine{0};
    double maxAbs{0};
    int64_t notFinite{0};
};

Difference measure(std::string const& name, Array const& expected, Array const& actual)
{
    if (expected.shape != actual.shape)
    {
        throw Error(kBadInput,
            "output " + name + " has shape " + shapeText(actual.shape) + ", but " + shapeText(expected.shape) + " was recorded");
    }
    double dot = 0;
    double squaredExpected = 0;
    double squaredActual = 0;
    double squaredDifference = 0;
    Difference difference;
    for (size_t i = 0; i < expected.values.size(); ++i)
    {
        double const e = expected.values[i];
        double const a = actual.values[i];
        difference.notFinite += std::isfinite(a) ? 0 : 1;
        dot += e * a;
        squaredExpected += e * e;
        squaredActual += a * a;
        squaredDifference += (a - e) * (a - e);
        difference.maxAbs = std::max(difference.maxAbs, std::fabs(a - e));
    }
    difference.relativeL2 = squaredExpected > 0 ? std::sqrt(squaredDifference / squaredExpected) : std::sqrt(squaredDifference);
    double const norms = std::sqrt(squaredExpected) * std::sqrt(squaredActual);
    difference.cosine = norms > 0 ? dot / norms : (squaredDifference > 0 ? 0.0 : 1.0);
    return difference;
}

std::string number(char const* format, double value)
{
    char text[64];
    std::snprintf(text, sizeof text, format, value);
    return text;
}

// Why an output fails, or nothing. Written so that NaN fails.
std::string verdict(std::string const& name, Difference const& difference, double relativeL2, double cosine)
{
    if (difference.notFinite > 0)
    {
        return "output " + name + " holds " + std::to_string(difference.notFinite) + " NaN or infinite values";
    }
    if (!(difference.relativeL2 <= relativeL2))
    {
        return "output " + name + " has relative L2 error " + number("%.2e", difference.relativeL2) + " (tolerance "
            + number("%.0e", relativeL2) + ")";
    }
    if (!(difference.cosine >= cosine))
    {
        return "output " + name + " has cosine " + number("%.6f", difference.cosine) + " (tolerance " + number("%g", cosine) + ")";
    }
    return {};
}

// ----------------------------------------------------------------------------------------------------------------------- options

using Named = std::vector<std::pair<std::string, std::string>>;

struct Options
{
    std::string engine;
    std::string plugin;
    std::string checkPlugin;
    std::string pluginLayers;
    std::string output;
    std::string json;
    Named inputs;
    Named expected;
    Named compare;
    double relativeL2{1e-3};
    double cosine{0.999};
    int64_t batch{0};
    int64_t warmUp{20};
    int64_t runs{100};
    bool graph{false};
};

std::pair<std::string, std::string> splitName(std::string const& text)
{
    size_t const at = text.find('=');
    return at == std::string::npos ? std::make_pair(std::string(), text) : std::make_pair(text.substr(0, at), text.substr(at + 1));
}

double parseNumber(std::string const& option, std::string const& text, double smallest)
{
    char* end = nullptr;
    double const value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0' || !(value >= smallest))
    {
        throw Error(kBadInput, option + " " + text + " cannot be used; give a number of at least " + number("%g", smallest));
    }
    return value;
}

Options parse(std::vector<std::string> const& arguments)
{
    Options options;
    for (size_t i = 0; i < arguments.size(); ++i)
    {
        std::string const& option = arguments[i];
        auto const value = [&]() -> std::string const&
        {
            if (i + 1 >= arguments.size())
            {
                throw Error(kBadInput, option + " needs a value; see fna_runner --help");
            }
            return arguments[++i];
        };
        auto const whole = [&](double smallest) { return static_cast<int64_t>(parseNumber(option, value(), smallest)); };
        if (option == "--plugin") { options.plugin = value(); }
        else if (option == "--check-plugin") { options.checkPlugin = value(); }
        else if (option == "--plugin-layers") { options.pluginLayers = value(); }
        else if (option == "--output") { options.output = value(); }
        else if (option == "--json") { options.json = value(); }
        else if (option == "--input") { options.inputs.push_back(splitName(value())); }
        else if (option == "--expect") { options.expected.push_back(splitName(value())); }
        else if (option == "--compare") { options.compare.push_back(splitName(value())); }
        else if (option == "--relative-l2") { options.relativeL2 = parseNumber(option, value(), 0); }
        else if (option == "--cosine") { options.cosine = parseNumber(option, value(), -1); }
        else if (option == "--batch") { options.batch = whole(1); }
        else if (option == "--warm-up") { options.warmUp = whole(0); }
        else if (option == "--runs") { options.runs = whole(0); }
        else if (option == "--graph") { options.graph = true; }
        else if (option.compare(0, 1, "-") == 0) { throw Error(kBadInput, "unknown option " + option + "; see fna_runner --help"); }
        else if (options.engine.empty()) { options.engine = option; }
        else { throw Error(kBadInput, "two engines were given, " + options.engine + " and " + option + "; give one"); }
    }
    if (options.engine.empty() && options.checkPlugin.empty() && options.compare.empty())
    {
        throw Error(kBadInput, "no engine was given; see fna_runner --help");
    }
    return options;
}

// ------------------------------------------------------------------------------------------------------------------- CUDA driver

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
        bind("cuMemcpyHtoD_v2", mToDevice);
        bind("cuMemcpyDtoH_v2", mToHost);
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

    void toDevice(Pointer pointer, std::vector<char> const& bytes)
    {
        check("cuMemcpyHtoD", mToDevice(pointer, bytes.data(), bytes.size()));
    }

    void toHost(std::vector<char>& bytes, Pointer pointer)
    {
        check("cuMemcpyDtoH", mToHost(bytes.data(), pointer, bytes.size()));
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
    int (*mToDevice)(Pointer, void const*, size_t){nullptr};
    int (*mToHost)(void*, Pointer, size_t){nullptr};
    int (*mStreamCreate)(Handle*, unsigned){nullptr};
    int (*mSynchronize)(Handle){nullptr};
    int (*mEventCreate)(Handle*, unsigned){nullptr};
    int (*mEventRecord)(Handle, Handle){nullptr};
    int (*mEventElapsed)(float*, Handle, Handle){nullptr};
    int (*mGraphLaunch)(Handle, Handle){nullptr};
};

// ---------------------------------------------------------------------------------------------------------------------- TensorRT

// Prints warnings and errors, and keeps the last error for the one-line message.
class Logger : public nvinfer1::ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity <= Severity::kWARNING)
        {
            std::fprintf(stderr, "tensorrt: %s\n", message);
        }
        if (severity <= Severity::kERROR)
        {
            std::snprintf(mLast, sizeof mLast, "%s", message);
        }
    }

    std::string last() const
    {
        return mLast[0] == '\0' ? "no reason given" : mLast;
    }

private:
    char mLast[512]{};
};

struct Layer
{
    std::string name;
    std::string wanted;
    std::string found;
    bool isPlugin{false};
};

// The text of a string field of the inspector's JSON, or nothing.
std::string jsonField(std::string const& json, std::string const& key, size_t from = 0)
{
    size_t at = json.find('"' + key + '"', from);
    at = at == std::string::npos ? at : json.find(':', at + key.size() + 2);
    size_t const open = at == std::string::npos ? at : json.find('"', at);
    size_t const close = open == std::string::npos ? open : json.find('"', open + 1);
    return close == std::string::npos ? std::string() : json.substr(open + 1, close - open - 1);
}

bool mentions(std::string const& text, std::string const& name)
{
    auto const joins = [](char letter) { return std::isalnum(static_cast<unsigned char>(letter)) != 0 || letter == '_' || letter == '.'; };
    for (size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + 1))
    {
        bool const starts = at == 0 || !joins(text[at - 1]);
        size_t const after = at + name.size();
        if (starts && (after == text.size() || !joins(text[after])))
        {
            return true;
        }
    }
    return false;
}

// A type as TensorRT's inspector writes it ("Row major linear FP16 format", "Half"), in our words; empty where it is not known.
std::string typeOfFormat(std::string const& format)
{
    static std::pair<char const*, char const*> const kNames[]
        = {{"BF16", "bf16"}, {"BFloat", "bf16"}, {"FP16", "fp16"}, {"Half", "fp16"}, {"FP32", "fp32"}, {"Float", "fp32"}};
    for (auto const& [theirs, ours] : kNames)
    {
        if (format.find(theirs) != std::string::npos)
        {
            return ours;
        }
    }
    return {};
}

std::vector<Layer> readWantedLayers(std::string const& path)
{
    std::vector<char> const bytes = readFile(path);
    std::istringstream lines(std::string(bytes.begin(), bytes.end()));
    std::vector<Layer> layers;
    for (std::string line; std::getline(lines, line);)
    {
        size_t const tab = line.find('\t');
        if (!line.empty())
        {
            layers.push_back({line.substr(0, tab), tab == std::string::npos ? "?" : line.substr(tab + 1), "", false});
        }
    }
    return layers;
}

void findLayer(Layer& layer, std::string const& json)
{
    if (!mentions(json, layer.name) || layer.isPlugin)
    {
        return;
    }
    layer.isPlugin = jsonField(json, "LayerType").find("Plugin") != std::string::npos;
    size_t const outputs = json.find("\"Outputs\"");
    layer.found = outputs == std::string::npos ? "" : typeOfFormat(jsonField(json, "Format/Datatype", outputs));
}

// Every layer that is no plugin layer, or runs in another type than asked.
std::vector<std::string> judgeLayers(std::vector<Layer> const& layers)
{
    std::vector<std::string> failures;
    for (Layer const& layer : layers)
    {
        if (!layer.isPlugin)
        {
            failures.push_back("layer " + layer.name + " is not in the engine as a plugin layer");
        }
        else if (layer.wanted != "?" && !layer.found.empty() && layer.found != layer.wanted)
        {
            failures.push_back("layer " + layer.name + " runs in " + layer.found + ", but " + layer.wanted + " was asked for");
        }
    }
    return failures;
}

std::vector<int64_t> sides(Dims const& dims)
{
    return {dims.d, dims.d + std::max<int32_t>(dims.nbDims, 0)};
}

Dims dimsOf(std::vector<int64_t> const& shape)
{
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

// What is copied from the recorded items into a batch: items wrap around, so that any batch can be filled.
std::vector<float> takeItems(Array const& array, int64_t first, int64_t count)
{
    int64_t const items = array.shape.front();
    int64_t const size = items == 0 ? 0 : static_cast<int64_t>(array.values.size()) / items;
    std::vector<float> batch;
    batch.reserve(static_cast<size_t>(count * size));
    for (int64_t i = 0; i < count; ++i)
    {
        auto const start = array.values.begin() + (first + i) % items * size;
        batch.insert(batch.end(), start, start + size);
    }
    return batch;
}

struct Buffer
{
    std::string name;
    DataType type{DataType::kFLOAT};
    bool isInput{false};
    std::vector<int64_t> shape;
    Pointer pointer{0};
    std::vector<char> host;
};

struct Timing
{
    int64_t batch{0};
    int64_t runs{0};
    bool graph{false};
    double median{0};
    double p99{0};
    double perSecond{0};
};

std::string tensorrtVersion()
{
    int32_t const version = getInferLibVersion();
    int32_t const scale = version >= 10000 ? 10000 : 1000; // 10.x counts 10000 a major version, 8.x and TensorRT-RTX 1000
    return std::to_string(version / scale) + "." + std::to_string(version % scale / 100) + "." + std::to_string(version % 100);
}

// The classes of another major version have their functions elsewhere: calling them would crash.
void requireTensorrtOfHeaders()
{
    if (tensorrtVersion().compare(0, tensorrtVersion().find('.'), std::to_string(NV_TENSORRT_MAJOR)) != 0)
    {
        throw Error(kMissing,
            "fna_runner was compiled with the headers of TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + "."
                + std::to_string(NV_TENSORRT_MINOR) + ", but this machine has " + tensorrtVersion() + "; compile it on this device");
    }
}

class Engine
{
public:
    Engine(Options const& options, Driver& driver)
        : mDriver(driver)
    {
        requireTensorrtOfHeaders();
        std::vector<char> const plan = readFile(options.engine);
        bytes = plan.size();
        size_t const before = driver.freeMemory();
        mRuntime.reset(nvinfer1::createInferRuntime(mLogger));
        if (!mRuntime)
        {
            throw Error(kMissing, "TensorRT does not start: " + mLogger.last());
        }
        if (!options.plugin.empty() && mRuntime->getPluginRegistry().loadLibrary(options.plugin.c_str()) == nullptr)
        {
            throw Error(kMissing, options.plugin + " does not load: " + mLogger.last() + "; compile it on this device");
        }
        mEngine.reset(mRuntime->deserializeCudaEngine(plan.data(), plan.size()));
        if (!mEngine)
        {
            throw Error(kMissing,
                options.engine + " cannot be loaded here (" + mLogger.last()
                    + "); engines run on the TensorRT version and GPU that built them: build it again on this device");
        }
        mContext.reset(mEngine->createExecutionContext());
        if (!mContext)
        {
            throw Error(kMissing, "the engine has no room to run: " + mLogger.last());
        }
        mStream = driver.stream();
        for (int32_t i = 0; i < mEngine->getNbIOTensors(); ++i)
        {
            Buffer buffer;
            buffer.name = mEngine->getIOTensorName(i);
            buffer.type = mEngine->getTensorDataType(buffer.name.c_str());
            buffer.isInput = mEngine->getTensorIOMode(buffer.name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
            mBuffers.push_back(buffer);
        }
        size_t const after = driver.freeMemory();
        deviceMemory = before > after ? before - after : 0;
    }

    ~Engine()
    {
        for (Buffer const& buffer : mBuffers)
        {
            mDriver.release(buffer.pointer);
        }
    }

    Engine(Engine const&) = delete;
    Engine& operator=(Engine const&) = delete;

    std::vector<std::string> names(bool inputs) const
    {
        std::vector<std::string> found;
        for (Buffer const& buffer : mBuffers)
        {
            if (buffer.isInput == inputs)
            {
                found.push_back(buffer.name);
            }
        }
        return found;
    }

    // Gives a raw file the shape that the engine's input has.
    void shapeRaw(std::string const& name, Array& array) const
    {
        std::vector<int64_t> item = sides(mEngine->getProfileShape(name.c_str(), 0, nvinfer1::OptProfileSelector::kOPT));
        item.front() = 1;
        int64_t const size = product(item);
        if (array.shape.empty())
        {
            int64_t const count = static_cast<int64_t>(array.values.size());
            if (size == 0 || count % size != 0)
            {
                throw Error(kBadInput,
                    "input " + name + " was given " + std::to_string(count) + " numbers, which is no multiple of the "
                        + std::to_string(size) + " that one item has");
            }
            item.front() = count / size;
            array.shape = item;
        }
        if (array.shape.size() != item.size() || array.shape.front() < 1)
        {
            throw Error(kBadInput, "input " + name + " has shape " + shapeText(array.shape) + ", but the engine wants "
                    + std::to_string(item.size()) + " dimensions and at least one item");
        }
    }

    // The batch for `items`: as asked, else the usual one, but no more than there are items, within what the engine takes.
    int64_t chooseBatch(std::string const& input, int64_t asked, int64_t items) const
    {
        auto const side = [&](nvinfer1::OptProfileSelector which) { return mEngine->getProfileShape(input.c_str(), 0, which).d[0]; };
        int64_t const smallest = side(nvinfer1::OptProfileSelector::kMIN);
        int64_t const largest = side(nvinfer1::OptProfileSelector::kMAX);
        if (asked != 0 && (asked < smallest || asked > largest))
        {
            throw Error(kBadInput,
                "--batch " + std::to_string(asked) + " was asked for, but the engine takes " + std::to_string(smallest) + " to "
                    + std::to_string(largest));
        }
        int64_t const usual = side(nvinfer1::OptProfileSelector::kOPT);
        return asked != 0 ? asked : std::max(smallest, std::min(usual, items));
    }

    // Binds inputs and buffers for a batch.
    void prepare(std::map<std::string, Array> const& inputs, int64_t batch)
    {
        for (Buffer& buffer : mBuffers)
        {
            if (buffer.isInput)
            {
                buffer.shape = inputs.at(buffer.name).shape;
                buffer.shape.front() = batch;
                if (!mContext->setInputShape(buffer.name.c_str(), dimsOf(buffer.shape)))
                {
                    throw Error(kBadInput, "the engine does not take input " + buffer.name + " of shape " + shapeText(buffer.shape));
                }
            }
        }
        for (Buffer& buffer : mBuffers)
        {
            if (!buffer.isInput)
            {
                buffer.shape = sides(mContext->getTensorShape(buffer.name.c_str()));
            }
            buffer.host.assign(static_cast<size_t>(product(buffer.shape) * elementBytes(buffer.type)), '\0');
            mDriver.release(buffer.pointer);
            buffer.pointer = mDriver.allocate(buffer.host.size());
            if (!mContext->setTensorAddress(buffer.name.c_str(), reinterpret_cast<void*>(buffer.pointer)))
            {
                throw Error(kBadInput, "TensorRT refuses the buffer of " + buffer.name + ": " + mLogger.last());
            }
        }
    }

    void fill(std::map<std::string, Array> const& inputs, int64_t first)
    {
        for (Buffer& buffer : mBuffers)
        {
            if (buffer.isInput)
            {
                mDriver.toDevice(buffer.pointer, encode(takeItems(inputs.at(buffer.name), first, buffer.shape.front()), buffer.type));
            }
        }
    }

    bool enqueue()
    {
        return mContext->enqueueV3(static_cast<cudaStream_t>(mStream));
    }

    void run()
    {
        if (!enqueue())
        {
            throw Error(kCheckFailed, "the engine failed to run: " + mLogger.last());
        }
        mDriver.synchronize(mStream);
    }

    // Runs all items, a batch at a time, and returns the outputs of all.
    std::map<std::string, Array> runAll(std::map<std::string, Array> const& inputs, int64_t batch)
    {
        int64_t const items = inputs.begin()->second.shape.front();
        prepare(inputs, batch);
        std::map<std::string, Array> outputs;
        for (int64_t first = 0; first < items; first += batch)
        {
            fill(inputs, first);
            run();
            int64_t const used = std::min(batch, items - first);
            for (Buffer& buffer : mBuffers)
            {
                if (buffer.isInput)
                {
                    continue;
                }
                mDriver.toHost(buffer.host, buffer.pointer);
                std::vector<float> const values = decode(buffer.host, buffer.type);
                Array& all = outputs[buffer.name];
                all.shape = buffer.shape;
                all.shape.front() = items;
                auto const end = values.begin() + static_cast<int64_t>(values.size()) / batch * used;
                all.values.insert(all.values.end(), values.begin(), end);
            }
        }
        return outputs;
    }

    Timing time(std::map<std::string, Array> const& inputs, Options const& options, int64_t batch)
    {
        prepare(inputs, batch);
        fill(inputs, 0);
        run();
        Handle const graph = options.graph ? mDriver.capture(mStream, [this] { return enqueue(); }) : nullptr;
        if (options.graph && graph == nullptr)
        {
            std::fprintf(stderr, "fna_runner: this engine cannot be captured as a CUDA graph; timing single launches\n");
        }
        auto const launch = [&]
        {
            if (graph != nullptr)
            {
                mDriver.launchGraph(graph, mStream);
            }
            else if (!enqueue())
            {
                throw Error(kCheckFailed, "the engine failed to run: " + mLogger.last());
            }
        };
        for (int64_t i = 0; i < options.warmUp; ++i)
        {
            launch();
        }
        mDriver.synchronize(mStream);
        std::vector<std::pair<Handle, Handle>> events;
        for (int64_t i = 0; i < options.runs; ++i)
        {
            events.emplace_back(mDriver.event(), mDriver.event());
        }
        auto const start = std::chrono::steady_clock::now();
        for (auto const& [before, after] : events)
        {
            mDriver.record(before, mStream);
            launch();
            mDriver.record(after, mStream);
        }
        mDriver.synchronize(mStream);
        std::chrono::duration<double> const elapsed = std::chrono::steady_clock::now() - start;
        std::vector<double> times;
        for (auto const& [before, after] : events)
        {
            times.push_back(mDriver.milliseconds(before, after));
        }
        std::sort(times.begin(), times.end());
        size_t const count = times.size();
        Timing timing;
        timing.batch = batch;
        timing.runs = options.runs;
        timing.graph = graph != nullptr;
        timing.median = count % 2 == 1 ? times[count / 2] : (times[count / 2 - 1] + times[count / 2]) / 2;
        timing.p99 = times[(count * 99 + 99) / 100 - 1];
        timing.perSecond = static_cast<double>(batch * options.runs) / elapsed.count();
        return timing;
    }

    void findLayers(std::vector<Layer>& layers) const
    {
        std::unique_ptr<nvinfer1::IEngineInspector> const inspector(mEngine->createEngineInspector());
        for (int32_t i = 0; inspector && i < mEngine->getNbLayers(); ++i)
        {
            char const* const text = inspector->getLayerInformation(i, nvinfer1::LayerInformationFormat::kJSON);
            for (Layer& layer : layers)
            {
                findLayer(layer, text == nullptr ? "" : text);
            }
        }
    }

    size_t bytes{0};
    size_t deviceMemory{0};

private:
    Driver& mDriver;
    Logger mLogger;
    std::unique_ptr<nvinfer1::IRuntime> mRuntime;
    std::unique_ptr<nvinfer1::ICudaEngine> mEngine;
    std::unique_ptr<nvinfer1::IExecutionContext> mContext;
    std::vector<Buffer> mBuffers;
    Handle mStream{nullptr};
};

// ------------------------------------------------------------------------------------------------------------------------ report

struct Report
{
    std::vector<std::pair<std::string, Difference>> differences;
    std::vector<Layer> layers;
    std::vector<std::string> failures;
    bool timed{false};
    Timing timing;
};

std::string jsonText(std::string const& text)
{
    std::string quoted = "\"";
    for (char const letter : text)
    {
        if (letter == '"' || letter == '\\')
        {
            quoted += '\\';
        }
        quoted += static_cast<unsigned char>(letter) < 0x20 ? ' ' : letter;
    }
    return quoted + '"';
}

std::string jsonNumber(double value)
{
    return std::isfinite(value) ? number("%.9g", value) : "null";
}

std::string toJson(Report const& report, Options const& options, Driver const* driver, Engine const* engine)
{
    std::string json = "{";
    if (driver != nullptr && engine != nullptr)
    {
        json += "\"device\": " + jsonText(driver->deviceName) + ", \"compute_capability\": " + jsonText(driver->capability)
            + ", \"cuda_driver\": " + jsonText(driver->cudaVersion) + ", \"tensorrt\": " + jsonText(tensorrtVersion())
            + ", \"engine\": " + jsonText(options.engine) + ", \"engine_bytes\": " + std::to_string(engine->bytes)
            + ", \"device_memory_bytes\": " + std::to_string(engine->deviceMemory) + ", ";
    }
    json += "\"relative_l2_tolerance\": " + jsonNumber(options.relativeL2) + ", \"cosine_tolerance\": " + jsonNumber(options.cosine)
        + ", \"outputs\": {";
    for (size_t i = 0; i < report.differences.size(); ++i)
    {
        auto const& [name, difference] = report.differences[i];
        json += (i == 0 ? "" : ", ") + jsonText(name) + ": {\"relative_l2\": " + jsonNumber(difference.relativeL2)
            + ", \"cosine\": " + jsonNumber(difference.cosine) + ", \"max_abs\": " + jsonNumber(difference.maxAbs)
            + ", \"not_finite\": " + std::to_string(difference.notFinite) + "}";
    }
    json += "}, \"plugin_layers\": {";
    for (size_t i = 0; i < report.layers.size(); ++i)
    {
        Layer const& layer = report.layers[i];
        json += (i == 0 ? "" : ", ") + jsonText(layer.name) + ": " + (layer.isPlugin ? jsonText(layer.found) : "null");
    }
    json += "}";
    if (report.timed)
    {
        Timing const& timing = report.timing;
        json += ", \"batch\": " + std::to_string(timing.batch) + ", \"runs\": " + std::to_string(timing.runs)
            + ", \"cuda_graph\": " + (timing.graph ? "true" : "false") + ", \"median_ms\": " + jsonNumber(timing.median)
            + ", \"p99_ms\": " + jsonNumber(timing.p99) + ", \"items_per_second\": " + jsonNumber(timing.perSecond);
    }
    json += ", \"failures\": [";
    for (size_t i = 0; i < report.failures.size(); ++i)
    {
        json += (i == 0 ? "" : ", ") + jsonText(report.failures[i]);
    }
    return json + "]}\n";
}

void printLayers(Report const& report)
{
    if (report.layers.empty())
    {
        return;
    }
    std::map<std::string, int> types;
    int plugins = 0;
    for (Layer const& layer : report.layers)
    {
        plugins += layer.isPlugin ? 1 : 0;
        if (layer.isPlugin)
        {
            ++types[layer.found.empty() ? "a type that the engine does not record" : layer.found];
        }
    }
    std::printf("plugin layers: %d of %zu", plugins, report.layers.size());
    for (auto const& [type, count] : types)
    {
        std::printf("; %d in %s", count, type.c_str());
    }
    std::printf("\n");
}

void compareOutputs(Report& report, Options const& options, std::map<std::string, Array> const& outputs)
{
    for (auto const& [given, path] : options.expected)
    {
        std::string const name = given.empty() && outputs.size() == 1 ? outputs.begin()->first : given;
        auto const found = outputs.find(name);
        if (found == outputs.end())
        {
            throw Error(kBadInput, "output " + name + " is expected, but there is none of that name");
        }
        Difference const difference = measure(name, readNpy(path), found->second);
        std::string const failure = verdict(name, difference, options.relativeL2, options.cosine);
        if (report.differences.empty())
        {
            std::printf("%-24s %10s %10s %10s\n", "output", "rel L2", "cosine", "max abs");
        }
        std::printf("%-24s %10.2e %10.6f %10.2e  %s\n", name.c_str(), difference.relativeL2, difference.cosine, difference.maxAbs,
            failure.empty() ? "ok" : "FAILED");
        report.differences.emplace_back(name, difference);
        if (!failure.empty())
        {
            report.failures.push_back(failure);
        }
    }
}

int finish(Report const& report, Options const& options, Driver const* driver, Engine const* engine)
{
    if (!options.json.empty())
    {
        writeFile(options.json, toJson(report, options, driver, engine));
    }
    for (std::string const& failure : report.failures)
    {
        std::fprintf(stderr, "fna_runner: %s\n", failure.c_str());
    }
    return report.failures.empty() ? kDone : kCheckFailed;
}

int compareFiles(Options const& options)
{
    std::map<std::string, Array> outputs;
    for (auto const& [name, path] : options.compare)
    {
        outputs[name] = readNpy(path);
    }
    Report report;
    compareOutputs(report, options, outputs);
    return finish(report, options, nullptr, nullptr);
}

int checkPlugin(Options const& options)
{
    // Opened first by itself: the dynamic linker says what is missing, TensorRT only that something is.
    std::string const path = options.checkPlugin.find('/') == std::string::npos ? "./" + options.checkPlugin : options.checkPlugin;
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        throw Error(kMissing, std::string("the plugin library does not load: ") + dlerror());
    }
    dlclose(library);
    requireTensorrtOfHeaders();
    if (getPluginRegistry() == nullptr || getPluginRegistry()->loadLibrary(path.c_str()) == nullptr)
    {
        throw Error(kMissing, path + " does not load into TensorRT " + tensorrtVersion());
    }
    std::printf("%s loads into TensorRT %s\n", path.c_str(), tensorrtVersion().c_str());
    return kDone;
}

std::map<std::string, Array> readInputs(Options const& options, Engine const& engine)
{
    std::vector<std::string> const names = engine.names(true);
    std::map<std::string, Array> inputs;
    for (auto const& [given, path] : options.inputs)
    {
        std::string const name = given.empty() && names.size() == 1 ? names.front() : given;
        if (std::find(names.begin(), names.end(), name) == names.end())
        {
            throw Error(kBadInput, "the engine has no input '" + name + "'; its first is '" + names.front() + "'");
        }
        inputs[name] = readArray(path);
        engine.shapeRaw(name, inputs[name]);
    }
    for (std::string const& name : names)
    {
        if (inputs.count(name) == 0)
        {
            throw Error(kBadInput, "input " + name + " is missing; give --input " + name + "=FILE");
        }
        if (inputs[name].shape.front() != inputs.begin()->second.shape.front())
        {
            throw Error(kBadInput, "input " + name + " has another number of items than " + inputs.begin()->first);
        }
    }
    return inputs;
}

int runEngine(Options const& options)
{
    if (!std::ifstream(options.engine))
    {
        throw Error(kBadInput, options.engine + " cannot be read; build it with build_engine.sh");
    }
    Driver driver;
    Engine engine(options, driver);
    std::printf("device: %s, compute capability %s, driver for CUDA %s; TensorRT %s\n", driver.deviceName.c_str(),
        driver.capability.c_str(), driver.cudaVersion.c_str(), tensorrtVersion().c_str());
    std::printf("engine: %s, %.1f MB; device memory once loaded: %.1f MB\n", options.engine.c_str(),
        static_cast<double>(engine.bytes) / 1e6, static_cast<double>(engine.deviceMemory) / 1e6);
    Report report;
    if (!options.pluginLayers.empty())
    {
        report.layers = readWantedLayers(options.pluginLayers);
        engine.findLayers(report.layers);
        report.failures = judgeLayers(report.layers);
        printLayers(report);
    }
    std::map<std::string, Array> const inputs = readInputs(options, engine);
    auto const& [input, first] = *inputs.begin();
    int64_t const batch = engine.chooseBatch(input, options.batch, first.shape.front());
    std::map<std::string, Array> const outputs = engine.runAll(inputs, batch);
    compareOutputs(report, options, outputs);
    for (auto const& [name, array] : outputs)
    {
        if (!options.output.empty())
        {
            std::string file = name;
            std::replace(file.begin(), file.end(), '/', '_');
            writeNpy(options.output + "/" + file + ".npy", array);
        }
    }
    if (options.runs > 0)
    {
        report.timed = true;
        report.timing = engine.time(inputs, options, engine.chooseBatch(input, options.batch, std::numeric_limits<int64_t>::max()));
        Timing const& timing = report.timing;
        std::printf("latency: batch %lld, median %.3f ms, p99 %.3f ms; %.1f items/s (%lld runs%s)\n",
            static_cast<long long>(timing.batch), timing.median, timing.p99, timing.perSecond, static_cast<long long>(timing.runs),
            timing.graph ? ", CUDA graph" : "");
    }
    return finish(report, options, &driver, &engine);
}

} // namespace

#ifndef FNA_RUNNER_NO_MAIN
int main(int argc, char** argv)
{
    std::vector<std::string> const arguments(argv + 1, argv + argc);
    if (arguments.empty() || arguments.front() == "--help" || arguments.front() == "-h")
    {
        std::printf("%s", kUsage);
        return arguments.empty() ? kBadInput : kDone;
    }
    try
    {
        Options const options = parse(arguments);
        if (!options.compare.empty())
        {
            return compareFiles(options);
        }
        return options.checkPlugin.empty() ? runEngine(options) : checkPlugin(options);
    }
    catch (Error const& error)
    {
        std::fprintf(stderr, "fna_runner: %s\n", error.what());
        return error.code;
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "fna_runner: %s\n", error.what());
        return kBadInput;
    }
}
#endif
