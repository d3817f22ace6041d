// The command line.
#pragma once

#include "difference.hpp"
#include "number_formats.hpp"

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace runner
{

constexpr char const* kUsage = R"(usage: fna_runner ENGINE [options]           run an engine
       fna_runner --check-plugin LIBRARY         does the plugin library load into this TensorRT?
       fna_runner --compare NAME=FILE.npy ...    compare files with --expect, without an engine

  --plugin LIBRARY          plugin library, loaded before the engine
  --input NAME=FILE         an input, items along the first dimension: .npy, or raw fp32; FILE alone where there is one input
  --expect NAME=FILE.npy    what an output has to be
  --relative-l2 X           largest relative L2 error of an output     (1e-3)
  --cosine X                smallest cosine similarity of an output    (0.999)
  --task-tolerance NAME=MEASURE:X
                            what an output is held to instead: row_cosine, row_cosine_p5, correlation (at least),
                            relative_l2, regret (at most)
  --plugin-layers FILE      layers that have to be plugin layers: a name a line, a tab, and fp32, fp16, bf16 or ?
  --output DIR              write the outputs there as NAME.npy
  --batch N                 items at a time     (the engine's usual batch, or all items if they are fewer)
  --warm-up N               runs before timing  (20)
  --runs N                  timed runs; 0 for none (100)
  --allow-host-code         run the code that a version compatible engine carries
  --streams N               time N streams at once, each with its own context (1)
  --graph                   time a CUDA graph instead of single launches
  --json FILE               write every number as JSON
)";

using Named = std::vector<std::pair<std::string, std::string>>;

struct Options
{
    std::string engine;
    std::string plugin;
    std::string checkPlugin;
    std::string pluginLayers;
    std::string output;
    std::string json;
    Named inputs;
    Named expected;
    Named compare;
    double relativeL2{1e-3};
    double cosine{0.999};
    std::vector<TaskTolerance> tasks;
    int64_t batch{0};
    int64_t warmUp{20};
    int64_t runs{100};
    int64_t streams{1};
    bool graph{false};
    bool allowHostCode{false};
};

inline std::pair<std::string, std::string> splitName(std::string const& text)
{
    size_t const at = text.find('=');
    return at == std::string::npos ? std::make_pair(std::string(), text) : std::make_pair(text.substr(0, at), text.substr(at + 1));
}

inline double parseNumber(std::string const& option, std::string const& text, double smallest)
{
    char* end = nullptr;
    double const value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0' || !(value >= smallest))
    {
        throw Error(kBadInput, option + " " + text + " cannot be used; give a number of at least " + number("%g", smallest));
    }
    return value;
}

inline TaskTolerance parseTask(std::string const& option, std::string const& text)
{
    auto const [output, limit] = splitName(text);
    size_t const colon = limit.find(':');
    Measure const* const measure = colon == std::string::npos ? nullptr : findMeasure(limit.substr(0, colon));
    if (output.empty() || measure == nullptr)
    {
        throw Error(kBadInput, option + " " + text + " cannot be read; write NAME=MEASURE:NUMBER, as in tokens=row_cosine:0.99");
    }
    return {output, measure, parseNumber(option, limit.substr(colon + 1), -1)};
}

inline Options parse(std::vector<std::string> const& arguments)
{
    Options options;
    for (size_t i = 0; i < arguments.size(); ++i)
    {
        std::string const& option = arguments[i];
        auto const value = [&]() -> std::string const&
        {
            if (i + 1 >= arguments.size())
            {
                throw Error(kBadInput, option + " needs a value; see fna_runner --help");
            }
            return arguments[++i];
        };
        auto const whole = [&](double smallest) { return static_cast<int64_t>(parseNumber(option, value(), smallest)); };
        if (option == "--plugin") { options.plugin = value(); }
        else if (option == "--check-plugin") { options.checkPlugin = value(); }
        else if (option == "--plugin-layers") { options.pluginLayers = value(); }
        else if (option == "--output") { options.output = value(); }
        else if (option == "--json") { options.json = value(); }
        else if (option == "--input") { options.inputs.push_back(splitName(value())); }
        else if (option == "--expect") { options.expected.push_back(splitName(value())); }
        else if (option == "--compare") { options.compare.push_back(splitName(value())); }
        else if (option == "--relative-l2") { options.relativeL2 = parseNumber(option, value(), 0); }
        else if (option == "--cosine") { options.cosine = parseNumber(option, value(), -1); }
        else if (option == "--task-tolerance") { options.tasks.push_back(parseTask(option, value())); }
        else if (option == "--batch") { options.batch = whole(1); }
        else if (option == "--warm-up") { options.warmUp = whole(0); }
        else if (option == "--runs") { options.runs = whole(0); }
        else if (option == "--streams") { options.streams = whole(1); }
        else if (option == "--graph") { options.graph = true; }
        else if (option == "--allow-host-code") { options.allowHostCode = true; }
        else if (option.compare(0, 1, "-") == 0) { throw Error(kBadInput, "unknown option " + option + "; see fna_runner --help"); }
        else if (options.engine.empty()) { options.engine = option; }
        else { throw Error(kBadInput, "two engines were given, " + options.engine + " and " + option + "; give one"); }
    }
    if (options.engine.empty() && options.checkPlugin.empty() && options.compare.empty())
    {
        throw Error(kBadInput, "no engine was given; see fna_runner --help");
    }
    return options;
}

} // namespace runner
