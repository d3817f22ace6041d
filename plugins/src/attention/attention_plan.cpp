#include "attention/attention_plan.hpp"

#include "common/logging.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <tuple>
#include <vector>

namespace fna
{
namespace
{

// The smallest blocks of the type that hold the call.
Blocks const& blocksOf(AttentionShape const& shape)
{
    return *std::find_if(std::begin(kBlocks), std::end(kBlocks), [&](Blocks const& blocks) {
        return blocks.dtype == static_cast<int32_t>(shape.dtype) && blocks.landmarks >= shape.landmarks
            && blocks.headSize >= shape.headSize;
    });
}

int64_t rowTiles(Blocks const& blocks)
{
    return blocks.landmarks / blocks.landmarkRows;
}

// When the last program of a launch ends: each goes, in order, to the multiprocessor that is free first.
int64_t endOfPrograms(std::initializer_list<std::pair<int64_t, int64_t>> programs, int64_t multiprocessors)
{
    std::vector<int64_t> const idle(static_cast<size_t>(multiprocessors), 0);
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> free(idle.begin(), idle.end());
    int64_t last = 0;
    for (auto const& [count, length] : programs)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            int64_t const end = free.top() + length;
            free.pop();
            free.push(end);
            last = std::max(last, end);
        }
    }
    return last;
}

// Splits, and tokens of each: the fewest of those that end soonest.
std::pair<int64_t, int64_t> splitKeys(AttentionShape const& shape, bool chebyshev, int64_t multiprocessors)
{
    Blocks const& blocks = blocksOf(shape);
    int64_t const keyBlocks = divideUp(shape.tokens, blocks.keyBlock);
    int64_t const there = std::min(multiprocessors, kMaxMultiprocessors);
    int64_t const heads = shape.batch * shape.heads;
    int64_t const programs = heads * rowTiles(blocks);
    CoreBlocks const& core = chebyshev ? blocks.chebyshev : blocks.newtonSchulz;
    int64_t const most = divideUp(kWaves * (core.length != 0 ? kMaxMultiprocessors : there), programs);
    int64_t const joining = divideUp(heads * (blocks.headSize / (chebyshev ? kChebyshevColumns : kFinishColumns)), there);
    auto const end = [&](int64_t perSplit) {
        int64_t const splits = divideUp(keyBlocks, perSplit);
        int64_t const whole = core.splitStart + 10 * perSplit;
        int64_t const last = core.splitStart + 10 * (keyBlocks - (splits - 1) * perSplit);
        return endOfPrograms({{heads, core.length}, {programs * (splits - 1), whole}, {programs, last}}, there)
            + kSplitJoined * splits * joining;
    };
    int64_t const shortest = divideUp(keyBlocks, std::min(keyBlocks, most));
    int64_t best = core.length != 0 ? keyBlocks : shortest;
    int64_t const step = divideUp(keyBlocks, kSplitSizes);
    for (int64_t perSplit = best - step; perSplit >= shortest; perSplit -= step)
    {
        best = end(perSplit) < end(best) ? perSplit : best;
    }
    return {divideUp(keyBlocks, best), best * blocks.keyBlock};
}

// The middle and half the width of the spectrum that the steps are for: fna.attention.chebyshev_interval.
std::pair<double, double> chebyshevInterval(AttentionAttributes const& attributes)
{
    constexpr double pi = 3.14159265358979323846;
    double const cosine = std::cos(pi / (2 * attributes.steps));
    double const low = attributes.low;
    double const high = (2 - low * (1 - cosine)) / (1 + cosine);
    return {(high + low) / 2, (high - low) / 2};
}

int64_t queryTiles(AttentionShape const& shape, int64_t multiprocessors)
{
    Blocks const& blocks = blocksOf(shape);
    int64_t const tiles = divideUp(shape.tokens, blocks.queryBlock);
    int64_t const there = std::min(multiprocessors, kMaxMultiprocessors);
    auto const halfTiles = [&](int64_t share) {
        int64_t const rounds = divideUp(divideUp(tiles, share) * shape.batch * shape.heads, there);
        return rounds * (2 * share + blocks.queryPrologue);
    };
    int64_t best = 1;
    for (int64_t share = 2; share <= kMaxQueryTiles; ++share)
    {
        best = halfTiles(share) < halfTiles(best) ? share : best;
    }
    return best;
}

