// The launches of FarthestPointSampling.
#pragma once

#include "common/launch_plan.hpp"

namespace fna
{

struct SamplingShape
{
    Dtype dtype{Dtype::kFp32};
    int64_t batch{0};
    int64_t tokens{0};
    int64_t channels{0};
    int64_t landmarks{0};

    bool operator==(SamplingShape const& other) const noexcept;
};

struct SamplingAttributes
{
    int32_t numLandmarks{0};

    // Every field, in order: visit(name, value, whether it has to be given).
    template <typename Self, typename Visit>
    static void fields(Self& self, Visit&& visit)
    {
        visit("num_landmarks", self.numLandmarks, true);
    }

    char const* version() const noexcept
    {
        return "1";
    }

    // False, and logged with the value that is wrong.
    bool check() const noexcept;
};

// False, and logged with the value that is wrong, for sizes that the kernels do not take.
bool checkShape(SamplingShape const& shape) noexcept;

Plan planLaunches(SamplingShape const& shape, SamplingAttributes const& attributes, int32_t multiprocessors);

// Scratch that is enough for `shape` and everything smaller.
size_t workspaceBound(SamplingShape const& shape, SamplingAttributes const& attributes);

} // namespace fna
