#include "attention_plugin.hpp"

#include "fields.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace fna
{
namespace
{

using namespace nvinfer1;

constexpr int32_t kInputs = 5;
constexpr int32_t kMostInputs = 6;
constexpr int32_t kQueryInput = 0;
constexpr int32_t kLandmarksInput = 3;
constexpr int32_t kBiasInput = 4;
constexpr int32_t kKeyMaskInput = 5;
constexpr char const* kInputNames[kMostInputs] = {"query", "key", "value", "landmarks", "landmark_bias", "key_mask"};
constexpr int32_t kRanks[kMostInputs] = {4, 4, 4, 2, 2, 2};
constexpr uintptr_t kPointerAlignment = 16;

constexpr char const* kScale = "scale";
constexpr char const* kIterations = "iterations";
constexpr char const* kExactRows = "exact_rows";
constexpr char const* kSink = "sink";
constexpr int32_t kFields = 3; // without sink, which is the last

// Sizes of one call; false, and logged, where the inputs do not fit together.
bool readShape(Dims const* dims, int32_t count, DataType type, AttentionShape& shape) noexcept
{
    for (int32_t i = 0; i < count; ++i)
    {
        if (!checkRank(kInputNames[i], dims[i].nbDims, kRanks[i]))
        {
            return false;
        }
    }
    for (int32_t i = 1; i < kLandmarksInput; ++i)
    {
        for (int32_t axis = 0; axis < kRanks[i]; ++axis)
        {
            if (dims[i].d[axis] != dims[kQueryInput].d[axis])
            {
                logError(kInputNames[i], " has size ", dims[i].d[axis], " on axis ", axis, ", but query has ",
                    dims[kQueryInput].d[axis], "; FNA is self-attention, so they must be equal");
                return false;
            }
        }
    }
    if (!floatType(type, shape.dtype))
    {
        logError("query has type ", static_cast<int32_t>(type), ", but fp32, fp16 or bf16 is needed");
        return false;
    }
    Dims const& query = dims[kQueryInput];
    shape.batch = query.d[0];
    shape.heads = query.d[1];
    shape.tokens = query.d[2];
    shape.headSize = query.d[3];
    shape.landmarks = dims[kLandmarksInput].d[1];
    for (int32_t i = kLandmarksInput; i < count; ++i)
    {
        if (dims[i].d[0] != 1 && dims[i].d[0] != shape.batch)
        {
            logError(kInputNames[i], " has ", dims[i].d[0], " rows, but 1 or B = ", shape.batch, " are needed");
            return false;
        }
    }
    if (dims[kBiasInput].d[1] != shape.landmarks)
    {
        logError("landmark_bias has ", dims[kBiasInput].d[1], " columns, but there are ", shape.landmarks, " landmarks");
        return false;
    }
    shape.sharedLandmarks = dims[kLandmarksInput].d[0] == 1;
    shape.sharedBias = dims[kBiasInput].d[0] == 1;
    shape.masked = count == kMostInputs;
    if (shape.masked && dims[kKeyMaskInput].d[1] != shape.tokens)
    {
        logError("key_mask has ", dims[kKeyMaskInput].d[1], " columns, but there are ", shape.tokens, " tokens");
        return false;
    }
    shape.sharedMask = shape.masked && dims[kKeyMaskInput].d[0] == 1;
    return checkShape(shape);
}

bool sameShape(AttentionShape const& a, AttentionShape const& b) noexcept
{
    return a.dtype == b.dtype && a.batch == b.batch && a.heads == b.heads && a.tokens == b.tokens && a.headSize == b.headSize
        && a.landmarks == b.landmarks && a.sharedLandmarks == b.sharedLandmarks && a.sharedBias == b.sharedBias
        && a.masked == b.masked && a.sharedMask == b.sharedMask;
}

bool checkAttributes(AttentionAttributes const& attributes) noexcept
{
    if (!std::isfinite(attributes.scale))
    {
        logError("field scale is ", attributes.scale, ", but a finite number is needed");
        return false;
    }
    if (attributes.iterations < 1 || attributes.iterations > kMaxIterations)
    {
        logError("field iterations is ", attributes.iterations, ", but 1 to ", kMaxIterations, " are needed");
        return false;
    }
    if (attributes.exactRows != 0 && attributes.exactRows != 1)
    {
        logError("field exact_rows is ", attributes.exactRows, ", but 0 or 1 is needed");
        return false;
    }
    if (attributes.sink != 0 && attributes.sink != 1)
    {
        logError("field sink is ", attributes.sink, ", but 0 or 1 is needed");
        return false;
    }
    return true;
}

// Build time: what is constant in the shapes can be refused already. -1 stands for a size that is not known yet.
bool checkKnownSizes(DimsExprs const* inputs, int32_t count) noexcept
{
    for (int32_t i = 0; i < count; ++i)
    {
        if (!checkRank(kInputNames[i], inputs[i].nbDims, kRanks[i]))
        {
            return false;
        }
    }
    int64_t const heads = constantOr(inputs[kQueryInput].d[1]);
    int64_t const tokens = constantOr(inputs[kQueryInput].d[2]);
    int64_t const headSize = constantOr(inputs[kQueryInput].d[3]);
    int64_t const landmarks = constantOr(inputs[kLandmarksInput].d[1]);
    AttentionShape shape;
    shape.batch = 1;
    shape.heads = heads == -1 ? 1 : heads;
    shape.landmarks = landmarks == -1 ? 1 : landmarks;
    shape.tokens = tokens == -1 ? std::max(shape.landmarks, kMaxLandmarks) : tokens;
    shape.headSize = headSize == -1 ? kHeadSizeStep : headSize;
    return checkShape(shape);
}

} // namespace

AttentionPlugin::AttentionPlugin(AttentionAttributes const& attributes)
    : mAttributes(attributes)
    , mInputs(attributes.takesMask ? kMostInputs : kInputs)
{
    char text[112];
    int const length = std::snprintf(text, sizeof text, "%s-%s:scale=%.9g,iterations=%d,exact_rows=%d", kName,
        getPluginVersion(), static_cast<double>(attributes.scale), attributes.iterations, attributes.exactRows);
    if (attributes.takesMask)
    {
        std::snprintf(text + length, sizeof text - static_cast<size_t>(length), ",sink=%d", attributes.sink);
    }
    mTimingCacheId = text;
}

char const* AttentionPlugin::getPluginVersion() const noexcept
{
    return mAttributes.takesMask ? kMaskVersion : kPluginVersion;
}

// Five inputs, or in version 2 six: key_mask is optional.
bool AttentionPlugin::takes(int32_t nbInputs) const noexcept
{
    return nbInputs == kInputs || (mAttributes.takesMask && nbInputs == kMostInputs);
}

bool AttentionPlugin::checkNumbers(int32_t nbInputs, int32_t nbOutputs) const noexcept
{
    return takes(nbInputs) ? checkCounts(nbInputs, nbInputs, nbOutputs)
                           : checkCounts(nbInputs, mAttributes.takesMask ? kMostInputs : kInputs, nbOutputs);
}

int32_t AttentionPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!checkNumbers(nbInputs, nbOutputs))
    {
        return kFailed;
    }
    outputTypes[0] = inputTypes[kQueryInput];
    return kOk;
}

