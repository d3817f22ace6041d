#include "common/exports.hpp"

#include "attention/attention_plugin.hpp"
#include "common/cuda_driver.hpp"
#include "common/logging.hpp"
#include "focal/focal_plugin.hpp"
#include "sampling/sampling_plugin.hpp"

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    auto const version = [](auto attributes, int32_t number) {
        attributes.versionNumber = number;
        return attributes;
    };
    static fna::PluginCreator<fna::AttentionPlugin> attention{version(fna::AttentionAttributes{}, 1)};
    static fna::PluginCreator<fna::AttentionPlugin> maskedAttention{version(fna::AttentionAttributes{}, 2)};
    static fna::PluginCreator<fna::AttentionPlugin> attentionWithCore{version(fna::AttentionAttributes{}, 3)};
    static fna::PluginCreator<fna::SamplingPlugin> sampling{{}};
    static fna::PluginCreator<fna::FocalPlugin> focal{version(fna::FocalAttributes{}, 1)};
    static fna::PluginCreator<fna::FocalPlugin> maskedFocal{version(fna::FocalAttributes{}, 2)};
    static nvinfer1::IPluginCreatorInterface* const creators[]
        = {&attention, &sampling, &maskedAttention, &attentionWithCore, &focal, &maskedFocal};
    nbCreators = 6;
    return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    fna::useLoggerFinder(finder);
}

void fnaCountKernels(int32_t* compiled, int32_t* fromPtx)
{
    fna::countKernels(*compiled, *fromPtx);
}
