#include "common/host_version.hpp"

#include <NvInferVersion.h>

#include <cctype>
#include <cstring>
#include <link.h>

namespace fna
{
namespace
{

constexpr char const* kTensorRt = "libnvinfer";
constexpr char const* kTensorRtForRtx = "libtensorrt_rtx.so";
constexpr char const* kSuffix = ".so.";

// The number at the start of a text. By hand: the C library's own are symbols of the newest one where they are compiled.
int leadingNumber(char const* text)
{
    int number = 0;
    for (; std::isdigit(static_cast<unsigned char>(*text)) != 0; ++text)
    {
        number = 10 * number + (*text - '0');
    }
    return number;
}

// Looks at one loaded library; `matches` is cleared by one of another version.
int look(dl_phdr_info* info, size_t, void* matches)
{
    char const* const slash = info->dlpi_name == nullptr ? nullptr : std::strrchr(info->dlpi_name, '/');
    char const* const name = slash == nullptr ? info->dlpi_name : slash + 1;
    if (name == nullptr)
    {
        return 0;
    }
    bool const rtx = std::strncmp(name, kTensorRtForRtx, std::strlen(kTensorRtForRtx)) == 0;
    char const* const version = std::strstr(name, kSuffix);
    bool const tensorRt = std::strncmp(name, kTensorRt, std::strlen(kTensorRt)) == 0 && version != nullptr;
    if (rtx || (tensorRt && leadingNumber(version + std::strlen(kSuffix)) != NV_TENSORRT_MAJOR))
    {
        *static_cast<bool*>(matches) = false;
    }
    return 0;
}

} // namespace

bool hostMatchesHeaders() noexcept
{
    bool matches = true;
    dl_iterate_phdr(look, &matches);
    return matches;
}

} // namespace fna
