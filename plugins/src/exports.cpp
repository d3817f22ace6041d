#include "exports.hpp"

#include "attention_plugin.hpp"
#include "logging.hpp"
#include "sampling_plugin.hpp"

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static fna::AttentionCreator attention;
    static fna::SamplingCreator sampling;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention, &sampling};
    nbCreators = 2;
    return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    fna::useLoggerFinder(finder);
}
