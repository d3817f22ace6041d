// A stand-in for libcuda.so.1: device memory is the host's, every event is a millisecond after the one before, and a graph is captured
// and launched by name only. With STAND_IN_GPUS=0 there is no GPU.
// A copy from pageable memory on the legacy stream has been staged when the call returns, but has not arrived: it arrives when that
// stream is waited for. Work on a stream made with CU_STREAM_NON_BLOCKING does not wait for it; copies on that stream come in order.
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

using Pointer = unsigned long long;
using Handle = void*;

namespace
{

std::vector<std::pair<Pointer, std::vector<char>>> gOnTheWay;

void arrive()
{
    for (auto const& [pointer, bytes] : gOnTheWay)
    {
        std::memcpy(reinterpret_cast<void*>(pointer), bytes.data(), bytes.size());
    }
    gOnTheWay.clear();
}

} // namespace

extern "C"
{
int cuGetErrorString(int, char const** text) { *text = "stand-in error"; return 0; }
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = 12060; return 0; }
int cuDeviceGetCount(int* count)
{
    char const* const text = std::getenv("STAND_IN_GPUS");
    *count = text == nullptr ? 1 : std::atoi(text);
    return 0;
}
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetName(char* name, int length, int) { std::strncpy(name, "Stand-in GPU", static_cast<unsigned>(length)); return 0; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? 8 : 7; return 0; }
int cuDevicePrimaryCtxRetain(Handle* context, int) { *context = nullptr; return 0; }
int cuCtxSetCurrent(Handle) { return 0; }
int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) { *free = 1; *total = 2; return 0; }
int cuMemAlloc_v2(Pointer* pointer, std::size_t bytes) { *pointer = reinterpret_cast<Pointer>(std::calloc(bytes, 1)); return 0; }
int cuMemFree_v2(Pointer pointer) { std::free(reinterpret_cast<void*>(pointer)); return 0; }
int cuMemcpyHtoD_v2(Pointer to, void const* from, std::size_t bytes)
{
    char const* const start = static_cast<char const*>(from);
    gOnTheWay.emplace_back(to, std::vector<char>(start, start + bytes));
    return 0;
}
int cuMemcpyDtoH_v2(void* to, Pointer from, std::size_t bytes)
{
    arrive();
    std::memcpy(to, reinterpret_cast<void const*>(from), bytes);
    return 0;
}
int cuMemcpyHtoDAsync_v2(Pointer to, void const* from, std::size_t bytes, Handle stream)
{
    if (stream == nullptr)
    {
        return cuMemcpyHtoD_v2(to, from, bytes);
    }
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, Pointer from, std::size_t bytes, Handle)
{
    std::memcpy(to, reinterpret_cast<void const*>(from), bytes);
    return 0;
}
int cuStreamCreate(Handle* stream, unsigned) { *stream = std::malloc(1); return 0; }
int cuStreamSynchronize(Handle stream)
{
    if (stream == nullptr)
    {
        arrive();
    }
    return 0;
}
int cuEventCreate(Handle* event, unsigned) { *event = std::malloc(1); return 0; }
int cuEventRecord(Handle, Handle) { return 0; }
int cuEventElapsedTime(float* milliseconds, Handle, Handle)
{
    static int count = 0;
    *milliseconds = static_cast<float>(++count); // 1, 2, 3, ... in the order they are asked for
    return 0;
}
int cuStreamBeginCapture_v2(Handle, int) { return std::getenv("STAND_IN_NO_CAPTURE") == nullptr ? 0 : 1; }
int cuStreamEndCapture(Handle, Handle* graph) { *graph = nullptr; return 0; }
int cuGraphInstantiateWithFlags(Handle* executable, Handle, unsigned long long) { *executable = std::malloc(1); return 0; }
int cuGraphLaunch(Handle, Handle) { return 0; }
}
