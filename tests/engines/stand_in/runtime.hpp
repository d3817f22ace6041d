// A stand-in for TensorRT's runtime, for the runner's own logic where there is no GPU: an "engine" that doubles its input.
//
// Input `x` [-1, 4] fp16, profile 1, 2, 3; output `doubled` [-1, 4] fp32, computed on the stand-in driver's memory, which is the host's.
// The file's first line says what it is: "doubles", "halves" (wrong outputs), "compatible" (with host code of its
// own), or anything else (refused). Two layers: /blocks.0/fna is
// a plugin layer in fp16, /blocks.1/fna is not. Every method that the runner does not call ends the process (stubs.hpp, generated
// from TensorRT's headers).
#pragma once

#include "stubs.hpp"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace stand_in
{

using namespace nvinfer1;

inline float fromHalf(uint16_t half) // normal numbers and zero only
{
    int const exponent = (half >> 10) & 0x1F;
    float const magnitude = exponent == 0 ? 0.F : std::ldexp(1.F + static_cast<float>(half & 0x3FF) / 1024.F, exponent - 15);
    return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

struct ContextImpl : VExecutionContextStub
{
    bool setInputShape(char const*, Dims const& dims) noexcept override
    {
        mBatch = dims.d[0];
        std::printf("stand-in context: batch %d\n", static_cast<int>(mBatch));
        return mBatch >= 1 && mBatch <= 3 && dims.nbDims == 2 && dims.d[1] == 4;
    }
    Dims getTensorShape(char const*) const noexcept override
    {
        Dims dims{};
        dims.nbDims = 2;
        dims.d[0] = mBatch;
        dims.d[1] = 4;
        return dims;
    }
    bool setTensorAddress(char const* name, void* data) noexcept override
    {
        (std::strcmp(name, "x") == 0 ? mInput : mOutput) = data;
        return true;
    }
    bool enqueueV3(cudaStream_t) noexcept override
    {
        for (int64_t i = 0; i < mBatch * 4; ++i)
        {
            static_cast<float*>(mOutput)[i] = mFactor * fromHalf(static_cast<uint16_t const*>(mInput)[i]);
        }
        return true;
    }
    int64_t mBatch{0};
    float mFactor{2.F};
    void* mInput{nullptr};
    void* mOutput{nullptr};
};

struct Context : IExecutionContext
{
    explicit Context(float factor)
    {
        std::printf("stand-in context: made\n");
        mOwn.mFactor = factor;
        mImpl = &mOwn;
    }
    ContextImpl mOwn;
};

// NvInferRuntime.h on setExecutionContext: without one that has its shapes, layers of open size have no format.
struct InspectorImpl : VEngineInspectorStub
{
    bool setExecutionContext(IExecutionContext const* context) noexcept override
    {
        mContext = static_cast<Context const*>(context);
        return true;
    }
    char const* getLayerInformation(int32_t layer, LayerInformationFormat) const noexcept override
    {
        if (layer != 0)
        {
            return R"({"Name": "{ForeignNode[/blocks.1/fna]}", "LayerType": "Myelin"})";
        }
        bool const shaped = mContext != nullptr && mContext->mOwn.mBatch > 0 && std::getenv("STAND_IN_MUTE") == nullptr;
        return shaped ? R"({"Name": "/blocks.0/fna", "LayerType": "PluginV3", "Outputs": [{"Format/Datatype": "Half"}]})"
                      : R"({"Name": "/blocks.0/fna", "LayerType": "PluginV3", "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]})";
    }
    Context const* mContext{nullptr};
};

struct Inspector : IEngineInspector
{
    Inspector()
    {
        mImpl = &mOwn;
    }
    InspectorImpl mOwn;
};

struct EngineImpl : VCudaEngineStub
{
    int32_t getNbIOTensors() const noexcept override { return 2; }
    char const* getIOTensorName(int32_t index) const noexcept override { return index == 0 ? "x" : "doubled"; }
    DataType getTensorDataType(char const* name) const noexcept override { return *name == 'x' ? DataType::kHALF : DataType::kFLOAT; }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override
    {
        return *name == 'x' ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    Dims getProfileShape(char const*, int32_t, OptProfileSelector which) const noexcept override
    {
        Dims dims{};
        dims.nbDims = 2;
        dims.d[0] = which == OptProfileSelector::kMIN ? 1 : which == OptProfileSelector::kOPT ? 2 : 3;
        dims.d[1] = 4;
        return dims;
    }
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override { return new Context(mFactor); }
    IEngineInspector* createEngineInspector() const noexcept override { return new Inspector; }
    int32_t getNbLayers() const noexcept override { return 2; }
    float mFactor{2.F};
};

struct Engine : ICudaEngine
{
    explicit Engine(float factor)
    {
        mOwn.mFactor = factor;
        mImpl = &mOwn;
    }
    EngineImpl mOwn;
};

struct RuntimeImpl : VRuntimeStub
{
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override
    {
        std::string const text(static_cast<char const*>(blob), size);
        if (text == "compatible" && !mHostCode)
        {
            mLogger->log(ILogger::Severity::kERROR, "stand-in runtime: this engine carries host code, which is not allowed");
            return nullptr;
        }
        if (text != "doubles" && text != "halves" && text != "compatible")
        {
            mLogger->log(ILogger::Severity::kERROR, "stand-in runtime: this is no engine");
            return nullptr;
        }
        return new Engine(text == "halves" ? 0.5F : 2.F);
    }
    void setEngineHostCodeAllowed(bool allowed) noexcept override { mHostCode = allowed; }
    IPluginRegistry& getPluginRegistry() noexcept override { return *::getPluginRegistry(); }
    ILogger* mLogger{nullptr};
    bool mHostCode{false};
};

struct Runtime : IRuntime
{
    explicit Runtime(void* logger)
    {
        mOwn.mLogger = static_cast<ILogger*>(logger);
        mImpl = &mOwn;
    }
    RuntimeImpl mOwn;
};

} // namespace stand_in
