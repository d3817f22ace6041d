// How far an output is from what was recorded.
#pragma once

#include "arrays.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace runner
{

struct Difference
{
    double relativeL2{0};
    double cosine{0};
    double maxAbs{0};
    int64_t notFinite{0};
    double rowCosine{0};   // mean over rows along the last axis
    double rowCosineP5{0}; // 5th percentile of them
    double correlation{0}; // smallest of an item
    double regret{0};      // largest of a row: how far below the best value that of the row's best place is, in standard deviations
};

// A measure by the name that a bundle gives it, and whether its tolerance is the largest value or the smallest.
struct Measure
{
    char const* name;
    char const* title;
    double Difference::*value;
    bool largest;
};

constexpr Measure kMeasures[] = {
    {"row_cosine", "row cosine", &Difference::rowCosine, false},
    {"row_cosine_p5", "row cosine p5", &Difference::rowCosineP5, false},
    {"correlation", "correlation", &Difference::correlation, false},
    {"relative_l2", "relative L2 error", &Difference::relativeL2, true},
    {"regret", "regret", &Difference::regret, true},
};

inline Measure const* findMeasure(std::string const& name)
{
    for (Measure const& each : kMeasures)
    {
        if (name == each.name)
        {
            return &each;
        }
    }
    return nullptr;
}

// What an output is held to instead of relative L2 and cosine.
struct TaskTolerance
{
    std::string output;
    Measure const* measure;
    double limit;
};

struct Span
{
    float const* expected;
    float const* actual;
    size_t size;
};

// Cosine of two vectors less their means, or less nothing; 1 where both are zero, 0 where one is.
inline double cosineOf(Span const& span, bool centred)
{
    double meanExpected = 0;
    double meanActual = 0;
    for (size_t i = 0; centred && i < span.size; ++i)
    {
        meanExpected += span.expected[i] / static_cast<double>(span.size);
        meanActual += span.actual[i] / static_cast<double>(span.size);
    }
    double dot = 0;
    double squaredExpected = 0;
    double squaredActual = 0;
    bool equal = true;
    for (size_t i = 0; i < span.size; ++i)
    {
        double const e = span.expected[i] - meanExpected;
        double const a = span.actual[i] - meanActual;
        equal = equal && e == a;
        dot += e * a;
        squaredExpected += e * e;
        squaredActual += a * a;
    }
    double const norms = std::sqrt(squaredExpected) * std::sqrt(squaredActual);
    return norms > 0 ? dot / norms : (equal ? 1.0 : 0.0);
}

inline double regretOf(Span const& span)
{
    size_t const chosen = std::max_element(span.actual, span.actual + span.size) - span.actual;
    double const lost = static_cast<double>(*std::max_element(span.expected, span.expected + span.size)) - span.expected[chosen];
    double mean = 0;
    double variance = 0;
    for (size_t i = 0; i < span.size; ++i)
    {
        mean += span.expected[i] / static_cast<double>(span.size);
    }
    for (size_t i = 0; i < span.size; ++i)
    {
        variance += (span.expected[i] - mean) * (span.expected[i] - mean) / static_cast<double>(span.size);
    }
    return lost > 0 ? lost / (variance > 0 ? std::sqrt(variance) : 1.0) : 0.0;
}

inline double percentile5(std::vector<double> values)
{
    std::sort(values.begin(), values.end());
    double const place = 0.05 * static_cast<double>(values.size() - 1);
    auto const below = static_cast<size_t>(place);
    double const next = values[std::min(below + 1, values.size() - 1)];
    return values[below] + (next - values[below]) * (place - static_cast<double>(below));
}

inline void measureRows(Array const& expected, Array const& actual, Difference& difference)
{
    size_t const total = expected.values.size();
    auto const items = static_cast<size_t>(expected.shape.front());
    auto const width = static_cast<size_t>(expected.shape.back());
    std::vector<double> cosines;
    for (size_t start = 0; start < total; start += width)
    {
        Span const row{&expected.values[start], &actual.values[start], width};
        cosines.push_back(cosineOf(row, false));
        difference.rowCosine += cosines.back() * static_cast<double>(width) / static_cast<double>(total);
        difference.regret = std::max(difference.regret, regretOf(row));
    }
    difference.rowCosineP5 = percentile5(cosines);
    difference.correlation = 1;
    for (size_t item = 0; item < items; ++item)
    {
        size_t const start = item * (total / items);
        Span const whole{&expected.values[start], &actual.values[start], total / items};
        difference.correlation = std::min(difference.correlation, cosineOf(whole, true));
    }
}

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
    if (difference.notFinite == 0 && !expected.values.empty())
    {
        measureRows(expected, actual, difference);
    }
    return difference;
}

// Why an output fails, or nothing: by its task where that is known. Written so that NaN fails.
inline std::string verdict(std::string const& name, Difference const& difference, double relativeL2, double cosine,
    std::vector<TaskTolerance> const& tasks)
{
    if (difference.notFinite > 0)
    {
        return "output " + name + " holds " + std::to_string(difference.notFinite) + " NaN or infinite values";
    }
    bool known = false;
    for (TaskTolerance const& task : tasks)
    {
        if (task.output == name)
        {
            known = true;
            double const value = difference.*task.measure->value;
            if (!(task.measure->largest ? value <= task.limit : value >= task.limit))
            {
                return "output " + name + " has " + task.measure->title + " " + number("%.6g", value) + " (tolerance "
                    + number("%g", task.limit) + ")";
            }
        }
    }
    if (known)
    {
        return {};
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
