// Walk the library through TensorRT's calls in TensorRT's order. Usage: walk LIBRARY. Meant for AddressSanitizer.
#include "check.hpp"
#include "dimensions.hpp"
#include "host.hpp"

#include <NvInferImpl.h>

#include <cstring>

using namespace nvinfer1;

namespace
{

DimsExprs expressions(apiv::VExprBuilder& builder, std::vector<int64_t> const& sizes)
{
    DimsExprs dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        dims.d[i] = builder.constant(sizes[i]);
    }
    return dims;
}

host::Tensor tensor(DataType type, std::vector<int64_t> const& sizes)
{
    host::Tensor made{static_cast<int32_t>(type), static_cast<int32_t>(sizes.size()), {}, nullptr};
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        made.dims[i] = sizes[i];
    }
    return made;
}

std::vector<DynamicPluginTensorDesc> attentionInputs(
    DataType type, int64_t batch, int64_t heads, int64_t tokens, int64_t headSize, int64_t landmarks)
{
    std::vector<int64_t> const linear{batch, heads, tokens, headSize};
    return {host::describe(tensor(type, linear)), host::describe(tensor(type, linear)), host::describe(tensor(type, linear)),
        host::describe(tensor(DataType::kINT32, {1, landmarks})), host::describe(tensor(DataType::kFLOAT, {1, landmarks}))};
}

std::vector<DynamicPluginTensorDesc> maskedInputs(
    DataType type, int64_t batch, int64_t heads, int64_t tokens, int64_t headSize, int64_t landmarks)
{
    std::vector<DynamicPluginTensorDesc> all = attentionInputs(type, batch, heads, tokens, headSize, landmarks);
    all.push_back(host::describe(tensor(DataType::kINT32, {batch, tokens})));
    return all;
}

bool mentions(host::Library& library, char const* text)
{
    std::string const messages = library.logger().take();
    if (messages.find(text) == std::string::npos)
    {
        std::fprintf(stderr, "the log has no '%s' in: %s\n", text, messages.c_str());
        return false;
    }
    return true;
}

void walkCreators(host::Library& library)
{
    CHECK(library.count() == 6);
    IPluginCreatorV3One* const second = library.creator("FastNystromAttention", "2");
    CHECK(second != nullptr && second != library.creator("FastNystromAttention"));
    CHECK(second->getFieldNames()->nbFields == 4);
    CHECK(std::strcmp(second->getFieldNames()->fields[3].name, "sink") == 0);
    CHECK(library.creator("FarthestPointSampling", "2") == nullptr);
    for (char const* name : {"FastNystromAttention", "FarthestPointSampling"})
    {
        IPluginCreatorV3One* const creator = library.creator(name);
        CHECK(creator != nullptr);
        CHECK(std::strcmp(creator->getPluginVersion(), "1") == 0);
        CHECK(std::strcmp(creator->getPluginNamespace(), "") == 0);
        PluginFieldCollection const* const fields = creator->getFieldNames();
        CHECK(fields->nbFields == (std::strcmp(name, "FastNystromAttention") == 0 ? 3 : 1));
        for (int32_t i = 0; i < fields->nbFields; ++i)
        {
            CHECK(fields->fields[i].name != nullptr);
        }
    }
}

