#include "focal/focal_plugin.hpp"

namespace fna
{
namespace
{

using namespace nvinfer1;

constexpr int32_t kQueryInput = 0;
constexpr int32_t kTileQueriesInput = 3;
constexpr int32_t kTileKeysInput = 4;
constexpr int32_t kTileBiasInput = 5;
constexpr int32_t kPlacesInput = 6;
constexpr int32_t kKeyMaskInput = 7;

bool checkEqual(char const* name, int32_t axis, int64_t size, int64_t wanted) noexcept
{
    if (size != wanted)
    {
        logError(name, " has size ", size, " on axis ", axis, ", but ", wanted, " is needed");
    }
    return size == wanted;
}

} // namespace

bool FocalPlugin::readShape(Dims const* dims, int32_t count, FocalShape& shape) const noexcept
{
    Dims const& query = dims[kQueryInput];
    shape.batch = query.d[0];
    shape.heads = query.d[1];
    shape.tokens = query.d[2];
    shape.headSize = query.d[3];
    shape.tiles = dims[kTileQueriesInput].d[0];
    shape.tileRows = dims[kTileQueriesInput].d[1];
    shape.listLength = dims[kTileKeysInput].d[1];
    shape.prefixTokens = mAttributes.prefixTokens;
    shape.hot = mAttributes.hot;
    shape.masked = count > kKeyMaskInput;
    for (int32_t i = 1; i < kTileQueriesInput; ++i)
    {
        for (int32_t axis = 0; axis < query.nbDims; ++axis)
        {
            if (!checkEqual(kInputs[i].name, axis, dims[i].d[axis], query.d[axis]))
            {
                return false;
            }
        }
    }
    if (!checkEqual("tile_keys", 0, dims[kTileKeysInput].d[0], shape.tiles)
        || !checkEqual("tile_bias", 0, dims[kTileBiasInput].d[0], shape.tiles)
        || !checkEqual("tile_bias", 1, dims[kTileBiasInput].d[1], shape.listLength)
        || !checkEqual("places", 0, dims[kPlacesInput].d[0], shape.tokens - shape.prefixTokens))
    {
        return false;
    }
    if (shape.masked)
    {
        Dims const& mask = dims[kKeyMaskInput];
        shape.sharedMask = mask.d[0] == 1;
        return (shape.sharedMask || checkEqual("key_mask", 0, mask.d[0], shape.batch))
            && checkEqual("key_mask", 1, mask.d[1], shape.tokens);
    }
    return true;
}

int32_t FocalPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
    int32_t nbOutputs, IExprBuilder&) noexcept
{
    return guarded("getOutputShapes", kFailed, [&] {
        if (!checkNumbers(nbInputs, nbOutputs) || !checkRanks(inputs, nbInputs))
        {
            return kFailed;
        }
        // Build time: what is constant in the shapes can be refused already.
        int64_t const headSize = constantOr(inputs[kQueryInput].d[3]);
        int64_t const tokens = constantOr(inputs[kQueryInput].d[2]);
        int64_t const places = constantOr(inputs[kPlacesInput].d[0]);
        bool const known = tokens != -1 && places != -1;
        if ((headSize != -1 && !checkHeadSize(headSize))
            || (known && !checkEqual("places", 0, places, tokens - mAttributes.prefixTokens)))
        {
            return kFailed;
        }
        outputs[0] = inputs[kQueryInput];
        return kOk;
    });
}

} // namespace fna
