// The launches of FocalAttention.
#pragma once

#include "common/launch_plan.hpp"

namespace fna
{

struct FocalShape
{
    Dtype dtype{Dtype::kFp32};
    int64_t batch{0};
    int64_t heads{0};
    int64_t tokens{0};
    int64_t headSize{0};
    int64_t tiles{0};
    int64_t tileRows{0};
    int64_t listLength{0};
    int64_t prefixTokens{0};
    int64_t hot{0};
    bool masked{false};
    bool sharedMask{false};

    bool operator==(FocalShape const& other) const noexcept;
};

// Version 2 has a key mask.
struct FocalAttributes
{
    float scale{0.F};
    int32_t prefixTokens{0};
    int32_t hot{0};
    int32_t versionNumber{1};

    // Every field, in order: visit(name, value, whether it has to be given).
    template <typename Self, typename Visit>
    static void fields(Self& self, Visit&& visit)
    {
        visit("scale", self.scale, true);
        visit("prefix_tokens", self.prefixTokens, true);
        visit("hot", self.hot, false);
    }

    char const* version() const noexcept
    {
        return versionNumber > 1 ? "2" : "1";
    }

    // False, and logged with the value that is wrong.
    bool check() const noexcept;
};

// False, and logged with the value that is wrong, for sizes that the kernels do not take.
bool checkShape(FocalShape const& shape) noexcept;

Plan planLaunches(FocalShape const& shape, FocalAttributes const& attributes, int32_t multiprocessors);

// Scratch that is enough for `shape`, everything smaller, and every GPU.
size_t workspaceBound(FocalShape const& shape, FocalAttributes const& attributes);

} // namespace fna
