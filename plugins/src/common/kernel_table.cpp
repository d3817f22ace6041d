#include "common/kernel_table.hpp"

#include "common/inflate.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <exception>
#include <sstream>

namespace fna
{
namespace
{

struct Footer
{
    char magic[8];
    uint64_t images;
    uint64_t index;
};

constexpr char kMagic[] = "FNAKERN1";

// This library's file, opened while it is loaded: later its name may be another file's, or the working folder another.
class OwnFile
{
public:
    OwnFile()
    {
        try
        {
            read();
        }
        catch (std::exception const& error)
        {
            mProblem = error.what();
        }
        if (!mProblem.empty())
        {
            mEntries.clear();
        }
    }

    ~OwnFile()
    {
        if (mFile >= 0)
        {
            close(mFile);
        }
    }

    OwnFile(OwnFile const&) = delete;
    OwnFile& operator=(OwnFile const&) = delete;

    std::vector<KernelEntry> const& entries() const
    {
        return mEntries;
    }

    std::string const& problem() const
    {
        return mProblem;
    }

    bool readAt(uint64_t place, void* data, size_t size) const
    {
        auto* to = static_cast<char*>(data);
        while (size > 0)
        {
            ssize_t const some = pread(mFile, to, size, static_cast<off_t>(place));
            if (some <= 0)
            {
                return false;
            }
            to += some;
            place += static_cast<uint64_t>(some);
            size -= static_cast<size_t>(some);
        }
        return true;
    }

    uint64_t images() const
    {
        return mImages;
    }

private:
    void read()
    {
        Dl_info self{};
        if (dladdr(reinterpret_cast<void const*>(&kMagic), &self) == 0 || self.dli_fname == nullptr)
        {
            mProblem = "this library's file is not known";
            return;
        }
        mFile = open(self.dli_fname, O_RDONLY | O_CLOEXEC);
        off_t const size = mFile < 0 ? -1 : lseek(mFile, 0, SEEK_END);
        Footer footer{};
        auto const end = static_cast<uint64_t>(size) - sizeof(Footer);
        if (size < static_cast<off_t>(sizeof(Footer)) || !readAt(end, &footer, sizeof(Footer)))
        {
            mProblem = std::string(self.dli_fname) + " cannot be read";
            return;
        }
        if (std::memcmp(footer.magic, kMagic, sizeof(footer.magic)) != 0 || footer.images > end || footer.index > end - footer.images)
        {
            mProblem = std::string(self.dli_fname)
                + " carries no kernels: it was not joined with kernels.bin, or was stripped since; build it anew: fna plugin";
            return;
        }
        mImages = end - footer.index - footer.images;
        std::string index(footer.index, '\0');
        std::istringstream lines(readAt(end - footer.index, &index[0], index.size()) ? index : std::string());
        KernelEntry entry;
        while (lines >> entry.variant >> entry.sm >> entry.offset >> entry.packed >> entry.size >> entry.shared >> entry.warps
            >> entry.symbol >> entry.layout)
        {
            if (entry.offset > footer.images || entry.packed > footer.images - entry.offset)
            {
                mProblem = std::string(self.dli_fname) + " has a damaged index of kernels; build it anew: fna plugin";
                return;
            }
            mEntries.push_back(entry);
        }
    }

    int mFile{-1};
    uint64_t mImages{0}; // where they begin
    std::vector<KernelEntry> mEntries;
    std::string mProblem;
};

OwnFile const gOwnFile;

} // namespace

KernelEntry const* findKernel(char const* variant, int32_t sm) noexcept
{
    for (KernelEntry const& entry : gOwnFile.entries())
    {
        if (entry.sm == sm && entry.variant == variant)
        {
            return &entry;
        }
    }
    return nullptr;
}

std::string const& whyNoKernels() noexcept
{
    return gOwnFile.problem();
}

std::vector<uint8_t> unpackKernel(KernelEntry const& entry)
{
    std::vector<uint8_t> packed(entry.packed);
    if (!gOwnFile.readAt(gOwnFile.images() + entry.offset, packed.data(), packed.size()))
    {
        return {};
    }
    return inflate(packed.data(), packed.size(), entry.size);
}

} // namespace fna