int32_t AttentionPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    return guarded("getOutputShapes", kFailed, [&] {
        if (!checkNumbers(nbInputs, nbOutputs) || !checkKnownSizes(inputs, nbInputs))
        {
            return kFailed;
        }
        outputs[0] = inputs[kQueryInput];
        return kOk;
    });
}

bool AttentionPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (!takes(nbInputs) || nbOutputs != 1 || pos < 0 || pos > nbInputs)
    {
        return false;
    }
    PluginTensorDesc const& tensor = inOut[pos].desc;
    if (tensor.format != TensorFormat::kLINEAR)
    {
        return false;
    }
    Dtype dtype{};
    if (pos == kKeyMaskInput && pos < nbInputs)
    {
        return tensor.type == DataType::kINT32;
    }
    switch (pos)
    {
    case kQueryInput: return floatType(tensor.type, dtype);
    case kLandmarksInput: return tensor.type == DataType::kINT32;
    case kBiasInput: return tensor.type == DataType::kFLOAT;
    default: return tensor.type == inOut[kQueryInput].desc.type;
    }
}

int32_t AttentionPlugin::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    return guarded("configurePlugin", kFailed, [&] {
        if (!checkNumbers(nbInputs, nbOutputs))
        {
            return kFailed;
        }
        Dims smallest[kMostInputs];
        Dims largest[kMostInputs];
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            smallest[i] = in[i].min;
            largest[i] = in[i].max;
        }
        AttentionShape shape;
        Device device;
        bool const good = readShape(smallest, nbInputs, in[kQueryInput].desc.type, shape)
            && readShape(largest, nbInputs, in[kQueryInput].desc.type, shape) && (!probeDevice(device) || checkDevice(device));
        return good ? kOk : kFailed;
    });
}

size_t AttentionPlugin::getWorkspaceSize(
    DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    return guarded("getWorkspaceSize", size_t{0}, [&] {
        Dims largest[kMostInputs];
        for (int32_t i = 0; i < nbInputs && takes(nbInputs); ++i)
        {
            largest[i] = inputs[i].max;
        }
        AttentionShape shape;
        if (!takes(nbInputs) || !readShape(largest, nbInputs, inputs[kQueryInput].desc.type, shape))
        {
            return size_t{0};
        }
        return workspaceBound(shape);
    });
}

char const* AttentionPlugin::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

