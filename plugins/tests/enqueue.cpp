// Run one enqueue with made-up addresses, for the stand-in driver to record (fake_cuda.cpp).
//   enqueue LIBRARY attention TYPE B H N D S LANDMARK_ROWS BIAS_ROWS SCALE ITERATIONS EXACT_ROWS [MASK_ROWS SINK [STEPS LOW]]
//   enqueue LIBRARY focal TYPE B H N D TILES TILE_ROWS LIST_LENGTH PREFIX HOT SCALE MASK_ROWS
//   enqueue LIBRARY sampling TYPE B N C S
// With MASK_ROWS the plugin is of version 2, with STEPS of version 3 and its core chebyshev; 0 rows leave its key_mask out. TYPE is TensorRT's DataType as a number. Input i lies at (i + 1) << 32, the output at 100 << 32, the workspace at 200 << 32.
// Prints the workspace size, the log, and how many kernels came from where; ends with the plugin's status.
#include "check.hpp"
#include "host.hpp"

#include <cstring>

using namespace nvinfer1;

namespace
{

void* address(uint64_t number)
{
    return reinterpret_cast<void*>(number << 32);
}

host::Tensor tensor(DataType type, std::vector<int64_t> const& sizes, uint64_t number)
{
    host::Tensor made{static_cast<int32_t>(type), static_cast<int32_t>(sizes.size()), {}, address(number)};
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        made.dims[i] = sizes[i];
    }
    return made;
}

int run(host::Library& library, IPluginV3* plugin, std::vector<host::Tensor> const& inputs, host::Tensor const& output)
{
    if (plugin == nullptr)
    {
        std::fputs(library.logger().take().c_str(), stdout);
        return 1;
    }
    host::PluginPointer const owner(plugin);
    int32_t const count = static_cast<int32_t>(inputs.size());
    std::printf("workspace %zu\n", fna_host_workspace(plugin, inputs.data(), count, &output));
    int32_t status = fna_host_prepare(plugin, inputs.data(), count, &output);
    for (int round = 0; round < 2 && status == 0; ++round) // the second launches the same again, loading nothing
    {
        status = fna_host_enqueue(plugin, inputs.data(), count, &output, address(200), address(300));
    }
    std::fputs(library.logger().take().c_str(), stdout);
    int32_t compiled = 0;
    int32_t fromPtx = 0;
    reinterpret_cast<void (*)(int32_t*, int32_t*)>(library.find("fnaCountKernels"))(&compiled, &fromPtx);
    std::printf("kernels: %d compiled, %d from PTX\n", compiled, fromPtx);
    return status == 0 ? 0 : 1;
}

} // namespace

int main(int argc, char** argv)
{
    CHECK(argc >= 8);
    host::Library library(argv[1]);
    auto const type = static_cast<DataType>(std::atoi(argv[3]));
    auto number = [&](int i) { return std::atoll(argv[i]); };
    if (std::strcmp(argv[2], "attention") == 0)
    {
        CHECK(argc == 14 || argc == 16 || argc == 18);
        std::vector<int64_t> const linear{number(4), number(5), number(6), number(7)};
        std::vector<host::Tensor> inputs{tensor(type, linear, 1), tensor(type, linear, 2), tensor(type, linear, 3),
            tensor(DataType::kINT32, {number(9), number(8)}, 4), tensor(DataType::kFLOAT, {number(10), number(8)}, 5)};
        float const scale = std::strtof(argv[11], nullptr);
        auto const iterations = static_cast<int32_t>(number(12));
        auto const exactRows = static_cast<int32_t>(number(13));
        if (argc == 14)
        {
            return run(library, fna_host_attention(&library, scale, iterations, exactRows), inputs, tensor(type, linear, 100));
        }
        if (number(14) > 0)
        {
            inputs.push_back(tensor(DataType::kINT32, {number(14), number(6)}, 6));
        }
        auto const sink = static_cast<int32_t>(number(15));
        IPluginV3* const plugin = argc == 16
            ? fna_host_masked_attention(&library, scale, iterations, exactRows, sink)
            : fna_host_chebyshev_attention(
                &library, scale, exactRows, sink, static_cast<int32_t>(number(16)), std::strtof(argv[17], nullptr));
        return run(library, plugin, inputs, tensor(type, linear, 100));
    }
    if (std::strcmp(argv[2], "focal") == 0)
    {
        CHECK(argc == 15);
        std::vector<int64_t> const linear{number(4), number(5), number(6), number(7)};
        std::vector<host::Tensor> inputs{tensor(type, linear, 1), tensor(type, linear, 2), tensor(type, linear, 3),
            tensor(DataType::kINT32, {number(8), number(9)}, 4), tensor(DataType::kINT32, {number(8), number(10)}, 5),
            tensor(DataType::kFLOAT, {number(8), number(10)}, 6), tensor(DataType::kINT32, {number(6) - number(11)}, 7)};
        if (number(14) > 0)
        {
            inputs.push_back(tensor(DataType::kINT32, {number(14), number(6)}, 8));
        }
        IPluginV3* const plugin = fna_host_focal(
            &library, std::strtof(argv[13], nullptr), static_cast<int32_t>(number(11)), static_cast<int32_t>(number(12)),
            number(14) > 0);
        return run(library, plugin, inputs, tensor(type, linear, 100));
    }
    CHECK(argc == 8);
    std::vector<host::Tensor> const inputs{tensor(type, {number(4), number(5), number(6)}, 1)};
    IPluginV3* const plugin = fna_host_sampling(&library, static_cast<int32_t>(number(7)));
    return run(library, plugin, inputs, tensor(DataType::kINT32, {number(4), number(7)}, 100));
}
