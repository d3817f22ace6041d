// FarthestPointSampling as a TensorRT plugin.
//
// Input: features [B, N, C] (fp32, fp16, bf16), linear. Output: landmarks [B, S] int32, S = num_landmarks.
// Workspace: distance [B, N] fp32, best and best_index [B, 2, tiles], each aligned to 256 bytes.
#pragma once

#include "plugin_base.hpp"

#include <string>

namespace fna
{

struct SamplingAttributes
{
    int32_t numLandmarks{0};
};

class SamplingPlugin final : public PluginBase<SamplingPlugin>
{
public:
    static constexpr char const* kName = "FarthestPointSampling";

    explicit SamplingPlugin(SamplingAttributes const& attributes);
    SamplingPlugin(SamplingPlugin const&) = delete;
    SamplingPlugin& operator=(SamplingPlugin const&) = delete;

    SamplingAttributes const& attributes() const noexcept
    {
        return mAttributes;
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    bool readShape(nvinfer1::Dims const& dims, nvinfer1::DataType type, SamplingShape& shape) const noexcept;
    bool prepare(nvinfer1::PluginTensorDesc const* in) noexcept;

    SamplingAttributes mAttributes;
    std::string mTimingCacheId;
    nvinfer1::PluginField mFields[1];
    nvinfer1::PluginFieldCollection mCollection{};
    SamplingShape mShape{};
    Device mDevice{};
    Plan mPlan{};
    bool mReady{false};
};

class SamplingCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    SamplingCreator();

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    nvinfer1::PluginField mFields[1];
    nvinfer1::PluginFieldCollection mCollection;
};

} // namespace fna
