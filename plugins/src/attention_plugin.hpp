// FastNystromAttention as a TensorRT plugin.
//
// Inputs: query, key, value [B, H, N, D] of one type (fp32, fp16, bf16); landmarks [B, S] or [1, S] int32; landmark_bias [B, S]
// or [1, S] fp32; in version 2, optionally, key_mask [B, N] or [1, N] int32. Output: [B, H, N, D] of the query's type. All linear.
//
// Version 1 has no key_mask and no field sink; engines built with it keep finding it. Both versions run the same kernels.
// Workspace: partial, stats, matrices, colsum, exact, mixed, mixed_scale, between, in this order, each aligned to 256 bytes;
// fna/plugins/kernels/attention.py has their layouts.
#pragma once

#include "plugin_base.hpp"

#include <string>

namespace fna
{

struct AttentionAttributes
{
    float scale{0.F};
    int32_t iterations{6};
    int32_t exactRows{0};
    int32_t sink{0};
    bool takesMask{false}; // version 2
};

class AttentionPlugin final : public PluginBase<AttentionPlugin>
{
public:
    static constexpr char const* kName = "FastNystromAttention";

    static constexpr char const* kMaskVersion = "2";

    explicit AttentionPlugin(AttentionAttributes const& attributes);
    AttentionPlugin(AttentionPlugin const&) = delete;
    AttentionPlugin& operator=(AttentionPlugin const&) = delete;

    AttentionAttributes const& attributes() const noexcept
    {
        return mAttributes;
    }

    char const* getPluginVersion() const noexcept override;
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
    bool takes(int32_t nbInputs) const noexcept;
    bool checkNumbers(int32_t nbInputs, int32_t nbOutputs) const noexcept;
    bool prepare(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs) noexcept;

    AttentionAttributes mAttributes;
    std::string mTimingCacheId;
    nvinfer1::PluginField mFields[4];
    nvinfer1::PluginFieldCollection mCollection{};
    AttentionShape mShape{};
    Device mDevice{};
    Plan mPlan{};
    int32_t mInputs; // onShapeChange says how many; until then as many as there can be
    bool mReady{false};
};

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit AttentionCreator(bool takesMask);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    bool mTakesMask;
    nvinfer1::PluginField mFields[4];
    nvinfer1::PluginFieldCollection mCollection;
};

} // namespace fna
