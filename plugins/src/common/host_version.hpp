// Which TensorRT this process runs. The plugin interfaces are the same in TensorRT 10 and 11, but two others are not: ILoggerFinder
// and ILogger became versioned interfaces, and IPluginRegistry lost its first functions, so their virtual tables have moved. A
// library built with headers of one major version must not call those of the other.
#pragma once

namespace fna
{

// True when the process holds no TensorRT that can be recognised, or one of the major version of the headers that this was
// compiled with. TensorRT for RTX counts as another.
bool hostMatchesHeaders() noexcept;

} // namespace fna