void walkFields(host::Library& library)
{
    float const scale = 0.25F;
    int32_t const iterations = 4;
    host::PluginPointer full = host::deploy(library, "FastNystromAttention",
        {{"scale", &scale, PluginFieldType::kFLOAT32, 1}, {"iterations", &iterations, PluginFieldType::kINT32, 1}});
    CHECK(full != nullptr);
    host::PluginPointer const copy(full->clone());
    full.reset(); // the copy must not depend on what it was copied from
    PluginFieldCollection const* const fields = host::runtime(*copy)->getFieldsToSerialize();
    CHECK(fields->nbFields == 3);
    CHECK(*static_cast<float const*>(fields->fields[0].data) == scale);
    CHECK(*static_cast<int32_t const*>(fields->fields[1].data) == iterations);
    CHECK(*static_cast<int32_t const*>(fields->fields[2].data) == 0);
    CHECK(std::strstr(host::build(*copy)->getTimingCacheID(), "scale=0.25,iterations=4,exact_rows=0") != nullptr);
    CHECK(std::strcmp(host::core(*copy)->getPluginName(), "FastNystromAttention") == 0);
    CHECK(host::build(*copy)->getNbOutputs() == 1);

    CHECK(host::deploy(library, "FastNystromAttention", {}) == nullptr);
    CHECK(mentions(library, "scale (kFLOAT32), which is missing"));
    CHECK(host::deploy(library, "FastNystromAttention", {{"scale", &iterations, PluginFieldType::kINT32, 1}}) == nullptr);
    CHECK(mentions(library, "field scale has type"));
    CHECK(host::deploy(library, "FastNystromAttention", {{"scale", &scale, PluginFieldType::kFLOAT32, 2}}) == nullptr);
    CHECK(mentions(library, "field scale has 2 values"));
    CHECK(host::deploy(library, "FastNystromAttention", {{"scale", nullptr, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    CHECK(mentions(library, "field scale has no data"));
    PluginField const twice{"scale", &scale, PluginFieldType::kFLOAT32, 1};
    CHECK(host::deploy(library, "FastNystromAttention", {twice, twice}) == nullptr);
    CHECK(mentions(library, "field scale is given more than once"));
    int32_t const none = 0;
    CHECK(host::deploy(library, "FastNystromAttention", {twice, {"iterations", &none, PluginFieldType::kINT32, 1}}) == nullptr);
    CHECK(mentions(library, "field iterations is 0"));
    int32_t const many = 257;
    CHECK(host::deploy(library, "FarthestPointSampling", {{"num_landmarks", &many, PluginFieldType::kINT32, 1}}) == nullptr);
    CHECK(mentions(library, "field num_landmarks is 257"));
    CHECK(library.creator("FastNystromAttention")->createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK(mentions(library, "fields are null"));
}

// The only combinations taken: one float type for query, key, value and out; int32 landmarks; fp32 bias; all linear.
void walkFormats(host::Library& library)
{
    float const scale = 1.F;
    host::PluginPointer const plugin
        = host::deploy(library, "FastNystromAttention", {{"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    DataType const types[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kINT32,
        DataType::kINT64, DataType::kBOOL};
    TensorFormat const formats[] = {TensorFormat::kLINEAR, TensorFormat::kCHW32, TensorFormat::kHWC8};
    for (DataType const first : types)
    {
        for (DataType const type : types)
        {
            for (TensorFormat const format : formats)
            {
                std::vector<DynamicPluginTensorDesc> all = attentionInputs(first, 1, 1, 64, 64, 8);
                all.push_back(all[0]);
                for (int32_t pos = 0; pos < 6; ++pos)
                {
                    std::vector<DynamicPluginTensorDesc> tried = all;
                    tried[pos].desc.type = type;
                    tried[pos].desc.format = format;
                    bool const isFloat = type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
                    bool const fits = pos == 0 ? isFloat
                        : pos == 3             ? type == DataType::kINT32
                        : pos == 4             ? type == DataType::kFLOAT
                                               : type == first;
                    // Only what stands before `pos` may be looked at: the rest is poisoned, and out of the vector's reach.
                    std::vector<DynamicPluginTensorDesc> const seen(tried.begin(), tried.begin() + pos + 1);
                    CHECK(host::build(*plugin)->supportsFormatCombination(pos, seen.data(), 5, 1)
                        == (fits && format == TensorFormat::kLINEAR));
                }
                CHECK(!host::build(*plugin)->supportsFormatCombination(0, all.data(), 4, 1));
                CHECK(!host::build(*plugin)->supportsFormatCombination(-1, all.data(), 5, 1));
                CHECK(!host::build(*plugin)->supportsFormatCombination(6, all.data(), 5, 1));
            }
        }
    }
}

void walkShapes(host::Library& library)
{
    float const scale = 1.F;
    host::PluginPointer const plugin
        = host::deploy(library, "FastNystromAttention", {{"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    Builder builder;
    auto shapes = [&](std::vector<int64_t> const& query, std::vector<int64_t> const& landmarks) {
        DimsExprs const inputs[] = {expressions(builder, query), expressions(builder, query), expressions(builder, query),
            expressions(builder, landmarks), expressions(builder, landmarks)};
        DimsExprs output{};
        int32_t const status = host::build(*plugin)->getOutputShapes(inputs, 5, nullptr, 0, &output, 1, builder);
        if (status == 0)
        {
            CHECK(output.nbDims == 4 && output.d[2] == inputs[0].d[2]);
        }
        return status;
    };
    CHECK(shapes({kSymbolic, 6, 1370, 64}, {1, 64}) == 0);
    CHECK(shapes({kSymbolic, kSymbolic, kSymbolic, kSymbolic}, {kSymbolic, kSymbolic}) == 0);
    CHECK(shapes({kSymbolic, 6, 1370, 72}, {1, 64}) != 0);
    CHECK(mentions(library, "head size D is 72"));
    CHECK(shapes({1, 6, 1370, 144}, {1, 64}) != 0);
    CHECK(mentions(library, "head size D is 144"));
    CHECK(shapes({1, 6, 1370, 64}, {1, 257}) != 0);
    CHECK(mentions(library, "257 landmarks were given for 1370 tokens"));
    CHECK(shapes({1, 6, 50, 64}, {1, 64}) != 0);
    CHECK(mentions(library, "64 landmarks were given for 50 tokens"));
    CHECK(shapes({1, 6, 50}, {1, 8}) != 0);
    CHECK(mentions(library, "query has 3 dimensions"));

    DataType const inputTypes[] = {DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kINT32, DataType::kFLOAT};
    DataType outputType = DataType::kINT8;
    CHECK(host::build(*plugin)->getOutputDataTypes(&outputType, 1, inputTypes, 5) == 0);
    CHECK(outputType == DataType::kHALF);
    CHECK(host::build(*plugin)->getOutputDataTypes(&outputType, 1, inputTypes, 4) != 0);

    std::vector<DynamicPluginTensorDesc> small = attentionInputs(DataType::kHALF, 1, 6, 577, 64, 64);
    std::vector<DynamicPluginTensorDesc> large = attentionInputs(DataType::kHALF, 8, 6, 1370, 64, 64);
    std::vector<DynamicPluginTensorDesc> range = large;
    for (size_t i = 0; i < range.size(); ++i)
    {
        range[i].min = small[i].min;
    }
    CHECK(host::build(*plugin)->configurePlugin(range.data(), 5, &range[0], 1) == 0);
    size_t const most = host::build(*plugin)->getWorkspaceSize(range.data(), 5, &range[0], 1);
    CHECK(most > 0 && most == host::build(*plugin)->getWorkspaceSize(large.data(), 5, &large[0], 1));
    CHECK(most > host::build(*plugin)->getWorkspaceSize(small.data(), 5, &small[0], 1));

    std::vector<DynamicPluginTensorDesc> wrong = large;
    wrong[1].max.d[2] = 1371;
    CHECK(host::build(*plugin)->configurePlugin(wrong.data(), 5, &wrong[0], 1) != 0);
    CHECK(mentions(library, "key has size 1371 on axis 2"));
    wrong = large;
    wrong[3].min.d[0] = wrong[3].max.d[0] = 3;
    CHECK(host::build(*plugin)->configurePlugin(wrong.data(), 5, &wrong[0], 1) != 0);
    CHECK(mentions(library, "landmarks has 3 rows"));
    wrong = attentionInputs(DataType::kHALF, 8000, 12, 64, 64, 8);
    CHECK(host::build(*plugin)->configurePlugin(wrong.data(), 5, &wrong[0], 1) != 0);
    CHECK(mentions(library, "B * H is 8000 * 12"));
}

// Version 2: the sixth input is optional, int32 [B or 1, N]; the version and sink survive serialization and cloning.
void walkMask(host::Library& library)
{
    float const scale = 0.5F;
    int32_t const one = 1;
    host::PluginPointer const plugin = host::deploy(library, "FastNystromAttention",
        {{"scale", &scale, PluginFieldType::kFLOAT32, 1}, {"sink", &one, PluginFieldType::kINT32, 1}}, "2");
    CHECK(plugin != nullptr);
    CHECK(std::strcmp(host::core(*plugin)->getPluginVersion(), "2") == 0);
    CHECK(std::strcmp(host::build(*plugin)->getTimingCacheID(),
              "FastNystromAttention-2:scale=0.5,iterations=6,exact_rows=0,sink=1")
        == 0);
    CHECK(host::runtime(*plugin)->getFieldsToSerialize()->nbFields == 4);
    int32_t const two = 2;
    CHECK(host::deploy(library, "FastNystromAttention",
              {{"scale", &scale, PluginFieldType::kFLOAT32, 1}, {"sink", &two, PluginFieldType::kINT32, 1}}, "2")
        == nullptr);
    CHECK(mentions(library, "field sink is 2"));

    std::vector<DynamicPluginTensorDesc> all = maskedInputs(DataType::kHALF, 2, 3, 200, 64, 8);
    all.push_back(all[0]);
    for (DataType const type : {DataType::kINT32, DataType::kBOOL, DataType::kFLOAT})
    {
        all[5].desc.type = type;
        std::vector<DynamicPluginTensorDesc> const seen(all.begin(), all.begin() + 6);
        CHECK(host::build(*plugin)->supportsFormatCombination(5, seen.data(), 6, 1) == (type == DataType::kINT32));
    }
    CHECK(host::build(*plugin)->supportsFormatCombination(6, all.data(), 6, 1));
    CHECK(host::build(*plugin)->configurePlugin(all.data(), 6, &all[0], 1) == 0);
    CHECK(host::build(*plugin)->configurePlugin(all.data(), 5, &all[0], 1) == 0);
    CHECK(host::build(*plugin)->configurePlugin(all.data(), 4, &all[0], 1) != 0);
    CHECK(mentions(library, "4 inputs and 1 outputs were given, but 6 and 1 are needed"));
    size_t const plain = host::build(*plugin)->getWorkspaceSize(all.data(), 5, &all[0], 1);
    CHECK(plain > 0 && host::build(*plugin)->getWorkspaceSize(all.data(), 6, &all[0], 1) == plain);
    all[5].min.d[1] = all[5].max.d[1] = 199;
    CHECK(host::build(*plugin)->configurePlugin(all.data(), 6, &all[0], 1) != 0);
    CHECK(mentions(library, "key_mask has 199 columns, but there are 200 tokens"));
    all[5].min.d[1] = all[5].max.d[1] = 200;
    all[5].min.d[0] = all[5].max.d[0] = 5;
    CHECK(host::build(*plugin)->configurePlugin(all.data(), 6, &all[0], 1) != 0);
    CHECK(mentions(library, "key_mask has 5 rows"));

    host::PluginPointer const first
        = host::deploy(library, "FastNystromAttention", {{"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    CHECK(std::strcmp(host::core(*first)->getPluginVersion(), "1") == 0);
    CHECK(host::build(*first)->configurePlugin(all.data(), 6, &all[0], 1) != 0);
    CHECK(mentions(library, "6 inputs and 1 outputs were given, but 5 and 1 are needed"));
}

// Version 3: the core, its steps and its lowest eigenvalue, all of which survive serialization and cloning.
void walkCore(host::Library& library)
{
    float const scale = 0.5F;
    int32_t const steps = 8;
    float const low = 0.05F;
    PluginField const common{"scale", &scale, PluginFieldType::kFLOAT32, 1};
    PluginField const core{"core", "chebyshev", PluginFieldType::kCHAR, 9};
    PluginField const count{"steps", &steps, PluginFieldType::kINT32, 1};
    PluginField const lowest{"low", &low, PluginFieldType::kFLOAT32, 1};
    host::PluginPointer const plugin = host::deploy(library, "FastNystromAttention", {common, core, count, lowest}, "3");
    CHECK(plugin != nullptr);
    CHECK(std::strcmp(host::core(*plugin)->getPluginVersion(), "3") == 0);
    CHECK(std::strcmp(host::build(*plugin)->getTimingCacheID(),
              "FastNystromAttention-3:scale=0.5,iterations=6,exact_rows=0,sink=0,core=chebyshev,steps=8,low=0.0500000007")
        == 0);
    host::PluginPointer const plain = host::deploy(library, "FastNystromAttention", {common}, "3");
    CHECK(std::strstr(host::build(*plain)->getTimingCacheID(), "core=newton_schulz") != nullptr);
    // A text whose length counts its final zero is the same text.
    PluginField const ended{"core", "chebyshev", PluginFieldType::kCHAR, 10};
    host::PluginPointer const same = host::deploy(library, "FastNystromAttention", {common, ended, count, lowest}, "3");
    CHECK(std::strcmp(host::build(*same)->getTimingCacheID(), host::build(*plugin)->getTimingCacheID()) == 0);

    std::vector<DynamicPluginTensorDesc> const all = maskedInputs(DataType::kHALF, 2, 3, 200, 64, 128);
    CHECK(host::build(*plugin)->configurePlugin(all.data(), 6, &all[0], 1) == 0);
    size_t const less = host::build(*plugin)->getWorkspaceSize(all.data(), 5, &all[0], 1);
    CHECK(less > 0 && less < host::build(*plain)->getWorkspaceSize(all.data(), 5, &all[0], 1));

    CHECK(host::deploy(library, "FastNystromAttention", {common, core, lowest}, "3") == nullptr);
    CHECK(mentions(library, "field steps is 0"));
    CHECK(host::deploy(library, "FastNystromAttention", {common, core, count}, "3") == nullptr);
    CHECK(mentions(library, "field low is 0"));
    PluginField const other{"core", "cholesky", PluginFieldType::kCHAR, 8};
    CHECK(host::deploy(library, "FastNystromAttention", {common, other}, "3") == nullptr);
    CHECK(mentions(library, "field core is cholesky"));
    CHECK(host::deploy(library, "FastNystromAttention", {common, {"core", &steps, PluginFieldType::kINT32, 1}}, "3") == nullptr);
    CHECK(mentions(library, "field core has type"));
    CHECK(host::deploy(library, "FastNystromAttention", {common, {"core", "chebyshev", PluginFieldType::kCHAR, 99}}, "3") == nullptr);
    CHECK(mentions(library, "field core has 99 values, but 1 to 64 are needed"));
}

std::vector<DynamicPluginTensorDesc> focalInputs(DataType type, int64_t batch, int64_t tokens, int64_t headSize, bool masked)
{
    std::vector<int64_t> const linear{batch, 6, tokens, headSize};
    std::vector<DynamicPluginTensorDesc> all{host::describe(tensor(type, linear)), host::describe(tensor(type, linear)),
        host::describe(tensor(type, linear)), host::describe(tensor(DataType::kINT32, {25, 64})),
        host::describe(tensor(DataType::kINT32, {25, 300})), host::describe(tensor(DataType::kFLOAT, {25, 300})),
        host::describe(tensor(DataType::kINT32, {tokens - 1}))};
    if (masked)
    {
        all.push_back(host::describe(tensor(DataType::kINT32, {1, tokens})));
    }
    return all;
}

void walkFocal(host::Library& library)
{
    float const scale = 0.125F;
    int32_t const one = 1;
    int32_t const many = 65;
    PluginField const scaled{"scale", &scale, PluginFieldType::kFLOAT32, 1};
    PluginField const prefix{"prefix_tokens", &one, PluginFieldType::kINT32, 1};
    host::PluginPointer const plugin = host::deploy(library, "FocalAttention", {scaled, prefix});
    host::PluginPointer const second = host::deploy(library, "FocalAttention", {scaled, prefix}, "2");
    CHECK(second != nullptr && std::strcmp(host::core(*second)->getPluginVersion(), "2") == 0);
    CHECK(plugin != nullptr);
    CHECK(std::strcmp(host::build(*plugin)->getTimingCacheID(), "FocalAttention-1:scale=0.125,prefix_tokens=1,hot=0") == 0);
    CHECK(host::deploy(library, "FocalAttention", {scaled}) == nullptr);
    CHECK(mentions(library, "prefix_tokens (kINT32), which is missing"));
    CHECK(host::deploy(library, "FocalAttention", {scaled, prefix, {"hot", &many, PluginFieldType::kINT32, 1}}) == nullptr);
    CHECK(mentions(library, "field hot is 65, but 0 to 64 are needed"));

    for (bool const masked : {false, true})
    {
        std::vector<DynamicPluginTensorDesc> const all = focalInputs(DataType::kHALF, 2, 1370, 64, masked);
        int32_t const count = static_cast<int32_t>(all.size());
        CHECK(host::build(*second)->configurePlugin(all.data(), count, &all[0], 1) == 0);
        CHECK(host::build(*second)->getWorkspaceSize(all.data(), count, &all[0], 1) > 2 * 6 * 25 * 300 * 4);
        CHECK((host::build(*plugin)->configurePlugin(all.data(), count, &all[0], 1) == 0) == !masked);
    }
    CHECK(mentions(library, "8 inputs and 1 outputs were given, but 7 and 1 are needed"));
    std::vector<DynamicPluginTensorDesc> wrong = focalInputs(DataType::kHALF, 2, 1370, 64, true);
    CHECK(host::build(*second)->configurePlugin(wrong.data(), 6, &wrong[0], 1) != 0);
    CHECK(mentions(library, "6 inputs and 1 outputs were given, but 8 and 1 are needed"));
    wrong[7].min.d[0] = wrong[7].max.d[0] = 3;
    CHECK(host::build(*second)->configurePlugin(wrong.data(), 8, &wrong[0], 1) != 0);
    CHECK(mentions(library, "key_mask has size 3 on axis 0, but 2 is needed"));
    wrong = focalInputs(DataType::kHALF, 2, 1370, 64, false);
    wrong[6].min.d[0] = wrong[6].max.d[0] = 1370;
    CHECK(host::build(*plugin)->configurePlugin(wrong.data(), 7, &wrong[0], 1) != 0);
    CHECK(mentions(library, "places has size 1370 on axis 0, but 1369 is needed"));
    wrong = focalInputs(DataType::kHALF, 2, 1370, 64, false);
    wrong[5].min.d[1] = wrong[5].max.d[1] = 299;
    CHECK(host::build(*plugin)->configurePlugin(wrong.data(), 7, &wrong[0], 1) != 0);
    CHECK(mentions(library, "tile_bias has size 299 on axis 1, but 300 is needed"));
    wrong = focalInputs(DataType::kHALF, 2, 1370, 72, false);
    CHECK(host::build(*plugin)->configurePlugin(wrong.data(), 7, &wrong[0], 1) != 0);
    CHECK(mentions(library, "head size D is 72"));

    Builder builder;
    DimsExprs output{};
    auto shapes = [&](int64_t tokens, int64_t headSize, int64_t places) {
        DimsExprs const query = expressions(builder, {kSymbolic, 6, tokens, headSize});
        DimsExprs const lists = expressions(builder, {25, 300});
        DimsExprs const inputs[] = {query, query, query, expressions(builder, {25, 64}), lists, lists, expressions(builder, {places})};
        return host::build(*plugin)->getOutputShapes(inputs, 7, nullptr, 0, &output, 1, builder);
    };
    CHECK(shapes(1370, 64, 1369) == 0 && output.nbDims == 4);
    CHECK(shapes(kSymbolic, kSymbolic, 1369) == 0);
    CHECK(shapes(1370, 64, 1370) != 0);
    CHECK(mentions(library, "places has size 1370 on axis 0"));
    CHECK(shapes(1370, 144, 1369) != 0);
    CHECK(mentions(library, "head size D is 144"));
}

// Without a driver an execution is refused, with a reason, and nothing crashes.
void walkRuntimeWithoutDriver(host::Library& library)
{
    float const scale = 1.F;
    host::PluginPointer const plugin
        = host::deploy(library, "FastNystromAttention", {{"scale", &scale, PluginFieldType::kFLOAT32, 1}});
    std::vector<DynamicPluginTensorDesc> const all = attentionInputs(DataType::kHALF, 1, 2, 200, 64, 16);
    std::vector<PluginTensorDesc> in;
    for (DynamicPluginTensorDesc const& each : all)
    {
        in.push_back(each.desc);
    }
    CHECK(host::runtime(*plugin)->onShapeChange(in.data(), 5, &in[0], 1) != 0);
    CHECK(mentions(library, "libcuda.so.1"));
    void const* const inputs[5] = {};
    void* const outputs[1] = {};
    CHECK(host::runtime(*plugin)->enqueue(in.data(), &in[0], inputs, outputs, nullptr, nullptr) != 0);
    CHECK(mentions(library, "libcuda.so.1"));
}

void walkSampling(host::Library& library)
{
    int32_t const count = 64;
    host::PluginPointer const plugin
        = host::deploy(library, "FarthestPointSampling", {{"num_landmarks", &count, PluginFieldType::kINT32, 1}});
    CHECK(plugin != nullptr);
    Builder builder;
    DimsExprs const features = expressions(builder, {kSymbolic, 1370, 384});
    DimsExprs output{};
    CHECK(host::build(*plugin)->getOutputShapes(&features, 1, nullptr, 0, &output, 1, builder) == 0);
    CHECK(output.nbDims == 2 && output.d[0] == features.d[0] && output.d[1]->getConstantValue() == 64);
    DimsExprs const few = expressions(builder, {kSymbolic, 63, 384});
    CHECK(host::build(*plugin)->getOutputShapes(&few, 1, nullptr, 0, &output, 1, builder) != 0);
    CHECK(mentions(library, "64 landmarks were given for 63 tokens"));
    DataType outputType = DataType::kFLOAT;
    DataType const inputType = DataType::kBF16;
    CHECK(host::build(*plugin)->getOutputDataTypes(&outputType, 1, &inputType, 1) == 0 && outputType == DataType::kINT32);
    DynamicPluginTensorDesc const in = host::describe(tensor(DataType::kBF16, {2, 1370, 384}));
    CHECK(host::build(*plugin)->configurePlugin(&in, 1, &in, 1) == 0);
    CHECK(host::build(*plugin)->getWorkspaceSize(&in, 1, &in, 1) >= 2 * 1370 * 4);
    CHECK(std::strstr(host::build(*plugin)->getTimingCacheID(), "num_landmarks=64") != nullptr);
}

} // namespace

int main(int argc, char** argv)
{
    CHECK(argc == 2);
    for (int round = 0; round < 2; ++round) // loading, unloading and loading again
    {
        host::Library library(argv[1]);
        walkCreators(library);
        walkFields(library);
        walkFormats(library);
        walkShapes(library);
        walkMask(library);
        walkCore(library);
        walkSampling(library);
        walkFocal(library);
        walkRuntimeWithoutDriver(library);
        CHECK(library.logger().take().empty());
    }
    std::puts("walked");
    return 0;
}
