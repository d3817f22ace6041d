#include "common/launch_plan.hpp"

#include "common/logging.hpp"

#include <algorithm>

namespace fna
{
namespace
{

DtypeFacts const& factsOf(Dtype dtype)
{
    return kDtypes[static_cast<size_t>(dtype)];
}

} // namespace

void Plan::add(char const* kernel, Dtype dtype, int64_t landmarks, int64_t headSize, int64_t x, int64_t y,
    std::vector<Argument> arguments)
{
    std::string name = std::string(kernel) + "-" + factsOf(dtype).name;
    if (landmarks != 0)
    {
        name += "-s" + std::to_string(landmarks);
    }
    if (headSize != 0)
    {
        name += "-d" + std::to_string(headSize);
    }
    launches.push_back(
        Launch{std::move(name), {static_cast<uint32_t>(x), static_cast<uint32_t>(y), 1U}, std::move(arguments)});
}

int64_t divideUp(int64_t value, int64_t by)
{
    return (value + by - 1) / by;
}

int64_t bytesOf(Dtype dtype)
{
    return factsOf(dtype).bytes;
}

size_t layOut(std::initializer_list<std::pair<Slot, int64_t>> sizes, std::array<size_t, kSlots>& offsets)
{
    int64_t offset = 0;
    for (auto const& [slot, size] : sizes)
    {
        offsets[slot] = static_cast<size_t>(offset);
        offset = divideUp(offset + size, kAlignment) * kAlignment;
    }
    return static_cast<size_t>(offset);
}

bool checkAtLeastOne(char const* name, int64_t value) noexcept
{
    if (value < 1)
    {
        logError(name, " is ", value, ", but at least 1 is needed");
    }
    return value >= 1;
}

bool checkCount(int64_t landmarks, int64_t tokens) noexcept
{
    int64_t const most = std::min(kMaxLandmarks, tokens);
    if (landmarks < 1 || landmarks > most)
    {
        logError(landmarks, " landmarks were given for ", tokens, " tokens, but the kernels take 1 to ", most);
        return false;
    }
    return true;
}

bool checkStride(char const* what, int64_t elements) noexcept
{
    if (elements > kMaxStride)
    {
        logError(what, " is ", elements, " elements, but the kernels take at most ", kMaxStride);
    }
    return elements <= kMaxStride;
}

bool checkHeadSize(int64_t headSize) noexcept
{
    bool const good = headSize >= 1 && headSize <= kMaxHeadSize && headSize % kHeadSizeStep == 0;
    if (!good)
    {
        logError("head size D is ", headSize, ", but the kernels take multiples of ", kHeadSizeStep, " up to ", kMaxHeadSize);
    }
    return good;
}

bool checkHeads(int64_t batch, int64_t heads) noexcept
{
    bool const good = batch <= kMaxGridY && batch * heads <= kMaxGridY;
    if (!good)
    {
        logError("B * H is ", batch, " * ", heads, ", but the kernels take at most ", kMaxGridY);
    }
    return good;
}

bool loadPlan(Plan& plan, Device const& device) noexcept
{
    for (Launch& launch : plan.launches)
    {
        if (!loadKernel(launch.variant.c_str(), device, launch.kernel))
        {
            return false;
        }
    }
    return true;
}

bool runPlan(Plan const& plan, std::array<void const*, kSlots> tensors, void* workspace, CUstream stream) noexcept
{
    for (size_t slot = kPartial; slot < kSlots; ++slot)
    {
        tensors[slot] = static_cast<char*>(workspace) + plan.offsets[slot];
    }
    for (Launch const& launch : plan.launches)
    {
        void const* arguments[kMaxArguments];
        if (launch.arguments.size() > kMaxArguments)
        {
            logError("kernel ", launch.variant, " has ", launch.arguments.size(), " arguments, but at most ", kMaxArguments);
            return false;
        }
        for (size_t i = 0; i < launch.arguments.size(); ++i)
        {
            Argument const& argument = launch.arguments[i];
            arguments[i] = argument.kind == Argument::Kind::kAddress ? static_cast<void const*>(&tensors[argument.slot])
                : argument.kind == Argument::Kind::kInteger         ? static_cast<void const*>(&argument.integer)
                                                                    : static_cast<void const*>(&argument.real);
        }
        if (!launchKernel(launch.kernel, launch.grid, arguments, stream))
        {
            return false;
        }
    }
    return true;
}

} // namespace fna