size_t attentionBuffers(AttentionShape const& shape, bool chebyshev, int64_t headSplits, std::array<size_t, kSlots>& offsets)
{
    Blocks const& blocks = blocksOf(shape);
    CoreBlocks const& core = chebyshev ? blocks.chebyshev : blocks.newtonSchulz;
    int64_t const sPad = blocks.landmarks;
    int64_t const blockD = blocks.headSize;
    int64_t const rows = shape.batch * shape.heads * sPad;
    return layOut({{kPartial, headSplits * sPad * blockD * 4}, {kStats, headSplits * sPad * 2 * 4},
                      {kMatrices, rows * core.matrices * sPad * 4}, {kColsum, rows * (sPad / kTile) * 4},
                      {kExact, rows * blockD * 4}, {kMixed, rows * blockD * bytesOf(shape.dtype)},
                      {kMixedScale, shape.batch * shape.heads * blockD * 4}, {kBetween, rows * (chebyshev ? 3 : 2) * blockD * 4}},
        offsets);
}

} // namespace

bool AttentionShape::operator==(AttentionShape const& other) const noexcept
{
    auto const all = [](AttentionShape const& s) {
        return std::tie(s.dtype, s.batch, s.heads, s.tokens, s.headSize, s.landmarks, s.sharedLandmarks, s.sharedBias, s.masked,
            s.sharedMask);
    };
    return all(*this) == all(other);
}

bool AttentionAttributes::check() const noexcept
{
    if (!std::isfinite(scale))
    {
        logError("field scale is ", scale, ", but a finite number is needed");
        return false;
    }
    if (iterations < 1 || iterations > kMaxIterations)
    {
        logError("field iterations is ", iterations, ", but 1 to ", kMaxIterations, " are needed");
        return false;
    }
    if (core != kNewtonSchulz && core != kChebyshev)
    {
        logError("field core is ", core, ", but ", kNewtonSchulz, " or ", kChebyshev, " is needed");
        return false;
    }
    if (chebyshev() && (steps < 1 || steps > kMaxChebyshevSteps))
    {
        logError("field steps is ", steps, ", but 1 to ", kMaxChebyshevSteps, " are needed");
        return false;
    }
    if (chebyshev() && !(low > 0.F && low < 1.F))
    {
        logError("field low is ", low, ", but a number above 0 and below 1 is needed");
        return false;
    }
    for (auto const& [name, value] : {std::pair{"exact_rows", exactRows}, std::pair{"sink", sink}})
    {
        if (value != 0 && value != 1)
        {
            logError("field ", name, " is ", value, ", but 0 or 1 is needed");
            return false;
        }
    }
    return true;
}

bool checkShape(AttentionShape const& shape) noexcept
{
    if (!checkAtLeastOne("B", shape.batch) || !checkAtLeastOne("H", shape.heads) || !checkAtLeastOne("N", shape.tokens))
    {
        return false;
    }
    if (!checkHeadSize(shape.headSize) || !checkCount(shape.landmarks, shape.tokens) || !checkStride("N", shape.tokens) || !checkStride("H", shape.heads)
        || !checkStride("H * N * D", shape.heads * shape.tokens * shape.headSize))
    {
        return false;
    }
    return checkHeads(shape.batch, shape.heads);
}

