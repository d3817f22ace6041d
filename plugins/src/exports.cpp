#include "exports.hpp"

#include "attention_plugin.hpp"
#include "logging.hpp"
#include "sampling_plugin.hpp"

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static fna::AttentionCreator attention(false);
    static fna::AttentionCreator maskedAttention(true);
    static fna::SamplingCreator sampling;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention, &sampling, &maskedAttention};
    nbCreators = 3;
    return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    fna::useLoggerFinder(finder);
}
