// Attention of one tile: some queries over their own list of keys, in one of several kinds of instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fna {

// Rows of one image and head; token i begins at first + i * step.
struct Rows {
  const float* first;
  std::size_t step;
};

struct Tile {
  Rows query, key, value;
  float* out;
  std::size_t out_step;
  const std::int32_t* query_tokens;  // [queries]
  const std::int32_t* out_tokens;    // [queries], where their results go
  std::int32_t queries;
  const std::int32_t* key_tokens;  // [keys]
  const float* key_bias;           // [keys], added to the scores
  std::int32_t keys;               // at least 1
  std::int32_t head_size;
  float scale;
};

// Writes softmax(scale * query . key + bias) . value of the tile's queries; scratch has scratch_floats of it, on 64 bytes.
using AttendTile = void (*)(const Tile& tile, float* scratch);

constexpr std::int32_t MOST_LANES = 64;  // queries at a time

constexpr std::size_t scratch_floats(std::size_t keys, std::size_t head_size) {
  return MOST_LANES * (keys + 2 * head_size);
}

namespace wide {  // AVX-512
void attend_tile(const Tile& tile, float* scratch);
}
namespace middle {  // AVX2 and FMA
void attend_tile(const Tile& tile, float* scratch);
}
namespace narrow {  // what every processor of the kind has: SSE2, NEON
void attend_tile(const Tile& tile, float* scratch);
}

}  // namespace fna