Plan planLaunches(AttentionShape const& shape, AttentionAttributes const& attributes, int32_t multiprocessors)
{
    Blocks const& blocks = blocksOf(shape);
    int64_t const sPad = blocks.landmarks;
    int64_t const blockD = blocks.headSize;
    int64_t const bh = shape.batch * shape.heads;
    auto const [splits, splitTokens] = splitKeys(shape, attributes.chebyshev(), multiprocessors);
    int64_t const landmarkStride = shape.sharedLandmarks ? 0 : shape.landmarks;
    int64_t const biasStride = shape.sharedBias ? 0 : shape.landmarks;
    int64_t const maskStride = shape.masked && !shape.sharedMask ? shape.tokens : 0;
    int64_t const maskMode = !shape.masked ? kNoMask : attributes.sink != 0 ? kMaskButSinks : kMaskAll;
    int64_t const strideN = shape.headSize;
    int64_t const strideH = shape.tokens * strideN;
    int64_t const strideB = shape.heads * strideH;
    int64_t const iterations = attributes.iterations;

    Plan plan;
    bool const chebyshev = attributes.chebyshev();
    plan.workspace = attentionBuffers(shape, chebyshev, bh * splits, plan.offsets);
    int64_t const jobs = splits * rowTiles(blocks);
    int64_t const tilesOfS = sPad / kTile;
    int64_t const products = chebyshev ? 1 : 3 * (iterations - 1) + 1; // that depend on one another
    int64_t const steps = sPad > 2 * kTile ? 1 + products : 1;
    for (int64_t step = 0; step < steps; ++step)
    {
        int64_t const firstJob = jobs * step / steps;
        int64_t const endJob = jobs * (step + 1) / steps;
        int64_t const corePrograms = tilesOfS <= 2 ? 1 : step == 0 ? tilesOfS : tilesOfS * tilesOfS;
        plan.add(chebyshev ? "landmark_chebyshev" : "landmark", shape.dtype, sPad, blockD, bh, corePrograms + endJob - firstJob,
            {kQuery, kKey, kValue, kLandmarks, kBias, kKeyMask, kPartial, kStats, kMatrices, kColsum, shape.heads, shape.tokens,
                shape.landmarks, shape.headSize, strideB, strideH, strideN, landmarkStride, biasStride, maskStride, maskMode,
                splits, splitTokens, firstJob, step, iterations - 1, attributes.scale});
    }
    if (chebyshev)
    {
        auto const [middle, halfWidth] = chebyshevInterval(attributes);
        plan.add("finish_chebyshev", shape.dtype, sPad, 0, bh, blockD / kChebyshevColumns,
            {kPartial, kStats, kMatrices, kColsum, kExact, kMixed, kMixedScale, kBetween, kValue, kLandmarks, shape.heads,
                shape.tokens, shape.landmarks, shape.headSize, blockD, strideB, strideH, strideN, landmarkStride, splits,
                int64_t{attributes.steps}, static_cast<float>(middle), static_cast<float>(middle / halfWidth),
                static_cast<float>(halfWidth)});
    }
    else
    {
        plan.add("finish", shape.dtype, sPad, 0, bh, blockD / kFinishColumns,
            {kPartial, kStats, kMatrices, kColsum, kExact, kMixed, kMixedScale, kBetween, splits, shape.landmarks, blockD,
                int64_t{iterations == 1}});
    }
    int64_t const tiles = queryTiles(shape, multiprocessors);
    // Sinks: all rows without the masked keys, then the rows of the masked queries with them.
    for (int64_t mode = std::min(maskMode, kMaskAll); mode <= maskMode; ++mode)
    {
        plan.add("output", shape.dtype, sPad, blockD, divideUp(shape.tokens, tiles * blocks.queryBlock), bh,
            {kQuery, kKey, kLandmarks, kBias, kKeyMask, kExact, kMixed, kMixedScale, kOut, shape.heads, shape.tokens,
                shape.landmarks, shape.headSize, strideB, strideH, strideN, strideB, strideH, strideN, landmarkStride, biasStride,
                maskStride, mode, tiles, int64_t{attributes.exactRows}, attributes.scale});
    }
    return plan;
}

size_t workspaceBound(AttentionShape const& shape, AttentionAttributes const& attributes)
{
    int64_t const most = divideUp(kWaves * kMaxMultiprocessors, rowTiles(blocksOf(shape))) + shape.batch * shape.heads;
    std::array<size_t, kSlots> offsets{};
    return attentionBuffers(shape, attributes.chebyshev(), most, offsets);
}

} // namespace fna
