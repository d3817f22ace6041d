#include "launch_plan.hpp"

#include "logging.hpp"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <utility>

namespace fna
{
namespace
{

constexpr int64_t kTile = 64;
constexpr int64_t kFinishColumns = 32;
constexpr int64_t kWaves = 2;
constexpr int64_t kMaxMultiprocessors = 256;
constexpr int64_t kFpsOneLaunchTokens = 1024;
constexpr int64_t kFpsOneLaunchBytes = 256 * 1024;
constexpr int64_t kFpsTile = 64;
constexpr size_t kAlignment = 256;
constexpr size_t kMaxArguments = 40;
constexpr int64_t kNoMask = 0;
constexpr int64_t kMaskAll = 1;
constexpr int64_t kMaskButSinks = 2;

using Sizes = std::initializer_list<std::pair<Slot, int64_t>>;

char const* nameOf(Dtype dtype)
{
    return dtype == Dtype::kFp32 ? "fp32" : dtype == Dtype::kFp16 ? "fp16" : "bf16";
}

int64_t bytesOf(Dtype dtype)
{
    return dtype == Dtype::kFp32 ? 4 : 2;
}

int64_t divideUp(int64_t value, int64_t by)
{
    return (value + by - 1) / by;
}

size_t aligned(size_t size)
{
    return (size + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t paddedLandmarks(int64_t count)
{
    return count <= kTile ? kTile : count <= 2 * kTile ? 2 * kTile : 4 * kTile;
}

int64_t paddedHeadSize(int64_t headSize)
{
    return headSize <= 64 ? 64 : 128;
}

bool inRegisters(Dtype dtype, int64_t sPad)
{
    return dtype != Dtype::kFp32 && sPad == kTile;
}

int64_t keyBlock(Dtype dtype, int64_t blockD)
{
    return dtype != Dtype::kFp32 ? 64 : blockD == 64 ? 32 : 16;
}

int64_t landmarkRows(Dtype dtype, int64_t sPad)
{
    return dtype == Dtype::kFp32 ? kTile : std::min(sPad, 2 * kTile);
}

int64_t queryBlock(Dtype dtype, int64_t blockD)
{
    return dtype == Dtype::kFp32 || blockD > 64 ? 64 : 128;
}

std::pair<int64_t, int64_t> splitKeys(AttentionShape const& shape, int64_t multiprocessors)
{
    int64_t const block = keyBlock(shape.dtype, paddedHeadSize(shape.headSize));
    int64_t const sPad = paddedLandmarks(shape.landmarks);
    int64_t const rowTiles = sPad / landmarkRows(shape.dtype, sPad);
    int64_t const blocks = divideUp(shape.tokens, block);
    int64_t const programs = shape.batch * shape.heads * rowTiles;
    int64_t const wanted = divideUp(kWaves * std::min(multiprocessors, kMaxMultiprocessors), programs);
    int64_t const perSplit = divideUp(blocks, std::min(blocks, std::max<int64_t>(1, wanted)));
    return {divideUp(blocks, perSplit), perSplit * block};
}

int64_t queryTiles(AttentionShape const& shape, int64_t multiprocessors)
{
    int64_t const tiles = divideUp(shape.tokens, queryBlock(shape.dtype, paddedHeadSize(shape.headSize)));
    int64_t const programs = tiles * shape.batch * shape.heads;
    int64_t const share = programs / (2 * kWaves * std::min(multiprocessors, kMaxMultiprocessors));
    return std::max<int64_t>(1, std::min<int64_t>(8, share));
}

size_t layOut(Sizes sizes, std::array<size_t, kSlots>& offsets)
{
    size_t offset = 0;
    for (auto const& [slot, size] : sizes)
    {
        offsets[slot] = offset;
        offset = aligned(offset + static_cast<size_t>(size));
    }
    return offset;
}

size_t attentionBuffers(AttentionShape const& shape, int64_t headSplits, std::array<size_t, kSlots>& offsets)
{
    int64_t const sPad = paddedLandmarks(shape.landmarks);
    int64_t const blockD = paddedHeadSize(shape.headSize);
    int64_t const rows = shape.batch * shape.heads * sPad;
    return layOut({{kPartial, headSplits * sPad * blockD * 4}, {kStats, headSplits * sPad * 2 * 4},
                      {kMatrices, rows * (inRegisters(shape.dtype, sPad) ? 2 : 5) * sPad * 4},
                      {kColsum, rows * (sPad / kTile) * 4}, {kExact, rows * blockD * 4},
                      {kMixed, rows * blockD * bytesOf(shape.dtype)}, {kMixedScale, shape.batch * shape.heads * blockD * 4},
                      {kBetween, rows * 2 * blockD * 4}},
        offsets);
}

std::string variantName(char const* kernel, Dtype dtype, int64_t landmarks, int64_t headSize)
{
    std::string name = std::string(kernel) + "-" + nameOf(dtype);
    if (landmarks != 0)
    {
        name += "-s" + std::to_string(landmarks);
    }
    if (headSize != 0)
    {
        name += "-d" + std::to_string(headSize);
    }
    return name;
}

Launch makeLaunch(std::string variant, int64_t x, int64_t y, std::vector<Argument> arguments)
{
    return Launch{std::move(variant), {static_cast<uint32_t>(x), static_cast<uint32_t>(y), 1U}, std::move(arguments)};
}

bool checkAtLeastOne(char const* name, int64_t value)
{
    if (value < 1)
    {
        logError(name, " is ", value, ", but at least 1 is needed");
    }
    return value >= 1;
}

bool checkCount(int64_t landmarks, int64_t tokens)
{
    int64_t const most = std::min(kMaxLandmarks, tokens);
    if (landmarks < 1 || landmarks > most)
    {
        logError(landmarks, " landmarks were given for ", tokens, " tokens, but the kernels take 1 to ", most);
        return false;
    }
    return true;
}

bool checkStride(char const* what, int64_t elements)
{
    if (elements > std::numeric_limits<int32_t>::max())
    {
        logError(what, " is ", elements, " elements, but the kernels take at most ", std::numeric_limits<int32_t>::max());
        return false;
    }
    return true;
}

} // namespace

bool checkShape(AttentionShape const& shape) noexcept
{
    if (!checkAtLeastOne("B", shape.batch) || !checkAtLeastOne("H", shape.heads) || !checkAtLeastOne("N", shape.tokens))
    {
        return false;
    }
    if (shape.headSize < 1 || shape.headSize > kMaxHeadSize || shape.headSize % kHeadSizeStep != 0)
    {
        logError("head size D is ", shape.headSize, ", but the kernels take multiples of ", kHeadSizeStep, " up to ", kMaxHeadSize);
        return false;
    }
    if (!checkCount(shape.landmarks, shape.tokens) || !checkStride("N", shape.tokens) || !checkStride("H", shape.heads)
        || !checkStride("H * N * D", shape.heads * shape.tokens * shape.headSize))
    {
        return false;
    }
    if (shape.batch > kMaxGridY || shape.batch * shape.heads > kMaxGridY)
    {
        logError("B * H is ", shape.batch, " * ", shape.heads, ", but the kernels take at most ", kMaxGridY);
        return false;
    }
    return true;
}

bool checkShape(SamplingShape const& shape) noexcept
{
    if (!checkAtLeastOne("B", shape.batch) || !checkAtLeastOne("N", shape.tokens) || !checkAtLeastOne("C", shape.channels))
    {
        return false;
    }
    if (shape.batch > kMaxGridY)
    {
        logError("B is ", shape.batch, ", but the kernels take at most ", kMaxGridY);
        return false;
    }
    return checkCount(shape.landmarks, shape.tokens) && checkStride("N", shape.tokens) && checkStride("C", shape.channels);
}

Plan planAttention(
    AttentionShape const& shape, float scale, int32_t iterations, bool exactRows, bool sink, int32_t multiprocessors)
{
    int64_t const sPad = paddedLandmarks(shape.landmarks);
    int64_t const blockD = paddedHeadSize(shape.headSize);
    int64_t const bh = shape.batch * shape.heads;
    auto const [splits, splitTokens] = splitKeys(shape, multiprocessors);
    int64_t const landmarkStride = shape.sharedLandmarks ? 0 : shape.landmarks;
    int64_t const biasStride = shape.sharedBias ? 0 : shape.landmarks;
    int64_t const maskStride = shape.masked && !shape.sharedMask ? shape.tokens : 0;
    int64_t const maskMode = !shape.masked ? kNoMask : sink ? kMaskButSinks : kMaskAll;
    int64_t const strideN = shape.headSize;
    int64_t const strideH = shape.tokens * strideN;
    int64_t const strideB = shape.heads * strideH;

    Plan plan;
    plan.workspace = attentionBuffers(shape, bh * splits, plan.offsets);
    int64_t const jobs = splits * (sPad / landmarkRows(shape.dtype, sPad));
    int64_t const tilesOfS = sPad / kTile;
    int64_t const steps = sPad > 2 * kTile ? 3 * (iterations - 1) + 2 : 1;
    for (int64_t step = 0; step < steps; ++step)
    {
        int64_t const firstJob = jobs * step / steps;
        int64_t const endJob = jobs * (step + 1) / steps;
        int64_t const corePrograms = tilesOfS <= 2 ? 1 : step == 0 ? tilesOfS : tilesOfS * tilesOfS;
        plan.launches.push_back(makeLaunch(variantName("landmark", shape.dtype, sPad, blockD), bh, corePrograms + endJob - firstJob,
            {kQuery, kKey, kValue, kLandmarks, kBias, kKeyMask, kPartial, kStats, kMatrices, kColsum, shape.heads, shape.tokens,
                shape.landmarks, shape.headSize, strideB, strideH, strideN, landmarkStride, biasStride, maskStride, maskMode,
                splits, splitTokens, firstJob, step, static_cast<int64_t>(iterations - 1), scale}));
    }
    plan.launches.push_back(makeLaunch(variantName("finish", shape.dtype, sPad, 0), bh, blockD / kFinishColumns,
        {kPartial, kStats, kMatrices, kColsum, kExact, kMixed, kMixedScale, kBetween, splits, shape.landmarks, blockD,
            static_cast<int64_t>(iterations == 1 ? 1 : 0)}));
    int64_t const tiles = queryTiles(shape, multiprocessors);
    // Sinks: all rows without the masked keys, then the rows of the masked queries with them.
    for (int64_t mode = std::min(maskMode, kMaskAll); mode <= maskMode; ++mode)
    {
        plan.launches.push_back(makeLaunch(variantName("output", shape.dtype, sPad, blockD),
            divideUp(shape.tokens, tiles * queryBlock(shape.dtype, blockD)), bh,
            {kQuery, kKey, kLandmarks, kBias, kKeyMask, kExact, kMixed, kMixedScale, kOut, shape.heads, shape.tokens,
                shape.landmarks, shape.headSize, strideB, strideH, strideN, strideB, strideH, strideN, landmarkStride, biasStride,
                maskStride, mode, tiles, static_cast<int64_t>(exactRows ? 1 : 0), scale}));
    }
    return plan;
}

Plan planSampling(SamplingShape const& shape)
{
    int64_t const vectors = shape.channels % 16 == 0 ? 16 : 0;
    Plan plan;
    if (shape.tokens <= kFpsOneLaunchTokens && shape.tokens * shape.channels * bytesOf(shape.dtype) <= kFpsOneLaunchBytes)
    {
        plan.launches.push_back(makeLaunch(variantName("fps", shape.dtype, 0, vectors), shape.batch, 1,
            {kFeatures, kLandmarks, shape.tokens, shape.channels, shape.landmarks}));
        return plan;
    }
    int64_t const tiles = divideUp(shape.tokens, kFpsTile);
    plan.workspace = layOut({{kDistance, shape.batch * shape.tokens * 4}, {kBest, shape.batch * 2 * tiles * 4},
                                {kBestIndex, shape.batch * 2 * tiles * 4}},
        plan.offsets);
    for (int64_t step = 0; step < shape.landmarks; ++step)
    {
        plan.launches.push_back(makeLaunch(variantName("fps_step", shape.dtype, 0, vectors), tiles, shape.batch,
            {kFeatures, kLandmarks, kDistance, kBest, kBestIndex, shape.tokens, shape.channels, shape.landmarks, step}));
    }
    return plan;
}

size_t workspaceBound(AttentionShape const& shape)
{
    int64_t const sPad = paddedLandmarks(shape.landmarks);
    int64_t const rowTiles = sPad / landmarkRows(shape.dtype, sPad);
    int64_t const most = divideUp(kWaves * kMaxMultiprocessors, rowTiles) + shape.batch * shape.heads;
    std::array<size_t, kSlots> offsets{};
    return attentionBuffers(shape, most, offsets);
}

size_t workspaceBound(SamplingShape const& shape)
{
    // At its largest where every image takes the path of many launches.
    int64_t const tiles = divideUp(shape.tokens, kFpsTile);
    std::array<size_t, kSlots> offsets{};
    return layOut({{kDistance, shape.batch * shape.tokens * 4}, {kBest, shape.batch * 2 * tiles * 4},
                      {kBestIndex, shape.batch * 2 * tiles * 4}},
        offsets);
}

bool loadPlan(Plan& plan, Device const& device) noexcept
{
    for (Launch& launch : plan.launches)
    {
        if (!loadKernel(launch.variant.c_str(), device, launch.kernel))
        {
            return false;
        }
    }
    return true;
}

bool runPlan(Plan const& plan, std::array<void const*, kSlots> tensors, void* workspace, CUstream stream) noexcept
{
    for (size_t slot = kPartial; slot < kSlots; ++slot)
    {
        tensors[slot] = static_cast<char*>(workspace) + plan.offsets[slot];
    }
    for (Launch const& launch : plan.launches)
    {
        void const* arguments[kMaxArguments];
        if (launch.arguments.size() > kMaxArguments)
        {
            logError("kernel ", launch.variant, " has ", launch.arguments.size(), " arguments, but at most ", kMaxArguments);
            return false;
        }
        for (size_t i = 0; i < launch.arguments.size(); ++i)
        {
            Argument const& argument = launch.arguments[i];
            arguments[i] = argument.kind == Argument::Kind::kAddress ? static_cast<void const*>(&tensors[argument.slot])
                : argument.kind == Argument::Kind::kInteger         ? static_cast<void const*>(&argument.integer)
                                                                    : static_cast<void const*>(&argument.real);
        }
        if (!launchKernel(launch.kernel, launch.grid, arguments, stream))
        {
            return false;
        }
    }
    return true;
}

} // namespace fna
