#include "common/inflate.hpp"

#include <array>

namespace fna
{
namespace
{

constexpr int kMaxBits = 15;
constexpr int kMaxLiterals = 288;
constexpr int kMaxDistances = 30;

// Base value and number of extra bits of the length and distance codes (RFC 1951, section 3.2.5).
constexpr std::array<uint16_t, 29> kLengthBase{
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr std::array<uint8_t, 29> kLengthExtra{
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr std::array<uint16_t, 30> kDistanceBase{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513,
    769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr std::array<uint8_t, 30> kDistanceExtra{
    0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};
constexpr std::array<uint8_t, 19> kCodeOrder{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

class Bits
{
public:
    Bits(uint8_t const* data, size_t size)
        : mData(data)
        , mSize(size)
    {
    }

    uint32_t take(int count)
    {
        while (mCount < count)
        {
            if (mNext >= mSize)
            {
                mFailed = true;
                return 0;
            }
            mHeld |= static_cast<uint32_t>(mData[mNext++]) << mCount;
            mCount += 8;
        }
        uint32_t const value = mHeld & ((1U << count) - 1U);
        mHeld >>= count;
        mCount -= count;
        return value;
    }

    // A stored block starts at a byte: drop what is left of the current one.
    void align()
    {
        mHeld = 0;
        mCount = 0;
    }

    bool failed() const
    {
        return mFailed;
    }

private:
    uint8_t const* mData;
    size_t mSize;
    size_t mNext{0};
    uint32_t mHeld{0};
    int mCount{0};
    bool mFailed{false};
};

// A canonical Huffman code: how many codes there are of each length, and the symbols in code order.
struct Code
{
    std::array<uint16_t, kMaxBits + 1> count{};
    std::array<uint16_t, kMaxLiterals> symbol{};

    void build(uint8_t const* lengths, int symbols)
    {
        count.fill(0);
        for (int s = 0; s < symbols; ++s)
        {
            ++count[lengths[s]];
        }
        count[0] = 0;
        std::array<uint16_t, kMaxBits + 2> start{};
        for (int bits = 1; bits <= kMaxBits; ++bits)
        {
            start[bits + 1] = static_cast<uint16_t>(start[bits] + count[bits]);
        }
        for (int s = 0; s < symbols; ++s)
        {
            if (lengths[s] != 0)
            {
                symbol[start[lengths[s]]++] = static_cast<uint16_t>(s);
            }
        }
    }

    // The next symbol, or -1 for a code that does not exist.
    int decode(Bits& bits) const
    {
        int code = 0;
        int first = 0;
        int index = 0;
        for (int length = 1; length <= kMaxBits; ++length)
        {
            code |= static_cast<int>(bits.take(1));
            if (bits.failed())
            {
                return -1;
            }
            int const many = count[length];
            if (code - many < first)
            {
                return symbol[index + (code - first)];
            }
            index += many;
            first = (first + many) << 1;
            code <<= 1;
        }
        return -1;
    }
};

bool readFixed(Code& literals, Code& distances)
{
    std::array<uint8_t, kMaxLiterals> lengths{};
    for (int s = 0; s < kMaxLiterals; ++s)
    {
        lengths[s] = s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8;
    }
    literals.build(lengths.data(), kMaxLiterals);
    lengths.fill(5);
    distances.build(lengths.data(), kMaxDistances);
    return true;
}

bool readDynamic(Bits& bits, Code& literals, Code& distances)
{
    int const literalCount = static_cast<int>(bits.take(5)) + 257;
    int const distanceCount = static_cast<int>(bits.take(5)) + 1;
    int const codeCount = static_cast<int>(bits.take(4)) + 4;
    if (literalCount > kMaxLiterals || distanceCount > kMaxDistances)
    {
        return false;
    }
    std::array<uint8_t, kMaxLiterals + 32> lengths{};
    for (int i = 0; i < codeCount; ++i)
    {
        lengths[kCodeOrder[i]] = static_cast<uint8_t>(bits.take(3));
    }
    Code code;
    code.build(lengths.data(), static_cast<int>(kCodeOrder.size()));
    lengths.fill(0);
    int filled = 0;
    while (filled < literalCount + distanceCount)
    {
        int const symbol = code.decode(bits);
        int repeat = 1;
        uint8_t length = 0;
        if (symbol < 0 || bits.failed())
        {
            return false;
        }
        if (symbol < 16)
        {
            length = static_cast<uint8_t>(symbol);
        }
        else if (symbol == 16)
        {
            if (filled == 0)
            {
                return false;
            }
            length = lengths[filled - 1];
            repeat = 3 + static_cast<int>(bits.take(2));
        }
        else
        {
            repeat = symbol == 17 ? 3 + static_cast<int>(bits.take(3)) : 11 + static_cast<int>(bits.take(7));
        }
        if (filled + repeat > literalCount + distanceCount)
        {
            return false;
        }
        for (; repeat > 0; --repeat)
        {
            lengths[filled++] = length;
        }
    }
    literals.build(lengths.data(), literalCount);
    distances.build(lengths.data() + literalCount, distanceCount);
    return true;
}

bool readCodes(Bits& bits, Code const& literals, Code const& distances, std::vector<uint8_t>& out, size_t size)
{
    while (true)
    {
        int symbol = literals.decode(bits);
        if (symbol < 0)
        {
            return false;
        }
        if (symbol == 256)
        {
            return true;
        }
        if (symbol < 256)
        {
            out.push_back(static_cast<uint8_t>(symbol));
        }
        else
        {
            symbol -= 257;
            if (symbol >= static_cast<int>(kLengthBase.size()))
            {
                return false;
            }
            size_t const length = kLengthBase[symbol] + bits.take(kLengthExtra[symbol]);
            int const place = distances.decode(bits);
            if (place < 0 || place >= kMaxDistances)
            {
                return false;
            }
            size_t const distance = kDistanceBase[place] + bits.take(kDistanceExtra[place]);
            if (bits.failed() || distance > out.size() || out.size() + length > size)
            {
                return false;
            }
            for (size_t i = 0; i < length; ++i)
            {
                out.push_back(out[out.size() - distance]);
            }
        }
        if (out.size() > size)
        {
            return false;
        }
    }
}

bool readStored(Bits& bits, std::vector<uint8_t>& out, size_t size)
{
    bits.align();
    uint32_t const length = bits.take(16);
    uint32_t const check = bits.take(16);
    if (bits.failed() || length != (~check & 0xFFFFU) || out.size() + length > size)
    {
        return false;
    }
    for (uint32_t i = 0; i < length; ++i)
    {
        out.push_back(static_cast<uint8_t>(bits.take(8)));
    }
    return !bits.failed();
}

} // namespace

std::vector<uint8_t> inflate(uint8_t const* packed, size_t packedSize, size_t size)
{
    Bits bits(packed, packedSize);
    std::vector<uint8_t> out;
    out.reserve(size);
    Code literals;
    Code distances;
    bool last = false;
    while (!last)
    {
        last = bits.take(1) != 0;
        uint32_t const kind = bits.take(2);
        bool good = false;
        if (kind == 0)
        {
            good = readStored(bits, out, size);
        }
        else if (kind < 3)
        {
            good = (kind == 1 ? readFixed(literals, distances) : readDynamic(bits, literals, distances))
                && readCodes(bits, literals, distances, out, size);
        }
        if (!good || bits.failed())
        {
            return {};
        }
    }
    return out.size() == size ? out : std::vector<uint8_t>{};
}

} // namespace fna
