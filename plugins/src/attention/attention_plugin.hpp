// FastNystromAttention as a TensorRT plugin.
//
// Inputs: query, key, value [B, H, N, D] of one type (fp32, fp16, bf16); landmarks [B, S] or [1, S] int32; landmark_bias [B, S]
// or [1, S] fp32; from version 2 on, optionally, key_mask [B, N] or [1, N] int32. Output: [B, H, N, D] of the query's type. All linear.
//
// Version 1 has no key_mask and no field sink, version 2 no core, steps and low; engines built with them keep finding them. All
// versions run the same kernels, whose scratch fna/plugins/kernels/attention.py describes.
#pragma once

#include "attention/attention_plan.hpp"
#include "common/plugin_base.hpp"

namespace fna
{

class AttentionPlugin final : public PluginBase<AttentionPlugin, AttentionShape, AttentionAttributes>
{
public:
    static constexpr char const* kName = "FastNystromAttention";
    static constexpr TensorFacts kInputs[] = {
        {"query", 4, ElementType::kFloating, kQuery},
        {"key", 4, ElementType::kFloating, kKey},
        {"value", 4, ElementType::kFloating, kValue},
        {"landmarks", 2, ElementType::kInt32, kLandmarks},
        {"landmark_bias", 2, ElementType::kFloat32, kBias},
        {"key_mask", 2, ElementType::kInt32, kKeyMask},
    };
    static constexpr TensorFacts kOutput{"out", 4, ElementType::kFloating, kOut};

    using PluginBase::PluginBase;

    static constexpr int32_t fewestInputs() noexcept
    {
        return 5;
    }

    static constexpr int32_t mostInputs(AttentionAttributes const& attributes) noexcept
    {
        return attributes.versionNumber > 1 ? 6 : 5;
    }

    bool readShape(nvinfer1::Dims const* dims, int32_t count, AttentionShape& shape) const noexcept;

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
};

} // namespace fna
