// Hostile field collections. Usage: fuzz_fields LIBRARY SEED COUNT; or, with a fuzzing engine, LLVMFuzzerTestOneInput and the
// library's path in FNA_PLUGIN. Whatever the fields are, createPlugin returns nullptr or a plugin whose own fields make another.
#include "check.hpp"
#include "host.hpp"

#include <cstring>
#include <random>

using namespace nvinfer1;

namespace
{

host::Library& library(char const* path = nullptr)
{
    static host::Library instance(path != nullptr ? path : std::getenv("FNA_PLUGIN"));
    return instance;
}

class Bytes
{
public:
    Bytes(uint8_t const* data, size_t size)
        : mData(data)
        , mSize(size)
    {
    }
    uint8_t next()
    {
        return mAt < mSize ? mData[mAt++] : uint8_t{0};
    }

private:
    uint8_t const* mData;
    size_t mSize;
    size_t mAt{0};
};

constexpr char const* kNames[]
    = {"scale", "iterations", "exact_rows", "num_landmarks", "plugin_version", "", nullptr, "Scale", "sink", "scale", "core",
        "steps", "low", "prefix_tokens", "hot"};
constexpr PluginFieldType kTypes[] = {PluginFieldType::kFLOAT32, PluginFieldType::kINT32, PluginFieldType::kCHAR,
    PluginFieldType::kFLOAT64, PluginFieldType::kINT64, PluginFieldType::kUNKNOWN, static_cast<PluginFieldType>(99)};
constexpr int32_t kLengths[] = {1, 1, 1, 1, 0, 2, -1, 2147483647};
constexpr int32_t kValues[] = {1, 6, 0, 64, -1, 256, 257, static_cast<int32_t>(0x7FC00000), static_cast<int32_t>(0x7F800000),
    static_cast<int32_t>(0x3E000000), 2147483647, static_cast<int32_t>(0x80000000)};

template <typename Values>
auto pick(Values const& values, uint8_t byte)
{
    return values[byte % (sizeof values / sizeof values[0])];
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    Bytes bytes(data, size);
    uint8_t const kind = bytes.next() % 6;
    char const* const plugin
        = kind < 3 ? "FastNystromAttention" : kind == 3 ? "FarthestPointSampling" : "FocalAttention";
    char const* const version = kind == 1 || kind == 5 ? "2" : kind == 2 ? "3" : "1";
    int32_t const count = bytes.next() % 6;
    std::vector<std::unique_ptr<int32_t>> storage; // each value alone in its allocation, so that a read past it is seen
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i)
    {
        char const* const name = pick(kNames, bytes.next());
        PluginFieldType const type = pick(kTypes, bytes.next() % 3 == 0 ? bytes.next() : (name != nullptr && std::strcmp(name, "scale") == 0 ? 0 : 1));
        int32_t const length = pick(kLengths, bytes.next());
        storage.push_back(std::make_unique<int32_t>(pick(kValues, bytes.next())));
        fields.emplace_back(name, bytes.next() % 8 == 0 ? nullptr : storage.back().get(), type, length);
    }
    PluginFieldCollection collection{count, bytes.next() % 16 == 0 ? nullptr : fields.data()};
    if (bytes.next() % 16 == 0)
    {
        collection.nbFields = -3;
    }
    IPluginCreatorV3One* const creator = library().creator(plugin, version);
    host::PluginPointer const made(
        creator->createPlugin(plugin, bytes.next() % 32 == 0 ? nullptr : &collection, TensorRTPhase::kBUILD));
    if (made != nullptr)
    {
        host::PluginPointer const again(
            creator->createPlugin(plugin, host::runtime(*made)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
        CHECK(again != nullptr);
        CHECK(std::strcmp(host::build(*made)->getTimingCacheID(), host::build(*again)->getTimingCacheID()) == 0);
    }
    else
    {
        CHECK(!library().logger().take().empty()); // a refusal says why
    }
    library().logger().take();
    return 0;
}

#ifndef FNA_FUZZING_ENGINE
int main(int argc, char** argv)
{
    CHECK(argc == 4);
    library(argv[1]);
    std::mt19937 random(static_cast<unsigned>(std::atoi(argv[2])));
    for (int round = 0; round < std::atoi(argv[3]); ++round)
    {
        uint8_t data[48];
        for (uint8_t& byte : data)
        {
            byte = static_cast<uint8_t>(random());
        }
        LLVMFuzzerTestOneInput(data, sizeof data);
    }
    std::puts("fuzzed");
    return 0;
}
#endif
