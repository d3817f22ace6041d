// FarthestPointSampling as a TensorRT plugin.
//
// Input: features [B, N, C] (fp32, fp16, bf16), linear. Output: landmarks [B, S] int32, S = num_landmarks.
#pragma once

#include "common/plugin_base.hpp"
#include "sampling/sampling_plan.hpp"

namespace fna
{

class SamplingPlugin final : public PluginBase<SamplingPlugin, SamplingShape, SamplingAttributes>
{
public:
    static constexpr char const* kName = "FarthestPointSampling";
    static constexpr TensorFacts kInputs[] = {{"features", 3, ElementType::kFloating, kFeatures}};
    static constexpr TensorFacts kOutput{"landmarks", 2, ElementType::kInt32, kLandmarks};

    using PluginBase::PluginBase;

    static constexpr int32_t fewestInputs() noexcept
    {
        return 1;
    }

    static constexpr int32_t mostInputs(SamplingAttributes const&) noexcept
    {
        return 1;
    }

    bool readShape(nvinfer1::Dims const* dims, int32_t count, SamplingShape& shape) const noexcept;

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
};

} // namespace fna
