#include "attention/attention_plugin.hpp"

#include <algorithm>

namespace fna
{
namespace
{

using namespace nvinfer1;

constexpr int32_t kQueryInput = 0;
constexpr int32_t kLandmarksInput = 3;
constexpr int32_t kBiasInput = 4;
constexpr int32_t kKeyMaskInput = 5;

// Build time: what is constant in the shapes can be refused already.
bool checkKnownSizes(DimsExprs const* inputs) noexcept
{
    auto const knownOr = [](IDimensionExpr const* dimension, int64_t otherwise) {
        int64_t const value = constantOr(dimension);
        return value == -1 ? otherwise : value;
    };
    AttentionShape shape;
    shape.batch = 1;
    shape.heads = knownOr(inputs[kQueryInput].d[1], 1);
    shape.landmarks = knownOr(inputs[kLandmarksInput].d[1], 1);
    shape.tokens = knownOr(inputs[kQueryInput].d[2], std::max(shape.landmarks, kMaxLandmarks));
    shape.headSize = knownOr(inputs[kQueryInput].d[3], kHeadSizeStep);
    return checkShape(shape);
}

} // namespace

bool AttentionPlugin::readShape(Dims const* dims, int32_t count, AttentionShape& shape) const noexcept
{
    Dims const& query = dims[kQueryInput];
    for (int32_t i = 1; i < kLandmarksInput; ++i)
    {
        for (int32_t axis = 0; axis < query.nbDims; ++axis)
        {
            if (dims[i].d[axis] != query.d[axis])
            {
                logError(kInputs[i].name, " has size ", dims[i].d[axis], " on axis ", axis, ", but query has ", query.d[axis],
                    "; FNA is self-attention, so they must be equal");
                return false;
            }
        }
    }
    shape.batch = query.d[0];
    shape.heads = query.d[1];
    shape.tokens = query.d[2];
    shape.headSize = query.d[3];
    shape.landmarks = dims[kLandmarksInput].d[1];
    for (int32_t i = kLandmarksInput; i < count; ++i)
    {
        if (dims[i].d[0] != 1 && dims[i].d[0] != shape.batch)
        {
            logError(kInputs[i].name, " has ", dims[i].d[0], " rows, but 1 or B = ", shape.batch, " are needed");
            return false;
        }
    }
    if (dims[kBiasInput].d[1] != shape.landmarks)
    {
        logError("landmark_bias has ", dims[kBiasInput].d[1], " columns, but there are ", shape.landmarks, " landmarks");
        return false;
    }
    shape.sharedLandmarks = dims[kLandmarksInput].d[0] == 1;
    shape.sharedBias = dims[kBiasInput].d[0] == 1;
    shape.masked = count > kKeyMaskInput;
    if (shape.masked && dims[kKeyMaskInput].d[1] != shape.tokens)
    {
        logError("key_mask has ", dims[kKeyMaskInput].d[1], " columns, but there are ", shape.tokens, " tokens");
        return false;
    }
    shape.sharedMask = shape.masked && dims[kKeyMaskInput].d[0] == 1;
    return true;
}

int32_t AttentionPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    return guarded("getOutputShapes", kFailed, [&] {
        if (!checkNumbers(nbInputs, nbOutputs) || !checkRanks(inputs, nbInputs) || !checkKnownSizes(inputs))
        {
            return kFailed;
        }
        outputs[0] = inputs[kQueryInput];
        return kOk;
    });
}

} // namespace fna
