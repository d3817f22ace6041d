// Tensors of queries, keys, values and results, and the memory of a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.hpp"

namespace fna {

struct Sizes {
  std::int32_t batch, heads, tokens, head_size;

  std::size_t pairs() const { return static_cast<std::size_t>(batch) * heads; }
};

// A tensor of [batch, heads, tokens, head_size], or of [batch, tokens, heads, head_size] where heads come last.
struct Layout {
  bool heads_last = false;

  // Where a pair of image and head begins; pairs count the heads of the first image, then those of the second.
  std::size_t start(std::size_t pair, const Sizes& sizes) const {
    const std::size_t image = pair / sizes.heads, head = pair % sizes.heads;
    return heads_last ? (image * sizes.tokens * sizes.heads + head) * sizes.head_size : pair * sizes.tokens * sizes.head_size;
  }
  std::size_t step(const Sizes& sizes) const {
    return heads_last ? static_cast<std::size_t>(sizes.heads) * sizes.head_size : sizes.head_size;
  }
  Rows rows(const float* tensor, std::size_t pair, const Sizes& sizes) const { return {tensor + start(pair, sizes), step(sizes)}; }
};

// Floats on a boundary of 64 bytes, kept by a thread from one step to the next.
class AlignedFloats {
 public:
  float* get(std::size_t count) {
    constexpr std::size_t LINE = 64;
    floats_.resize(std::max(floats_.size(), count + LINE / sizeof(float)));
    const auto address = reinterpret_cast<std::uintptr_t>(floats_.data());
    return reinterpret_cast<float*>((address + LINE - 1) / LINE * LINE);
  }

 private:
  std::vector<float> floats_;
};

inline bool any_outside(const std::int32_t* numbers, std::size_t count, std::int32_t end) {
  return std::any_of(numbers, numbers + count, [end](std::int32_t number) { return number < 0 || number >= end; });
}

}  // namespace fna
