// What a launch plan is: which kernels run, in which order, with which grids, arguments and scratch; loading and running it.
// The plans themselves are the same arithmetic as fna/plugins/launch_plan.py, which explains them; a test compares every launch of
// the two. The numbers come from Python (launch_constants.hpp, written beside the kernel table).
#pragma once

#include "common/cuda_driver.hpp"
#include "launch_constants.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace fna
{

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
    kTileQueries,
    kTileKeys,
    kTileBias,
    kPlaces,
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
    kQuerySums,
    kHotScores,
    kCandidates,
    kHotValues,
    kHotTokens,
    kOffsets,
    kListed,
    kBiases,
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

    // A launch of `kernel` compiled for a type and, where not 0, for padded landmarks and a padded head size.
    void add(char const* kernel, Dtype dtype, int64_t landmarks, int64_t headSize, int64_t x, int64_t y,
        std::vector<Argument> arguments);
};

int64_t divideUp(int64_t value, int64_t by);

// Bytes of one element.
int64_t bytesOf(Dtype dtype);

// The offset of each buffer, aligned, one after the other; returns the size of all.
size_t layOut(std::initializer_list<std::pair<Slot, int64_t>> sizes, std::array<size_t, kSlots>& offsets);

// False, and logged with the value that is wrong.
bool checkAtLeastOne(char const* name, int64_t value) noexcept;
bool checkCount(int64_t landmarks, int64_t tokens) noexcept;
bool checkStride(char const* what, int64_t elements) noexcept;
bool checkHeadSize(int64_t headSize) noexcept;
bool checkHeads(int64_t batch, int64_t heads) noexcept;

// Load the plan's kernels. Not while a stream is captured.
bool loadPlan(Plan& plan, Device const& device) noexcept;

// Launch the kernels in order. `tensors` is indexed by Slot; its scratch entries are ignored.
bool runPlan(Plan const& plan, std::array<void const*, kSlots> tensors, void* workspace, CUstream stream) noexcept;

} // namespace fna
