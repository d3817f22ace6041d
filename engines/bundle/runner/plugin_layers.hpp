// Which of an engine's layers are the plugin's, and in which type, by TensorRT's inspector; and which kernels the plugin runs.
#pragma once

#include "arrays.hpp"

#include <cctype>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace runner
{

struct Layer
{
    std::string name;
    std::string wanted;
    std::string type;
    bool isPlugin{false};

    std::string typeText() const
    {
        return type.empty() ? "type not reported" : type;
    }
};

// How many kernels the plugin loaded as compiled for this chip, and how many the driver compiled from PTX.
struct KernelCounts
{
    int32_t compiled{0};
    int32_t fromPtx{0};
    bool known{false};
};

// Asks the library that TensorRT has loaded from `path`.
inline KernelCounts countKernels(std::string const& path)
{
    KernelCounts counts;
    void* const library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    void* const address = library == nullptr ? nullptr : dlsym(library, "fnaCountKernels");
    if (address != nullptr)
    {
        void (*count)(int32_t*, int32_t*) = nullptr;
        std::memcpy(&count, &address, sizeof address);
        count(&counts.compiled, &counts.fromPtx);
        counts.known = true;
    }
    return counts;
}

// The text of a string field of the inspector's JSON, or nothing.
inline std::string jsonField(std::string const& json, std::string const& key, size_t from = 0)
{
    size_t at = json.find('"' + key + '"', from);
    at = at == std::string::npos ? at : json.find(':', at + key.size() + 2);
    size_t const open = at == std::string::npos ? at : json.find('"', at);
    size_t const close = open == std::string::npos ? open : json.find('"', open + 1);
    return close == std::string::npos ? std::string() : json.substr(open + 1, close - open - 1);
}

inline bool mentions(std::string const& text, std::string const& name)
{
    auto const joins = [](char letter) { return std::isalnum(static_cast<unsigned char>(letter)) != 0 || letter == '_' || letter == '.'; };
    for (size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + 1))
    {
        bool const starts = at == 0 || !joins(text[at - 1]);
        size_t const after = at + name.size();
        if (starts && (after == text.size() || !joins(text[after])))
        {
            return true;
        }
    }
    return false;
}

// A type as TensorRT's inspector writes it ("Row major linear FP16 format", "Half"), in our words; empty where it is not known.
inline std::string typeOfFormat(std::string const& format)
{
    static std::pair<char const*, char const*> const kNames[]
        = {{"BF16", "bf16"}, {"BFloat", "bf16"}, {"FP16", "fp16"}, {"Half", "fp16"}, {"FP32", "fp32"}, {"Float", "fp32"}};
    for (auto const& [theirs, ours] : kNames)
    {
        if (format.find(theirs) != std::string::npos)
        {
            return ours;
        }
    }
    return {};
}

inline std::vector<Layer> readWantedLayers(std::string const& path)
{
    std::vector<char> const bytes = readFile(path);
    std::istringstream lines(std::string(bytes.begin(), bytes.end()));
    std::vector<Layer> layers;
    for (std::string line; std::getline(lines, line);)
    {
        size_t const tab = line.find('\t');
        if (!line.empty())
        {
            layers.push_back({line.substr(0, tab), tab == std::string::npos ? "?" : line.substr(tab + 1), "", false});
        }
    }
    return layers;
}

inline void findLayer(Layer& layer, std::string const& json)
{
    if (!mentions(json, layer.name) || layer.isPlugin)
    {
        return;
    }
    layer.isPlugin = jsonField(json, "LayerType").find("Plugin") != std::string::npos;
    size_t const outputs = json.find("\"Outputs\"");
    layer.type = outputs == std::string::npos ? "" : typeOfFormat(jsonField(json, "Format/Datatype", outputs));
}

// Every layer that is no plugin layer, or runs in another type than asked.
inline std::vector<std::string> judgeLayers(std::vector<Layer> const& layers)
{
    std::vector<std::string> failures;
    for (Layer const& layer : layers)
    {
        if (!layer.isPlugin)
        {
            failures.push_back("layer " + layer.name + " is not in the engine as a plugin layer");
        }
        else if (layer.wanted != "?" && !layer.type.empty() && layer.type != layer.wanted)
        {
            failures.push_back("layer " + layer.name + " runs in " + layer.type + ", but " + layer.wanted + " was asked for");
        }
    }
    return failures;
}

} // namespace runner
