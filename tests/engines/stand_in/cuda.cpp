// A stand-in for libcuda.so.1: device memory is the host's, every event is a millisecond after the one before, and a graph is captured
// and launched by name only. With STAND_IN_GPUS=0 there is no GPU.
#include <cstdlib>
#include <cstring>

using Pointer = unsigned long long;
using Handle = void*;

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
int cuMemcpyHtoD_v2(Pointer to, void const* from, std::size_t bytes) { std::memcpy(reinterpret_cast<void*>(to), from, bytes); return 0; }
int cuMemcpyDtoH_v2(void* to, Pointer from, std::size_t bytes) { std::memcpy(to, reinterpret_cast<void const*>(from), bytes); return 0; }
int cuStreamCreate(Handle* stream, unsigned) { *stream = nullptr; return 0; }
int cuStreamSynchronize(Handle) { return 0; }
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
