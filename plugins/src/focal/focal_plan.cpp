#include "focal/focal_plan.hpp"

#include "common/logging.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <tuple>

namespace fna
{
namespace
{

int64_t paddedHeadSize(int64_t headSize)
{
    return *std::find_if(
        std::begin(kHeadPaddings), std::end(kHeadPaddings), [&](int64_t padding) { return padding >= headSize; });
}

int64_t rowBlocks(FocalShape const& shape)
{
    return divideUp(shape.tileRows, kFocalRows);
}

// Room for the hot keys and the list of one program.
int64_t rowLength(FocalShape const& shape)
{
    return kFirstKeys + divideUp(kMaxHot + shape.listLength, kListStep) * kListStep;
}

int64_t hotSplits(FocalShape const& shape, int64_t multiprocessors)
{
    int64_t const wanted = std::min(multiprocessors, kMaxMultiprocessors) / (shape.batch * shape.heads);
    int64_t const splits = std::min(wanted, divideUp(shape.tokens - shape.prefixTokens, kHotSplitTokens));
    return shape.hot > 0 && splits >= kFewestHotSplits ? splits : 1;
}

size_t focalBuffers(FocalShape const& shape, int64_t headSplits, std::array<size_t, kSlots>& offsets)
{
    int64_t const heads = shape.batch * shape.heads;
    int64_t const every = heads * shape.tokens * 4;
    int64_t const best = heads * kMaxHot * 4;
    int64_t const lists = heads * shape.tiles * rowBlocks(shape) * rowLength(shape) * 4;
    return layOut({{kQuerySums, headSplits * paddedHeadSize(shape.headSize) * 4}, {kHotScores, every}, {kCandidates, every},
                      {kHotValues, best}, {kHotTokens, best}, {kOffsets, every + best}, {kListed, lists},
                      {kBiases, lists}},
        offsets);
}

} // namespace

bool FocalShape::operator==(FocalShape const& other) const noexcept
{
    auto const all = [](FocalShape const& s) {
        return std::tie(s.dtype, s.batch, s.heads, s.tokens, s.headSize, s.tiles, s.tileRows, s.listLength, s.prefixTokens, s.hot,
            s.masked, s.sharedMask);
    };
    return all(*this) == all(other);
}

bool FocalAttributes::check() const noexcept
{
    if (!std::isfinite(scale))
    {
        logError("field scale is ", scale, ", but a finite number is needed");
        return false;
    }
    if (prefixTokens < 0)
    {
        logError("field prefix_tokens is ", prefixTokens, ", but at least 0 is needed");
        return false;
    }
    if (hot < 0 || hot > kMaxHot)
    {
        logError("field hot is ", hot, ", but 0 to ", kMaxHot, " are needed");
        return false;
    }
    return true;
}

bool checkShape(FocalShape const& shape) noexcept
{
    if (!checkAtLeastOne("B", shape.batch) || !checkAtLeastOne("H", shape.heads) || !checkAtLeastOne("N", shape.tokens)
        || !checkAtLeastOne("T", shape.tiles) || !checkAtLeastOne("Q", shape.tileRows) || !checkAtLeastOne("K", shape.listLength))
    {
        return false;
    }
    if (!checkHeadSize(shape.headSize))
    {
        return false;
    }
    if (shape.prefixTokens >= shape.tokens || shape.hot > shape.tokens - shape.prefixTokens)
    {
        logError(shape.prefixTokens, " prefix tokens and ", shape.hot, " hot keys were given, but there are ", shape.tokens, " tokens");
        return false;
    }
    if (!checkStride("N", shape.tokens) || !checkStride("H", shape.heads)
        || !checkStride("H * N * D", shape.heads * shape.tokens * shape.headSize) || !checkStride("T", shape.tiles)
        || !checkStride("Q", shape.tileRows) || !checkStride("K", shape.listLength)
        || !checkStride("T * Q", shape.tiles * shape.tileRows) || !checkStride("T * K", shape.tiles * shape.listLength))
    {
        return false;
    }
    int64_t const programs = shape.prefixTokens + shape.tiles * rowBlocks(shape);
    if (programs > kMaxGridY)
    {
        logError(programs, " programs a head are needed, but the kernels take at most ", kMaxGridY);
        return false;
    }
    return checkHeads(shape.batch, shape.heads);
}

Plan planLaunches(FocalShape const& shape, FocalAttributes const& attributes, int32_t multiprocessors)
{
    int64_t const bh = shape.batch * shape.heads;
    int64_t const blockD = paddedHeadSize(shape.headSize);
    int64_t const maskStride = shape.masked && !shape.sharedMask ? shape.tokens : 0;
    int64_t const maskMode = shape.masked ? kMaskAll : kNoMask;
    int64_t const strideN = shape.headSize;
    int64_t const strideH = shape.tokens * strideN;
    int64_t const strideB = shape.heads * strideH;
    int64_t const splits = hotSplits(shape, multiprocessors);
    int64_t const splitTokens = divideUp(shape.tokens - shape.prefixTokens, splits);
    bool const prepared = shape.hot > 0 || shape.masked;

    Plan plan;
    plan.workspace = focalBuffers(shape, bh * splits, plan.offsets);
    for (int64_t step = splits == 1 ? kAllSteps : kSum; prepared && step <= (splits == 1 ? kAllSteps : kSelect); ++step)
    {
        plan.add("focal_hot", shape.dtype, 0, blockD, bh, step < kSelect ? splits : 1,
            {kQuery, kKey, kKeyMask, kQuerySums, kHotScores, kCandidates, kHotValues, kHotTokens, kOffsets, shape.heads,
                shape.tokens, shape.prefixTokens, shape.hot, shape.headSize, strideB, strideH, strideN, maskStride, maskMode,
                splits, splitTokens, step, attributes.scale});
    }
    plan.add("focal", shape.dtype, 0, blockD, bh, shape.prefixTokens + shape.tiles * rowBlocks(shape),
        {kQuery, kKey, kValue, kTileQueries, kTileKeys, kTileBias, kKeyMask, kHotTokens, kOffsets, kListed, kBiases, kOut,
            shape.heads, shape.tokens, shape.prefixTokens, shape.hot, shape.headSize, strideB, strideH, strideN, strideB, strideH, strideN,
            maskStride, maskMode, rowBlocks(shape), shape.tileRows, shape.listLength, rowLength(shape),
            int64_t{prepared}, attributes.scale});
    return plan;
}

size_t workspaceBound(FocalShape const& shape, FocalAttributes const&)
{
    std::array<size_t, kSlots> offsets{};
    return focalBuffers(shape, std::max(kMaxMultiprocessors, shape.batch * shape.heads), offsets);
}

} // namespace fna
