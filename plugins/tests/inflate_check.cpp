// inflate_check SIZE < PACKED > UNPACKED: what the library does to its kernels; ends with 1 for a damaged stream.
#include "common/inflate.hpp"

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv)
{
    if (argc != 2)
    {
        return 2;
    }
    std::vector<uint8_t> packed;
    for (int byte = std::getchar(); byte != EOF; byte = std::getchar())
    {
        packed.push_back(static_cast<uint8_t>(byte));
    }
    auto const size = static_cast<size_t>(std::atoll(argv[1]));
    std::vector<uint8_t> const out = fna::inflate(packed.data(), packed.size(), size);
    std::fwrite(out.data(), 1, out.size(), stdout);
    return out.size() == size ? 0 : 1;
}
