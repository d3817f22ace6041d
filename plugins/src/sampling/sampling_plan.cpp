#include "sampling/sampling_plan.hpp"

#include "common/logging.hpp"

#include <tuple>

namespace fna
{
namespace
{

// Of the path of many launches.
size_t samplingBuffers(SamplingShape const& shape, std::array<size_t, kSlots>& offsets)
{
    int64_t const bests = shape.batch * 2 * divideUp(shape.tokens, kFpsTile) * 4;
    return layOut({{kDistance, shape.batch * shape.tokens * 4}, {kBest, bests}, {kBestIndex, bests}}, offsets);
}

} // namespace

bool SamplingShape::operator==(SamplingShape const& other) const noexcept
{
    auto const all = [](SamplingShape const& s) { return std::tie(s.dtype, s.batch, s.tokens, s.channels, s.landmarks); };
    return all(*this) == all(other);
}

bool SamplingAttributes::check() const noexcept
{
    if (numLandmarks < 1 || numLandmarks > kMaxLandmarks)
    {
        logError("field num_landmarks is ", numLandmarks, ", but 1 to ", kMaxLandmarks, " are needed");
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

Plan planLaunches(SamplingShape const& shape, SamplingAttributes const&, int32_t)
{
    int64_t const vectors = shape.channels % 16 == 0 ? 16 : 0;
    Plan plan;
    if (shape.tokens <= kFpsOneLaunchTokens && shape.tokens * shape.channels * bytesOf(shape.dtype) <= kFpsOneLaunchBytes)
    {
        plan.add("fps", shape.dtype, 0, vectors, shape.batch, 1,
            {kFeatures, kLandmarks, shape.tokens, shape.channels, shape.landmarks});
        return plan;
    }
    plan.workspace = samplingBuffers(shape, plan.offsets);
    for (int64_t step = 0; step < shape.landmarks; ++step)
    {
        plan.add("fps_step", shape.dtype, 0, vectors, divideUp(shape.tokens, kFpsTile), shape.batch,
            {kFeatures, kLandmarks, kDistance, kBest, kBestIndex, shape.tokens, shape.channels, shape.landmarks, step});
    }
    return plan;
}

size_t workspaceBound(SamplingShape const& shape, SamplingAttributes const&)
{
    // At its largest where every image takes the path of many launches.
    std::array<size_t, kSlots> offsets{};
    return samplingBuffers(shape, offsets);
}

} // namespace fna
