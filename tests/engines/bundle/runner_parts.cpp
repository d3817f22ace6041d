// The runner's parts that need no engine: number formats, items that wrap around, and what it makes of the inspector's layers.
#include "engine.hpp"

namespace
{

using namespace runner;

int gFailures = 0;

void expect(bool holds, char const* what)
{
    if (!holds)
    {
        std::printf("failed: %s\n", what);
        ++gFailures;
    }
}

void numberFormats()
{
    bool same = true;
    for (uint32_t bits = 0; bits < 0x10000U; ++bits)
    {
        float const value = halfToFloat(static_cast<uint16_t>(bits));
        same = same && (std::isnan(value) ? std::isnan(halfToFloat(floatToHalf(value))) : floatToHalf(value) == bits);
        float const wide = bfloatToFloat(static_cast<uint16_t>(bits));
        same = same && (std::isnan(wide) ? std::isnan(bfloatToFloat(floatToBfloat(wide))) : floatToBfloat(wide) == bits);
    }
    expect(same, "every fp16 and bf16 value comes back as it went");
    expect(floatToHalf(1.0009765F) == 0x3C01 && floatToHalf(1.00048828125F) == 0x3C00, "fp16 rounds to nearest, ties to even");
    expect(floatToHalf(1.00146484375F) == 0x3C02, "a tie above an odd value rounds up");
    expect(floatToHalf(65519.F) == 0x7BFF && floatToHalf(65520.F) == 0x7C00 && floatToHalf(-1e9F) == 0xFC00, "fp16 overflows to infinity");
    expect(floatToHalf(2.0e-8F) == 0 && floatToHalf(6.0e-8F) == 1 && floatToHalf(6.1035e-5F) == 0x0400, "fp16 subnormals round");
    expect(floatToBfloat(1.00390625F) == 0x3F80 && floatToBfloat(1.01171875F) == 0x3F82, "bf16 rounds to nearest, ties to even");
    std::vector<float> const values{1.F, -2.F, 0.5F};
    expect(decode(encode(values, DataType::kBF16), DataType::kBF16) == values, "values go through bf16");
    expect(decode(encode(values, DataType::kFLOAT), DataType::kFLOAT) == values, "values go through fp32");
}

void items()
{
    Array const three{{3, 2}, {0, 1, 10, 11, 20, 21}};
    expect(takeItems(three, 2, 4) == std::vector<float>({20, 21, 0, 1, 10, 11, 20, 21}), "items wrap around");
}

void layers()
{
    std::string const half = R"({"Name": "/blocks.1/fna", "LayerType": "PluginV3",
        "Inputs": [{"Name": "q", "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "o", "Format/Datatype": "Row major linear FP16 format"}]})";
    Layer one{"/blocks.1/fna", "fp16", "", false};
    findLayer(one, R"({"Name": "/blocks.11/fna", "LayerType": "PluginV3"})");
    expect(!one.isPlugin, "block 11 is not block 1");
    findLayer(one, R"({"Name": "{ForeignNode[/blocks.1/fna...]}", "LayerType": "Myelin"})");
    expect(!one.isPlugin && judgeLayers({one}).size() == 1, "a layer that TensorRT computes itself is no plugin layer");
    findLayer(one, half);
    expect(one.isPlugin && one.type == "fp16" && judgeLayers({one}).empty(), "the plugin layer is found in its type");
    Layer other{"/blocks.1/fna", "fp32", "", false};
    findLayer(other, half);
    expect(judgeLayers({other}) == std::vector<std::string>{"layer /blocks.1/fna runs in fp16, but fp32 was asked for"}, "another type is named");
    Layer quiet{"/blocks.1/fna", "fp16", "", false};
    findLayer(quiet, R"({"Name": "/blocks.1/fna", "LayerType": "PluginV3", "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]})");
    expect(judgeLayers({quiet}).empty(), "a type that is not told is not judged");
    expect(typeOfFormat("BFloat16") == "bf16" && typeOfFormat("Half") == "fp16" && typeOfFormat("Float") == "fp32", "newer names of types");
}

} // namespace

int main()
{
    numberFormats();
    items();
    layers();
    return gFailures == 0 ? 0 : 1;
}
