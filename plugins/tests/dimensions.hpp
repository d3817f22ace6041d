// The builder's dimensions as TensorRT's own classes give them to a plugin.
#pragma once

#include <NvInferImpl.h>
#include <NvInferRuntime.h>

#include <deque>

constexpr int64_t kSymbolic = -1;

// Dimensions of the builder: constants, or symbols such as a dynamic batch.
class Dimension final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr
{
public:
    explicit Dimension(int64_t value)
        : mValue(value)
    {
        nvinfer1::IDimensionExpr::mImpl = this;
    }
    bool isConstant() const override
    {
        return mValue != kSymbolic;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t mValue;
};

class Builder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder
{
public:
    Builder()
    {
        nvinfer1::IExprBuilder::mImpl = this;
    }
    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        return &mDimensions.emplace_back(value);
    }
    nvinfer1::IDimensionExpr const* operation(
        nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return constant(kSymbolic);
    }
    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return constant(kSymbolic);
    }

private:
    std::deque<Dimension> mDimensions;
};
