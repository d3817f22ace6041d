// FocalAttention as a TensorRT plugin.
//
// Inputs: query, key, value [B, H, N, D] of one type (fp32, fp16, bf16); tile_queries [T, Q] int32; tile_keys [T, K] int32; tile_bias
// [T, K] fp32; places [N - prefix_tokens] int32, which standard operators need and the kernels do not; from version 2 on,
// optionally, key_mask [B, N] or [1, N] int32. Output: [B, H, N, D] of the query's type. All linear.
#pragma once

#include "common/plugin_base.hpp"
#include "focal/focal_plan.hpp"

namespace fna
{

class FocalPlugin final : public PluginBase<FocalPlugin, FocalShape, FocalAttributes>
{
public:
    static constexpr char const* kName = "FocalAttention";
    static constexpr TensorFacts kInputs[] = {
        {"query", 4, ElementType::kFloating, kQuery},
        {"key", 4, ElementType::kFloating, kKey},
        {"value", 4, ElementType::kFloating, kValue},
        {"tile_queries", 2, ElementType::kInt32, kTileQueries},
        {"tile_keys", 2, ElementType::kInt32, kTileKeys},
        {"tile_bias", 2, ElementType::kFloat32, kTileBias},
        {"places", 1, ElementType::kInt32, kPlaces},
        {"key_mask", 2, ElementType::kInt32, kKeyMask},
    };
    static constexpr TensorFacts kOutput{"out", 4, ElementType::kFloating, kOut};

    using PluginBase::PluginBase;

    static constexpr int32_t fewestInputs() noexcept
    {
        return 7;
    }

    static constexpr int32_t mostInputs(FocalAttributes const& attributes) noexcept
    {
        return attributes.versionNumber > 1 ? 8 : 7;
    }

    bool readShape(nvinfer1::Dims const* dims, int32_t count, FocalShape& shape) const noexcept;

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
};

} // namespace fna
