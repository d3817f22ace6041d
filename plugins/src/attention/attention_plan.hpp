// The launches of FastNystromAttention.
#pragma once

#include "common/launch_plan.hpp"

namespace fna
{

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

    bool operator==(AttentionShape const& other) const noexcept;
};

constexpr char const* kNewtonSchulz = "newton_schulz";
constexpr char const* kChebyshev = "chebyshev";

// What the node asks for beside its tensors. Version 2 has a mask and what queries do with it, version 3 also a choice of the core.
struct AttentionAttributes
{
    float scale{0.F};
    int32_t iterations{kImpliedIterations};
    int32_t exactRows{0};
    int32_t sink{0};
    std::string core{kNewtonSchulz};
    int32_t steps{0}; // of Chebyshev
    float low{0.F};
    int32_t versionNumber{1};

    // Every field of this version, in order: visit(name, value, whether it has to be given).
    template <typename Self, typename Visit>
    static void fields(Self& self, Visit&& visit)
    {
        visit("scale", self.scale, true);
        visit("iterations", self.iterations, false);
        visit("exact_rows", self.exactRows, false);
        if (self.versionNumber > 1)
        {
            visit("sink", self.sink, false);
        }
        if (self.versionNumber > 2)
        {
            visit("core", self.core, false);
            visit("steps", self.steps, false);
            visit("low", self.low, false);
        }
    }

    char const* version() const noexcept
    {
        return versionNumber > 2 ? "3" : versionNumber > 1 ? "2" : "1";
    }

    bool chebyshev() const noexcept
    {
        return core == kChebyshev;
    }

    // False, and logged with the value that is wrong.
    bool check() const noexcept;
};

// False, and logged with the value that is wrong, for sizes that the kernels do not take.
bool checkShape(AttentionShape const& shape) noexcept;

Plan planLaunches(AttentionShape const& shape, AttentionAttributes const& attributes, int32_t multiprocessors);

// Scratch that is enough for `shape`, everything smaller, and every GPU.
size_t workspaceBound(AttentionShape const& shape, AttentionAttributes const& attributes);

} // namespace fna
