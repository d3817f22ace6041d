#include "sampling_plugin.hpp"

#include "fields.hpp"

#include <algorithm>

namespace fna
{
namespace
{

using namespace nvinfer1;

constexpr int32_t kInputs = 1;
constexpr int32_t kRank = 3;
constexpr uintptr_t kPointerAlignment = 16;
constexpr char const* kNumLandmarks = "num_landmarks";

bool checkAttributes(SamplingAttributes const& attributes) noexcept
{
    if (attributes.numLandmarks < 1 || attributes.numLandmarks > kMaxLandmarks)
    {
        logError("field num_landmarks is ", attributes.numLandmarks, ", but 1 to ", kMaxLandmarks, " are needed");
        return false;
    }
    return true;
}

} // namespace

SamplingPlugin::SamplingPlugin(SamplingAttributes const& attributes)
    : mAttributes(attributes)
    , mTimingCacheId(
          std::string(kName) + "-" + kPluginVersion + ":num_landmarks=" + std::to_string(attributes.numLandmarks))
{
}

bool SamplingPlugin::readShape(Dims const& dims, DataType type, SamplingShape& shape) const noexcept
{
    if (!checkRank("features", dims.nbDims, kRank))
    {
        return false;
    }
    if (!floatType(type, shape.dtype))
    {
        logError("features have type ", static_cast<int32_t>(type), ", but fp32, fp16 or bf16 is needed");
        return false;
    }
    shape.batch = dims.d[0];
    shape.tokens = dims.d[1];
    shape.channels = dims.d[2];
    shape.landmarks = mAttributes.numLandmarks;
    return checkShape(shape);
}

int32_t SamplingPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const*, int32_t nbInputs) const noexcept
{
    if (!checkCounts(nbInputs, kInputs, nbOutputs))
    {
        return kFailed;
    }
    outputTypes[0] = DataType::kINT32;
    return kOk;
}

int32_t SamplingPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept
{
    return guarded("getOutputShapes", kFailed, [&] {
        if (!checkCounts(nbInputs, kInputs, nbOutputs) || !checkRank("features", inputs[0].nbDims, kRank))
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

bool SamplingPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != kInputs || nbOutputs != 1 || pos < 0 || pos > 1)
    {
        return false;
    }
    PluginTensorDesc const& tensor = inOut[pos].desc;
    Dtype dtype{};
    return tensor.format == TensorFormat::kLINEAR
        && (pos == 0 ? floatType(tensor.type, dtype) : tensor.type == DataType::kINT32);
}

int32_t SamplingPlugin::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    return guarded("configurePlugin", kFailed, [&] {
        SamplingShape shape;
        Device device;
        bool const good = checkCounts(nbInputs, kInputs, nbOutputs) && readShape(in[0].min, in[0].desc.type, shape)
            && readShape(in[0].max, in[0].desc.type, shape) && (!probeDevice(device) || checkDevice(device));
        return good ? kOk : kFailed;
    });
}

size_t SamplingPlugin::getWorkspaceSize(
    DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    return guarded("getWorkspaceSize", size_t{0}, [&] {
        SamplingShape shape;
        bool const good = nbInputs == kInputs && readShape(inputs[0].max, inputs[0].desc.type, shape);
        return good ? workspaceBound(shape) : size_t{0};
    });
}

char const* SamplingPlugin::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

bool SamplingPlugin::prepare(PluginTensorDesc const* in) noexcept
{
    return guarded("onShapeChange", false, [&] {
        SamplingShape shape;
        Device device;
        if (!readShape(in[0].dims, in[0].type, shape) || !currentDevice(device))
        {
            mReady = false;
            return false;
        }
        bool const same = device.context == mDevice.context && device.contextId == mDevice.contextId
            && shape.dtype == mShape.dtype && shape.batch == mShape.batch && shape.tokens == mShape.tokens
            && shape.channels == mShape.channels;
        if (mReady && same)
        {
            return true;
        }
        mReady = false;
        if (!checkDevice(device))
        {
            return false;
        }
        mPlan = planSampling(shape);
        mShape = shape;
        mDevice = device;
        mReady = loadPlan(mPlan, device);
        return mReady;
    });
}

int32_t SamplingPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    return checkCounts(nbInputs, kInputs, nbOutputs) && prepare(in) ? kOk : kFailed;
}

int32_t SamplingPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    if (inputDesc == nullptr || inputs == nullptr || outputs == nullptr || !prepare(inputDesc))
    {
        return kFailed;
    }
    if (inputs[0] == nullptr || outputs[0] == nullptr || reinterpret_cast<uintptr_t>(inputs[0]) % kPointerAlignment != 0)
    {
        logError("features lie at ", inputs[0], ", but an address that is a multiple of ", kPointerAlignment, " is needed");
        return kFailed;
    }
    std::array<void const*, kSlots> tensors{};
    tensors[kFeatures] = inputs[0];
    tensors[kLandmarks] = outputs[0];
    return runPlan(mPlan, tensors, workspace, reinterpret_cast<CUstream>(stream)) ? kOk : kFailed;
}

PluginFieldCollection const* SamplingPlugin::getFieldsToSerialize() noexcept
{
    mFields[0] = PluginField{kNumLandmarks, &mAttributes.numLandmarks, PluginFieldType::kINT32, 1};
    mCollection.nbFields = 1;
    mCollection.fields = mFields;
    return &mCollection;
}

SamplingCreator::SamplingCreator()
    : mFields{{kNumLandmarks, nullptr, PluginFieldType::kINT32, 1}}
    , mCollection{1, mFields}
{
}

IPluginV3* SamplingCreator::createPlugin(char const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept
{
    return guarded<IPluginV3*>("createPlugin", nullptr, [&]() -> IPluginV3* {
        SamplingAttributes attributes;
        FieldStatus const count = readField(fields, kNumLandmarks, attributes.numLandmarks);
        if (count == FieldStatus::kMissing)
        {
            logError(SamplingPlugin::kName, " needs the field num_landmarks (kINT32), which is missing");
        }
        if (count != FieldStatus::kFound || !checkAttributes(attributes))
        {
            return nullptr;
        }
        logAt(ILogger::Severity::kVERBOSE, SamplingPlugin::kName, " created: num_landmarks=", attributes.numLandmarks);
        return new SamplingPlugin(attributes);
    });
}

PluginFieldCollection const* SamplingCreator::getFieldNames() noexcept
{
    return &mCollection;
}

char const* SamplingCreator::getPluginName() const noexcept
{
    return SamplingPlugin::kName;
}

char const* SamplingCreator::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

char const* SamplingCreator::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

} // namespace fna
