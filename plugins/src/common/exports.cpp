#include "common/exports.hpp"

#include "attention/attention_plugin.hpp"
#include "common/logging.hpp"
#include "sampling/sampling_plugin.hpp"

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static fna::PluginCreator<fna::AttentionPlugin> attention{{}};
    static fna::PluginCreator<fna::AttentionPlugin> maskedAttention{[] {
        fna::AttentionAttributes attributes;
        attributes.takesMask = true;
        return attributes;
    }()};
    static fna::PluginCreator<fna::SamplingPlugin> sampling{{}};
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention, &sampling, &maskedAttention};
    nbCreators = 3;
    return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    fna::useLoggerFinder(finder);
}
