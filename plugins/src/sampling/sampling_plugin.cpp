#include "sampling/sampling_plugin.hpp"

namespace fna
{

using namespace nvinfer1;

bool SamplingPlugin::readShape(Dims const* dims, int32_t, SamplingShape& shape) const noexcept
{
    shape.batch = dims[0].d[0];
    shape.tokens = dims[0].d[1];
    shape.channels = dims[0].d[2];
    shape.landmarks = mAttributes.numLandmarks;
    return true;
}

int32_t SamplingPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept
{
    return guarded("getOutputShapes", kFailed, [&] {
        if (!checkNumbers(nbInputs, nbOutputs) || !checkRanks(inputs, nbInputs))
        {
            return kFailed;
        }
        int64_t const tokens = constantOr(inputs[0].d[1]);
        SamplingShape shape;
        shape.batch = 1;
        shape.channels = 1;
        shape.landmarks = mAttributes.numLandmarks;
        shape.tokens = tokens == -1 ? kMaxLandmarks : tokens;
        if (!checkShape(shape))
        {
            return kFailed;
        }
        outputs[0].nbDims = 2;
        outputs[0].d[0] = inputs[0].d[0];
        outputs[0].d[1] = exprBuilder.constant(mAttributes.numLandmarks);
        return kOk;
    });
}

} // namespace fna
