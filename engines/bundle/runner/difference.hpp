// How far an output is from what was recorded.
#pragma once

#include "arrays.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace runner
{

struct Difference
{
    double relativeL2{0};
    double cosine{0};
    double maxAbs{0};
    int64_t notFinite{0};
};

inline Difference measure(std::string const& name, Array const& expected, Array const& actual)
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

// Why an output fails, or nothing. Written so that NaN fails.
inline std::string verdict(std::string const& name, Difference const& difference, double relativeL2, double cosine)
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

} // namespace runner