bool AttentionPlugin::prepare(PluginTensorDesc const* in, int32_t nbInputs) noexcept
{
    return guarded("onShapeChange", false, [&] {
        Dims dims[kMostInputs];
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            dims[i] = in[i].dims;
        }
        AttentionShape shape;
        Device device;
        if (!readShape(dims, nbInputs, in[kQueryInput].type, shape) || !currentDevice(device))
        {
            mReady = false;
            return false;
        }
        bool const sameDevice = device.context == mDevice.context && device.contextId == mDevice.contextId;
        if (mReady && sameDevice && sameShape(shape, mShape))
        {
            return true;
        }
        mReady = false;
        if (!checkDevice(device))
        {
            return false;
        }
        mPlan = planAttention(shape, mAttributes.scale, mAttributes.iterations, mAttributes.exactRows != 0,
            mAttributes.sink != 0, device.multiprocessors);
        mShape = shape;
        mDevice = device;
        mReady = loadPlan(mPlan, device);
        return mReady;
    });
}

int32_t AttentionPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    if (!checkNumbers(nbInputs, nbOutputs))
    {
        return kFailed;
    }
    mInputs = nbInputs;
    return prepare(in, nbInputs) ? kOk : kFailed;
}

int32_t AttentionPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    // Nothing to do but launch, when onShapeChange saw these shapes; it is what TensorRT calls first.
    if (inputDesc == nullptr || inputs == nullptr || outputs == nullptr || !prepare(inputDesc, mInputs))
    {
        return kFailed;
    }
    std::array<void const*, kSlots> tensors{};
    tensors[kQuery] = inputs[0];
    tensors[kKey] = inputs[1];
    tensors[kValue] = inputs[2];
    tensors[kLandmarks] = inputs[kLandmarksInput];
    tensors[kBias] = inputs[kBiasInput];
    tensors[kKeyMask] = mShape.masked ? inputs[kKeyMaskInput] : nullptr;
    tensors[kOut] = outputs[0];
    for (Slot const slot : {kQuery, kKey, kValue, kOut})
    {
        if (tensors[slot] == nullptr || reinterpret_cast<uintptr_t>(tensors[slot]) % kPointerAlignment != 0)
        {
            logError("tensor ", static_cast<int32_t>(slot), " lies at ", tensors[slot], ", but an address that is a multiple of ",
                kPointerAlignment, " is needed");
            return kFailed;
        }
    }
    return runPlan(mPlan, tensors, workspace, reinterpret_cast<CUstream>(stream)) ? kOk : kFailed;
}

PluginFieldCollection const* AttentionPlugin::getFieldsToSerialize() noexcept
{
    mFields[0] = PluginField{kScale, &mAttributes.scale, PluginFieldType::kFLOAT32, 1};
    mFields[1] = PluginField{kIterations, &mAttributes.iterations, PluginFieldType::kINT32, 1};
    mFields[2] = PluginField{kExactRows, &mAttributes.exactRows, PluginFieldType::kINT32, 1};
    mFields[kFields] = PluginField{kSink, &mAttributes.sink, PluginFieldType::kINT32, 1};
    mCollection.nbFields = mAttributes.takesMask ? kFields + 1 : kFields;
    mCollection.fields = mFields;
    return &mCollection;
}

AttentionCreator::AttentionCreator(bool takesMask)
    : mTakesMask(takesMask)
    , mFields{{kScale, nullptr, PluginFieldType::kFLOAT32, 1}, {kIterations, nullptr, PluginFieldType::kINT32, 1},
          {kExactRows, nullptr, PluginFieldType::kINT32, 1}, {kSink, nullptr, PluginFieldType::kINT32, 1}}
    , mCollection{takesMask ? kFields + 1 : kFields, mFields}
{
}

IPluginV3* AttentionCreator::createPlugin(char const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept
{
    return guarded<IPluginV3*>("createPlugin", nullptr, [&]() -> IPluginV3* {
        AttentionAttributes attributes;
        attributes.takesMask = mTakesMask;
        FieldStatus const scale = readField(fields, kScale, attributes.scale);
        if (scale == FieldStatus::kMissing)
        {
            logError(AttentionPlugin::kName, " needs the field scale (kFLOAT32), which is missing");
        }
        if (scale != FieldStatus::kFound || readField(fields, kIterations, attributes.iterations) == FieldStatus::kBad
            || readField(fields, kExactRows, attributes.exactRows) == FieldStatus::kBad
            || (mTakesMask && readField(fields, kSink, attributes.sink) == FieldStatus::kBad) || !checkAttributes(attributes))
        {
            return nullptr;
        }
        logAt(ILogger::Severity::kVERBOSE, AttentionPlugin::kName, " created: scale=", attributes.scale,
            " iterations=", attributes.iterations, " exact_rows=", attributes.exactRows, " sink=", attributes.sink,
            " version=", mTakesMask ? AttentionPlugin::kMaskVersion : kPluginVersion);
        return new AttentionPlugin(attributes);
    });
}

PluginFieldCollection const* AttentionCreator::getFieldNames() noexcept
{
    return &mCollection;
}

char const* AttentionCreator::getPluginName() const noexcept
{
    return AttentionPlugin::kName;
}

char const* AttentionCreator::getPluginVersion() const noexcept
{
    return mTakesMask ? AttentionPlugin::kMaskVersion : kPluginVersion;
}

char const* AttentionCreator::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

} // namespace fna
