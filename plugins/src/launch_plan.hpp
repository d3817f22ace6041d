// Which kernels run, in which order, with which grids, arguments and scratch. The same arithmetic as fna/plugins/plan.py, which
// explains it; a test compares every launch of the two.
#pragma once

#include "cuda_driver.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fna
{

constexpr int64_t kMaxLandmarks = 256;
constexpr int64_t kMaxHeadSize = 128;
constexpr int64_t kHeadSizeStep = 16;
constexpr int64_t kMaxIterations = 64;
constexpr int64_t kMaxGridY = 65535;

enum class Dtype : int32_t
{
    kFp32,
    kFp16,
    kBf16,
};

struct AttentionShape
{
    Dtype dtype{Dtype::kFp32};
    int64_t batch{0};
    int64_t heads{0};
    int64_t tokens{0};
    int64_t headSize{0};
    int64_t landmarks{0};
    bool sharedLandmarks{false};
    bool sharedBias{false};
    bool masked{false};
    bool sharedMask{false};
};

struct SamplingShape
{
    Dtype dtype{Dtype::kFp32};
    int64_t batch{0};
    int64_t tokens{0};
    int64_t channels{0};
    int64_t landmarks{0};
};

// Tensors and scratch buffers that a launch can name.
enum Slot : uint8_t
{
    kQuery,
    kKey,
    kValue,
    kLandmarks,
    kBias,
    kKeyMask, // null where nothing is masked: the kernels do not read it then
    kOut,
    kFeatures,
    kPartial, // from here on: scratch
    kStats,
    kMatrices,
    kColsum,
    kExact,
    kMixed,
    kMixedScale,
    kBetween,
    kDistance,
    kBest,
    kBestIndex,
    kSlots,
};

struct Argument
{
    enum class Kind : uint8_t
    {
        kAddress,
        kInteger,
        kReal,
    };

    Argument(Slot s)
        : kind(Kind::kAddress)
        , slot(s)
    {
    }
    Argument(int64_t value)
        : kind(Kind::kInteger)
        , integer(static_cast<int32_t>(value))
    {
    }
    Argument(float value)
        : kind(Kind::kReal)
        , real(value)
    {
    }

    Kind kind;
    Slot slot{kSlots};
    int32_t integer{0};
    float real{0.F};
};

struct Launch
{
    std::string variant;
    uint32_t grid[3];
    std::vector<Argument> arguments;
    LoadedKernel kernel{};
};

struct Plan
{
    std::vector<Launch> launches;
    std::array<size_t, kSlots> offsets{}; // of scratch buffers, in bytes
    size_t workspace{0};
};

// False, and logged with the value that is wrong, for sizes that the kernels do not take.
bool checkShape(AttentionShape const& shape) noexcept;
bool checkShape(SamplingShape const& shape) noexcept;

Plan planAttention(
    AttentionShape const& shape, float scale, int32_t iterations, bool exactRows, bool sink, int32_t multiprocessors);
Plan planSampling(SamplingShape const& shape);

// Scratch that is enough for `shape`, everything smaller, and every GPU.
size_t workspaceBound(AttentionShape const& shape);
size_t workspaceBound(SamplingShape const& shape);

// Load the plan's kernels. Not while a stream is captured.
bool loadPlan(Plan& plan, Device const& device) noexcept;

// Launch the kernels in order. `tensors` is indexed by Slot; its scratch entries are ignored.
bool runPlan(Plan const& plan, std::array<void const*, kSlots> tensors, void* workspace, CUstream stream) noexcept;

} // namespace fna
